"""One function per kind of geometry figure: the given numbers -> a diagram to scale.

Each takes a random generator (for what the numbers leave open) and the given numbers; `figures.py`
says which numbers can be drawn.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence

from mm_agrae.tasks.synthetic.drawing import XY, Diagram


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


def triangle(rng: random.Random, a: int, b: int) -> Diagram:
    return Diagram(
        _triangle_points(a, b), _TRIANGLE, [(*_AT_A, f"{a}"), (*_AT_B, f"{b}"), (*_AT_C, "x")]
    )


def right_triangle(rng: random.Random, a: int) -> Diagram:
    points = _triangle_points(a, 90)
    return Diagram(points, _TRIANGLE, [(*_AT_A, f"{a}"), (*_AT_C, "x")], right=[_AT_B])


def _isosceles(a: float, labels: list[tuple[str, str, str, str]]) -> Diagram:
    """AC = BC, angle a at A and B."""
    return Diagram(_triangle_points(a, a), _TRIANGLE, labels, ticks=[("A", "C"), ("B", "C")])


def isosceles_base(rng: random.Random, a: int) -> Diagram:
    return _isosceles((180 - a) / 2, [(*_AT_A, "x"), (*_AT_C, f"{a}")])


def isosceles_apex(rng: random.Random, a: int) -> Diagram:
    return _isosceles(a, [(*_AT_A, f"{a}"), (*_AT_C, "x")])


def _exterior_figure(a: float, b: float, labels: list[tuple[str, str, str, str]]) -> Diagram:
    """Triangle whose side A-B is extended to D: the exterior angle is D-B-C."""
    points = _triangle_points(a, b)
    points["D"] = _beyond(points["A"], points["B"], 0.5)
    return Diagram(points, [("A", "D"), ("B", "C"), ("C", "A")], labels)


_OUTSIDE = ("B", "D", "C")


def exterior(rng: random.Random, a: int, b: int) -> Diagram:
    labels = [(*_AT_A, f"{a}"), (*_AT_C, f"{b}"), (*_OUTSIDE, "x")]
    return _exterior_figure(a, 180 - a - b, labels)


def remote(rng: random.Random, e: int, a: int) -> Diagram:
    labels = [(*_AT_A, f"{a}"), (*_AT_C, "x"), (*_OUTSIDE, f"{e}")]
    return _exterior_figure(a, 180 - e, labels)


def isosceles_exterior(rng: random.Random, a: int) -> Diagram:
    base = (180 - a) / 2
    figure = _exterior_figure(base, base, [(*_AT_C, f"{a}"), (*_OUTSIDE, "x")])
    figure.ticks = [("A", "C"), ("B", "C")]
    return figure


def right_exterior(rng: random.Random, a: int) -> Diagram:
    figure = _exterior_figure(a, 90 - a, [(*_AT_A, f"{a}"), (*_OUTSIDE, "x")])
    figure.right = [_AT_C]
    return figure


def two_exteriors(rng: random.Random, e: int, f: int) -> Diagram:
    figure = _exterior_figure(180 - e, 180 - f, [(*_OUTSIDE, f"{f}"), (*_AT_C, "x")])
    figure.points["E"] = _beyond(figure.points["B"], figure.points["A"], 0.5)
    figure.segments[0] = ("E", "D")
    figure.angles.append(("A", "C", "E", f"{e}"))
    return figure


def bow_tie(rng: random.Random, a: int, b: int, c: int) -> Diagram:
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
    """Rays from one point with the angles between them; closed: a full turn."""
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


def straight(rng: random.Random, *given: int) -> Diagram:
    parts = [(float(a), f"{a}") for a in given] + [(180.0 - sum(given), "x")]
    rng.shuffle(parts)
    return _fan(parts)


def full_turn(rng: random.Random, *given: int) -> Diagram:
    parts = [(float(a), f"{a}") for a in given] + [(360.0 - sum(given), "x")]
    rng.shuffle(parts)
    figure = _fan(parts, closed=True)
    # Room for the label of a reflex angle.
    figure.points |= {"left": (-0.3, 0.0), "up": (0.0, 0.3), "down": (0.0, -0.3)}
    return figure


def right_split(rng: random.Random, a: int) -> Diagram:
    parts = [(float(a), f"{a}"), (90.0 - a, "x")]
    rng.shuffle(parts)
    figure = _fan(parts)
    figure.right = [("O", "P0", "P2")]
    return figure


def opposite(rng: random.Random, a: int) -> Diagram:
    return _fan([(a, f"{a}"), (180 - a, ""), (a, "x"), (180 - a, "")], closed=True)


def _quadrilateral_points(rng: random.Random, a: int, b: int, c: int) -> dict[str, XY]:
    """Angles a, b, c at A, B, C in turn, the rest at D."""
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


def quadrilateral(rng: random.Random, *given: int) -> Diagram:
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


def parallelogram(rng: random.Random, a: int) -> Diagram:
    (x, y) = _ray(a, 0.7)
    points = {"A": (0.0, 0.0), "B": (1.0, 0.0), "C": (1 + x, y), "D": (x, y)}
    return Diagram(
        points,
        _QUADRILATERAL,
        [("A", "B", "D", f"{a}"), ("B", "C", "A", "x")],
        arrows=[("A", "B", 0.5), ("D", "C", 0.5)],
    )


def parallel(a: int, beside: str) -> Diagram:
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


def regular(corners: int) -> Callable[..., Diagram]:
    def build(rng: random.Random, a: int) -> Diagram:
        names = "ABCDEF"[:corners]
        points = {name: _ray(360 * k / corners) for k, name in enumerate(names)}
        edges = [(names[k], names[(k + 1) % corners]) for k in range(corners)]
        return Diagram(points, edges, sides=[(*edges[0], f"{a}")], ticks=edges)

    return build


def rectangle(rng: random.Random, a: int, b: int, labels: tuple[str, str] = ("", "")) -> Diagram:
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


def scalene_perimeter(rng: random.Random, a: int, b: int, c: int) -> Diagram:
    sides = [("B", "C", f"{a}"), ("C", "A", f"{b}"), ("A", "B", f"{c}")]
    return Diagram(_sided_triangle(a, b, c), _TRIANGLE, sides=sides)


def isosceles_perimeter(rng: random.Random, leg: int, base: int) -> Diagram:
    return Diagram(
        _sided_triangle(leg, leg, base),
        _TRIANGLE,
        sides=[("B", "C", f"{leg}"), ("A", "B", f"{base}")],
        ticks=[("C", "A"), ("B", "C")],
    )


def rectangle_side(rng: random.Random, perimeter: int, a: int) -> Diagram:
    return rectangle(rng, a, perimeter // 2 - a, (f"{a}", "x"))
