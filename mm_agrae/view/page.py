"""HTML pages that need no network and no script: elements, numbers, tables, SVG plots.

Every text goes through `el`, which escapes whatever is not markup made by `el` itself, and the
page's content policy forbids scripts and requests besides: what a model wrote is shown as
characters. Plots are drawn here rather than by a plotting library so that they follow the
reader's light or dark mode and stay small.
"""

from __future__ import annotations

import html
import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from mm_agrae.run.files import clean_text
from mm_agrae.run.records import Interval

Points = Sequence[tuple[float, float]]

MAX_POINTS = 240  # of a curve, after averaging neighbours


# -- markup


class Html(str):
    """Markup made by `el`; any other text is escaped by it."""

    __slots__ = ()


def el(tag: str, *children: object, **attributes: object) -> Html:
    """An element. Children that are not Html are text; None, child or attribute, is left out."""
    named = {name.rstrip("_").replace("_", "-"): value for name, value in attributes.items()}
    opening = "".join(f' {name}="{escape(v)}"' for name, v in named.items() if v is not None)
    if tag in ("img", "meta", "link"):
        return Html(f"<{tag}{opening}>")
    return Html(f"<{tag}{opening}>{join(children)}</{tag}>")


def join(children: Iterable[object]) -> Html:
    parts = (c if isinstance(c, Html) else escape(c) for c in children if c is not None)
    return Html("".join(parts))


# Control characters would vanish or be refused by HTML: show their symbols (␀, ␛) instead.
_CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"} | {127: 0x2421}


def escape(value: object) -> str:
    return html.escape(clean_text(value).replace("\r\n", "\n").translate(_CONTROLS))


def shorten(text: object, limit: int) -> str:
    """Begin and end of a long text: answers stand at the end."""
    full = clean_text(text)
    if len(full) <= limit:
        return full
    begin, end = limit * 2 // 3, limit // 3
    return f"{full[:begin]}\n[… {len(full) - begin - end:,} characters left out …]\n{full[-end:]}"


def page(title: str, header: Html, sections: Sequence[tuple[str, Html | None]]) -> str:
    """A whole document, with links to its sections on top. Sections of None are left out."""
    shown = [(name, body, name.lower().replace(" ", "-")) for name, body in sections if body]
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", http_equiv="Content-Security-Policy", content=policy),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("title", f"{title} · mm-agrae"),
        el("link", rel="icon", href="data:,"),
        el("style", Html(_CSS)),
    )
    links = el("nav", *(el("a", name, href=f"#{anchor}") for name, _, anchor in shown))
    main = el("main", *(el("section", el("h2", name), body, id=id_) for name, body, id_ in shown))
    return f"<!doctype html>\n{el('html', head, el('body', header, links, main), lang='en')}\n"


def table(header: Sequence[object], rows: Iterable[Sequence[object]]) -> Html:
    titles = el("tr", *(el("th", title, scope="col") for title in header))
    lines = []
    for first, *rest in rows:
        lines.append(el("tr", el("th", first, scope="row"), *(el("td", cell) for cell in rest)))
    content = el("table", el("thead", titles), el("tbody", *lines))
    return el("div", content, class_="scroll", tabindex="0")


def note(text: object) -> Html:
    return el("p", text, class_="muted")


def empty(text: object) -> Html:
    """What stands in place of a part that is not there."""
    return el("p", text, class_="empty")


def fold(title: str, *body: object) -> Html:
    return el("details", el("summary", title), *body)


def tile(title: str, value: object, *notes: object) -> Html:
    lines = (el("div", line, class_="muted small") for line in notes if line)
    return el(
        "div",
        el("div", title, class_="muted"),
        el("div", value, class_="big"),
        *lines,
        class_="tile",
    )


# -- numbers


def number(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return "–"
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if unit == 'k' else size):.3g}{unit}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def percent(*values: float) -> str:
    """One share, or several over time: 33.3 → 68.5 %, never broken before its sign."""
    return " → ".join(f"{100 * value:.1f}" for value in values) + "\N{NO-BREAK SPACE}%"


def span(interval: Interval) -> str:
    return f"{100 * interval.low:.1f}–{100 * interval.high:.1f}"


def with_interval(interval: Interval | None) -> str:
    return "–" if interval is None else f"{100 * interval.mean:.1f} ({span(interval)})"


