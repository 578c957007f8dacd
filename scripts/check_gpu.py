"""What only a GPU can show, in one command: correctness, speed and memory on the card at hand.

    python scripts/check_gpu.py --out runs/check_gpu --budget 480
    python scripts/check_gpu.py --out /tmp/check --budget 240 --tiny

Each part runs in a process of its own with a limit, and all of them together never take longer than the budget
(seconds): a part that fails or hangs costs nobody else. `gpu.json` in the output folder is rewritten after each part,
with everything that a part measured before it failed; `parts.log` holds what the parts printed. Exit status 1 if a
part failed. `--tiny` runs the same code at small shapes on a CPU and leaves out what needs CUDA.

The 3B is Qwen2.5-VL-3B's shape with random weights, made on the GPU and trained through `Policy`. MFU is
`flop_count` of benchmark_update.py (6 operations a token for each trained weight of a linear layer, 4 for a frozen
one, attention, head and vision tower; what checkpointing computes again is not counted) over 989 TFLOP/s.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gc
import itertools
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mm_agrae.errors import one_line
from mm_agrae.run.versions import versions

ROOT = Path(__file__).resolve().parents[1]
FIGURE, ERROR, SKIPPED = "@figure ", "@error ", "@skipped "
"""Begin the lines by which a part tells what it found."""
PEAK_FLOPS = 989e12
"""Dense bfloat16 operations a second of an H100 or H200, as the maker states."""
MODELS = {"image": ROOT / "data" / "warm_start" / "vl", "text": ROOT / "data" / "warm_start" / "text"}


@dataclass(frozen=True)
class Sizes:
    """How large everything is, on a GPU or, with --tiny, on a CPU."""

    copy_bytes: int
    product: int
    head_shapes: tuple[tuple[int, int, int], ...]
    timed_attention: tuple[tuple[int, int, int], ...]
    """Prompt, completions, group."""
    timed_heads: tuple[int, int, int]
    vocabulary: int
    hidden: int
    positions: tuple[int, ...]
    chunks_mb: tuple[int, ...]
    text: dict[str, Any]
    """What the 3B's text model has otherwise."""
    vision: dict[str, Any]
    prompt: int
    image: tuple[int, int]
    """Height and width in tokens."""
    completion: int
    group: int
    long_groups: int
    rollout_prompts: int
    rollout_tokens: int
    repeats: int
    trl: dict[str, Any]


GPU = Sizes(
    copy_bytes=4 << 30,
    product=8192,
    head_shapes=((16, 2, 128), (28, 4, 128), (24, 8, 128), (14, 2, 64), (16, 16, 80), (8, 1, 256)),
    timed_attention=((1024, 256, 8), (2048, 2048, 5)),
    timed_heads=(16, 2, 128),
    vocabulary=151_936,
    hidden=2048,
    positions=(0, 1, 2048, 15_000),
    chunks_mb=(64, 128, 256, 512, 1024),
    text={},
    vision={},
    prompt=1024,
    image=(24, 32),
    completion=256,
    group=8,
    long_groups=5,
    rollout_prompts=16,
    rollout_tokens=64,
    repeats=5,
    trl={"preset": "3b", "vocabulary": None, "layers": None, "dtype": "bfloat16"},
)
TINY = Sizes(
    copy_bytes=1 << 20,
    product=128,
    head_shapes=((4, 2, 32), (4, 1, 16)),
    timed_attention=((64, 16, 4),),
    timed_heads=(4, 2, 32),
    vocabulary=1200,
    hidden=64,
    positions=(0, 1, 40, 90),
    chunks_mb=(1, 4),
    text={
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "vocab_size": 2048,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]},
    },
    vision={
        "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64,
        "fullatt_block_indexes": [1],
    },
    prompt=64,
    image=(6, 8),
    completion=12,
    group=4,
    long_groups=2,
    rollout_prompts=2,
    rollout_tokens=6,
    repeats=2,
    trl={"preset": "57m", "vocabulary": 256, "layers": 2, "dtype": "float32"},
)  # fmt: skip


class Record:
    """What a part finds. Each figure is printed at once, so that a part that is cut off keeps what it had."""

    def __init__(self) -> None:
        self.failed = False

    def note(self, name: str, value: Any) -> None:
        value = float(f"{value:.4g}") if isinstance(value, float) else value
        print(FIGURE + json.dumps({name: value}), flush=True)

    def between(self, name: str, value: float, low: float, high: float) -> None:
        """A figure that must lie in a range; the part goes on if it does not."""
        self.note(name, value)
        if not low <= value <= high:
            self.fail(f"{name} is {value:.3g}, outside {low:g} to {high:g}")

    def most(self, name: str, value: float, limit: float) -> None:
        self.between(name, value, 0, limit)

    def fail(self, problem: str) -> None:
        self.failed = True
        print(ERROR + json.dumps(problem), flush=True)

    def skip(self, reason: str) -> None:
        print(SKIPPED + json.dumps(reason), flush=True)

    @contextlib.contextmanager
    def case(self, name: str) -> Iterator[None]:
        """A piece of a part: an exception in it fails the part, and what follows runs all the same."""
        import torch

        began = time.monotonic()
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.fail(f"{name}: {type(error).__name__}: {one_line(error)}")
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        print(f"{name}: {time.monotonic() - began:.1f} s", flush=True)


# --------------------------------------------------------------------------------- measuring


def wait(device: str) -> None:
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


def milliseconds(run: Callable[[], Any], device: str, repeats: int) -> float:
    """The median time of a call, after one that warms up: CUDA events, or the clock on a CPU."""
    import torch

    run()
    times = []
    for _ in range(repeats):
        wait(device)
        if device == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            wait(device)
            times.append(start.elapsed_time(end))
        else:
            began = time.perf_counter()
            run()
            times.append(1e3 * (time.perf_counter() - began))
    return statistics.median(times)


