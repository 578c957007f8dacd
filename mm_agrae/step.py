"""The update of one training step, and what is recorded of it.

`Updater.run` takes the optimiser steps of a rollout: forward pass, loss and backward pass of each
micro-batch, then clipping and one optimiser step per mini-batch. `step_metrics` and
`rollout_records` are pure functions of what was gathered from all ranks.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import reduce
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mm_agrae import loss as losses
from mm_agrae.advantage import AdvantageLevels
from mm_agrae.batching import MiniBatch, StepTable, plan_update
from mm_agrae.config import Config
from mm_agrae.errors import ModelError
from mm_agrae.loss import LossOutput, SamplerWeight
from mm_agrae.model.policy import Policy
from mm_agrae.out_of_memory import during
from mm_agrae.run.context import RunContext
from mm_agrae.run.records import RolloutRecord
from mm_agrae.types import Group, MicroBatch

if TYPE_CHECKING:
    from PIL.Image import Image


class Updater:
    """Owns optimiser and schedule, and takes the optimiser steps of one rollout after another.

    `exact_engine` says that sampling log-probabilities are the policy's own, so that no importance weights are needed.
    """

    def __init__(self, context: RunContext, policy: Policy, *, total_steps: int, exact_engine: bool):
        self.config, self.reporter, self.policy = context.config, context.reporter, policy
        self.processes, self.strategy = context.processes, context.processes.strategy
        optimizer, self.scheduler = _optimizer(self.config, policy, self.processes.device, total_steps)
        self.module, self.optimizer = self.strategy.prepare(policy, optimizer)
        self.bad_gradients = self.bad_in_a_row = 0
        self.entropy_coef, self.entropy = self.config.update.entropy_coef, 0.0
        self._exact_engine = exact_engine
        self._sharing_checked = False

    def run(self, plan: Sequence[MiniBatch], note: Callable[[], None]) -> dict[str, float]:
        """Take the optimiser steps of a rollout. Returns loss, gradient norm and statistics.

        `note` is called after each micro-batch. Raises ModelError if gradients stay non-finite.
        """
        update = self.config.update
        if not self._sharing_checked:
            self.policy.check_sharing(plan[0].batches[0])
            self._sharing_checked = True
        self.module.train()
        self._old_and_reference_logprobs(plan)
        totals, norms = UpdateTotals(), []
        work = sum(len(mini.batches) for mini in plan) * update.epochs
        with self.reporter.bar("  update", work) as advance:
            for mini in itertools.chain.from_iterable([plan] * update.epochs):
                # FSDP2 keeps gathered weights for the backward pass of the same forward pass only.
                shared = () if self.policy.is_sharded else mini.batches
                self.policy.image_features.plan(shared)
                for index, batch in enumerate(mini.batches):
                    last = index + 1 == len(mini.batches)
                    with self.strategy.micro_batch(self.module, last):
                        self.backward(batch, mini.denominator, totals)
                    note()
                    advance(1)
                norms.append(self.optimiser_step())
        gathered = self.processes.gather([totals.read()], "update")
        means = reduce(UpdateTotals.merge, gathered).means(len(norms))
        if update.entropy_target is not None:
            means["update/entropy_coef"] = self.entropy_coef
            self.entropy = means["update/entropy"]
            change = update.entropy_step if self.entropy <= update.entropy_target else -update.entropy_step
            self.entropy_coef = min(1.0, max(0.0, self.entropy_coef + change))
        return {
            **means,
            "update/grad_norm": float(np.mean(norms)),
            "update/bad_gradients": float(self.bad_gradients),
            "update/learning_rate": self.scheduler.get_last_lr()[0],
        }

    @torch.no_grad()
    def exact_entropy(self, groups: Sequence[Group], table: StepTable) -> StepTable:
        """The table with each completion's mean Shannon entropy (nats) under the policy, by a forward pass.

        It is that of all its tokens, whether the policy wrote them or not, and whether they are in the loss or not.
        """
        # The number of a completion stands in for its advantage: by it the row is found again.
        number_PG = torch.arange(1.0, table.reward_PG.numel() + 1).view_as(table.reward_PG)
        where = {"rank": self.processes.rank, "world": self.processes.world, "device": self.processes.device}
        update = self.config.update.model_copy(update={"mask_truncated": False})
        config, every = self.config.model_copy(update={"update": update}), replace(table, learning_PG=table.length_PG)
        self.module.eval()
        found = []
        for mini in plan_update(groups, every, number_PG, config, **where):
            for batch in mini.batches:
                length_B = batch.length_B.to(batch.mask_BT.device)
                inside_BT = torch.arange(batch.mask_BT.shape[1], device=length_B.device) < length_B[:, None]
                batch = replace(batch, mask_BT=inside_BT.float())
                mean_B = (self.module(batch)[1] * batch.mask_BT).sum(1) / length_B.clamp(min=1)
                rows = zip(batch.advantage_B.tolist(), mean_B.clamp(min=0).tolist(), length_B.tolist(), strict=True)
                found += [(int(number) - 1, mean) for number, mean, length in rows if length]
        entropy_PG = table.entropy_PG.clone()
        for number, mean in self.processes.gather(found, "entropies"):
            entropy_PG.view(-1)[number] = mean
        return replace(table, entropy_PG=entropy_PG)

    @torch.no_grad()
    def _old_and_reference_logprobs(self, plan: Sequence[MiniBatch]) -> None:
        """Before the first optimiser step: what later ones compare the policy with."""
        update = self.config.update
        off_policy = len(plan) * update.epochs > 1
        for batch in itertools.chain.from_iterable(mini.batches for mini in plan):
            if off_policy:
                batch.old_logp_BT = self.module(batch)[0]
            if update.kl_coef > 0:
                with during("reference"):
                    batch.ref_logp_BT = self.policy.reference_logprobs(batch)

    def backward(self, batch: MicroBatch, denominator: losses.Denominator, totals: UpdateTotals) -> None:
        update = self.config.update
        logp_BT, entropy_BT = self.module(batch)
        weight = self._sampler_weight(batch, logp_BT)
        weight_BT = weight.weight_BT if weight else None
        if update.top_entropy < 1:
            top_BT = losses.top_entropy_mask(entropy_BT, batch.mask_BT, update.top_entropy)
            weight_BT = top_BT if weight_BT is None else top_BT * weight_BT
        output = losses.policy_loss(
            update.loss,
            logp_BT=logp_BT,
            old_logp_BT=batch.old_logp_BT,
            advantage_B=batch.advantage_B,
            mask_BT=batch.mask_BT,
            denominator=denominator,
            clip_low=update.clip_low,
            clip_high=update.clip_high,
            ref_logp_BT=batch.ref_logp_BT,
            kl_coef=update.kl_coef,
            unbiased_kl=update.unbiased_kl,
            entropy_BT=entropy_BT,
            entropy_coef=self.entropy_coef if self.entropy <= (update.entropy_target or math.inf) else 0.0,
            options=update.loss_options,
            sampler_weight_BT=weight_BT,
        )
        self.strategy.backward(output.loss)
        totals.add(output, weight)

    def _sampler_weight(self, batch: MicroBatch, logp_BT: torch.Tensor) -> SamplerWeight | None:
        """Importance weights for an engine whose numbers or weights are not the policy's."""
        mismatch = self.config.rollout.mismatch
        level = mismatch.correction
        if level == "auto":
            level = "off" if self._exact_engine else "token"
        if level == "off":
            return None
        return losses.sampler_weight(
            logp_BT if batch.old_logp_BT is None else batch.old_logp_BT,
            batch.sampling_logp_BT,
            batch.mask_BT,
            level=level,
            limit=mismatch.limit,
            beyond=mismatch.beyond,
        )

    def optimiser_step(self) -> float:
        """Clip, step, and return the gradient's norm; a gradient that is not finite is dropped."""
        update = self.config.update
        norm = self.strategy.clip(list(self.policy.trainable_parameters()), update.max_grad_norm)
        if math.isfinite(norm):
            self.optimizer.step()
            self.bad_in_a_row = 0
        else:
            self.bad_in_a_row += 1
            self.bad_gradients += 1
            self.reporter.say(f"the gradient is {norm}; this optimiser step is left out")
        self.optimizer.zero_grad()
        if self.bad_in_a_row > update.max_bad_gradients:
            raise ModelError(
                f"the gradient was not finite {self.bad_in_a_row} times in a row; lower "
                "update.learning_rate, or use model.dtype=float32 to see where it comes from"
            )
        self.scheduler.step()
        self.policy.version += 1
        return norm


