"""What the playground shows of completions: tokens, reasoning and answer, agreement, progress."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mm_agrae.grading.accuracy import verify
from mm_agrae.view.page import percent


@dataclass(frozen=True)
class Token:
    """A token's text, its probability, the entropy (nats) there, and the most likely tokens."""

    text: str
    probability: float
    entropy: float
    alternatives: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Trace:
    """One completion, as far as it has been generated.

    `state` is "writing", "stop", "length" (the token limit) or "stopped" (by the user). `thought`
    is the reasoning, `answer` what follows it, `final` the answer extracted from that, None if
    there is none. `success` is None without a gold answer and while writing. `tokens` is empty
    until the trace has ended.
    """

    text: str
    count: int
    state: str
    thought: str
    answer: str
    final: str | None = None
    success: bool | None = None
    tokens: tuple[Token, ...] = ()


@dataclass(frozen=True)
class CheckpointTraces:
    """The traces of one checkpoint. `asked` is the question it was given, in words if need be.

    `state` is "waiting", "loading", "writing", "done", "stopped" or "failed"; `message` says why
    it failed.
    """

    label: str
    state: str = "waiting"
    message: str = ""
    asked: str = ""
    traces: tuple[Trace, ...] = ()
    seconds: float = 0.0

    @property
    def tokens(self) -> int:
        return sum(trace.count for trace in self.traces)


def split_thinking(text: str, opened: bool = False) -> tuple[str, str]:
    """(reasoning, what follows it). `opened`: the prompt ended inside the reasoning.

    Unclosed reasoning extends to the end; text without any tag is all answer.
    """
    before, mark, after = text.rpartition("</think>")
    if not mark:
        head, opening, rest = text.partition("<think>")
        if opening:
            return f"{head}{rest}".strip(), ""
        return (text.strip(), "") if opened else ("", text.strip())
    return before.replace("<think>", "", 1).strip(), after.strip()


@dataclass(frozen=True)
class AnswerShare:
    """How many of the samples gave one final answer; None stands for no answer."""

    answer: str | None
    count: int
    share: float
    success: bool | None


def agreement(traces: Sequence[Trace], grading: Mapping[str, Any]) -> list[AnswerShare]:
    """The share of each distinct final answer among finished traces, most frequent first.

    Answers count as the same if the verifier accepts one for the other.
    """
    ended = [trace for trace in traces if trace.state in ("stop", "length")]
    groups: list[list[Trace]] = []
    for trace in ended:
        for group in groups:
            if _agree(group[0].final, trace.final, grading):
                group.append(trace)
                break
        else:
            groups.append([trace])
    groups.sort(key=len, reverse=True)
    return [
        AnswerShare(group[0].final, len(group), len(group) / len(ended), group[0].success)
        for group in groups
    ]


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


def share_correct(traces: Sequence[Trace]) -> str:
    """How many of the graded traces are correct, in words; empty if none is graded."""
    graded = [trace.success for trace in traces if trace.success is not None]
    if not graded:
        return ""
    return f"{sum(graded)} of {len(graded)} correct ({percent(sum(graded) / len(graded))})"
