"""The pages of a study, made from its records alone: index.html with figures, and results.md for all studies."""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mm_agrae.errors import ConfigError
from mm_agrae.evaluation import study_statistics as statistics
from mm_agrae.evaluation.study import START, choose, load, runs_of
from mm_agrae.evaluation.study_runner import Runner
from mm_agrae.evaluation.study_statistics import Record, StudyData
from mm_agrae.run.files import write_atomic
from mm_agrae.view.page import Html, duration, el, fold, join, note, number, page, stylesheet, table
from mm_agrae.view.plots import Line, interval_plot, plot, thin

Part = tuple[str, str, list[str], list[list[str]]]
"""A table: title, text, header, rows."""
Differences = Mapping[tuple[str, str, int | str], statistics.Difference]
DASHES = "", "dashed", "dotted"


def carry_out(options: argparse.Namespace) -> int:
    """What `mm-agrae study` does, with the options of the command. Returns 1 if a run failed, else 0."""
    if options.jobs < 1:
        raise ConfigError(f"--jobs is {options.jobs}; it must be 1 or more")
    study = load(options.config, quick=options.quick, overrides=options.overrides)
    folder, runs = options.out / (Path(options.config).stem + "-quick" * options.quick), runs_of(study)
    chosen = choose(runs, options.arms, options.seeds)
    runner = Runner(chosen, folder, describe=line_of, any_code=options.any_code)
    if not (options.tables and (folder / "study.json").exists()):
        statistics.write_about(study, runs, folder)
    if not options.tables:
        runner.run(options.jobs)
    print(write_study(folder), write_results(options.out, options.out.parent / "results.md"), sep="\n")
    return int(bool(runner.failed))


def write_study(folder: Path) -> Path:
    """Write index.html and the figures into a study's folder. Raises RunFolderError for damaged records."""
    data = statistics.read_study(folder)
    differences = statistics.differences(data)
    drawn = figures(data, differences)
    for name, figure in drawn.items():
        write_atomic(folder / f"{name}.svg", standalone(figure))
    head = el("header", el("h1", data.about["title"]), el("p", data.about["question"]), note(_facts(data)))
    sections: list[tuple[str, Html | None]] = [("Figures", el("div", *drawn.values(), class_="plots"))]
    sections += [
        (title, join([note(text), table(header, rows)])) for title, text, header, rows in parts(data, differences)
    ]
    sections += [
        ("Each run", fold("Every run", table(*each_run(data)))),
        ("Setup", el("pre", *(f"{name}: {value}\n" for name, value in data.about.items()))),
    ]
    write_atomic(folder / "index.html", page(data.about["name"], head, sections))
    return folder / "index.html"


def write_results(studies: Path, path: Path) -> Path:
    """Write one Markdown page on every study in the folder `studies`."""
    lines = ["# Results", "Written by `mm-agrae study` from the records in the folders of the studies, not by hand."]
    if path.with_name("protocol.md").exists():
        lines.append("What was to be run and what counts as a difference was fixed before: [Protocol](protocol.md).")
    folders = sorted(file.parent for file in studies.glob("*/study.json"))
    lines += [] if folders else ["No study has been run yet."]
    for folder in folders:
        data, where = statistics.read_study(folder), f"{studies.name}/{folder.name}"
        differences = statistics.differences(data)
        lines += [f"## {data.about['title']}", data.about["question"], _facts(data)]
        for title, text, header, rows in parts(data, differences):
            lines += [f"### {title} ({data.about['name']})", text, markdown(header, rows)]
        lines += [f"![{name}]({where}/{name}.svg)" for name in figures(data, differences)]
        lines.append(f"Each run, and all figures on one page: `{where}/index.html`, made by `mm-agrae study`.")
    write_atomic(path, "\n\n".join(filter(None, lines)) + "\n")
    return path


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *rows))


