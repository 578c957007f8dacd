"""The embedded task: problems about drawn figures, made offline, with exact answers.

Three families, four levels, two modalities:

    geometry   angles and lengths in about thirty figures; the figure decides the rule
    counting   shapes of three kinds, to be counted and compared
    charts     bars to be read and compared

    level 1    one rule, round numbers, which the question repeats
    level 2    one rule, other numbers or more steps
    level 3    two rules, one after the other
    level 4    nothing but the picture: numbers stand there alone, colours matter

    image      the problem is drawn and the question is short
    text       the same problem, described in words

A problem is (family, figure, numbers). Its split follows from a hash of these three, so that no
problem, drawn or described, at whatever level, stands in two splits. Item i of a split is the
same problem in both modalities.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from mm_agrae.config import nearest
from mm_agrae.errors import ConfigError
from mm_agrae.tasks import drawing
from mm_agrae.tasks.drawing import XY, Diagram
from mm_agrae.types import Example

SPLITS = ("train", "validation", "test")
MODALITIES = ("image", "text")
FAMILIES = {"geometry": 0.6, "counting": 0.2, "charts": 0.2}
"""Family -> its share of a split that holds all of them."""
LEVELS = {1: 0.4, 2: 0.3, 3: 0.2, 4: 0.1}
"""Level -> its share of a split that holds all of them."""
_SIZES = {"train": 8192, "validation": 256, "test": 512}

_SALT = 2265
"""Chosen so that no figure lacks problems in any split."""

Numbers = tuple[int, ...]


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
        return key(self.family, self.figure, self.numbers)


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


def key(family: str, figure: str, numbers: Iterable[int]) -> str:
    return f"{family}/{figure}/{','.join(map(str, numbers))}"


def split_of(problem_key: str) -> str:
    """train, validation or test (6 : 2 : 2), by a hash of the problem's key."""
    bucket = (
        int.from_bytes(hashlib.sha256(f"{_SALT}/{problem_key}".encode()).digest()[:8], "big") % 10
    )
    return "test" if bucket < 2 else "validation" if bucket < 4 else "train"


# --- Geometry ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Figure:
    """A kind of diagram.

    `ways` are derivations such as "Triangle: s=a+b, 180-s", where a, b, c stand for the given
    numbers; several are several ways to the same answer. `numbers(step)` lists every choice of
    givens that can be drawn, in multiples of `step`. `asks` is "x" for an angle, "perimeter", or
    "side" (then the first given is the perimeter, which only the question tells).
    """

    name: str
    levels: tuple[int, ...]
    ways: tuple[str, ...]
    numbers: Callable[[int], Iterator[Numbers]]
    build: Callable[..., Diagram]
    described: str
    asks: str = "x"

    @property
    def arity(self) -> int:
        """How many numbers are given."""
        return sum(f"{{{letter}}}" in self.described for letter in "abc")


def derive(way: str, given: Sequence[int]) -> tuple[str, int] | None:
    """Write `way` out with numbers: its text and result, or None if a step is no whole number > 0.

    >>> derive("Triangle: s=a+b, 180-s", (70, 40))
    ('Triangle: 70+40=110, 180-110=70.', 70)
    """
    known = dict(zip("abcd", given, strict=False))
    value = 0
    clauses = []
    for clause in way.split(". "):
        title, _, steps = clause.partition(": ")
        written = []
        for step in steps.split(", "):
            name, _, expression = step.rpartition("=")
            terms = [str(known.get(term, term)) for term in re.findall(r"\w+|\W", expression)]
            value = int(terms[0])
            for operator, term in zip(terms[1::2], map(int, terms[2::2]), strict=True):
                if operator == "/":
                    if value % term:
                        return None
                    value //= term
                else:
                    value = {"+": value + term, "-": value - term, "*": value * term}[operator]
            if value <= 0:
                return None
            known[name] = value
            written.append(f"{''.join(terms) if len(terms) > 1 else 'x'}={value}")
        clauses.append(f"{title}: {', '.join(written)}.")
    return " ".join(clauses), value


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
    step = 10 if level in (1, 4) else 5
    if FIGURES[figure].arity == 1:  # Finer steps, so that the problems are many.
        step = 5 if level in (1, 4) else 2
    return [
        numbers
        for numbers in FIGURES[figure].numbers(step)
        if split_of(key("geometry", figure, numbers)) == split
    ]


