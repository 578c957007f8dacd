"""One HTML page that shows several runs side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mm_agrae.errors import RunFolderError
from mm_agrae.run.files import write_atomic
from mm_agrae.run.records import EvaluationResult
from mm_agrae.view.components import CURVES, pass_at_k_plot, pass_at_k_table, series
from mm_agrae.view.page import Html, el, empty, join, note, page, shorten, table
from mm_agrae.view.plots import Line, plot, thin
from mm_agrae.view.runs import Record, RunReader, distinct_names, training_ends


def write_runs_report(run_dirs: Sequence[str | Path], out: str | Path) -> Path:
    """Write one page on several runs and return its path.

    Raises RunFolderError if one of them is not a run, or `out` cannot be written.
    """
    runs = [RunReader(path) for path in run_dirs]
    configs = [_flatten(run.config()) for run in runs]
    names = _names(runs)
    for run in runs:
        run.refresh()
    sections = [
        ("Results", _results(names, [run.folder.read_evaluations() for run in runs])),
        ("Curves", _curves(names, [run.metrics for run in runs])),
        ("What differs in the configs", _config_differences(names, configs)),
    ]
    title = f"{len(runs)} runs compared"
    header = el("header", el("h1", title), note(", ".join(names)))
    write_atomic(Path(out), page(title, header, sections))
    return Path(out)


def _names(runs: Sequence[RunReader]) -> list[str]:
    paths = [run.folder.path for run in runs]
    if len({path.resolve() for path in paths}) < len(paths):
        raise RunFolderError("the same run folder is given twice; name each run once")
    return distinct_names(paths)


def _results(names: Sequence[str], evaluations: Sequence[Sequence[EvaluationResult]]) -> Html:
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
        parts.append(el("h3", label))
        parts.append(el("div", pass_at_k_plot(rows), class_="plots wide"))
        parts.append(pass_at_k_table([(name, result) for name, result, _ in rows]))
    return join(parts)


def _curves(names: Sequence[str], metrics: Sequence[Sequence[Record]]) -> Html:
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
