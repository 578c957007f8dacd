"""Self-contained HTML pages: one run with what the model wrote, and several runs side by side."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from mm_agrae.errors import RunFolderError
from mm_agrae.evaluation.paired import PairedEvaluations, SampleCache, StoredEvaluation
from mm_agrae.run.files import write_atomic
from mm_agrae.run.folder import RunFolder
from mm_agrae.run.records import EvaluationResult, Interval, PartMeans
from mm_agrae.view.components import (
    ADVANTAGES,
    CURVES,
    EmbeddedImages,
    curve_figures,
    group_card,
    interval_line,
    measured_difficulty,
    pass_at_k_plot,
    pass_at_k_table,
    problem_table,
    series,
    trace_card,
)
from mm_agrae.view.page import (
    Html,
    duration,
    el,
    empty,
    fold,
    join,
    note,
    number,
    page,
    percent,
    shorten,
    span,
    table,
    tile,
    with_interval,
)
from mm_agrae.view.plots import Line, plot, thin
from mm_agrae.view.replay import StepReplay
from mm_agrae.view.runs import Record, RunReader, distinct_names, select, step_of, training_ends

GROUPS_SHOWN = 6
EARLIER_GROUPS_SHOWN = 2
COMPLETIONS_SHOWN = 16
OPEN_KINDS = ("family", "figure", "level")
"""Entries of the examples' meta whose tables are not folded."""
FEWEST_PROBLEMS = 6
"""With fewer, even a fall on all of them happens by chance more often than 1 time in 20 (two-sided sign test)."""
METRIC_TITLES = {"rule": "correct completions that name the right rule"}


def write_report(run_dir: str | Path) -> Path:
    """Write `report.html` into a run folder and return its path.

    Also works while the run is going on, and with files missing. Raises RunFolderError if there
    is no run, one of its files is damaged, or the folder cannot be written.
    """
    run = RunReader(run_dir)
    folder, config = run.folder, run.config()
    run.refresh()
    evaluations = folder.read_evaluations()
    summary = folder.read_summary()
    images = EmbeddedImages(folder)
    trained = not run.only_evaluations()
    sections = [
        ("Results", _results(folder, config, evaluations, int(_last(run.metrics, "step") or 0))),
        ("Curves", _curves(run.metrics) if trained else None),
        ("Difficulty", _difficulty(folder)),
        ("Before and after", _traces(folder, evaluations, images)),
        ("Groups", _groups(run, images) if trained else None),
        ("Time", _time(run.metrics, summary)),
        ("Setup", _setup(folder)),
    ]
    header = _header(folder, config, run.progress())
    path = folder.path / "report.html"
    write_atomic(path, page(folder.path.resolve().name, header, sections))
    return path


def _header(folder: RunFolder, config: Record, progress: str) -> Html:
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
    title = el("h1", folder.path.resolve().name)
    return el("header", title, el("p", *chips, class_="chips"), el("p", progress))


def _results(folder: RunFolder, config: Record, evaluations: Sequence[EvaluationResult], last_step: int) -> Html:
    if not evaluations:
        return empty("Not evaluated yet.")
    parts: list[Html] = []
    labels = list(dict.fromkeys(result.label for result in evaluations))
    for label in labels:
        results = [result for result in evaluations if result.label == label]
        ends = training_ends(results)
        paired = _paired(folder, ends)
        tiles = [*_key_numbers(paired, ends), *_metric_tiles(config, ends)] if ends else []
        shown = ends or results
        colors = {"before": 7} if ends else {r.name: i % 7 for i, r in enumerate(results)}
        plots = [pass_at_k_plot([(r.name, r, colors.get(r.name, 0)) for r in shown])]
        if ends and len(results) > 2:
            plots.append(_progress_plot(results, last_step))
        about = (
            f"{shown[-1].problems:,} problems of {label}, {shown[-1].samples} samples each. "
            "Ranges are 95 % bootstrap intervals over problems."
        )
        fell, tables = _kind_tables(folder, shown, paired, len(ends) > 1)
        parts += [
            el("h3", label) if len(labels) > 1 else Html(""),
            el("div", *tiles, class_="tiles") if ends else Html(""),
            fell,
            note(about),
            el("div", *plots, class_="plots"),
            pass_at_k_table([(result.name, result) for result in results]),
            *tables,
        ]
    return join(parts)


