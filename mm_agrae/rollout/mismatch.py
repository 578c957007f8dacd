"""Log-prob mismatch: an engine's log-probabilities against the policy's own.

An engine that holds stale weights, sees other images or shifts its log-probabilities raises no error, but the policy
then learns from samples of another distribution. So a few completions are checked token by token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mm_agrae.batching import UpdateRow, idle_batch, micro_batch
from mm_agrae.config import SamplingSection
from mm_agrae.loss import sampler_weight
from mm_agrae.model.policy import Policy
from mm_agrae.rollout import Engine
from mm_agrae.types import Completion, Prompt

CHECK_TOKENS = 64
"""Tokens per checked completion: enough to leave the prompt behind, few enough to be cheap."""


@dataclass(frozen=True)
class Mismatch:
    """Absolute differences of log-probabilities over `tokens` sampled tokens (nats).

    `kl` estimates KL(engine ‖ policy) per token with the k3 estimator.
    """

    tokens: int
    mean: float
    highest: float
    kl: float

    @classmethod
    def over(cls, parts: Sequence[Mismatch]) -> Mismatch:
        """The mismatch of several processes together."""
        tokens = sum(part.tokens for part in parts)
        return cls(
            tokens,
            sum(part.mean * part.tokens for part in parts) / max(1, tokens),
            max(part.highest for part in parts),
            sum(part.kl * part.tokens for part in parts) / max(1, tokens),
        )

    def __str__(self) -> str:
        return (
            f"log-probabilities of {self.tokens} tokens differ by {self.mean:.2g} nats on "
            f"average, {self.highest:.2g} at most; KL {self.kl:.2g}"
        )


def check(
    engine: Engine, policy: Policy, prompts: Sequence[Prompt], sampling: SamplingSection, seeds: Sequence[int]
) -> Mismatch:
    """Sample one completion of each prompt with the engine and `measure` it.

    The engine must hold the policy's current weights. The whole distribution is compared, so
    `top_p` and `top_k` of `sampling` are ignored.
    """
    limit = min(sampling.max_new_tokens, CHECK_TOKENS)
    whole = sampling.model_copy(update={"top_p": 1.0, "top_k": 0, "max_new_tokens": limit})
    return measure(policy, prompts, engine.generate(prompts, 1, whole, seeds))


@torch.no_grad()
def measure(policy: Policy, prompts: Sequence[Prompt], groups: Sequence[Sequence[Completion]]) -> Mismatch:
    """Score each prompt's completions with the policy and compare the log-probabilities.

    Runs the policy's forward pass, on every process if the policy is sharded.
    """
    rows = [UpdateRow(index, each, 0.0) for index, group in enumerate(groups) for each in group]
    was_training = policy.training
    policy.eval()
    try:
        batch = micro_batch(prompts, rows, policy.device) if rows else idle_batch(prompts, policy.device)
        logp_BT = policy(batch)[0]
    finally:
        policy.train(was_training)
    gap_BT = (logp_BT - batch.sampling_logp_BT).masked_fill(batch.mask_BT == 0, 0)
    sums = sampler_weight(logp_BT, batch.sampling_logp_BT, batch.mask_BT).sums
    tokens = int(batch.mask_BT.sum())
    return Mismatch(
        tokens,
        sums["mismatch_abs"].item() / max(1, tokens),
        gap_BT.abs().max().item() if gap_BT.numel() else 0.0,
        sums["mismatch_kl"].item() / max(1, tokens),
    )
