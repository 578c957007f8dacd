"""How answers, agreement and tokens look: markup for the playground, every text escaped."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Mapping, Sequence
from typing import Any

from mm_agrae.view.page import Html, el, empty, join, number, percent, table
from mm_agrae.view.playground import Ask, Column, Token, Trace, agreement, right

PROBABILITY, ENTROPY = "probability", "entropy"
BOUNDS = {
    PROBABILITY: (0.99, 0.9, 0.7, 0.4, 0.1),
    ENTROPY: (0.05, 0.3, 0.7, 1.2, 2.0),
}
"""Where one colour gives way to the next, from certain to uncertain; entropy in nats."""
LEAST_CERTAIN = 8
NO_ANSWER = "no answer"
LAST = {"stop": "", "length": "cut off", "stopped": "stopped", "writing": "writing …"}


def answers(columns: Sequence[Column], ask: Ask) -> Html:
    """One card a checkpoint, side by side where there is room."""
    return el("div", *(_card(column, ask) for column in columns), class_="answers")


def _card(column: Column, ask: Ask) -> Html:
    words = None
    if column.asked and column.asked.strip() != ask.question.strip():
        words = el("details", el("summary", "asked in words"), el("p", column.asked))
    several = len(column.traces) > 1
    return el(
        "section",
        el("h3", column.label, " ", el("span", column.state, class_="muted small")),
        el("p", column.message, class_="error", role="alert") if column.message else None,
        words,
        _summary(column.traces, ask.grading) if several else None,
        *(_trace(trace, index, several) for index, trace in enumerate(column.traces, 1)),
        class_="card",
        aria_label=f"answers of {column.label}",
    )


def _summary(traces: Sequence[Trace], grading: Mapping[str, Any]) -> Html | None:
    """How many are right, and how far the samples agree; once all are written."""
    if any(trace.state == "writing" for trace in traces):
        done = sum(trace.state != "writing" for trace in traces)
        return el("progress", value=done, max=len(traces), aria_label="samples written")
    shares = agreement(traces, grading)
    lines = []
    for share in shares:
        mark = {True: "✓ ", False: "✗ ", None: ""}[share.success]
        kind = {True: "right", False: "wrong", None: None}[share.success]
        name = el("span", mark + (NO_ANSWER if share.answer is None else share.answer), class_=kind)
        bar = el("progress", value=f"{share.share:.3f}", max=1, aria_label="share of the samples")
        lines += [name, bar, el("span", f"{share.count} · {percent(share.share)}")]
    return el(
        "div",
        el("p", el("b", right(traces))) if right(traces) else None,
        el("div", "Agreement among the samples", class_="caption"),
        el("div", *lines, class_="agreement"),
    )


def _trace(trace: Trace, index: int, numbered: bool) -> Html:
    title = f"sample {index} · {trace.count} tokens" if numbered else f"{trace.count} tokens"
    if LAST[trace.state]:
        title += f" · {LAST[trace.state]}"
    thought: list[Html] = []
    if trace.thought:
        thought.append(el("div", "Reasoning", class_="caption"))
        thought.append(
            el("pre", el("span", trace.thought), class_="thought", tabindex="0", dir="auto")
        )
    final: list[Html] = []
    if trace.answer or trace.state != "writing":
        final.append(el("div", "Answer", class_="caption"))
        final.append(el("div", trace.answer or f"({NO_ANSWER})", class_="final", dir="auto"))
    return el(
        "article",
        el("div", el("span", title), verdict(trace.success), class_="head"),
        *thought,
        *final,
        class_=f"trace {trace.state}",
    )


def verdict(success: bool | None) -> Html | None:
    if success is None:
        return None
    text, kind = ("✓ right", "right") if success else ("✗ wrong", "wrong")
    return el("span", text, class_=f"verdict {kind}")


# -- tokens


def tokens(trace: Trace | None, by: str) -> Html:
    """Every token of a trace on a colour for its probability or the entropy where it was drawn."""
    if trace is None or not trace.tokens:
        return empty(
            "Once an answer is written, its tokens are shown here, coloured by how sure the model "
            "was of each."
        )
    marked = [
        el("span", _visible(token.text), class_=f"h{_level(token, by)}", title=_tip(token))
        for token in trace.tokens
    ]
    return el(
        "div",
        _legend(by),
        el("div", *marked, class_="tokens", tabindex="0", role="group", aria_label="tokens"),
        el("div", f"The {LEAST_CERTAIN} tokens it was least sure of", class_="caption"),
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
        title = "Entropy where it was drawn:"
    keys = (el("span", name, class_=f"h{level}") for level, name in enumerate(names))
    return el("div", title, *keys, class_="key")


def _tip(token: Token) -> str:
    likely = ", ".join(f"{_quoted(text)} {percent(p)}" for text, p in token.alternatives)
    return (
        f"{_quoted(token.text)}: probability {percent(token.probability)}, "
        f"entropy {number(token.entropy)} nats. Likeliest: {likely}"
    )


def _least_certain(shown: Sequence[Token], by: str) -> Html:
    """The same numbers for keyboards, phones and screen readers, which have no hover."""
    order = sorted(
        range(len(shown)),
        key=lambda i: shown[i].probability if by == PROBABILITY else -shown[i].entropy,
    )[:LEAST_CERTAIN]
    rows = [
        (
            _quoted(shown[i].text),
            i + 1,
            percent(shown[i].probability),
            number(shown[i].entropy),
            ", ".join(f"{_quoted(text)} {percent(p)}" for text, p in shown[i].alternatives),
        )
        for i in order
    ]
    return table(("token", "place", "probability", "entropy (nats)", "likeliest there"), rows)


def _visible(text: str) -> Html | str:
    """A line break keeps its effect and gets a sign."""
    return text.replace("\n", "↵\n") if text else "∅"


def _quoted(text: str) -> str:
    return f"“{text}”".replace("\n", "↵")


def waiting(text: str) -> Html:
    return el("p", text, class_="muted", role="status")


def note_on_pictures(reading: Mapping[str, bool]) -> Html | None:
    """What becomes of the picture: which of the chosen checkpoints do not use it."""
    blind = [name for name, reads in reading.items() if not reads]
    if not blind:
        return None
    if len(blind) == len(reading):
        return empty(
            "The picture is not used: what is chosen reads text alone. A drawn problem is given "
            "in words."
        )
    names = join([", ".join(blind)])
    return el("p", "The picture is not used by ", el("b", names), "; it is asked in words.")
