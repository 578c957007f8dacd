"""Rollout engines side by side on the same prompts: log-prob mismatch, weight transfer, speed.

For each engine: the differences between its log-probabilities and the policy's own on the tokens it
sampled (nats), how much a weight transfer sends and how long it takes, and tokens per second (the
best of three, after a warm-up).

    python scripts/benchmark_rollout.py --engines hf,vllm --dtypes float32,bfloat16
    python scripts/benchmark_rollout.py --engines hf,vllm_server --servers http://127.0.0.1:8000

The model is any checkpoint, by default the image model of this repository; prompts come from the
synthetic task. `vllm_server` needs servers of the same model and dtype (`mm-agrae serve`).
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys
import time
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from mm_agrae.config import ModelSection, PromptSection, RolloutSection, SamplingSection
from mm_agrae.model.policy import Policy
from mm_agrae.model.processing import Processing
from mm_agrae.rollout import engine_class
from mm_agrae.rollout.mismatch import measure
from mm_agrae.tasks.synthetic.task import SyntheticTask

WARM_START = Path(__file__).resolve().parents[1] / "data" / "warm_start" / "vl"


def main() -> None:
    options = parse()
    print("| engine | dtype | largest | mean | KL | MB | sync s | tokens/s | start s |")
    print("|" + "---|" * 9)
    for dtype in options.dtypes:
        processing = Processing(options.model, PromptSection())
        task = SyntheticTask(modality="image" if processing.is_multimodal else "text")
        prompts = [processing.prompt(task[index]) for index in range(options.prompts)]
        policy = Policy(
            ModelSection(path=options.model, dtype=dtype),
            processing,
            device="cuda" if torch.cuda.is_available() else "cpu",
        ).eval()
        for name in options.engines:
            row = benchmark(name, policy, processing, prompts, options)
            cells = " | ".join(f"{value:.3g}" for value in row)
            print(f"| {name} | {dtype} | {cells} |", flush=True)


def benchmark(
    name: str, policy: Policy, processing: Processing, prompts: Any, options: argparse.Namespace
) -> tuple[float, ...]:
    rollout = RolloutSection.model_validate({"engine": name, "vllm": {"servers": tuple(options.servers)}})
    sampling = SamplingSection(max_new_tokens=options.new_tokens)
    seeds = range(len(prompts))
    longest = max(map(len, prompts)) + options.new_tokens
    started = time.perf_counter()
    engine = engine_class(name)(
        policy, processing, rollout, batch_completions=len(prompts) * options.group,
        max_tokens=longest,
    )  # fmt: skip
    start = time.perf_counter() - started
    with contextlib.closing(engine):
        syncs = []
        for _ in range(3):
            policy.version += 1
            syncs.append(engine.sync())
        speeds = []
        groups = engine.generate(prompts, options.group, sampling, seeds)
        for _ in range(3):
            started = time.perf_counter()
            groups = engine.generate(prompts, options.group, sampling, seeds)
            tokens = sum(len(c.token_ids) for group in groups for c in group)
            speeds.append(tokens / (time.perf_counter() - started))
    found = measure(policy, prompts, groups)
    sync = sorted(each.seconds for each in syncs)[1]
    return (
        found.highest, found.mean, found.kl,
        syncs[0].megabytes, sync, max(speeds), start,
    )  # fmt: skip


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])

    def words(text: str) -> list[str]:
        return text.split(",")

    parser.add_argument("--model", default=str(WARM_START))
    parser.add_argument("--engines", type=words, default="hf,vllm")
    parser.add_argument("--dtypes", type=words, default="float32")
    parser.add_argument("--servers", type=words, default="", help="addresses, for vllm_server")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=48)
    options = parser.parse_args()
    options.servers = [address for address in options.servers if address]
    return options


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    main()