def difference(ours: Any, theirs: Any) -> float:
    """Relative to the norm of `theirs`, or absolute where that is 0."""
    error, size = (
        x.double().norm().item() for x in (ours.detach().float() - theirs.detach().float(), theirs.detach())
    )
    return error / size if size else error


def profiled(record: Record, name: str, run: Callable[[], Any], device: str) -> None:
    """Kernels, calls of attention, waits for the GPU (and where), and the kernels that take longest."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    with profile(activities=activities) as found:
        run()
        wait(device)
    events = found.key_averages()
    counts = {event.key: event.count for event in events}
    calls = ("aten::scaled_dot_product_attention", "aten::_flash_attention_forward")
    record.note(f"{name}/attention calls", max(counts.get(key, 0) for key in calls))
    if device != "cuda":
        return
    waits = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
    record.note(f"{name}/kernels", sum(count for key, count in counts.items() if "LaunchKernel" in key))
    record.note(f"{name}/syncs", sum(counts.get(key, 0) for key in waits))
    own = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
    record.note(f"{name}/GPU busy ms", sum(event.self_device_time_total for event in own) / 1e3)
    slowest = sorted(own, key=lambda event: -event.self_device_time_total)[:15]
    rows = [[event.key[:90], round(event.self_device_time_total / 1e3, 2), event.count] for event in slowest]
    record.note(f"{name}/slowest kernels (ms, calls)", rows)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        run()
        torch.cuda.set_sync_debug_mode("default")
    places = Counter(f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchroniz" in str(w.message))
    record.note(f"{name}/waits in Python", dict(places.most_common(12)))


# --------------------------------------------------------------------------- env, attention, head


def check_env(record: Record, sizes: Sizes, device: str) -> None:
    import torch

    record.note("torch CUDA", torch.version.cuda)
    if device == "cuda":
        card = torch.cuda.get_device_properties(0)
        record.note("card", card.name)
        record.note("memory GiB", card.total_memory / 2**30)
        record.note("capability", f"{card.major}.{card.minor}")
    source = torch.zeros(sizes.copy_bytes // 4, device=device)
    target = torch.empty_like(source)
    taken = milliseconds(lambda: target.copy_(source), device, sizes.repeats)
    record.note("copy GB/s", 2 * sizes.copy_bytes / taken / 1e6)
    a, b = (torch.randn(sizes.product, sizes.product, device=device).bfloat16() for _ in range(2))
    taken = milliseconds(lambda: a @ b, device, sizes.repeats)
    record.note("bf16 product TFLOP/s", 2 * sizes.product**3 / taken / 1e9)


def layout_of(lengths: list[tuple[int, list[int]]], device: str) -> Any:
    """A packed row of groups, each (prompt, completions); completions lack their last token there."""
    from mm_agrae.model.packed_layout import GroupSpans, PackedLayout

    groups, end = [], 0
    for prompt, completions in lengths:
        bounds = list(itertools.accumulate([n - 1 for n in completions if n > 1], initial=end + prompt))
        groups.append(GroupSpans((end, end + prompt), tuple(itertools.pairwise(bounds))))
        end = bounds[-1]
    return PackedLayout(groups, device)


def tensors(heads: tuple[int, int, int], length: int, device: str, dtype: Any, seed: int, rows: int = 1) -> list[Any]:
    """Query, key and value."""
    import torch

    generator = torch.Generator(device).manual_seed(seed)
    shapes = [(rows, count, length, heads[2]) for count in (heads[0], heads[1], heads[1])]
    return [torch.randn(s, generator=generator, device=device).to(dtype).requires_grad_() for s in shapes]


def check_attention(record: Record, sizes: Sizes, device: str) -> None:
    import random

    import torch

    from mm_agrae.model import shared_attention

    if device == "cuda":
        for heads in sizes.head_shapes:
            fault = shared_attention._varlen_fault(torch.device("cuda", 0), torch.bfloat16, *heads)
            record.note(f"self-test {heads}", fault or "ok")
            if fault:
                record.fail(f"self-test {heads}: {fault}")
    else:
        record.note("self-test", "skipped: needs CUDA")
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    chance, worst = random.Random(0), dict.fromkeys(("out", "dq", "dk", "dv"), 0.0)
    for trial in range(20):
        lengths = []
        for _ in range(chance.randint(1, 5)):
            completions = [chance.choice([1, 2, chance.randint(3, 300)]) for _ in range(chance.randint(0, 6))]
            lengths.append((chance.choice([1, 17, chance.randint(2, 700)]), completions))
        layout = layout_of(lengths, device)
        heads = sizes.head_shapes[trial % len(sizes.head_shapes)]
        qkv = tensors(heads, layout.length, device, dtype, trial)
        with record.case(f"layout {trial} {heads} {lengths}"):
            found = attention_errors(shared_attention, qkv, layout, heads[2] ** -0.5)
            worst = {name: max(worst[name], found[name]) for name in worst}
    for name, error in worst.items():
        record.most(f"{name} error", error, 2e-2)
    for shape in sizes.timed_attention:
        with record.case(f"time {shape}"):
            time_attention(record, shared_attention, shape, sizes, device, dtype)


def attention_errors(module: Any, qkv: list[Any], layout: Any, scale: float) -> dict[str, float]:
    """Errors of output and gradients against masked attention in float32."""
    import torch

    exact = [x.detach().float().requires_grad_() for x in qkv]
    out = module.attention(*qkv, layout, scale=scale)
    expected = module.masked_attention(*exact, layout, scale)
    weight = torch.randn(out.shape, device=out.device).to(out.dtype)
    ours = torch.autograd.grad(out, qkv, weight)
    theirs = torch.autograd.grad(expected, exact, weight.float())
    pairs = zip([out, *ours], [expected, *theirs], strict=True)
    return {name: difference(*pair) for name, pair in zip(("out", "dq", "dk", "dv"), pairs, strict=True)}


def time_attention(
    record: Record, module: Any, shape: tuple[int, int, int], sizes: Sizes, device: str, dtype: Any
) -> None:
    import torch

    prompt, completion, group = shape
    layout = layout_of([(prompt, [completion + 1] * group)], device)
    qkv = tensors(sizes.timed_heads, layout.length, device, dtype, 0)
    rows = tensors(sizes.timed_heads, prompt + completion, device, dtype, 0, group)
    scale = sizes.timed_heads[2] ** -0.5

    def repeated() -> Any:
        return torch.nn.functional.scaled_dot_product_attention(*rows, is_causal=True, enable_gqa=True)

    ways: dict[str, tuple[Callable[[], Any], list[Any]]] = {
        "ours": (lambda: module.attention(*qkv, layout, scale=scale), qkv),
        "masked": (lambda: module.masked_attention(*qkv, layout, scale), qkv),
        "repeated": (repeated, rows),
    }
    for name, (run, inputs) in ways.items():

        def both(run: Callable[[], Any] = run, inputs: list[Any] = inputs) -> None:
            out = run()
            torch.autograd.grad(out, inputs, torch.ones_like(out))

        taken = milliseconds(both, device, 2 * sizes.repeats)
        record.note(f"{prompt}x{completion} G={group} {name} ms", taken)


def check_head(record: Record, sizes: Sizes, device: str) -> None:
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    net = torch.nn.Sequential()
    net.lm_head = torch.nn.Linear(sizes.hidden, sizes.vocabulary, bias=False, device=device)
    with torch.no_grad():  # exact in 16 bits, so that only the arithmetic of the head is compared
        net.lm_head.weight.copy_(net.lm_head.weight.normal_(std=0.02).bfloat16())
    for positions in sizes.positions:
        with record.case(f"N={positions}"):
            head_case(record, f"N={positions}", net.lm_head, positions, device)
    with record.case("entropy"):
        head_case(record, "entropy", net.lm_head, sizes.positions[2], device, entropy_grad=True)
    for positions, size in itertools.product(sizes.positions[2:], sizes.chunks_mb):
        with record.case(f"N={positions} in blocks of {size} MB"):
            run = head_run(net.lm_head, positions, device, chunk_bytes=size << 20)[0]
            record.note(f"N={positions} {size} MB ms", milliseconds(run, device, sizes.repeats))
    adapted = get_peft_model(net, LoraConfig(r=16, target_modules=["lm_head"]))
    head = adapted.base_model.model.lm_head
    with torch.no_grad():
        head.lora_B["default"].weight.normal_(std=0.02)
    with record.case("LoRA"):
        head_case(record, "LoRA", head, sizes.positions[2], device)


def head_run(head: Any, positions: int, device: str, **options: Any) -> tuple[Callable[[], list[Any]], list[Any]]:
    """Our head forward and backward: a call that returns log-probabilities, entropies and gradients; its inputs."""
    import torch

    from mm_agrae.model.vocab_head import head_logprobs

    weight = (head.get_base_layer() if hasattr(head, "lora_A") else head).weight
    hidden_NH = torch.randn(positions, weight.shape[1], device=device).bfloat16().float().requires_grad_()
    target_N = torch.randint(len(weight), (positions,), device=device)
    coefficient_N = torch.randn(positions, device=device)
    learning = [hidden_NH, *(p for p in head.parameters() if p.requires_grad)]

    def run() -> list[Any]:
        with torch.autocast(device, torch.bfloat16):
            logp_N, entropy_N = head_logprobs(head, hidden_NH, target_N, **options)
        total = (logp_N * coefficient_N).sum()
        if options.get("entropy_grad"):
            total = total + (entropy_N * coefficient_N).sum()
        return [logp_N, entropy_N, *torch.autograd.grad(total, learning)]

    return run, [hidden_NH, target_N, coefficient_N, learning]


def head_case(record: Record, name: str, head: Any, positions: int, device: str, **options: Any) -> None:
    """Our head under autocast against log_softmax of float32 logits, 1024 positions at a time."""
    import torch

    run, (hidden_NH, target_N, coefficient_N, learning) = head_run(head, positions, device, **options)
    ours = run()
    logps, entropies, grads = [], [], [torch.zeros_like(x) for x in learning]
    for hidden, target, coefficient in zip(
        *(x.split(1024) for x in (hidden_NH, target_N, coefficient_N)), strict=True
    ):
        all_logp = head(hidden).log_softmax(-1)
        entropy = -(all_logp.exp() * all_logp).sum(-1)
        logp = all_logp.gather(-1, target[:, None])[:, 0]
        total = (logp + (entropy if options else 0)) * coefficient
        for grad, part in zip(grads, torch.autograd.grad(total.sum(), learning), strict=True):
            grad += part
        logps.append(logp.detach())
        entropies.append(entropy.detach())
    if positions:
        record.most(f"{name} log-prob error", float((ours[0].detach() - torch.cat(logps)).abs().max()), 1e-3)
        record.most(f"{name} entropy error", float((ours[1].detach() - torch.cat(entropies)).abs().max()), 1e-3)
    worst = max(difference(*pair) for pair in zip(ours[2:], grads, strict=True))
    record.most(f"{name} gradient error", worst, 1e-2)


# ------------------------------------------------------------------------------- tiny models


def check_models(record: Record, sizes: Sizes, device: str) -> None:
    for kind in MODELS:
        with record.case(f"{kind} against the CPU"):
            against_cpu(record, kind, device)
    lora = {"lora": {"rank": 8, "alpha": 16}, "dtype": "bfloat16", "gradient_checkpointing": True}
    with tempfile.TemporaryDirectory(prefix="check-gpu-") as folder:
        work = Path(folder)
        for kind in MODELS:
            with record.case(f"{kind} trained"):
                trained(record, f"{kind} trained", small_run(work / kind, kind, device))
        with record.case("bf16 LoRA by the command line"):
            trained_by_command(record, small_run(work / "lora", "image", device, **lora))
        with record.case("bf16 full"):
            trained(record, "bf16 full", small_run(work / "bf16", "image", device, dtype="bfloat16"))
        with record.case("resumed"):
            resumed(record, work / "image", small_run(work / "resumed", "image", device), device)


def small_run(run_dir: Path, kind: str, device: str, **model: Any) -> Any:
    from mm_agrae import config as configs

    return configs.parse(
        {
            "run_dir": str(run_dir),
            "model": {"path": str(MODELS[kind]), "device": device, **model},
            "data": {"train": [{"task": "synthetic", "modality": kind, "split": "train"}]},
            "train": {"steps": 5, "seed": 0},
            "rollout": {"prompts_per_step": 4, "completions_per_prompt": 4, "max_new_tokens": 24},
            "update": {"learning_rate": 1e-4},
            "checkpoint": {"every": 1, "keep": 5},
        }
    )


def against_cpu(record: Record, kind: str, device: str) -> None:
    """Greedy tokens, log-probabilities and gradients in float32, on the device and on the CPU."""
    from mm_agrae.batching import UpdateRow, micro_batch
    from mm_agrae.config import DataSource, ModelSection, PromptSection, SamplingSection
    from mm_agrae.model.policy import Policy
    from mm_agrae.model.processing import Processing
    from mm_agrae.rollout.hf import HFEngine
    from mm_agrae.tasks import load_all

    path = str(MODELS[kind])
    processing = Processing(path, PromptSection())
    task = load_all([DataSource(task="synthetic", modality=kind, split="test")])
    prompts = [processing.prompt(task[index]) for index in range(6)]
    results: dict[str, Any] = {}
    sampled = None
    for where in ("cpu", device):
        policy = Policy(ModelSection(path=path), processing, shared_prompt="on", device=where)
        engine = HFEngine(policy, processing)
        greedy = engine.generate(prompts, 1, SamplingSection(temperature=0.0, max_new_tokens=24), range(6))
        sampled = sampled or engine.generate(prompts, 3, SamplingSection(max_new_tokens=24), range(6))
        rows = [UpdateRow(p, each, 1.0) for p, group in enumerate(sampled) for each in group]
        logp_BT, _ = policy(micro_batch(prompts, rows, policy.device))
        logp_BT.sum().backward()
        grads = [p.grad.cpu().flatten() for p in policy.trainable_parameters() if p.grad is not None]
        results[where] = ([group[0].token_ids for group in greedy], logp_BT.detach().cpu(), grads)
    import torch

    (tokens, logp_BT, grads), (their_tokens, their_logp_BT, their_grads) = results[device], results["cpu"]
    same = sum(a == b for a, b in zip(tokens, their_tokens, strict=True))
    record.between(f"{kind} same greedy completions of 6", same, 6, 6)
    record.most(f"{kind} log-prob error", float((logp_BT - their_logp_BT).abs().max()), 1e-4)
    record.most(f"{kind} gradient error", difference(torch.cat(grads), torch.cat(their_grads)), 1e-3)


def trained(record: Record, name: str, config: Any) -> Any:
    from mm_agrae.progress import Reporter
    from mm_agrae.trainer import Trainer

    trainer = Trainer(config, Reporter(enabled=False))
    trainer.train()
    steps_of(record, name, config)
    return trainer


def steps_of(record: Record, name: str, config: Any) -> None:
    import math

    from mm_agrae.run.folder import RunFolder

    rows = RunFolder(config.run_dir).read_metrics()
    record.between(f"{name} steps", len(rows), 5, 5)
    record.note(f"{name} s a step", statistics.median(row["seconds/total"] for row in rows[1:]))
    losses, norms = ([row[f"update/{name}"] for row in rows] for name in ("loss", "grad_norm"))
    if not all(map(math.isfinite, losses + norms)) or not max(norms) > 0:
        record.fail(f"{name}: losses {losses}, gradient norms {norms}")


def trained_by_command(record: Record, config: Any) -> None:
    from mm_agrae import cli
    from mm_agrae import config as configs

    file = Path(config.run_dir).with_suffix(".yaml")
    file.write_text(configs.dump(config), encoding="utf-8")
    record.most("exit status of mm-agrae train", cli.main(["train", str(file)]), 0)
    steps_of(record, "bf16 LoRA", config)


def resumed(record: Record, whole: Path, config: Any, device: str) -> None:
    """A copy of a run, cut off after three of five steps and taken up again."""
    import torch
    from safetensors.torch import load_file

    from mm_agrae.run import checkpoint

    copy = Path(config.run_dir)
    shutil.copytree(whole, copy, symlinks=True)
    checkpoint.forget_after(copy / "checkpoints", 3)
    trained(record, "resumed", config)

    def weights(run: Path) -> Any:
        newest = checkpoint.newest(run / "checkpoints")
        assert newest is not None, f"{run} has no checkpoint"
        return torch.cat([x.flatten() for _, x in sorted(load_file(newest / "model.safetensors").items())])

    # FlashAttention's and index_put's sums have no fixed order on a GPU.
    record.most("resumed weights differ", difference(weights(copy), weights(whole)), 0 if device == "cpu" else 1e-3)


# ----------------------------------------------------------------------------------- the 3B


class Large:
    """The 3B with random weights through the real `Policy`, and micro-batches for it."""

    def __init__(self, sizes: Sizes, device: str, **model: Any):
        import torch

        from mm_agrae import config as configs
        from mm_agrae.model import loading
        from mm_agrae.model.policy import Policy
        from mm_agrae.model.processing import Processing

        self.sizes, self.device = sizes, device
        path = str(MODELS["image"])
        self.config = configs.parse(
            {
                "run_dir": "unused",
                "model": {"path": path, "dtype": "bfloat16", "device": device, **model},
                "data": {"train": [{"task": "synthetic", "modality": "image"}]},
                "train": {"steps": 1},
                "prompt": {"max_tokens": sizes.prompt},
                "rollout": {
                    "prompts_per_step": sizes.rollout_prompts, "completions_per_prompt": sizes.group,
                    "max_new_tokens": sizes.completion,
                },
                "update": {"micro_batch_completions": sizes.group, "learning_rate": 1e-12},
            }
        )  # fmt: skip
        self.model_config = large_config(sizes, path)
        self.processing = Processing(path, self.config.prompt)
        torch.manual_seed(0)
        original, loading._pretrained = loading._pretrained, self._random
        try:
            self.policy = Policy(self.config.model, self.processing, shared_prompt="on", device=device)
        finally:
            loading._pretrained = original

    def _random(self, settings: Any, path: str, adapted: bool) -> Any:
        """As `loading._pretrained`: what learns in float32, what is frozen in 16 bits; weights are made up."""
        import torch
        from transformers import AutoModelForImageTextToText

        dtype = torch.bfloat16 if adapted else torch.float32
        with torch.device(self.device):
            return AutoModelForImageTextToText.from_config(
                self.model_config, dtype=dtype, attn_implementation=settings.attn_implementation
            )

    def prompt(self, seed: int) -> Any:
        """One image between random words."""
        import torch

        from mm_agrae.types import Example, Prompt

        config, (height, width) = self.model_config, self.sizes.image
        generator = torch.Generator().manual_seed(seed)
        # The first ids are special ones.
        ids = torch.randint(700, config.text_config.vocab_size, (self.sizes.prompt,), generator=generator)
        image = [config.vision_start_token_id, *[config.image_token_id] * height * width, config.vision_end_token_id]
        ids[4 : 4 + len(image)] = torch.tensor(image)
        values = 3 * config.vision_config.temporal_patch_size * config.vision_config.patch_size**2
        return Prompt(
            Example(f"random {seed}", "", ""), "", ids, (ids == config.image_token_id).int(),
            torch.randn(4 * height * width, values, generator=generator),
            torch.tensor([[1, 2 * height, 2 * width]]),
        )  # fmt: skip

    def batch(self, groups: int) -> Any:
        import torch

        from mm_agrae.types import MicroBatch

        rows, length = groups * self.sizes.group, self.sizes.completion
        token_BT = torch.randint(700, self.model_config.text_config.vocab_size, (rows, length), device=self.device)
        ones_BT = torch.ones(rows, length, device=self.device)
        return MicroBatch(
            [self.prompt(index) for index in range(groups)],
            torch.arange(groups).repeat_interleave(self.sizes.group),
            token_BT, ones_BT, torch.randn(rows, device=self.device), -ones_BT,
        )  # fmt: skip

    def update(self, batch: Any, sign: float = 1.0, keep: bool = False) -> None:
        """Forward and backward pass, after the gradients are dropped unless `keep`."""
        from mm_agrae.loss import Denominator, policy_loss

        if not keep:
            self.policy.zero_grad()
        self.policy.train()
        logp_BT, entropy_BT = self.policy(batch)
        rows, length = logp_BT.shape
        loss = policy_loss(
            "grpo", logp_BT=logp_BT, entropy_BT=entropy_BT, advantage_B=batch.advantage_B, mask_BT=batch.mask_BT,
            denominator=Denominator(rows, rows * length, length),
        ).loss  # fmt: skip
        (sign * loss).backward()

    def gradient_norm(self) -> float:
        import torch

        norms = [p.grad.norm() for p in self.policy.trainable_parameters() if p.grad is not None]
        return float(torch.stack(norms).double().norm())

    def expected(self, **changes: Any) -> Any:
        """The doctor's estimate, with other settings of `update` and `model`."""
        from mm_agrae import config as configs
        from mm_agrae.model.memory import estimate
        from mm_agrae.model.size import measure

        values = self.config.model_dump(mode="json")
        for name, section in changes.items():
            values[name] |= section
        config = configs.parse(values)
        return estimate(config, measure(config, self.model_config), device=self.device)


