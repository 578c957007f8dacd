"""One HTML page a run: what was learnt, how it went, and what the model wrote.

The page needs no network and no script: pictures are inside, plots are SVG drawn here so that
they follow the reader's light or dark mode. Every text goes through `el`, which escapes whatever
is not markup made by `el` itself, and the page's content policy forbids scripts and requests
besides: what a model wrote is shown as characters.
"""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mm_agrae.errors import RunFolderError
from mm_agrae.records import EvaluationResult, Interval, RunFolder, clean_text, write_atomic

GROUPS_SHOWN = 6
COMPLETIONS_SHOWN = 16
TEXT_LIMIT = 2400  # characters of one completion
PICTURE_BUDGET = 1_000_000  # bytes of all pictures of a page
POINTS = 240  # of a curve, after averaging neighbours

Row = Mapping[str, Any]


def write_report(run_dir: str | Path) -> Path:
    """Write `report.html` into a run folder and return its path.

    Works while the run goes on and with parts missing. Raises RunFolderError if there is no run,
    or the folder cannot be written.
    """
    folder = RunFolder(run_dir)
    config = _parse_config(folder)
    metrics = folder.read_metrics()
    evaluations = folder.read_evaluations()
    summary = folder.read_summary()
    pictures = Pictures(folder)
    sections = [
        ("Results", _results(folder, evaluations, int(_last(metrics, "step") or 0))),
        ("Curves", _curves(metrics)),
        ("Before and after", _traces(folder, evaluations, pictures)),
        ("Last step", _last_groups(folder, pictures)),
        ("Time", _time(metrics, summary)),
        ("Setup", _setup(folder)),
    ]
    name = folder.path.resolve().name
    page = _page(name, _header(name, folder, config, metrics, summary), sections)
    path = folder.path / "report.html"
    write_atomic(path, page)
    return path


def compare_report(run_dirs: Sequence[str | Path], out: str | Path) -> Path:
    """Write one page that holds several runs side by side, and return its path.

    Raises RunFolderError if one of them is not a run, or `out` cannot be written.
    """
    runs = [RunFolder(path) for path in run_dirs]
    configs = [_flatten(_parse_config(run)) for run in runs]
    names = _distinct_names(runs)
    metrics = [run.read_metrics() for run in runs]
    evaluations = [run.read_evaluations() for run in runs]
    sections = [
        ("Results", _compared_results(names, evaluations)),
        ("Curves", _compared_curves(names, metrics)),
        ("What differs in the configs", _config_differences(names, configs)),
    ]
    title = f"{len(runs)} runs compared"
    header = el("header", el("h1", title), el("p", ", ".join(names), class_="muted"))
    write_atomic(Path(out), _page(title, header, sections))
    return Path(out)


# -- markup


class Html(str):
    """Markup made by `el`; any other text is escaped by it."""

    __slots__ = ()


def el(tag: str, *children: object, **attributes: object) -> Html:
    """An element. Children that are not Html are text; an attribute of None is left out."""
    names = ((name.rstrip("_").replace("_", "-"), value) for name, value in attributes.items())
    opening = "".join(f' {name}="{_escape(value)}"' for name, value in names if value is not None)
    if tag in ("img", "meta", "link"):
        return Html(f"<{tag}{opening}>")
    return Html(f"<{tag}{opening}>{join(children)}</{tag}>")


def join(children: Iterable[object]) -> Html:
    return Html(
        "".join(c if isinstance(c, Html) else _escape(c) for c in children if c is not None)
    )


# Control characters would vanish or be refused by HTML: show their symbols (␀, ␛) instead.
_CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"} | {127: 0x2421}


def _escape(value: object) -> str:
    return html.escape(clean_text(value).replace("\r\n", "\n").translate(_CONTROLS))


def _page(title: str, header: Html, sections: Sequence[tuple[str, Html | None]]) -> str:
    shown = [(name, body, name.lower().replace(" ", "-")) for name, body in sections if body]
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    head = el(
        "head",
        el("meta", charset="utf-8"),
        Html(f'<meta http-equiv="Content-Security-Policy" content="{policy}">'),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("title", f"{title} · mm-agrae"),
        el("link", rel="icon", href="data:,"),
        el("style", Html(_CSS)),
    )
    nav = el("nav", *(el("a", name, href=f"#{anchor}") for name, _, anchor in shown))
    body = [el("section", el("h2", name), content, id=anchor) for name, content, anchor in shown]
    page = el("html", head, el("body", header, nav, el("main", *body)), lang="en")
    return f"<!doctype html>\n{page}\n"


def _table(header: Sequence[object], rows: Iterable[Sequence[object]]) -> Html:
    body = (
        el("tr", el("th", first, scope="row"), *(el("td", cell) for cell in rest))
        for first, *rest in rows
    )
    titles = el("tr", *(el("th", title, scope="col") for title in header))
    table = el("table", el("thead", titles), el("tbody", *body))
    return el("div", table, class_="scroll", tabindex="0")


def _empty(text: str) -> Html:
    return el("p", text, class_="empty")


def _tile(title: str, value: object, *notes: object) -> Html:
    lines = (el("div", note, class_="muted small") for note in notes if note)
    return el(
        "div",
        el("div", title, class_="muted"),
        el("div", value, class_="big"),
        *lines,
        class_="tile",
    )


# -- numbers


