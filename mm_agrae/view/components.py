"""What the report and the demo both show of a run: curves, pass@k, difficulty, groups, traces side by side."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from mm_agrae.errors import RunFolderError
from mm_agrae.evaluation.difficulty import tables
from mm_agrae.grading.extraction import boxes
from mm_agrae.run.files import clean_text
from mm_agrae.run.folder import RunFolder
from mm_agrae.run.problems import problem_success
from mm_agrae.run.records import EvaluationResult, Interval, sampled_success
from mm_agrae.view.page import Html, el, empty, join, note, number, percent, shorten, table, with_interval
from mm_agrae.view.plots import Line, Points, plot, thin
from mm_agrae.view.replay import StepReplay
from mm_agrae.view.runs import Record

TEXT_LIMIT = 2400  # characters of one completion
IMAGE_BUDGET = 1_200_000  # characters of all images of a page, as data URIs
PROBLEMS_SHOWN = 40


# fmt: off
# Title, note, {metric: label}, options of `plot`.
CURVES: list[tuple[str, str, dict[str, str], tuple[str, ...]]] = [
    ("Success", "share of correct completions",
     {"success/mean": "success"}, ("shares", "smooth")),
    ("ω", "mean reward of the step; when low, easy groups weigh more, when high, hard ones",
     {"advantage/omega": "ω"}, ("smooth",)),
    ("Groups", "by how many of their completions are correct",
     {"groups/all_incorrect": "none", "groups/mixed": "some", "groups/all_correct": "all"},
     ("stacked", "shares")),
    ("Entropy", "nats per token",
     {"policy/entropy": "entropy"}, ("smooth", "zero")),
    ("Corrected", "share of all completions, by what became of them; right: correct afterwards",
     {"correction/reflect": "reflected", "correction/answer": "answer added", "correction/solution": "solution",
      "correction/skipped": "left", "correction/right": "right"}, ("smooth", "shares", "zero")),
    ("Problems and variants", "share of correct completions",
     {"variants/success_original": "as they are", "variants/success": "variants"}, ("shares", "smooth")),
    ("Difficulty", "mean D of the step's problems, from 1 (easy) to 9",
     {"variants/difficulty": "D"}, ("smooth",)),
    ("Length", "tokens per completion",
     {"completions/mean_tokens": "mean", "completions/max_tokens": "longest"}, ("smooth",)),
    ("Truncated", "completions cut off by the token limit",
     {"completions/truncated": "truncated"}, ("smooth", "shares", "zero")),
    ("Correct completions", "in the step's batch",
     {"completions/correct": "correct"}, ("smooth",)),
    ("Mean |A|", "how strong the update signal is",
     {"advantage/mean_abs": "|A|"}, ("smooth", "zero")),
    ("ΣA", "if negative, what was not sampled becomes more likely (Theorem 1)",
     {"advantage/sum": "ΣA"}, ("smooth",)),
    ("Skipped groups", "all advantages zero, left out of the update",
     {"groups/no_signal": "no signal"}, ("smooth", "zero")),
    ("Gradient norm", "before clipping",
     {"update/grad_norm": "norm"}, ("smooth", "zero")),
    ("Loss", "", {"update/loss": "loss"}, ("smooth",)),
    ("Learning rate", "", {"update/learning_rate": "rate"}, ("zero",)),
    ("Clipped tokens", "whose ratio left the clip range",
     {"policy/clip_low": "below", "policy/clip_high": "above"}, ("smooth", "shares", "zero")),
    ("Largest ratio", "new to old policy, over all tokens",
     {"policy/ratio_max": "ratio"}, ()),
    ("KL", "nats per token",
     {"policy/approx_kl": "from the sampling policy",
      "policy/kl_reference": "from the starting policy"}, ("smooth", "zero")),
    ("Reward errors", "completions a reward function failed on",
     {"reward/errors": "errors"}, ("zero",)),
    ("Peak memory", "MB",
     {"memory/peak_mb": "resident", "memory/peak_gpu_mb": "GPU"}, ("zero",)),
]
# fmt: on
_COLORS = {"none": 3, "some": 1, "all": 2}
FIRST_CURVES = 8
"""How many of the curves, the most telling ones, the demo shows unfolded."""


def curve_figures(
    metrics: Sequence[Record], *, reach: float | None = None, mark: int | None = None
) -> tuple[list[Html], Html | None]:
    """A plot of each group of metrics that changes, and a note on those that do not, if any.

    reach: steps on either side included in the moving average (None: by the length of the run).
    mark: a step to mark, with the values there.
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
            if max(values) > 1:  # counts, not shares
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
    same = f"The same at every step: {'; '.join(constant)}."
    return figures, note(same) if constant else None


