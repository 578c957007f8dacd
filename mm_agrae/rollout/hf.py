"""The reference engine: sampling with the policy that is being trained.

Each prompt, images included, is encoded once; its key-value cache is then expanded to the group. Completions leave the
batch as they end. Each one has its own stream of random numbers, so neither the composition of the batch nor the
number of processes changes what is sampled, except at near-ties: see `rollout.Engine.generate`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from mm_agrae.config import RolloutSection, SamplingSection
from mm_agrae.model.compat import cache_argument
from mm_agrae.model.policy import Policy
from mm_agrae.model.processing import Processing
from mm_agrae.rollout import Sync
from mm_agrae.types import Completion, Prompt

OnTokens = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]
"""Receives each decoding step: output rows [B], token ids [B], the logits [B,V] behind them."""

DROP_SHARE = 0.25
"""Share of ended rows above which they leave the batch. Not at once: it copies the whole cache."""


class HFEngine:
    def __init__(
        self,
        policy: Policy,
        processing: Processing,
        rollout: RolloutSection | None = None,
        *,
        batch_completions: int = 128,
        max_tokens: int | None = None,
    ):
        """`rollout` and `max_tokens` are not needed: memory grows with the prompts."""
        self.policy = policy
        self.processing = processing
        self.batch_completions = batch_completions
        # In 16 bits, attention over a cache rounds otherwise than over a packed row.
        self.exact = policy.dtype == torch.float32
        self._cache = cache_argument(policy.backbone)
        self._eos = torch.tensor(processing.eos_ids, device=policy.device)

    @property
    def version(self) -> int:
        return self.policy.version

    def sync(self) -> Sync:
        """Nothing to send: this engine samples with the policy itself."""
        return Sync()

    def close(self) -> None:
        """Nothing to free."""

    def generate(
        self,
        prompts: Sequence[Prompt],
        count: int,
        sampling: SamplingSection,
        seeds: Sequence[int],
        on_progress: Callable[[int], None] | None = None,
        on_tokens: OnTokens | None = None,
    ) -> list[list[Completion]]:
        """See `rollout.Engine.generate`.

        `on_tokens` receives every token as it is sampled; an output row belongs to completion `row % count` of prompt
        `row // count`. Logits are before temperature. An exception it raises ends the call.
        """
        if len(seeds) != len(prompts):
            raise ValueError(f"{len(seeds)} seeds for {len(prompts)} prompts")
        groups: list[list[Completion]] = []
        prompts_at_once = max(1, self.batch_completions // count)
        with self.policy.gathered():
            was_training = self.policy.training
            self.policy.eval()
            try:
                for start in range(0, len(prompts), prompts_at_once):
                    part = slice(start, start + prompts_at_once)
                    groups += self._generate(
                        prompts[part], count, sampling, seeds[part], on_progress, on_tokens, start
                    )
            finally:
                self.policy.train(was_training)
        return groups

    @torch.no_grad()
    def _generate(
        self,
        prompts: Sequence[Prompt],
        count: int,
        sampling: SamplingSection,
        seeds: Sequence[int],
        on_progress: Callable[[int], None] | None,
        on_tokens: OnTokens | None,
        first_prompt: int,
    ) -> list[list[Completion]]:
        policy, device = self.policy, self.policy.device
        limit = sampling.max_new_tokens
        rows = len(prompts) * count
        # One stream of random numbers per completion, drawn before anything is sampled: token t of
        # a completion uses the same number whichever rows share its batch.
        uniform_BT = torch.from_numpy(_uniforms(seeds, count, limit)).to(device)
        token_BT = torch.zeros(rows, limit, dtype=torch.long, device=device)
        logp_BT = torch.zeros(rows, limit, device=device)
        length_B = torch.full((rows,), limit, device=device)
        stopped_B = torch.zeros(rows, dtype=torch.bool, device=device)

        with policy.autocast():
            logits, cache, mask, position = self._prefill(prompts, count)
            live = torch.arange(rows, device=device)  # output row of each row in the batch
            running = torch.ones(rows, dtype=torch.bool, device=device)
            for step in range(limit):
                token, logp = sample(logits, uniform_BT[live, step], sampling)
                token = token.masked_fill(~running, policy.pad_id)
                # Ended rows write padding beyond their length, which nothing reads.
                token_BT[live, step] = token
                logp_BT[live, step] = logp
                if on_tokens:
                    on_tokens(live[running] + first_prompt * count, token[running], logits[running])
                ended = running & torch.isin(token, self._eos)
                length_B[live] = torch.where(ended, step + 1, length_B[live])
                stopped_B[live] |= ended
                running = running & ~ended
                # The one read of a decoding step: it ends the loop and decides when rows leave.
                remaining, finished = torch.stack([running.sum(), ended.sum()]).tolist()
                last = remaining == 0 or step + 1 == limit
                finished += remaining if last else 0
                if finished and on_progress:
                    on_progress(finished)
                if last:
                    break
                # Until enough rows have ended, they stay in the batch and are fed padding.
                if len(running) - remaining > DROP_SHARE * len(running):
                    keep = running.nonzero().squeeze(-1)
                    cache.batch_select_indices(keep)
                    live, running = live[keep], running[keep]
                    mask, position, token = mask[keep], position[keep], token[keep]
                mask = torch.nn.functional.pad(mask, (0, 1), value=1)
                logits = self._decode(token, cache, mask, position)
                position = position + 1
        return self._completions(count, token_BT, logp_BT, length_B, stopped_B)

    def _prefill(self, prompts: Sequence[Prompt], count: int) -> tuple[torch.Tensor, Any, torch.Tensor, torch.Tensor]:
        """Encode each prompt once, then repeat logits, cache, mask and next position `count`×."""
        output, attention_mask, next_position = self.policy.padded(prompts)
        cache = output[self._cache]
        cache.batch_repeat_interleave(count)
        return (
            self.policy.logits(output.last_hidden_state[:, -1]).repeat_interleave(count, 0),
            cache,
            attention_mask.repeat_interleave(count, 0),
            next_position.repeat_interleave(count, 0),
        )

    def _decode(self, token_B: torch.Tensor, cache: Any, mask: torch.Tensor, position_B: torch.Tensor) -> torch.Tensor:
        """Append one token per row to the cache; returns the logits [B,V] of the next one."""
        positions = position_B[:, None]
        if self.policy.is_multimodal:  # M-RoPE: temporal, height and width are equal for text
            positions = positions.expand(3, -1, 1)
        hidden = self.policy.backbone(
            input_ids=token_B[:, None],
            attention_mask=mask,
            position_ids=positions,
            **{self._cache: cache},
            use_cache=True,
        ).last_hidden_state[:, -1]
        return self.policy.logits(hidden)

    def _completions(self, count: int, *outputs: torch.Tensor) -> list[list[Completion]]:
        """Groups of `count` from the rows' tokens, log-probs, lengths, and whether they stopped."""
        made = []
        for tokens, logps, length, stopped in zip(*(each.tolist() for each in outputs), strict=True):
            ids, reason = tokens[:length], "stop" if stopped else "length"
            text, version = self.processing.decode(ids), self.policy.version
            made.append(Completion(tuple(ids), tuple(logps[:length]), text, reason, version))
        return [made[start : start + count] for start in range(0, len(made), count)]