def large_config(sizes: Sizes, path: str) -> Any:
    """Qwen2.5-VL-3B's published shape with the token ids of the embedded tokenizer."""
    from transformers import AutoConfig

    values = json.loads((ROOT / "data" / "model_shapes" / "Qwen--Qwen2.5-VL-3B-Instruct.json").read_text())
    values["text_config"] |= sizes.text
    values["vision_config"] |= sizes.vision
    own = json.loads((Path(path) / "config.json").read_text())
    values |= {name: value for name, value in own.items() if name.endswith("_token_id")}
    values["text_config"] |= {name: own["text_config"][name] for name in ("eos_token_id", "pad_token_id")}
    return AutoConfig.for_model(**values)


def check_update(record: Record, sizes: Sizes, device: str) -> None:
    with record.case("full tuning"):
        large = Large(sizes, device)
        record.note("parameters", sum(p.numel() for p in large.policy.parameters()))
        batch, checkpointed = large.batch(1), {"gradient_checkpointing": True}
        checkpoint(large, True)
        with record.case("full + checkpointing"):
            update_case(record, "full + checkpointing", large, batch, large.expected(model=checkpointed))
        with record.case("shared against repeated"):
            shared_against_repeated(record, large, batch)
        with record.case("vision tower"):
            vision_case(record, large, batch)
        checkpoint(large, False)
        with record.case("full"):
            update_case(record, "full", large, batch, large.expected())
        checkpoint(large, True)
        with record.case("long row"):
            update = {"micro_batch_completions": sizes.long_groups * sizes.group}
            expected = large.expected(model=checkpointed, update=update)
            update_case(record, "long row", large, large.batch(sizes.long_groups), expected, profile=False)
        with record.case("AdamW"):
            adamw_case(record, large, batch)
        del large
    with record.case("LoRA + checkpointing"):
        large = Large(sizes, device, gradient_checkpointing=True, lora={"rank": 32, "alpha": 64})
        update_case(record, "LoRA + checkpointing", large, large.batch(1), large.expected())