def series(metrics: Sequence[Record], key: str) -> Points:
    """(step, value) of every record with a number that can be drawn."""
    points = []
    for row in metrics:
        step, value = row.get("step"), row.get(key)
        if isinstance(step, int | float) and isinstance(value, int | float) and abs(value) < 1e100:
            points.append((float(step), float(value)))
    return points


def interval_line(label: str, found: Sequence[tuple[float, Interval]], color: int, dash: str = "") -> Line:
    """A curve of means, with their intervals as its band."""
    band = [(x, interval.low, interval.high) for x, interval in found]
    return Line(label, [(x, interval.mean) for x, interval in found], band, color, dash)


def pass_at_k_plot(results: Sequence[tuple[str, EvaluationResult, int]]) -> Html:
    """One curve for each (name, result, colour); evaluations before training are dashed."""
    lines = [
        interval_line(name, sorted(r.pass_at_k.items()), color, "dashed" * (r.name == "before"))
        for name, r, color in results
    ]
    caption = "the chance that at least one of k samples is correct"
    return plot("pass@k", lines, note=caption, x_name="k", shares=True, log2=True)


def pass_at_k_table(results: Sequence[tuple[str, EvaluationResult]]) -> Html:
    ks = sorted({k for _, result in results for k in result.pass_at_k})
    rows = [[name, *(with_interval(r.pass_at_k.get(k)) for k in ks), with_interval(r.greedy)] for name, r in results]
    return table(["%", *(f"pass@{k}" for k in ks), "greedy"], rows)


ADVANTAGES = "A is the advantage before rescaling → after the sample level → after the group level."


def measured_difficulty(folder: RunFolder) -> list[Html]:
    """The tables of `mm-agrae difficulty`; none if it was not run here. Raises RunFolderError if damaged."""
    parts: list[Html] = []
    for name, result in folder.read_difficulty().items():
        parts += [el("h3", name), note("One greedy reply to each item. Ranges: 95 % bootstrap intervals over items.")]
        try:
            for title, header, rows in tables(result):
                parts += [el("h4", title), table(header, rows)]
        except (KeyError, TypeError, ValueError) as error:
            raise RunFolderError(f"{folder.path}/difficulty.json: damaged ({error!r}); delete it") from None
    return parts


def problem_table(folder: RunFolder) -> tuple[str, Html]:
    """Title and table of the problems drawn more than once, hardest first; of all if none was.

    Raises RunFolderError if no rollouts were kept, or some are damaged.
    """
    found = sorted(problem_success(folder.path).values(), key=lambda p: (-p.difficulty, -p.completions.total()))
    again = [problem for problem in found if len(problem.completions) > 1]
    problems, which = (again, " drawn more than once") if again else (found, ", each drawn once")
    rows = []
    for problem in problems[:PROBLEMS_SHOWN]:
        steps = sorted(problem.completions)
        course = " → ".join(f"{problem.correct[step]}/{problem.completions[step]}" for step in steps)
        cells = (el("span", text, class_="long") for text in (course, ", ".join(map(str, steps))))
        rows.append([problem.example_id, f"{problem.difficulty:.2f}", *cells])
    title = f"Problems{which}: {len(rows):,} hardest of {len(problems):,} (D 9: never solved)"
    return title, table(["problem", "D", "correct, step by step", "steps"], rows)


