"""Is the engine's policy the trained one? Its log-probabilities against the policy's own.

An engine that holds old weights, other pictures or shifted log-probabilities goes on without an
error; what it samples is only no longer what is learnt from. So a few completions are compared
token by token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mm_agrae.batching import UpdateRow, micro_batch
from mm_agrae.config import SamplingSection
from mm_agrae.loss import sampler_weight
from mm_agrae.model.policy import Policy
from mm_agrae.rollout import Engine
from mm_agrae.types import Completion, Prompt

PROBE_TOKENS = 64
"""Long enough to leave the prompt behind, short enough to cost little."""


@dataclass(frozen=True)
class Mismatch:
    """Differences of log-probabilities over `tokens` sampled tokens (nats).

    `kl` estimates KL(engine ‖ policy) per token, by k3.
    """

    tokens: int
    mean: float
    highest: float
    kl: float

    @classmethod
    def over(cls, parts: Sequence[Mismatch]) -> Mismatch:
        """Of several processes together."""
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


@torch.no_grad()
def check(
    engine: Engine,
    policy: Policy,
    prompts: Sequence[Prompt],
    sampling: SamplingSection,
    seeds: Sequence[int],
) -> Mismatch:
    """Sample a completion of each prompt and let the policy score the same tokens.

    The engine must hold the policy's present weights. The whole distribution is compared, so
    `top_p` and `top_k` of `sampling` are set aside.
    """
    whole = sampling.model_copy(
        update={
            "top_p": 1.0,
            "top_k": 0,
            "max_new_tokens": min(sampling.max_new_tokens, PROBE_TOKENS),
        }
    )
    groups = engine.generate(prompts, 1, whole, seeds)
    rows = [UpdateRow(index, group[0], 0.0) for index, group in enumerate(groups) if group]
    idle = not rows
    if idle:  # the policy's forward pass is for all processes together
        rows = [UpdateRow(0, Completion((0,), (0.0,), "", "stop", policy.version), 0.0)]
    was_training = policy.training
    policy.eval()
    try:
        batch = micro_batch(prompts, rows, policy.device)
        if idle:
            batch.mask_BT.zero_()
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
