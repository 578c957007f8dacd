"""Images of the synthetic task: geometry figures drawn to scale, shapes on a grid, bar charts.

Everything is drawn with Pillow at twice the size and then halved, which smooths the lines. Each
function returns the image and a dict of what was drawn, in pixels of the finished image, so that
a test can measure the drawing without knowing how the problem was made.
"""

import functools
import math
import random
from dataclasses import dataclass, field, replace
from typing import Any

from PIL import Image, ImageDraw, ImageFont

XY = tuple[float, float]
Box = tuple[float, float, float, float]
Segment = tuple[XY, XY]
AngleLabel = tuple[str, str, str, str]

INK = (25, 25, 25)
UNKNOWN = (200, 0, 0)
GIVEN = (40, 80, 215)
EQUAL = (20, 150, 60)
PARALLEL = (235, 120, 20)
RIGHT = (150, 40, 180)
MARK = (110, 110, 110)
COLOURS = {"red": (215, 40, 40), "blue": (40, 80, 215), "green": (30, 150, 60)}
BARS = ((60, 100, 200), (230, 140, 30), (60, 160, 90), (160, 80, 180))

_ZOOM = 2
_LABEL_PX = 11
_SLOT_PX = 7
_ARC_PX = 8


@dataclass
class Diagram:
    """A geometry figure in its own units, y upwards, before it is turned and scaled.

    An angle label (vertex, p, q, text) belongs to the angle that opens counter-clockwise from
    the ray vertex-p to the ray vertex-q, so reflex angles can be labelled too. A side label
    (p, q, text) is placed beside the segment, on the side away from the figure's centre.
    """

    points: dict[str, XY]
    segments: list[tuple[str, str]]
    angles: list[AngleLabel] = field(default_factory=list)
    sides: list[tuple[str, str, str]] = field(default_factory=list)
    right: list[tuple[str, str, str]] = field(default_factory=list)
    ticks: list[tuple[str, str]] = field(default_factory=list)
    arrows: list[tuple[str, str, float]] = field(default_factory=list)


def draw_diagram(
    diagram: Diagram, rng: random.Random, px: int, most_turn: float = 180.0
) -> tuple[Image.Image, dict[str, Any]]:
    """Draw the figure, turned at random by up to `most_turn` degrees either way, or mirrored.

    Retries until no two labels collide; later attempts may turn further.
    """
    attempts = []
    for attempt in range(300):
        turned = _turned(diagram, rng, px, most_turn * max(1, attempt / 10))
        attempts.append((turned, *_place_labels(turned, px)))
        if attempts[-1][2] == 0:
            break
    turned, labels, crowded = min(attempts, key=lambda attempt: attempt[2])
    image, pen = _canvas(px)
    points = turned.points
    for p, q in turned.segments:
        pen.line(_zoom(points[p], points[q]), fill=INK, width=3)
    for p, q in turned.ticks:
        pen.line(_zoom(*_tick_ends(points[p], points[q])), fill=EQUAL, width=5)
    for p, q, share in turned.arrows:
        _arrow(pen, points[p], points[q], share)
    for vertex, p, q in turned.right:
        _square_corner(pen, points[vertex], points[p], points[q])
    for vertex, p, q, text in turned.angles:
        _arc(pen, points[vertex], points[p], points[q], UNKNOWN if text == "x" else GIVEN)
    for text, box in labels:
        _write_label(pen, text, box)
    return image.reduce(_ZOOM), {**vars(turned), "labels": labels, "crowded": crowded}


def draw_labels(labels: list[tuple[str, Box]], px: int) -> Image.Image:
    """Labels alone, as `draw_diagram` writes them."""
    image, pen = _canvas(px)
    for text, box in labels:
        _write_label(pen, text, box)
    return image.reduce(_ZOOM)


