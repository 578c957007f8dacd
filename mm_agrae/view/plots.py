"""SVG line plots as HTML figures.

They are drawn here rather than by a plotting library so that they follow the reader's light or
dark mode (colours come from `components.css`) and add only a few kilobytes to a page.
"""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from mm_agrae.view.page import Html, el, number, percent

Points = Sequence[tuple[float, float]]

MAX_POINTS = 240  # of a curve, after averaging neighbours
MAX_DOTS = 40  # curves with more points get no dots with tooltips
MIN_SMOOTHED = 20  # shorter curves are not smoothed unless `reach` is given
WIDTH, HEIGHT = 440.0, 220.0
LEFT, RIGHT, TOP, BOTTOM = 46.0, 10.0, 10.0, 24.0
NAMES = 150.0  # the width of the names beside intervals


@dataclass(frozen=True)
class Line:
    """A curve: (x, y) points in order of x, and (x, low, high) of the band around it.

    `value` is shown next to the label in the legend.
    """

    label: str
    points: Points
    band: Sequence[tuple[float, float, float]] = ()
    color: int = 0
    dash: str = ""
    """"dashed" or "dotted"; else drawn through."""
    value: str = ""

    @property
    def css(self) -> str:
        return f"c{self.color % 8} {self.dash}".rstrip()


@dataclass(frozen=True)
class _Axes:
    """The ranges of a plot, and where its values lie in the SVG."""

    left: float
    right: float
    low: float
    high: float
    x_name: str
    log2: bool
    shares: bool
    margin: float = LEFT

    def at(self, x: float, y: float) -> tuple[float, float]:
        scale = math.log2 if self.log2 else float
        width = (scale(self.right) - scale(self.left)) or 1.0
        return (
            self.margin + (scale(x) - scale(self.left)) / width * (WIDTH - self.margin - RIGHT),
            HEIGHT - BOTTOM - (y - self.low) / (self.high - self.low) * (HEIGHT - TOP - BOTTOM),
        )

    def draw(self, y_ticks: Sequence[float]) -> list[Html]:
        """Grid lines and the numbers on both axes."""
        marks = []
        for y in y_ticks:
            px, py = self.at(self.left, y)
            marks.append(_path([(px, py), (WIDTH - RIGHT, py)], "grid"))
            marks.append(_text(_y_text(y, self.shares), self.margin - 6, py + 4, "end"))
        powers = [2.0**power for power in range(40)]
        for x in powers if self.log2 else _ticks(self.left, self.right, 6):
            if self.left <= x <= self.right and (self.x_name != "step" or x == int(x)):
                px = self.at(x, self.low)[0]
                anchor = "end" if px > WIDTH - 20 else "middle"
                marks.append(_text(number(x), px, HEIGHT - 8, anchor))
        return marks


def plot(
    title: str,
    lines: Sequence[Line],
    *,
    note: str = "",
    x_name: str = "step",
    shares: bool = False,
    log2: bool = False,
    stacked: bool = False,
    zero: bool = False,
    smooth: bool = False,
    reach: float | None = None,
    mark: float | None = None,
) -> Html:
    """A figure with one SVG plot of at least one point.

    shares: y in percent. log2: of x. stacked: areas on top of each other. zero: y begins at 0.
    smooth: a moving average drawn over the faint curve, of the points within `reach` on either
    side (by default a thirtieth of the range, for curves of MIN_SMOOTHED points or more). mark: an
    x to mark with a vertical line.
    """
    lines = [line for line in lines if line.points]
    if stacked:
        lines = _stack(lines)
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points]
    ys += [bound for line in lines for _, *bounds in line.band for bound in bounds]
    y_ticks = _y_ticks(min(ys), max(ys), from_zero=zero or stacked)
    margin = max(LEFT, 10 + 7 * max(len(_y_text(y, shares)) for y in y_ticks))  # such as 2.5e-06
    axes = _Axes(min(xs), max(xs), y_ticks[0], y_ticks[-1], x_name, log2, shares, margin)
    marks = axes.draw(y_ticks)
    if stacked:
        marks += _areas(axes, lines)
    else:
        for line in lines:
            window = reach
            if reach is None and len(line.points) >= MIN_SMOOTHED:
                window = (axes.right - axes.left) / 30
            marks += _curve(axes, line, window if smooth else None, faint=len(lines) <= 3)
    if mark is not None:
        px = axes.at(max(axes.left, min(mark, axes.right)), axes.low)[0]
        marks.append(_path([(px, TOP), (px, HEIGHT - BOTTOM)], "mark"))
    text = f"{title} by {x_name}: {', '.join(line.label for line in lines)}"
    return el(
        "figure",
        el("figcaption", el("b", title), el("span", note, class_="muted small")),
        el("svg", *marks, viewBox=f"0 0 {WIDTH:g} {HEIGHT:g}", role="img", aria_label=text),
        _legend(lines),
    )