def duration(seconds: float) -> str:
    minutes, hours = int(seconds // 60), int(seconds // 3600)
    if hours:
        return f"{hours} h {minutes % 60} min"
    return f"{minutes} min {int(seconds % 60)} s" if minutes else f"{seconds:.3g} s"


# -- plots


@dataclass(frozen=True)
class Line:
    """A curve: (x, y) points in order of x, and (x, low, high) of the band around it.

    `value` stands beside its name.
    """

    label: str
    points: Points
    band: Sequence[tuple[float, float, float]] = ()
    color: int = 0
    dashed: bool = False
    value: str = ""

    @property
    def css(self) -> str:
        return f"c{self.color % 8}" + (" dashed" if self.dashed else "")


WIDTH, HEIGHT = 440.0, 220.0
LEFT, RIGHT, TOP, BOTTOM = 46.0, 10.0, 10.0, 24.0


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
    smooth: a moving average over the faint curve itself, of the points that lie within `reach` on
    either side (by default a thirtieth of the curve, for curves of 20 points or more). mark: an x
    to mark with a line.
    """
    lines = [line for line in lines if line.points]
    if stacked:
        lines = _stack(lines)
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points]
    ys += [bound for line in lines for _, *bounds in line.band for bound in bounds]
    y_ticks = _y_ticks(min(ys), max(ys), from_zero=zero or stacked)
    low, high, left, right = y_ticks[0], y_ticks[-1], min(xs), max(xs)
    scale = math.log2 if log2 else float
    width = (scale(right) - scale(left)) or 1.0

    def at(x: float, y: float) -> tuple[float, float]:
        return (
            LEFT + (scale(x) - scale(left)) / width * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - (y - low) / (high - low) * (HEIGHT - TOP - BOTTOM),
        )

    marks = []
    for y in y_ticks:
        marks.append(_path([at(left, y), (WIDTH - RIGHT, at(left, y)[1])], "grid"))
        text = f"{100 * y:.3g}\N{NO-BREAK SPACE}%" if shares else number(y)
        marks.append(_text(text, LEFT - 6, at(left, y)[1] + 4, "end"))
    x_ticks = [2.0**power for power in range(40)] if log2 else _ticks(left, right, 6)
    if x_name == "step":
        x_ticks = [x for x in x_ticks if x == int(x)]
    for x in x_ticks:
        if left <= x <= right:
            px = at(x, low)[0]
            marks.append(_text(number(x), px, HEIGHT - 8, "end" if px > WIDTH - 20 else "middle"))
    below = [at(left, low), at(right, low)]
    for line in lines:
        points = [at(x, y) for x, y in line.points]
        if stacked:
            marks.append(_path([*points, *reversed(below)], f"{line.css} area"))
            below = points
            continue
        if line.band:
            upper = [at(x, top) for x, _, top in line.band]
            lower = [at(x, bottom) for x, bottom, _ in line.band]
            marks.append(_path([*upper, *reversed(lower)], f"{line.css} band"))
        if smooth and (reach or (reach is None and len(points) >= 20)):
            if len(lines) <= 3:
                marks.append(_path(points, f"{line.css} faint"))
            wide = (right - left) / 30 if reach is None else reach
            points = [at(x, y) for x, y in moving_average(line.points, wide)]
        marks.append(_path(points, f"{line.css} line"))
        if len(points) <= 40:
            for (x, y), (px, py) in zip(line.points, points, strict=True):
                value = percent(y) if shares else number(y)
                tip = el("title", f"{line.label}, {x_name} {number(x)}: {value}")
                dot = f"{line.css} dot"
                marks.append(el("circle", tip, cx=f"{px:.1f}", cy=f"{py:.1f}", r="2.5", class_=dot))
    if mark is not None:
        px = at(max(left, min(mark, right)), low)[0]
        marks.append(_path([(px, TOP), (px, HEIGHT - BOTTOM)], "mark"))
    names = [
        el(
            "span",
            el("i", class_=line.css),
            line.label,
            el("b", line.value) if line.value else None,
        )
        for line in lines
    ]
    text = f"{title} by {x_name}: {', '.join(line.label for line in lines)}"
    box = f"0 0 {WIDTH:g} {HEIGHT:g}"
    return el(
        "figure",
        el("figcaption", el("b", title), el("span", note, class_="muted small")),
        el("svg", *marks, viewBox=box, role="img", aria_label=text),
        el("div", *names, class_="legend") if len(lines) > 1 or lines[0].value else None,
    )


def thin(points: Points) -> Points:
    """At most MAX_POINTS points, by averaging neighbours."""
    size = -(-len(points) // MAX_POINTS) or 1
    chunks = (points[i : i + size] for i in range(0, len(points), size))
    return [(sum(x for x, _ in c) / len(c), sum(y for _, y in c) / len(c)) for c in chunks]


def _path(points: Points, css: str) -> Html:
    return el("path", d="M" + "L".join(f"{x:.1f},{y:.1f}" for x, y in points), class_=css)


def _text(text: str, x: float, y: float, anchor: str) -> Html:
    return el("text", text, x=f"{x:.1f}", y=f"{y:.1f}", text_anchor=anchor)


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
    return [
        (x, sum(y for _, y in window) / len(window)) for x, window in zip(xs, windows, strict=True)
    ]


def _stack(lines: Sequence[Line]) -> list[Line]:
    height = dict.fromkeys(sorted({x for line in lines for x, _ in line.points}), 0.0)
    stacked = []
    for line in lines:
        for x, y in line.points:
            height[x] += y
        stacked.append(replace(line, points=list(height.items())))
    return stacked


_LIGHT = """
  --bg: #f6f7f9; --card: #fff; --text: #1d2430; --muted: #667085;
  --edge: #dde1e8; --code: #f3f4f7; --right: #16794a; --wrong: #b42318;
  --c0: #2563d8; --c1: #d9700a; --c2: #16875a; --c3: #c0392f; --c4: #8146c9; --c5: #0a8ba1;
  --c6: #c2408f; --c7: #7b8494;
"""
_DARK = """
  --bg: #12151b; --card: #1b2028; --text: #e4e8ef;
  --muted: #98a2b3; --edge: #2e3541; --code: #151920; --right: #4cc38a; --wrong: #ff8577;
  --c0: #6ea2ff; --c1: #ffa04d; --c2: #4cc38a; --c3: #ff7b72; --c4: #b794f6; --c5: #4fc4d8;
  --c6: #f08cc4; --c7: #9aa4b5;
"""
_WHOLE_PAGE = """
* { box-sizing: border-box; }
body { margin: 0; background: var(--bg); color: var(--text);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
header, main { max-width: 1180px; margin: 0 auto; padding: 0 16px; }
header { padding-top: 24px; }
h1 { margin: 0 0 8px; font-size: 26px; overflow-wrap: anywhere; }
h2 { margin: 32px 0 12px; font-size: 20px; }
h3 { margin: 24px 0 8px; font-size: 17px; }
p { margin: 0 0 10px; }
nav { position: sticky; top: 0; z-index: 1; display: flex; gap: 4px; overflow-x: auto;
  padding: 6px max(12px, calc((100vw - 1156px) / 2)); background: var(--bg);
  border-bottom: 1px solid var(--edge); }
nav a { padding: 4px 10px; border-radius: 6px; color: inherit; text-decoration: none;
  white-space: nowrap; }
nav a:hover { background: var(--card); }
section { scroll-margin-top: 48px; }
"""
_PARTS = """
h4 { margin: 0 0 6px; font-size: 14px; font-weight: 600; }
.muted { color: var(--muted); } .small { font-size: 13px; }
.empty { padding: 14px; border: 1px dashed var(--edge); border-radius: 8px; color: var(--muted); }
.chips { display: flex; flex-wrap: wrap; gap: 6px; }
.chip { padding: 2px 10px; border: 1px solid var(--edge); border-radius: 99px;
  background: var(--card); overflow-wrap: anywhere; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(180px, 1fr)); gap: 10px;
  margin-bottom: 12px; }
.tile, .card, figure, .scroll, section > details { border: 1px solid var(--edge);
  border-radius: 10px; background: var(--card); }
.tile { padding: 10px 14px; }
.big { font-size: 20px; font-weight: 600; font-variant-numeric: tabular-nums; }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(340px, 100%), 1fr));
  gap: 12px; margin-bottom: 12px; }
