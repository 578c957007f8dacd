"""The kinds of geometry figures: the given numbers, the rules that lead to x, and the drawing."""

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from mm_agrae.tasks.synthetic import diagrams
from mm_agrae.tasks.synthetic.drawing import Diagram

Numbers = tuple[int, ...]


@dataclass(frozen=True)
class Figure:
    """A kind of geometry problem.

    `ways` are derivations such as "Triangle: s=a+b, 180-s", where a, b, c stand for the given numbers; all of them
    lead to the same answer. `numbers(step)` yields every choice of given numbers that can be drawn, in multiples of
    `step`. `build(rng, *numbers)` makes the diagram. `asks` is "x" for an angle, "perimeter", or "side" (the first
    number is then the perimeter, which only the question states).
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
    """Fill numbers into `way`: its text and result, or None if a step is no whole number > 0.

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


def _fitting(values: Iterable[int], arity: int, fits: Callable[..., bool], ordered: bool) -> Iterator[Numbers]:
    """In falling order alone if swapping the numbers gives the same figure."""
    combine = itertools.combinations_with_replacement
    found = combine(values, arity) if ordered else itertools.product(values, repeat=arity)
    return (numbers for numbers in found if fits(*numbers))


def _multiples(arity: int, fits: Callable[..., bool], ordered: bool = True) -> Callable[[int], Iterator[Numbers]]:
    """Angles from 25 to 150 degrees."""
    return lambda step: _fitting(range(150, 24, -step), arity, fits, ordered)


def _lengths(
    arity: int, fits: Callable[..., bool] = lambda *_: True, ordered: bool = True
) -> Callable[[int], Iterator[Numbers]]:
    """Side lengths from 2 to 9, or to 12 if numbers need not be easy (`step` 5)."""

    def drawable(*numbers: int) -> bool:
        return max(numbers) <= 2.5 * min(numbers) and fits(*numbers)

    return lambda step: _fitting(range(9 if step == 10 else 12, 1, -1), arity, drawable, ordered)


def _ok(*angles: float) -> bool:
    return min(angles) >= 25


