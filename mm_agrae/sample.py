"""Examples to look at: pictures with questions and answers, as one PNG or one HTML page."""

from __future__ import annotations

import base64
import html
import importlib.util
import textwrap
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from mm_agrae.images import encode_png, open_image
from mm_agrae.types import Example

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


def sample_html(examples: Sequence[Example]) -> str:
    """A page that stands by itself: pictures inside it, all text escaped.

    Raises DataError for a picture that cannot be used.
    """
    cards = "\n".join(_card(example) for example in examples)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Examples</title>
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem; color: #1a1a1a; background: #fff }}
main {{ display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(20rem, 1fr)) }}
article {{ border: 1px solid #ccc; border-radius: 6px; padding: 1rem; overflow-wrap: anywhere }}
img {{ max-width: 100%; max-height: 20rem; display: block; margin: 0 auto .6rem }}
.question {{ white-space: pre-wrap }}
.id {{ color: #666; font-size: .85em }}
</style></head><body><main>
{cards}
</main></body></html>
"""


def _card(example: Example) -> str:
    pictures = "".join(
        f'<img alt="picture {number}" src="data:image/png;base64,{_base64(image)}">'
        for number, image in enumerate(_pictures(example), 1)
    )
    return (
        f"<article>{pictures}"
        f'<div class="question">{html.escape(example.question)}</div>'
        f"<div><b>Answer:</b> {html.escape(example.answer)}</div>"
        f'<div class="id">{html.escape(example.id)}</div></article>'
    )


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
