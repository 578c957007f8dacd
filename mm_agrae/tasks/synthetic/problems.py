"""Makes problems: numbers that belong to a split, a question, its answer, and the drawing."""

from __future__ import annotations

import functools
import hashlib
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from mm_agrae.tasks.synthetic import drawing
from mm_agrae.tasks.synthetic.figures import FIGURES, Numbers, derive

_SALT = 4410
"""Chosen so that every figure has enough problems in each split."""


@dataclass(frozen=True)
class Problem:
    """A problem before it is drawn or described. `ways` are correct derivations, in words."""

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


def split_of(family: str, numbers: Iterable[int]) -> str:
    """train, validation or test (6 : 2 : 2), by a hash of the numbers in any order.

    The figure is left out on purpose: a question such as "Angles 70, 40. Find x." is then in the
    same split for all figures it fits, and cannot be answered without its image.
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
    """Every choice of given numbers of a figure at a level that belongs to the split."""
    # A single number goes in finer steps, for enough problems.
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
    # Colours matter at level 4 alone; below it all shapes of an image share one.
    palette = list(drawing.COLOURS)
    colour = rng.choice(palette)
    shapes = [
        (kind, rng.choice(palette[:2]) if level == 4 else colour)
        for kind, count in zip(KINDS, counts, strict=True)
        for _ in range(count)
    ]
    kinds = rng.sample(KINDS, 3)
    ask = rng.choice({1: ["how_many"], 2: ["more", "together", "compare"]}.get(level, ["not"]))
    n = dict(zip(KINDS, counts, strict=True))
    if level == 4:
        ask = "red"
    elif ask == "more" and n[kinds[0]] <= n[kinds[1]]:
        ask = "together"
    choices: tuple[str, ...] = ()
    if ask == "compare":
        choices = (_PLURAL[kinds[0]], _PLURAL[kinds[1]], "equal")
    red = sum(shape == (kinds[0], "red") for shape in shapes)
    question, answer, ways = _counting_question(ask, kinds, n, red)
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
        {"ask": ask, "kinds": kinds},
    )


def _counting_question(
    ask: str, kinds: Sequence[str], n: Mapping[str, int], red: int
) -> tuple[str, str, list[str]]:
    """Question, answer and derivations. `n` counts each kind; `red` are red of the first."""
    first, second, third = kinds
    one, two, three = (_PLURAL[kind] for kind in kinds)
    read = f"Count: {one} {n[first]}"
    both = f"{read}, {two} {n[second]}"
    if ask == "red":
        blue = n[first] - red
        ways = [f"Count: red {one} {red}.", f"{read}, blue {blue}. Rest: {n[first]}-{blue}={red}."]
        return f"How many {one} are red?", str(red), ways
    if ask == "how_many":
        return f"How many {one}?", str(n[first]), [f"{read}."]
    if ask == "together":
        total = n[first] + n[second]
        ways = [f"{both}. Sum: {n[first]}+{n[second]}={total}."]
        return f"How many {one} and {two}?", str(total), ways
    if ask == "more":
        difference = n[first] - n[second]
        ways = [f"{both}. Difference: {n[first]}-{n[second]}={difference}."]
        return f"How many more {one} than {two}?", str(difference), ways
    if ask == "compare":
        which = 2 if n[first] == n[second] else int(n[first] < n[second])
        ways = [f"{both}. Compare: {n[first]}{'><='[which]}{n[second]}."]
        return f"Which are more? A) {one} B) {two} C) equal", "ABC"[which], ways
    total = sum(n.values())
    rest = total - n[first]
    others = f"{two} {n[second]}, {three} {n[third]}"
    ways = [
        f"Count: all {total}, {one} {n[first]}. Rest: {total}-{n[first]}={rest}.",
        f"Count: {others}. Sum: {n[second]}+{n[third]}={rest}.",
    ]
    return f"How many shapes are not {one}?", str(rest), ways


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


MAKERS: dict[str, Callable[[int, str, random.Random], Problem]] = {
    "geometry": _geometry,
    "counting": _counting,
    "charts": _charts,
}