def _first_and_last_k(result: EvaluationResult) -> list[int]:
    return sorted({min(result.pass_at_k), max(result.pass_at_k)})


def _key_numbers(paired: PairedEvaluations | None, ends: Sequence[EvaluationResult]) -> list[Html]:
    def change(read: Callable[[EvaluationResult], Any], show: Callable[[Any], str]) -> str:
        return " → ".join(show(read(result)) for result in ends)

    when = "" if len(ends) > 1 else f", {ends[-1].name}"
    tiles = []
    for k in _first_and_last_k(ends[-1]):
        found = [result.pass_at_k[k] for result in ends if k in result.pass_at_k]
        ranges = " → ".join(map(span, found))
        values = percent(*(interval.mean for interval in found))
        gain = paired.gain(k) if paired else None
        tiles.append(tile(f"pass@{k}{when}", values, ranges, _signed(gain, " points") if gain else ""))
    greedy = [result.greedy for result in ends if result.greedy is not None]
    if greedy:
        values = percent(*(interval.mean for interval in greedy))
        tiles.append(tile(f"greedy accuracy{when}", values, " → ".join(map(span, greedy))))
    unsolved = percent(*(result.unsolved for result in ends))
    tiles.append(tile("never solved", unsolved, f"none of {ends[-1].samples} samples correct"))
    cut_off = "cut off: " + percent(*(result.truncated for result in ends))
    tiles.append(tile("tokens per completion", change(lambda r: r.mean_tokens, number), cut_off))
    if ends[-1].entropy is not None:
        tiles.append(tile("entropy", change(lambda r: r.entropy, number), "nats per token"))
    return tiles


def _metric_tiles(config: Record, ends: Sequence[EvaluationResult]) -> list[Html]:
    """The means over correct completions of the parts that are not rewarded, but measured."""
    tiles = []
    for name, weight in _section(_section(config, "reward"), "parts").items():
        if name != "accuracy" and (weight == 0 or name in METRIC_TITLES) and name in ends[-1].parts:
            found = [result.parts.get(name, PartMeans(None, None)) for result in ends]
            values = [_share(means.correct) for means in found]
            every = "all completions: " + " → ".join(_share(means.mean) for means in found)
            tiles.append(tile(METRIC_TITLES.get(name, f"{name}, correct completions"), " → ".join(values), every))
    return tiles


def _share(value: float | None) -> str:
    return percent(value) if value is not None and 0 <= value <= 1 else number(value)


def _paired(folder: RunFolder, ends: Sequence[EvaluationResult]) -> PairedEvaluations | None:
    """Before against after on the problems they share; None if the samples were not kept."""
    if len(ends) < 2:
        return None
    reader = SampleCache()
    try:
        first, second = (reader.read(StoredEvaluation(folder, result)) for result in ends)
    except RunFolderError:  # missing or damaged: the report shows what there is
        return None
    paired = PairedEvaluations.of(first, second)
    return paired if paired.count else None


def _signed(gain: Interval, unit: str = "") -> str:
    return f"{100 * gain.mean:+.1f}{unit} ({100 * gain.low:+.1f} to {100 * gain.high:+.1f})"


def _progress_plot(results: Sequence[EvaluationResult], last_step: int) -> Html:
    """pass@1 and pass@n of every evaluation against its step."""
    ends = {"before": 0, "after": last_step}
    dated = [(step_of(r) if r.name not in ends else ends[r.name], r.pass_at_k) for r in results]
    lines = []
    for color, k in enumerate(_first_and_last_k(results[-1])):
        found = [(s, tables[k]) for s, tables in dated if s is not None and k in tables]
        lines.append(interval_line(f"pass@{k}", found, color))
    return plot("pass@k during training", lines, shares=True)


