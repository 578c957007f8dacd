"""Updates and rollouts of Qwen2.5-VL-3B and its text model on a fake CUDA device, counted.

    python tests/fake_cuda/cases.py                 all cases: check them, print a Markdown table
    python tests/fake_cuda/cases.py --write         and write what was counted to table.json
    python tests/fake_cuda/cases.py full lora       some cases

The project's own code runs: Policy, Updater, HFEngine on MicroBatches of real shapes. What is put in the place of
something else is named here, in `load_model_files`, ASSUMED, RESULTS and STAND_INS.
"""

import argparse
import contextlib
import faulthandler
import json
import os
import pkgutil
import random
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent.parent)]
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import device

device.load()

from mm_agrae.model.compat import prepare

prepare()


import torch
import transformers
from meter import Counts, Meter, tolist
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._foreach_utils import _foreach_supported_types
from torch.utils._pytree import tree_map

from helpers import TEXT, VL, processing
from mm_agrae import config as configs
from mm_agrae.batching import MiniBatch, UpdateRow, micro_batch
from mm_agrae.config import SamplingSection
from mm_agrae.loss import Denominator
from mm_agrae.model.packed_layout import GroupSpans, PackedLayout
from mm_agrae.model.policy import Policy
from mm_agrae.model.shared_attention import attention
from mm_agrae.parallel.processes import Processes
from mm_agrae.progress import Reporter
from mm_agrae.rollout.hf import HFEngine
from mm_agrae.run.context import RunContext
from mm_agrae.step import Updater
from mm_agrae.types import Completion, Example, Prompt

VERSIONS = ("torch", "transformers", "accelerate", "peft")
TABLE = HERE / "table.json"
VOCABULARY = 151_936
TOWER_HEAD = 80
"""Head size of the vision tower's attention; the text model's is 128."""
GRID = (1, 48, 64)
"""Patches of an image: 3072, merged to 768 tokens."""

ASSUMED: dict[str, Any] = {
    # Verdicts on numbers that a GPU has computed. The comparisons run, only their outcome is given: "no difference".
    "model/shared_attention.py:_varlen_fault": 0.0,
    "model/shared_prompt.py:_probe": 0.0,
    "model/shared_prompt.py:require_agreement": 0.0,
    # Sampled tokens, as lists for the tokenizer.
    "rollout/hf.py:HFEngine._completions": 0,
}
"""Place of a host read -> the number it gets, where that depends on weights. Elsewhere floats are 1.0."""

RESULTS = {
    "isin": False  # no sampled token ends its completion
}
"""Operator -> what its result is taken to hold where that depends on weights."""



def move(module: Any, fn: Callable[[Any], Any], recurse: bool = True) -> Any:
    """In the place of Module._apply, behind `.to`: that one exchanges fake tensors' insides, which autograd forbids."""
    moved: dict[int, tuple[Any, Any]] = {}
    for each in module.modules():
        for own in (each._parameters, each._buffers):
            for name, old in own.items():
                if old is None:
                    continue
                if id(old) not in moved:  # a tied weight stays one
                    with torch.no_grad():
                        new = fn(old)
                    if new is not old and own is each._parameters:
                        new = torch.nn.Parameter(new, old.requires_grad)
                    moved[id(old)] = (new, old)
                own[name] = moved[id(old)][0]
    return module


def sdpa(
    query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False,
    scale: float | None = None, enable_gqa: bool = False,
) -> Any:  # fmt: skip
    """The kernel that a CUDA build would take: flash in 16 bits without a mask, else the memory-efficient one."""
    if torch.is_autocast_enabled("cuda"):
        low = torch.get_autocast_dtype("cuda")
        query, key, value = (x.to(low) for x in (query, key, value))
        attn_mask = attn_mask.to(low) if attn_mask is not None and attn_mask.is_floating_point() else attn_mask
    if attn_mask is None and query.element_size() == 2:
        aten = torch.ops.aten._scaled_dot_product_flash_attention
        return aten(query, key, value, dropout_p, is_causal, False, scale=scale)[0]
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], 1) for x in (key, value))
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, -torch.inf)
        attn_mask = attn_mask.expand(*query.shape[:3], key.shape[2])
    learns = torch.is_grad_enabled() and query.requires_grad
    aten = torch.ops.aten._scaled_dot_product_efficient_attention
    return aten(query, key, value, attn_mask, learns, dropout_p, is_causal, scale=scale)[0]


