"""The given numbers of a geometry figure -> a diagram to scale.

`rng` decides what the numbers leave open; `figures.py` says which numbers can be drawn.
"""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from mm_agrae.tasks.synthetic.drawing import XY, AngleLabel, Diagram


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
_CORNERS = {"A": ("A", "B", "C"), "B": ("B", "C", "A"), "C": ("C", "A", "B")}
_CORNERS |= {"D": ("B", "D", "C"), "E": ("A", "C", "E")}
"""Inner angles, and the exterior ones at B and A: D lies on A-B beyond B, E beyond A."""
_QUADRILATERAL = [("A", "B"), ("B", "C"), ("C", "D"), ("D", "A")]
_INNER = {"A": ("A", "B", "D"), "B": ("B", "C", "A"), "C": ("C", "D", "B"), "D": ("D", "A", "C")}


def _label(corners: Mapping[str, tuple[str, str, str]], **texts: Any) -> list[AngleLabel]:
    """Labels of the named angles, in the given order."""
    return [(*corners[name], f"{text}") for name, text in texts.items()]


def triangle(
    a: float, b: float, *, extended: bool = False, right: str = "", equal: bool = False, **labels: Any
) -> Diagram:
    """Angles a at A and b at B. `labels`: an angle's name -> its text, in the order of placing.

    `extended`: A-B goes on to D. `right`: corner marked as right. `equal`: A-C and B-C so marked.
    """
    points, segments = _triangle_points(a, b), _TRIANGLE
    if extended:
        points["D"] = _beyond(points["A"], points["B"])
        segments = [("A", "D"), *_TRIANGLE[1:]]
    signs = [_CORNERS[right]] if right else []
    ticks = [("A", "C"), ("B", "C")] if equal else []
    return Diagram(points, segments, _label(_CORNERS, **labels), right=signs, ticks=ticks)


def two_exteriors(rng: random.Random, e: int, f: int) -> Diagram:
    figure = triangle(180 - e, 180 - f, extended=True, D=f, C="x", E=e)
    figure.points["E"] = _beyond(figure.points["B"], figure.points["A"])
    figure.segments[0] = ("E", "D")
    return figure


def bow_tie(rng: random.Random, a: int, b: int, c: int) -> Diagram:
    points = _triangle_points(a, b)
    third = 180 - a - b
    side_a, side_b = math.dist(points["A"], points["C"]), math.dist(points["B"], points["C"])
    # The second triangle C-D-E has angle c at D on the line A-C and the rest at E.
    ratio = math.sin(math.radians(180 - third - c)) / math.sin(math.radians(c))
    scale = min(1.2, 1.2 * side_b / (ratio * side_a))
    points["D"] = _beyond(points["A"], points["C"], scale)
    points["E"] = _beyond(points["B"], points["C"], scale * side_a / ratio / side_b)
    return Diagram(
        points,
        [("A", "B"), ("A", "D"), ("B", "E"), ("D", "E")],
        [*_label(_CORNERS, A=a, B=b), ("D", "E", "C", f"{c}"), ("E", "C", "D", "x")],
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


def _split(rng: random.Random, whole: int, given: Sequence[int]) -> Diagram:
    """The given angles and x, which make up the whole, in random order."""
    angles = [*((a, f"{a}") for a in given), (whole - sum(given), "x")]
    rng.shuffle(angles)
    return _fan(angles, closed=whole == 360)


def straight(rng: random.Random, *given: int) -> Diagram:
    return _split(rng, 180, given)


def full_turn(rng: random.Random, *given: int) -> Diagram:
    figure = _split(rng, 360, given)
    # Room for the label of a reflex angle.
    figure.points |= {"left": (-0.3, 0.0), "up": (0.0, 0.3), "down": (0.0, -0.3)}
    return figure


def opposite(rng: random.Random, a: int) -> Diagram:
    return _fan([(a, f"{a}"), (180 - a, ""), (a, "x"), (180 - a, "")], closed=True)


def right_split(rng: random.Random, a: int) -> Diagram:
    return replace(_split(rng, 90, [a]), right=[("O", "P0", "P2")])


def _quadrilateral_points(a: int, b: int, c: int) -> dict[str, XY]:
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


def quadrilateral(rng: random.Random, *given: int) -> Diagram:
    a, b, c = rng.sample(given, 3)
    labels = _label(_INNER, A=a, B=b, C=c, D="x")
    return Diagram(_quadrilateral_points(a, b, c), _QUADRILATERAL, labels)


def parallelogram(rng: random.Random, a: int) -> Diagram:
    (x, y) = _ray(a, 0.7)
    points = {"A": (0.0, 0.0), "B": (1.0, 0.0), "C": (1 + x, y), "D": (x, y)}
    arrows = [("A", "B", 0.5), ("D", "C", 0.5)]
    return Diagram(points, _QUADRILATERAL, _label(_INNER, A=a, B="x"), arrows=arrows)


def parallel(a: int, beside: str) -> Diagram:
    """Two parallel lines cut by a third at A and B; the given angle is above A, to the right."""
    (x, y) = _ray(a)
    points = {"A": (0.0, 0.0), "B": (x, y), "L": (-1.0, 0.0), "R": (1.0, 0.0)}
    points |= {"M": (x - 1, y), "N": (x + 1, y), "S": (-0.5 * x, -0.5 * y), "T": (1.5 * x, 1.5 * y)}
    # Beside B: the same corner, or the one on the same side between the lines.
    at_b = {"same": ("N", "T"), "between": ("A", "N")}[beside]
    return Diagram(
        points,
        [("L", "R"), ("M", "N"), ("S", "T")],
        [("A", "R", "B", f"{a}"), ("B", *at_b, "x")],
        arrows=[("L", "R", 0.85), ("M", "N", 0.85)],
    )


def regular(names: str, a: int) -> Diagram:
    """A regular polygon with the named corners and the side a."""
    points = {name: _ray(360 * k / len(names)) for k, name in enumerate(names)}
    edges = list(zip(names, names[1:] + names[0], strict=True))
    return Diagram(points, edges, sides=[(*edges[0], f"{a}")], ticks=edges)


def rectangle(a: int, b: int, shown: str) -> Diagram:
    """Sides a and b, the second shown as `shown`."""
    width, height = float(a), float(b)
    points = {"A": (0.0, 0.0), "B": (width, 0.0), "C": (width, height), "D": (0.0, height)}
    return Diagram(
        points, _QUADRILATERAL, sides=[("A", "B", f"{a}"), ("B", "C", shown)], right=[("A", "B", "D"), ("C", "D", "B")]
    )


def _sided_triangle(a: float, b: float, c: float) -> dict[str, XY]:
    """BC = a, CA = b, AB = c."""
    x = (b * b + c * c - a * a) / (2 * c)
    return {"A": (0.0, 0.0), "B": (float(c), 0.0), "C": (x, math.sqrt(b * b - x * x))}


def scalene(rng: random.Random, a: int, b: int, c: int) -> Diagram:
    sides = [("B", "C", f"{a}"), ("C", "A", f"{b}"), ("A", "B", f"{c}")]
    return Diagram(_sided_triangle(a, b, c), _TRIANGLE, sides=sides)


def isosceles(rng: random.Random, leg: int, base: int) -> Diagram:
    sides, ticks = [("B", "C", f"{leg}"), ("A", "B", f"{base}")], [("C", "A"), ("B", "C")]
    return Diagram(_sided_triangle(leg, leg, base), _TRIANGLE, sides=sides, ticks=ticks)