def checkpoint(large: Large, on: bool) -> None:
    hf = large.policy.hf
    hf.gradient_checkpointing_enable({"use_reentrant": False}) if on else hf.gradient_checkpointing_disable()


def update_case(record: Record, name: str, large: Large, batch: Any, expected: Any, profile: bool = True) -> None:
    from benchmark_update import flop_count
    from measure_memory import Peak

    large.update(batch)  # one-off allocations of a first use are no part of the peak
    large.policy.zero_grad()
    with Peak(large.device) as peak:
        large.update(batch)
    doctor = sum(expected.update.values())
    record.note(f"{name} peak GiB", peak.bytes / 2**30)
    ratio = peak.bytes / doctor
    # The estimate is for the true shape: in a tiny model what it leaves out weighs more.
    record.between(f"{name} peak / doctor", ratio, *((0.85, 1.15) if large.device == "cuda" else (0, 1e9)))
    taken = milliseconds(lambda: large.update(batch), large.device, large.sizes.repeats)
    record.note(f"{name} ms", taken)
    tokens = sum(len(prompt) for prompt in batch.prompts) + int(batch.mask_BT.sum())
    record.note(f"{name} tokens/s", 1e3 * tokens / taken)
    record.note(f"{name} completion tokens/s", 1e3 * int(batch.mask_BT.sum()) / taken)
    record.note(f"{name} MFU", flop_count(large.policy.model, batch)["ours"] / (taken / 1e3) / PEAK_FLOPS)
    if profile:
        profiled(record, name, lambda: large.update(batch), large.device)