def tensor(data: Any, *args: Any, original: Any = torch.tensor, **kwargs: Any) -> Any:
    if isinstance(data, list | tuple):
        data = tree_map(lambda x: x.item() if isinstance(x, torch.Tensor) else x, data)
    return original(data, *args, **kwargs)


STAND_INS: dict[str, Callable[[Meter], Callable[..., Any]]] = {
    # torch asks the kernels that it was built with which of them fits; a CPU build knows none for CUDA.
    "torch.nn.functional:scaled_dot_product_attention": lambda meter: sdpa,
    # swap_tensors, behind `.to`, refuses fake tensors that autograd has seen.
    "torch.nn:Module._apply": lambda meter: move,
    # torch's own reads a list element by element, a GPU's tensor is copied at once.
    "torch._subclasses.fake_tensor:FakeTensor.tolist": tolist,
    # It reads tensors in a list at their addresses, where a fake one has nothing.
    "torch:tensor": lambda meter: tensor,
}
"""Functions that fake tensors cannot run, such as those that launch Triton kernels, and what takes their place.

"package.module:function" -> a function of the meter that returns the replacement. It makes its outputs with
torch.empty_like and calls `meter.launch(name, bytes read and written)` once per kernel, for example

    "liger_kernel.ops.rms_norm:rms_norm_forward": lambda meter: functools.partial(rms_norm, meter)
"""

REASONS: dict[str, str] = {}
"""Place of each host read of an update or of sampling -> why it is there."""


@contextlib.contextmanager
def load_model_files(folder: Path) -> Iterator[str]:
    """Inside, transformers makes a model of random weights for `folder`, which has a config and no weights."""

    def from_pretrained(path: str, *, dtype: Any, attn_implementation: str, **others: Any) -> Any:
        config = transformers.AutoConfig.from_pretrained(path)
        made = loader.from_config(config, dtype=dtype, attn_implementation=attn_implementation)
        return made.eval(), {"missing_keys": set()}

    multimodal = "vision_config" in json.loads((folder / "config.json").read_text())
    loader: Any = transformers.AutoModelForImageTextToText if multimodal else transformers.AutoModelForCausalLM
    original, loader.from_pretrained = loader.from_pretrained, from_pretrained
    try:
        yield str(folder)
    finally:
        loader.from_pretrained = original


def model_config(multimodal: bool) -> Any:
    """Qwen2.5-VL-3B's shape, or that of its text model, with the special ids of the embedded checkpoints."""
    ids = transformers.AutoConfig.from_pretrained(VL if multimodal else TEXT)
    text: dict[str, Any] = {
        "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16,
        "num_key_value_heads": 2, "vocab_size": VOCABULARY, "max_position_embeddings": 32768,
        "tie_word_embeddings": True, "eos_token_id": ids.get_text_config().eos_token_id,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    }  # fmt: skip
    if not multimodal:
        return transformers.Qwen2Config(**text)
    text["rope_parameters"]["mrope_section"] = [16, 24, 24]
    vision = {
        "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 2048,
        "patch_size": 14, "spatial_merge_size": 2, "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31],
    }  # fmt: skip
    special = {name: getattr(ids, name) for name in dir(ids) if name.endswith("_token_id") and name in vars(ids)}
    return transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **special)


_foreach_supported_types.append(FakeTensor)  # gradients of a GPU are clipped all at once