def _multiples(
    arity: int, fits: Callable[..., bool], ordered: bool = True
) -> Callable[[int], Iterator[Numbers]]:
    """Angles from 25 to 155 degrees; in falling order where the figure is symmetric in them."""

    def every(step: int) -> Iterator[Numbers]:
        low = 26 if step == 2 else _MIN
        values = range(150, low - 1, -step)
        for numbers in itertools.product(values, repeat=arity):
            falling = all(x >= y for x, y in itertools.pairwise(numbers))
            if (falling or not ordered) and fits(*numbers):
                yield numbers

    return every


def _lengths(
    arity: int, fits: Callable[..., bool] = lambda *_: True, ordered: bool = True
) -> Callable[[int], Iterator[Numbers]]:
    """Side lengths: 2 to 9 where numbers are to be easy, 4 to 20 otherwise."""

    def every(step: int) -> Iterator[Numbers]:
        values = range(15, 1, -1) if step in (5, 10) and arity == 1 else range(24, 3, -1)
        if arity > 1:
            values = range(9, 1, -1) if step == 10 else range(20, 3, -1)
        for numbers in itertools.product(values, repeat=arity):
            falling = all(x >= y for x, y in itertools.pairwise(numbers))
            drawable = max(numbers) <= 2.5 * min(numbers)
            if (falling or not ordered) and drawable and fits(*numbers):
                yield numbers

    return every


def _with_perimeter(
    sides: Callable[[int], Iterator[Numbers]], perimeter: Callable[[int, int], int]
) -> Callable[[int], Iterator[Numbers]]:
    def every(step: int) -> Iterator[Numbers]:
        for a, b in sides(step):
            yield perimeter(a, b), a

    return every


_MIN = 25


def _ok(*angles: float) -> bool:
    return min(angles) >= _MIN


def _ray(degrees: float, length: float = 1.0) -> XY:
    return length * math.cos(math.radians(degrees)), length * math.sin(math.radians(degrees))


def _beyond(p: XY, q: XY, share: float = 0.5) -> XY:
    """A point on the line p-q past q."""
    return q[0] + share * (q[0] - p[0]), q[1] + share * (q[1] - p[1])


def _triangle_points(a: float, b: float) -> dict[str, XY]:
    """A at the origin, B on the x axis, C above; interior angles a at A and b at B."""
    side = math.sin(math.radians(b)) / math.sin(math.radians(a + b))
    return {"A": (0.0, 0.0), "B": (1.0, 0.0), "C": _ray(a, side)}


_TRIANGLE = [("A", "B"), ("B", "C"), ("C", "A")]
_AT_A, _AT_B, _AT_C = ("A", "B", "C"), ("B", "C", "A"), ("C", "A", "B")


def _triangle(rng: random.Random, a: int, b: int) -> Diagram:
    return Diagram(
        _triangle_points(a, b), _TRIANGLE, [(*_AT_A, f"{a}"), (*_AT_B, f"{b}"), (*_AT_C, "x")]
    )


def _right_triangle(rng: random.Random, a: int) -> Diagram:
    points = _triangle_points(a, 90)
    return Diagram(points, _TRIANGLE, [(*_AT_A, f"{a}"), (*_AT_C, "x")], right=[_AT_B])


def _isosceles(a: float, at_a: str, at_b: str, at_c: str = "") -> Diagram:
    """AC = BC, angle a at A and B."""
    labels = [(*corner, text) for corner, text in zip((_AT_A, _AT_B, _AT_C), (at_a, at_b, at_c))]
    return Diagram(
        _triangle_points(a, a),
        list(_TRIANGLE),
        [label for label in labels if label[3]],
        ticks=[("A", "C"), ("B", "C")],
    )


def _isosceles_base(rng: random.Random, a: int) -> Diagram:
    return _isosceles((180 - a) / 2, "x", "", f"{a}")


def _isosceles_apex(rng: random.Random, a: int) -> Diagram:
    return _isosceles(a, f"{a}", "", "x")


