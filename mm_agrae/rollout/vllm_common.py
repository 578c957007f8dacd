"""What the engines `vllm` and `vllm_server` share: settings, checks, translations.

Malformed prompts are refused here: vLLM silently accepts some of them and crashes on others.
Nothing in this module imports vllm, so the trainer of `vllm_server` does without it.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

from mm_agrae.config import RolloutSection, SamplingSection
from mm_agrae.errors import ConfigError, DataError, EngineError
from mm_agrae.model.loading import model_modules
from mm_agrae.model.policy import EXCLUDED, Policy
from mm_agrae.model.processing import Processing
from mm_agrae.model.weights import adapter_weights, full_weights
from mm_agrae.rollout import Sync, derive_seed
from mm_agrae.types import Completion, Prompt

TEMPERATURES = (0.01, 2.0)
"""vLLM silently raises a temperature below the first, and refuses one above the second."""

LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM accepts as max_lora_rank."""

Request = tuple[list[int], dict[str, Any]]
"""A prompt's token ids with one placeholder per image, and its sampling arguments."""

Output = tuple[Sequence[int], Sequence[float], "str | None"]
"""Token ids, log-probabilities and finish reason of a completion."""

Progress = Callable[[int], None]


class VllmBase:
    """What both engines share; they add `_start`, `_generate`, `_sync` and `close`.

    `version` is -1 before the first sync.
    """

    exact = False

    def __init__(
        self,
        policy: Policy,
        processing: Processing,
        rollout: RolloutSection,
        *,
        batch_completions: int,
        max_tokens: int,
    ):
        """Check the settings, then `_start`.

        Raises ConfigError for LoRA that vLLM cannot load as `rollout.vllm.sync` says.
        """
        self.policy, self.processing = policy, processing
        self.rollout, self.settings = rollout, rollout.vllm
        self.version = -1
        self.batch_completions = batch_completions
        self.max_tokens = self.settings.max_model_len or max_tokens
        dtype = self.settings.dtype
        self.dtype: str = policy.settings.dtype if dtype == "auto" else dtype
        self.by_adapter = self.settings.sync == "adapter"
        check_adapters(policy, self.settings.sync)
        # A tokenizer can have ids beyond the model's vocabulary, which vLLM refuses.
        vocabulary = len(policy.bias_V)
        self.forbidden_ids = [index for index in processing.forbidden_ids if index < vocabulary]
        self.stop_ids = [index for index in processing.eos_ids if index < vocabulary]
        self._start()

    def _start(self) -> None:
        raise NotImplementedError

    def _sync(self) -> int:
        """Send the policy's weights; returns the bytes sent to one copy of the model."""
        raise NotImplementedError

    def _generate(
        self, prompts: Sequence[Prompt], requests: list[Request], count: int, on_progress: Progress
    ) -> list[list[Completion]]:
        """`generate` for prompts that have been checked, by their requests."""
        raise NotImplementedError

    def sync(self) -> Sync:
        """See `rollout.Engine.sync`."""
        started, version = time.perf_counter(), self.policy.version
        sent = self._sync()
        self.version = version
        return Sync(sent / 1e6, time.perf_counter() - started)

    def generate(
        self,
        prompts: Sequence[Prompt],
        count: int,
        sampling: SamplingSection,
        seeds: Sequence[int],
        on_progress: Progress | None = None,
    ) -> list[list[Completion]]:
        """See `rollout.Engine.generate`; `on_progress` counts by whole prompts.

        Before anything is sampled, raises DataError for a prompt that vLLM must not get, and
        ConfigError for a temperature that it would change or refuse.
        """
        if len(seeds) != len(prompts):
            raise ValueError(f"{len(seeds)} seeds for {len(prompts)} prompts")
        limits = [min(sampling.max_new_tokens, prompt.room or sampling.max_new_tokens) for prompt in prompts]
        ids = [self._token_ids(prompt, limit) for prompt, limit in zip(prompts, limits, strict=True)]
        arguments = self._sampling_arguments(count, sampling)
        # vLLM seeds completion i with seed + i: prompts with neighbouring seeds would share random numbers.
        requests = [
            (own, arguments | {"seed": derive_seed("vllm", seed) >> 1, "max_tokens": limit})
            for own, seed, limit in zip(ids, seeds, limits, strict=True)
        ]
        return self._generate(prompts, requests, count, on_progress or (lambda finished: None))

    @property
    def adapter_rank(self) -> int:
        return max(config.r for config in self.policy.model.peft_config.values())

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """What a sync sends, by checkpoint name. Collective if the policy is sharded."""
        return adapter_weights(self.policy) if self.by_adapter else full_weights(self.policy)

    def _sampling_arguments(self, count: int, sampling: SamplingSection) -> dict[str, Any]:
        """Plain values for `vllm.SamplingParams(**values)` and for /inference/v1/generate.

        The distribution is the policy's: `forbidden_ids` get the same finite bias as there, which
        endpoints such as /v1/completions would clip to ±100. Greedy completions are all the same,
        and vLLM samples only one: `n` is then 1.
        """
        lowest, highest = TEMPERATURES
        temperature = sampling.temperature
        if temperature and not lowest <= temperature <= highest:
            raise ConfigError(
                f"temperature is {temperature}, but vLLM samples only between {lowest} and "
                f"{highest}; change it, or use rollout.engine=hf"
            )
        return {
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

    def _token_ids(self, prompt: Prompt, max_new_tokens: int) -> list[int]:
        """Token ids with a single placeholder per image, which vLLM expands again itself.

        Raises DataError, naming the row, for a prompt that is empty, longer than `max_tokens` with its completion, or
        whose image placeholders do not match its images one to one in number, position and size.
        """
        where = prompt.example.origin or prompt.example.id
        ids: list[int] = prompt.token_ids.tolist()
        if not ids:
            raise DataError(f"{where}: the prompt is empty")
        if len(ids) + max_new_tokens > self.max_tokens:
            raise DataError(
                f"{where}: the prompt is {len(ids)} tokens, with max_new_tokens = {max_new_tokens} "
                f"more than the engine's {self.max_tokens}; raise rollout.vllm.max_model_len or "
                "lower one of both"
            )
        processing = self.processing
        if prompt.images and not processing.is_multimodal:
            raise DataError(f"{where}: has an image, but the model {processing.path!r} is text-only")
        placeholders = [i for i, token in enumerate(ids) if token == processing.image_token_id]
        grids = [] if prompt.image_grid_thw is None else prompt.image_grid_thw.tolist()
        if len(prompt.images) != len(grids):
            raise DataError(f"{where}: {len(prompt.images)} images, but features of {len(grids)}")
        repeated: set[int] = set()
        start = 0
        for index, (image, (frames, high, wide)) in enumerate(zip(prompt.images, grids, strict=True)):
            image_processor = processing.processor.image_processor
            patch, merge = image_processor.patch_size, image_processor.merge_size
            if (frames, high * patch, wide * patch) != (1, image.height, image.width):
                raise DataError(
                    f"{where}: image {index} is {image.width}×{image.height}, but its features are "
                    f"of {wide * patch}×{high * patch}"
                )
            count = high * wide // merge**2
            own = placeholders[start : start + count]
            if len(own) < count or own[-1] - own[0] != count - 1:
                raise DataError(
                    f"{where}: image {index} has {count} features, but not as many image placeholders in a row"
                )
            repeated.update(own[1:])
            start += count
        if start != len(placeholders):
            raise DataError(
                f"{where}: {len(placeholders)} image placeholders for {start} features of {len(grids)} images"
            )
        return [token for index, token in enumerate(ids) if index not in repeated]

    def group(self, outputs: Iterable[Output], count: int) -> list[Completion]:
        """Raises EngineError for a completion that is not finished."""
        made = []
        for token_ids, logprobs, finish_reason in outputs:
            if finish_reason not in ("stop", "length") or not token_ids:
                raise EngineError(f"vLLM ended a completion with {finish_reason!r} instead of finishing it")
            ids, logps = tuple(token_ids), tuple(logprobs)
            if len(ids) != len(logps):
                raise EngineError(f"vLLM gave {len(logps)} log-probabilities for {len(ids)} tokens")
            text = self.processing.decode(ids)
            made.append(Completion(ids, logps, text, finish_reason, self.version))
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


def world_size() -> int:
    """Processes of this run: 1 without torch.distributed."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
