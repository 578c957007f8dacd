"""What one training step holds: its groups, the plan of its update, its metrics and records.

Pure functions of what was gathered from all processes; `trainer` does the talking between them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from mm_agrae.advantage import AdvantageLevels
from mm_agrae.batching import Row, micro_batch
from mm_agrae.loss import Denominator, LossOutput, SamplerWeight
from mm_agrae.model.shared_prompt import split_by_tokens
from mm_agrae.run.records import RolloutRecord
from mm_agrae.types import Group, GroupSummary, MicroBatch

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class StepTable:
    """Every completion of the step, over all processes, in the order of positions."""

    rows: list[GroupSummary]
    reward_PG: torch.Tensor
    success_PG: torch.Tensor
    length_PG: torch.Tensor

    @classmethod
    def of(cls, rows: Iterable[GroupSummary]) -> StepTable:
        rows = sorted(rows, key=lambda row: row.position)
        return cls(
            rows,
            reward_PG=torch.tensor([row.rewards for row in rows], dtype=torch.float64),
            success_PG=torch.tensor([row.success for row in rows], dtype=torch.float64),
            length_PG=torch.tensor([row.lengths for row in rows], dtype=torch.float64),
        )


# ------------------------------------------------------------------------ the plan of the update


@dataclass(frozen=True)
class MiniBatch:
    """One optimiser step's share of this process."""

    denominator: Denominator
    batches: list[MicroBatch]


def plan_update(
    groups: Sequence[Group],
    table: StepTable,
    advantage_PG: torch.Tensor,
    *,
    wanted_PG: torch.Tensor,
    prompts: int,
    micro_completions: int,
    micro_tokens: int | None,
    max_new_tokens: int,
    rank: int,
    world: int,
    device: torch.device,
) -> list[MiniBatch]:
    """Mini-batches of `prompts` groups, equal in number and length on every process.

    `groups` are this process's: those at positions p with p mod world = rank. Completions that
    are not wanted (without a gradient) are left out, but count in the denominator: the gradient
    is the same, the work less. A micro-batch holds at most `micro_completions` completions or,
    if `micro_tokens` is given, so many tokens of prompts and completions; a group is cut only if
    it does not fit in one.
    """

    def cut(cells: Sequence[tuple[int, int]]) -> list[list[int]]:
        group_of = [p for p, _ in cells]
        if micro_tokens is None:
            free = [0] * len(table.rows)
            return split_by_tokens(free, group_of, [1] * len(cells), micro_completions)
        prompt_lengths = [row.prompt_length for row in table.rows]
        lengths = [table.rows[p].lengths[g] for p, g in cells]
        return split_by_tokens(prompt_lengths, group_of, lengths, micro_tokens)

    own_prompts = [group.prompt for group in groups]
    local = {group.position: index for index, group in enumerate(groups)}
    plan = []
    for start in range(0, len(table.rows), prompts):
        block = range(start, start + prompts)
        cells_by_rank: list[list[tuple[int, int]]] = [[] for _ in range(world)]
        for p, g in itertools.product(block, range(advantage_PG.shape[1])):
            if wanted_PG[p, g]:
                cells_by_rank[p % world].append((p, g))
        cuts = [cut(cells) if cells else [] for cells in cells_by_rank]
        rows = [
            Row(local[p], groups[local[p]].completions[g], float(advantage_PG[p, g]))
            for p, g in cells_by_rank[rank]
        ]
        batches = [micro_batch(own_prompts, [rows[i] for i in part], device) for part in cuts[rank]]
        for _ in range(max(1, *map(len, cuts)) - len(batches)):
            # A process with less to do takes part with a row that counts for nothing.
            idle = micro_batch(own_prompts, [Row(0, groups[0].completions[0], 0.0)], device)
            idle.mask_BT.zero_()
            batches.append(idle)
        denominator = Denominator(
            completions=prompts * advantage_PG.shape[1],
            tokens=sum(sum(table.rows[p].lengths) for p in block),
            max_new_tokens=max_new_tokens,
        )
        plan.append(MiniBatch(denominator, batches))
    return plan