.plots.wide { grid-template-columns: minmax(0, 560px); }
figure { margin: 0; padding: 10px 12px; min-width: 0; }
figcaption span { margin-left: 8px; }
svg { display: block; width: 100%; height: auto; margin-top: 4px; }
svg text { font-size: 12px; fill: var(--muted); font-variant-numeric: tabular-nums; }
.grid { stroke: var(--edge); } path { fill: none; }
.mark { stroke: var(--text); stroke-width: 1; stroke-dasharray: 3 3; }
.c0 { --c: var(--c0); } .c1 { --c: var(--c1); } .c2 { --c: var(--c2); } .c3 { --c: var(--c3); }
.c4 { --c: var(--c4); } .c5 { --c: var(--c5); } .c6 { --c: var(--c6); } .c7 { --c: var(--c7); }
.line { stroke: var(--c); stroke-width: 2; stroke-linejoin: round; }
.line.dashed { stroke-dasharray: 6 4; }
.faint { stroke: var(--c); opacity: .3; } .band { fill: var(--c); opacity: .16; }
.area { fill: var(--c); opacity: .75; } .dot { fill: var(--c); }
.legend { display: flex; flex-wrap: wrap; gap: 2px 14px; font-size: 13px; overflow-wrap: anywhere; }
.legend i { display: inline-block; width: 16px; margin-right: 5px; vertical-align: middle;
  border-top: 3px solid var(--c); }