def _number(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return "–"
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if unit == 'k' else size):.3g}{unit}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def _interval(interval: Interval | None) -> str:
    if interval is None:
        return "–"
    low, high = (f"{100 * bound:.1f}" for bound in (interval.low, interval.high))
    return f"{100 * interval.mean:.1f} ({low} to {high})"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, hours = round(seconds / 60), int(seconds // 3600)
    if not hours:
        return f"{int(seconds // 60)} min {int(seconds % 60)} s"
    return f"{hours} h {minutes - 60 * hours} min"


# -- plots


@dataclass(frozen=True)
class Line:
    """A curve: (x, y) points in order of x, and (x, low, high) of the band around it."""

    label: str
    points: Sequence[tuple[float, float]]
    band: Sequence[tuple[float, float, float]] = ()
    color: int = 0
    dashed: bool = False


WIDTH, HEIGHT = 440.0, 220.0
LEFT, RIGHT, TOP, BOTTOM = 46.0, 10.0, 10.0, 24.0


def plot(
    title: str,
    lines: Sequence[Line],
    *,
    note: str = "",
    x_name: str = "step",
    percent: bool = False,
    log2: bool = False,
    stacked: bool = False,
    zero: bool = False,
    smooth: bool = False,
) -> Html:
    """A figure with one SVG plot. `log2`: x axis; `zero`: y begins at 0; `smooth`: a moving
    average over the faint curve itself; `stacked`: areas on top of each other."""
    lines = [line for line in lines if line.points]
    if stacked:
        lines = _stack(lines)
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points]
    ys += [bound for line in lines for band in line.band for bound in band[1:]]
    low, high = min(ys), max(ys)
    low = min(low, 0.0) if zero or stacked or (low >= 0 and low < 0.4 * high) else low
    if high - low < 1e-12:
        low, high = low - (abs(low) * 0.1 or 0.5), high + (abs(high) * 0.1 or 0.5)
    y_ticks = _ticks(low, high, 5)
    low, high = min(low, y_ticks[0]), max(high, y_ticks[-1])
    left, right = min(xs), max(xs)
    position = math.log2 if log2 else float
    span = (position(right) - position(left)) or 1.0

    def px(x: float) -> float:
        return LEFT + (position(x) - position(left)) / span * (WIDTH - LEFT - RIGHT)

    def py(y: float) -> float:
        return HEIGHT - BOTTOM - (y - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    if log2:
        x_ticks = [2.0**e for e in range(math.ceil(position(left)), int(position(right)) + 1)]
    else:
        x_ticks = [x for x in _ticks(left, right, 6) if left <= x <= right]
    marks: list[Html] = []
    for y in y_ticks:
        text = f"{100 * y:.3g} %" if percent else _number(y)
        marks.append(_path([(LEFT, py(y)), (WIDTH - RIGHT, py(y))], "grid"))
        marks.append(_label(text, LEFT - 6, py(y) + 4, "end"))
    for x in x_ticks:
        anchor = "end" if px(x) > WIDTH - 20 else "middle"
        marks.append(_label(_number(x), px(x), HEIGHT - 8, anchor))
    base = py(low)
    previous = [(x, base) for x in (px(left), px(right))]
    for line in lines:
        points = [(px(x), py(y)) for x, y in line.points]
        css = f"c{line.color % 8}" + (" dashed" if line.dashed else "")
        if stacked:
            marks.append(_path([*points, *reversed(previous)], f"{css} area"))
            previous = points
            continue
        if line.band:
            upper = [(px(x), py(top)) for x, _, top in line.band]
            lower = [(px(x), py(bottom)) for x, bottom, _ in line.band]
            marks.append(_path([*upper, *reversed(lower)], f"{css} band"))
        if smooth and len(points) >= 20:
            marks.append(_path(points, f"{css} faint"))
            points = [(px(x), py(y)) for x, y in _moving_average(line.points)]
        marks.append(_path(points, f"{css} line"))
        if len(points) <= 40:
            for (x, y), (cx, cy) in zip(line.points, points, strict=True):
                shown = _percent(y) if percent else _number(y)
                tip = el("title", f"{line.label}, {x_name} {_number(x)}: {shown}")
                dot = {"cx": f"{cx:.1f}", "cy": f"{cy:.1f}", "r": "2.5", "class_": f"{css} dot"}
                marks.append(el("circle", tip, **dot))
    description = f"{title} by {x_name}: {', '.join(line.label for line in lines)}"
    box = f"0 0 {WIDTH:g} {HEIGHT:g}"
    picture = el("svg", *marks, viewBox=box, role="img", aria_label=description)
    keys = [
        el(
            "span",
            el("i", class_=f"c{line.color % 8}" + (" dashed" if line.dashed else "")),
            line.label,
        )
        for line in lines
    ]
    legend = el("div", *keys, class_="legend") if len(lines) > 1 else None
    caption = el("figcaption", el("b", title), el("span", note, class_="muted small"))
    return el("figure", caption, picture, legend)


def _path(points: Sequence[tuple[float, float]], css: str) -> Html:
    return el("path", d="M" + "L".join(f"{x:.1f},{y:.1f}" for x, y in points), class_=css)


def _label(text: str, x: float, y: float, anchor: str) -> Html:
    return el("text", text, x=f"{x:.1f}", y=f"{y:.1f}", text_anchor=anchor)


def _ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers that enclose the range, about `count` of them."""
    rough = (high - low) / count or 1.0
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(m * size for m in (1, 2, 2.5, 5, 10) if m * size >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def _moving_average(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    reach = max(1, len(points) // 30)
    ys = [y for _, y in points]
    windows = (ys[max(0, i - reach) : i + reach + 1] for i in range(len(ys)))
    return [(x, sum(w) / len(w)) for (x, _), w in zip(points, windows, strict=True)]


def _stack(lines: Sequence[Line]) -> list[Line]:
    xs = sorted({x for line in lines for x, _ in line.points})
    height = dict.fromkeys(xs, 0.0)
    stacked = []
    for line in lines:
        for x, y in line.points:
            height[x] += y
        stacked.append(Line(line.label, [(x, height[x]) for x in xs], color=line.color))
    return stacked


def _series(metrics: Sequence[Row], key: str) -> list[tuple[float, float]]:
    """(step, value) where there is a finite value, thinned by averaging neighbours."""
    points = [
        (float(row["step"]), float(row[key]))
        for row in metrics
        if isinstance(row.get(key), int | float) and isinstance(row.get("step"), int | float)
    ]
    return _thin(points)


def _thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    size = -(-len(points) // POINTS) or 1
    chunks = (points[i : i + size] for i in range(0, len(points), size))
    return [(sum(x for x, _ in c) / len(c), sum(y for _, y in c) / len(c)) for c in chunks]


# -- the parts of a run's page


def _header(
    name: str, folder: RunFolder, config: Row, metrics: Sequence[Row], summary: Row
) -> Html:
    advantage = _section(config, "advantage")
    settings = [f"{k}={v}" for k, v in advantage.items() if k != "rule" and v is not None]
    rollout = _section(config, "rollout")
    facts = {
        "model": _section(config, "model").get("path"),
        "rule": " ".join([str(advantage.get("rule", "")), *settings]).strip(),
        "loss": _section(config, "update").get("loss"),
        "batch": f"{rollout.get('prompts_per_step')} prompts × "
        f"{rollout.get('completions_per_prompt')} completions"
        if rollout
        else None,
        "date": str(folder.read_versions().get("created", "")).replace("T", " ").rstrip("Z"),
    }
    chips = (
        el("span", el("span", f"{key} ", class_="muted"), value, class_="chip")
        for key, value in facts.items()
        if value
    )
    planned = _section(config, "train").get("steps")
    done = int(_last(metrics, "step") or 0)
    if summary:
        state = f"Finished after {done:,} steps."
    elif done:
        state = f"No summary yet: {done:,}{f' of {planned:,}' if planned else ''} steps logged."
    else:
        state = "Nothing logged yet."
    return el("header", el("h1", name), el("p", *chips, class_="chips"), el("p", state))


def _results(folder: RunFolder, evaluations: Sequence[EvaluationResult], last_step: int) -> Html:
    if not evaluations:
        return _empty("Not evaluated yet.")
    parts: list[Html] = []
    labels = list(dict.fromkeys(result.label for result in evaluations))
    for label in labels:
        results = [result for result in evaluations if result.label == label]
        if len(labels) > 1:
            parts.append(el("h3", label))
        before, after = _ends(results)
        parts.append(el("div", *_key_numbers(folder, before, after), class_="tiles"))
        count = f"{after.problems:,} problems of {label}, {after.samples} samples each."
        parts.append(
            el("p", f"{count} Ranges are 95 % bootstrap intervals over problems.", class_="muted")
        )
        ends = [(result.name, result) for result in (before, after) if result is not None]
        styles = {name: {"color": 7 if name == "before" else 0} for name, _ in ends}
        plots = [_pass_at_k_plot(ends, styles)]
        if len(results) > 2:
            plots.append(_progress_plot(results, last_step))
        parts.append(el("div", *plots, class_="plots"))
        parts.append(_pass_at_k_table([(r.name, r) for r in results]))
        parts.extend(_group_tables(before, after))
    return join(parts)


def _ends(
    results: Sequence[EvaluationResult],
) -> tuple[EvaluationResult | None, EvaluationResult]:
    """The evaluation before training, if any, and the latest one."""
    before = results[0] if results[0].name == "before" and len(results) > 1 else None
    return before, results[-1]


def _key_numbers(
    folder: RunFolder, before: EvaluationResult | None, after: EvaluationResult
) -> list[Html]:
    def change(read: Any, show: Any) -> str:
        values = [read(result) for result in (before, after) if result is not None]
        return " → ".join(show(value) for value in values if value is not None)

    tiles = []
    for k in _first_and_last(after):

        def read(result: EvaluationResult, k: int = k) -> Interval | None:
            return result.pass_at_k.get(k)

        gain = _gain(folder, before, after, k)
        title = f"pass@{k}" if before is not None else f"pass@{k}, {after.name}"
        ranges = change(read, lambda i: f"{100 * i.low:.1f} to {100 * i.high:.1f}")
        tiles.append(_tile(title, change(read, lambda i: _percent(i.mean)), ranges, gain))
    if after.greedy is not None:
        tiles.append(
            _tile(
                "greedy accuracy",
                change(lambda r: r.greedy and r.greedy.mean, _percent),
                change(lambda r: r.greedy, lambda i: f"{100 * i.low:.1f} to {100 * i.high:.1f}"),
            )
        )
    tiles.append(
        _tile(
            "problems never solved",
            change(lambda r: r.unsolved, _percent),
            f"none of {after.samples} samples right",
        )
    )
    tiles.append(
        _tile(
            "tokens a completion",
            change(lambda r: r.mean_tokens, _number),
            "cut off: " + change(lambda r: r.truncated, _percent),
        )
    )
    if after.entropy is not None:
        tiles.append(_tile("entropy", change(lambda r: r.entropy, _number), "nats a token"))
    return tiles


def _gain(
    folder: RunFolder, before: EvaluationResult | None, after: EvaluationResult, k: int
) -> str:
    """The paired difference, where both evaluations sampled the same problems equally often."""
    from mm_agrae.evaluate import paired_difference

    if before is None:
        return ""
    old, new = _verdicts(folder, before), _verdicts(folder, after)
    shared = [key for key in old if key in new]
    sizes = [{len(verdicts[key]) for key in shared} for verdicts in (old, new)]
    if not shared or any(len(size) != 1 or min(size) < k for size in sizes):
        return ""
    import numpy as np

    a, b = (np.array([verdicts[key] for key in shared]) for verdicts in (old, new))
    found = paired_difference(a, b, k)
    return f"{100 * found.mean:+.1f} points ({100 * found.low:+.1f} to {100 * found.high:+.1f})"


def _verdicts(folder: RunFolder, result: EvaluationResult) -> dict[str, list[bool]]:
    """Right or wrong of every sample by problem; the greedy ones only if there are no others."""
    sampled: dict[str, list[bool]] = {}
    greedy: dict[str, list[bool]] = {}
    for row in _samples(folder, result):
        kind = greedy if row.get("sample") == -1 else sampled
        kind.setdefault(str(row.get("example_id")), []).append(bool(row.get("success")))
    return sampled or greedy


def _samples(folder: RunFolder, result: EvaluationResult) -> Iterable[Row]:
    try:
        yield from folder.read_samples(result)
    except RunFolderError:  # missing or damaged: the report shows what there is
        return


def _pass_at_k_plot(
    results: Sequence[tuple[str, EvaluationResult]], styles: Mapping[str, dict[str, Any]]
) -> Html:
    lines = []
    for name, result in results:
        table = sorted(result.pass_at_k.items())
        band = [(k, interval.low, interval.high) for k, interval in table]
        means = [(k, interval.mean) for k, interval in table]
        lines.append(Line(name, means, band, **styles[name]))
    note = "the chance that one of k samples is right"
    return plot("pass@k", lines, note=note, x_name="k", percent=True, log2=True)


def _progress_plot(results: Sequence[EvaluationResult], last_step: int) -> Html:
    """pass@1 and pass@n of every evaluation, by the step it was made at."""
    steps = {"before": 0, "after": last_step}
    for result in results:
        number = result.name.removeprefix("step_")
        if number.isdigit():
            steps[result.name] = int(number)
    dated = sorted((steps[r.name], r.pass_at_k) for r in results if r.name in steps)
    lines = []
    for color, k in enumerate(_first_and_last(results[-1])):
        found = [(step, table[k]) for step, table in dated if k in table]
        band = [(step, interval.low, interval.high) for step, interval in found]
        means = [(step, interval.mean) for step, interval in found]
        lines.append(Line(f"pass@{k}", means, band, color))
    return plot("pass@k during training", lines, percent=True)


def _first_and_last(result: EvaluationResult) -> list[int]:
    return sorted({min(result.pass_at_k), max(result.pass_at_k)})


def _pass_at_k_table(results: Sequence[tuple[str, EvaluationResult]]) -> Html:
    ks = sorted({k for _, result in results for k in result.pass_at_k})
    header = ["%", *(f"pass@{k}" for k in ks), "greedy"]
    rows = [
        [name, *(_interval(result.pass_at_k.get(k)) for k in ks), _interval(result.greedy)]
        for name, result in results
    ]
    return _table(header, rows)


def _group_tables(before: EvaluationResult | None, after: EvaluationResult) -> list[Html]:
    """pass@1 and pass@n by the kinds of problems."""
    tables = []
    results = [result for result in (before, after) if result is not None]
    ks = _first_and_last(after)
    for key, groups in after.groups.items():
        header = [key, "problems", *(f"pass@{k} {r.name}" for k in ks for r in results)]
        rows = []
        for value, group in groups.items():
            cells = [
                r.groups.get(key, {}).get(value, {}).get("pass_at_k", {}).get(k)
                for k in ks
                for r in results
            ]
            rows.append([value, group["problems"], *map(_interval, cells)])
        table = _table(header, rows)
        tables.append(el("details", el("summary", f"By {key} ({len(groups)})"), table))
    return tables


# What the curves show: title, note, {metric: label}, options of `plot`.
_CURVES: list[tuple[str, str, dict[str, str], dict[str, bool]]] = [
    ("Success", "share of right completions", {"success/mean": "success"},
     {"percent": True, "smooth": True}),
    ("ω", "mean reward of the whole step; low: easy groups weigh more, high: hard ones",
     {"advantage/omega": "ω"}, {"smooth": True}),
    ("Groups", "by what their completions got",
     {"groups/all_wrong": "all wrong", "groups/mixed": "mixed", "groups/all_right": "all right"},
     {"stacked": True}),
    ("Entropy", "nats a token", {"policy/entropy": "entropy"}, {"smooth": True, "zero": True}),
    ("Length", "tokens a completion",
     {"completions/mean_tokens": "mean", "completions/max_tokens": "longest"}, {"smooth": True}),
    ("Truncated", "completions cut off by the token limit",
     {"completions/truncated": "truncated"}, {"smooth": True, "percent": True, "zero": True}),
    ("Right completions", "in the step's batch", {"completions/right": "right"},
     {"smooth": True}),
    ("Mean |A|", "how strongly the step pushes", {"advantage/mean_abs": "|A|"},
     {"smooth": True, "zero": True}),
    ("Skipped groups", "without signal, left out of the update", {"groups/skipped": "skipped"},
     {"smooth": True, "zero": True}),
    ("Gradient norm", "before clipping", {"update/grad_norm": "norm"},
     {"smooth": True, "zero": True}),
    ("Loss", "", {"update/loss": "loss"}, {"smooth": True}),
    ("Learning rate", "", {"update/learning_rate": "rate"}, {"zero": True}),
    ("Clipped tokens", "share whose ratio left the trust region",
     {"policy/clip_low": "below", "policy/clip_high": "above"},
     {"smooth": True, "percent": True, "zero": True}),
    ("Largest ratio", "new to old policy, of one token", {"policy/ratio_max": "ratio"}, {}),
    ("KL", "nats a token", {"policy/approx_kl": "from the sampling policy",
     "policy/kl_reference": "from the starting policy"}, {"smooth": True, "zero": True}),
    ("Reward errors", "completions a reward function failed on", {"reward/errors": "errors"},
     {"zero": True}),
    ("Peak memory", "MB", {"memory/peak_mb": "resident"}, {"zero": True}),
]  # fmt: skip
_STAGES = ("rollout", "reward", "advantage", "update", "log", "evaluate", "checkpoint")


def _curves(metrics: Sequence[Row]) -> Html:
    if not metrics:
        return _empty("No step has been logged yet.")
    keys = {key for row in metrics for key in row}
    parts = sorted(
        key for key in keys
        if key.startswith("reward/") and key not in ("reward/mean", "reward/std", "reward/errors")
    )  # fmt: skip
    reward = {"reward/mean": "reward"} | {key: key.removeprefix("reward/") for key in parts}
    curves = [("Reward", "weighted sum and its parts, means over the step", reward,
               {"smooth": True}), *_CURVES]  # fmt: skip
    figures, constant = [], []
    for title, note, names, options in curves:
        lines = [
            Line(label, _series(metrics, key), color=color)
            for color, (key, label) in enumerate(names.items())
        ]
        lines = [line for line in lines if line.points]
        values = {y for line in lines for _, y in line.points}
        if len(metrics) > 1 and len(values) == 1:
            constant.append(f"{title} {_number(values.pop())}")
        elif lines:
            if options.get("stacked"):
                options = options | {"percent": max(values) <= 1}
            figures.append(plot(title, lines, note=note, **options))
    figures += _speed_curves(metrics)
    same = el("p", f"The same at every step: {'; '.join(constant)}.", class_="muted")
    return join([el("div", *figures, class_="plots"), same if constant else None])


def _speed_curves(metrics: Sequence[Row]) -> list[Html]:
    # Evaluations and checkpoints come now and then and would dwarf the rest.
    stages = [stage for stage in _STAGES if stage not in ("evaluate", "checkpoint")]
    lines = [
        Line(stage, _series(metrics, f"seconds/{stage}"), color=color)
        for color, stage in enumerate(stages)
    ]
    rates = []
    for color, stage in enumerate(("rollout", "total")):
        rows = [
            {"step": row["step"], "rate": row["tokens/completion"] / row[f"seconds/{stage}"]}
            for row in metrics
            if row.get("tokens/completion") and row.get(f"seconds/{stage}") and row.get("step")
        ]
        rates.append(Line("while sampling" if color == 0 else "whole step",
                          _series(rows, "rate"), color=color))  # fmt: skip
    figures = []
    if any(line.points for line in lines):
        note = "without evaluation and checkpoints"
        figures.append(plot("Seconds a step", lines, note=note, stacked=True))
    if any(line.points for line in rates):
        note = "completion tokens"
        figures.append(plot("Tokens a second", rates, note=note, smooth=True, zero=True))
    return figures


def _traces(
    folder: RunFolder, evaluations: Sequence[EvaluationResult], pictures: Pictures
) -> Html | None:
    """Problems that training solved, one it lost and one it left, with what was written."""
    if not evaluations:
        return None
    label = evaluations[-1].label
    before, after = _ends([result for result in evaluations if result.label == label])
    if before is None:
        return None
    old, new = _verdicts(folder, before), _verdicts(folder, after)
    shared = [key for key in old if key in new]
    rate = {key: (_mean(old[key]), _mean(new[key])) for key in shared}
    by_gain = sorted(shared, key=lambda key: (rate[key][0], -rate[key][1]))
    gained = [key for key in by_gain if rate[key][1] > rate[key][0]][:3]
    lost = sorted(shared, key=lambda key: rate[key][1] - rate[key][0])[:1]
    lost = [key for key in lost if rate[key][1] < rate[key][0]]
    left = [key for key in shared if rate[key][1] == 0 and key not in lost][:1]
    chosen = {key: (False, True) for key in gained} | {key: (True, False) for key in lost}
    chosen |= {key: (False, False) for key in left}
    if not chosen:
        return _empty("The samples of the evaluations were not kept.")
    shown = []
    texts = [_representatives(folder, result, set(chosen)) for result in (before, after)]
    for key, wanted in chosen.items():
        rows = [found[key].get(want) or next(iter(found[key].values()))
                for found, want in zip(texts, wanted, strict=True)]  # fmt: skip
        counts = [f"{sum(v[key])} of {len(v[key])}" for v in (old, new)]
        columns = [
            el("div", el("h4", f"{name}: {count} right ", _verdict(bool(row.get("success")))),
               _completion(row.get("completion"), 2 * TEXT_LIMIT), class_="trace")
            for name, count, row in zip((before.name, after.name), counts, rows, strict=True)
        ]  # fmt: skip
        shown.append(el("article", _problem(rows[0], pictures), *columns, class_="card traces"))
    note = "The first problems that training solved, one it lost and one it left, if there are any."
    return join([el("p", note, class_="muted"), *shown])


def _mean(values: Sequence[bool]) -> float:
    return sum(values) / len(values)


def _representatives(
    folder: RunFolder, result: EvaluationResult, wanted: set[str]
) -> dict[str, dict[bool, Row]]:
    """For each wanted problem its first right and its first wrong sample."""
    found: dict[str, dict[bool, Row]] = {key: {} for key in wanted}
    for row in _samples(folder, result):
        key = str(row.get("example_id"))
        if key in wanted:
            found[key].setdefault(bool(row.get("success")), row)
    return found


def _last_groups(folder: RunFolder, pictures: Pictures) -> Html:
    steps = folder.rollout_steps()
    if not steps:
        return _empty("No rollouts were kept.")
    try:
        rows = folder.read_rollouts(steps[-1])
    except RunFolderError as error:
        return _empty(str(error))
    groups: dict[tuple[int, int], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["draw"], row["prompt_index"]), []).append(row)
    kinds: dict[str, list[list[Row]]] = {"mixed": [], "all wrong": [], "all right": []}
    for group in groups.values():
        right = sum(row["success"] for row in group)
        kind = "all wrong" if not right else "all right" if right == len(group) else "mixed"
        kinds[kind].append(group)
    # Mixed groups teach; one of each other kind shows what they look like.
    one_each = [(kind, group) for kind in ("all wrong", "all right") for group in kinds[kind][:1]]
    mixed = [("mixed", group) for group in kinds["mixed"]][: GROUPS_SHOWN - len(one_each)]
    counts = ", ".join(f"{len(found)} {kind}" for kind, found in kinds.items())
    note = (
        f"Step {steps[-1]:,}: {len(groups):,} groups ({counts}), {len(mixed) + len(one_each)} "
        "shown. A: the advantage before rescaling → after the sample level → final."
    )
    cards = [_group_card(kind, group, pictures) for kind, group in mixed + one_each]
    return join([el("p", note, class_="muted"), *cards])


def _group_card(kind: str, group: Sequence[Row], pictures: Pictures) -> Html:
    right = sum(row["success"] for row in group)
    badge = el("p", f"{right} of {len(group)} right", class_=f"badge {kind.replace(' ', '-')}")
    completions = []
    for row in group[:COMPLETIONS_SHOWN]:
        names = ("advantage_before", "advantage_sample_level", "advantage")
        advantages = " → ".join("–" if row[name] is None else f"{row[name]:+.2f}" for name in names)
        text = clean_text(row["completion"])
        ending = text[-120:] if len(text) > 120 else text
        facts = [
            _verdict(row["success"]),
            el("span", f"reward {_number(row['reward'])}"),
            el("span", f"A {advantages}", class_="advantages"),
            el("span", f"{row['tokens']} tokens", class_="muted"),
            el("span", ending.replace("\n", " "), class_="ending muted", dir="auto"),
        ]
        details = [f"{part} {_number(value)}" for part, value in row["parts"].items()]
        details.append(f"finish: {row['finish_reason']}")
        if row["entropy"] is not None:
            details.append(f"entropy {_number(row['entropy'])} nats")
        if row["error"]:
            details.append(f"error: {row['error'][:300]}")
        body = [
            el("p", " · ".join(details), class_="muted small"),
            _completion(row["completion"], TEXT_LIMIT),
        ]
        completions.append(el("details", el("summary", *facts), *body, class_="completion"))
    hidden = len(group) - len(completions)
    more = el("p", f"and {hidden} more", class_="muted small") if hidden > 0 else None
    body = el("div", badge, *completions, more)
    return el("article", _problem(group[0], pictures), body, class_="card group")


def _problem(row: Row, pictures: Pictures) -> Html:
    question = el("p", _shorten(row.get("question"), TEXT_LIMIT), class_="question", dir="auto")
    gold = el("p", el("span", "answer ", class_="muted"),
              el("b", _shorten(row.get("answer"), 300)), dir="auto")  # fmt: skip
    shown = [pictures.show(path) for path in list(row.get("images") or [])[:4]]
    return el("div", *shown, question, gold, class_="problem")


def _verdict(success: bool) -> Html:
    word = "right" if success else "wrong"
    return el("span", "✓ right" if success else "✗ wrong", class_=f"verdict {word}")


def _completion(text: object, limit: int) -> Html:
    """The reasoning set apart from the answer after it."""
    thought, mark, answer = _shorten(text, limit).partition("</think>")
    if not mark:
        return el("pre", thought or "(empty)", dir="auto", tabindex="0")
    thinking = el("span", thought + mark, class_="thought")
    return el("pre", thinking, answer, dir="auto", tabindex="0")


def _shorten(text: object, limit: int) -> str:
    """Begin and end of a long text: answers stand at the end."""
    full = clean_text(text)
    if len(full) <= limit:
        return full
    begin, end = limit * 2 // 3, limit // 3
    return f"{full[:begin]}\n[… {len(full) - begin - end:,} characters left out …]\n{full[-end:]}"


@dataclass
class Pictures:
    """The run's pictures as data URIs, small ones as they are, large ones made smaller."""

    folder: RunFolder
    spent: int = 0
    known: dict[str, Html] = field(default_factory=dict)

    def show(self, relative: object) -> Html:
        name = str(relative)
        if name not in self.known:
            self.known[name] = self._load(name)
        return self.known[name]

    def _load(self, name: str) -> Html:
        path = self.folder.image_path(name)
        if path is None:
            return _empty("picture missing")
        try:
            kind, data = _small_picture(path)
        except Exception:  # Pillow raises many kinds for a damaged file
            return _empty("picture damaged")
        if self.spent + len(data) > PICTURE_BUDGET:
            return _empty("picture left out, to keep the page small")
        self.spent += len(data)
        source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
        return el("img", src=source, alt="picture of the problem")


def _small_picture(path: Path) -> tuple[str, bytes]:
    from PIL import Image

    data = path.read_bytes()
    with Image.open(path) as image:
        if len(data) <= 40_000 and max(image.size) <= 1024:
            image.load()  # raises if it is damaged
            return "png", data
        image.thumbnail((512, 512))
        flat = Image.new("RGB", image.size, "white")
        rgba = image.convert("RGBA")
        flat.paste(rgba, mask=rgba)
        buffer = io.BytesIO()
        flat.save(buffer, "JPEG", quality=80)
        return "jpeg", buffer.getvalue()


def _time(metrics: Sequence[Row], summary: Row) -> Html | None:
    totals = {
        stage: sum(row.get(f"seconds/{stage}") or 0.0 for row in metrics) for stage in _STAGES
    }
    written = summary.get("seconds")
    if isinstance(written, Mapping):
        found = {str(k).removeprefix("seconds/"): v for k, v in written.items()}
        totals |= {k: v for k, v in found.items() if isinstance(v, int | float)}
    whole = totals.pop("total", None) or sum(totals.values())
    if not whole:
        return None
    rest = whole - sum(totals.values())
    rows = [[stage, _duration(s), _percent(s / whole)] for stage, s in totals.items() if s]
    if rest > 0.005 * whole:
        rows.append(["everything else", _duration(rest), _percent(rest / whole)])
    sampled = sum(row.get("tokens/completion") or 0 for row in metrics)
    memory = summary.get("peak_memory_mb") or _last(metrics, "memory/peak_mb")
    tiles = [_tile("time", _duration(whole)), _tile("tokens sampled in training", _number(sampled))]
    if isinstance(memory, int | float):
        tiles.append(_tile("peak memory", f"{memory:,.0f} MB"))
    return join([el("div", *tiles, class_="tiles"), _table(["stage", "time", "share"], rows)])


def _setup(folder: RunFolder) -> Html:
    versions = [[name, _shorten(value, 300)] for name, value in folder.read_versions().items()]
    config = el("pre", _shorten(folder.read_config(), 40_000), tabindex="0")
    return join(
        [
            el("details", el("summary", "Config, as resolved"), config),
            el("details", el("summary", "Versions"), _table(["package", "version"], versions)),
        ]
    )


def _parse_config(folder: RunFolder) -> dict[str, Any]:
    try:
        values = yaml.safe_load(folder.read_config())
    except yaml.YAMLError:  # shown as text all the same
        return {}
    return values if isinstance(values, dict) else {}


def _section(config: Row, name: str) -> dict[str, Any]:
    section = config.get(name)
    return section if isinstance(section, dict) else {}


def _last(metrics: Sequence[Row], key: str) -> float | None:
    return next((row[key] for row in reversed(metrics) if row.get(key) is not None), None)


# -- several runs side by side


def _distinct_names(runs: Sequence[RunFolder]) -> list[str]:
    """Folder names, with as many parents as it takes to tell them apart."""
    parts = [run.path.resolve().parts for run in runs]
    for depth in range(1, max(map(len, parts), default=0) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{'/'.join(part[-1:])} ({i})" for i, part in enumerate(parts, 1)]


def _compared_results(
    names: Sequence[str], evaluations: Sequence[Sequence[EvaluationResult]]
) -> Html:
    labels = list(dict.fromkeys(result.label for found in evaluations for result in found))
    if not labels:
        return _empty("None of these runs has been evaluated.")
    parts = []
    for label in labels:
        rows: list[tuple[str, EvaluationResult]] = []
        lines: dict[str, dict[str, Any]] = {}
        starts: list[dict[int, Interval]] = []
        for color, (name, found) in enumerate(zip(names, evaluations, strict=True)):
            results = [result for result in found if result.label == label]
            if not results:
                continue
            before, after = _ends(results)
            # Runs from one checkpoint share their start: it is drawn once.
            if before is not None and before.pass_at_k not in starts:
                starts.append(before.pass_at_k)
                start = "before" if len(starts) == 1 else f"{name}, before"
                rows.append((start, before))
                lines[start] = {"color": 7 if len(starts) == 1 else color, "dashed": True}
            title = name if after.name == "after" else f"{name}, {after.name}"
            rows.append((title, after))
            lines[title] = {"color": color % 7}
        parts.append(el("h3", label))
        parts.append(el("div", _pass_at_k_plot(rows, lines), class_="plots wide"))
        parts.append(_pass_at_k_table(rows))
    return join(parts)


def _compared_curves(names: Sequence[str], metrics: Sequence[Sequence[Row]]) -> Html:
    shown = {"reward/mean": "Reward", "groups/all_wrong": "Groups all wrong",
             "groups/all_right": "Groups all right"}  # fmt: skip
    notes = {key: note for _, note, names_, _ in _CURVES for key in names_ if len(names_) == 1}
    for title, _, keys, _ in _CURVES:
        shown |= {key: title for key in list(keys)[:1] if len(keys) == 1 or title == "Length"}
    figures = []
    for key, title in shown.items():
        lines = [
            Line(name, _series(rows, key), color=color % 7)
            for color, (name, rows) in enumerate(zip(names, metrics, strict=True))
        ]
        values = {y for line in lines for _, y in line.points}
        if len(values) > 1:
            figures.append(plot(title, lines, note=notes.get(key, ""), smooth=True))
    if not figures:
        return _empty("None of these runs has logged a step.")
    return el("div", *figures, class_="plots")


def _config_differences(names: Sequence[str], configs: Sequence[Row]) -> Html:
    keys = [key for config in configs for key in config if key != "run_dir"]
    rows = []
    for key in dict.fromkeys(keys):
        values = [_shorten(config.get(key, "–"), 200) for config in configs]
        if len(set(values)) > 1:
            rows.append([key, *values])
    return _table(["setting", *names], rows) if rows else _empty("Nothing but the folder.")


def _flatten(values: Row, prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        flat |= _flatten(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return flat


_CSS = """
:root { color-scheme: light dark; --bg: #f6f7f9; --card: #fff; --text: #1d2430; --muted: #667085;
  --edge: #dde1e8; --code: #f3f4f7; --right: #16794a; --wrong: #b42318;
  --c0: #2563d8; --c1: #d9700a; --c2: #16875a; --c3: #c0392f; --c4: #8146c9; --c5: #0a8ba1;
  --c6: #c2408f; --c7: #7b8494; }
@media (prefers-color-scheme: dark) { :root { --bg: #12151b; --card: #1b2028; --text: #e4e8ef;
  --muted: #98a2b3; --edge: #2e3541; --code: #151920; --right: #4cc38a; --wrong: #ff8577;
  --c0: #6ea2ff; --c1: #ffa04d; --c2: #4cc38a; --c3: #ff7b72; --c4: #b794f6; --c5: #4fc4d8;
  --c6: #f08cc4; --c7: #9aa4b5; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--bg); color: var(--text);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
header, main { max-width: 1180px; margin: 0 auto; padding: 0 16px; }
header { padding-top: 24px; }
h1 { margin: 0 0 8px; font-size: 26px; overflow-wrap: anywhere; }
h2 { margin: 32px 0 12px; font-size: 20px; }
h3 { margin: 24px 0 8px; font-size: 17px; }
h4 { margin: 0 0 6px; font-size: 14px; }
p { margin: 0 0 10px; }
nav { position: sticky; top: 0; z-index: 1; display: flex; gap: 4px; overflow-x: auto;
  padding: 6px max(12px, calc((100vw - 1156px) / 2)); background: var(--bg);
  border-bottom: 1px solid var(--edge); }
nav a { padding: 4px 10px; border-radius: 6px; color: inherit; text-decoration: none;
  white-space: nowrap; }
nav a:hover { background: var(--card); }
section { scroll-margin-top: 48px; }
.muted { color: var(--muted); } .small { font-size: 13px; }
.empty { padding: 14px; border: 1px dashed var(--edge); border-radius: 8px; color: var(--muted); }
.chips { display: flex; flex-wrap: wrap; gap: 6px; }
.chip { padding: 2px 10px; border: 1px solid var(--edge); border-radius: 99px;
  background: var(--card); overflow-wrap: anywhere; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(170px, 1fr)); gap: 10px;
  margin-bottom: 12px; }
.tile, .card, figure, .scroll, section > details { border: 1px solid var(--edge);
  border-radius: 10px; background: var(--card); }
.tile { padding: 10px 14px; }
.big { font-size: 21px; font-weight: 600; font-variant-numeric: tabular-nums; }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(340px, 100%), 1fr));
  gap: 12px; margin-bottom: 12px; }
.plots.wide { grid-template-columns: minmax(0, 760px); }
figure { margin: 0; padding: 10px 12px; min-width: 0; }
figcaption span { margin-left: 8px; }
svg { display: block; width: 100%; height: auto; margin-top: 4px; }
svg text { font-size: 12px; fill: var(--muted); font-variant-numeric: tabular-nums; }
.grid { stroke: var(--edge); } path { fill: none; }
.c0 { --c: var(--c0); } .c1 { --c: var(--c1); } .c2 { --c: var(--c2); } .c3 { --c: var(--c3); }
.c4 { --c: var(--c4); } .c5 { --c: var(--c5); } .c6 { --c: var(--c6); } .c7 { --c: var(--c7); }
.line { stroke: var(--c); stroke-width: 2; stroke-linejoin: round; }
.line.dashed { stroke-dasharray: 6 4; }
.faint { stroke: var(--c); opacity: .3; } .band { fill: var(--c); opacity: .16; }
.area { fill: var(--c); opacity: .75; } .dot { fill: var(--c); }
.legend { display: flex; flex-wrap: wrap; gap: 2px 14px; font-size: 13px; overflow-wrap: anywhere; }
.legend i { display: inline-block; width: 16px; margin-right: 5px; vertical-align: middle;
  border-top: 3px solid var(--c); }
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
.problem img { max-width: 100%; width: 240px; border-radius: 6px; background: #fff; }
.question, .problem b { white-space: pre-wrap; overflow-wrap: anywhere; }
.question { max-height: 300px; overflow-y: auto; }
pre { margin: 0; padding: 10px; max-height: 360px; overflow: auto; border-radius: 6px;
  background: var(--code); white-space: pre-wrap; overflow-wrap: anywhere;
  font: 13px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
.thought { color: var(--muted); }
.verdict { font-weight: 600; white-space: nowrap; } h4 .verdict { float: right; }
.right { color: var(--right); } .wrong { color: var(--wrong); }
.badge { font-weight: 600; } .all-right { color: var(--right); } .all-wrong { color: var(--wrong); }
.completion { margin: 0; border-top: 1px solid var(--edge); }
.completion > summary { display: flex; flex-wrap: wrap; gap: 2px 14px; padding: 6px 0;
  font-variant-numeric: tabular-nums; list-style-position: inside; }
.completion > summary .ending { flex: 1 1 160px; overflow: hidden; white-space: nowrap;
  text-overflow: ellipsis; direction: ltr; }
.completion > pre { margin-bottom: 10px; }
:focus-visible { outline: 2px solid var(--c0); outline-offset: 1px; }
"""