def line_of(path: Path) -> str:
    """A run in one line, for the terminal, from its record."""
    record, told = statistics.read_record(path), []
    for label, found in record["evaluations"].items():
        ends = (f"pass@{k} {_percent(_mean(record, label, k))} %" for k in sorted({1, found["samples"]}))
        told.append(f"{label} {', '.join(ends)}")
    return f"{'; '.join(told)}; {duration(record['seconds'])}"


def _mean(record: Record, label: str, k: int | str) -> float:
    return float(statistics.values_P(record, label, k).mean())


def _facts(data: StudyData) -> str:
    told = [f"Config {data.about['config']}", f"{len(data.records)} runs recorded"]
    for name in ("mm_agrae", "torch", "transformers", "code"):
        if found := sorted({str({**r["versions"], "code": r["code"]}.get(name, "?")) for r in data.records}):
            told.append(f"{name} {' and '.join(found)}")
    held = {record["config"] for record in data.records}
    if missing := Counter(arm for arm, _, digest in data.about["runs"] if digest not in held):
        told.append(f"not run yet: {missing.total()} ({', '.join(f'{arm} {n}' for arm, n in missing.items())})")
    if data.other:
        told.append(f"{data.other} records of other settings left out")
    return "; ".join(told) + "."


# ------------------------------------------------------------------------------- tables


def parts(data: StudyData, differences: Differences) -> list[Part]:
    """Every table of a study for which there are records."""
    found = []
    for label in data.labels:
        found += [means(data, label), differences_of(data, label, differences), families(data, label)]
        found += [never_sampled(data, label)]
    return [part for part in (*found, training(data)) if part[-1]]


def _by_arm(data: StudyData, cells: Callable[[list[Record]], list[str]], start: bool = True) -> list[list[str]]:
    arms = [START] * (start and START in data.runs) + data.arms
    return [[arm, *cells(list(data.runs[arm].values()))] for arm in arms]


def means(data: StudyData, label: str) -> Part:
    found = [record["evaluations"][label] for record in data.records]
    extra = list(dict.fromkeys(name for each in found for name in each["parts"]))

    def cells(records: list[Record]) -> list[str]:
        own = [record["evaluations"][label] for record in records]
        shares = [[_mean(record, label, k) for record in records] for k in data.metrics(label)]
        sizes = [[each[name] for each in own] for name in ("entropy", "mean_tokens")]
        correct = [[each["parts"].get(name) for each in own] for name in extra]
        return [str(len(own)), *(_spread(v, _percent) for v in shares), *(_spread(v, number) for v in sizes),
                *(_spread(v, _percent) for v in correct)]  # fmt: skip

    text = (
        f"{len(found[0]['correct'])} problems, {found[0]['samples']} samples of each; %, mean ± standard deviation "
        f"over seeds{'; ' * bool(extra)}{', '.join(extra)}{': of the correct completions' * bool(extra)}."
    )
    header = ["arm", "runs", *(f"pass@{k}" for k in data.ks(label)), "greedy", "entropy (nats)", "tokens", *extra]
    return f"After training: {label}", text, header, _by_arm(data, cells)


def _pair(data: StudyData, arm: str) -> str:
    return f"{arm} − {data.about['against'][arm]}"


def differences_of(data: StudyData, label: str, found: Differences) -> Part:
    rows = []
    for arm in data.arms:
        of_k = {k: each for (name, of, k), each in found.items() if (name, of) == (arm, label)}
        if not of_k:
            continue
        judged = {k: each for k, each in of_k.items() if each.adjusted is not None}
        known = {k: each for k, each in judged.items() if each.verdict != "cannot tell"}
        told = [f"{each.verdict} at pass@{k} (p {each.adjusted:.2g})" for k, each in known.items()]
        told = told or ["cannot tell" if judged else "too few seeds"]
        cells = [
            f"{_points(each.mean)} [{_points(each.low)}, {_points(each.high)}] {each.ahead}/{each.seeds}"
            for each in of_k.values()
        ]
        missing = ["–"] * (len(data.metrics(label)) - len(cells))  # greedy, the last
        rows.append([_pair(data, arm), *cells, *missing, "; ".join(told)])
    text = (
        "Points, paired by seed and problem, with 95 % intervals over seeds and problems, and the seeds ahead. Main "
        f"differences, of arms with {statistics.FEWEST_SEEDS} seeds or more, have a verdict: more or less if p, "
        f"adjusted for all of them in the study (Holm), is below {statistics.LEVEL}."
    )
    header = ["arms", *(f"pass@{k}" for k in data.ks(label)), "greedy", "verdict"]
    return f"Differences: {label}", text, header, rows


