"""The kinds of geometry figures: what is given, the rules that lead to x, and how it is drawn."""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from mm_agrae.tasks.synthetic.drawing import XY, Diagram

Numbers = tuple[int, ...]


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


def _multiples(
    arity: int, fits: Callable[..., bool], ordered: bool = True
) -> Callable[[int], Iterator[Numbers]]:
    """Angles from 25 to 150 degrees; in falling order where the figure is symmetric in them."""

    def every(step: int) -> Iterator[Numbers]:
        for numbers in itertools.product(range(150, 24, -step), repeat=arity):
            falling = all(x >= y for x, y in itertools.pairwise(numbers))
            if (falling or not ordered) and fits(*numbers):
                yield numbers

    return every


def _lengths(
    arity: int, fits: Callable[..., bool] = lambda *_: True, ordered: bool = True
) -> Callable[[int], Iterator[Numbers]]:
    """Side lengths from 2 to 9, or to 12 where numbers need not be easy."""

    def every(step: int) -> Iterator[Numbers]:
        for numbers in itertools.product(range(9 if step == 10 else 12, 1, -1), repeat=arity):
            falling = all(x >= y for x, y in itertools.pairwise(numbers))
            drawable = max(numbers) <= 2.5 * min(numbers)
            if (falling or not ordered) and drawable and fits(*numbers):
                yield numbers

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


def _isosceles(a: float, labels: list[tuple[str, str, str, str]]) -> Diagram:
    """AC = BC, angle a at A and B."""
    return Diagram(_triangle_points(a, a), _TRIANGLE, labels, ticks=[("A", "C"), ("B", "C")])


def _isosceles_base(rng: random.Random, a: int) -> Diagram:
    return _isosceles((180 - a) / 2, [(*_AT_A, "x"), (*_AT_C, f"{a}")])


def _isosceles_apex(rng: random.Random, a: int) -> Diagram:
    return _isosceles(a, [(*_AT_A, f"{a}"), (*_AT_C, "x")])


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


