"""One HTML page a run: what was learnt, how it went, and what the model wrote.

The page is one file that can be mailed: pictures are inside, nothing is fetched (see `page`).
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from mm_agrae.errors import RunFolderError
from mm_agrae.evaluate import paired_difference
from mm_agrae.page import (
    Html,
    Line,
    Points,
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
from mm_agrae.records import EvaluationResult, RunFolder, clean_text, write_atomic

GROUPS_SHOWN = 6
COMPLETIONS_SHOWN = 16
TEXT_LIMIT = 2400  # characters of one completion
PICTURE_BUDGET = 1_200_000  # characters of all pictures of a page

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
        ("Last step", _last_groups(folder, pictures) if trained else None),
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
        plots = [_pass_at_k_plot([(r.name, r, colors.get(r.name, 0)) for r in shown])]
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
            _pass_at_k_table([(result.name, result) for result in results]),
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
    verdicts = [_verdicts(folder, result) for result in ends]
    tiles = []
    for k in _first_and_last_k(ends[-1]):
        found = [result.pass_at_k[k] for result in ends if k in result.pass_at_k]
        ranges = " → ".join(map(span, found))
        values = percent(*(interval.mean for interval in found))
        tiles.append(tile(f"pass@{k}{when}", values, ranges, _gain(verdicts, k)))
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


def _gain(verdicts: Sequence[dict[str, list[bool]]], k: int) -> str:
    """The paired difference, where both evaluations sampled the same problems equally often."""
    if len(verdicts) < 2:
        return ""
    shared = [key for key in verdicts[0] if key in verdicts[1]]
    for found in verdicts:
        sizes = {len(found[key]) for key in shared}
        if len(sizes) != 1 or min(sizes) < k:
            return ""
    before_PN, after_PN = (np.array([found[key] for key in shared]) for found in verdicts)
    gain = paired_difference(before_PN, after_PN, k)
    return f"{100 * gain.mean:+.1f} points ({100 * gain.low:+.1f} to {100 * gain.high:+.1f})"


def _samples(folder: RunFolder, result: EvaluationResult) -> Iterable[Row]:
    try:
        yield from folder.read_samples(result)
    except RunFolderError:  # missing or damaged: the report shows what there is
        return


def _verdicts(folder: RunFolder, result: EvaluationResult) -> dict[str, list[bool]]:
    """Right or wrong of every sample by problem; the greedy ones only if there are no others."""
    sampled: dict[str, list[bool]] = {}
    greedy: dict[str, list[bool]] = {}
    for row in _samples(folder, result):
        kind = greedy if row.get("sample") == -1 else sampled
        kind.setdefault(str(row.get("example_id")), []).append(bool(row.get("success")))
    return sampled or greedy


def _pass_at_k_plot(results: Sequence[tuple[str, EvaluationResult, int]]) -> Html:
    """One curve for each (name, result, colour); those from before training are dashed."""
    lines = []
    for name, result, color in results:
        found = sorted(result.pass_at_k.items())
        means = [(k, interval.mean) for k, interval in found]
        band = [(k, interval.low, interval.high) for k, interval in found]
        lines.append(Line(name, means, band, color, dashed=result.name == "before"))
    caption = "the chance that one of k samples is right"
    return plot("pass@k", lines, note=caption, x_name="k", shares=True, log2=True)


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


def _pass_at_k_table(results: Sequence[tuple[str, EvaluationResult]]) -> Html:
    ks = sorted({k for _, result in results for k in result.pass_at_k})
    rows = [
        [name, *(with_interval(r.pass_at_k.get(k)) for k in ks), with_interval(r.greedy)]
        for name, r in results
    ]
    return table(["%", *(f"pass@{k}" for k in ks), "greedy"], rows)


def _group_tables(ends: Sequence[EvaluationResult]) -> list[Html]:
    """pass@1 and pass@n by the kinds of problems."""
    tables = []
    columns = [(k, result) for k in _first_and_last_k(ends[-1]) for result in ends]
    for key, groups in ends[-1].groups.items():
        rows = []
        for value, group in groups.items():
            cells = []
            for k, result in columns:
                found = result.groups.get(key, {}).get(value, {}).get("pass_at_k", {})
                cells.append(with_interval(found.get(k)))
            rows.append([value, group["problems"], *cells])
        header = [key, "problems", *(f"pass@{k} {result.name}" for k, result in columns)]
        tables.append(fold(f"By {key} ({len(groups)})", table(header, rows)))
    return tables


# -- how it went

# fmt: off
# Title, note, {metric: label}, options of `plot`.
_CURVES: list[tuple[str, str, dict[str, str], tuple[str, ...]]] = [
    ("Success", "share of right completions",
     {"success/mean": "success"}, ("shares", "smooth")),
    ("ω", "mean reward of the whole step; low: easy groups weigh more, high: hard ones",
     {"advantage/omega": "ω"}, ("smooth",)),
    ("Groups", "by how many of their completions are right",
     {"groups/all_wrong": "none", "groups/mixed": "some", "groups/all_right": "all"},
     ("stacked", "shares")),
    ("Entropy", "nats a token",
     {"policy/entropy": "entropy"}, ("smooth", "zero")),
    ("Length", "tokens a completion",
     {"completions/mean_tokens": "mean", "completions/max_tokens": "longest"}, ("smooth",)),
    ("Truncated", "completions cut off by the token limit",
     {"completions/truncated": "truncated"}, ("smooth", "shares", "zero")),
    ("Right completions", "in the step's batch",
     {"completions/right": "right"}, ("smooth",)),
    ("Mean |A|", "how strongly the step pushes",
     {"advantage/mean_abs": "|A|"}, ("smooth", "zero")),
    ("ΣA", "negative: paths that were not sampled gain (Theorem 1)",
     {"advantage/sum": "ΣA"}, ("smooth",)),
    ("Skipped groups", "without signal, left out of the update",
     {"groups/no_signal": "no signal"}, ("smooth", "zero")),
    ("Gradient norm", "before clipping",
     {"update/grad_norm": "norm"}, ("smooth", "zero")),
    ("Loss", "", {"update/loss": "loss"}, ("smooth",)),
    ("Learning rate", "", {"update/learning_rate": "rate"}, ("zero",)),
    ("Clipped tokens", "whose ratio left the trust region",
     {"policy/clip_low": "below", "policy/clip_high": "above"}, ("smooth", "shares", "zero")),
    ("Largest ratio", "of new to old policy, of one token",
     {"policy/ratio_max": "ratio"}, ()),
    ("KL", "nats a token",
     {"policy/approx_kl": "from the sampling policy",
      "policy/kl_reference": "from the starting policy"}, ("smooth", "zero")),
    ("Reward errors", "completions that a reward function failed on",
     {"reward/errors": "errors"}, ("zero",)),
    ("Peak memory", "MB", {"memory/peak_mb": "resident"}, ("zero",)),
]
# fmt: on
_COLORS = {"none": 3, "some": 1, "all": 2}
_STAGES = (
    *("rollout", "reward", "advantage", "update", "log", "prompts"),
    *("evaluate", "checkpoint"),
)


def _curves(metrics: Sequence[Row]) -> Html:
    if not metrics:
        return empty("No step has been logged yet.")
    keys = sorted({key for row in metrics for key in row if key.startswith("reward/")})
    parts = [k for k in keys if k not in ("reward/mean", "reward/std", "reward/errors")]
    reward = {"reward/mean": "reward"} | {key: key.removeprefix("reward/") for key in parts}
    first = ("Reward", "weighted sum and its parts, step means", reward, ("smooth",))
    figures, constant = [], []
    for title, caption, names, options in (first, *_CURVES):
        lines = []
        for color, (key, label) in enumerate(names.items()):
            lines.append(Line(label, _series(metrics, key), color=_COLORS.get(label, color)))
        values = {y for line in lines for _, y in line.points}
        if len(metrics) > 1 and len(values) == 1:
            constant.append(f"{title} {number(values.pop())}")
        elif values:
            if max(values) > 1:  # the trainer counts instead
                options = tuple(option for option in options if option != "shares")
            figures.append(plot(title, lines, note=caption, **dict.fromkeys(options, True)))  # type: ignore[arg-type]
    same = note(f"The same at every step: {'; '.join(constant)}.") if constant else None
    return join([el("div", *figures, *_speed(metrics), class_="plots"), same])


def _speed(metrics: Sequence[Row]) -> list[Html]:
    figures = []
    # Evaluations and checkpoints come now and then and would dwarf the rest.
    stages = [
        Line(stage, _series(metrics, f"seconds/{stage}"), color=color)
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
        rates.append(Line(label, _series(rows, "rate"), color=len(rates)))
    if any(line.points for line in rates):
        caption = "completion tokens"
        figures.append(plot("Tokens a second", rates, note=caption, smooth=True, zero=True))
    return figures


def _series(metrics: Sequence[Row], key: str) -> Points:
    """(step, value) wherever there is a number that can be drawn."""
    points = []
    for row in metrics:
        step, value = row.get("step"), row.get(key)
        if isinstance(step, int | float) and isinstance(value, int | float) and abs(value) < 1e100:
            points.append((float(step), float(value)))
    return thin(points)


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
    verdicts = [_verdicts(folder, result) for result in ends]
    old, new = (
        {key: sum(found) / len(found) for key, found in verdict.items()} for verdict in verdicts
    )
    shared = [key for key in old if key in new]
    gained = [k for k in sorted(shared, key=lambda k: (old[k], -new[k])) if new[k] > old[k]]
    lost = [k for k in sorted(shared, key=lambda k: new[k] - old[k]) if new[k] < old[k]]
    left = [k for k in shared if old[k] == new[k] == 0]
    # For each: whether to show a right completion before and after.
    chosen = dict.fromkeys(gained[:3], (False, True)) | dict.fromkeys(lost[:1], (True, False))
    chosen |= dict.fromkeys(left[:1], (False, False))
    if not chosen:
        return empty("The samples of the evaluations were not kept.")
    texts = [_representatives(folder, result, set(chosen)) for result in ends]
    cards = []
    for key, wanted in chosen.items():
        columns = []
        for result, verdict, text, want in zip(ends, verdicts, texts, wanted, strict=True):
            row = text[key].get(want) or next(iter(text[key].values()))
            count = f"{result.name}: {sum(verdict[key])} of {len(verdict[key])} right "
            title = el("h4", count, _verdict(bool(row.get("success"))))
            columns.append(el("div", title, _completion(row.get("completion"), 2 * TEXT_LIMIT)))
        cards.append(el("article", _problem(row, pictures), *columns, class_="card traces"))
    about = "Problems that training solved, one it lost and one it left, as far as there are any."
    return join([note(about), *cards])


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
        return empty("No rollouts were kept.")
    groups: dict[tuple[int, int], list[Row]] = {}
    for row in folder.read_rollouts(steps[-1]):
        groups.setdefault((row["draw"], row["prompt_index"]), []).append(row)
    kinds: dict[str, list[list[Row]]] = {"mixed": [], "all wrong": [], "all right": []}
    for group in groups.values():
        right = sum(row["success"] for row in group)
        kind = "all wrong" if not right else "all right" if right == len(group) else "mixed"
        kinds[kind].append(group)
    # Mixed groups teach; one of each other kind shows what they look like.
    others = kinds["all wrong"][:1] + kinds["all right"][:1]
    rest = kinds["all wrong"][1:] + kinds["all right"][1:]
    shown = (kinds["mixed"][: GROUPS_SHOWN - len(others)] + others + rest)[:GROUPS_SHOWN]
    counts = ", ".join(f"{len(found):,} {kind}" for kind, found in kinds.items())
    text = (
        f"Step {steps[-1]:,}: {len(groups):,} groups ({counts}), {len(shown)} shown. A is the "
        "advantage before rescaling → after the sample level → final."
    )
    return join([note(text), *(_group_card(group, pictures) for group in shown)])


def _group_card(group: Sequence[Row], pictures: Pictures) -> Html:
    right = sum(row["success"] for row in group)
    kind = {0: "wrong", len(group): "right"}.get(right, "")
    title = el("h4", f"{right} of {len(group)} right", class_=kind)
    completions = [_completion_row(row) for row in group[:COMPLETIONS_SHOWN]]
    hidden = len(group) - len(completions)
    more = note(f"and {hidden} more") if hidden else None
    body = el("div", title, *completions, more)
    return el("article", _problem(group[0], pictures), body, class_="card group")


def _completion_row(row: Row) -> Html:
    """One line that opens to the whole completion."""
    levels = [row["advantage_before"], row["advantage_sample_level"], row["advantage"]]
    advantages = " → ".join("–" if level is None else f"{level:+.2f}" for level in levels)
    answer = clean_text(row["completion"]).rpartition("</think>")[2]
    ending = answer.strip()[-50:].replace("\n", " ")
    details = [f"{shorten(part, 100)} {number(value)}" for part, value in row["parts"].items()]
    details.append(f"finish: {shorten(row['finish_reason'], 300)}")
    if row["entropy"] is not None:
        details.append(f"entropy {number(row['entropy'])} nats")
    if row["error"]:
        details.append(f"error: {shorten(row['error'], 300)}")
    return el(
        "details",
        el(
            "summary",
            _verdict(row["success"]),
            el("span", f"reward {number(row['reward'])}"),
            el("span", f"A {advantages}"),
            el("span", f"{row['tokens']} tokens", class_="muted"),
            el("span", f"…{ending}", class_="ending muted", dir="auto"),
        ),
        note(" · ".join(details)),
        _completion(row["completion"], TEXT_LIMIT),
        class_="completion",
    )


def _problem(row: Row, pictures: Pictures) -> Html:
    shown = [pictures.show(path) for path in list(row.get("images") or [])[:4]]
    question = clean_text(row.get("question"))
    if shown:
        question = question.replace("<image>", "").strip()
    gold = el("b", shorten(row.get("answer"), 300))
    return el(
        "div",
        *shown,
        el("p", shorten(question, TEXT_LIMIT), class_="question", dir="auto"),
        el("p", el("span", "answer ", class_="muted"), gold, dir="auto"),
        class_="problem",
    )


def _verdict(success: bool) -> Html:
    text, kind = ("✓ right", "right") if success else ("✗ wrong", "wrong")
    return el("span", text, class_=f"verdict {kind}")


def _completion(text: object, limit: int) -> Html:
    """The reasoning set apart from the answer after it."""
    thought, mark, answer = shorten(text, limit).partition("</think>")
    body = (
        [el("span", thought + mark, class_="thought"), answer] if mark else [thought or "(empty)"]
    )
    return el("pre", *body, dir="auto", tabindex="0")


@dataclass
class Pictures:
    """The run's pictures as data URIs: small ones as they are, large ones made smaller."""

    folder: RunFolder
    spent: int = 0

    def show(self, relative: object) -> Html:
        path = self.folder.image_path(str(relative))
        if path is None:
            return empty("picture missing")
        try:
            kind, data = _small_picture(path)
        except Exception:  # Pillow raises many kinds for a damaged file
            return empty("picture damaged")
        source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
        if self.spent + len(source) > PICTURE_BUDGET:
            return empty("picture left out, to keep the page small")
        self.spent += len(source)
        return el("img", src=source, alt="picture of the problem")


