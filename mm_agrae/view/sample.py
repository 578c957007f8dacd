"""Examples of a data set with images, questions and answers: one PNG, one HTML page, or text on its rows."""

from __future__ import annotations

import base64
import contextlib
import importlib.util
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageDraw, ImageFont, ImageOps

from mm_agrae import config as configs
from mm_agrae.config import Config
from mm_agrae.config.reading import apply_override
from mm_agrae.errors import ConfigError, DataError
from mm_agrae.model.checking import report
from mm_agrae.progress import Reporter
from mm_agrae.run.records import SampleRecord
from mm_agrae.tasks import TASKS, Task, load_all
from mm_agrae.tasks.images import encode_png, open_image, printable
from mm_agrae.types import Example
from mm_agrae.view.components import verdict
from mm_agrae.view.page import Html, el, join, page

if TYPE_CHECKING:
    from mm_agrae.evaluation.evaluate import EvaluatedProblem

CELL_PX = 320
IMAGE_PX = 240
MARGIN_PX = 12
FONT_PX = 14
LINE_PX = 18
MAX_LINES = 14
"""Longer captions are cut so that one long question does not stretch its whole row."""


def contact_sheet(examples: Sequence[Example], columns: int = 4) -> Image.Image:
    """One RGB image with a cell per example: its images above its question and gold answer.

    Raises DataError for an image that cannot be used.
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


def sample_html(examples: Sequence[Example], completions: Sequence[Sequence[SampleRecord]] = ()) -> str:
    """A self-contained page, with images embedded.

    `completions` are the graded samples of each example, in the order of `examples`. Raises
    DataError for an image that cannot be used.
    """
    samples = list(completions) or [()] * len(examples)
    cards = [card(example, rows) for example, rows in zip(examples, samples, strict=True)]
    return page("Examples", el("header", el("h1", "Examples")), [("Examples", join(cards))])


def write_samples(config: Config, *, split: str, count: int, completions: int, out: Path) -> Path:
    """Write `count` examples, spread evenly over the split ("train" or "evaluate"), to `out`.

    If `out` ends in .png it becomes a contact sheet, otherwise a page, which also shows
    `completions` graded samples per example from the config's model. Raises ConfigError for a
    split without data, DataError for data that cannot be used.
    """
    as_sheet = out.suffix.lower() == ".png"
    if as_sheet and completions:
        raise ConfigError(f"sample: {out} cannot show completions; use .html")
    sources = config.data.train if split == "train" else config.data.evaluate
    if not sources:
        raise ConfigError(f"sample: data.{split} names no data")
    task = load_all(sources, on_bad_row=config.data.on_bad_row)
    indices = spread(len(task), count)
    if completions:
        problems = _solve(config, task, indices, completions)
        content: str | bytes = sample_html(
            [problem.example for problem in problems], [problem.records for problem in problems]
        )
    elif as_sheet:
        content = encode_png(contact_sheet([task[index] for index in indices]))
    else:
        content = sample_html([task[index] for index in indices])
    return write(out, content)


def spread(rows: int, count: int) -> list[int]:
    """At most `count` indices, evenly over the rows."""
    count = min(count, rows)
    return [number * rows // count for number in range(count)]


def write(out: Path, content: str | bytes) -> Path:
    """Raises ConfigError if that cannot be done."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_bytes(content if isinstance(content, bytes) else content.encode())
    except OSError as error:
        raise ConfigError(f"cannot write {out} ({error.strerror})") from None
    return out


def config_of(name: str, overrides: Sequence[str]) -> Config:
    """The config of a file, or one for a data set alone, whose overrides are the task's options (split=test)."""
    if Path(name).suffix in (".yaml", ".yml"):
        return configs.load(name, overrides)
    source = {"task": name} if name in TASKS else {"task": "files", "path": name}
    values: dict[str, Any] = {"run_dir": "runs/data", "model": {"path": ""}, "train": {"steps": 1}}
    values["data"] = {"train": [source]}
    for override in overrides:
        is_section = override.partition(".")[0] in ("data", "prompt", "model")
        apply_override(values if is_section else source, override)
    return configs.parse(values, source=name)


def show_data(config: Config, reporter: Reporter, *, count: int, out: Path | None) -> int:
    """Print it for every source, with `count` rows of each; `out` is a page with their images. Returns the number of
    problems that would stop a run."""
    problems = 0
    for split in ("train", "evaluate"):
        for source in getattr(config.data, split):
            task, lines = report(source, config, reporter)
            for number, (goes_on, text) in enumerate(lines):
                reporter.say(f"{'' if goes_on else '!! '}{text}" if number else f"\n{split} {text}")
                problems += not goes_on
            for index in range(min(count, len(task))):
                reporter.say(_described(task[index]))
    if out is not None:
        reporter.say(f"\n{write_samples(config, split='train', count=max(count, 1), completions=0, out=out)}")
    return problems