def _kind_tables(
    folder: RunFolder, shown: Sequence[EvaluationResult], paired: PairedEvaluations | None, trained: bool
) -> tuple[Html, list[Html]]:
    """What fell, in words; and pass@1 and pass@n of each kind of problem; `trained`: before and after, falls first."""
    last, ks = shown[-1], _first_and_last_k(shown[-1])
    problems: dict[tuple[str, str], set[str]] = {}
    for row in folder.read_samples(last) if paired else ():
        for key in last.groups:
            problems.setdefault((key, str(row["meta"].get(key))), set()).add(str(row["example_id"]))
    tables: list[Html] = []
    lower: list[Html] = []
    for key in sorted(last.groups, key=lambda key: key not in OPEN_KINDS):
        fallen = last.falls(shown[0], key) if trained else {}
        gains: dict[tuple[str, int], Interval | None] = {}
        rows = []
        for kind in sorted(last.groups[key], key=lambda kind: min(fallen.get(kind, {0: 0.0}).values())):
            rows.append([kind, last.groups[key][kind].problems])
            for k in ks:
                gains[kind, k] = paired.gain(k, problems.get((key, kind), ())) if paired else None
                groups = [result.groups.get(key, {}).get(kind) for result in shown]
                found = [group.pass_at_k.get(k) if group else None for group in groups]
                fell = k in fallen.get(kind, {})
                rows[-1] += _changed(found, gains[kind, k], fell) if trained else map(with_interval, found)
        columns = ["{}", "{}, change"] if trained else [f"{{}} {result.name}" for result in shown]
        header = [key, "problems", *(column.format(f"pass@{k}") for k in ks for column in columns)]
        words = [_fallen(last, key, k, fallen, gains) for k in ks if trained]
        lower += [el("div", f"By {key}: {text}") for text, fell in words if fell]
        body = [*(el("p", text) for text, fell in words if not fell), table(header, rows)]
        tables += [el("h4", f"By {key}"), *body] if key in OPEN_KINDS else [fold(f"By {key} ({len(rows)})", *body)]
    return el("div", el("b", "What fell"), *lower, class_="card fell") if lower else Html(""), tables


def _changed(found: Sequence[Interval | None], gain: Interval | None, fell: bool) -> list[object]:
    """pass@k before and after, and by how much it changed."""
    means = [each.mean for each in found if each]
    values = " → ".join(f"{100 * each.mean:.1f}" if each else "–" for each in found)
    change = _signed(gain) if gain else f"{100 * (means[1] - means[0]):+.1f}" if len(means) == 2 else "–"
    return [values, el("span", f"▼ {change}", class_="incorrect") if fell else change]


def _fallen(
    last: EvaluationResult, key: str, k: int, fallen: Record, gains: Mapping[Any, Interval | None]
) -> tuple[str, bool]:
    """Which kinds fell at pass@k and by how much; apart, those whose interval cannot tell. True if any is lower."""
    certain, unclear = list[str](), list[str]()
    for kind, changes in sorted(fallen.items(), key=lambda each: each[1].get(k, 0.0)):
        if k in changes:
            gain = gains[kind, k]
            few = gain is not None and (gain.high >= 0 or last.groups[key][kind].problems < FEWEST_PROBLEMS)
            name = f"{key} {kind}" if kind.isdigit() else kind
            (unclear if few else certain).append(f"{name} by {-100 * changes[k]:.1f} points")
    told = [f"pass@{k} fell for {', '.join(certain)}."] if certain else []
    it = "It" if certain else f"pass@{k}"
    told += [f"{it} is lower, but on too few problems to tell, for {', '.join(unclear)}."] if unclear else []
    return " ".join(told) or f"pass@{k} fell for no {key} by as much as one problem.", bool(told)