def shared_against_repeated(record: Record, large: Large, batch: Any) -> None:
    """The gradient with shared prompts minus the one with repeated prompts, added up in place."""
    large.update(batch)
    whole = large.gradient_norm()
    large.policy.repeats_because = "the two are compared"
    try:
        large.update(batch, sign=-1.0, keep=True)
        record.most("shared / repeated gradient difference", large.gradient_norm() / whole, 5e-2)
        taken = milliseconds(lambda: large.update(batch), large.device, 2)
        record.note("repeated + checkpointing ms", taken)
    finally:
        large.policy.repeats_because = ""


def vision_case(record: Record, large: Large, batch: Any) -> None:
    """The tower alone, forward and backward, for one image."""
    from mm_agrae.model.image_features import encode_images

    policy, prompts = large.policy, batch.prompts[:1]

    def run() -> None:
        policy.zero_grad()
        with policy.autocast():
            found = encode_images(policy.backbone, prompts, policy.device)
        sum(x.float().square().sum() for features in found for x in features).backward()

    record.note("vision tower ms", milliseconds(run, large.device, large.sizes.repeats))
    profiled(record, "vision tower", run, large.device)


def adamw_case(record: Record, large: Large, batch: Any) -> None:
    """The optimiser's step as the trainer takes it, all moments on the device."""
    from measure_memory import Peak

    from mm_agrae.step import _optimizer

    large.update(batch)
    optimizer, _ = _optimizer(large.config, large.policy, large.policy.device, 10)
    with Peak(large.device) as peak:
        optimizer.step()
    doctor = large.expected().always["optimiser (Adam)"]
    record.note("AdamW peak / doctor", peak.bytes / doctor)
    record.note("AdamW ms", milliseconds(optimizer.step, large.device, large.sizes.repeats))


