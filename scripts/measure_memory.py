"""The memory estimate of `mm-agrae doctor` against what a rollout and an update really take.

    python scripts/measure_memory.py CONFIG [key=value | FILE.yaml ...]

Prompts are noise of exactly prompt.max_tokens tokens, mostly image tokens for a vision-language
model, and completions are as long as allowed: the estimate's assumptions hold, so only its
arithmetic is compared. A phase is measured as the peak of torch's allocator above what it held
before, from its own statistics on a GPU and from the profiler's events on a CPU.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from PIL import Image

from mm_agrae import config as configs
from mm_agrae.loss import Denominator, policy_loss
from mm_agrae.model.memory import estimate, micro_batch_tokens
from mm_agrae.model.policy import Policy
from mm_agrae.model.processing import Processing
from mm_agrae.model.size import find_model_config, measure
from mm_agrae.rollout.hf import HFEngine
from mm_agrae.types import Example, MicroBatch, Prompt

MB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    config = configs.load(options.config, options.overrides)
    device = "cuda" if torch.cuda.is_available() and config.model.device != "cpu" else "cpu"
    processing = Processing(config.model.path, config.prompt)
    model_config, _ = find_model_config(config.model.path)
    expected = estimate(config, measure(config, model_config), device=device)
    policy = Policy(
        config.model,
        processing,
        temperature=config.rollout.temperature,
        shared_prompt=config.update.shared_prompt,
        device=device,
    )
    optimizer = torch.optim.AdamW(policy.trainable_parameters(), lr=0.0)
    batch = micro_batch_tokens(config)
    prompts = [make_prompt(config, processing, index) for index in range(batch.prompts)]
    group = config.rollout.completions_per_prompt
    # One-off allocations of a first use belong to no phase.
    update(policy, noise_batch(policy, prompts[:1], 1, 8, config), config)
    policy.zero_grad()
    found = {}
    rows = max(1, config.rollout.batch_completions // group)
    rows = min(rows, config.rollout.prompts_per_step)
    engine = HFEngine(policy, processing, batch_completions=config.rollout.batch_completions)
    asked = [make_prompt(config, processing, index) for index in range(rows)]
    engine._eos = torch.tensor([-1], device=device)  # no completion stops early
    with Peak(device) as peak:
        engine.generate(asked, group, config.rollout, list(range(rows)))
    found["rollout"] = peak.bytes
    completions = batch.predicted // config.rollout.max_new_tokens
    noise = noise_batch(policy, prompts, completions, config.rollout.max_new_tokens, config)
    update(policy, noise, config)
    with Peak(device) as peak:  # of a second micro-batch, whose gradients are added to the first one's
        update(policy, noise, config)
    found["update"] = peak.bytes + expected.update["gradients"]
    with Peak(device) as peak:
        optimizer.step()
    found["optimiser step"] = peak.bytes
    size = f"{batch.tokens} tokens of {batch.prompts} prompts"
    print(f"{config.model.path}: micro-batches of {size}, {device}")
    print(f"{'phase':16}{'estimate':>12}{'measured':>12}{'ratio':>8}")
    for name, peak_bytes in found.items():
        entries = dict(expected.phases[name])
        if name == "optimiser step":  # the gradients are there already; Adam's state is new
            entries.pop("gradients")
            entries["optimiser"] = expected.always["optimiser (Adam)"]
        total = sum(entries.values())
        ratio = total / max(1, peak_bytes)
        print(f"{name:16}{total / MB:9.0f} MB{peak_bytes / MB:9.0f} MB{ratio:8.2f}")


def make_prompt(config: Any, processing: Processing, seed: int) -> Prompt:
    """Noise of exactly prompt.max_tokens tokens, with an image if the model takes images."""
    want = config.prompt.max_tokens
    images: tuple[Any, ...] = ()
    if processing.is_multimodal:
        side = 28 * int((want * 0.8) ** 0.5)
        noise = np.random.default_rng(seed).integers(0, 255, (side, side, 3), dtype=np.uint8)
        images = (Image.fromarray(noise),)
    prompt = processing.prompt(Example(f"noise-{seed}", "?", "", images=images))
    more = want - len(prompt.token_ids)
    filler = torch.full((more,), int(prompt.token_ids[-1]))
    kinds = prompt.mm_token_type_ids
    return Prompt(
        example=prompt.example,
        text=prompt.text,
        token_ids=torch.cat([prompt.token_ids, filler]),
        mm_token_type_ids=None if kinds is None else torch.cat([kinds, torch.zeros(more, dtype=kinds.dtype)]),
        pixel_values=prompt.pixel_values,
        image_grid_thw=prompt.image_grid_thw,
        images=prompt.images,
    )


def noise_batch(policy: Policy, prompts: list[Prompt], rows: int, length: int, config: Any) -> MicroBatch:
    """Completions of `length` random tokens for the prompts, a group each."""
    group = config.rollout.completions_per_prompt
    ones = torch.ones(rows, length, device=policy.device)
    return MicroBatch(
        prompts=prompts,
        prompt_index_B=torch.arange(rows).div(group, rounding_mode="floor").clamp(max=len(prompts) - 1),
        token_BT=torch.randint(5, 100, (rows, length), device=policy.device),
        mask_BT=ones,
        advantage_B=torch.linspace(-1, 1, rows, device=policy.device),
        sampling_logp_BT=-ones,
    )


def update(policy: Policy, batch: MicroBatch, config: Any, sign: float = 1.0) -> None:
    """Forward and backward pass; the gradient, times `sign`, is added to what is there."""
    policy.train()
    logp_BT, entropy_BT = policy(batch)
    rows, length = logp_BT.shape
    loss = policy_loss(
        config.update.loss,
        logp_BT=logp_BT,
        entropy_BT=entropy_BT,
        advantage_B=batch.advantage_B,
        mask_BT=batch.mask_BT,
        denominator=Denominator(rows, rows * length, length),
    ).loss
    (sign * loss).backward()


class Peak:
    """`bytes`: the most that was in use within the block above what was in use before it."""

    def __init__(self, device: str):
        self.cuda = device == "cuda"
        self.bytes = 0

    def __enter__(self) -> Peak:
        gc.collect()
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            self.profile = torch.profiler.profile(
                activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
            )
            self.profile.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self.cuda:
            self.bytes = torch.cuda.max_memory_allocated() - self.before
            return
        self.profile.__exit__(*error)
        events = self.profile.profiler.kineto_results.events()
        sizes = [event.nbytes() for event in events if event.name() == "[memory]"]
        self.bytes = max(itertools.accumulate(sizes), default=0)


if __name__ == "__main__":
    main()