def _optimizer(config: Config, policy: Policy, device: torch.device, total_steps: int) -> tuple[Any, Any]:
    from transformers import get_scheduler

    update, prompts = config.update, config.rollout.prompts_per_step
    optimizer = torch.optim.AdamW(
        policy.trainable_parameters(),
        lr=update.learning_rate,
        betas=update.betas,
        weight_decay=update.weight_decay,
        # Otherwise AdamW makes a temporary of the size of all parameters on a GPU.
        fused=True if device.type == "cuda" else None,
    )
    per_rollout = prompts // (update.mini_batch_prompts or prompts) * update.epochs
    name = "constant_with_warmup" if update.schedule == "constant" else update.schedule
    scheduler = get_scheduler(name, optimizer, update.warmup_steps, total_steps * per_rollout)
    return optimizer, scheduler


@dataclass
class UpdateTotals:
    """Statistics of an update, summed over micro-batches and then over ranks."""

    ratio_max: float = 0.0
    sums: dict[str, float] = field(default_factory=dict)
    unread: list[dict[str, torch.Tensor]] = field(default_factory=list)

    def add(self, output: LossOutput, weight: SamplerWeight | None = None) -> None:
        """Keep a micro-batch's for `read`: reading them now would make the CPU wait for a GPU."""
        weights = weight.sums if weight else {}
        self.unread.append(output.sums | weights | {"loss": output.loss.detach(), "ratio_max": output.ratio_max})

    def read(self) -> UpdateTotals:
        """The totals of all that was added, as plain numbers, by one transfer."""
        totals = UpdateTotals()
        table = [torch.stack([value.double() for value in found.values()]) for found in self.unread]
        for names, values in zip(self.unread, torch.stack(table).tolist(), strict=True):
            sums = dict(zip(names, values, strict=True))
            totals.merge(UpdateTotals(sums.pop("ratio_max"), sums))
        return totals

    def merge(self, other: UpdateTotals) -> UpdateTotals:
        self.ratio_max = max(self.ratio_max, other.ratio_max)
        for name, value in other.sums.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        return self

    def means(self, optimiser_steps: int) -> dict[str, float]:
        tokens = max(1.0, self.sums.get("tokens", 0.0))
        mean = {name: value / tokens for name, value in self.sums.items()}
        values = {
            "update/loss": self.sums["loss"] / optimiser_steps,
            "update/entropy": mean["entropy"],
            "policy/clip_low": mean["clip_low"],
            "policy/clip_high": mean["clip_high"],
            "policy/ratio_max": self.ratio_max,
            "policy/approx_kl": mean["approx_kl"],
        }
        where_measured = {
            "policy/kl_reference": "ref_kl",
            "mismatch/mean_abs": "mismatch_abs",
            "mismatch/kl": "mismatch_kl",
            "mismatch/cut": "mismatch_cut",
            "mismatch/weight": "weight",
        }
        return values | {name: mean[sum] for name, sum in where_measured.items() if sum in mean}


