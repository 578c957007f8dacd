"""What the engines `vllm` and `vllm_server` share: settings, checks, translations.

Malformed prompts are refused here: vLLM silently accepts some of them and crashes on others.
Nothing in this module imports vllm, so the trainer of `vllm_server` does without it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from mm_agrae.config import RolloutSection, SamplingSection
from mm_agrae.errors import ConfigError, DataError, EngineError
from mm_agrae.model.loading import model_modules
from mm_agrae.model.policy import EXCLUDED, Policy
from mm_agrae.model.processing import Processing
from mm_agrae.model.weights import adapter_weights, full_weights
from mm_agrae.rollout import derive_seed
from mm_agrae.types import Completion, Prompt

TEMPERATURES = (0.01, 2.0)
"""vLLM silently raises a temperature below the first, and refuses one above the second."""

LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM accepts as max_lora_rank."""


class VllmBase:
    """Settings and translations common to both engines; `version` is -1 before the first sync."""

    exact = False

    def __init__(
        self, policy: Policy, processing: Processing, rollout: RolloutSection, max_tokens: int
    ):
        """Raises ConfigError for LoRA that vLLM cannot load as `rollout.vllm.sync` says."""
        self.policy = policy
        self.processing = processing
        self.settings = rollout.vllm
        self.version = -1
        self.max_tokens = self.settings.max_model_len or max_tokens
        dtype = self.settings.dtype
        self.dtype: str = policy.settings.dtype if dtype == "auto" else dtype
        self.by_adapter = self.settings.sync == "adapter"
        check_adapters(policy, self.settings.sync)
        # A tokenizer can have ids beyond the model's vocabulary, which vLLM refuses.
        vocabulary = len(policy.bias_V)
        self.forbidden_ids = [index for index in processing.forbidden_ids if index < vocabulary]
        self.stop_ids = [index for index in processing.eos_ids if index < vocabulary]

    @property
    def adapter_rank(self) -> int:
        return max(config.r for config in self.policy.model.peft_config.values())

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """What a sync sends, by checkpoint name. Collective if the policy is sharded."""
        return adapter_weights(self.policy) if self.by_adapter else full_weights(self.policy)

    def sampling_arguments(
        self, prompts: Sequence[Prompt], count: int, sampling: SamplingSection, seeds: Sequence[int]
    ) -> list[dict[str, Any]]:
        """Plain values for `vllm.SamplingParams(**values)` and for /inference/v1/generate.

        The distribution is the policy's: `forbidden_ids` get the same finite bias as there, which
        endpoints such as /v1/completions would clip to ±100. Greedy completions are all the same,
        and vLLM samples only one: `n` is then 1. Raises DataError for a prompt that vLLM must not
        get, ConfigError for a temperature that it would change or refuse.
        """
        if len(seeds) != len(prompts):
            raise ValueError(f"{len(seeds)} seeds for {len(prompts)} prompts")
        for prompt in prompts:
            check_prompt(prompt, self.max_tokens, self.processing, sampling.max_new_tokens)
        lowest, highest = TEMPERATURES
        temperature = sampling.temperature
        if temperature and not lowest <= temperature <= highest:
            raise ConfigError(
                f"temperature is {temperature}, but vLLM samples only between {lowest} and "
                f"{highest}; change it, or use rollout.engine=hf"
            )
        shared = {
            "n": count if temperature else 1,
            "temperature": temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "max_tokens": sampling.max_new_tokens,
            "stop_token_ids": sorted(self.stop_ids),
            "logit_bias": dict.fromkeys(sorted(self.forbidden_ids), EXCLUDED),
            "logprobs": 0,  # of the sampled token only
            "detokenize": False,
        }
        # vLLM seeds completion i with seed + i: prompts with neighbouring seeds would share
        # random numbers.
        return [shared | {"seed": derive_seed("vllm", seed) >> 1} for seed in seeds]

    def group(
        self, outputs: Iterable[tuple[Sequence[int], Sequence[float], str | None]], count: int
    ) -> list[Completion]:
        """Completions of (token ids, log-probs, finish reason).

        Raises EngineError for one that is not finished.
        """
        made = []
        for token_ids, logprobs, finish_reason in outputs:
            if finish_reason not in ("stop", "length") or not token_ids:
                raise EngineError(
                    f"vLLM ended a completion with {finish_reason!r} instead of finishing it"
                )
            if len(token_ids) != len(logprobs):
                raise EngineError(
                    f"vLLM gave {len(logprobs)} log-probabilities for {len(token_ids)} tokens"
                )
            text = self.processing.decode(token_ids)
            made.append(
                Completion(tuple(token_ids), tuple(logprobs), text, finish_reason, self.version)
            )
        return made * (count // len(made))  # a greedy completion is sampled only once


def check_adapters(policy: Policy, sync: str) -> None:
    """Raise ConfigError for LoRA that vLLM cannot load as `rollout.vllm.sync` says."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    if not hasattr(policy.model, "peft_config"):
        if sync == "adapter":
            raise ConfigError("rollout.vllm.sync=adapter needs model.lora; use sync=merged")
        return
    adapted = {
        name
        for name, part in model_modules(policy.hf).items()
        if any(isinstance(module, BaseTunerLayer) for module in part.modules())
    }
    if sync == "adapter" and adapted - {"language"}:
        raise ConfigError(
            "rollout.vllm.sync=adapter covers language layers only, but model.lora.parts "
            f"adapts {', '.join(sorted(adapted - {'language'}))} too; use sync=merged"
        )
    if "head" in adapted and policy.hf.all_tied_weights_keys:
        raise ConfigError(
            "model.lora.parts adapts the vocabulary head, which is tied to this model's "
            "embeddings, and vLLM holds one weight for both; leave head out, or use "
            "rollout.engine=hf"
        )


def max_lora_rank(rank: int) -> int:
    """vLLM's max_lora_rank for an adapter of this rank. Raises ConfigError if there is none."""
    for size in LORA_RANKS:
        if size >= rank:
            return size
    raise ConfigError(
        f"vLLM takes LoRA adapters up to rank {LORA_RANKS[-1]}, not {rank}; lower model.lora.rank "
        "(and --lora-rank of a server), or use rollout.vllm.sync=merged"
    )


def check_prompt(
    prompt: Prompt, max_tokens: int, processing: Processing, max_new_tokens: int
) -> None:
    """Raise DataError, naming the row, for a prompt that vLLM must not get.

    That is one that is empty, longer than `max_tokens` with its completion, or whose image
    placeholders do not match its images one to one in number, position and size.
    """
    where = prompt.example.origin or prompt.example.id
    length = len(prompt)
    if length == 0:
        raise DataError(f"{where}: the prompt is empty")
    if length + max_new_tokens > max_tokens:
        raise DataError(
            f"{where}: the prompt is {length} tokens, with max_new_tokens = {max_new_tokens} more "
            f"than the engine's {max_tokens}; raise rollout.vllm.max_model_len or lower one of both"
        )
    if prompt.images and not processing.is_multimodal:
        raise DataError(f"{where}: has an image, but the model {processing.path!r} is text-only")
    image_runs(prompt, processing)


def image_runs(prompt: Prompt, processing: Processing) -> list[range]:
    """Positions of each image's placeholders in `prompt.token_ids`.

    Raises DataError, naming the row, unless images, their grids and placeholders match.
    """
    where = prompt.example.origin or prompt.example.id
    placeholder = processing.image_token_id
    found = (
        [] if placeholder is None else (prompt.token_ids == placeholder).nonzero()[:, 0].tolist()
    )
    grids = [] if prompt.image_grid_thw is None else prompt.image_grid_thw.tolist()
    if len(prompt.images) != len(grids):
        raise DataError(f"{where}: {len(prompt.images)} images, but features of {len(grids)}")
    if not grids:
        if found:
            raise DataError(f"{where}: {len(found)} image placeholders, but no image")
        return []
    image_processor = processing.processor.image_processor
    patch, merge = image_processor.patch_size, image_processor.merge_size
    runs, start = [], 0
    for index, (image, (frames, high, wide)) in enumerate(zip(prompt.images, grids, strict=True)):
        if (frames, high * patch, wide * patch) != (1, image.height, image.width):
            raise DataError(
                f"{where}: image {index} is {image.width}×{image.height}, but its features are of "
                f"{wide * patch}×{high * patch}"
            )
        count = high * wide // merge**2
        own = found[start : start + count]
        if len(own) < count or own[-1] - own[0] != count - 1:
            raise DataError(
                f"{where}: image {index} has {count} features, but not as many image placeholders "
                "in a row"
            )
        runs.append(range(own[0], own[-1] + 1))
        start += count
    if start != len(found):
        raise DataError(
            f"{where}: {len(found)} image placeholders for {start} features of {len(grids)} images"
        )
    return runs


def collapse_image_tokens(prompt: Prompt, processing: Processing) -> list[int]:
    """Token ids with a single placeholder per image, which vLLM expands again itself.

    Raises DataError as `image_runs`.
    """
    repeated = {index for run in image_runs(prompt, processing) for index in run[1:]}
    return [token for index, token in enumerate(prompt.token_ids.tolist()) if index not in repeated]


def world_size() -> int:
    """Processes of this run: 1 without torch.distributed."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return 1
    return torch.distributed.get_world_size()
