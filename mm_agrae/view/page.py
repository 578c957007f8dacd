"""HTML without scripts or requests: elements, tables, whole pages, and numbers as text.

Every text goes through `el`, which escapes whatever is not markup made by `el` itself. The page's
content policy forbids scripts and requests as well, so model output is only ever shown as
characters. Styles are in `page.css` (whole pages) and `components.css` (also used by the demo).
"""

import html
import math
from collections.abc import Iterable, Sequence
from importlib.resources import files

from mm_agrae.run.files import clean_text
from mm_agrae.run.records import Interval

SCOPE = "agrae"
"""The CSS class that `components.css` applies within."""


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
    """The beginning and the end of a long text; the end matters, since it holds the answer."""
    full = clean_text(text)
    if len(full) <= limit:
        return full
    begin, end = limit * 2 // 3, limit // 3
    return f"{full[:begin]}\n[… {len(full) - begin - end:,} characters left out …]\n{full[-end:]}"


def page(title: str, header: Html, sections: Sequence[tuple[str, Html | None]]) -> str:
    """A whole document with links to its sections at the top. Sections of None are left out."""
    shown = [(name, body, name.lower().replace(" ", "-")) for name, body in sections if body]
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", http_equiv="Content-Security-Policy", content=policy),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("title", f"{title} · mm-agrae"),
        el("link", rel="icon", href="data:,"),
        el("style", Html(stylesheet("page.css") + stylesheet("components.css"))),
    )
    links = el("nav", *(el("a", name, href=f"#{anchor}") for name, _, anchor in shown))
    main = el("main", *(el("section", el("h2", name), body, id=id_) for name, body, id_ in shown))
    body = el("body", header, links, main, class_=SCOPE)
    return f"<!doctype html>\n{el('html', head, body, lang='en')}\n"


def stylesheet(name: str) -> str:
    """A CSS file of this package."""
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


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
    """A placeholder for content that does not exist."""
    return el("p", text, class_="empty")


def fold(title: str, *body: object) -> Html:
    return el("details", el("summary", title), *body)


def tile(title: str, value: object, *notes: object) -> Html:
    lines = (el("div", line, class_="muted small") for line in notes if line)
    heading = el("div", title, class_="muted")
    return el("div", heading, el("div", value, class_="big"), *lines, class_="tile")


def number(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return "–"
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if unit == 'k' else size):.3g}{unit}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def percent(*values: float) -> str:
    """One share, or several over time: 33.3 → 68.5 %, without a line break before the sign."""
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