def _exterior_figure(a: float, b: float, labels: list[tuple[str, str, str, str]]) -> Diagram:
    """Triangle with B's side A-B drawn on to D: the exterior angle is D-B-C."""
    points = _triangle_points(a, b)
    points["D"] = _beyond(points["A"], points["B"], 0.5)
    return Diagram(points, [("A", "D"), ("B", "C"), ("C", "A")], labels)


_OUTSIDE = ("B", "D", "C")


def _exterior(rng: random.Random, a: int, b: int) -> Diagram:
    labels = [(*_AT_A, f"{a}"), (*_AT_C, f"{b}"), (*_OUTSIDE, "x")]
    return _exterior_figure(a, 180 - a - b, labels)


def _remote(rng: random.Random, e: int, a: int) -> Diagram:
    labels = [(*_AT_A, f"{a}"), (*_AT_C, "x"), (*_OUTSIDE, f"{e}")]
    return _exterior_figure(a, 180 - e, labels)


def _isosceles_exterior(rng: random.Random, a: int) -> Diagram:
    base = (180 - a) / 2
    figure = _exterior_figure(base, base, [(*_AT_C, f"{a}"), (*_OUTSIDE, "x")])
    figure.ticks = [("A", "C"), ("B", "C")]
    return figure


def _isosceles_from_exterior(rng: random.Random, e: int) -> Diagram:
    figure = _exterior_figure(180 - e, 180 - e, [(*_AT_C, "x"), (*_OUTSIDE, f"{e}")])
    figure.ticks = [("A", "C"), ("B", "C")]
    return figure


def _right_exterior(rng: random.Random, a: int) -> Diagram:
    figure = _exterior_figure(a, 90 - a, [(*_AT_A, f"{a}"), (*_OUTSIDE, "x")])
    figure.right = [_AT_C]
    return figure


def _two_exteriors(rng: random.Random, e: int, f: int) -> Diagram:
    figure = _exterior_figure(180 - e, 180 - f, [(*_OUTSIDE, f"{f}"), (*_AT_C, "x")])
    figure.points["E"] = _beyond(figure.points["B"], figure.points["A"], 0.5)
    figure.segments[0] = ("E", "D")
    figure.angles.append(("A", "C", "E", f"{e}"))
    return figure


def _triangle_opposite(rng: random.Random, a: int, b: int) -> Diagram:
    points = _triangle_points(a, b)
    reach = 0.5 * min(math.dist(points[end], points["C"]) for end in "AB")
    points["D"] = _beyond(points["A"], points["C"], reach / math.dist(points["A"], points["C"]))
    points["E"] = _beyond(points["B"], points["C"], reach / math.dist(points["B"], points["C"]))
    return Diagram(
        points,
        [("A", "B"), ("A", "D"), ("B", "E")],
        [(*_AT_A, f"{a}"), (*_AT_B, f"{b}"), ("C", "D", "E", "x")],
    )


def _bow_tie(rng: random.Random, a: int, b: int, c: int) -> Diagram:
    points = _triangle_points(a, b)
    third = 180 - a - b
    side_a, side_b = math.dist(points["A"], points["C"]), math.dist(points["B"], points["C"])
    # The second triangle C-D-E has angle c at D on the line A-C and the rest at E.
    ratio = math.sin(math.radians(180 - third - c)) / math.sin(math.radians(c))
    scale = min(1.2 / 1, 1.2 * side_b / (ratio * side_a)) if ratio else 1
    points["D"] = _beyond(points["A"], points["C"], scale)
    points["E"] = _beyond(points["B"], points["C"], scale * side_a / ratio / side_b)
    return Diagram(
        points,
        [("A", "B"), ("A", "D"), ("B", "E"), ("D", "E")],
        [(*_AT_A, f"{a}"), (*_AT_B, f"{b}"), ("D", "E", "C", f"{c}"), ("E", "C", "D", "x")],
    )


