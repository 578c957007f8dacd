"""Examples to look at: pictures with questions and answers, as one PNG or one HTML page."""

from __future__ import annotations

import base64
import contextlib
import importlib.util
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont, ImageOps

from mm_agrae.config import Config
from mm_agrae.errors import ConfigError
from mm_agrae.run.records import SampleRecord
from mm_agrae.tasks import Task, load_all
from mm_agrae.tasks.images import encode_png, open_image
from mm_agrae.types import Example
from mm_agrae.view.page import Html, el, join, page

if TYPE_CHECKING:
    from mm_agrae.evaluation.evaluate import EvaluatedProblem

CELL_PX = 320
PICTURE_PX = 240
MARGIN_PX = 12
FONT_PX = 14
LINE_PX = 18
MAX_LINES = 14
"""Longer captions are cut, so that one long question does not stretch its whole row."""


def contact_sheet(examples: Sequence[Example], columns: int = 4) -> Image.Image:
    """One RGB picture: a cell an example, its pictures above its question and gold answer.

    Raises DataError for a picture that cannot be used.
    """
    if not examples:
        raise ValueError("contact_sheet: no examples")
    columns = max(1, min(columns, len(examples)))
    font = _font()
    cells = [_cell(example, font) for example in examples]
    rows = [cells[start : start + columns] for start in range(0, len(cells), columns)]
    heights = [max(cell.height for cell in row) for row in rows]
    sheet = Image.new("RGB", (columns * CELL_PX, sum(heights)), "white")
    draw = ImageDraw.Draw(sheet)
    top = 0
    for row, height in zip(rows, heights, strict=True):
        for column, cell in enumerate(row):
            left = column * CELL_PX
            sheet.paste(cell, (left, top))
            draw.rectangle((left, top, left + CELL_PX - 1, top + height - 1), outline="#c8c8c8")
        top += height
    return sheet


def sample_html(
    examples: Sequence[Example], completions: Sequence[Sequence[SampleRecord]] = ()
) -> str:
    """A page that stands by itself: pictures inside it, all text escaped.

    `completions` holds the graded samples of each example, in the order of `examples`. Raises
    DataError for a picture that cannot be used.
    """
    samples = list(completions) or [()] * len(examples)
    cards = [_card(example, rows) for example, rows in zip(examples, samples, strict=True)]
    return page("Examples", el("header", el("h1", "Examples")), [("Examples", join(cards))])


def write_samples(config: Config, *, split: str, count: int, completions: int, out: Path) -> Path:
    """Write `count` examples, spread evenly over the split ("train" or "evaluate"), to `out`.

    An `out` that ends in .png becomes a contact sheet, any other a page, which also shows
    `completions` graded samples an example from the model of the config. Raises ConfigError for
    a split without data, DataError for data that cannot be used.
    """
    if out.suffix == ".png" and completions:
        raise ConfigError(f"sample: completions are shown on a page, not on {out}; use .html")
    sources = config.data.train if split == "train" else config.data.evaluate
    if not sources:
        raise ConfigError(f"sample: data.{split} names no data")
    task = load_all(sources, on_bad_row=config.data.on_bad_row)
    count = min(count, len(task))
    indices = [number * len(task) // count for number in range(count)]
    if completions:
        problems = _solve(config, task, indices, completions)
        content: str | bytes = sample_html(
            [problem.example for problem in problems], [problem.records for problem in problems]
        )
    elif out.suffix == ".png":
        content = encode_png(contact_sheet([task[index] for index in indices]))
    else:
        content = sample_html([task[index] for index in indices])
    try:
        out.write_bytes(content if isinstance(content, bytes) else content.encode())
    except OSError as error:
        raise ConfigError(f"sample: cannot write {out} ({error.strerror})") from None
    return out


def _solve(
    config: Config, task: Task, indices: Sequence[int], completions: int
) -> list[EvaluatedProblem]:
    from mm_agrae.evaluation import evaluate
    from mm_agrae.evaluation.checkpoints import build_engine
    from mm_agrae.rewards import Rewarder

    processing, _, engine = build_engine(config, config.model.path)
    section = config.evaluate.model_copy(update={"samples": completions, "greedy": False})
    with (
        contextlib.closing(engine),
        Rewarder(config.reward, section.max_new_tokens) as rewarder,
    ):
        return evaluate.run(
            engine,
            processing,
            rewarder,
            task,
            indices,
            section,
            on_bad_row=config.data.on_bad_row,
        )


def _card(example: Example, records: Sequence[SampleRecord]) -> Html:
    pictures = [
        el("img", src=f"data:image/png;base64,{_base64(image)}", alt=f"picture {number}")
        for number, image in enumerate(_pictures(example), 1)
    ]
    problem = el(
        "div",
        *pictures,
        el("div", example.question, class_="question"),
        el("p", "Answer: ", el("b", example.answer)),
        el("p", example.id, class_="muted small"),
        class_="problem",
    )
    if not records:
        return el("article", problem, class_="card")
    graded = [
        el(
            "details",
            el("summary", el("span", verdict, class_=f"verdict {verdict}")),
            el("pre", record.completion or "(empty)"),
            class_="completion",
            open="",
        )
        for record in records
        for verdict in ["right" if record.success else "wrong"]
    ]
    return el("article", problem, el("div", *graded), class_="card group")


def _base64(image: Image.Image) -> str:
    return base64.b64encode(encode_png(image)).decode()


def _pictures(example: Example) -> list[Image.Image]:
    origin = example.origin or example.id
    return [open_image(source, origin=origin) for source in example.images]


def _cell(example: Example, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> Image.Image:
    width = CELL_PX - 2 * MARGIN_PX
    pictures = _pictures(example)
    lines = _wrap(example.question, font)[: MAX_LINES + 1]
    if len(lines) > MAX_LINES:
        lines[MAX_LINES - 1 :] = ["…"]
    answer = _wrap(f"Answer: {example.answer}", font)[:3]
    picture_height = PICTURE_PX + MARGIN_PX if pictures else 0
    height = 2 * MARGIN_PX + picture_height + LINE_PX * (len(lines) + len(answer) + 1)
    cell = Image.new("RGB", (CELL_PX, height), "white")
    draw = ImageDraw.Draw(cell)
    share = width // max(1, len(pictures))
    for number, picture in enumerate(pictures):
        small = ImageOps.contain(picture, (max(1, share - 4), PICTURE_PX))
        left = MARGIN_PX + number * share + (share - small.width) // 2
        cell.paste(small, (left, MARGIN_PX + (PICTURE_PX - small.height) // 2))
    top = MARGIN_PX + picture_height
    for colour, texts in (("black", lines), ("#0b5d1e", answer), ("#777777", [example.id])):
        for text in texts:
            draw.text((MARGIN_PX, top), text, fill=colour, font=font)
            top += LINE_PX
    return cell


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[str]:
    """Lines that fit a cell, as long as letters are not wider than n on average."""
    letters = int((CELL_PX - 2 * MARGIN_PX) / font.getlength("n"))
    paragraphs = text[: 2 * MAX_LINES * letters].splitlines()
    return [line for paragraph in paragraphs for line in textwrap.wrap(paragraph, letters) or [""]]


def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """matplotlib's font, which has the signs of mathematics; Pillow's own has not."""
    matplotlib = importlib.util.find_spec("matplotlib")
    if matplotlib is not None and matplotlib.origin is not None:
        path = Path(matplotlib.origin).parent / "mpl-data/fonts/ttf/DejaVuSans.ttf"
        if path.is_file():
            return ImageFont.truetype(str(path), FONT_PX)
    return ImageFont.load_default(FONT_PX)
