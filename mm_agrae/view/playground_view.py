"""Markup of the playground: completions, agreement, progress and tokens."""

from bisect import bisect
from collections.abc import Mapping, Sequence
from typing import Any

from mm_agrae.grading.accuracy import verify
from mm_agrae.view.components import boxed, readable, verdict
from mm_agrae.view.page import Html, el, empty, join, number, percent, table
from mm_agrae.view.playground import CheckpointTraces, Question, Token, Trace

PROBABILITY, ENTROPY = "probability", "entropy"
BOUNDS = {PROBABILITY: (0.99, 0.9, 0.7, 0.4, 0.1), ENTROPY: (0.05, 0.3, 0.7, 1.2, 2.0)}
"""Bounds between colours, from certain to uncertain; entropy in nats."""
LEAST_CERTAIN = 8
NO_ANSWER = "no answer"
ENDINGS = {"stop": "", "length": "cut off", "stopped": "stopped", "writing": "writing …"}


def traces(checkpoints: Sequence[CheckpointTraces], question: Question) -> Html:
    """One card per checkpoint, side by side where there is room."""
    return el("div", *(_card(shown, question) for shown in checkpoints), class_="checkpoints")


def _card(shown: CheckpointTraces, question: Question) -> Html:
    asked = None
    if shown.asked and shown.asked.strip() != question.text.strip():
        asked = el("details", el("summary", "asked in words"), el("p", shown.asked))
    several = len(shown.traces) > 1
    return el(
        "section",
        el("h3", shown.label, " ", el("span", shown.state, class_="muted small")),
        el("p", shown.message, class_="error", role="alert") if shown.message else None,
        asked,
        _summary(shown.traces, question.grading) if several else None,
        *(_trace(trace, index, several) for index, trace in enumerate(shown.traces, 1)),
        class_="card",
        aria_label=f"completions of {shown.label}",
    )


def _summary(traces: Sequence[Trace], grading: Mapping[str, Any]) -> Html | None:
    """How many samples are correct and how far they agree, once all are written."""
    if any(trace.state == "writing" for trace in traces):
        done = sum(trace.state != "writing" for trace in traces)
        return el("progress", value=done, max=len(traces), aria_label="samples written")
    graded = [trace.success for trace in traces if trace.success is not None]
    correct = None
    if graded:
        share = percent(sum(graded) / len(graded))
        correct = el("p", el("b", f"{sum(graded)} of {len(graded)} correct ({share})"))
    lines = []
    groups = agreement(traces, grading)
    for group in groups:
        answer, success = group[0].final, group[0].success
        mark = {True: "✓ ", False: "✗ ", None: ""}[success]
        kind = {True: "correct", False: "incorrect", None: None}[success]
        name = el("span", mark + (NO_ANSWER if answer is None else readable(answer)), class_=kind)
        part = len(group) / sum(map(len, groups))
        bar = el("progress", value=f"{part:.3f}", max=1, aria_label="share of the samples")
        lines += [name, bar, el("span", f"{len(group)} · {percent(part)}")]
    return el(
        "div",
        correct,
        el("div", "Agreement among the samples", class_="caption"),
        el("div", *lines, class_="agreement"),
    )


def _trace(trace: Trace, index: int, numbered: bool) -> Html:
    title = f"sample {index} · {trace.count} tokens" if numbered else f"{trace.count} tokens"
    if ENDINGS[trace.state]:
        title += f" · {ENDINGS[trace.state]}"
    mark = None if trace.success is None else verdict(trace.success)
    parts = [el("div", el("span", title), mark, class_="head")]
    if trace.thought:
        text = el("span", trace.thought)
        parts.append(el("div", "Reasoning", class_="caption"))
        parts.append(el("pre", text, class_="thought", tabindex="0", dir="auto"))
    if trace.answer or trace.state != "writing":
        parts.append(el("div", "Answer", class_="caption"))
        parts.append(el("div", boxed(trace.answer or f"({NO_ANSWER})"), class_="final", dir="auto"))
    return el("article", *parts, class_=f"trace {trace.state}")


def agreement(traces: Sequence[Trace], grading: Mapping[str, Any]) -> list[list[Trace]]:
    """Finished traces grouped by their final answer, the most frequent first.

    Answers count as the same if the verifier accepts one for the other.
    """
    groups: list[list[Trace]] = []
    for trace in traces:
        if trace.state in ("stop", "length"):
            alike = (group for group in groups if _agree(group[0].final, trace.final, grading))
            group = next(alike, None)
            if group is None:
                groups.append([trace])
            else:
                group.append(trace)
    return sorted(groups, key=len, reverse=True)