def _difficulty(folder: RunFolder) -> Html | None:
    parts = measured_difficulty(folder)
    with suppress(RunFolderError):  # no rollouts were kept, or some are damaged, which their own section says
        parts.append(fold(*problem_table(folder)))
    return join(parts) if parts else None


_STAGES = ("rollout", "reward", "advantage", "update", "log", "prompts", "evaluate", "checkpoint")


def _curves(metrics: Sequence[Record]) -> Html:
    if not metrics:
        return empty("No step has been logged yet.")
    figures, constant = curve_figures(metrics)
    return join([el("div", *figures, *_speed(metrics), class_="plots"), constant])


def _speed(metrics: Sequence[Record]) -> list[Html]:
    figures = []
    # Evaluations and checkpoints are rare and would dwarf the rest.
    stages = [
        Line(stage, thin(series(metrics, f"seconds/{stage}")), color=color) for color, stage in enumerate(_STAGES[:-2])
    ]
    if any(line.points for line in stages):
        caption = "without evaluation and checkpoints"
        figures.append(plot("Seconds per step", stages, note=caption, stacked=True))
    rates: list[Line] = []
    for key, label in (("seconds/rollout", "while sampling"), ("seconds/total", "whole step")):
        rows = [
            {"step": row.get("step"), "rate": row["tokens/completion"] / row[key]}
            for row in metrics
            if row.get("tokens/completion") and row.get(key)
        ]
        rates.append(Line(label, thin(series(rows, "rate")), color=len(rates)))
    if any(line.points for line in rates):
        caption = "completion tokens"
        figures.append(plot("Tokens per second", rates, note=caption, smooth=True, zero=True))
    return figures


def _time(metrics: Sequence[Record], summary: Record) -> Html | None:
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


def _traces(folder: RunFolder, evaluations: Sequence[EvaluationResult], images: EmbeddedImages) -> Html | None:
    """Problems solved through training, one lost and one never solved, with completions."""
    ends = training_ends([r for r in evaluations if r.label == evaluations[-1].label])
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
        counts = zip(ends, problem.correct, problem.samples, strict=True)
        titles = [f"{result.name}: {n} of {count} correct" for result, n, count in counts]
        cards.append(trace_card(rows[1], images, list(zip(titles, rows, strict=True))))
    about = "Problems solved through training, one lost and one never solved, where there are any."
    return join([note(about), *cards])