class Bench:
    """A policy of true size on the fake device, its optimiser, and the meter. Use it as a context manager."""

    def __init__(self, *, multimodal: bool = True, update: dict[str, Any] | None = None, **model: Any):
        self.multimodal, self.model, self.update = multimodal, model, update or {}
        self.processing = processing(VL if multimodal else TEXT)
        self.random = random.Random(0)

    def __enter__(self) -> "Bench":
        self.stack = contextlib.ExitStack()
        folder = Path(self.stack.enter_context(tempfile.TemporaryDirectory()))
        model_config(self.multimodal).save_pretrained(folder)
        self.config = configs.parse(
            {
                "run_dir": str(folder / "run"),
                "model": {"path": str(folder), "dtype": "bfloat16", "device": "cpu", **self.model},
                "data": {"train": [{"task": "synthetic", "modality": "text"}]},
                "train": {"steps": 10},
                "rollout": {"prompts_per_step": 1, "completions_per_prompt": 8, "max_new_tokens": 256},
                "update": {"learning_rate": 1e-6, **self.update},
            }
        )
        processes = Processes(self.config)
        processes.device = torch.device("cuda")
        self.stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        self.meter = self.stack.enter_context(Meter(ASSUMED, RESULTS))
        for name, make in STAND_INS.items():
            owner, _, attribute = name.replace(":", ".").rpartition(".")
            setattr(pkgutil.resolve_name(owner), attribute, make(self.meter))
        with load_model_files(folder):
            self.policy = Policy(self.config.model, self.processing, shared_prompt="on", device=processes.device)
        context = RunContext(self.config, processes, None, Reporter(enabled=False), None)  # type: ignore[arg-type]
        self.updater = Updater(context, self.policy, total_steps=10, exact_engine=True)
        return self

    def __exit__(self, *error: Any) -> None:
        self.stack.close()

    def prompt(self, tokens: int = 1024) -> Prompt:
        """A prompt with an image of 768 tokens, or of text."""
        text = [self.random.randrange(600) for _ in range(tokens)]
        if not self.multimodal:
            return Prompt(Example("text", "", ""), "", torch.tensor(text))
        config = self.policy.hf.config
        image = [config.vision_start_token_id, *[config.image_token_id] * 768, config.vision_end_token_id]
        ids = torch.tensor(text[:20] + image + text[20 + len(image) :])
        kinds = (ids == config.image_token_id).int()
        pixels, grid = torch.empty(3072, 1176), torch.tensor([GRID])
        return Prompt(Example("image", "", ""), "", ids, kinds, pixels, grid)

    def completions(self, count: int = 8, tokens: int = 256) -> list[Completion]:
        ids = [tuple(self.random.randrange(600) for _ in range(tokens)) for _ in range(count)]
        return [Completion(each, (-1.0,) * tokens, "", "length", 0) for each in ids]

    def plan(self, cuts: list[list[tuple[int, int]]]) -> MiniBatch:
        """One optimiser step; each micro-batch is a list of (prompt, completions of it)."""
        prompts = [self.prompt() for _ in range(1 + max(index for cut in cuts for index, _ in cut))]
        batches = []
        for cut in cuts:
            rows = [UpdateRow(index, each, 0.5) for index, count in cut for each in self.completions(count)]
            batches.append(micro_batch(prompts, rows, self.policy.device))
        total = sum(count for cut in cuts for _, count in cut)
        return MiniBatch(Denominator(total, total * 256, 256), batches)

    def steady(self) -> None:
        """As after a first step: kernels were tried, moments are there, and the first batch was checked."""
        text = self.policy.hf.config.get_text_config()
        heads = (text.num_attention_heads, text.num_key_value_heads, text.num_key_value_heads)
        q, k, v = (torch.empty(1, each, 8, 128, device="cuda", dtype=torch.bfloat16) for each in heads)
        attention(q, k, v, PackedLayout([GroupSpans((0, 8), ())], "cuda"), scale=1.0)
        for parameter in self.policy.trainable_parameters():
            parameter.grad = torch.empty_like(parameter)
        self.updater.optimizer.step()
        self.updater.optimizer.zero_grad()
        self.updater._sharing_checked = True

    def measure_update(self, cuts: list[list[tuple[int, int]]]) -> Counts:
        """Counts of the second of two like optimiser steps."""
        self.steady()
        if self.config.update.kl_coef:
            self.policy.keep_reference()
        mini = self.plan(cuts)
        self.meter.start()
        self.updater.run([mini], lambda: None)
        counts = self.meter.counts
        self.check(counts)
        return counts

    def check(self, counts: Counts) -> None:
        """Everything that is trained is on the device, in float32; products are in 16 bits."""
        for name, parameter in self.policy.named_parameters():
            assert parameter.device.type == "cuda", name
            assert not parameter.requires_grad or parameter.dtype == torch.float32, name
        assert counts.flops[4] <= 1e-3 * counts.flops[2], counts.flops


    def generate(self, tokens: int) -> Counts:
        """Counts of sampling 8 completions of so many tokens for one prompt."""
        sampling = SamplingSection(max_new_tokens=tokens)
        prompt = self.prompt()
        self.meter.start()
        HFEngine(self.policy, self.processing).generate([prompt], 8, sampling, [0])
        return self.meter.counts