def _parallelogram(rng: random.Random, a: int) -> Diagram:
    (x, y) = _ray(a, 0.7)
    points = {"A": (0.0, 0.0), "B": (1.0, 0.0), "C": (1 + x, y), "D": (x, y)}
    return Diagram(
        points,
        _QUADRILATERAL,
        [("A", "B", "D", f"{a}"), ("B", "C", "A", "x")],
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
    # Beside B: the same corner, or the one on the same side between the lines.
    at_b = {"same": ("N", "T"), "between": ("A", "N")}[beside]
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


def _isosceles_perimeter(rng: random.Random, leg: int, base: int) -> Diagram:
    return Diagram(
        _sided_triangle(leg, leg, base),
        _TRIANGLE,
        sides=[("B", "C", f"{leg}"), ("A", "B", f"{base}")],
        ticks=[("C", "A"), ("B", "C")],
    )


def _rectangle_side(rng: random.Random, perimeter: int, a: int) -> Diagram:
    return _rectangle(rng, a, perimeter // 2 - a, (f"{a}", "x"))


# fmt: off
_THIRD = ("Triangle: s=a+b, 180-s", "Triangle: s=180-a, s-b")
_SUM_OF_FOUR = ("Four corners: s=a+b+c, 360-s",)
_FIGURES = [
    # One rule.
    Figure(
        "triangle", (1, 2, 4), _THIRD,
        _multiples(2, lambda a, b: _ok(180 - a - b) and a <= 120), _triangle,
        "In a triangle two angles are {a} and {b}. x is the third angle. Find x.",
    ),
    Figure(
        "right_triangle", (1, 2, 4), ("Right triangle: 90-a", "Right triangle: s=90+a, 180-s"),
        _multiples(1, lambda a: _ok(90 - a)), _right_triangle,
        "In a right triangle one acute angle is {a}. x is the other acute angle. Find x.",
    ),
    Figure(
        "exterior", (1, 2, 4), ("Exterior angle: a+b",),
        _multiples(2, lambda a, b: _ok(180 - a - b) and a <= 100 and 75 <= a + b <= 150), _exterior,
        "Two angles of a triangle are {a} and {b}. x is the exterior angle at the third corner. "
        "Find x.",
    ),
    Figure(
        "remote", (2, 4), ("Exterior angle: a-b", "Straight line: s=180-a. Triangle: t=s+b, 180-t"),
        _multiples(2, lambda e, a: _ok(e - a, a - 5, 160 - e), ordered=False), _remote,
        "An exterior angle of a triangle is {a}. One of the two inner angles far from it is {b}, "
        "x is the other. Find x.",
    ),
    Figure(
        "isosceles_base", (2, 4), ("Equal sides: s=180-a, s/2",),
        _multiples(1, lambda a: a % 2 == 0 and _ok((180 - a) / 2)), _isosceles_base,
        "A triangle with two equal sides has the angle {a} between them. x is an angle at its "
        "base. Find x.",
    ),
    Figure(
        "isosceles_apex", (2, 4), ("Equal sides: s=2*a, 180-s", "Equal sides: s=180-a, s-a"),
        _multiples(1, lambda a: _ok(180 - 2 * a) and a >= 30), _isosceles_apex,
        "A triangle with two equal sides has the angle {a} at its base. x is the angle between "
        "the equal sides. Find x.",
    ),
    Figure(
        "straight", (1, 2, 4), ("Straight line: 180-a",),
        _multiples(1, lambda a: a < 90), _straight,
        "Two angles make a straight line. One is {a}, x is the other. Find x.",
    ),
    Figure(
        "straight_three", (2, 4), ("Straight line: s=a+b, 180-s", "Straight line: s=180-a, s-b"),
        _multiples(2, lambda a, b: _ok(180 - a - b)), _straight,
        "Three angles make a straight line. Two are {a} and {b}, x is the third. Find x.",
    ),
    Figure(
        "opposite", (1, 2, 4), ("Opposite angles: a",),
        _multiples(1, lambda a: a < 90), _opposite,
        "Two lines cross. One angle is {a}, x is the angle opposite to it. Find x.",
    ),
    Figure(
        "right_split", (1, 2, 4), ("Right angle: 90-a",),
        _multiples(1, lambda a: _ok(90 - a)), _right_split,
        "Two angles make a right angle. One is {a}, x is the other. Find x.",
    ),
    Figure(
        "round_three", (2, 4), ("Full turn: s=a+b, 360-s", "Full turn: s=360-a, s-b"),
        _multiples(2, lambda a, b: _ok(360 - a - b) and a + b > 180), _round,
        "Three angles make a full turn. Two are {a} and {b}, x is the third. Find x.",
    ),
    Figure(
        "parallel_same", (1, 2, 4), ("Parallel lines: a",),
        _multiples(1, lambda a: 50 <= a < 90), lambda _, a: _parallel(a, "same"),
        "A line cuts two parallel lines. One angle is {a}, x is the same corner at the other "
        "line. Find x.",
    ),
    Figure(
        "parallel_between", (2, 4), ("Between parallels: 180-a",),
        _multiples(1, lambda a: 50 <= a < 90), lambda _, a: _parallel(a, "between"),
        "A line cuts two parallel lines. One angle is {a}, x lies on the same side between the "
        "parallels. Find x.",
    ),
    Figure(
        "parallelogram", (1, 2, 4), ("Parallelogram: 180-a",),
        _multiples(1, lambda a: 35 <= a < 90), _parallelogram,
        "A parallelogram has an angle {a}. x is the angle next to it. Find x.",
    ),
    Figure(
        "quadrilateral", (2, 4), _SUM_OF_FOUR,
        _multiples(3, lambda a, b, c: a <= 130 and c >= 50 and 50 <= 360 - a - b - c <= 130),
        _quadrilateral,
        "Three angles of a quadrilateral are {a}, {b} and {c}. x is the fourth. Find x.",
    ),
    Figure(
        "square", (1, 2, 4), ("Four equal sides: 4*a",), _lengths(1), _regular(4),
        "A square has the side {a}. Find the perimeter.", "perimeter",
    ),
    Figure(
        "equilateral", (1, 2, 4), ("Three equal sides: 3*a",), _lengths(1), _regular(3),
        "A triangle with three equal sides has the side {a}. Find the perimeter.", "perimeter",
    ),
    Figure(
        "rectangle", (1, 2, 4), ("Rectangle: s=a+b, 2*s", "Rectangle: s=2*a, t=2*b, s+t"),
        _lengths(2, lambda a, b: a != b), _rectangle,
        "A rectangle has the sides {a} and {b}. Find the perimeter.", "perimeter",
    ),
    Figure(
        "isosceles_perimeter", (1, 2, 4),
        ("Two equal sides: s=2*a, s+b", "Two equal sides: s=a+b, s+a"),
        _lengths(2, lambda leg, base: base < 1.6 * leg and base != leg, ordered=False),
        _isosceles_perimeter,
        "A triangle has two equal sides {a} and the base {b}. Find the perimeter.", "perimeter",
    ),
    Figure(
        "scalene_perimeter", (1, 2, 4), ("Three sides: s=a+b, s+c",),
        _lengths(3, lambda a, b, c: a > b > c and b + c > 1.25 * a), _scalene_perimeter,
        "A triangle has the sides {a}, {b} and {c}. Find the perimeter.", "perimeter",
    ),
    # Two rules, one after the other.
    Figure(
        "isosceles_exterior", (3, 4),
        (
            "Equal sides: s=180-a, b=s/2. Straight line: 180-b",
            "Equal sides: s=180-a, b=s/2. Exterior angle: a+b",
        ),
        _multiples(1, lambda a: a % 2 == 0 and a <= 120), _isosceles_exterior,
        "A triangle with two equal sides has the angle {a} between them. x is the exterior angle "
        "at its base. Find x.",
    ),
    Figure(
        "right_exterior", (3, 4),
        ("Right triangle: b=90-a. Straight line: 180-b", "Exterior angle: 90+a"),
        _multiples(1, lambda a: _ok(90 - a)), _right_exterior,
        "A right triangle has an acute angle {a}. x is the exterior angle at the other acute "
        "angle. Find x.",
    ),
    Figure(
        "two_exteriors", (3, 4),
        (
            "Straight line: c=180-a. Exterior angle: b-c",
            "Straight lines: c=180-a, d=180-b. Triangle: s=c+d, 180-s",
        ),
        _multiples(2, lambda e, f: _ok(180 - e, 180 - f, e + f - 180) and e <= 145), _two_exteriors,
        "Two exterior angles of a triangle are {a} and {b}. x is the inner angle at the third "
        "corner. Find x.",
    ),
    Figure(
        "bow_tie", (3, 4),
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
        "rectangle_side", (3, 4), ("Rectangle: h=a/2, h-b", "Rectangle: s=2*b, t=a-s, t/2"),
        lambda step: (
            (2 * (a + b), a) for a, b in _lengths(2, lambda a, b: a != b, ordered=False)(step)
        ),
        _rectangle_side,
        "A rectangle has the perimeter {a} and one side {b}. x is the other side. Find x.", "side",
    ),
]
# fmt: on
FIGURES = {figure.name: figure for figure in _FIGURES}