def interval_plot(
    title: str, panels: Sequence[str], rows: Mapping[str, Sequence[Sequence[float]]], *, note: str = ""
) -> Html:
    """A figure of (mean, low, high) beside 0: a line for each row's name, a column for each panel.

    All have one scale, on which every mean and most intervals can be seen; what reaches beyond it is cut.
    """
    found = [each for row in rows.values() for each in row]
    bounds = sorted(max(map(abs, ends)) for _, *ends in found)
    usual = bounds[len(bounds) * 3 // 4]
    reach = max(*(abs(mean) for mean, *_ in found), usual if usual < math.inf else 0.0) or 1.0
    width, bottom = (WIDTH - NAMES) / len(panels), 26.0 + 15 * len(rows)
    marks = [_text(name, 0, 30 + 15 * line, "start") for line, name in enumerate(rows)]
    for column, panel in enumerate(panels):
        zero = NAMES + (column + 0.5) * width
        marks += [_text(panel, zero, 12, "middle"), _path([(zero, 18), (zero, bottom)], "mark")]
        for line, (name, row) in enumerate(rows.items()):
            mean, *ends = (zero + max(-1.0, min(x / reach, 1.0)) * (width / 2 - 8) for x in row[column])
            y, told = 26 + 15 * line, ", ".join(map(number, row[column]))
            marks.append(_path([(x, y) for x in ends], f"c{column} line"))
            dot = el("title", f"{name}, {panel}: {told}")
            marks.append(el("circle", dot, cx=f"{mean:.1f}", cy=y, r="3.5", class_=f"c{column} dot"))
        for x, sign in ((-1, "-"), (1, "+")):
            marks.append(_text(f"{sign}{reach:.2g}", zero + x * (width / 2 - 16), bottom + 14, "middle"))
    return el(
        "figure",
        el("figcaption", el("b", title), el("span", note, class_="muted small")),
        el("svg", *marks, viewBox=f"0 0 {WIDTH:g} {bottom + 20:g}", role="img", aria_label=title),
    )


def _areas(axes: _Axes, lines: Sequence[Line]) -> list[Html]:
    """Each line fills the area down to the one before it."""
    marks = []
    below = [axes.at(axes.left, axes.low), axes.at(axes.right, axes.low)]
    for line in lines:
        points = [axes.at(x, y) for x, y in line.points]
        marks.append(_path([*points, *reversed(below)], f"{line.css} area"))
        below = points
    return marks


def _curve(axes: _Axes, line: Line, reach: float | None, faint: bool) -> list[Html]:
    """The band, the line (averaged over `reach`, if any), and dots with tooltips on short ones."""
    marks = []
    if line.band:
        upper = [axes.at(x, top) for x, _, top in line.band]
        lower = [axes.at(x, bottom) for x, bottom, _ in line.band]
        marks.append(_path([*upper, *reversed(lower)], f"{line.css} band"))
    points = [axes.at(x, y) for x, y in line.points]
    if reach:
        if faint:
            marks.append(_path(points, f"{line.css} faint"))
        points = [axes.at(x, y) for x, y in moving_average(line.points, reach)]
    marks.append(_path(points, f"{line.css} line"))
    if len(points) <= MAX_DOTS:
        for (x, y), (px, py) in zip(line.points, points, strict=True):
            value = percent(y) if axes.shares else number(y)
            tip = el("title", f"{line.label}, {axes.x_name} {number(x)}: {value}")
            dot = f"{line.css} dot"
            marks.append(el("circle", tip, cx=f"{px:.1f}", cy=f"{py:.1f}", r="2.5", class_=dot))
    return marks


def _legend(lines: Sequence[Line]) -> Html | None:
    if len(lines) == 1 and not lines[0].value:
        return None
    names = []
    for line in lines:
        value = el("b", line.value) if line.value else None
        names.append(el("span", el("i", class_=line.css), line.label, value))
    return el("div", *names, class_="legend")


def thin(points: Points) -> Points:
    """At most MAX_POINTS points, by averaging neighbours."""
    size = -(-len(points) // MAX_POINTS) or 1
    chunks = (points[i : i + size] for i in range(0, len(points), size))
    return [(sum(x for x, _ in c) / len(c), sum(y for _, y in c) / len(c)) for c in chunks]


def _path(points: Points, css: str) -> Html:
    return el("path", d="M" + "L".join(f"{x:.1f},{y:.1f}" for x, y in points), class_=css)


def _text(text: str, x: float, y: float, anchor: str) -> Html:
    return el("text", text, x=f"{x:.1f}", y=f"{y:.1f}", text_anchor=anchor)


def _y_text(y: float, shares: bool) -> str:
    return f"{100 * y:.3g}\N{NO-BREAK SPACE}%" if shares else number(y)


def _y_ticks(low: float, high: float, from_zero: bool) -> list[float]:
    if from_zero or 0 <= low < 0.4 * high:
        low = min(low, 0.0)
    if high - low <= 1e-9 * max(abs(low), abs(high)):  # one value only
        low, high = low - (abs(low) * 0.1 or 0.5), high + (abs(high) * 0.1 or 0.5)
    return _ticks(low, high, 5)


def _ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers that enclose the range, about `count` of them."""
    rough = (high - low) / count or 1.0
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(m * size for m in (1, 2, 2.5, 5, 10) if m * size >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def moving_average(points: Points, reach: float) -> Points:
    """Each y as the mean over the points within `reach` of its x. Points in order of x."""
    xs = [x for x, _ in points]
    windows = (points[bisect_left(xs, x - reach) : bisect_right(xs, x + reach)] for x in xs)
    return [(x, sum(y for _, y in w) / len(w)) for x, w in zip(xs, windows, strict=True)]


def _stack(lines: Sequence[Line]) -> list[Line]:
    height = dict.fromkeys(sorted({x for line in lines for x, _ in line.points}), 0.0)
    stacked = []
    for line in lines:
        for x, y in line.points:
            height[x] += y
        stacked.append(replace(line, points=list(height.items())))
    return stacked