ONE = [[(0, 8)]]
"""One micro-batch: 8 completions of one prompt."""


def full_cases() -> Iterator[tuple[str, Counts]]:
    """Everything is trained, the vision tower too."""
    with Bench() as bench:
        yield "full", bench.measure_update(ONE)
        # Its picture goes through the tower once, in the first of the two.
        yield "one picture, two micro-batches", bench.measure_update([[(0, 8)], [(0, 8)]])
        first = bench.generate(1)
        yield "hf engine: prefill", first
        yield "hf engine: one decode step", bench.generate(2) - first
        bench.policy.hf.gradient_checkpointing_enable({"use_reentrant": False})  # as load_model does
        yield "full, checkpointing", bench.measure_update(ONE)


def kl_cases() -> Iterator[tuple[str, Counts]]:
    with Bench(update={"kl_coef": 0.01}) as bench:
        yield "full, KL", bench.measure_update(ONE)


def lora_cases() -> Iterator[tuple[str, Counts]]:
    with Bench(gradient_checkpointing=True, lora={"rank": 32, "alpha": 64}) as bench:
        yield "LoRA r32, checkpointing", bench.measure_update(ONE)


def frozen_cases() -> Iterator[tuple[str, Counts]]:
    with Bench(freeze=["vision"]) as bench:
        yield "frozen tower", bench.measure_update(ONE)


def text_cases() -> Iterator[tuple[str, Counts]]:
    with Bench(multimodal=False) as bench:
        yield "text", bench.measure_update(ONE)


GROUPS = {"full": full_cases, "kl": kl_cases, "lora": lora_cases, "frozen": frozen_cases, "text": text_cases}
"""Cases that share a policy."""


def entry(counts: Counts) -> dict[str, Any]:
    """What the table holds of a case."""
    tower = sum(n for (_, size), n in counts.attention.items() if size == TOWER_HEAD)
    reads = dict(sorted(counts.reads.items()))
    return {
        "kernels": counts.kernels,
        "ms": round(counts.seconds * 1e3, 1),
        "peak_gib": round(counts.peak / 2**30, 3),
        "tower_attention_calls": tower,
        "uploads": counts.uploads.total(),
        "host_reads": sum(reads.values()),
        "reads": reads,
    }


def markdown(cases: dict[str, dict[str, Any]]) -> str:
    head = "| case | kernels | modelled ms | peak above weights, GiB | attention calls of the tower | host reads |"
    rows = [
        f"| {name} | {each['kernels']:,} | {each['ms']:.0f} | {each['peak_gib']:.1f} "
        f"| {each['tower_attention_calls']:,} | {each['host_reads']} |"
        for name, each in cases.items()
    ]
    return "\n".join([head, "|---" + "|---:" * 5 + "|", *rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("groups", nargs="*", metavar="group", help=f"of {', '.join(GROUPS)}; all if none is named")
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.name}")
    parser.add_argument("--json", type=Path, help="write the same to this file")
    options = parser.parse_args()
    faulthandler.enable()  # a fake device has no memory behind its pointers
    warnings.simplefilter("ignore")
    warnings.filterwarnings("error", "FlashAttention")  # the kernel's self-test failed
    cases = {}
    for group in options.groups or GROUPS:
        start = time.process_time()
        for name, counts in GROUPS[group]():
            cases[name] = entry(counts)
            print(f"{name}: {time.process_time() - start:.0f} s", file=sys.stderr)
    table = {"versions": {name: version(name) for name in VERSIONS}, "cases": cases}
    for path in filter(None, (options.json, TABLE if options.write else None)):
        path.write_text(json.dumps(table, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(markdown(cases))


if __name__ == "__main__":
    main()