def _fan(labels: Sequence[tuple[float, str]], closed: bool = False) -> Diagram:
    """Rays from one point with the angles between them; closed: all the way round."""
    points, segments, angles, at = {"O": (0.0, 0.0), "P0": _ray(0)}, [("O", "P0")], [], 0.0
    for k, (angle, text) in enumerate(labels):
        at += angle
        end = "P0" if closed and k == len(labels) - 1 else f"P{k + 1}"
        if end != "P0":
            points[end] = _ray(at)
            segments.append(("O", end))
        if text:
            angles.append(("O", f"P{k}", end, text))
    return Diagram(points, segments, angles)


def _straight(rng: random.Random, *given: int) -> Diagram:
    parts = [(float(a), f"{a}") for a in given] + [(180.0 - sum(given), "x")]
    rng.shuffle(parts)
    return _fan(parts)


def _round(rng: random.Random, *given: int) -> Diagram:
    parts = [(float(a), f"{a}") for a in given] + [(360.0 - sum(given), "x")]
    rng.shuffle(parts)
    figure = _fan(parts, closed=True)
    # Room for the label of a reflex angle.
    figure.points |= {"left": (-0.3, 0.0), "up": (0.0, 0.3), "down": (0.0, -0.3)}
    return figure


def _right_split(rng: random.Random, a: int) -> Diagram:
    parts = [(float(a), f"{a}"), (90.0 - a, "x")]
    rng.shuffle(parts)
    figure = _fan(parts)
    figure.right = [("O", "P0", "P2")]
    return figure


def _opposite(rng: random.Random, a: int) -> Diagram:
    return _fan([(a, f"{a}"), (180 - a, ""), (a, "x"), (180 - a, "")], closed=True)


def _quadrilateral_points(rng: random.Random, a: int, b: int, c: int) -> dict[str, XY]:
    """Angles a, b, c at A, B, C in this order round, the rest at D."""
    best, widest = None, -math.inf
    for side in (0.5, 0.6, 0.7, 0.85, 1.0, 1.2, 1.4, 1.7, 2.0):
        corner_c = (1 + side * math.cos(math.radians(180 - b)), side * math.sin(math.radians(b)))
        # D is where the ray from A at angle a meets the ray from C, which turns by c from C-B.
        heading = 360 - b - c
        (ax, ay), (cx, cy) = _ray(a), _ray(heading)
        det = ax * -cy + cx * ay
        if abs(det) < 1e-6:
            continue
        reach_a = (corner_c[0] * -cy + cx * corner_c[1]) / det
        reach_c = (ax * corner_c[1] - ay * corner_c[0]) / det
        shortest, longest = min(reach_a, reach_c, side, 1), max(reach_a, reach_c, side, 1)
        if shortest > 0 and shortest / longest > widest:
            widest = shortest / longest
            best = (corner_c, (reach_a * ax, reach_a * ay))
    assert best is not None
    return {"A": (0.0, 0.0), "B": (1.0, 0.0), "C": best[0], "D": best[1]}


_QUADRILATERAL = [("A", "B"), ("B", "C"), ("C", "D"), ("D", "A")]


def _quadrilateral(rng: random.Random, *given: int) -> Diagram:
    a, b, c = rng.sample(given, 3)
    return Diagram(
        _quadrilateral_points(rng, a, b, c),
        _QUADRILATERAL,
        [
            ("A", "B", "D", f"{a}"),
            ("B", "C", "A", f"{b}"),
            ("C", "D", "B", f"{c}"),
            ("D", "A", "C", "x"),
        ],
    )


def _quadrilateral_exterior(rng: random.Random, *given: int) -> Diagram:
    figure = _quadrilateral(rng, *given)
    figure.points["E"] = _beyond(figure.points["A"], figure.points["D"], 0.4)
    figure.segments = [("A", "B"), ("B", "C"), ("C", "D"), ("A", "E")]
    figure.angles[3] = ("D", "C", "E", "x")
    return figure


def _parallelogram(a: int, x_at: str) -> Diagram:
    (x, y) = _ray(a, 0.7)
    corners = {"B": ("B", "C", "A"), "C": ("C", "D", "B")}
    points = {"A": (0.0, 0.0), "B": (1.0, 0.0), "C": (1 + x, y), "D": (x, y)}
    return Diagram(
        points,
        _QUADRILATERAL,
        [("A", "B", "D", f"{a}"), (*corners[x_at], "x")],
        arrows=[("A", "B", 0.5), ("D", "C", 0.5)],
    )


