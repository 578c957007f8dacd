"""The pages of a study, made from its records alone: index.html with figures, and results.md for all studies."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mm_agrae.evaluation import study_statistics as statistics
from mm_agrae.evaluation.study import START
from mm_agrae.evaluation.study_statistics import Difference, Record, StudyData
from mm_agrae.run.files import write_atomic
from mm_agrae.view.page import Html, duration, el, empty, fold, join, note, number, page, stylesheet, table
from mm_agrae.view.plots import Line, plot, thin

SHORT = "A difference counts as one (more, less) if the p-value adjusted for all main differences of the study is below"


class Part(NamedTuple):
    """A table of a study with what there is to say of it."""

    title: str
    text: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


def write_study(folder: Path) -> Path:
    """Write index.html and the figures into a study's folder. Raises RunFolderError for records that are damaged."""
    data = statistics.read_study(folder)
    drawn = figures(data) if data.arms else {}
    for name, figure in drawn.items():
        write_atomic(folder / f"{name}.svg", standalone(figure))
    head = el("header", el("h1", data.about["title"]), el("p", data.about["question"]), note(_facts(data)))
    sections: list[tuple[str, Html | None]] = [("Figures", el("div", *drawn.values(), class_="plots") if drawn else None)]
    sections += [(part.title, join([note(part.text), table(part.header, part.rows)])) for part in parts(data)]
    sections.append(("Each run", fold("Every run", table(*each_run(data))) if data.arms else empty("None is recorded yet.")))
    sections.append(("Setup", fold("The study", el("pre", *(f"{name}: {value}\n" for name, value in data.about.items())))))
    write_atomic(folder / "index.html", page(data.about["name"], head, sections))
    return folder / "index.html"


def write_results(studies: Path, path: Path) -> Path:
    """Write one Markdown page on every study in the folder `studies`."""
    lines = [
        "# Results",
        "Written by `mm-agrae study` from the records in the folders of the studies, not by hand. What was to be run and "
        "what counts as a difference was fixed before, in the [protocol](protocol.md)."
        if path.with_name("protocol.md").exists()
        else "Written by `mm-agrae study` from the records in the folders of the studies, not by hand.",
    ]
    for folder in sorted(file.parent for file in studies.glob("*/study.json")):
        data, where = statistics.read_study(folder), f"{studies.name}/{folder.name}"
        lines += [f"## {data.about['title']}", data.about["question"], _facts(data)]
        for part in parts(data):
            lines += [f"### {part.title} ({data.about['name']})", part.text, markdown(part.header, part.rows)]
        if data.arms:
            lines += [f"![{name}]({where}/{name}.svg)" for name in figures(data)]
            lines.append(f"[The page with figures and each run]({where}/index.html)")
    write_atomic(path, "\n\n".join(line for line in lines if line) + "\n")
    return path


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *rows))


def line_of(record: Record) -> str:
    """A run in one line, for the terminal."""
    told = []
    for label, found in record["evaluations"].items():
        ks = sorted({1, found["samples"]})
        told.append(f"{label} " + ", ".join(f"pass@{k} {100 * _mean(record, label, k):.1f} %" for k in ks))
    return f"{'; '.join(told)}; {duration(record['seconds'])}"


def _mean(record: Record, label: str, k: int | str) -> float:
    return float(statistics.values_P(record, label, k).mean())


def _facts(data: StudyData) -> str:
    records = [record for runs in data.runs.values() for record in runs.values()]
    missing = data.missing()
    told = [f"Config `{' '.join([data.about['config'], *data.about['settings']])}`; {len(records)} runs"]
    for name in ("mm_agrae", "torch", "transformers"):
        found = sorted({record["versions"].get(name, "?") for record in records})
        told.append(f"{name} {' and '.join(found)}") if found else None
    if len(data.codes) > 1:
        told.append(f"made by {len(data.codes)} versions of the code")
    if missing:
        shown = ", ".join(missing[:6]) + (" …" if len(missing) > 6 else "")
        told.append(f"not run yet: {len(missing)} ({shown})")
    if data.other:
        told.append(f"{data.other} records of other settings left out")
    return "; ".join(told) + "."


# ------------------------------------------------------------------------------- tables


def parts(data: StudyData) -> list[Part]:
    """Every table of a study for which there are records."""
    if not data.arms:
        return []
    found, differences = [], statistics.differences(data)
    for label in data.labels:
        found.append(means(data, label))
        if any(key[1] == label for key in differences):
            found.append(differences_of(data, label, differences))
        if families := _families(data, label):
            found.append(families)
        if never := _never_sampled(data, label):
            found.append(never)
    return [*found, training(data)]