def sample(
    logits_BV: torch.Tensor, uniform_B: torch.Tensor, sampling: SamplingSection
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sample one token per row by inverse transform sampling with `uniform_B` in [0,1).

    Returns the tokens [B] and their log-probabilities [B] (nats) in the distribution sampled from.
    Temperature 0 takes the most probable token, with its log-probability at temperature 1.
    """
    if sampling.temperature == 0:
        logp_BV = torch.log_softmax(logits_BV, dim=-1)
        logp_B, token_B = logp_BV.max(-1)
        return token_B, logp_B
    logits_BV = logits_BV / sampling.temperature
    if sampling.top_k and sampling.top_k < logits_BV.shape[-1]:
        floor_B1 = logits_BV.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < floor_B1, -torch.inf)
    if sampling.top_p < 1:
        sorted_BV, order_BV = logits_BV.softmax(-1).sort(-1, descending=True)
        # A token is kept if the mass before it is below top_p, so the first always is.
        drop_BV = sorted_BV.cumsum(-1) - sorted_BV >= sampling.top_p
        logits_BV = logits_BV.masked_fill(drop_BV.scatter(-1, order_BV, drop_BV), -torch.inf)
    logp_BV = torch.log_softmax(logits_BV, dim=-1)
    # Not torch.multinomial, whose draws depend on the batch: the token is the first one whose cumulative probability
    # exceeds the row's own uniform number. The sum may miss 1 by rounding, so the number is scaled to it.
    cumulative_BV = logp_BV.exp().cumsum(-1)
    point_B1 = uniform_B[:, None] * cumulative_BV[:, -1:]
    token_B = torch.searchsorted(cumulative_BV, point_B1, right=True).squeeze(-1)
    # Rounding can move the point up to the total: then take the last token of non-zero probability.
    token_B = torch.minimum(token_B, (cumulative_BV < cumulative_BV[:, -1:]).sum(-1))
    return token_B, logp_BV.gather(-1, token_B[:, None]).squeeze(-1)


def _uniforms(seeds: Sequence[int], count: int, limit: int) -> np.ndarray:
    """[len(seeds)·count, limit] numbers in [0,1), one counter-based stream per completion."""
    keys = [[seed, index] for seed in seeds for index in range(count)]
    streams = (np.random.Generator(np.random.Philox(key=key)) for key in keys)
    return np.stack([stream.random(limit, np.float32) for stream in streams])