def draw_shapes(kinds: list[tuple[str, str]], rng: random.Random, px: int) -> tuple[Image.Image, dict[str, Any]]:
    """Scatter shapes, given as (kind, colour), over the cells of a 4 x 4 grid, one to a cell."""
    image, pen = _canvas(px)
    cell = px / 4
    shapes = []
    for index, (kind, colour) in zip(rng.sample(range(16), len(kinds)), kinds, strict=True):
        radius = cell * rng.uniform(0.26, 0.36)
        slack = cell / 2 - radius - 1
        x = (index % 4 + 0.5) * cell + rng.uniform(-slack, slack)
        y = (index // 4 + 0.5) * cell + rng.uniform(-slack, slack)
        if kind == "circle":
            pen.ellipse(_frame((x, y), radius), fill=COLOURS[colour])
        else:
            corners = 4 if kind == "square" else 3
            start = math.pi / 4 if kind == "square" else -math.pi / 2
            turns = [start + 2 * math.pi * k / corners for k in range(corners)]
            ring = [(x + radius * math.cos(turn), y + radius * math.sin(turn)) for turn in turns]
            pen.polygon(_zoom(*ring), fill=COLOURS[colour])
        shapes.append({"kind": kind, "colour": colour, "x": x, "y": y, "radius": radius})
    return image.reduce(_ZOOM), {"shapes": shapes}


def draw_bars(values: tuple[int, ...], px: int) -> tuple[Image.Image, dict[str, Any]]:
    """A bar chart on a scale from 0 to 10 with a line at each unit. Bars are named A, B, C, ..."""
    image, pen = _canvas(px)
    left, floor = 18.0, px - 16.0
    unit = (floor - 6) / 10
    for level in range(11):
        y = floor - level * unit
        shade = MARK if level == 0 else (175, 175, 175) if level % 2 == 0 else (225, 225, 225)
        pen.line(_zoom((left, y), (px - 2, y)), fill=shade, width=2)
        if level % 2 == 0:
            _write(pen, str(level), (2, y - 5, left - 3, y + 5), INK, 9)
    pitch = (px - left - 4) / len(values)
    bars = []
    for k, value in enumerate(values):
        x0, x1 = left + (k + 0.18) * pitch, left + (k + 0.82) * pitch
        top = floor - value * unit
        pen.rectangle(_zoom((x0, top), (x1, floor)), fill=BARS[k])
        name = "ABCD"[k]
        _write(pen, name, (x0, floor + 2, x1, px - 1), INK)
        bars.append({"name": name, "x0": x0, "x1": x1, "top": top, "colour": BARS[k]})
    return image.reduce(_ZOOM), {"bars": bars, "floor": floor, "unit": unit}


def _canvas(px: int) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    image = Image.new("RGB", (px * _ZOOM, px * _ZOOM), "white")
    return image, ImageDraw.Draw(image)


def _zoom(*points: XY) -> list[float]:
    """The points' coordinates one after the other, as Pillow takes them."""
    return [coordinate * _ZOOM for point in points for coordinate in point]


def _frame(centre: XY, radius: float) -> list[float]:
    (x, y), r = centre, radius
    return _zoom((x - r, y - r), (x + r, y + r))


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size * _ZOOM)


@functools.cache
def _extent(text: str, size: int) -> Box:
    box = _font(size).getbbox(text)
    return box[0] / _ZOOM, box[1] / _ZOOM, box[2] / _ZOOM, box[3] / _ZOOM


def _write(pen: ImageDraw.ImageDraw, text: str, box: Box, ink: tuple[int, int, int], size: int = _LABEL_PX) -> None:
    """Write `text` centred in `box`."""
    x0, y0, x1, y1 = _extent(text, size)
    x, y = _zoom(((box[0] + box[2] - x0 - x1) / 2, (box[1] + box[3] - y0 - y1) / 2))
    pen.text((x, y), text, fill=ink, font=_font(size))


def _write_label(pen: ImageDraw.ImageDraw, text: str, box: Box) -> None:
    """Each digit in the middle of its slot."""
    for place, glyph in enumerate(text):
        left = box[0] + place * _SLOT_PX
        _write(pen, glyph, (left, box[1], left + _SLOT_PX, box[3]), UNKNOWN if text == "x" else INK)