def _parallel(a: int, beside: str) -> Diagram:
    """Two parallel lines cut by a third at A and B; the given angle is above A, to the right."""
    (x, y) = _ray(a)
    points = {
        "A": (0.0, 0.0),
        "B": (x, y),
        "L": (-1.0, 0.0),
        "R": (1.0, 0.0),
        "M": (x - 1, y),
        "N": (x + 1, y),
        "S": (-0.5 * x, -0.5 * y),
        "T": (1.5 * x, 1.5 * y),
    }
    # Beside B: the same corner, its opposite, or the one on the same side between the lines.
    at_b = {"same": ("N", "T"), "alternate": ("M", "A"), "between": ("A", "N")}[beside]
    return Diagram(
        points,
        [("L", "R"), ("M", "N"), ("S", "T")],
        [("A", "R", "B", f"{a}"), ("B", *at_b, "x")],
        arrows=[("L", "R", 0.85), ("M", "N", 0.85)],
    )


def _regular(corners: int) -> Callable[..., Diagram]:
    def build(rng: random.Random, a: int) -> Diagram:
        names = "ABCDEF"[:corners]
        points = {name: _ray(360 * k / corners) for k, name in enumerate(names)}
        edges = [(names[k], names[(k + 1) % corners]) for k in range(corners)]
        return Diagram(points, edges, sides=[(*edges[0], f"{a}")], ticks=edges)

    return build


def _rectangle(rng: random.Random, a: int, b: int, labels: tuple[str, str] = ("", "")) -> Diagram:
    points = {
        "A": (0.0, 0.0),
        "B": (float(a), 0.0),
        "C": (float(a), float(b)),
        "D": (0.0, float(b)),
    }
    return Diagram(
        points,
        _QUADRILATERAL,
        sides=[("A", "B", labels[0] or f"{a}"), ("B", "C", labels[1] or f"{b}")],
        right=[("A", "B", "D"), ("C", "D", "B")],
    )


def _sided_triangle(a: float, b: float, c: float) -> dict[str, XY]:
    """BC = a, CA = b, AB = c."""
    x = (b * b + c * c - a * a) / (2 * c)
    return {"A": (0.0, 0.0), "B": (float(c), 0.0), "C": (x, math.sqrt(b * b - x * x))}


def _scalene_perimeter(rng: random.Random, a: int, b: int, c: int) -> Diagram:
    sides = [("B", "C", f"{a}"), ("C", "A", f"{b}"), ("A", "B", f"{c}")]
    return Diagram(_sided_triangle(a, b, c), _TRIANGLE, sides=sides)


def _isosceles_perimeter(
    rng: random.Random, leg: int, base: int, labels: tuple[str, str] = ("", "")
) -> Diagram:
    return Diagram(
        _sided_triangle(leg, leg, base),
        _TRIANGLE,
        sides=[("B", "C", labels[0] or f"{leg}"), ("A", "B", labels[1] or f"{base}")],
        ticks=[("C", "A"), ("B", "C")],
    )