def _agree(one: str | None, other: str | None, grading: Mapping[str, Any]) -> bool:
    if one is None or other is None or one == other:
        return one == other
    return verify(one, f"\\boxed{{{other}}}", **grading)


def progress_line(checkpoints: Sequence[CheckpointTraces]) -> str:
    """One line on how far each checkpoint is."""
    parts = []
    for shown in checkpoints:
        done = sum(trace.state != "writing" for trace in shown.traces)
        text = shown.state
        if shown.traces and shown.state not in ("stopped", "failed"):
            text = f"{done} of {len(shown.traces)} written, {shown.tokens:,} tokens"
            if shown.seconds > 0 and shown.tokens:
                text += f", {shown.tokens / shown.seconds:.0f} tokens/s"
        parts.append(f"{shown.label}: {text}")
    return " · ".join(parts)


def tokens(trace: Trace | None, by: str) -> Html:
    """Every token of a trace, coloured by its probability or by the entropy at its position."""
    if trace is None or not trace.tokens:
        return empty(
            "Once a completion is written, its tokens are shown here, coloured by how sure the model was of each."
        )
    marked = [
        el("span", _visible(token.text), class_=f"h{_level(token, by)}", title=_tip(token)) for token in trace.tokens
    ]
    return el(
        "div",
        _legend(by),
        el("div", *marked, class_="tokens", tabindex="0", role="group", aria_label="tokens"),
        el("div", f"The {LEAST_CERTAIN} least certain tokens", class_="caption"),
        _least_certain(trace.tokens, by),
        class_=by,
    )


def _level(token: Token, by: str) -> int:
    """0 for certain to 5 for uncertain."""
    if by == PROBABILITY:
        return sum(token.probability < bound for bound in BOUNDS[PROBABILITY])
    return bisect(BOUNDS[ENTROPY], token.entropy)


def _legend(by: str) -> Html:
    bounds = BOUNDS[by]
    if by == PROBABILITY:
        names = [f"{percent(bounds[0])} and more", *(f"from {percent(b)}" for b in bounds[1:])]
        names.append(f"below {percent(bounds[-1])}")
        title = "Probability of the token:"
    else:
        names = [f"up to {bounds[0]:g} nats", *(f"up to {bound:g}" for bound in bounds[1:])]
        names.append(f"above {bounds[-1]:g}")
        title = "Entropy at the token:"
    keys = (el("span", name, class_=f"h{level}") for level, name in enumerate(names))
    return el("div", title, *keys, class_="key")


def _tip(token: Token) -> str:
    return (
        f"{_quoted(token.text)}: probability {percent(token.probability)}, "
        f"entropy {number(token.entropy)} nats. Most likely: {_most_likely(token)}"
    )


def _most_likely(token: Token) -> str:
    return ", ".join(f"{_quoted(text)} {percent(p)}" for text, p in token.alternatives)


def _least_certain(shown: Sequence[Token], by: str) -> Html:
    """The same numbers as a table, for keyboards, phones and screen readers, which cannot hover."""
    order = sorted(enumerate(shown, 1), key=lambda t: t[1].probability if by == PROBABILITY else -t[1].entropy)
    rows = [
        (_quoted(t.text), i, percent(t.probability), number(t.entropy), _most_likely(t))
        for i, t in order[:LEAST_CERTAIN]
    ]
    return table(("token", "position", "probability", "entropy (nats)", "most likely"), rows)


def _visible(text: str) -> str:
    """A line break still breaks the line, but is shown as well."""
    return text.replace("\n", "↵\n") if text else "∅"


def _quoted(text: str) -> str:
    return f"“{text}”".replace("\n", "↵")


def waiting(text: str) -> Html:
    return el("p", text, class_="muted", role="status")


def note_on_images(reading: Mapping[str, bool]) -> Html | None:
    """Which of the chosen checkpoints will not see the image. `reading`: name -> reads images."""
    blind = [name for name, reads in reading.items() if not reads]
    if not blind:
        return None
    if len(blind) == len(reading):
        return empty(
            "The image is not used: every chosen checkpoint reads text only. A problem of the "
            "synthetic task is asked in words instead."
        )
    names = join([", ".join(blind)])
    return el("p", "The image is not used by ", el("b", names), "; it is asked in words.")