def _small_picture(path: Path) -> tuple[str, bytes]:
    from PIL import Image

    data = path.read_bytes()
    with Image.open(path, formats=["PNG"]) as image:
        if len(data) <= 40_000 and max(image.size) <= 1024:
            image.load()  # raises if it is damaged
            return "png", data
        rgba = image.convert("RGBA")
    rgba.thumbnail((512, 512))
    flat = Image.new("RGB", rgba.size, "white")
    flat.paste(rgba, mask=rgba)
    buffer = io.BytesIO()
    flat.save(buffer, "JPEG", quality=75)
    return "jpeg", buffer.getvalue()


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
    """Folder names, with as many parents as it takes to tell them apart."""
    parts = [run.path.resolve().parts for run in runs]
    if len(set(parts)) < len(parts):
        raise RunFolderError("the same run folder is given twice; name each run once")
    depth = 1
    while len({part[-depth:] for part in parts}) < len(parts):
        depth += 1
    return ["/".join(part[-depth:]) for part in parts]


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
        parts.append(el("div", _pass_at_k_plot(rows), class_="plots wide"))
        parts.append(_pass_at_k_table([(name, result) for name, result, _ in rows]))
    return join(parts)


def _compared_curves(names: Sequence[str], metrics: Sequence[Sequence[Row]]) -> Html:
    titles = {"reward/mean": "Reward", "groups/all_wrong": "Groups without a right completion",
              "groups/all_right": "Groups with right completions only"}  # fmt: skip
    notes = {}
    for title, caption, keys, options in _CURVES:
        key = next(iter(keys))
        if "stacked" not in options and (len(keys) == 1 or title == "Length"):
            titles[key], notes[key] = title, caption
    figures = []
    for key, title in titles.items():
        series = [_series(rows, key) for rows in metrics]
        lines = [Line(name, series[i], color=i % 7) for i, name in enumerate(names)]
        if len({y for points in series for _, y in points}) > 1:
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
