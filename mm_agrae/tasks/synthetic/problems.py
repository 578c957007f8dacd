"""Makes problems: numbers that belong to a split, a question, its answer, and the drawing."""

import functools
import hashlib
import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from mm_agrae.tasks.synthetic import drawing
from mm_agrae.tasks.synthetic.figures import FIGURES, Figure, Numbers, derive

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


def _geometry(level: int, split: str, rng: random.Random) -> Problem:
    figure = rng.choice([f for f in FIGURES.values() if level in f.levels])
    return _geometry_of(figure, rng.choice(numbers_of(figure.name, level, split)), level)


def shown_as(problem: Problem, level: int) -> Problem:
    """A geometry problem asked and drawn as another level does it, with the same answer."""
    return _geometry_of(FIGURES[problem.figure], problem.numbers, level)


def _geometry_of(figure: Figure, numbers: Numbers, level: int) -> Problem:
    derived = [found for way in figure.ways if (found := derive(way, numbers))]
    given = ", ".join(map(str, numbers))
    ways = tuple(f"Given {given}. {text}" for text, _ in derived)

    def draw(rng: random.Random, px: int) -> tuple[Image.Image, dict[str, Any]]:
        # Below level 4 almost upright: a turn makes a figure harder to recognise.
        turn = 180 if level == 4 else 20
        return drawing.draw_diagram(figure.build(rng, *numbers), rng, px, turn)

    return Problem(
        "geometry",
        figure.name,
        level,
        numbers,
        _geometry_question(figure.asks, level, numbers),
        figure.described.format(**dict(zip("abcd", numbers, strict=False))),
        str(derived[0][1]),
        ways,
        draw,
    )


def _geometry_question(asks: str, level: int, numbers: Numbers) -> str:
    listed = ", ".join(map(str, numbers))
    if asks == "side":
        shown = "" if level == 4 else f", side {numbers[1]}"
        return f"Perimeter {numbers[0]}{shown}. Find x."
    names, unknown = ("Sides", "the perimeter") if asks == "perimeter" else ("Angles", "x")
    return ("" if level == 4 else f"{names} {listed}. ") + f"Find {unknown}."


@functools.cache
def numbers_of(figure: str, level: int, split: str) -> list[Numbers]:
    """Every choice of given numbers of a figure at a level that belongs to the split."""
    # A single number goes in finer steps, for enough problems.
    step = 10 if level in (1, 4) and FIGURES[figure].arity > 1 else 5
    found = FIGURES[figure].numbers(step)
    return [numbers for numbers in found if split_of("geometry", numbers) == split]


KINDS = ("circle", "square", "triangle")


def _counting(level: int, split: str, rng: random.Random) -> Problem:
    most = 4 if level == 1 else 5
    counts: Numbers = ()
    while sum(counts) < 3 or split_of("counting", counts) != split:
        counts = tuple(rng.randint(0, most) for _ in KINDS)
    # Colours matter at level 4 alone; below it all shapes of an image share one.
    palette = list(drawing.COLOURS)
    colour = rng.choice(palette)
    n = dict(zip(KINDS, counts, strict=True))
    shapes = [(kind, rng.choice(palette[:2]) if level == 4 else colour) for kind in KINDS for _ in range(n[kind])]
    kinds = rng.sample(KINDS, 3)
    asks = {1: ["how_many"], 2: ["more", "together", "compare"], 3: ["not"], 4: ["red"]}
    ask = rng.choice(asks[level])
    if ask == "more" and n[kinds[0]] <= n[kinds[1]]:
        ask = "together"
    choices = (f"{kinds[0]}s", f"{kinds[1]}s", "equal") if ask == "compare" else ()
    red = shapes.count((kinds[0], "red"))
    question, answer, ways = _counting_question(ask, kinds, n, red)
    listed = Counter((kind, f"{shade} " if level == 4 else "") for kind, shade in shapes)
    described = ", ".join(
        f"{many} {shade}{kind}{'s' if many > 1 else ''}" for (kind, shade), many in sorted(listed.items())
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


def _counting_question(ask: str, kinds: Sequence[str], n: Mapping[str, int], red: int) -> tuple[str, str, list[str]]:
    """Question, answer and derivations. `n` counts each kind; `red` are red of the first."""
    first, second, third = kinds
    one, two, three = (f"{kind}s" for kind in kinds)
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
        way = f"{both}. Sum: {n[first]}+{n[second]}={total}."
        return f"How many {one} and {two}?", str(total), [way]
    if ask == "more":
        difference = n[first] - n[second]
        way = f"{both}. Difference: {n[first]}-{n[second]}={difference}."
        return f"How many more {one} than {two}?", str(difference), [way]
    if ask == "compare":
        which = 2 if n[first] == n[second] else int(n[first] < n[second])
        way = f"{both}. {('More: ' + one, 'More: ' + two, 'Both equal')[which]}."
        return f"Which are more? A) {one} B) {two} C) equal", "ABC"[which], [way]
    total = sum(n.values())
    rest = total - n[first]
    ways = [
        f"Count: all {total}, {one} {n[first]}. Rest: {total}-{n[first]}={rest}.",
        f"Count: {two} {n[second]}, {three} {n[third]}. Sum: {n[second]}+{n[third]}={rest}.",
    ]
    return f"How many shapes are not {one}?", str(rest), ways


def _charts(level: int, split: str, rng: random.Random) -> Problem:
    size = 4 if level == 4 else 3
    values: Numbers = ()
    while not values or split_of("charts", values) != split:
        values = tuple(rng.sample(range(1, 10), size))
    names = "ABCD"[:size]
    bars = dict(zip(names, values, strict=True))
    listed = ", ".join(f"{name} {value}" for name, value in bars.items())
    ranked = sorted(values, reverse=True)
    ordered = f"Read: {listed}. Order: {', '.join(map(str, ranked))}."
    asks = {1: ["value", "highest"], 2: ["difference", "lowest"], 3: ["sum"], 4: ["without"]}
    ask = rng.choice(asks[level])
    choices: tuple[str, ...] = ()
    asked: dict[str, Any] = {"ask": ask}
    if ask == "value":
        name = rng.choice(names)
        question, answer = f"How high is bar {name}?", str(bars[name])
        ways = [f"Read: {name} {bars[name]}."]
        asked["bars"] = [name]
    elif ask in ("highest", "lowest"):
        choices = tuple(names)
        extreme = ranked[0 if ask == "highest" else -1]
        question, answer = f"Which bar is {ask}?", names[values.index(extreme)]
        ways = [f"{ordered} The {ask} is {answer} {extreme}."]
    elif ask == "difference":
        top, bottom = sorted(rng.sample(names, 2), key=lambda name: -bars[name])
        high, low = bars[top], bars[bottom]
        question, answer = f"How much higher is bar {top} than bar {bottom}?", str(high - low)
        ways = [f"Read: {top} {high}, {bottom} {low}. Difference: {high}-{low}={answer}."]
        asked["bars"] = [top, bottom]
    else:
        a, b, c = values if ask == "sum" else ranked[1:]
        question = "What is the sum of the bars" + (" without the highest?" if size == 4 else "?")
        answer = str(a + b + c)
        known = f"Read: {listed}." if ask == "sum" else ordered
        ways = [
            f"{known} Sum: {a}+{b}={a + b}, {a + b}+{c}={answer}.",
            f"{known} Sum: {b}+{c}={b + c}, {a}+{b + c}={answer}.",
        ]
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