def _turned(diagram: Diagram, rng: random.Random, px: int, most_turn: float) -> Diagram:
    """The figure in image coordinates (y downwards), turned at random, mirrored or not.

    Angle labels keep their meaning: counter-clockwise as seen in the image.
    """
    turn = math.radians(rng.uniform(-most_turn, most_turn))
    mirror = rng.random() < 0.5
    cos, sin = math.cos(turn), math.sin(turn)
    points = {}
    for name, (x, y) in diagram.points.items():
        x = -x if mirror else x
        points[name] = (x * cos - y * sin, -(x * sin + y * cos))
    xs, ys = zip(*points.values(), strict=True)
    width, height = max(xs) - min(xs), max(ys) - min(ys)
    margin = 14 if diagram.sides else 7
    scale = (px - 2 * margin) / max(width, height)
    free_x, free_y = px - 2 * margin - width * scale, px - 2 * margin - height * scale
    shift_x, shift_y = margin + rng.random() * free_x, margin + rng.random() * free_y
    placed = {
        name: ((x - min(xs)) * scale + shift_x, (y - min(ys)) * scale + shift_y) for name, (x, y) in points.items()
    }
    angles = [(v, q, p, t) if mirror else (v, p, q, t) for v, p, q, t in diagram.angles]
    return replace(diagram, points=placed, angles=angles)


def opening(vertex: XY, p: XY, q: XY) -> tuple[float, float]:
    """Direction of vertex-p and the counter-clockwise angle to vertex-q, both in radians.

    Points are in image coordinates; counter-clockwise as seen in the image.
    """
    start = math.atan2(vertex[1] - p[1], p[0] - vertex[0])
    end = math.atan2(vertex[1] - q[1], q[0] - vertex[0])
    return start, (end - start) % (2 * math.pi)


def _place_labels(figure: Diagram, px: int) -> tuple[list[tuple[str, Box]], int]:
    """Each label at the nearest free position, and how many labels found none.

    Positions lie on a lattice: every digit stands in a slot of 7 x 7 pixels of its own, of which a vision tower's
    patch of 14 holds four. A small model learns such digits from a fraction of the images it needs otherwise.

    A position is free if it lies in the image, clear of lines, arcs and other labels; an angle's
    label also stays inside the angle, nearer to its vertex than to any other labelled one.
    """
    points = figure.points
    lines = [(points[p], points[q]) for p, q in figure.segments]
    vertices = [points[vertex] for vertex, *_ in figure.angles]
    places: list[tuple[str, XY, XY, int, list[XY]]] = []
    for vertex, p, q, text in figure.angles:
        start, sweep = opening(points[vertex], points[p], points[q])
        ray = (math.cos(start + sweep / 2), -math.sin(start + sweep / 2))
        places.append((text, points[vertex], ray, 46, vertices))
    xs, ys = zip(*points.values(), strict=True)
    centre = (sum(xs) / len(xs), sum(ys) / len(ys))
    for p, q, text in figure.sides:
        dx, dy = _along(points[p], points[q])
        middle = _between(points[p], points[q])
        away = dy * (middle[0] - centre[0]) - dx * (middle[1] - centre[1])
        places.append((text, middle, (dy, -dx) if away > 0 else (-dy, dx), 18, []))
    marks = lines + [_tick_ends(points[p], points[q]) for p, q in figure.ticks]
    labels: list[tuple[str, Box]] = []
    crowded = 0
    for text, origin, ray, reach, apart in places:
        box, free = _free_box(text, origin, ray, reach, apart, labels, lines, marks, px)
        labels.append((text, box))
        crowded += not free
    return labels, crowded