def families(data: StudyData, label: str) -> Part:
    names = list(data.records[0]["evaluations"][label]["families"]) if data.records else []

    def cells(records: list[Record]) -> list[str]:
        found = [record["evaluations"][label]["families"] for record in records]
        return [_spread([each[name][at] for each in found], _percent) for name in names for at in (1, -1)]

    header = ["arm", *(f"{name}, pass@{k}" for name in names for k in (1, "n"))]
    text = "%, mean ± standard deviation over seeds; pass@n with all samples."
    return f"By family: {label}", text, header, _by_arm(data, cells) if names else []


def never_sampled(data: StudyData, label: str) -> Part:
    def cells(records: list[Record]) -> list[str]:
        known = [statistics.never_sampled(record, data.start, label) for record in records]
        found = np.array([each for each in known if each]).reshape(-1, 3)
        shares = (_spread(found[:, column], _percent) for column in (1, 2))
        return [_spread(found[:, 0], number), *shares, _spread(found[:, 2] - found[:, 1], _points)]

    text = (
        "Theorem 1 measured: problems of which the run sampled completions, none of them correct, and the probability "
        "of a correct answer to them (pass@1 over all samples, %; change in points)."
    )
    rows = [row for row in _by_arm(data, cells, start=False) if row[1] != "–"]
    return f"Never sampled: {label}", text, ["arm", "problems", "before", "after", "change"], rows


def training(data: StudyData) -> Part:
    """What happened in training, and the comparison at equal CPU-seconds."""
    budget = min((r["curves"]["cpu_seconds"][-1] for arm in data.arms for r in data.runs[arm].values()), default=0.0)

    def cells(records: list[Record]) -> list[str]:
        def ends(name: str, show: Callable[[float], str] = number) -> str:
            curves = [np.array(r["curves"].get(name, [np.nan]), dtype=float) for r in records]
            first, last = ([float(c[p].mean()) for c in curves] for p in (slice(0, 10), slice(-10, None)))
            return f"{_spread(first, show)} → {_spread(last, show)}"

        collapsed = sum(statistics.collapse(record) is not None for record in records)
        return [
            ends("entropy"),
            ends("omega"),
            _spread(map(statistics.share_below_alpha, records), _percent),
            ends("unsolved", _percent),
            f"{collapsed} of {len(records)}",
            _spread((r["curves"]["cpu_seconds"][-1] for r in records), number),
            _spread((statistics.success_at(r, budget) for r in records), _percent),
        ]

    text = (
        "Means over the first and the last ten steps. Unsolved: prompts without a correct completion. Collapsed: they "
        f"became more frequent by {100 * statistics.COLLAPSE:.0f} points (means of {statistics.WINDOW} steps). At "
        f"equal cost: correct training completions (%) after {budget:,.0f} CPU-seconds, the least that a run took."
    )
    header = [
        "arm",
        "entropy",
        "ω",
        "steps with ω < α (%)",
        "unsolved (%)",
        "collapsed",
        "CPU-seconds",
        "correct at equal cost",
    ]
    return "In training", text, header, _by_arm(data, cells, start=False)


def each_run(data: StudyData) -> tuple[list[str], list[list[str]]]:
    """Header and rows: the ends of pass@k, time and warnings of each run."""
    columns = [(label, k) for label in data.labels for k in (data.ks(label)[0], data.ks(label)[-1])]
    rows = []
    for record in data.records:
        values = [_percent(_mean(record, label, k)) for label, k in columns]
        warned = ", ".join(record["warnings"]) or "–"
        rows.append([record["arm"], str(record["seed"]), *values, duration(record["seconds"]), warned])
    return ["arm", "seed", *(f"{label} pass@{k}" for label, k in columns), "time", "warnings"], rows


