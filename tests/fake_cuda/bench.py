"""A policy of Qwen2.5-VL-3B's shape on the fake CUDA device, with what it takes to update it and to sample from it."""

import contextlib
import random
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from helpers import TEXT, VL, processing
from meter import Counts
from stand_ins import FAKE, METER, load_model_files, set_liger_kernel

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

VOCABULARY = 151_936
GRID = (1, 48, 64)
"""Patches of an image: 3072, merged to 768 tokens."""


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


def check_output(policy: Policy, arguments: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    """Log-probabilities and entropies are float32 on the device, one for each token."""
    for value in output:
        assert (value.device.type, value.dtype) == ("cuda", torch.float32), value
        assert value.shape == arguments[0].token_BT.shape, value.shape


class Bench:
    """A policy of true size on the fake device, its optimiser, and the meter. Use it as a context manager."""

    def __init__(
        self, *, multimodal: bool = True, liger: bool = False, update: dict[str, Any] | None = None, **model: Any
    ):
        self.liger, self.multimodal, self.model, self.update = liger, multimodal, model, update or {}
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
        set_liger_kernel(self.liger)
        self.stack.enter_context(FAKE)
        self.stack.enter_context(METER)
        with load_model_files(folder):
            self.policy = Policy(self.config.model, self.processing, shared_prompt="on", device=processes.device)
        self.policy.register_forward_hook(check_output)
        context = RunContext(self.config, processes, None, Reporter(enabled=False), None)  # type: ignore[arg-type]
        exact = HFEngine(self.policy, self.processing).exact
        self.updater = Updater(context, self.policy, total_steps=10, exact_engine=exact)
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
        METER.start()
        self.updater.run([mini], lambda: None)
        return self.checked(METER.counts)

    def checked(self, counts: Counts) -> Counts:
        """Everything is on the device, what is trained in float32; products are in 16 bits, attention is flash."""
        for name, parameter in self.policy.named_parameters():
            assert parameter.device.type == "cuda", name
            assert not parameter.requires_grad or parameter.dtype == torch.float32, name
        assert counts.flops[4] <= 1e-3 * counts.flops[2], f"products in float32: {counts.flops}"
        assert all("flash" in name for name, _ in counts.attention), counts.attention
        return counts

    def generate(self, tokens: int) -> Counts:
        """Counts of sampling 8 completions of so many tokens for one prompt."""
        sampling = SamplingSection(max_new_tokens=tokens)
        prompt = self.prompt()
        METER.start()
        HFEngine(self.policy, self.processing).generate([prompt], 8, sampling, [0])
        return METER.counts