def group_card(
    rows: Sequence[Record],
    images: EmbeddedImages,
    *,
    completions: int | None = None,
    limit: int = TEXT_LIMIT,
    opened: Collection[int] = (),
    replay: StepReplay | None = None,
) -> Html:
    """The completions of one prompt next to its images, question and gold answer.

    rows: as returned by `RunFolder.read_rollouts`. At most `completions` of them are shown, each
    shortened to `limit` characters; `opened` are indices into `rows` whose text is unfolded. `replay`: of their step.
    """
    correct = sum(map(sampled_success, rows))
    kind = {0: "incorrect", len(rows): "correct"}.get(correct, "")
    title = el("h4", f"{correct} of {len(rows)} correct", class_=kind)
    shown = rows[:completions]
    lines = [_completion_row(row, limit, index in opened) for index, row in enumerate(shown)]
    hidden = len(rows) - len(shown)
    more = note(f"and {hidden} more") if hidden else None
    round_ = rows[0]["resample_round"]
    resampled = f", resample round {round_}" if round_ else ""
    variant = f" · variant: {shorten(rows[0]['variant'], 100)}" if rows[0].get("variant") else ""
    origin = f"prompt {rows[0]['prompt_index']}{resampled} · {shorten(rows[0]['example_id'], 100)}{variant}"
    problem = problem_part(rows[0], images, el("p", origin, class_="muted small"))
    if replay is not None and rows[0]["advantage"] is not None:
        summary = el("summary", el("span", "From reward to loss"))
        lines.append(el("details", summary, replay.figure(rows, completions), class_="completion"))
    return el("article", problem, el("div", title, *lines, more), class_="card group")


def _completion_row(row: Record, limit: int, is_open: bool) -> Html:
    """One line that unfolds to the whole completion."""
    levels = [row["advantage_before"], row["advantage_sample_level"], row["advantage"]]
    advantages = " → ".join("–" if level is None else f"{level + 0.0:+.2f}" for level in levels)
    answer = clean_text(row["completion"]).rpartition("</think>")[2]
    ending = answer.strip()[-50:].replace("\n", " ")
    details = [*_part_marks(row), f"finish: {shorten(row['finish_reason'], 300)}"]
    if row["entropy"] is not None:
        details.append(f"entropy {number(row['entropy'])} nats")
    if row["error"]:
        details.append(f"error: {shorten(row['error'], 300)}")
    if made := row.get("correction"):
        what = f"corrected by {made['branch']}" if made["branch"] else f"left as it is: {made['drawn']} did not do"
        details.append(f"{what}; as sampled incorrect, reward {number(made['score']['reward'])}")
    return el(
        "details",
        el(
            "summary",
            verdict(row["success"]),
            el("span", f"reward {number(row['reward'])}"),
            el("span", f"A {advantages}", title=ADVANTAGES),
            el("span", f"{row['tokens']} tokens", class_="muted"),
            el("span", f"corrected: {made['branch']}", class_="muted") if made and made["branch"] else None,
            el("span", "cut off", class_="incorrect") if row["finish_reason"] == "length" else None,
            el("span", "verifier failed", class_="incorrect") if row["error"] else None,
            el("span", f"…{ending}", class_="ending muted", dir="auto"),
        ),
        note(" · ".join(details)),
        completion_text(row["completion"], limit, *(made["forced"] if made else ())),
        class_="completion",
        open="" if is_open else None,
    )


def _part_marks(row: Record) -> list[str]:
    """The reward parts of a completion, those that are 0 or 1 as a mark."""
    marks = {0: "✗", 1: "✓"}
    parts = dict(row.get("parts") or {})  # samples of earlier versions have none
    return [f"{shorten(name, 100)} {marks.get(value) or number(value)}" for name, value in parts.items()]


