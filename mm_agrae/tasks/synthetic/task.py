"""The embedded task: problems about drawn figures, made offline, with exact answers.

Three families, four levels, two modalities:

    geometry   angles and lengths in some twenty-five figures; the figure decides the rule
    counting   shapes of three kinds, to be counted and compared
    charts     bars to be read and compared

    level 1    one rule, round numbers, which the question repeats
    level 2    one rule, other numbers or more steps
    level 3    two rules, one after the other
    level 4    nothing but the picture: numbers stand there alone, colours matter

    image      the problem is drawn and the question is short
    text       the same problem, described in words

A problem is (family, figure, numbers). Its split follows from a hash of its numbers, so that no
problem, drawn or described, at whatever level, stands in two splits. Item i of a split is the
same problem in both modalities.
"""

from __future__ import annotations

import functools
import hashlib
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from mm_agrae.errors import ConfigError, nearest
from mm_agrae.tasks.synthetic import drawing
from mm_agrae.tasks.synthetic.figures import FIGURES, Numbers, derive
from mm_agrae.types import Example

SPLITS = ("train", "validation", "test")
MODALITIES = ("image", "text")
FAMILIES = {"geometry": 0.6, "counting": 0.2, "charts": 0.2}
"""Family -> its share of a split that holds all of them."""
LEVELS = {1: 0.4, 2: 0.3, 3: 0.2, 4: 0.1}
"""Level -> its share of a split that holds all of them."""
_SIZES = {"train": 8192, "validation": 256, "test": 512}

_SALT = 4410
"""Chosen so that each figure has its share of problems in every split."""


@dataclass(frozen=True)
class Problem:
    """A problem before it is drawn or described. `ways` are right derivations, in words."""

    family: str
    figure: str
    level: int
    numbers: Numbers
    question: str
    described: str
    answer: str
    ways: tuple[str, ...]
    draw: Callable[[random.Random, int], tuple[Image.Image, dict[str, Any]]]
    choices: tuple[str, ...] = ()
    asked: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        return f"{self.family}/{self.figure}/{','.join(map(str, self.numbers))}"


class SyntheticTask(Sequence[Example]):
    """Examples of one split, made when asked for; item i depends on (seed, split, i) alone.

    `families` and `levels` choose a part (all if None), `size` is the number of examples,
    `picture_px` the side of the square picture (at least 112). Raises ConfigError naming the
    nearest valid value.
    """

    def __init__(
        self,
        split: str = "train",
        modality: str = "image",
        families: Sequence[str] | None = None,
        levels: Sequence[int] | None = None,
        size: int | None = None,
        seed: int = 0,
        picture_px: int = 112,
    ) -> None:
        self.split = _valid("split", split, SPLITS)
        self.modality = _valid("modality", modality, MODALITIES)
        chosen = _several("families", families, FAMILIES)
        self.families = {name: FAMILIES[name] for name in chosen}
        self.levels = {level: LEVELS[level] for level in _several("levels", levels, LEVELS)}
        self.size = _at_least("size", _SIZES[split] if size is None else size, 1)
        self.picture_px = _at_least("picture_px", picture_px, 112)
        self.seed = seed

    @classmethod
    def check_options(cls, options: Mapping[str, Any]) -> None:
        """Raises ConfigError as the constructor does; nothing is drawn before it is asked for."""
        cls(**options)

    def __len__(self) -> int:
        return self.size

    def problem(self, index: int) -> tuple[Problem, random.Random]:
        """The problem behind item `index`, and the random state its picture is drawn with."""
        rng = random.Random(f"{self.seed}/{self.split}/{index}")
        family = rng.choices([*self.families], [*self.families.values()])[0]
        level = rng.choices([*self.levels], [*self.levels.values()])[0]
        return _MAKERS[family](level, self.split, rng), rng

    def __getitem__(self, index: int) -> Example:  # type: ignore[override]
        if not -self.size <= index < self.size:
            raise IndexError(f"example {index} of {self.size}")
        index %= self.size
        problem, rng = self.problem(index)
        images: tuple[Image.Image, ...] = ()
        drawn: dict[str, Any] = {}
        if self.modality == "image":
            image, drawn = problem.draw(rng, self.picture_px)
            images = (image,)
        choices = problem.choices
        return Example(
            id=f"synthetic-{self.split}-{self.seed}-{index}",
            question=problem.question if images else problem.described,
            answer=problem.answer,
            images=images,
            grading={"kind": "choice", "choices": list(choices)} if choices else {"kind": "number"},
            origin=f"synthetic {self.split} (seed {self.seed}), example {index}",
            meta={
                "family": problem.family,
                "figure": problem.figure,
                "level": problem.level,
                "key": problem.key,
                "numbers": list(problem.numbers),
                **problem.asked,
                "drawn": drawn,
            },
        )


