"""Changes of a problem's pictures that keep its answer: turned, noisy, blurred, coarse, or with the question in them.

Each operator says for which problems it keeps the answer (`fits`, from the words alone) and how much harder it makes
them (`delta`, in steps of DIVA-GRPO's difficulty from 1 to 9; arXiv 2603.01106 and the tables of its released code).
"""

import functools
import random
import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from mm_agrae.tasks.images import open_image
from mm_agrae.types import Example

Picture = Image.Image


@dataclass(frozen=True)
class Operator:
    """One way of making a variant of a problem. `make` may raise DataError for a picture that cannot be read."""

    name: str
    delta: int
    fits: Callable[[Example], bool]
    make: Callable[[Example, random.Random], Example]


DIRECTION = re.compile(
    r"\b((left|north|south|east|west|up|down|top|bottom|low|high|tall|under|horizontal|vertical|(counter|anti)?-?clock"
    r"|rotat|turn|orient|direction|row|column|slope|graph|plot|chart|coordinate|arrow|mirror|reflect|quadrant)\w*"
    r"|right\w*(?!([- ]angled?)?[- ](angles?|triangles?|prism|cone|cylinder|pyramid|isosceles))"
    r"|ax[ei]s|above|below|over|facing|faces|beside|front|behind)\b",
    re.IGNORECASE,
)
"""Words of a question that may have another answer once the picture is turned."""
_ENGLISH = re.compile(r"\b(the|is|are|of|what|which|how|find|calculate|compute|determine|solve)\b", re.IGNORECASE)
_LEAST_WIDTH_PX, _LEAST_FONT_PX, _MOST_LETTERS = 280, 15, 600
_GRAINS = 448
"""Grains of noise along the longer side of a picture, at least: about what a vision tower is shown."""
_MARKER = re.compile(r"<image ?[0-9]{0,3}>\s*")


def has_pictures(example: Example) -> bool:
    return bool(example.images)


def may_be_turned(example: Example) -> bool:
    """Nothing in the question depends on what is up or left; of a language other than English nobody knows."""
    text = " ".join([example.question, example.answer, *map(str, example.grading.get("choices") or ())])
    english = _ENGLISH.search(text) and not any(letter.isalpha() and ord(letter) > 0x3FF for letter in text)
    return bool(has_pictures(example) and english and not DIRECTION.search(text))


def may_be_written_in(example: Example) -> bool:
    """One picture, and a question that is short enough and that the font has the letters for."""
    text = question_of(example)
    short = 0 < len(text) <= _MOST_LETTERS and len(example.images) == 1 and not example.history
    return short and all(letter.isspace() or _drawable(letter) for letter in set(text))


def question_of(example: Example) -> str:
    return _MARKER.sub("", example.question).strip()


@functools.cache
def _drawable(letter: str) -> bool:
    font = ImageFont.load_default(_LEAST_FONT_PX)
    return bytes(font.getmask(letter)) != bytes(font.getmask("\uffff"))


def _on_each(change: Callable[[Picture, random.Random], Picture]) -> Callable[[Example, random.Random], Example]:
    """Apply a change, drawn once, to all pictures of the problem."""

    def make(example: Example, rng: random.Random) -> Example:
        seed = rng.getrandbits(64)
        pictures = [open_image(source, origin=example.origin or example.id) for source in example.images]
        return replace(example, images=tuple(change(picture, random.Random(seed)) for picture in pictures))

    return make


def _rotate(example: Example, rng: random.Random) -> Example:
    degrees = 30 * rng.randrange(1, 12)

    def turned(picture: Picture, _: random.Random) -> Picture:
        edge = np.asarray(picture)
        border = np.concatenate([edge[0], edge[-1], edge[:, 0], edge[:, -1]])
        fill = tuple(int(value) for value in np.median(border, axis=0))
        # Pillow turns counterclockwise.
        return picture.rotate(-degrees, Image.Resampling.BICUBIC, expand=True, fillcolor=fill)

    said = f"\n(The picture is turned clockwise by {degrees} degrees.)"
    return replace(_on_each(turned)(example, rng), question=example.question + said)