.legend b { margin-left: 5px; font-variant-numeric: tabular-nums; }
.legend i.dashed { border-top-style: dashed; }
.scroll { overflow-x: auto; margin-bottom: 12px; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th, td { padding: 6px 12px; text-align: right; white-space: nowrap;
  font-variant-numeric: tabular-nums; border-bottom: 1px solid var(--edge); }
th:first-child { text-align: left; } tbody tr:last-child > * { border-bottom: 0; }
tbody th { font-weight: 600; }
thead th { color: var(--muted); font-weight: 500; }
details { margin-bottom: 10px; } summary { cursor: pointer; padding: 8px 12px; }
section > details > :not(summary) { margin: 0 12px 12px; }
.card { padding: 14px; margin-bottom: 14px; display: grid; gap: 16px; }
.card > * { min-width: 0; }
.group { grid-template-columns: minmax(180px, 1fr) 3fr; }
.traces { grid-template-columns: minmax(180px, 1fr) repeat(2, 1.5fr); }
@media (max-width: 760px) { .group, .traces { grid-template-columns: 100%; } }
.problem img { max-width: 100%; width: 190px; border-radius: 6px; background: #fff; }
.question, .problem b { white-space: pre-wrap; overflow-wrap: anywhere; }
.question { max-height: 300px; overflow-y: auto; }
pre { margin: 0; padding: 10px; max-height: 360px; overflow: auto; border-radius: 6px;
  background: var(--code); white-space: pre-wrap; overflow-wrap: anywhere;
  font: 13px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
.thought { color: var(--muted); }
.verdict { font-weight: 600; white-space: nowrap; }
.traces h4 { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 0 12px; }
.right { color: var(--right); } .wrong { color: var(--wrong); }
.badge { font-weight: 600; } .all-right { color: var(--right); } .all-wrong { color: var(--wrong); }
.completion { margin: 0; border-top: 1px solid var(--edge); }
.completion > summary { display: flex; flex-wrap: wrap; gap: 2px 14px; padding: 6px 0;
  font-variant-numeric: tabular-nums; list-style-position: inside; }
.completion > summary::before { content: "▸"; color: var(--muted); }
.completion[open] > summary::before { content: "▾"; }
.completion > summary .ending { flex: 1 1 200px; overflow: hidden; white-space: nowrap;
  text-overflow: ellipsis; }
.completion > pre { margin-bottom: 10px; }
:focus-visible { outline: 2px solid var(--c0); outline-offset: 1px; }
"""
_CSS = f"""
:root {{ color-scheme: light dark; {_LIGHT} }}
@media (prefers-color-scheme: dark) {{ :root {{ {_DARK} }} }}
{_WHOLE_PAGE}{_PARTS}"""


def css_inside(scope: str, dark: str) -> str:
    """The styles for markup of this module inside someone else's page.

    `scope` is the selector of what holds the markup, `dark` that of the dark page around it.
    """
    return f"{scope} {{ {_LIGHT} {_PARTS} }}\n{dark} {scope} {{ {_DARK} }}\n"