def split_of(family: str, numbers: Iterable[int]) -> str:
    """train, validation or test (6 : 2 : 2), by a hash of the numbers in any order.

    The figure is left out on purpose: a question such as "Angles 70, 40. Find x." then stands in
    one split with all figures that it fits, and cannot be answered without its picture.
    """
    text = f"{_SALT}/{family}/{','.join(map(str, sorted(numbers)))}"
    bucket = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % 10
    return "test" if bucket < 2 else "validation" if bucket < 4 else "train"


# --- Geometry ---------------------------------------------------------------------------------


def _geometry(level: int, split: str, rng: random.Random) -> Problem:
    figures = [f for f in FIGURES.values() if level in f.levels]
    figure = rng.choice(figures)
    pool = numbers_of(figure.name, level, split)
    numbers = rng.choice(pool)
    derived = [derive(way, numbers) for way in figure.ways]
    given = ", ".join(map(str, numbers))
    ways = tuple(f"Given {given}. {text}" for text, _ in filter(None, derived))
    answer = next(value for _, value in filter(None, derived))

    def draw(rng: random.Random, px: int) -> tuple[Image.Image, dict[str, Any]]:
        # Upright at first: a turn makes a figure harder to recognise.
        turn = 180 if level == 4 else 20
        return drawing.draw_diagram(figure.build(rng, *numbers), rng, px, turn)

    return Problem(
        "geometry",
        figure.name,
        level,
        numbers,
        _geometry_question(figure.asks, level, numbers),
        figure.described.format(**dict(zip("abcd", numbers, strict=False))),
        str(answer),
        ways,
        draw,
    )


def _geometry_question(asks: str, level: int, numbers: Numbers) -> str:
    listed = ", ".join(map(str, numbers))
    if asks == "side":
        shown = "" if level == 4 else f", side {numbers[1]}"
        return f"Perimeter {numbers[0]}{shown}. Find x."
    if asks == "perimeter":
        return ("" if level == 4 else f"Sides {listed}. ") + "Find the perimeter."
    return ("" if level == 4 else f"Angles {listed}. ") + "Find x."


@functools.cache
def numbers_of(figure: str, level: int, split: str) -> list[Numbers]:
    """Every choice of givens of a figure at a level that belongs to the split."""
    # A single number takes finer steps, so that the problems are many.
    step = 10 if level in (1, 4) and FIGURES[figure].arity > 1 else 5
    return [
        numbers
        for numbers in FIGURES[figure].numbers(step)
        if split_of("geometry", numbers) == split
    ]


# --- Counting ---------------------------------------------------------------------------------

KINDS = ("circle", "square", "triangle")
_PLURAL = {"circle": "circles", "square": "squares", "triangle": "triangles"}


def _counting(level: int, split: str, rng: random.Random) -> Problem:
    most = {1: 4, 2: 5, 3: 5, 4: 5}[level]
    counts: Numbers = ()
    while not counts or sum(counts) < 3 or split_of("counting", counts) != split:
        counts = tuple(rng.randint(0, most) for _ in KINDS)
    # Colours matter at level 4 alone; before it all shapes of a picture have the same.
    palette = list(drawing.COLOURS)
    colour = rng.choice(palette)
    shapes = [
        (kind, rng.choice(palette[:2]) if level == 4 else colour)
        for kind, count in zip(KINDS, counts, strict=True)
        for _ in range(count)
    ]
    first, second, third = rng.sample(KINDS, 3)
    n = dict(zip(KINDS, counts, strict=True))
    read = f"Count: {_PLURAL[first]} {n[first]}"
    both = f"{read}, {_PLURAL[second]} {n[second]}"
    choices: tuple[str, ...] = ()
    ask = rng.choice({1: ["how_many"], 2: ["more", "together", "compare"]}.get(level, ["not"]))
    if ask == "more" and n[first] <= n[second]:
        ask = "together"
    asked: dict[str, Any] = {"ask": ask, "kinds": [first, second, third]}
    if level == 4:
        red = sum(shape == (first, "red") for shape in shapes)
        question = f"How many {_PLURAL[first]} are red?"
        blue = n[first] - red
        answer = str(red)
        ways = [f"Count: red {_PLURAL[first]} {red}."]
        ways.append(f"{read}, blue {blue}. Rest: {n[first]}-{blue}={red}.")
        asked["ask"] = "red"
    elif ask == "how_many":
        question, answer = f"How many {_PLURAL[first]}?", str(n[first])
        ways = [f"{read}."]
    elif ask == "together":
        total = n[first] + n[second]
        question, answer = f"How many {_PLURAL[first]} and {_PLURAL[second]}?", str(total)
        ways = [f"{both}. Sum: {n[first]}+{n[second]}={total}."]
    elif ask == "more":
        difference = n[first] - n[second]
        question = f"How many more {_PLURAL[first]} than {_PLURAL[second]}?"
        answer = str(difference)
        ways = [f"{both}. Difference: {n[first]}-{n[second]}={difference}."]
    elif ask == "compare":
        choices = (_PLURAL[first], _PLURAL[second], "equal")
        which = 2 if n[first] == n[second] else int(n[first] < n[second])
        question = f"Which are more? A) {choices[0]} B) {choices[1]} C) {choices[2]}"
        answer = "ABC"[which]
        sign = ">" if which == 0 else "<" if which == 1 else "="
        ways = [f"{both}. Compare: {n[first]}{sign}{n[second]}."]
    else:
        total = sum(counts)
        rest = total - n[first]
        question, answer = f"How many shapes are not {_PLURAL[first]}?", str(rest)
        ways = [
            f"Count: all {total}, {_PLURAL[first]} {n[first]}. Rest: {total}-{n[first]}={rest}."
        ]
        others = f"{_PLURAL[second]} {n[second]}, {_PLURAL[third]} {n[third]}"
        ways.append(f"Count: {others}. Sum: {n[second]}+{n[third]}={rest}.")
    listed = shapes if level == 4 else [(kind, "") for kind, _ in shapes]
    described = ", ".join(
        " ".join(filter(None, (str(many), shape[1], shape[0] if many == 1 else _PLURAL[shape[0]])))
        for shape in sorted(set(listed))
        for many in [listed.count(shape)]
    )
    return Problem(
        "counting",
        "scene",
        level,
        counts,
        question,
        f"A picture has {described}. {question}",
        answer,
        tuple(ways),
        lambda rng, px: drawing.draw_shapes(shapes, rng, px),
        choices,
        asked,
    )