def step_metrics(table: StepTable, levels: AdvantageLevels) -> dict[str, float]:
    """Rewards, groups, lengths and entropy of a step, over all ranks; reward and success as sampled. `correction/` are
    shares of all completions, and the mean reward after it. `variants/` tell the problems as they are from what was
    made of them, whose success is not the task's; `variants/difficulty` is the mean D of the problems."""
    groups, rate_P, length_PG = table.groups, table.success_before_PG.mean(-1), table.length_PG
    completions, tokens = length_PG.numel(), length_PG.sum().item()
    values = {
        "reward/mean": table.reward_before_PG.mean().item(),
        "reward/std": table.reward_before_PG.std(correction=0).item(),
        "reward/errors": float(sum(group.errors for group in groups)),
        "success/mean": rate_P.mean().item(),
        "advantage/omega": levels.omega,
        "advantage/mean_abs": levels.advantage_PG.abs().mean().item(),
        "advantage/sum": levels.advantage_PG.sum().item(),
        "groups/all_correct": (rate_P == 1).float().mean().item(),
        "groups/all_incorrect": (rate_P == 0).float().mean().item(),
        "groups/mixed": ((rate_P > 0) & (rate_P < 1)).float().mean().item(),
        "groups/no_signal": (levels.advantage_PG == 0).all(-1).float().mean().item(),
        "completions/count": float(completions),
        "completions/correct": table.success_before_PG.sum().item(),
        "completions/mean_tokens": length_PG.mean().item(),
        "completions/max_tokens": length_PG.max().item(),
        "completions/truncated": sum(sum(group.truncated) for group in groups) / completions,
        # The mean of −log p over sampled tokens is an unbiased estimate of the entropy (nats).
        "policy/entropy": sum(
            mean * count for group in groups for mean, count in zip(group.entropies, group.sampled, strict=True)
        )
        / max(1, sum(sum(group.sampled) for group in groups)),
        "tokens/completion": tokens,
        "tokens/prompt": float(sum(group.prompt_length for group in groups)),
    }
    if corrections := [group.corrected for group in groups if group.corrected is not None]:
        counts = sum(corrections, Counter())
        names = ("reflect", "answer", "solution", "no_solution", "skipped", "right")
        values |= {f"correction/{name}": counts[name] / completions for name in names}
        values["correction/reward"] = table.reward_PG.mean().item()
    if any(group.problem != group.position for group in groups):
        variant_P = torch.tensor([group.is_variant for group in groups])
        values["variants/share"] = variant_P.float().mean().item()
        values["variants/success_original"] = rate_P[~variant_P].mean().item()
        values["variants/difficulty"] = float(np.mean([g.difficulty for g in groups if not g.is_variant]))
        if variant_P.any():
            values["variants/success"] = rate_P[variant_P].mean().item()
    parts = [part for group in groups for part in group.parts_before]
    for name in sorted({name for part in parts for name in part}):
        values[f"reward/{name}"] = float(np.mean([part[name] for part in parts if name in part]))
    return values


def rollout_records(
    step: int, groups: Sequence[Group], levels: AdvantageLevels, store_image: Callable[[Image], str]
) -> list[RolloutRecord]:
    """One record per completion, with the advantages before and after each level."""
    records = []
    for group in groups:
        example = group.prompt.example
        images = tuple(store_image(image) for image in group.prompt.images)
        pairs = zip(group.completions, group.scores, strict=True)
        for index, (completion, score) in enumerate(pairs):
            cell = (group.position, index)
            correction = (group.corrections or {}).get(index)
            records.append(
                RolloutRecord(
                    step=step,
                    resample_round=group.resample_round,
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
                    success_before=correction.score.success if correction else score.success,
                    parts=dict(score.parts),
                    error=score.error,
                    advantage_before=float(levels.base_PG[cell]),
                    advantage_sample_level=float(levels.sample_PG[cell]),
                    advantage=float(levels.advantage_PG[cell]),
                    entropy=-float(np.mean(sampled)) if (sampled := completion.sampled_logprobs) else None,
                    correction=asdict(correction) if correction else {},
                    meta=dict(example.meta),
                    variant=example.variant,
                    difficulty=example.difficulty,
                )
            )
    return records