def means(data: StudyData, label: str) -> Part:
    ks = data.ks(label)
    extra = list(dict.fromkeys(n for runs in data.runs.values() for r in runs.values() for n in r["evaluations"][label]["parts"]))
    rows = []
    for arm in (*([START] if data.start else []), *data.arms):
        records = list(data.runs[arm].values())
        found = [record["evaluations"][label] for record in records]
        row = [arm, str(len(records)) if arm != START else ""]
        row += [_spread((_mean(record, label, k) for record in records), _percent) for k in ks]
        row.append(_spread((_mean(r, label, "greedy") for r in records if r["evaluations"][label]["greedy"]), _percent))
        row += [_spread((each[name] for each in found), number) for name in ("entropy", "mean_tokens")]
        rows.append(row + [_spread((each["parts"].get(name) for each in found), _percent) for name in extra])
    problems = len(found[0]["correct"])
    text = f"{problems} problems, {found[0]['samples']} samples of each, %; mean ± standard deviation over seeds. "
    text += f"{', '.join(extra)}: of the correct completions." if extra else ""
    columns = [*(f"pass@{k}" for k in ks), "greedy", "entropy (nats)", "tokens", *extra]
    return Part(f"After training: {label}", text.strip(), ["arm", "seeds", *columns], rows)


def differences_of(
    data: StudyData, label: str, found: dict[tuple[str, str, int | str], Difference]
) -> Part:
    columns = [k for k in (*data.ks(label), "greedy") if any(key[1:] == (label, k) for key in found)]
    rows = []
    for arm in data.arms:
        cells = [found.get((arm, label, k)) for k in columns]
        if first := next(filter(None, cells), None):
            row = [f"{arm} − {data.about['against'][arm]}", str(first.seeds)]
            rows.append(row + [_difference(cell) if cell else "–" for cell in cells])
    text = (
        "Points, paired by seed and problem, with 95 % intervals over seeds and problems; in brackets behind them the seeds "
        f"ahead. {SHORT} {statistics.LEVEL} (Holm; p as given) and there are {statistics.FEWEST_SEEDS} seeds or more."
    )
    names = [f"pass@{k}" if isinstance(k, int) else k for k in columns]
    return Part(f"Differences: {label}", text, ["arms", "seeds", *names], rows)


def _difference(found: Difference) -> str:
    text = f"{100 * found.mean:+.1f} ({100 * found.low:+.1f} to {100 * found.high:+.1f}) [{found.ahead}/{found.seeds}]"
    return text if found.adjusted is None else f"{text} {found.verdict}, p {found.adjusted:.2g}"


def _families(data: StudyData, label: str) -> Part | None:
    records = {arm: [r["evaluations"][label]["families"] for r in data.runs[arm].values()] for arm in data.arms}
    names = list(next(iter(records.values()))[0])
    rows = []
    for arm, found in {**({START: [data.start["evaluations"][label]["families"]]} if data.start else {}), **records}.items():
        cells = ([each[name][at] for each in found] for name in names for at in (1, -1))
        rows.append([arm, *(_spread(cell, _percent) for cell in cells)])
    samples = max(data.start["evaluations"][label]["samples"] if data.start else 0, data.ks(label)[-1])
    header = [f"{name}, pass@{k}" for name in names for k in (1, samples)]
    return Part(f"By family: {label}", "%; mean ± standard deviation over seeds.", ["arm", *header], rows) if names else None


def _never_sampled(data: StudyData, label: str) -> Part | None:
    rows = []
    for arm in data.arms:
        found = [statistics.never_sampled(record, data.start, label) for record in data.runs[arm].values()]
        if known := [each for each in found if each]:
            counts, before, after = zip(*known, strict=True)
            cells = (_spread(after, _percent), _spread((b - a for a, b in zip(before, after, strict=True)), _points))
            rows.append([arm, _spread(counts, number), _spread(before, _percent), *cells])
    text = (
        "Theorem 1 measured: problems of which the run sampled completions, none of them correct, and the probability of a "
        "correct answer to them (pass@1 over all samples, %; change in points)."
    )
    header = ["arm", "problems", "before", "after", "change"]
    return Part(f"Never sampled: {label}", text, header, rows) if rows else None


