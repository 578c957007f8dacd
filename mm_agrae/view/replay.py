"""A recorded step again: how the rewards of a group became advantages and weights in the loss, as one picture.

Rewards and advantages are those recorded, ω that of the metrics; A is divided as `loss.py` does, over the step's rows.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from mm_agrae.advantage import RULES
from mm_agrae.loss import LOSSES, Denominator
from mm_agrae.run.files import clean_text
from mm_agrae.run.records import sampled_success
from mm_agrae.view.page import Html, el, note, number, percent
from mm_agrae.view.runs import Record, RunReader

COLUMNS = {"reward": "reward", "advantage_before": "→ base A", "advantage_sample_level": "→ sample level",
           "advantage": "→ group level"}  # fmt: skip
DIVIDED = {"grpo": "(N · own length)", "dapo": "all tokens of the step", "dr_grpo": "(N · max_new_tokens)"}
"""Losses -> what a token's advantage is divided by, in words; every loss divides as one of these does."""
LABEL, CELL, BAR, STRIP, VALUE, ROW, TOP = 44.0, 110.0, 56.0, 150.0, 62.0, 22.0, 26.0
WIDTH = LABEL + len(COLUMNS) * CELL + STRIP + VALUE


@dataclass(frozen=True)
class StepReplay:
    """What a step's groups have in common. `blocks` are the denominators of its optimiser steps, each of
    `block_prompts` prompts. `learns_less`: corrected completions were trained on in part, but in which is not kept."""

    rule: str
    loss: str
    omega: float | None
    mask_truncated: bool = False
    learns_less: bool = False
    block_prompts: int = 1
    blocks: dict[int, Denominator] = field(default_factory=dict)

    @classmethod
    def of(cls, run: RunReader, step: int) -> StepReplay:
        """Reads lengths and endings of the whole step. Raises RunFolderError."""
        config = run.config()
        sections = [config.get(name) for name in ("rollout", "update", "advantage")]
        rollout, update, advantage = (each if isinstance(each, dict) else {} for each in sections)
        rule = str(advantage.get("rule", "agrae"))
        alpha = inspect.signature(RULES[rule]).parameters.get("alpha") if rule in RULES else None
        words = f"rule {rule}" + (f", α = {advantage.get('alpha') or alpha.default}" if alpha else "")
        metrics: Record = next((row for row in reversed(run.metrics) if row.get("step") == step), {})
        columns = ("prompt_index", "tokens", "finish_reason", "correction")
        rows = list(itertools.chain.from_iterable(run.folder.iter_rollouts(step, columns)))
        prompts = update.get("mini_batch_prompts") or len({row["prompt_index"] for row in rows})
        made = cls(
            words, str(update.get("loss", "grpo")), metrics.get("advantage/omega"),
            bool(update.get("mask_truncated")), (rollout.get("correct") or {}).get("train_on") == "added", prompts,
        )  # fmt: skip
        for block, found in itertools.groupby(sorted(rows, key=made._block), key=made._block):
            own = list(found)
            tokens = sum(row["tokens"] for row in own if not made._left_out(row))
            made.blocks[block] = Denominator(len(own), tokens, rollout.get("max_new_tokens") or 512)
        return made

    def _block(self, row: Record) -> int:
        return int(row["prompt_index"]) // self.block_prompts

    def _left_out(self, row: Record) -> bool:
        return self.mask_truncated and row["finish_reason"] == "length"

    def weight(self, row: Record) -> float | None:
        """By how much the loss raises log π of each of the completion's tokens; None if that cannot be known."""
        kind = LOSSES.get(self.loss)
        by_tokens = kind is not None and kind.token_weight is LOSSES["dapo"].token_weight  # of all completions
        if kind is None or row["advantage"] is None or (self.learns_less and (by_tokens or _branch(row))):
            return None
        if self._left_out(row) or not row["tokens"]:
            return 0.0
        length = torch.tensor(row["tokens"], dtype=torch.float64)
        return float(row["advantage"] * kind.token_weight(length, self.blocks[self._block(row)]))

    def figure(self, group: Sequence[Record], most: int | None = None) -> Html:
        """The picture of a group: a line for each completion (of `most`), from its reward to its tokens' weight."""
        correct, rows = sum(map(sampled_success, group)), group[:most]
        facts = [self.rule, f"ω = {number(self.omega)}, the mean reward of step {rows[0]['step']:,}"]
        facts.append(f"p = {correct}/{len(group)} = {percent(correct / len(group))}")
        kind, completions = LOSSES.get(self.loss), self.blocks[self._block(rows[0])].completions
        divided = [words for name, words in DIVIDED.items() if kind and kind.token_weight is LOSSES[name].token_weight]
        facts += [f"loss {self.loss}: weight of a token = A / {words}, N = {completions:,}" for words in divided]
        facts += [f"variant of a problem: {rows[0]['variant']}"] if rows[0].get("variant") else []
        weights = [self.weight(row) for row in rows]
        reward, *others = (max(abs(row[name] or 0.0) for row in rows) for name in COLUMNS)
        scale = dict.fromkeys(COLUMNS, max(others)) | {"reward": reward}
        heaviest, longest = max(abs(w or 0.0) for w in weights), max(row["tokens"] for row in rows)
        titles = (*COLUMNS.values(), "→ loss weight × tokens")
        marks = [_text(title, LABEL + i * CELL, 14) for i, title in enumerate(titles)]
        zeros = (LABEL + i * CELL + BAR / 2 for i in range(len(COLUMNS)))
        marks += [_rect(zero - 0.5, TOP, 1, len(rows) * ROW, "axis") for zero in zeros]
        for index, (row, weight) in enumerate(zip(rows, weights, strict=True)):
            middle = TOP + (index + 0.5) * ROW
            marks += _line(row, index, middle, scale)
            marks += _strip(row, weight, middle, (weight or 0.0) / (heaviest or 1.0), STRIP / (longest or 1))
        size = f"0 0 {WIDTH:g} {TOP + len(rows) * ROW:g}"
        svg = el("svg", *marks, viewBox=size, role="img", aria_label="rewards to loss weights")
        about = "A strip is as long as the completion, and as high as the weight of each of its tokens."
        if corrected := [f"{place} {_branch(row)}" for place, row in enumerate(rows, 1) if _branch(row)]:
            about += f" ↻: by guided correction ({', '.join(corrected)}); hatched: not sampled, but inserted by it."
        return el("figure", note(" · ".join(facts)), el("div", svg, class_="scroll"), note(about), class_="replay")