def _noise(low: float, high: float) -> Callable[[Picture, random.Random], Picture]:
    """Gaussian, speckle, or salt and pepper, of a standard deviation (or share of pixels) in [low, high].

    Its grains grow with the picture: what makes large pictures smaller afterwards would average single pixels out.
    """

    def change(picture: Picture, rng: random.Random) -> Picture:
        strength, kind = rng.uniform(low, high), rng.choice(["gaussian", "speckle", "salt_and_pepper"])
        generator = np.random.default_rng(rng.getrandbits(64))
        pixels = np.asarray(picture, dtype=np.float32) / 255
        grain = max(1, max(picture.size) // _GRAINS)
        height, width = (-(-side // grain) for side in pixels.shape[:2])

        def spread(noise: np.ndarray) -> np.ndarray:
            return noise.repeat(grain, 0).repeat(grain, 1)[: pixels.shape[0], : pixels.shape[1]]

        if kind == "salt_and_pepper":
            drawn = spread(generator.random((height, width, 1), dtype=np.float32))
            # A quarter of the strength: beyond that nothing of thin lines is left.
            pixels = np.where(drawn < strength / 8, 0.0, np.where(drawn > 1 - strength / 8, 1.0, pixels))
        else:
            noise = spread(generator.standard_normal((height, width, 3), dtype=np.float32) * strength)
            pixels = pixels + (noise if kind == "gaussian" else noise * pixels)
        return Image.fromarray((np.clip(pixels, 0, 1) * 255).round().astype(np.uint8))

    return change


def _blur(picture: Picture, rng: random.Random) -> Picture:
    return picture.filter(ImageFilter.GaussianBlur(max(0.8, rng.uniform(0.005, 0.01) * min(picture.size))))


def _low_resolution(picture: Picture, rng: random.Random) -> Picture:
    factor = rng.uniform(1.6, 2.4)
    small = picture.resize([max(8, round(side / factor)) for side in picture.size], Image.Resampling.BILINEAR)
    return small.resize(picture.size, Image.Resampling.BILINEAR)


def _text_in_picture(example: Example, rng: random.Random) -> Example:
    """The question stands under the picture, and nowhere else."""

    def written(picture: Picture, _: random.Random) -> Picture:
        width = max(picture.width, _LEAST_WIDTH_PX)
        picture = picture.resize((width, round(picture.height * width / picture.width)), Image.Resampling.BICUBIC)
        size = max(_LEAST_FONT_PX, width // 32)
        font = ImageFont.load_default(size)
        paragraphs = question_of(example).splitlines()
        letters = int((width - size) / font.getlength("n"))
        lines = [line for each in paragraphs for line in textwrap.wrap(each, letters) or [""]]
        step = size * 4 // 3
        sheet = Image.new("RGB", (width, picture.height + step * len(lines) + size), "white")
        sheet.paste(picture)
        draw = ImageDraw.Draw(sheet)
        for number, line in enumerate(lines):
            draw.text((size // 2, picture.height + size // 2 + step * number), line, "black", font)
        return sheet

    return replace(_on_each(written)(example, rng), question="Answer the question written under the picture.")


def _two_changes(example: Example, rng: random.Random) -> Example:
    for operator in rng.sample([each for each in MILD if each.fits(example)], 2):
        example = operator.make(example, rng)
    return example


MILD = (
    Operator("rotate", 2, may_be_turned, _rotate),
    Operator("noise", 2, has_pictures, _on_each(_noise(0.30, 0.40))),
    Operator("blur", 1, has_pictures, _on_each(_blur)),
    Operator("low_resolution", 1, has_pictures, _on_each(_low_resolution)),
)
PICTURE_OPERATORS = (
    *MILD,
    Operator("text_in_picture", 3, may_be_written_in, _text_in_picture),
    Operator("strong_noise", 4, has_pictures, _on_each(_noise(0.45, 0.50))),
    Operator("two_changes", 4, has_pictures, _two_changes),
)