def check_rollout(record: Record, sizes: Sizes, device: str) -> None:
    lora = {"lora": {"rank": 32, "alpha": 64}}
    for name, model in {"full": {}, "LoRA": lora}.items():
        with record.case(f"rollout {name}"):
            rollout_case(record, name, Large(sizes, device, **model))
    import importlib.util

    if importlib.util.find_spec("vllm") is None:
        record.note("vLLM", "skipped: not installed")
        return
    with record.case("vLLM"), tempfile.TemporaryDirectory(prefix="check-gpu-") as folder:
        config = small_run(Path(folder) / "run", "text", device)
        rollout = config.rollout.model_copy(update={"engine": "vllm"})
        trained(record, "vLLM", config.model_copy(update={"rollout": rollout}))


def rollout_case(record: Record, name: str, large: Large) -> None:
    import torch
    from measure_memory import Peak

    from mm_agrae.batching import UpdateRow, micro_batch
    from mm_agrae.config import SamplingSection
    from mm_agrae.rollout.hf import HFEngine

    sizes, policy = large.sizes, large.policy
    prompts = [large.prompt(index) for index in range(sizes.rollout_prompts)]
    engine = HFEngine(policy, large.processing, batch_completions=sizes.rollout_prompts * sizes.group)
    engine.generate(prompts[:1], 1, SamplingSection(max_new_tokens=2), [0])
    began = time.perf_counter()
    with Peak(large.device) as peak:
        sampling = SamplingSection(max_new_tokens=sizes.rollout_tokens)
        groups = engine.generate(prompts, sizes.group, sampling, range(len(prompts)))
    taken = time.perf_counter() - began
    tokens = sum(len(each.token_ids) for group in groups for each in group)
    record.note(f"{name} tokens/s", tokens / taken)
    record.note(f"{name} s", taken)
    expected = large.expected(rollout={"max_new_tokens": sizes.rollout_tokens}).rollout
    record.note(f"{name} peak GiB", peak.bytes / 2**30)
    limits = (0.85, 1.15) if large.device == "cuda" else (0, 1e9)
    record.between(f"{name} peak / doctor", peak.bytes / sum(expected.values()), *limits)
    errors = []
    with torch.no_grad():
        for index, group in enumerate(groups[:4]):
            batch = micro_batch([prompts[index]], [UpdateRow(0, each, 1.0) for each in group], policy.device)
            logp_BT, _ = policy(batch)
            errors.append((logp_BT - batch.sampling_logp_BT).abs()[batch.mask_BT.bool()])
    record.most(f"{name} mean log-prob difference", float(torch.cat(errors).mean()), 0.02)