def _groups(run: RunReader, images: EmbeddedImages) -> Html:
    """Groups of the last kept step, and a few of the first and the middle one to compare."""
    if not run.steps:
        return empty("No rollouts were kept.")
    earlier = sorted({run.steps[0], run.steps[len(run.steps) // 2]} - {run.steps[-1]})
    parts = [_groups_of(run, run.steps[-1], GROUPS_SHOWN, images)]
    for step in earlier:
        try:
            body = _groups_of(run, step, EARLIER_GROUPS_SHOWN, images)
        except RunFolderError as error:
            body = empty(str(error))
        parts.append(fold(f"Step {step:,}, to compare", body))
    return join(parts)


def _groups_of(run: RunReader, step: int, count: int, images: EmbeddedImages) -> Html:
    groups = run.groups(step)
    kinds = {kind: select(groups, kind) for kind in ("mixed", "all incorrect", "all correct")}
    # Mixed groups teach; one of each other kind shows what they look like.
    others = kinds["all incorrect"][:1] + kinds["all correct"][:1]
    rest = kinds["all incorrect"][1:] + kinds["all correct"][1:]
    shown = (kinds["mixed"][: count - len(others)] + others + rest)[:count]
    counts = ", ".join(f"{len(found):,} {kind}" for kind, found in kinds.items())
    text = f"Step {step:,}: {len(groups):,} groups ({counts}), {len(shown)} shown. {ADVANTAGES}"
    replay = StepReplay.of(run, step) if step == run.steps[-1] else None
    cards = [group_card(rows, images, completions=COMPLETIONS_SHOWN, replay=replay) for rows in run.rows(step, shown)]
    return join([note(text), *cards])


def _setup(folder: RunFolder) -> Html:
    rows = [[name, shorten(value, 300)] for name, value in folder.read_versions().items()]
    config = el("pre", shorten(folder.read_config(), 40_000), tabindex="0")
    versions = fold("Versions", table(["", "version"], rows))
    return join([fold("Config, as resolved", config), versions])


def _section(config: Record, name: str) -> dict[str, Any]:
    section = config.get(name)
    return section if isinstance(section, dict) else {}


def _last(metrics: Sequence[Record], key: str) -> float | None:
    return next((row[key] for row in reversed(metrics) if row.get(key) is not None), None)


def write_runs_report(run_dirs: Sequence[str | Path], out: str | Path) -> Path:
    """Write one page on several runs and return its path.

    Raises RunFolderError if one of them is not a run, or `out` cannot be written.
    """
    runs = [RunReader(path) for path in run_dirs]
    configs = [_flatten(run.config()) for run in runs]
    paths = [run.folder.path for run in runs]
    if len({path.resolve() for path in paths}) < len(paths):
        raise RunFolderError("the same run folder is given twice; name each run once")
    names = distinct_names(paths)
    for run in runs:
        run.refresh()
    evaluations = [run.folder.read_evaluations() for run in runs]
    sections = [
        ("Results", _compared_results(names, evaluations)),
        ("Curves", _compared_curves(names, [run.metrics for run in runs])),
        ("What differs in the configs", _config_differences(names, configs)),
    ]
    title = f"{len(runs)} runs compared"
    header = el("header", el("h1", title), note(", ".join(names)))
    write_atomic(Path(out), page(title, header, sections))
    return Path(out)


def _compared_results(names: Sequence[str], evaluations: Sequence[Sequence[EvaluationResult]]) -> Html:
    labels = list(dict.fromkeys(result.label for found in evaluations for result in found))
    if not labels:
        return empty("None of these runs has been evaluated.")
    parts = []
    for label in labels:
        rows: list[tuple[str, EvaluationResult, int]] = []
        starts: list[Any] = []
        for color, (name, found) in enumerate(zip(names, evaluations, strict=True)):
            results = [result for result in found if result.label == label]
            for result in training_ends(results) or results:
                if result.name == "after":
                    rows.append((name, result, color % 7))
                elif result.name != "before":
                    rows.append((f"{name}, {result.name}", result, color % 7))
                elif result.pass_at_k not in starts:  # runs from one checkpoint share their start
                    starts.append(result.pass_at_k)
                    rows.append((f"{name}, before", result, 7 if len(starts) == 1 else color % 7))
        if len(starts) == 1 and len(names) > 1:
            rows = [("before" if r.name == "before" else name, r, c) for name, r, c in rows]
        table_of = pass_at_k_table([(name, result) for name, result, _ in rows])
        parts += [el("h3", label), el("div", pass_at_k_plot(rows), class_="plots wide"), table_of]
    return join(parts)


def _compared_curves(names: Sequence[str], metrics: Sequence[Sequence[Record]]) -> Html:
    titles = {
        "reward/mean": "Reward",
        "groups/all_incorrect": "Groups without a correct completion",
        "groups/all_correct": "Groups with only correct completions",
    }
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


def _config_differences(names: Sequence[str], configs: Sequence[Record]) -> Html:
    rows = []
    for key in dict.fromkeys(key for config in configs for key in config if key != "run_dir"):
        values = [shorten(config.get(key, "–"), 200) for config in configs]
        if len(set(values)) > 1:
            rows.append([key, *values])
    return table(["setting", *names], rows) if rows else empty("Nothing but the folder.")


def _flatten(values: Record, prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        flat |= _flatten(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return flat
