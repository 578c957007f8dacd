"""The parts of check_gpu.py: `python scripts/gpu_parts.py PART` measures on a GPU, with `tiny` after it on a CPU.

A part prints each figure as soon as it has it (see `Record`). What is too large, or raises, fails the part, and its
other cases run all the same.

The 3B is Qwen2.5-VL-3B's shape with random weights that are made on the device and go through the real `Policy`.
MFU is what `flop_count` of benchmark_update.py counts over 989 TFLOP/s: 6 operations a token for each trained weight
of a linear layer and 4 for a frozen one, attention, head and vision tower; not what checkpointing computes again.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import cProfile
import functools
import gc
import importlib.util
import io
import itertools
import json
import math
import os
import pstats
import random
import shutil
import socket
import statistics
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import benchmark_update
import torch
import torch.nn.functional as F
from make_random_vlm import shape
from measure_memory import Peak, make_prompt, noise_batch, update
from torch import Tensor
from torch.profiler import ProfilerActivity

from mm_agrae import cli
from mm_agrae import config as configs
from mm_agrae.batching import UpdateRow, micro_batch
from mm_agrae.config import Config, DataSource, ModelSection, PromptSection, SamplingSection
from mm_agrae.errors import one_line
from mm_agrae.model import loading, shared_attention
from mm_agrae.model.compat import prepare
from mm_agrae.model.image_features import encode_images
from mm_agrae.model.memory import MemoryEstimate, estimate
from mm_agrae.model.packed_layout import GroupSpans, PackedLayout
from mm_agrae.model.policy import Policy
from mm_agrae.model.processing import Processing
from mm_agrae.model.size import measure
from mm_agrae.model.vocab_head import head_logprobs
from mm_agrae.parallel import sharding
from mm_agrae.parallel.processes import Processes
from mm_agrae.parallel.strategies import Fsdp2, Replicated
from mm_agrae.progress import Reporter
from mm_agrae.rollout.hf import HFEngine
from mm_agrae.run import checkpoint
from mm_agrae.run.folder import RunFolder
from mm_agrae.step import _optimizer
from mm_agrae.tasks import load_all
from mm_agrae.trainer import Trainer
from mm_agrae.types import Completion, MicroBatch

ROOT = Path(__file__).resolve().parents[1]
WARM_START = Path(os.environ.get("MM_AGRAE_WARM_START", ROOT / "data" / "warm_start"))
MODELS = {"image": str(WARM_START / "vl"), "text": str(WARM_START / "text")}
PEAK_FLOPS = 989e12
"""Dense bfloat16 operations a second of an H100 or H200, as the maker states."""
LORA = {"lora": {"rank": 32, "alpha": 64}}
SMALL_LORA = {"lora": {"rank": 8, "alpha": 16}, "dtype": "bfloat16", "gradient_checkpointing": True}

SIZES: dict[str, tuple[Any, Any]] = {  # on a GPU, tiny on a CPU
    "device": ("cuda", "cpu"),
    "dtype": (torch.bfloat16, torch.float32),  # of attention by itself
    "repeats": (5, 2),
    "copy_bytes": (4 << 30, 1 << 20),
    "product": (8192, 128),
    "heads": (
        [(16, 2, 128), (28, 4, 128), (24, 8, 128), (14, 2, 64), (16, 16, 80), (8, 1, 256)],
        [(4, 2, 32), (4, 1, 16)],
    ),
    "attention": ([(1024, 256, 8), (2048, 2048, 5)], [(64, 16, 4)]),  # prompt, completion, group
    "vocabulary": (151_936, 1200),
    "hidden": (2048, 64),
    "positions": ([0, 1, 2048, 15_000], [0, 1, 40, 90]),
    "blocks_mb": ([64, 128, 256, 512, 1024], [1, 4]),
    "prompt": (1024, 128),
    "completion": (256, 12),
    "group": (8, 4),
    "long_groups": (5, 2),
    "rollout_prompts": (16, 2),
    "rollout_tokens": (64, 6),
    "doctor": ((0.85, 1.15), (0, math.inf)),  # a tiny model's peak is what the estimate leaves out
    "text": (
        {},
        {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
         "num_key_value_heads": 1, "vocab_size": 2048,
         "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]}},
    ),
    "vision": (
        {},
        {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64,
         "fullatt_block_indexes": [1]},
    ),
    "trl": (
        {"preset": "3b", "vocabulary": None, "layers": None, "dtype": "bfloat16"},
        {"preset": "57m", "vocabulary": 256, "layers": 2, "dtype": "float32"},
    ),
}  # fmt: skip


class Record:
    """What a part finds, as lines that check_gpu.py reads: printed at once, for a part that is cut off."""

    failed = False

    def note(self, name: str, value: Any) -> None:
        value = float(f"{value:.4g}") if isinstance(value, float) else value
        print(f"@figure {json.dumps({name: value})}", flush=True)

    def most(self, name: str, value: float, limit: float, least: float = 0) -> None:
        """A figure that must be in a range."""
        self.note(name, value)
        if not least <= value <= limit:
            self.fail(f"{name} is {value:.3g}, outside {least:g} to {limit:g}")

    def fail(self, problem: str) -> None:
        self.failed = True
        print(f"@errors {json.dumps(problem)}", flush=True)

    def skip(self, what: str) -> None:
        print(f"@skipped {json.dumps(what)}", flush=True)

    @contextlib.contextmanager
    def case(self, name: str) -> Iterator[None]:
        """A piece of a part: if it raises, the part has failed and goes on."""
        began = time.monotonic()
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.fail(f"{name}: {type(error).__name__}: {one_line(error)}")
        gc.collect()
        torch.cuda.empty_cache()
        print(f"{name}: {time.monotonic() - began:.1f} s", flush=True)


# ---------------------------------------------------------------------------------- measuring


def milliseconds(run: Callable[[], Any], sizes: Any) -> float:
    """The median time of a call, after one to warm up: by CUDA events, or on a CPU by the clock."""
    run()
    times = []
    for _ in range(sizes.repeats):
        if sizes.device == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start.record()
            run()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end))
        else:
            began = time.perf_counter()
            run()
            times.append(1e3 * (time.perf_counter() - began))
    return statistics.median(times)


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Relative to the norm of `theirs`, or absolute where that is 0."""
    ours, theirs = ours.detach().float(), theirs.detach().float()
    error, norm = (ours - theirs).norm().item(), theirs.norm().item()
    return error / norm if norm else error