def training(data: StudyData) -> Part:
    """What happened in training, and the comparison at equal CPU-seconds."""
    budget = min(r["curves"]["cpu_seconds"][-1] for arm in data.arms for r in data.runs[arm].values())
    rows = []
    for arm in data.arms:
        records = list(data.runs[arm].values())

        def end(name: str, part: slice, records: Sequence[Record] = records) -> str:
            values = (r["curves"].get(name, [])[part] for r in records)
            return _spread((float(np.mean(v)) for v in values if v and None not in v), number)

        collapsed = sum(statistics.collapse(record) is not None for record in records)
        rows.append(
            [
                arm,
                f"{end('entropy', slice(0, 10))} → {end('entropy', slice(-10, None))}",
                f"{end('omega', slice(0, 10))} → {end('omega', slice(-10, None))}",
                _spread(map(statistics.share_below_alpha, records), _percent),
                f"{collapsed} of {len(records)}",
                _spread((r["curves"]["cpu_seconds"][-1] for r in records), number),
                _spread((statistics.success_at(r, budget) for r in records), _percent),
            ]
        )
    text = (
        f"Means over the first and the last ten steps. A run has collapsed if prompts without a correct completion became "
        f"more frequent by {100 * statistics.COLLAPSE:.0f} points (means of {statistics.WINDOW} steps). The last column compares "
        f"at equal cost: correct training completions (%) after {budget:,.0f} CPU-seconds, the least that a run took."
    )
    header = ["arm", "entropy (nats)", "ω", "steps with ω < α (%)", "collapsed", "CPU-seconds", "correct at equal cost"]
    return Part("In training", text, header, rows)


def each_run(data: StudyData) -> tuple[list[str], list[list[str]]]:
    """Header and rows: the ends of pass@k and greedy accuracy of each run."""
    columns = [(label, k) for label in data.labels for k in (*{data.ks(label)[0], data.ks(label)[-1]},)]
    rows = []
    for arm in data.arms:
        for seed, record in sorted(data.runs[arm].items(), key=lambda item: item[0] or 0):
            values = [_percent(_mean(record, label, k)) for label, k in columns]
            memory = number(record["peak_memory_mb"])
            warned = ", ".join(record["warnings"]) or "–"
            rows.append([arm, str(seed), *values, duration(record["seconds"]), memory, warned])
    header = ["arm", "seed", *(f"{label} pass@{k}" for label, k in columns), "time", "peak memory (MB)", "warnings"]
    return header, rows


def _spread(values: Iterable[float | None], show: Callable[[float], str]) -> str:
    found = statistics.mean_and_spread(values)
    if found is None:
        return "–"
    return show(found[0]) + (f" ± {show(found[1]).lstrip('+')}" if found[1] is not None else "")


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _points(value: float) -> str:
    return f"{100 * value:+.1f}"


# ------------------------------------------------------------------------------- figures


def figures(data: StudyData) -> dict[str, Html]:
    """Name -> figure: pass@k of each set, and curves of training, as means over seeds."""
    drawn = {}
    for label in data.labels:
        ks = data.ks(label)
        lines = [] if data.start is None else [Line(START, [(k, _mean(data.start, label, k)) for k in ks], color=7)]
        for index, arm in enumerate(data.arms):
            records = data.runs[arm].values()
            points = [(k, float(np.mean([_mean(record, label, k) for record in records]))) for k in ks]
            lines.append(Line(arm, points, color=index % 7, dashed=index >= 7))
        drawn[re.sub(r"\W+", "_", f"pass_at_k_{label}")] = plot(f"pass@k, {label}", lines, note="mean over seeds", x_name="k", shares=True, log2=True)
    for name, title in {"success": "Correct completions", "entropy": "Entropy", "omega": "ω"}.items():
        if lines := [line for index, arm in enumerate(data.arms) if (line := _curve(data, arm, name, index))]:
            drawn[name] = plot(title, lines, note="mean over seeds", smooth=True)
    lines = [line for index, arm in enumerate(data.arms) if (line := _curve(data, arm, "success", index, "cpu_seconds"))]
    drawn["success_by_cost"] = plot("Correct completions", lines, x_name="CPU-seconds", note="mean over seeds", smooth=True)
    return drawn


def _curve(data: StudyData, arm: str, name: str, index: int, along: str = "") -> Line | None:
    found = [r["curves"] for r in data.runs[arm].values() if None not in r["curves"].get(name, [None])]
    if not found:
        return None
    steps = min(len(curves[name]) for curves in found)
    ys = np.mean([curves[name][:steps] for curves in found], axis=0)
    xs = np.mean([curves[along][:steps] for curves in found], axis=0) if along else np.arange(1, steps + 1)
    return Line(arm, thin(list(zip(xs.tolist(), ys.tolist(), strict=True))), color=index % 7, dashed=index >= 7)


def standalone(figure: Html) -> str:
    """A figure as an SVG file with its legend, which stays light: it may stand on any page."""
    style = stylesheet("components.css") + ".agrae { color-scheme: light } figure { background: #fff }"
    body = el("div", el("style", Html(style.replace("&", "&amp;").replace("<", "&lt;"))), figure, class_="agrae")
    body = Html(body.replace("<div", '<div xmlns="http://www.w3.org/1999/xhtml"', 1).replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"'))
    inner = el("foreignObject", body, width="100%", height="100%")
    return el("svg", inner, xmlns="http://www.w3.org/2000/svg", viewBox="0 0 480 340", width="480", height="340")
