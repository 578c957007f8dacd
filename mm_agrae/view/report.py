"""One HTML page a run: what was learnt, how it went, and what the model wrote.

The page is one file that can be mailed: pictures are inside, nothing is fetched (see `page`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from mm_agrae.errors import RunFolderError
from mm_agrae.evaluation.paired import PairedEvaluations, SampleCache, StoredEvaluation
from mm_agrae.run.files import write_atomic
from mm_agrae.run.folder import RunFolder
from mm_agrae.run.records import EvaluationResult
from mm_agrae.view.page import (
    Html,
    Line,
    duration,
    el,
    empty,
    fold,
    join,
    note,
    number,
    page,
    percent,
    plot,
    shorten,
    span,
    table,
    thin,
    tile,
    with_interval,
)
from mm_agrae.view.parts import (
    ADVANTAGES,
    CURVES,
    Pictures,
    curve_figures,
    group_card,
    pass_at_k_plot,
    pass_at_k_table,
    series,
    trace_card,
)
from mm_agrae.view.runs import RunView, distinct_names, select

GROUPS_SHOWN = 6
EARLIER_GROUPS_SHOWN = 2
COMPLETIONS_SHOWN = 16

Row = Mapping[str, Any]


def write_report(run_dir: str | Path) -> Path:
    """Write `report.html` into a run folder and return its path.

    Works while the run goes on and with parts missing. Raises RunFolderError if there is no run,
    a file of it is damaged, or the folder cannot be written.
    """
    folder = RunFolder(run_dir)
    config = _parse_config(folder)
    metrics = folder.read_metrics()
    evaluations = folder.read_evaluations()
    summary = folder.read_summary()
    pictures = Pictures(folder)
    step = int(_last(metrics, "step") or 0)
    trained = bool(metrics) or not evaluations or bool(_ends(evaluations))
    sections = [
        ("Results", _results(folder, evaluations, step)),
        ("Curves", _curves(metrics) if trained else None),
        ("Before and after", _traces(folder, evaluations, pictures)),
        ("Groups", _groups(folder, pictures) if trained else None),
        ("Time", _time(metrics, summary)),
        ("Setup", _setup(folder)),
    ]
    name = folder.path.resolve().name
    planned = _section(config, "train").get("steps")
    if not trained:
        state = "Checkpoints evaluated by themselves."
    elif summary:
        state = f"Finished after {step:,} steps."
    elif step:
        state = f"Not finished: {step:,}{f' of {planned}' if planned else ''} steps so far."
    else:
        state = "No step has been logged yet."
    header = _header(name, folder, config, state)
    path = folder.path / "report.html"
    write_atomic(path, page(name, header, sections))
    return path


def compare_report(run_dirs: Sequence[str | Path], out: str | Path) -> Path:
    """Write one page that holds several runs side by side, and return its path.

    Raises RunFolderError if one of them is not a run, or `out` cannot be written.
    """
    runs = [RunFolder(path) for path in run_dirs]
    configs = [_flatten(_parse_config(run)) for run in runs]
    names = _distinct_names(runs)
    sections = [
        ("Results", _compared_results(names, [run.read_evaluations() for run in runs])),
        ("Curves", _compared_curves(names, [run.read_metrics() for run in runs])),
        ("What differs in the configs", _config_differences(names, configs)),
    ]
    title = f"{len(runs)} runs compared"
    header = el("header", el("h1", title), note(", ".join(names)))
    write_atomic(Path(out), page(title, header, sections))
    return Path(out)


# -- what was learnt


def _header(name: str, folder: RunFolder, config: Row, state: str) -> Html:
    advantage, rollout = _section(config, "advantage"), _section(config, "rollout")
    settings = [f"{k}={v}" for k, v in advantage.items() if k != "rule" and v is not None]
    sizes = [rollout.get("prompts_per_step"), rollout.get("completions_per_prompt")]
    facts = {
        "model": _section(config, "model").get("path"),
        "rule": " ".join([str(advantage.get("rule") or ""), *settings]),
        "loss": _section(config, "update").get("loss"),
        "batch": "{} prompts × {} completions".format(*sizes) if all(sizes) else None,
        "date": str(folder.read_versions().get("created") or "").replace("T", " ").rstrip("Z"),
    }
    chips = [
        el("span", el("span", f"{key} ", class_="muted"), value, class_="chip")
        for key, value in facts.items()
        if value
    ]
    return el("header", el("h1", name), el("p", *chips, class_="chips"), el("p", state))


def _results(folder: RunFolder, evaluations: Sequence[EvaluationResult], last_step: int) -> Html:
    if not evaluations:
        return empty("Not evaluated yet.")
    parts: list[Html] = []
    labels = list(dict.fromkeys(result.label for result in evaluations))
    for label in labels:
        results = [result for result in evaluations if result.label == label]
        ends = _ends(results)
        shown = ends or results
        colors = {"before": 7} if ends else {r.name: i % 7 for i, r in enumerate(results)}
        plots = [pass_at_k_plot([(r.name, r, colors.get(r.name, 0)) for r in shown])]
        if ends and len(results) > 2:
            plots.append(_progress_plot(results, last_step))
        about = (
            f"{shown[-1].problems:,} problems of {label}, {shown[-1].samples} samples each. "
            "Ranges are 95 % bootstrap intervals over problems."
        )
        parts += [
            el("h3", label) if len(labels) > 1 else Html(""),
            el("div", *_key_numbers(folder, ends), class_="tiles") if ends else Html(""),
            note(about),
            el("div", *plots, class_="plots"),
            pass_at_k_table([(result.name, result) for result in results]),
            *_group_tables(shown),
        ]
    return join(parts)


def _ends(results: Sequence[EvaluationResult]) -> list[EvaluationResult]:
    """The evaluation before training and the latest one; the latest alone if there is no other.

    None at all where checkpoints were evaluated by themselves, without a training run.
    """
    training = [r for r in results if r.name in ("before", "after") or _step_of(r) is not None]
    if len(training) > 1 and training[0].name == "before":
        return [training[0], training[-1]]
    return training[-1:]


def _step_of(result: EvaluationResult) -> int | None:
    digits = result.name.removeprefix("step_")
    return int(digits) if digits != result.name and digits.isdecimal() else None


def _first_and_last_k(result: EvaluationResult) -> list[int]:
    return sorted({min(result.pass_at_k), max(result.pass_at_k)})


def _key_numbers(folder: RunFolder, ends: Sequence[EvaluationResult]) -> list[Html]:
    def change(read: Callable[[EvaluationResult], Any], show: Callable[[Any], str]) -> str:
        return " → ".join(show(read(result)) for result in ends)

    when = "" if len(ends) > 1 else f", {ends[-1].name}"
    paired = _paired(folder, ends)
    tiles = []
    for k in _first_and_last_k(ends[-1]):
        found = [result.pass_at_k[k] for result in ends if k in result.pass_at_k]
        ranges = " → ".join(map(span, found))
        values = percent(*(interval.mean for interval in found))
        tiles.append(tile(f"pass@{k}{when}", values, ranges, _gain(paired, k)))
    greedy = [result.greedy for result in ends if result.greedy is not None]
    if greedy:
        values = percent(*(interval.mean for interval in greedy))
        tiles.append(tile(f"greedy accuracy{when}", values, " → ".join(map(span, greedy))))
    unsolved = percent(*(result.unsolved for result in ends))
    tiles.append(tile("never solved", unsolved, f"none of {ends[-1].samples} samples right"))
    cut_off = "cut off: " + percent(*(result.truncated for result in ends))
    tiles.append(tile("tokens a completion", change(lambda r: r.mean_tokens, number), cut_off))
    if ends[-1].entropy is not None:
        tiles.append(tile("entropy", change(lambda r: r.entropy, number), "nats a token"))
    return tiles


def _paired(folder: RunFolder, ends: Sequence[EvaluationResult]) -> PairedEvaluations | None:
    """The two ends on the problems they share; None where the samples were not kept."""
    if len(ends) < 2:
        return None
    reader = SampleCache()
    try:
        first, second = (reader.read(StoredEvaluation(folder, result)) for result in ends)
    except RunFolderError:  # missing or damaged: the report shows what there is
        return None
    paired = PairedEvaluations.of(first, second)
    return paired if paired.count else None


def _gain(paired: PairedEvaluations | None, k: int) -> str:
    """The paired problem, where both evaluations sampled the same problems equally often."""
    gain = paired.gain(k) if paired else None
    if gain is None:
        return ""
    return f"{100 * gain.mean:+.1f} points ({100 * gain.low:+.1f} to {100 * gain.high:+.1f})"


def _progress_plot(results: Sequence[EvaluationResult], last_step: int) -> Html:
    """pass@1 and pass@n of every evaluation, by the step it was made at."""
    ends = {"before": 0, "after": last_step}
    dated = [(_step_of(r) if r.name not in ends else ends[r.name], r.pass_at_k) for r in results]
    lines = []
    for color, k in enumerate(_first_and_last_k(results[-1])):
        found = [(s, tables[k]) for s, tables in dated if s is not None and k in tables]
        means = [(step, interval.mean) for step, interval in found]
        band = [(step, interval.low, interval.high) for step, interval in found]
        lines.append(Line(f"pass@{k}", means, band, color))
    return plot("pass@k during training", lines, shares=True)


def _group_tables(ends: Sequence[EvaluationResult]) -> list[Html]:
    """pass@1 and pass@n by the kinds of problems."""
    tables = []
    columns = [(k, result) for k in _first_and_last_k(ends[-1]) for result in ends]
    for key, groups in ends[-1].groups.items():
        rows = []
        for value, group in groups.items():
            cells = []
            for k, result in columns:
                found = result.groups.get(key, {}).get(value)
                cells.append(with_interval(found.pass_at_k.get(k) if found else None))
            rows.append([value, group.problems, *cells])
        header = [key, "problems", *(f"pass@{k} {result.name}" for k, result in columns)]
        tables.append(fold(f"By {key} ({len(groups)})", table(header, rows)))
    return tables


# -- how it went

_STAGES = (
    *("rollout", "reward", "advantage", "update", "log", "prompts"),
    *("evaluate", "checkpoint"),
)


def _curves(metrics: Sequence[Row]) -> Html:
    if not metrics:
        return empty("No step has been logged yet.")
    figures, same = curve_figures(metrics)
    return join(
        [el("div", *figures, *_speed(metrics), class_="plots"), note(same) if same else None]
    )


def _speed(metrics: Sequence[Row]) -> list[Html]:
    figures = []
    # Evaluations and checkpoints come now and then and would dwarf the rest.
    stages = [
        Line(stage, thin(series(metrics, f"seconds/{stage}")), color=color)
        for color, stage in enumerate(_STAGES[:-2])
    ]
    if any(line.points for line in stages):
        caption = "without evaluation and checkpoints"
        figures.append(plot("Seconds a step", stages, note=caption, stacked=True))
    rates: list[Line] = []
    for stage, label in (("rollout", "while sampling"), ("total", "whole step")):
        rows = []
        for row in metrics:
            tokens, seconds = row.get("tokens/completion"), row.get(f"seconds/{stage}")
            if tokens and seconds:
                rows.append({"step": row.get("step"), "rate": tokens / seconds})
        rates.append(Line(label, thin(series(rows, "rate")), color=len(rates)))
    if any(line.points for line in rates):
        caption = "completion tokens"
        figures.append(plot("Tokens a second", rates, note=caption, smooth=True, zero=True))
    return figures


def _time(metrics: Sequence[Row], summary: Row) -> Html | None:
    totals = {s: sum(row.get(f"seconds/{s}") or 0.0 for row in metrics) for s in _STAGES}
    written = summary.get("seconds")
    if isinstance(written, Mapping):
        totals = {str(k): float(v) for k, v in written.items() if isinstance(v, int | float)}
    whole = totals.pop("total", 0.0) or sum(totals.values())
    if not whole:
        return None
    rest = whole - sum(totals.values())
    if rest > 0.005 * whole:
        totals["everything else"] = rest
    rows = [[stage, duration(s), percent(s / whole)] for stage, s in totals.items() if s]
    sampled = sum(row.get("tokens/completion") or 0 for row in metrics)
    tiles = [tile("time", duration(whole)), tile("tokens sampled in training", number(sampled))]
    memory = summary.get("peak_memory_mb") or _last(metrics, "memory/peak_mb")
    if isinstance(memory, int | float):
        tiles.append(tile("peak memory", f"{memory:,.0f} MB"))
    return join([el("div", *tiles, class_="tiles"), table(["stage", "time", "share"], rows)])


# -- what the model wrote


def _traces(
    folder: RunFolder, evaluations: Sequence[EvaluationResult], pictures: Pictures
) -> Html | None:
    """Problems that training solved, one it lost and one it left, with what was written."""
    ends = _ends([r for r in evaluations if r.label == evaluations[-1].label])
    if len(ends) < 2:
        return None
    paired = _paired(folder, ends)
    if paired is None:
        return empty("The samples of the evaluations were not kept.")
    kinds = paired.by_outcome
    gained = (kinds["only second"] + kinds["second more"])[:3]
    lost = (kinds["only first"] + kinds["first more"])[:1]
    cards = []
    for problem in gained + lost + kinds["neither"][:1]:
        rows = paired.sample_pair(problem)
        titles = [
            f"{result.name}: {right} of {count} right"
            for result, right, count in zip(ends, problem.correct, problem.samples, strict=True)
        ]
        cards.append(trace_card(rows[1], pictures, list(zip(titles, rows, strict=True))))
    about = "Problems that training solved, one it lost and one it left, as far as there are any."
    return join([note(about), *cards])


def _groups(folder: RunFolder, pictures: Pictures) -> Html:
    """Groups of the last step kept, and fewer of the first and the one halfway to compare."""
    view = RunView(folder.path)
    view.refresh()
    if not view.steps:
        return empty("No rollouts were kept.")
    earlier = sorted({view.steps[0], view.steps[len(view.steps) // 2]} - {view.steps[-1]})
    parts = [_groups_of(view, view.steps[-1], GROUPS_SHOWN, pictures)]
    for step in earlier:
        try:
            body = _groups_of(view, step, EARLIER_GROUPS_SHOWN, pictures)
        except RunFolderError as error:
            body = empty(str(error))
        parts.append(fold(f"Step {step:,}, to compare", body))
    return join(parts)


def _groups_of(view: RunView, step: int, count: int, pictures: Pictures) -> Html:
    groups = view.groups(step)
    kinds = {kind: select(groups, kind) for kind in ("mixed", "all wrong", "all right")}
    # Mixed groups teach; one of each other kind shows what they look like.
    others = kinds["all wrong"][:1] + kinds["all right"][:1]
    rest = kinds["all wrong"][1:] + kinds["all right"][1:]
    shown = (kinds["mixed"][: count - len(others)] + others + rest)[:count]
    counts = ", ".join(f"{len(found):,} {kind}" for kind, found in kinds.items())
    text = f"Step {step:,}: {len(groups):,} groups ({counts}), {len(shown)} shown. {ADVANTAGES}"
    cards = [
        group_card(rows, pictures, completions=COMPLETIONS_SHOWN) for rows in view.rows(step, shown)
    ]
    return join([note(text), *cards])


# -- how it was set up


def _setup(folder: RunFolder) -> Html:
    versions = [[name, shorten(value, 300)] for name, value in folder.read_versions().items()]
    config = el("pre", shorten(folder.read_config(), 40_000), tabindex="0")
    return join(
        [fold("Config, as resolved", config), fold("Versions", table(["", "version"], versions))]
    )


def _parse_config(folder: RunFolder) -> dict[str, Any]:
    try:
        values = yaml.safe_load(folder.read_config())
    except yaml.YAMLError:  # the page shows it as text all the same
        return {}
    return values if isinstance(values, dict) else {}


def _section(config: Row, name: str) -> dict[str, Any]:
    section = config.get(name)
    return section if isinstance(section, dict) else {}


def _last(metrics: Sequence[Row], key: str) -> float | None:
    return next((row[key] for row in reversed(metrics) if row.get(key) is not None), None)


# -- several runs side by side


def _distinct_names(runs: Sequence[RunFolder]) -> list[str]:
    paths = [run.path for run in runs]
    if len({path.resolve() for path in paths}) < len(paths):
        raise RunFolderError("the same run folder is given twice; name each run once")
    return distinct_names(paths)


def _compared_results(
    names: Sequence[str], evaluations: Sequence[Sequence[EvaluationResult]]
) -> Html:
    labels = list(dict.fromkeys(result.label for found in evaluations for result in found))
    if not labels:
        return empty("None of these runs has been evaluated.")
    parts = []
    for label in labels:
        rows: list[tuple[str, EvaluationResult, int]] = []
        starts: list[Any] = []
        for color, (name, found) in enumerate(zip(names, evaluations, strict=True)):
            results = [result for result in found if result.label == label]
            for result in _ends(results) or results:
                if result.name == "after":
                    rows.append((name, result, color % 7))
                elif result.name != "before":
                    rows.append((f"{name}, {result.name}", result, color % 7))
                elif result.pass_at_k not in starts:  # runs from one checkpoint share their start
                    starts.append(result.pass_at_k)
                    rows.append((f"{name}, before", result, 7 if len(starts) == 1 else color % 7))
        if len(starts) == 1 and len(names) > 1:
            rows = [("before" if r.name == "before" else name, r, c) for name, r, c in rows]
        parts.append(el("h3", label))
        parts.append(el("div", pass_at_k_plot(rows), class_="plots wide"))
        parts.append(pass_at_k_table([(name, result) for name, result, _ in rows]))
    return join(parts)


def _compared_curves(names: Sequence[str], metrics: Sequence[Sequence[Row]]) -> Html:
    titles = {"reward/mean": "Reward", "groups/all_incorrect": "Groups without a right completion",
              "groups/all_correct": "Groups with right completions only"}  # fmt: skip
    notes = {}
    for title, caption, keys, options in CURVES:
        key = next(iter(keys))
        if "stacked" not in options and (len(keys) == 1 or title == "Length"):
            titles[key], notes[key] = title, caption
    figures = []
    for key, title in titles.items():
        found = [thin(series(rows, key)) for rows in metrics]
        lines = [Line(name, found[i], color=i % 7) for i, name in enumerate(names)]
        if len({y for points in found for _, y in points}) > 1:
            figures.append(plot(title, lines, note=notes.get(key, ""), smooth=True))
    if not figures:
        return empty("None of these runs has logged a step.")
    return el("div", *figures, class_="plots")


def _config_differences(names: Sequence[str], configs: Sequence[Row]) -> Html:
    rows = []
    for key in dict.fromkeys(key for config in configs for key in config if key != "run_dir"):
        values = [shorten(config.get(key, "–"), 200) for config in configs]
        if len(set(values)) > 1:
            rows.append([key, *values])
    return table(["setting", *names], rows) if rows else empty("Nothing but the folder.")


def _flatten(values: Row, prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        flat |= _flatten(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return flat