def profile(record: Record, name: str, run: Callable[[], Any], sizes: Any) -> None:
    """Calls of attention and, on a GPU, kernels, which take longest, and where the CPU waits for the GPU."""
    cuda = sizes.device == "cuda"
    with torch.profiler.profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda) as profiled:
        run()
    events = profiled.key_averages()
    counts = {event.key: event.count for event in events}
    attention = ("aten::scaled_dot_product_attention", "aten::_flash_attention_forward")
    record.note(f"{name} attention calls", max(counts.get(key, 0) for key in attention))
    if not cuda:
        return
    record.note(f"{name} kernels", sum(count for key, count in counts.items() if "LaunchKernel" in key))
    waits = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
    record.note(f"{name} syncs", sum(counts.get(key, 0) for key in waits))
    kernels = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
    kernels.sort(key=lambda event: -event.self_device_time_total)
    record.note(f"{name} GPU busy ms", sum(event.self_device_time_total for event in kernels) / 1e3)
    longest = [[event.key[:90], round(event.self_device_time_total / 1e3, 2), event.count] for event in kernels[:15]]
    record.note(f"{name} longest kernels (ms, calls)", longest)
    with cProfile.Profile() as python:
        run()
    rows = sorted(pstats.Stats(python).stats.items(), key=lambda item: -item[1][2])[:14]  # type: ignore[attr-defined]
    slow = [
        [f"{Path(file).name}:{line} {what}"[-70:], calls, round(1e3 * own)]
        for (file, line, what), (_, calls, own, *_) in rows
    ]
    record.note(f"{name} CPU by function (calls, ms)", slow)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        run()
        torch.cuda.set_sync_debug_mode("default")
    places = Counter(f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchroniz" in str(w.message))
    record.note(f"{name} waits", dict(places.most_common(12)))


# ---------------------------------------------------------------------- env, attention and head


def check_env(record: Record, sizes: Any) -> None:
    record.note("CUDA", torch.version.cuda)
    if sizes.device == "cuda":
        card = torch.cuda.get_device_properties(0)
        record.note("card", f"{card.name}, {card.total_memory / 2**30:.1f} GiB, {card.major}.{card.minor}")
    source = torch.zeros(sizes.copy_bytes, dtype=torch.uint8, device=sizes.device)
    target = torch.empty_like(source)
    taken = milliseconds(lambda: target.copy_(source), sizes)
    record.note("copy GB/s", 2 * sizes.copy_bytes / taken / 1e6)
    a, b = torch.randn(2, sizes.product, sizes.product, device=sizes.device).bfloat16()
    record.note("bf16 product TFLOP/s", 2 * sizes.product**3 / milliseconds(lambda: a @ b, sizes) / 1e9)


def check_attention(record: Record, sizes: Any) -> None:
    if sizes.device == "cuda":
        for heads in sizes.heads:
            if fault := shared_attention._varlen_fault(torch.device("cuda", 0), torch.bfloat16, *heads):
                record.fail(f"self-test {heads}: {fault}")
    else:
        record.skip("the self-test of FlashAttention needs CUDA")
    chance, worst = random.Random(0), dict.fromkeys(("out", "dq", "dk", "dv"), 0.0)
    for trial in range(20):
        groups = [(64, [32, 2])]  # without a token that attends to others, errors would be relative to nothing
        for _ in range(chance.randint(0, 4)):
            completions = [chance.choice([1, 2, chance.randint(3, 300)]) for _ in range(chance.randint(0, 6))]
            groups.append((chance.choice([1, 17, chance.randint(2, 700)]), completions))
        heads = sizes.heads[trial % len(sizes.heads)]
        with record.case(f"{heads} {groups}"):
            layout = layout_of(groups, sizes.device)
            errors = attention_errors(query_key_value(heads, layout.length, sizes, trial), layout)
            worst = {name: max(worst[name], error) for name, error in zip(worst, errors, strict=True)}
    for name, error in worst.items():
        record.most(f"{name} error", error, 2e-2)
    for prompt, completion, group in sizes.attention:
        with record.case(f"{prompt}x{completion}"):
            time_attention(record, prompt, completion, group, sizes)


def layout_of(groups: list[tuple[int, list[int]]], device: str) -> PackedLayout:
    """A packed row of prompts with their completions, by length; completions lack their last token there."""
    spans, end = [], 0
    for prompt, completions in groups:
        bounds = list(itertools.accumulate([n - 1 for n in completions if n > 1], initial=end + prompt))
        spans.append(GroupSpans((end, end + prompt), tuple(itertools.pairwise(bounds))))
        end = bounds[-1]
    return PackedLayout(spans, device)


def query_key_value(heads: tuple[int, int, int], length: int, sizes: Any, seed: int, rows: int = 1) -> list[Tensor]:
    torch.manual_seed(seed)
    shapes = [(rows, count, length, heads[2]) for count in (heads[0], heads[1], heads[1])]
    return [torch.randn(shape, device=sizes.device).to(sizes.dtype).requires_grad_() for shape in shapes]


def attention_errors(qkv: list[Tensor], layout: PackedLayout) -> list[float]:
    """Errors of output and gradients against masked attention in float32."""
    exact, scale = [x.detach().float().requires_grad_() for x in qkv], qkv[0].shape[-1] ** -0.5
    ours = shared_attention.attention(*qkv, layout, scale=scale)
    theirs = shared_attention.masked_attention(*exact, layout, scale)
    weight = torch.randn_like(ours)
    ours_all = [ours, *torch.autograd.grad(ours, qkv, weight)]
    theirs_all = [theirs, *torch.autograd.grad(theirs, exact, weight.float())]
    return [difference(*pair) for pair in zip(ours_all, theirs_all, strict=True)]


def time_attention(record: Record, prompt: int, completion: int, group: int, sizes: Any) -> None:
    layout, heads = layout_of([(prompt, [completion + 1] * group)], sizes.device), sizes.heads[0]
    packed = query_key_value(heads, layout.length, sizes, 0)
    rows = query_key_value(heads, prompt + completion, sizes, 0, group)
    scale = heads[2] ** -0.5
    ways: dict[str, tuple[list[Tensor], Callable[..., Tensor]]] = {
        "ours": (packed, lambda *qkv: shared_attention.attention(*qkv, layout, scale=scale)),
        "masked": (packed, lambda *qkv: shared_attention.masked_attention(*qkv, layout, scale)),
        "repeated": (rows, lambda *qkv: F.scaled_dot_product_attention(*qkv, is_causal=True, enable_gqa=True)),
    }
    for name, (inputs, way) in ways.items():
        ones = torch.ones_like(way(*inputs))
        both = functools.partial(lambda way, inputs, ones: torch.autograd.grad(way(*inputs), inputs, ones), way)
        taken = milliseconds(functools.partial(both, inputs, ones), sizes)
        record.note(f"{prompt}x{completion} G={group} {name} ms", taken)


def check_head(record: Record, sizes: Any) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    net: Any = torch.nn.Sequential()
    net.lm_head = torch.nn.Linear(sizes.hidden, sizes.vocabulary, bias=False, device=sizes.device)
    with torch.no_grad():  # exact in 16 bits, so that only the head's own arithmetic is compared
        net.lm_head.weight.copy_(net.lm_head.weight.normal_(std=0.02).bfloat16())
    many = sizes.positions[2:]
    for positions in sizes.positions:
        with record.case(f"N={positions}"):
            compare_head(record, f"N={positions}", net.lm_head, positions, sizes)
    with record.case("entropy"):
        compare_head(record, "entropy", net.lm_head, many[0], sizes, entropy_grad=True)
    for positions, size in itertools.product(many, sizes.blocks_mb):
        with record.case(f"N={positions} in blocks of {size} MB"):
            run, _ = head_run(net.lm_head, positions, sizes, chunk_bytes=size << 20)
            record.note(f"N={positions} {size} MB ms", milliseconds(run, sizes))
    head = get_peft_model(net, LoraConfig(r=16, target_modules=["lm_head"])).base_model.model.lm_head
    with torch.no_grad():
        head.lora_B["default"].weight.normal_(std=0.02)
    with record.case("LoRA"):
        compare_head(record, "LoRA", head, many[0], sizes)


def head_run(head: Any, positions: int, sizes: Any, **options: Any) -> tuple[Callable[[], list[Tensor]], list[Any]]:
    """Our head in 16 bits: a call that gives log-probabilities, entropies and gradients; and its inputs."""
    hidden_NH = torch.randn(positions, sizes.hidden, device=sizes.device).bfloat16().float().requires_grad_()
    target_N = torch.randint(sizes.vocabulary, (positions,), device=sizes.device)
    weight_N = torch.randn(positions, device=sizes.device)
    learning = [hidden_NH, *(p for p in head.parameters() if p.requires_grad)]

    def run() -> list[Tensor]:
        with torch.autocast(sizes.device, torch.bfloat16):
            logp_N, entropy_N = head_logprobs(head, hidden_NH, target_N, **options)
        total_N = logp_N + entropy_N if options.get("entropy_grad") else logp_N
        return [logp_N.detach(), entropy_N.detach(), *torch.autograd.grad((total_N * weight_N).sum(), learning)]

    return run, [hidden_NH, target_N, weight_N, learning]


def compare_head(record: Record, name: str, head: Any, positions: int, sizes: Any, **options: Any) -> None:
    """Our head against log_softmax of float32 logits, of 1024 positions at a time."""
    run, (*inputs, learning) = head_run(head, positions, sizes, **options)
    ours, logps, entropies, grads = run(), [], [], [torch.zeros_like(x) for x in learning]
    for hidden_nH, target_n, weight_n in zip(*(x.split(1024) for x in inputs), strict=True):
        logp_nV = head(hidden_nH).log_softmax(-1)
        entropies.append(-(logp_nV.exp() * logp_nV).sum(-1))
        logps.append(logp_nV.gather(-1, target_n[:, None])[:, 0])
        total_n = logps[-1] + entropies[-1] if options else logps[-1]
        for grad, part in zip(grads, torch.autograd.grad((total_n * weight_n).sum(), learning), strict=True):
            grad += part
        logps[-1], entropies[-1] = logps[-1].detach(), entropies[-1].detach()
    for what, value, expected in (("log-prob", ours[0], logps), ("entropy", ours[1], entropies)):
        if positions:
            record.most(f"{name} {what} error", float((value - torch.cat(expected)).abs().max()), 1e-3)
    worst = max(difference(*pair) for pair in zip(ours[2:], grads, strict=True))
    record.most(f"{name} gradient error", worst, 1e-2)


# -------------------------------------------------------------------------------- tiny models


def check_models(record: Record, sizes: Any) -> None:
    for kind in MODELS:
        with record.case(f"{kind} against the CPU"):
            against_cpu(record, kind, sizes.device)
    with tempfile.TemporaryDirectory(prefix="check-gpu-") as folder:
        run = functools.partial(small_run, Path(folder), sizes.device)
        for name, kind, model in (
            ("image", "image", {}), ("text", "text", {}), ("bf16", "image", {"dtype": "bfloat16"}),
        ):  # fmt: skip
            with record.case(f"{name} trained"):
                train(record, f"{name} trained", run(name, kind, **model))
        with record.case("bf16 LoRA by mm-agrae train"):
            config = run("lora", "image", **SMALL_LORA)
            file = Path(folder) / "lora.yaml"
            file.write_text(configs.dump(config), encoding="utf-8")
            record.most("exit status of mm-agrae train", cli.main(["train", str(file)]), 0)
            steps(record, "bf16 LoRA", config)
        for name, whole, model, limit in (
            ("resumed", "image", {}, 1e-3), ("resumed bf16", "bf16", {"dtype": "bfloat16"}, 5e-2),
        ):  # fmt: skip
            with record.case(name):
                resume(record, name, Path(folder) / whole, run(name.replace(" ", "-"), "image", **model), limit, sizes)
        if sizes.device == "cuda":
            with record.case("out of memory"):
                out_of_memory(record, file)
            with record.case("deterministic"):
                config = run("deterministic", "image", dtype="bfloat16")
                config = config.model_copy(update={"train": config.train.model_copy(update={"deterministic": True})})
                train(record, "deterministic", config)
                torch.use_deterministic_algorithms(False)


def small_run(folder: Path, device: str, name: str, kind: str, **model: Any) -> Config:
    """Five steps of an embedded model."""
    return configs.parse(
        {
            "run_dir": str(folder / name),
            "model": {"path": MODELS[kind], "device": device, "dtype": "float32", **model},
            "data": {"train": [{"task": "synthetic", "modality": kind, "split": "train"}]},
            "train": {"steps": 5, "seed": 0},
            "rollout": {"prompts_per_step": 4, "completions_per_prompt": 4, "max_new_tokens": 24},
            "update": {"learning_rate": 1e-4},
            "checkpoint": {"every": 1, "keep": 5},
        }
    )


def against_cpu(record: Record, kind: str, device: str) -> None:
    """Greedy tokens, and log-probabilities and gradients of the same completions, in float32."""
    processing = Processing(MODELS[kind], PromptSection())
    task = load_all([DataSource(task="synthetic", modality=kind, split="test")])
    prompts = [processing.prompt(task[index]) for index in range(6)]
    found: list[tuple[Any, Tensor, Tensor]] = []
    rows: list[UpdateRow] = []
    for where in ("cpu", device):
        settings = ModelSection(path=MODELS[kind], dtype="float32")
        policy = Policy(settings, processing, shared_prompt="on", device=where)
        sample = functools.partial(HFEngine(policy, processing).generate, prompts)
        greedy = sample(1, SamplingSection(temperature=0.0, max_new_tokens=24), range(6))
        if not rows:
            groups = sample(3, SamplingSection(max_new_tokens=24), range(6))
            rows = [UpdateRow(index, each, 1.0) for index, group in enumerate(groups) for each in group]
        logp_BT, _ = policy(micro_batch(prompts, rows, policy.device))
        logp_BT.sum().backward()
        grad = torch.cat([p.grad.flatten().cpu() for p in policy.trainable_parameters() if p.grad is not None])
        found.append(([group[0].token_ids for group in greedy], logp_BT.detach().cpu(), grad))
    (their_tokens, their_logp_BT, their_grad), (tokens, logp_BT, grad) = found
    same = sum(ours == theirs for ours, theirs in zip(tokens, their_tokens, strict=True))
    record.most(f"{kind} greedy completions the same, of 6", same, 6, least=6)
    record.most(f"{kind} log-prob error", float((logp_BT - their_logp_BT).abs().max()), 1e-4)
    record.most(f"{kind} gradient error", difference(grad, their_grad), 1e-3)


def train(record: Record, name: str, config: Config) -> None:
    Trainer(config, Reporter(enabled=False)).train()
    steps(record, name, config)


def steps(record: Record, name: str, config: Config) -> None:
    """Judge the metrics of a run of five steps."""
    rows = RunFolder(config.run_dir).read_metrics()
    record.most(f"{name} steps", len(rows), 5, least=5)
    record.note(f"{name} s a step", statistics.median(row["seconds/total"] for row in rows[1:]))
    losses, norms = ([row[f"update/{value}"] for row in rows] for value in ("loss", "grad_norm"))
    if not all(map(math.isfinite, losses + norms)) or not max(norms) > 0:
        record.fail(f"{name}: losses {losses}, gradient norms {norms}")


def out_of_memory(record: Record, file: Path) -> None:
    """A run for which the card has too little memory ends with one message, and not with a traceback."""
    text = io.StringIO()
    torch.cuda.set_per_process_memory_fraction(5e-4)
    try:
        with contextlib.redirect_stderr(text), contextlib.redirect_stdout(text):
            status = cli.main(["train", str(file), "--overwrite"])
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    print(text.getvalue())
    record.most("exit status out of memory", status, 2, least=2)
    if "out of memory" not in text.getvalue() or "Traceback" in text.getvalue():
        record.fail(f"out of memory: {one_line(text.getvalue())[-300:]}")


def resume(record: Record, name: str, whole: Path, config: Config, limit: float, sizes: Any) -> None:
    """A copy of a run, cut off after three of its five steps and taken up again."""
    from safetensors.torch import load_file

    copy = Path(config.run_dir)
    shutil.copytree(whole, copy, symlinks=True)
    checkpoint.forget_after(copy / "checkpoints", 3)
    train(record, name, config)
    files = [checkpoint.newest(run / "checkpoints") / "model.safetensors" for run in (copy, whole)]  # type: ignore
    ours, theirs = (torch.cat([x.flatten() for _, x in sorted(load_file(file).items())]) for file in files)
    # Some sums have no fixed order on a GPU.
    record.most(f"{name} weights differ", difference(ours, theirs), 0 if sizes.device == "cpu" else limit)


# ------------------------------------------------------------------------------------- the 3B


class Large:
    """The 3B with random weights, in 16 bits through the real `Policy`."""

    def __init__(self, sizes: Any, **model: Any):
        self.sizes, path = sizes, MODELS["image"]
        values = {
            "run_dir": "unused",
            "model": {"path": path, "dtype": "bfloat16", "device": sizes.device, **model},
            "data": {"train": [{"task": "synthetic", "modality": "image"}]},
            "train": {"steps": 1},
            "prompt": {"max_tokens": sizes.prompt, "max_pixels": 28 * 28 * sizes.prompt},
            "rollout": {
                "prompts_per_step": sizes.rollout_prompts, "completions_per_prompt": sizes.group,
                "max_new_tokens": sizes.completion,
            },
            "update": {"micro_batch_completions": sizes.group, "learning_rate": 1e-12},
        }  # fmt: skip
        self.config = configs.parse(values)
        self.model_config = large_config(sizes, path)
        self.processing = Processing(path, self.config.prompt)
        torch.manual_seed(0)
        original, loading._pretrained = loading._pretrained, self._pretrained
        try:
            self.policy = Policy(self.config.model, self.processing, shared_prompt="on", device=sizes.device)
        finally:
            loading._pretrained = original

    def _pretrained(self, settings: ModelSection, path: str, adapted: bool, *_: Any) -> Any:
        """In place of weights from a file: what learns in float32, what is frozen in 16 bits."""
        from transformers import AutoModelForImageTextToText

        dtype, attention = torch.bfloat16 if adapted else torch.float32, settings.attn_implementation
        config = copy.deepcopy(self.model_config)
        with torch.device(self.sizes.device):
            return AutoModelForImageTextToText.from_config(config, dtype=dtype, attn_implementation=attention)

    def batch(self, groups: int) -> MicroBatch:
        prompts = [make_prompt(self.config, self.processing, index) for index in range(groups)]
        return noise_batch(self.policy, prompts, groups * self.sizes.group, self.sizes.completion, self.config)

    def update(self, batch: MicroBatch) -> None:
        self.policy.zero_grad()
        update(self.policy, batch, self.config)

    def gradient_norm(self) -> float:
        return float(torch.stack([p.grad.norm() for p in self.policy.parameters() if p.grad is not None]).norm())

    def checkpointing(self, on: bool) -> None:
        hf = self.policy.hf
        hf.gradient_checkpointing_enable({"use_reentrant": False}) if on else hf.gradient_checkpointing_disable()

    def doctor(self, **sections: dict[str, Any]) -> MemoryEstimate:
        """The estimate of `mm-agrae doctor`, with some settings changed."""
        values = self.config.model_dump(mode="json")
        for name, section in sections.items():
            values[name] |= section
        config = configs.parse(values)
        return estimate(config, measure(config, self.model_config), device=self.sizes.device)


def large_config(sizes: Any, path: str) -> Any:
    """The 3B's published shape, with the special tokens of the embedded model, whose processor is used."""
    from transformers import AutoConfig

    own, values = AutoConfig.from_pretrained(path), shape("3b")
    values |= {name: value for name, value in own.to_dict().items() if name.endswith("_token_id")}
    values["text_config"] |= sizes.text | {"eos_token_id": own.text_config.eos_token_id, "bos_token_id": None}
    values["vision_config"] |= sizes.vision
    return AutoConfig.for_model(**values)


def check_update(record: Record, sizes: Any) -> None:
    with record.case("full tuning"):
        large, checkpointed = Large(sizes), {"gradient_checkpointing": True}
        record.note("parameters", sum(p.numel() for p in large.policy.parameters()))
        batch = large.batch(1)
        large.checkpointing(True)
        with record.case("full + checkpointing"):
            measure_update(record, "full + checkpointing", large, batch, large.doctor(model=checkpointed))
        with record.case("shared against repeated"):
            shared_against_repeated(record, large, batch)
        with record.case("long row"):
            many = {"micro_batch_completions": sizes.long_groups * sizes.group}
            expected = large.doctor(model=checkpointed, update=many)
            measure_update(record, "long row", large, large.batch(sizes.long_groups), expected)
        large.checkpointing(False)
        for name, groups in (("full", 1), ("full, two groups", 2)):
            with record.case(name):
                changed = {"micro_batch_completions": groups * sizes.group}
                measure_update(record, name, large, large.batch(groups), large.doctor(update=changed))
        with record.case("vision tower"):
            measure_vision(record, large, batch)
        with record.case("AdamW"):
            measure_adamw(record, large, batch)
        del large, batch
    with record.case("LoRA + checkpointing"):
        large = Large(sizes, gradient_checkpointing=True, **LORA)
        measure_update(record, "LoRA + checkpointing", large, large.batch(1), large.doctor())


def measure_update(record: Record, name: str, large: Large, batch: MicroBatch, expected: MemoryEstimate) -> None:
    large.update(batch)  # what a first use allocates for good belongs to no update
    with Peak(large.sizes.device) as peak:  # of a second micro-batch, whose gradients are added to the first one's
        update(large.policy, batch, large.config)
    taken_bytes = peak.bytes + expected.update["gradients"]
    record.note(f"{name} peak GiB", taken_bytes / 2**30)
    low, high = large.sizes.doctor
    record.most(f"{name} peak / doctor", taken_bytes / sum(expected.update.values()), high, low)
    taken = milliseconds(lambda: large.update(batch), large.sizes)
    completions = int(batch.mask_BT.sum())
    tokens = completions + sum(len(prompt) for prompt in batch.prompts)
    record.note(f"{name} ms", taken)
    record.note(f"{name} tokens/s", 1e3 * tokens / taken)
    record.note(f"{name} completion tokens/s", 1e3 * completions / taken)
    operations = benchmark_update.flop_count(large.policy.model, batch)["ours"]
    record.note(f"{name} MFU", operations / PEAK_FLOPS / (taken / 1e3))
    profile(record, name, lambda: large.update(batch), large.sizes)


def shared_against_repeated(record: Record, large: Large, batch: MicroBatch) -> None:
    """The gradient with shared prompts less the one with repeated prompts, which needs no room for both."""
    large.update(batch)
    whole = large.gradient_norm()
    large.policy.repeats_because = "the two are compared"
    try:
        update(large.policy, batch, large.config, sign=-1)
        record.most("shared against repeated gradients", large.gradient_norm() / whole, 5e-2)
        record.note("repeated + checkpointing ms", milliseconds(lambda: large.update(batch), large.sizes))
    finally:
        large.policy.repeats_because = ""


def measure_vision(record: Record, large: Large, batch: MicroBatch) -> None:
    """The tower alone, forward and backward, for one image: with the policy's attention, and with sdpa."""
    policy, features = large.policy, []

    def run() -> Tensor:
        policy.zero_grad()
        with policy.autocast():
            found = encode_images(policy.backbone, batch.prompts[:1], policy.device)
        every = torch.cat([x for prompt in found for x in prompt]).float()
        every.square().sum().backward()
        return every.detach()

    own = policy.hf.config.vision_config._attn_implementation
    for name, attention in (("vision tower", own), ("vision tower by sdpa", "sdpa")):
        policy.hf.set_attn_implementation({"vision_config": attention})
        record.note(f"{name} ms", milliseconds(run, large.sizes))
        profile(record, name, run, large.sizes)
        features.append(run())
    policy.hf.set_attn_implementation({"vision_config": own})
    record.most("vision tower against sdpa", difference(*features), 5e-2)


def measure_adamw(record: Record, large: Large, batch: MicroBatch) -> None:
    """The optimiser's step as the trainer takes it."""
    large.update(batch)
    optimizer, _ = _optimizer(large.config, large.policy, large.policy.device, 10)
    with Peak(large.sizes.device) as peak:
        optimizer.step()
    record.note("AdamW peak / doctor", peak.bytes / large.doctor().always["optimiser (Adam)"])
    record.note("AdamW ms", milliseconds(optimizer.step, large.sizes))


def check_rollout(record: Record, sizes: Any) -> None:
    for name, model in (("full", {}), ("LoRA", LORA)):
        with record.case(f"{name} rollout"):
            measure_rollout(record, name, Large(sizes, **model))
    if importlib.util.find_spec("vllm") is None:
        return record.skip("vLLM is not installed")
    with record.case("vLLM"), tempfile.TemporaryDirectory(prefix="check-gpu-") as folder:
        config = small_run(Path(folder), sizes.device, "vllm", "text")
        rollout = config.rollout.model_copy(update={"engine": "vllm"})
        train(record, "vLLM", config.model_copy(update={"rollout": rollout}))


@torch.no_grad()
def measure_rollout(record: Record, name: str, large: Large) -> None:
    sizes, policy = large.sizes, large.policy
    prompts = [make_prompt(large.config, large.processing, index) for index in range(sizes.rollout_prompts)]
    engine = HFEngine(policy, large.processing, batch_completions=sizes.rollout_prompts * sizes.group)
    engine.generate(prompts[:1], 1, SamplingSection(max_new_tokens=2), [0])
    sampling = SamplingSection(max_new_tokens=sizes.rollout_tokens)
    began = time.perf_counter()
    with Peak(sizes.device) as peak:
        groups = engine.generate(prompts, sizes.group, sampling, range(len(prompts)))
    taken = time.perf_counter() - began
    record.note(f"{name} s", taken)
    record.note(f"{name} tokens/s", sum(len(each.token_ids) for group in groups for each in group) / taken)
    record.note(f"{name} peak GiB", peak.bytes / 2**30)
    expected = large.doctor(rollout={"max_new_tokens": sizes.rollout_tokens}).rollout
    low, high = sizes.doctor
    record.most(f"{name} peak / doctor", peak.bytes / sum(expected.values()), high, low)
    errors = []
    for prompt, group in list(zip(prompts, groups, strict=True))[:4]:
        batch = micro_batch([prompt], [UpdateRow(0, each, 1.0) for each in group], policy.device)
        errors.append((policy(batch)[0] - batch.sampling_logp_BT)[batch.mask_BT.bool()].abs())
    record.most(f"{name} mean log-prob difference", float(torch.cat(errors).mean()), 0.03)


# ------------------------------------------------------------------------------- nccl and TRL


def check_nccl(record: Record, sizes: Any) -> None:
    """DDP and FSDP2 of one process leave the gradients, moments and weights that a step has without them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}
    torch.distributed.init_process_group("nccl" if sizes.device == "cuda" else "gloo")
    record.note("backend", torch.distributed.get_backend())
    for name, model, limit in (("full", {}, 1e-4), ("LoRA", SMALL_LORA, 2e-2)):
        config = small_run(Path("unused"), sizes.device, "run", "image", **model)
        with record.case(name):
            alone = one_step(config, "alone")
            for strategy in ("DDP", "FSDP2"):
                with record.case(f"{name} {strategy}"):
                    for what, value in one_step(config, strategy).items():
                        record.most(f"{name} {strategy} {what} differs", difference(value, alone[what]), limit)
    torch.distributed.destroy_process_group()


def one_step(config: Config, strategy: str) -> dict[str, Tensor]:
    """What a step leaves on a policy that is spread as the trainer spreads it, put together again."""
    processes = Processes(config)
    kind = (Fsdp2 if strategy == "FSDP2" else Replicated)(processes.accelerator)
    processing = Processing(config.model.path, config.prompt)
    torch.manual_seed(0)
    where = "cpu" if kind.sharded else processes.device
    policy = Policy(config.model, processing, shared_prompt="on", device=where, compute_device=processes.device)
    with torch.no_grad():  # new adapters are 0 on one side, which leaves the other without a gradient
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.linspace(-0.05, 0.05, parameter.numel()).view(parameter.shape))
    if kind.shard is not None:
        policy.distribute(lambda: None, kind.shard)
    optimizer, _ = _optimizer(config, policy, processes.device, 10)
    ddp = functools.partial(torch.nn.parallel.DistributedDataParallel, gradient_as_bucket_view=True)
    module = ddp(policy) if strategy == "DDP" else policy
    task = load_all(config.data.train)
    prompts = [processing.prompt(task[index]) for index in range(3)]
    made = [Completion(tuple(range(5 + p, 15 + 2 * p)), (-1.0,) * (10 + p), "", "stop", 0) for p in range(3)]
    rows = [UpdateRow(p, each, 1.0) for p, each in enumerate(made) for _ in range(2)]
    logp_BT, _ = module(micro_batch(prompts, rows, processes.device))
    kind.backward(-logp_BT.mean())
    learning = list(policy.trainable_parameters())
    found = {"gradient": [sharding.whole(p.grad) for p in learning if p.grad is not None]}
    kind.clip(learning, 1e9)
    optimizer.step()
    state = sharding.whole_state(optimizer)
    sharding.load_whole_state(optimizer, state)
    loaded = sharding.whole_state(optimizer)
    for name, each in (("moment", state), ("loaded moment", loaded)):
        found[name] = [values["exp_avg"] for values in each["state"].values()]
    with policy.gathered():
        found["weight"] = [p.detach() for p in policy.trainable_parameters()]
        whole = {name: torch.cat([x.flatten().cpu() for x in values]) for name, values in found.items()}
        HFEngine(policy, processing).generate(prompts[:1], 2, SamplingSection(max_new_tokens=2), [0])
    return whole


def check_trl(record: Record, sizes: Any) -> None:
    """An update of TRL's trainer and ours, on the same batch in the same precision (weights in 16 bits on a GPU)."""
    if missing := [name for name in ("trl", "datasets") if importlib.util.find_spec(name) is None]:
        return record.skip(f"{' and '.join(missing)} not installed")
    options = argparse.Namespace(
        **sizes.trl, device=sizes.device, checkpointing=True, prompts=1, group=sizes.group, ragged=False,
        repeated=True, repeats=3, peak_tflops=PEAK_FLOPS / 1e12,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(sizes.device):
        model = benchmark_update.build(options, "vl", "full")
    trainer = benchmark_update.trl_trainer(model, options)
    row = benchmark_update.compare(model, trainer, options, "vl", sizes.prompt, sizes.completion)
    for name, value in row.items():
        record.note(name, value)
    record.most("gradient_difference", row["gradient_difference"], 0.1)  # of weights in 16 bits, too


def main() -> int:
    """Run the part that the command line names; exit status 1 if it failed."""
    prepare()
    name, tiny = sys.argv[1], "tiny" in sys.argv[2:]
    sizes = SimpleNamespace(**{key: values[tiny] for key, values in SIZES.items()})
    record = Record()
    if sizes.device == "cuda" and not torch.cuda.is_available():
        record.fail("there is no CUDA device; check_gpu.py --tiny runs on a CPU")
        return 1
    with record.case(name):
        globals()[f"check_{name}"](record, sizes)
    return int(record.failed)


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # taking down torch and what it has loaded takes seconds