# --- Charts -----------------------------------------------------------------------------------


def _charts(level: int, split: str, rng: random.Random) -> Problem:
    size = 4 if level == 4 else 3
    values: Numbers = ()
    while not values or split_of("charts", values) != split:
        values = tuple(rng.sample(range(1, 10), size))
    names = "ABCD"[:size]
    bars = dict(zip(names, values, strict=True))
    listed = ", ".join(f"{name} {value}" for name, value in bars.items())
    ask = rng.choice(
        {1: ["value", "highest"], 2: ["difference", "lowest"], 3: ["sum"], 4: ["without"]}[level]
    )
    choices: tuple[str, ...] = ()
    asked: dict[str, Any] = {"ask": ask}
    high, low = max(values), min(values)
    if ask == "value":
        name = rng.choice(names)
        question, answer = f"How high is bar {name}?", str(bars[name])
        ways = [f"Read: {name} {bars[name]}."]
        asked["bars"] = [name]
    elif ask in ("highest", "lowest"):
        choices = tuple(names)
        extreme = high if ask == "highest" else low
        answer = names[values.index(extreme)]
        question = f"Which bar is {ask}?"
        ways = [f"Read: {listed}. The {ask} is {extreme}."]
    elif ask == "difference":
        top, bottom = sorted(rng.sample(names, 2), key=lambda name: -bars[name])
        question = f"How much higher is bar {top} than bar {bottom}?"
        difference = bars[top] - bars[bottom]
        answer = str(difference)
        ways = [
            f"Read: {top} {bars[top]}, {bottom} {bars[bottom]}. "
            f"Difference: {bars[top]}-{bars[bottom]}={difference}."
        ]
        asked["bars"] = [top, bottom]
    else:
        picked = list(values) if ask == "sum" else [value for value in values if value != high]
        question = "What is the sum of the bars" + (" without the highest?" if size == 4 else "?")
        total = sum(picked)
        answer = str(total)
        a, b, c = picked
        ways = [f"Read: {listed}. Sum: {a}+{b}={a + b}, {a + b}+{c}={total}."]
        ways.append(f"Read: {listed}. Sum: {b}+{c}={b + c}, {a}+{b + c}={total}.")
    return Problem(
        "charts",
        "bars",
        level,
        values,
        question,
        f"A bar chart has bars {listed}. {question}",
        answer,
        tuple(ways),
        lambda rng, px: drawing.draw_bars(values, px),
        choices,
        asked,
    )


_MAKERS: dict[str, Callable[[int, str, random.Random], Problem]] = {
    "geometry": _geometry,
    "counting": _counting,
    "charts": _charts,
}

# --- Options ----------------------------------------------------------------------------------


def _valid(option: str, value: Any, choices: Iterable[Any]) -> Any:
    names = list(choices)
    if value in names and not isinstance(value, bool):
        return value
    hint = nearest(str(value), map(str, names))
    raise ConfigError(f"synthetic task: {option} is {value!r}; {hint}")


def _several(option: str, values: Any, choices: Iterable[Any]) -> list[Any]:
    names = list(choices)
    if values is None:
        return names
    if isinstance(values, str | int):
        values = [values]
    if not values:
        raise ConfigError(f"synthetic task: {option} is empty; valid: {', '.join(map(str, names))}")
    return [_valid(option, value, names) for value in values]


def _at_least(option: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"synthetic task: {option} is {value!r}; use a number of {least} or more")
    return value