def _line(row: Record, index: int, middle: float, scale: Record) -> list[Html]:
    label = el("tspan", "✓" if row["success"] else "✗", class_="correct" if row["success"] else "incorrect")
    marks = [_text(f"{index + 1} ", 0, middle + 4, label, " ↻" if _branch(row) else "")]
    for place, name in enumerate(COLUMNS):
        value, zero = row[name], LABEL + place * CELL + BAR / 2
        if value:
            width = BAR / 2 * abs(value) / scale[name]
            marks.append(_rect(zero if value > 0 else zero - width, middle - 6, width, 12, ("down", "up")[value > 0]))
        marks.append(_text("–" if value is None else f"{value + 0.0:+.2f}", zero + BAR / 2 + 6, middle + 4))
    return marks


def _strip(row: Record, weight: float | None, middle: float, share: float, per_token: float) -> list[Html]:
    left, width, height = WIDTH - VALUE - STRIP, row["tokens"] * per_token, abs(share) * (ROW / 2 - 1)
    marks = [_rect(left, middle - 0.5, width, 1, "axis")]
    if share:
        tip = el("title", f"completion {row['completion_index'] + 1}: {row['tokens']} tokens, {weight:+.3g} each")
        css, top = ("up", middle - height) if share > 0 else ("down", middle)
        marks.append(_rect(left, top, width, height, css, tip))
    span = (row.get("correction") or {}).get("forced") or (0, 0)
    if span[0] < span[1]:
        first, last = (width * place / max(1, len(clean_text(row["completion"]))) for place in span)
        hatches = [left + first + 3 * i for i in range(int((last - first) / 3) + 1)]
        path = "".join(f"M{x:.1f},{middle + ROW / 2 - 2:g}l4,{4 - ROW:g}" for x in hatches)
        marks.append(el("path", el("title", "not sampled"), d=path, class_="hatch"))
    marks.append(_text("–" if weight is None else f"{weight:+.1e}" if weight else "0", WIDTH - VALUE + 6, middle + 4))
    return marks


def _branch(row: Record) -> str:
    """By which branch guided correction has changed the completion; empty if it has not."""
    return str((row.get("correction") or {}).get("branch") or "")


def _rect(x: float, y: float, width: float, height: float, css: str, *children: object) -> Html:
    box = {"x": x, "y": y, "width": width, "height": height}
    return el("rect", *children, **{name: f"{value:.4g}" for name, value in box.items()}, class_=css)


def _text(text: str, x: float, y: float, *more: object) -> Html:
    return el("text", text, *more, x=f"{x:g}", y=f"{y:g}")