# fmt: off
_FIGURES = [
    # One rule.
    Figure(
        "triangle", (1, 2, 4), ("Triangle: s=a+b, 180-s", "Triangle: s=180-a, s-b"),
        _multiples(2, lambda a, b: _ok(180 - a - b) and a <= 120),
        lambda _, a, b: diagrams.triangle(a, b, A=a, B=b, C="x"),
        "In a triangle two angles are {a} and {b}. x is the third angle. Find x.",
    ),
    Figure(
        "right_triangle", (1, 2, 4), ("Right triangle: 90-a", "Right triangle: s=90+a, 180-s"),
        _multiples(1, lambda a: _ok(90 - a)),
        lambda _, a: diagrams.triangle(a, 90, right="B", A=a, C="x"),
        "In a right triangle one acute angle is {a}. x is the other acute angle. Find x.",
    ),
    Figure(
        "exterior", (1, 2, 4), ("Exterior angle: a+b",),
        _multiples(2, lambda a, b: _ok(180 - a - b) and a <= 100 and 75 <= a + b <= 150),
        lambda _, a, b: diagrams.triangle(a, 180 - a - b, extended=True, A=a, C=b, D="x"),
        "Two angles of a triangle are {a} and {b}. x is the exterior angle at the third corner. "
        "Find x.",
    ),
    Figure(
        "remote", (2, 4), ("Exterior angle: a-b", "Straight line: s=180-a. Triangle: t=s+b, 180-t"),
        _multiples(2, lambda e, a: _ok(e - a, a - 5, 160 - e), ordered=False),
        lambda _, e, a: diagrams.triangle(a, 180 - e, extended=True, A=a, C="x", D=e),
        "An exterior angle of a triangle is {a}. One of the two inner angles far from it is {b}, "
        "x is the other. Find x.",
    ),
    Figure(
        "isosceles_base", (2, 4), ("Equal sides: s=180-a, s/2",),
        _multiples(1, lambda a: a % 2 == 0 and _ok((180 - a) / 2)),
        lambda _, a: diagrams.triangle(90 - a / 2, 90 - a / 2, equal=True, A="x", C=a),
        "A triangle with two equal sides has the angle {a} between them. x is an angle at its "
        "base. Find x.",
    ),
    Figure(
        "isosceles_apex", (2, 4), ("Equal sides: s=2*a, 180-s", "Equal sides: s=180-a, s-a"),
        _multiples(1, lambda a: _ok(180 - 2 * a) and a >= 30),
        lambda _, a: diagrams.triangle(a, a, equal=True, A=a, C="x"),
        "A triangle with two equal sides has the angle {a} at its base. x is the angle between "
        "the equal sides. Find x.",
    ),
    Figure(
        "straight", (1, 2, 4), ("Straight line: 180-a",),
        _multiples(1, lambda a: a < 90), diagrams.straight,
        "Two angles make a straight line. One is {a}, x is the other. Find x.",
    ),
    Figure(
        "straight_three", (2, 4), ("Straight line: s=a+b, 180-s", "Straight line: s=180-a, s-b"),
        _multiples(2, lambda a, b: _ok(180 - a - b)), diagrams.straight,
        "Three angles make a straight line. Two are {a} and {b}, x is the third. Find x.",
    ),
    Figure(
        "opposite", (1, 2, 4), ("Opposite angles: a",),
        _multiples(1, lambda a: a < 90), diagrams.opposite,
        "Two lines cross. One angle is {a}, x is the angle opposite to it. Find x.",
    ),
    Figure(
        "right_split", (1, 2, 4), ("Right angle: 90-a",),
        _multiples(1, lambda a: _ok(90 - a)), diagrams.right_split,
        "Two angles make a right angle. One is {a}, x is the other. Find x.",
    ),
    Figure(
        "round_three", (2, 4), ("Full turn: s=a+b, 360-s", "Full turn: s=360-a, s-b"),
        _multiples(2, lambda a, b: _ok(360 - a - b) and a + b > 180), diagrams.full_turn,
        "Three angles make a full turn. Two are {a} and {b}, x is the third. Find x.",
    ),
    Figure(
        "parallel_same", (1, 2, 4), ("Parallel lines: a",),
        _multiples(1, lambda a: 50 <= a < 90), lambda _, a: diagrams.parallel(a, "same"),
        "A line cuts two parallel lines. One angle is {a}, x is the same corner at the other "
        "line. Find x.",
    ),
    Figure(
        "parallel_between", (2, 4), ("Between parallels: 180-a",),
        _multiples(1, lambda a: 50 <= a < 90), lambda _, a: diagrams.parallel(a, "between"),
        "A line cuts two parallel lines. One angle is {a}, x lies on the same side between the "
        "parallels. Find x.",
    ),
    Figure(
        "parallelogram", (1, 2, 4), ("Parallelogram: 180-a", "Between parallels: 180-a"),
        _multiples(1, lambda a: 35 <= a < 90), diagrams.parallelogram,
        "A parallelogram has an angle {a}. x is the angle next to it. Find x.",
    ),
    Figure(
        "quadrilateral", (2, 4), ("Four corners: s=a+b+c, 360-s",),
        _multiples(3, lambda a, b, c: a <= 130 and c >= 50 and 50 <= 360 - a - b - c <= 130),
        diagrams.quadrilateral,
        "Three angles of a quadrilateral are {a}, {b} and {c}. x is the fourth. Find x.",
    ),
    Figure(
        "square", (1, 2, 4), ("Four equal sides: 4*a",), _lengths(1),
        lambda _, a: diagrams.regular("ABCD", a),
        "A square has the side {a}. Find the perimeter.", "perimeter",
    ),
    Figure(
        "equilateral", (1, 2, 4), ("Three equal sides: 3*a",), _lengths(1),
        lambda _, a: diagrams.regular("ABC", a),
        "A triangle with three equal sides has the side {a}. Find the perimeter.", "perimeter",
    ),
    Figure(
        "rectangle", (1, 2, 4), ("Rectangle: s=a+b, 2*s", "Rectangle: s=2*a, t=2*b, s+t"),
        _lengths(2, lambda a, b: a != b), lambda _, a, b: diagrams.rectangle(a, b, f"{b}"),
        "A rectangle has the sides {a} and {b}. Find the perimeter.", "perimeter",
    ),
    Figure(
        "isosceles_perimeter", (1, 2, 4),
        ("Two equal sides: s=2*a, s+b", "Two equal sides: s=a+b, s+a"),
        _lengths(2, lambda leg, base: base < 1.6 * leg and base != leg, ordered=False),
        diagrams.isosceles,
        "A triangle has two equal sides {a} and the base {b}. Find the perimeter.", "perimeter",
    ),
    Figure(
        "scalene_perimeter", (1, 2, 4), ("Three sides: s=a+b, s+c",),
        _lengths(3, lambda a, b, c: a > b > c and b + c > 1.25 * a), diagrams.scalene,
        "A triangle has the sides {a}, {b} and {c}. Find the perimeter.", "perimeter",
    ),
    # Two rules, one after the other.
    Figure(
        "isosceles_exterior", (3, 4),
        (
            "Equal sides: s=180-a, b=s/2. Straight line: 180-b",
            "Equal sides: s=180-a, b=s/2. Exterior angle: a+b",
        ),
        _multiples(1, lambda a: a % 2 == 0 and a <= 120),
        lambda _, a: diagrams.triangle(
            90 - a / 2, 90 - a / 2, extended=True, equal=True, C=a, D="x"
        ),
        "A triangle with two equal sides has the angle {a} between them. x is the exterior angle "
        "at its base. Find x.",
    ),
    Figure(
        "right_exterior", (3, 4),
        ("Right triangle: b=90-a. Straight line: 180-b", "Exterior angle: 90+a"),
        _multiples(1, lambda a: _ok(90 - a)),
        lambda _, a: diagrams.triangle(a, 90 - a, extended=True, right="C", A=a, D="x"),
        "A right triangle has an acute angle {a}. x is the exterior angle at the other acute "
        "angle. Find x.",
    ),
    Figure(
        "two_exteriors", (3, 4),
        (
            "Straight line: c=180-a. Exterior angle: b-c",
            "Straight lines: c=180-a, d=180-b. Triangle: s=c+d, 180-s",
        ),
        _multiples(2, lambda e, f: _ok(180 - e, 180 - f, e + f - 180) and e <= 145),
        diagrams.two_exteriors,
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
        diagrams.bow_tie,
        "Two lines cross and make two triangles. The first has the angles {a} and {b} away from "
        "the crossing, the second {c} and x. Find x.",
    ),
    Figure(
        "rectangle_side", (3, 4), ("Rectangle: h=a/2, h-b", "Rectangle: s=2*b, t=a-s, t/2"),
        lambda step: (
            (2 * (a + b), a) for a, b in _lengths(2, lambda a, b: a != b, ordered=False)(step)
        ),
        lambda _, perimeter, a: diagrams.rectangle(a, perimeter // 2 - a, "x"),
        "A rectangle has the perimeter {a} and one side {b}. x is the other side. Find x.", "side",
    ),
]
# fmt: on
FIGURES = {figure.name: figure for figure in _FIGURES}