# ----------------------------------------------------------------------------------- nccl, trl


def check_nccl(record: Record, sizes: Sizes, device: str) -> None:
    """DDP and FSDP2 in one process: a step has the gradients and weights that it has without them."""
    import torch

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "1"}
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    backend = "nccl" if device == "cuda" else "gloo"
    if device == "cuda":
        torch.cuda.set_device(0)
    torch.distributed.init_process_group(backend)
    record.note("backend", backend)
    lora = {"lora": {"rank": 8, "alpha": 16}, "dtype": "bfloat16", "gradient_checkpointing": True}
    for name, limit, model in (("full", 1e-4, {}), ("bf16 LoRA", 2e-2, lora)):
        with tempfile.TemporaryDirectory(prefix="check-gpu-") as folder:
            config = small_run(Path(folder) / "run", "image", device, **model)
            with record.case(f"{name} alone"):
                alone = distributed_step(config, "alone")
            for strategy in ("DDP", "FSDP2"):
                with record.case(f"{name} {strategy}"):
                    found = distributed_step(config, strategy)
                    for what in ("gradient", "moments", "weights", "loaded moments"):
                        error = difference(found[what], alone[what])
                        record.most(f"{name} {strategy} {what} differ", error, limit)
    torch.distributed.destroy_process_group()


def distributed_step(config: Any, strategy: str) -> dict[str, Any]:
    """Gradients, moments and weights after one step, each as one whole vector."""
    import torch

    from mm_agrae.batching import UpdateRow, micro_batch
    from mm_agrae.config import SamplingSection
    from mm_agrae.model.policy import Policy
    from mm_agrae.model.processing import Processing
    from mm_agrae.parallel import sharding
    from mm_agrae.parallel.processes import Processes
    from mm_agrae.parallel.strategies import Fsdp2, Replicated
    from mm_agrae.rollout.hf import HFEngine
    from mm_agrae.tasks import load_all
    from mm_agrae.types import Completion

    processes = Processes(config)
    kind = (Fsdp2 if strategy == "FSDP2" else Replicated)(processes.accelerator)
    processing = Processing(config.model.path, config.prompt)
    torch.manual_seed(0)
    loading = "cpu" if kind.sharded else processes.device
    policy = Policy(config.model, processing, shared_prompt="on", device=loading)
    if policy.is_adapted:  # new adapters begin at 0 and would leave half of the gradients 0
        with torch.no_grad():
            for parameter in policy.trainable_parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) / 30)
    if kind.sharded:
        policy.distribute(lambda: None, kind.shard)
    optimizer = torch.optim.AdamW(policy.trainable_parameters(), lr=1e-3, fused=config.model.device == "cuda" or None)
    module: Any = policy
    if strategy == "DDP":
        module = torch.nn.parallel.DistributedDataParallel(policy, gradient_as_bucket_view=True)
    task = load_all(config.data.train)
    prompts = [processing.prompt(task[index]) for index in range(3)]
    made = [Completion(tuple(range(5 + p, 15 + 2 * p)), (-1.0,) * (10 + p), "", "stop", 0) for p in range(3)]
    rows = [UpdateRow(p, each, 1.0 - p) for p, each in enumerate(made) for _ in range(2)]
    logp_BT, _ = module(micro_batch(prompts, rows, processes.device))
    kind.backward(-(logp_BT.mean()))
    learning = list(policy.trainable_parameters())
    gradient = torch.cat([sharding.whole(p.grad).flatten().cpu() for p in learning if p.grad is not None])
    kind.clip(learning, 1e9)
    optimizer.step()
    state = sharding.whole_state(optimizer)
    optimizer.zero_grad()
    sharding.load_whole_state(optimizer, state)
    with policy.gathered():
        weights = torch.cat([p.detach().flatten().cpu() for p in policy.trainable_parameters()])
        HFEngine(policy, processing).generate(prompts[:1], 1, SamplingSection(max_new_tokens=2), [0])

    def moments(found: dict[str, Any]) -> Any:
        return torch.cat([values["exp_avg"].flatten().float().cpu() for values in found["state"].values()])

    loaded = sharding.whole_state(optimizer)
    return {"gradient": gradient, "moments": moments(state), "weights": weights, "loaded moments": moments(loaded)}