def _rectangle_side(rng: random.Random, perimeter: int, a: int) -> Diagram:
    return _rectangle(rng, a, perimeter // 2 - a, (f"{a}", "x"))


def _isosceles_side(rng: random.Random, perimeter: int, leg: int) -> Diagram:
    return _isosceles_perimeter(rng, leg, perimeter - 2 * leg, (f"{leg}", "x"))


_THIRD = ("Triangle: s=a+b, 180-s", "Triangle: s=180-a, s-b")
_SUM_OF_FOUR = ("Four corners: s=a+b+c, 360-s",)
_FIGURES = [
    # One rule.
    Figure(
        "triangle",
        (1, 2, 4),
        _THIRD,
        _multiples(2, lambda a, b: _ok(180 - a - b) and a <= 120),
        _triangle,
        "In a triangle two angles are {a} and {b}. x is the third angle. Find x.",
    ),
    Figure(
        "right_triangle",
        (1, 2, 4),
        ("Right triangle: 90-a", "Right triangle: s=90+a, 180-s"),
        _multiples(1, lambda a: _ok(90 - a)),
        _right_triangle,
        "In a right triangle one acute angle is {a}. x is the other acute angle. Find x.",
    ),
    Figure(
        "exterior",
        (1, 2, 4),
        ("Exterior angle: a+b",),
        _multiples(2, lambda a, b: _ok(180 - a - b) and a <= 100 and 75 <= a + b <= 150),
        _exterior,
        "Two angles of a triangle are {a} and {b}. x is the exterior angle at the third corner. "
        "Find x.",
    ),
    Figure(
        "remote",
        (2, 4),
        ("Exterior angle: a-b", "Straight line: s=180-a. Triangle: t=s+b, 180-t"),
        _multiples(2, lambda e, a: _ok(e - a, a - 5, 160 - e), ordered=False),
        _remote,
        "An exterior angle of a triangle is {a}. One of the two inner angles far from it is {b}, "
        "x is the other. Find x.",
    ),
    Figure(
        "isosceles_base",
        (2, 4),
        ("Equal sides: s=180-a, s/2",),
        _multiples(1, lambda a: a % 2 == 0 and _ok((180 - a) / 2)),
        _isosceles_base,
        "A triangle with two equal sides has the angle {a} between them. x is an angle at its "
        "base. Find x.",
    ),
    Figure(
        "isosceles_apex",
        (2, 4),
        ("Equal sides: s=2*a, 180-s", "Equal sides: s=180-a, s-a"),
        _multiples(1, lambda a: _ok(180 - 2 * a) and a >= 30),
        _isosceles_apex,
        "A triangle with two equal sides has the angle {a} at its base. x is the angle between "
        "the equal sides. Find x.",
    ),
    Figure(
        "straight",
        (1, 2, 4),
        ("Straight line: 180-a",),
        _multiples(1, lambda a: _ok(180 - a)),
        _straight,
        "Two angles make a straight line. One is {a}, x is the other. Find x.",
    ),
    Figure(
        "straight_three",
        (1, 2, 4),
        ("Straight line: s=a+b, 180-s", "Straight line: s=180-a, s-b"),
        _multiples(2, lambda a, b: _ok(180 - a - b)),
        _straight,
        "Three angles make a straight line. Two are {a} and {b}, x is the third. Find x.",
    ),
    Figure(
        "opposite",
        (1, 2, 4),
        ("Opposite angles: a",),
        _multiples(1, lambda a: _ok(180 - a) and a != 90),
        _opposite,
        "Two lines cross. One angle is {a}, x is the angle opposite to it. Find x.",
    ),
    Figure(
        "right_split",
        (1, 2, 4),
        ("Right angle: 90-a",),
        _multiples(1, lambda a: _ok(90 - a)),
        _right_split,
        "Two angles make a right angle. One is {a}, x is the other. Find x.",
    ),
    Figure(
        "round_two",
        (1, 2, 4),
        ("Full turn: 360-a",),
        _multiples(1, lambda a: True),
        _round,
        "Two angles make a full turn. One is {a}, x is the other. Find x.",
    ),
    Figure(
        "round_three",
        (2, 4),
        ("Full turn: s=a+b, 360-s", "Full turn: s=360-a, s-b"),
        _multiples(2, lambda a, b: _ok(360 - a - b) and a + b > 180),
        _round,
        "Three angles make a full turn. Two are {a} and {b}, x is the third. Find x.",
    ),
    Figure(
        "parallel_same",
        (1, 2, 4),
        ("Parallel lines: a",),
        _multiples(1, lambda a: _ok(a - 25, 155 - a)),
        lambda _, a: _parallel(a, "same"),
        "A line cuts two parallel lines. One angle is {a}, x is the same corner at the other "
        "line. Find x.",
    ),
    Figure(
        "parallel_alternate",
        (1, 2, 4),
        ("Alternate angles: a",),
        _multiples(1, lambda a: _ok(a - 25, 155 - a)),
        lambda _, a: _parallel(a, "alternate"),
        "A line cuts two parallel lines. One angle is {a}, x is the alternate angle. Find x.",
    ),
    Figure(
        "parallel_between",
        (2, 4),
        ("Between parallels: 180-a",),
        _multiples(1, lambda a: _ok(a - 25, 155 - a)),
        lambda _, a: _parallel(a, "between"),
        "A line cuts two parallel lines. One angle is {a}, x lies on the same side between the "
        "parallels. Find x.",
    ),
    Figure(
        "parallelogram_opposite",
        (1, 2, 4),
        ("Parallelogram: a",),
        _multiples(1, lambda a: _ok(a - 10, 170 - a)),
        lambda _, a: _parallelogram(a, "C"),
        "A parallelogram has an angle {a}. x is the angle opposite to it. Find x.",
    ),
    Figure(
        "parallelogram_next",
        (1, 2, 4),
        ("Parallelogram: 180-a",),
        _multiples(1, lambda a: _ok(a - 10, 170 - a)),
        lambda _, a: _parallelogram(a, "B"),
        "A parallelogram has an angle {a}. x is the angle next to it. Find x.",
    ),
    Figure(
        "quadrilateral",
        (2, 4),
        _SUM_OF_FOUR,
        _multiples(3, lambda a, b, c: a <= 130 and c >= 50 and 50 <= 360 - a - b - c <= 130),
        _quadrilateral,
        "Three angles of a quadrilateral are {a}, {b} and {c}. x is the fourth. Find x.",
    ),
    Figure(
        "square",
        (1, 2, 4),
        ("Four equal sides: 4*a",),
        _lengths(1),
        _regular(4),
        "A square has the side {a}. Find the perimeter.",
        "perimeter",
    ),
    Figure(
        "equilateral",
        (1, 2, 4),
        ("Three equal sides: 3*a",),
        _lengths(1),
        _regular(3),
        "A triangle with three equal sides has the side {a}. Find the perimeter.",
        "perimeter",
    ),
    Figure(
        "hexagon",
        (2, 4),
        ("Six equal sides: 6*a",),
        _lengths(1),
        _regular(6),
        "A regular hexagon has the side {a}. Find the perimeter.",
        "perimeter",
    ),
    Figure(
        "rectangle",
        (1, 2, 4),
        ("Rectangle: s=a+b, 2*s", "Rectangle: s=2*a, t=2*b, s+t"),
        _lengths(2, lambda a, b: a != b),
        _rectangle,
        "A rectangle has the sides {a} and {b}. Find the perimeter.",
        "perimeter",
    ),
    Figure(
        "isosceles_perimeter",
        (2, 4),
        ("Two equal sides: s=2*a, s+b", "Two equal sides: s=a+b, s+a"),
        _lengths(2, lambda leg, base: base < 1.6 * leg and base != leg, ordered=False),
        _isosceles_perimeter,
        "A triangle has two equal sides {a} and the base {b}. Find the perimeter.",
        "perimeter",
    ),
    Figure(
        "scalene_perimeter",
        (1, 2, 4),
        ("Three sides: s=a+b, s+c",),
        _lengths(3, lambda a, b, c: a > b > c and b + c > 1.25 * a),
        _scalene_perimeter,
        "A triangle has the sides {a}, {b} and {c}. Find the perimeter.",
        "perimeter",
    ),
    # Two rules, one after the other.
    Figure(
        "isosceles_exterior",
        (3, 4),
        (
            "Equal sides: s=180-a, b=s/2. Straight line: 180-b",
            "Equal sides: s=180-a, b=s/2. Exterior angle: a+b",
        ),
        _multiples(1, lambda a: a % 2 == 0 and a <= 120),
        _isosceles_exterior,
        "A triangle with two equal sides has the angle {a} between them. x is the exterior angle "
        "at its base. Find x.",
    ),
    Figure(
        "isosceles_from_exterior",
        (3, 4),
        (
            "Straight line: b=180-a. Equal sides: s=2*b, 180-s",
            "Straight line: b=180-a. Exterior angle: a-b",
        ),
        _multiples(1, lambda e: _ok(180 - e, 2 * e - 180)),
        _isosceles_from_exterior,
        "A triangle with two equal sides has the exterior angle {a} at its base. x is the angle "
        "between the equal sides. Find x.",
    ),
    Figure(
        "right_exterior",
        (3, 4),
        ("Right triangle: b=90-a. Straight line: 180-b", "Exterior angle: 90+a"),
        _multiples(1, lambda a: _ok(90 - a)),
        _right_exterior,
        "A right triangle has an acute angle {a}. x is the exterior angle at the other acute "
        "angle. Find x.",
    ),
    Figure(
        "triangle_opposite",
        (3, 4),
        ("Triangle: s=a+b, t=180-s. Opposite angles: t",),
        _multiples(2, lambda a, b: _ok(a - 10, b - 10, 170 - a - b) and a <= 90 and a + b >= 80),
        _triangle_opposite,
        "Two angles of a triangle are {a} and {b}. Its other two sides cross at the third corner, "
        "and x is the angle opposite to the third angle. Find x.",
    ),
    Figure(
        "two_exteriors",
        (3, 4),
        (
            "Straight line: c=180-a. Exterior angle: b-c",
            "Straight lines: c=180-a, d=180-b. Triangle: s=c+d, 180-s",
        ),
        _multiples(2, lambda e, f: _ok(180 - e, 180 - f, e + f - 180) and e <= 145),
        _two_exteriors,
        "Two exterior angles of a triangle are {a} and {b}. x is the inner angle at the third "
        "corner. Find x.",
    ),
    Figure(
        "bow_tie",
        (3, 4),
        (
            "Triangle: s=a+b, t=180-s. Opposite angles: t. Triangle: u=c+t, 180-u",
            "Exterior angle: s=a+b. Exterior angle: s-c",
        ),
        lambda step: (
            (a, b, c)
            for a, b in _multiples(2, lambda a, b: a <= 70 and b >= 45 and a + b <= 130)(step)
            for c in range(50 if step == 10 else 45, 71, step)
            if 45 <= a + b - c <= 70
        ),
        _bow_tie,
        "Two lines cross and make two triangles. The first has the angles {a} and {b} away from "
        "the crossing, the second {c} and x. Find x.",
    ),
    Figure(
        "quadrilateral_exterior",
        (3, 4),
        ("Four corners: s=a+b+c, t=360-s. Straight line: 180-t", "Four corners: s=a+b+c, s-180"),
        _multiples(3, lambda a, b, c: a <= 130 and c >= 50 and 50 <= 360 - a - b - c <= 130),
        _quadrilateral_exterior,
        "Three angles of a quadrilateral are {a}, {b} and {c}. x is the exterior angle at the "
        "fourth corner. Find x.",
    ),
    Figure(
        "rectangle_side",
        (3, 4),
        ("Rectangle: h=a/2, h-b", "Rectangle: s=2*b, t=a-s, t/2"),
        _with_perimeter(_lengths(2, lambda a, b: a != b, ordered=False), lambda a, b: 2 * (a + b)),
        _rectangle_side,
        "A rectangle has the perimeter {a} and one side {b}. x is the other side. Find x.",
        "side",
    ),
    Figure(
        "isosceles_side",
        (3, 4),
        ("Two equal sides: s=2*b, a-s", "Two equal sides: s=a-b, s-b"),
        _with_perimeter(
            _lengths(2, lambda leg, base: base < 1.6 * leg and base != leg, ordered=False),
            lambda leg, base: 2 * leg + base,
        ),
        _isosceles_side,
        "A triangle has the perimeter {a} and two equal sides {b}. x is its base. Find x.",
        "side",
    ),
]
FIGURES = {figure.name: figure for figure in _FIGURES}

# --- Counting ---------------------------------------------------------------------------------

KINDS = ("circle", "square", "triangle")
_PLURAL = {"circle": "circles", "square": "squares", "triangle": "triangles"}


def _counting(level: int, split: str, rng: random.Random) -> Problem:
    most = {1: 4, 2: 5, 3: 5, 4: 5}[level]
    counts: Numbers = ()
    while not counts or sum(counts) < 3 or split_of(key("counting", "scene", counts)) != split:
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
    every = f"{both}, {_PLURAL[third]} {n[third]}"
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
        f"{listed.count(shape)} {shape[1]} {_PLURAL[shape[0]]}".replace("  ", " ")
        for shape in sorted(set(listed))
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
    while not values or split_of(key("charts", "bars", values)) != split:
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