def _solve(config: Config, task: Task, indices: Sequence[int], completions: int) -> list[EvaluatedProblem]:
    from mm_agrae.evaluation.evaluate import build_engine, run
    from mm_agrae.rewards import Rewarder

    processing, _, engine = build_engine(config, config.model.path)
    section = config.evaluate.model_copy(update={"samples": completions, "greedy": False})
    with contextlib.closing(engine), Rewarder(config.reward, section.max_new_tokens) as rewarder:
        return run(engine, processing, rewarder, task, indices, section, on_bad_row=config.data.on_bad_row)


def card(example: Example, records: Sequence[SampleRecord] = (), title: str = "") -> Html:
    sources = (base64.b64encode(encode_png(image)).decode() for image in _images(example))
    images = [
        el("img", src=f"data:image/png;base64,{source}", alt=f"image {number}")
        for number, source in enumerate(sources, 1)
    ]
    problem = el(
        "div",
        el("h3", title) if title else None,
        *images,
        el("div", example.question, class_="question"),
        el("p", "Answer: ", el("b", example.answer)),
        el("p", example.id, class_="muted small"),
        class_="problem",
    )
    if not records:
        return el("article", problem, class_="card")
    graded = []
    for record in records:
        mark, text = el("summary", verdict(record.success)), record.completion or "(empty)"
        graded.append(el("details", mark, el("pre", text), class_="completion", open=""))
    return el("article", problem, el("div", *graded), class_="card group")


def _images(example: Example) -> list[Image.Image]:
    origin = example.origin or example.id
    return [open_image(source, origin=origin) for source in example.images]


def _described(example: Example) -> str:
    try:
        sizes = [f"{image.width}×{image.height}" for image in _images(example)]
    except DataError as error:
        sizes = [str(error)]
    turns = [("system", example.system), *example.history, ("question", example.question)]
    lines = [f"  {role}: {printable(text, 300)!r}" for role, text in turns if text]
    pictures = [f"  images: {', '.join(sizes)}"] if sizes else []
    grading = f"  ({example.grading['kind']})" if "kind" in example.grading else ""
    return "\n".join([example.id, *lines, *pictures, f"  answer: {printable(example.answer, 300)!r}{grading}"])


def _cell(example: Example, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> Image.Image:
    width = CELL_PX - 2 * MARGIN_PX
    images = _images(example)
    lines = _wrap(example.question, font)[: MAX_LINES + 1]
    if len(lines) > MAX_LINES:
        lines[MAX_LINES - 1 :] = ["…"]
    answer = _wrap(f"Answer: {example.answer}", font)[:3]
    image_height = IMAGE_PX + MARGIN_PX if images else 0
    height = 2 * MARGIN_PX + image_height + LINE_PX * (len(lines) + len(answer) + 1)
    cell = Image.new("RGB", (CELL_PX, height), "white")
    draw = ImageDraw.Draw(cell)
    share = width // max(1, len(images))
    for number, image in enumerate(images):
        small = ImageOps.contain(image, (max(1, share - 4), IMAGE_PX))
        left = MARGIN_PX + number * share + (share - small.width) // 2
        cell.paste(small, (left, MARGIN_PX + (IMAGE_PX - small.height) // 2))
    top = MARGIN_PX + image_height
    for colour, texts in (("black", lines), ("#0b5d1e", answer), ("#777777", [example.id])):
        for text in texts:
            draw.text((MARGIN_PX, top), text, fill=colour, font=font)
            top += LINE_PX
    return cell


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[str]:
    """Lines that fit a cell, provided letters are on average no wider than an n."""
    letters = int((CELL_PX - 2 * MARGIN_PX) / font.getlength("n"))
    paragraphs = text[: 2 * MAX_LINES * letters].splitlines()
    return [line for paragraph in paragraphs for line in textwrap.wrap(paragraph, letters) or [""]]


def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """A font with mathematical symbols, from matplotlib or the system; Pillow's own has none."""
    matplotlib = importlib.util.find_spec("matplotlib")
    if matplotlib is not None and matplotlib.origin is not None:
        path = Path(matplotlib.origin).parent / "mpl-data/fonts/ttf/DejaVuSans.ttf"
        if path.is_file():
            return ImageFont.truetype(str(path), FONT_PX)
    with contextlib.suppress(OSError):
        return ImageFont.truetype("DejaVuSans.ttf", FONT_PX)
    return ImageFont.load_default(FONT_PX)
