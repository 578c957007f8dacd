"""Parts of pages that show a run: curves, pass@k, the groups of a step, traces side by side.

The report and the demo are made of the same parts.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mm_agrae.run.files import clean_text
from mm_agrae.run.folder import RunFolder
from mm_agrae.run.records import EvaluationResult
from mm_agrae.view.page import (
    Html,
    Line,
    Points,
    el,
    empty,
    note,
    number,
    percent,
    plot,
    shorten,
    table,
    thin,
    with_interval,
)

TEXT_LIMIT = 2400  # characters of one completion
PICTURE_BUDGET = 1_200_000  # characters of all pictures of a page

Row = Mapping[str, Any]


# -- curves

# fmt: off
# Title, note, {metric: label}, options of `plot`.
CURVES: list[tuple[str, str, dict[str, str], tuple[str, ...]]] = [
    ("Success", "share of right completions",
     {"success/mean": "success"}, ("shares", "smooth")),
    ("ω", "mean reward of the whole step; low: easy groups weigh more, high: hard ones",
     {"advantage/omega": "ω"}, ("smooth",)),
    ("Groups", "by how many of their completions are right",
     {"groups/all_incorrect": "none", "groups/mixed": "some", "groups/all_correct": "all"},
     ("stacked", "shares")),
    ("Entropy", "nats a token",
     {"policy/entropy": "entropy"}, ("smooth", "zero")),
    ("Length", "tokens a completion",
     {"completions/mean_tokens": "mean", "completions/max_tokens": "longest"}, ("smooth",)),
    ("Truncated", "completions cut off by the token limit",
     {"completions/truncated": "truncated"}, ("smooth", "shares", "zero")),
    ("Right completions", "in the step's batch",
     {"completions/correct": "right"}, ("smooth",)),
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


FIRST_CURVES = 8  # the ones shown without asking


def curve_figures(
    metrics: Sequence[Row], *, reach: float | None = None, mark: int | None = None
) -> tuple[list[Html], str]:
    """A plot of each group of metrics that changes, and in words those that do not.

    The first FIRST_CURVES tell most. reach: how many steps the moving average takes in on either
    side (None: by the length of the run). mark: a step to mark, with the values there.
    """
    keys = sorted({key for row in metrics for key in row if key.startswith("reward/")})
    parts = [k for k in keys if k not in ("reward/mean", "reward/std", "reward/errors")]
    reward = {"reward/mean": "reward"} | {key: key.removeprefix("reward/") for key in parts}
    first = ("Reward", "weighted sum and its parts, step means", reward, ("smooth",))
    marked = next((row for row in metrics if mark is not None and row.get("step") == mark), {})
    figures, constant = [], []
    for title, caption, names, options in (first, *CURVES):
        points = {key: series(metrics, key) for key in names}
        values = {y for found in points.values() for _, y in found}
        if len(metrics) > 1 and len(values) == 1:
            constant.append(f"{title} {number(values.pop())}")
        elif values:
            if max(values) > 1:  # the trainer counts instead
                options = tuple(option for option in options if option != "shares")
            show = percent if "shares" in options else number
            lines = [
                Line(
                    label,
                    thin(points[key]),
                    color=_COLORS.get(label, color),
                    value="" if marked.get(key) is None else show(marked[key]),
                )
                for color, (key, label) in enumerate(names.items())
            ]
            chosen = dict.fromkeys(options, True)
            figures.append(plot(title, lines, note=caption, reach=reach, mark=mark, **chosen))  # type: ignore[arg-type]
    return figures, f"The same at every step: {'; '.join(constant)}." if constant else ""


def series(metrics: Sequence[Row], key: str) -> Points:
    """(step, value) wherever there is a number that can be drawn."""
    points = []
    for row in metrics:
        step, value = row.get("step"), row.get(key)
        if isinstance(step, int | float) and isinstance(value, int | float) and abs(value) < 1e100:
            points.append((float(step), float(value)))
    return points


# -- pass@k


def pass_at_k_plot(results: Sequence[tuple[str, EvaluationResult, int]]) -> Html:
    """One curve for each (name, result, colour); those from before training are dashed."""
    lines = []
    for name, result, color in results:
        found = sorted(result.pass_at_k.items())
        means = [(k, interval.mean) for k, interval in found]
        band = [(k, interval.low, interval.high) for k, interval in found]
        lines.append(Line(name, means, band, color, dashed=result.name == "before"))
    caption = "the chance that one of k samples is right"
    return plot("pass@k", lines, note=caption, x_name="k", shares=True, log2=True)


def pass_at_k_table(results: Sequence[tuple[str, EvaluationResult]]) -> Html:
    ks = sorted({k for _, result in results for k in result.pass_at_k})
    rows = [
        [name, *(with_interval(r.pass_at_k.get(k)) for k in ks), with_interval(r.greedy)]
        for name, r in results
    ]
    return table(["%", *(f"pass@{k}" for k in ks), "greedy"], rows)


# -- what the model wrote


ADVANTAGES = "A is the advantage before rescaling → after the sample level → after the group level."


def group_card(
    rows: Sequence[Row],
    pictures: Pictures,
    *,
    completions: int | None = None,
    limit: int = TEXT_LIMIT,
    opened: Collection[int] = (),
) -> Html:
    """The completions of one prompt beside its pictures, question and gold answer.

    rows: as `RunFolder.read_rollouts` gives them. At most `completions` of them are shown, each
    shortened to `limit` characters; `opened` are places in `rows` whose text is open at first.
    """
    right = sum(bool(row["success"]) for row in rows)
    kind = {0: "wrong", len(rows): "right"}.get(right, "")
    title = el("h4", f"{right} of {len(rows)} right", class_=kind)
    shown = rows[:completions]
    lines = [_completion_row(row, limit, place in opened) for place, row in enumerate(shown)]
    hidden = len(rows) - len(shown)
    more = note(f"and {hidden} more") if hidden else None
    draw = f", resample {rows[0]['resample_round']}" if rows[0]["resample_round"] else ""
    place = f"prompt {rows[0]['prompt_index']}{draw} · {shorten(rows[0]['example_id'], 100)}"
    problem = problem_part(rows[0], pictures, el("p", place, class_="muted small"))
    return el("article", problem, el("div", title, *lines, more), class_="card group")


def _completion_row(row: Row, limit: int, is_open: bool) -> Html:
    """One line that opens to the whole completion."""
    levels = [row["advantage_before"], row["advantage_sample_level"], row["advantage"]]
    advantages = " → ".join("–" if level is None else f"{level + 0.0:+.2f}" for level in levels)
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
            verdict(row["success"]),
            el("span", f"reward {number(row['reward'])}"),
            el("span", f"A {advantages}", title=ADVANTAGES),
            el("span", f"{row['tokens']} tokens", class_="muted"),
            el("span", "cut off", class_="wrong") if row["finish_reason"] == "length" else None,
            el("span", "verifier failed", class_="wrong") if row["error"] else None,
            el("span", f"…{ending}", class_="ending muted", dir="auto"),
        ),
        note(" · ".join(details)),
        completion_text(row["completion"], limit),
        class_="completion",
        open="" if is_open else None,
    )


def trace_card(
    row: Row, pictures: Pictures, columns: Sequence[tuple[str, Row]], limit: int = 2 * TEXT_LIMIT
) -> Html:
    """One problem and, side by side, what each of several models wrote: (title, sample) pairs."""
    texts = [
        el(
            "div",
            el("h4", f"{title} ", verdict(bool(sample.get("success")))),
            completion_text(sample.get("completion"), limit),
        )
        for title, sample in columns
    ]
    return el("article", problem_part(row, pictures), *texts, class_="card traces")


def problem_part(row: Row, pictures: Pictures, *more: Html) -> Html:
    """Pictures, question and gold answer."""
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
        *more,
        class_="problem",
    )


def verdict(success: bool) -> Html:
    text, kind = ("✓ right", "right") if success else ("✗ wrong", "wrong")
    return el("span", text, class_=f"verdict {kind}")


def completion_text(text: object, limit: int) -> Html:
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