def _spread(values: Iterable[float | None], show: Callable[[float], str]) -> str:
    """Mean ± standard deviation (ddof 1) of what is known."""
    known = [value for value in values if value is not None and np.isfinite(value)]
    if not known:
        return "–"
    spread = show(round(float(np.std(known, ddof=1)), 12)).lstrip("+") if len(known) > 1 else ""
    return show(float(np.mean(known))) + f" ± {spread}" * bool(spread)


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _points(value: float) -> str:
    return f"{100 * value:+.1f}"


# ------------------------------------------------------------------------------- figures


def figures(data: StudyData, differences: Differences) -> dict[str, Html]:
    """Name -> figure: pass@k of each set, and curves of training, as means over seeds."""
    drawn, arms = {}, [*data.arms, *[START] * (START in data.runs)]
    looks = {arm: Line(arm, (), color=i % 7, dash=DASHES[i // 7 % 3]) for i, arm in enumerate(arms)}
    for label in data.labels:
        lines = []
        for arm in arms:
            means = ((k, [_mean(r, label, k) for r in data.runs[arm].values()]) for k in data.ks(label))
            lines.append(replace(looks[arm], points=[(k, float(np.mean(values))) for k, values in means]))
        name = re.sub(r"\W+", "_", label)
        drawn[f"pass_at_k_{name}"] = plot(f"pass@k, {label}", lines, x_name="k", shares=True, log2=True)
        ks, rows = data.main_ks(label), {}
        for arm in data.arms:
            if all((arm, label, k) in differences for k in ks):
                own = (differences[arm, label, k] for k in ks)
                rows[_pair(data, arm)] = [[100 * d.mean, 100 * d.low, 100 * d.high] for d in own]
        if ks and rows:
            panels, told = [f"pass@{k}" for k in ks], "points, with 95 % intervals"
            drawn[f"differences_{name}"] = interval_plot(f"Differences, {label}", panels, rows, note=told)
    curves = {
        "success": "Correct completions",
        "entropy": "Entropy (nats)",
        "omega": "ω",
        "unsolved": "Unsolved prompts",
    }
    for name, along in (*((name, "step") for name in curves), ("success", "cpu_seconds")):
        lines = []
        for arm in data.arms:
            points = _curve([r["curves"] for r in data.runs[arm].values()], name, along)
            lines += [replace(looks[arm], points=points)] if points else []
        if lines:
            x_name = along.replace("cpu_", "CPU-")
            drawn[f"{name}_by_{along}"] = plot(f"{curves[name]} by {x_name}", lines, x_name=x_name, smooth=True)
    return drawn


def _curve(found: list[Any], name: str, along: str) -> Sequence[tuple[float, float]]:
    if any(None in curves.get(name, [None]) for curves in found):
        return []
    steps = min(len(curves[name]) for curves in found)
    xs, ys = (
        np.mean([curves.get(key, range(1, steps + 1))[:steps] for curves in found], axis=0) for key in (along, name)
    )
    return thin(list(zip(xs.tolist(), ys.tolist(), strict=True)))


def standalone(figure: Html) -> str:
    """A figure with its legend as an SVG file, which stays light: it may stand on any page."""
    style = stylesheet("components.css") + ".agrae { color-scheme: light } figure { background: #fff }"
    body = el("div", el("style", style), figure, class_="agrae").replace("&quot;", '"')
    for tag, where in {"div": "1999/xhtml", "svg": "2000/svg"}.items():
        body = body.replace(f"<{tag} ", f'<{tag} xmlns="http://www.w3.org/{where}" ')
    inner = el("foreignObject", Html(body), width="100%", height="100%")
    return el("svg", inner, xmlns="http://www.w3.org/2000/svg", viewBox="0 0 480 360", width="480", height="360")