def _free_box(
    text: str,
    origin: XY,
    ray: XY,
    reach: int,
    apart: list[XY],
    labels: list[tuple[str, Box]],
    lines: list[Segment],
    marks: list[Segment],
    px: int,
) -> tuple[Box, bool]:
    """The first free position for `text` from `origin` along `ray`, and whether there is one."""
    half_w, half_h = _SLOT_PX * len(text) / 2, _SLOT_PX / 2 + 1
    start = (origin[0] + 2 * ray[0], origin[1] + 2 * ray[1])
    box, tried = (0.0, 0.0, 0.0, 0.0), set()
    for distance in range(7, reach):
        left = round((origin[0] + ray[0] * distance - half_w) / _SLOT_PX) * _SLOT_PX
        row = math.floor((origin[1] + ray[1] * distance) / _SLOT_PX)
        if (left, row) in tried:
            continue
        tried.add((left, row))
        x, y = left + half_w, (row + 0.5) * _SLOT_PX
        box = (left, y - half_h, x + half_w, y + half_h)
        with_gap = (box[0] - _SLOT_PX / 2, box[1], box[2] + _SLOT_PX / 2, box[3])  # side by side they would be one
        if apart:
            gap_x, gap_y = abs(x - origin[0]) - half_w, abs(y - origin[1]) - half_h
            if math.hypot(max(gap_x, 0), max(gap_y, 0)) < _ARC_PX - 1:
                continue
        away = math.dist((x, y), origin)
        if (
            min(box) >= 0
            and max(box) <= px
            and not any(overlap(with_gap, other) for _, other in labels)
            and not any(_cut(start, (x, y), *line) for line in lines)
            and not any(crosses(box, *mark) for mark in marks)
            and all(math.dist((x, y), v) >= 1.2 * away for v in apart if v != origin)
        ):
            return box, True
    return box, False


def _cut(a: XY, b: XY, p: XY, q: XY) -> bool:
    """Whether the segments a-b and p-q cross."""

    def side(o: XY, r: XY, s: XY) -> float:
        return (r[0] - o[0]) * (s[1] - o[1]) - (r[1] - o[1]) * (s[0] - o[0])

    return side(p, q, a) * side(p, q, b) < 0 and side(a, b, p) * side(a, b, q) < 0


def overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def crosses(box: Box, p: XY, q: XY) -> bool:
    """Whether the segment p-q enters the box (clipping by Liang and Barsky)."""
    enter, leave = 0.0, 1.0
    for axis in (0, 1):
        delta = q[axis] - p[axis]
        low, high = box[axis] - p[axis], box[axis + 2] - p[axis]
        if abs(delta) < 1e-9:
            if low > 0 or high < 0:
                return False
            continue
        first, last = sorted((low / delta, high / delta))
        enter, leave = max(enter, first), min(leave, last)
        if enter > leave:
            return False
    return True


def _arc(pen: ImageDraw.ImageDraw, v: XY, p: XY, q: XY, ink: tuple[int, int, int]) -> None:
    start, sweep = opening(v, p, q)
    # Pillow measures clockwise from three o'clock.
    first, last = -math.degrees(start + sweep), -math.degrees(start)
    pen.arc(_frame(v, _ARC_PX), first, last, fill=ink, width=5)


def _along(p: XY, q: XY) -> XY:
    length = math.hypot(q[0] - p[0], q[1] - p[1])
    return (q[0] - p[0]) / length, (q[1] - p[1]) / length


def _square_corner(pen: ImageDraw.ImageDraw, v: XY, p: XY, q: XY) -> None:
    (ax, ay), (bx, by) = _along(v, p), _along(v, q)
    corners = [(8 * dx + v[0], 8 * dy + v[1]) for dx, dy in ((ax, ay), (ax + bx, ay + by), (bx, by))]
    pen.line(_zoom(*corners), fill=RIGHT, width=4)


def _between(p: XY, q: XY) -> XY:
    return (p[0] + q[0]) / 2, (p[1] + q[1]) / 2


def _tick_ends(p: XY, q: XY) -> Segment:
    dx, dy = _along(p, q)
    x, y = _between(p, q)
    return (x - 4 * dy, y + 4 * dx), (x + 4 * dy, y - 4 * dx)


def _arrow(pen: ImageDraw.ImageDraw, p: XY, q: XY, share: float) -> None:
    """The usual mark of parallel lines."""
    dx, dy = _along(p, q)
    x, y = p[0] + share * (q[0] - p[0]), p[1] + share * (q[1] - p[1])
    tip = (x + 3 * dx, y + 3 * dy)
    for side in (-1, 1):
        tail = (x - 3 * dx - side * 4 * dy, y - 3 * dy + side * 4 * dx)
        pen.line(_zoom(tail, tip), fill=PARALLEL, width=4)