def trace_card(
    row: Record, images: EmbeddedImages, columns: Sequence[tuple[str, Record]], limit: int = 2 * TEXT_LIMIT
) -> Html:
    """One problem and, side by side, a completion of each model as (title, sample) pairs."""
    texts = [
        el(
            "div",
            el("h4", f"{title} ", verdict(bool(sample.get("success")))),
            completion_text(sample.get("completion"), limit),
            note(" · ".join(_part_marks(sample))),
        )
        for title, sample in columns
    ]
    return el("article", problem_part(row, images), *texts, class_="card traces")


def problem_part(row: Record, images: EmbeddedImages, *more: Html) -> Html:
    """Images, question and gold answer."""
    shown = [images.show(path) for path in list(row.get("images") or [])[:4]]
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
    mark, kind = ("✓", "correct") if success else ("✗", "incorrect")
    return el("span", f"{mark} {kind}", class_=f"verdict {kind}")


def boxed(text: str) -> Html:
    r"""The text with a frame around what each \boxed{…} holds; its command is not seen, but copied along."""
    parts, end = list[object](), 0
    for box in reversed(boxes(text, at_most=50)):
        if box.content and box.start >= end:  # not one inside another
            command, content, closing = text[box.start : box.end].rpartition(box.content)
            framed = el("span", el("i", command), readable(content), el("i", closing), class_="boxed")
            parts += [text[end : box.start], framed]
            end = box.end
    return join([*parts, text[end:]])


_SIGNS = {"pi": "π", "times": "×", "cdot": "·", "pm": "±", "infty": "∞", "leq?": "≤", "geq?": "≥"}
_TEX = (
    (r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"\1/\2"),
    (r"\\(?:text|mathrm|mathbf)\s*\{([^{}]*)\}", r"\1"),
    (r"\\sqrt\s*\{([^{}]*)\}", r"√(\1)"),
    (r"\^?\{?\\circ\}?", "°"),
    *((rf"\\{name}(?![a-z])", sign) for name, sign in _SIGNS.items()),
)


def readable(answer: str) -> str:
    """A formula of a short answer without the commonest TeX; what is not known stays as it is."""
    for pattern, sign in _TEX:
        answer = re.sub(pattern, sign, answer)
    return answer


def completion_text(text: object, limit: int, first: int = 0, last: int = 0) -> Html:
    """The reasoning, set off from the answer after it; or if some characters were not sampled, those are marked."""
    if first < last:
        parts = (clean_text(text)[part] for part in (slice(first), slice(first, last), slice(last, None)))
        kept, inserted, added = (boxed(shorten(part, limit)) if part else "" for part in parts)
        return el("pre", kept, el("mark", inserted, title="not sampled"), added, dir="auto", tabindex="0")
    thought, mark, answer = shorten(text, limit).partition("</think>")
    reasoning = el("span", thought + mark, class_="thought") if mark else boxed(thought or "(empty)")
    return el("pre", reasoning, boxed(answer), dir="auto", tabindex="0")


@dataclass
class EmbeddedImages:
    """The run's images as data URIs, large ones downscaled, up to IMAGE_BUDGET characters."""

    folder: RunFolder
    spent: int = 0

    def show(self, relative: object) -> Html:
        path = self.folder.image_path(str(relative))
        if path is None:
            return empty("image missing")
        try:
            kind, data = _compact(path)
        except Exception:  # Pillow raises many kinds for a damaged file
            return empty("image damaged")
        source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
        if self.spent + len(source) > IMAGE_BUDGET:
            return empty("image left out to keep the page small")
        self.spent += len(source)
        return el("img", src=source, alt="image of the problem")


def _compact(path: Path) -> tuple[str, bytes]:
    """(format, content): a small PNG unchanged, anything larger as a JPEG of at most 512 px."""
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