def check_trl(record: Record, sizes: Sizes, device: str) -> None:
    import importlib.util

    if missing := [name for name in ("trl", "datasets") if importlib.util.find_spec(name) is None]:
        return record.skip(f"{', '.join(missing)} not installed")
    import benchmark_update
    import torch

    options = argparse.Namespace(
        **sizes.trl, device=device, checkpointing=True, prompts=1, group=sizes.group, ragged=False, repeated=True,
        repeats=max(2, sizes.repeats - 2), peak_tflops=PEAK_FLOPS / 1e12,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        model = benchmark_update.build(options, "vl", "full")
    trainer = benchmark_update.trl_trainer(model, options)
    row = benchmark_update.compare(model, trainer, options, "vl", sizes.prompt, sizes.completion)
    for name, value in row.items():
        record.note(name, value)
    record.most("gradients differ", row["gradient_difference"], 5e-2)


# ---------------------------------------------------------------------------- parts and budget


@dataclass(frozen=True)
class Part:
    run: Callable[[Record, Sizes, str], None]
    seconds: float
    """Its share of the budget, in proportion to the others'."""
    least: float
    """With less it is not begun."""
    shown: tuple[str, ...]
    """Figures in the table at the end."""


PARTS = {
    "env": Part(check_env, 60, 25, ("copy GB/s", "bf16 product TFLOP/s")),
    "attention": Part(check_attention, 50, 25, ("out error", "1024x256 G=8 ours ms", "1024x256 G=8 repeated ms")),
    "models": Part(check_models, 100, 45, ("image log-prob error", "text log-prob error", "resumed weights differ")),
    "update": Part(check_update, 200, 70, ("full ms", "full MFU", "full peak / doctor", "LoRA + checkpointing ms")),
    "head": Part(check_head, 45, 25, ("N=2048 log-prob error", "LoRA gradient error")),
    "nccl": Part(check_nccl, 45, 25, ("full FSDP2 gradient differ", "bf16 LoRA FSDP2 gradient differ")),
    "rollout": Part(check_rollout, 70, 40, ("full tokens/s", "LoRA tokens/s", "full mean log-prob difference")),
    "trl": Part(check_trl, 50, 30, ("trl_s", "ours_s", "times", "memory")),
}  # fmt: skip
"""The most valuable first: under a short budget the last ones are left out."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of gpu.json and parts.log")
    parser.add_argument("--budget", type=float, default=600, help="seconds that all parts together may take")
    parser.add_argument("--tiny", action="store_true", help="small shapes on a CPU")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=[*PARTS], metavar="PART", help=" ".join(PARTS))
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        return run_part(options.part, options.tiny)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "parts.log").write_text("")
    deadline = time.monotonic() + options.budget
    report = {"date": f"{datetime.datetime.now():%Y-%m-%d %H:%M}", "card": card(), "versions": versions()}
    report |= {"tiny": options.tiny, "budget": options.budget, "parts": {}}
    names = [name for name in PARTS if name in options.only]
    for index, name in enumerate(names):
        remaining = deadline - time.monotonic()
        share = PARTS[name].seconds / sum(PARTS[each].seconds for each in names[index:])
        limit = max(PARTS[name].least, remaining * share)
        fits = remaining >= PARTS[name].least
        found = run_limited(name, options, limit) if fits else outcome("skipped", 0.0, skipped="budget")
        report["parts"][name] = found
        written = options.out / "gpu.json.new"
        written.write_text(json.dumps(report, indent=1))
        written.replace(options.out / "gpu.json")
        print(row(name, found), flush=True)
    print(f"\n{report['card']}, " + ", ".join(f"{name} {version}" for name, version in report["versions"].items()))
    for name, found in report["parts"].items():
        print(row(name, found, figures=True))
    return int(any(found["status"] == "failed" for found in report["parts"].values()))


def run_part(name: str, tiny: bool) -> int:
    """One part in this process; exit status 1 if it failed."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    from mm_agrae.model.compat import prepare

    prepare()
    import torch

    record = Record()
    if not tiny and not torch.cuda.is_available():
        record.fail("no CUDA device; --tiny runs small shapes on a CPU")
        return 1
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    with record.case(name):
        PARTS[name].run(record, TINY if tiny else GPU, "cpu" if tiny else "cuda")
    return int(record.failed)


def run_limited(name: str, options: argparse.Namespace, limit: float) -> dict[str, Any]:
    """One part in a process of its own, stopped at its limit (seconds)."""
    log = options.out / "parts.log"
    command = [sys.executable, "-u", __file__, "--out", str(options.out), "--part", name]
    command += ["--tiny"] if options.tiny else []
    began = time.monotonic()
    with log.open("ab") as file:
        file.write(f"\n===== {name}, at most {limit:.0f} s\n".encode())
        file.flush()
        start = file.tell()
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            with contextlib.suppress(ProcessLookupError):  # with what it has started itself
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    seconds = time.monotonic() - began
    with log.open("rb") as file:
        file.seek(start)
        lines = file.read().decode(errors="replace").splitlines()
    figures: dict[str, Any] = {}
    for line in lines:
        if line.startswith(FIGURE):
            figures |= json.loads(line.removeprefix(FIGURE))
    errors = [json.loads(line.removeprefix(ERROR)) for line in lines if line.startswith(ERROR)]
    reasons = [json.loads(line.removeprefix(SKIPPED)) for line in lines if line.startswith(SKIPPED)]
    if status is None:
        errors.append(f"stopped after {limit:.0f} s; its last lines: " + " | ".join(lines[-5:]))
    elif status and not errors:
        errors += lines[-15:] or [f"exit status {status}"]
    state = "failed" if errors else "skipped" if reasons else "ok"
    return outcome(state, seconds, figures=figures, errors=errors, skipped="; ".join(reasons))


def outcome(status: str, seconds: float, **found: Any) -> dict[str, Any]:
    return {"status": status, "seconds": round(seconds, 1)} | {name: value for name, value in found.items() if value}


def row(name: str, found: dict[str, Any], figures: bool = False) -> str:
    known = found.get("figures", {})
    shown = [f"{key} {known[key]:.4g}" for key in PARTS[name].shown if figures and key in known]
    problems = [one_line(error)[:200] for error in found.get("errors", ())[:3]] + [found.get("skipped", "")]
    return f"{name:10} {found['status']:8} {found['seconds']:6.1f} s  " + "; ".join(x for x in shown + problems if x)


def card() -> str:
    """The GPU's name and driver, without a CUDA context of this process's own."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "no GPU"


if __name__ == "__main__":
    sys.exit(main())