@dataclass
class UpdateTotals:
    """Statistics of the update, summed over micro-batches; they add up over processes too."""

    loss: float = 0.0
    ratio_max: float = 0.0
    sums: dict[str, float] = field(default_factory=dict)

    def add(self, output: LossOutput, weight: SamplerWeight | None = None) -> None:
        found = {**output.sums, **(weight.sums if weight else {})}
        sums = {name: value.item() for name, value in found.items()}
        self.merge(UpdateTotals(output.loss.item(), output.ratio_max.item(), sums))

    def merge(self, other: UpdateTotals) -> UpdateTotals:
        self.loss += other.loss
        self.ratio_max = max(self.ratio_max, other.ratio_max)
        for name, value in other.sums.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        return self

    def means(self, optimiser_steps: int) -> dict[str, float]:
        tokens = max(1.0, self.sums.get("tokens", 0.0))
        mean = {name: value / tokens for name, value in self.sums.items()}
        values = {
            "update/loss": self.loss / optimiser_steps,
            "update/entropy": mean["entropy"],
            "policy/clip_low": mean["clip_low"],
            "policy/clip_high": mean["clip_high"],
            "policy/ratio_max": self.ratio_max,
            "policy/approx_kl": mean["approx_kl"],
        }
        if "ref_kl" in mean:
            values["policy/kl_reference"] = mean["ref_kl"]
        if "weight" in mean:
            values["mismatch/mean_abs"] = mean["mismatch_abs"]
            values["mismatch/kl"] = mean["mismatch_kl"]
            values["mismatch/cut"] = mean["mismatch_cut"]
            values["mismatch/weight"] = mean["weight"]
        return values


# ---------------------------------------------------------------------------- metrics and records


def step_metrics(table: StepTable, levels: AdvantageLevels) -> dict[str, float]:
    """Rewards, groups, lengths and entropy of a step, over all processes."""
    rows, rate_P, length_PG = table.rows, table.success_PG.mean(-1), table.length_PG
    completions, tokens = length_PG.numel(), length_PG.sum().item()
    values = {
        "reward/mean": table.reward_PG.mean().item(),
        "reward/std": table.reward_PG.std(correction=0).item(),
        "reward/errors": float(sum(row.errors for row in rows)),
        "success/mean": rate_P.mean().item(),
        "advantage/omega": levels.omega,
        "advantage/mean_abs": levels.advantage_PG.abs().mean().item(),
        "advantage/sum": levels.advantage_PG.sum().item(),
        "groups/all_right": (rate_P == 1).float().mean().item(),
        "groups/all_wrong": (rate_P == 0).float().mean().item(),
        "groups/mixed": ((rate_P > 0) & (rate_P < 1)).float().mean().item(),
        "groups/no_signal": (levels.advantage_PG == 0).all(-1).float().mean().item(),
        "completions/count": float(completions),
        "completions/right": table.success_PG.sum().item(),
        "completions/mean_tokens": length_PG.mean().item(),
        "completions/max_tokens": length_PG.max().item(),
        "completions/truncated": sum(row.truncated for row in rows) / completions,
        # The mean of −log p over sampled tokens is an unbiased estimate of the entropy (nats).
        "policy/entropy": -sum(row.logprob_sum for row in rows) / max(1.0, tokens),
        "tokens/completion": tokens,
        "tokens/prompt": float(sum(row.prompt_length for row in rows)),
    }
    parts = [part for row in rows for part in row.parts]
    for name in sorted({name for part in parts for name in part}):
        values[f"reward/{name}"] = sum(part.get(name, 0.0) for part in parts) / completions
    return values


def rollout_records(
    step: int,
    groups: Sequence[Group],
    levels: AdvantageLevels,
    store_image: Callable[[Image], str],
) -> list[RolloutRecord]:
    """One record a completion, with the advantages before and after each level."""
    records = []
    for group in groups:
        example = group.prompt.example
        images = tuple(store_image(image) for image in group.prompt.images)
        pairs = zip(group.completions, group.scores, strict=True)
        for index, (completion, score) in enumerate(pairs):
            place = (group.position, index)
            records.append(
                RolloutRecord(
                    step=step,
                    draw=group.resample_round,
                    prompt_index=group.position,
                    completion_index=index,
                    example_id=example.id,
                    question=example.question,
                    prompt_text=group.prompt.text,
                    answer=example.answer,
                    images=images,
                    completion=completion.text,
                    tokens=len(completion.token_ids),
                    finish_reason=completion.finish_reason,
                    reward=score.reward,
                    success=score.success,
                    parts=dict(score.parts),
                    error=score.error,
                    advantage_before=float(levels.base_PG[place]),
                    advantage_sample_level=float(levels.sample_PG[place]),
                    advantage=float(levels.advantage_PG[place]),
                    entropy=-float(np.mean(completion.logprobs)) if completion.logprobs else None,
                    meta=dict(example.meta),
                )
            )
    return records
