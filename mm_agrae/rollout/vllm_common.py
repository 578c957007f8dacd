"""What vLLM needs to be told and what it answers, the same inside this process and over HTTP.

Bad prompts are refused here: vLLM accepts some of them silently and does not survive others.
Nothing in this module imports vllm at the top, so that it also loads where vllm is missing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from mm_agrae.config import SamplingSection
from mm_agrae.errors import ConfigError, DataError, EngineError
from mm_agrae.model.loading import model_modules
from mm_agrae.model.policy import EXCLUDED, Policy
from mm_agrae.model.processing import Processing
from mm_agrae.rollout import derive_seed
from mm_agrae.types import Completion, Prompt

TEMPERATURES = (0.01, 2.0)
"""vLLM silently raises a lower temperature than this, and refuses a higher one."""


def check(prompt: Prompt, max_tokens: int, processing: Processing, max_new_tokens: int = 1) -> None:
    """Raise DataError, naming the row, for a prompt that vLLM must not see.

    That is: longer than `max_tokens` with its completion, empty, or with image placeholders that
    do not match its pictures one to one in number, place and size.
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


def check_adapters(policy: Policy, sync: str) -> None:
    """Raise ConfigError for LoRA that vLLM cannot take over as `rollout.vllm.sync` says."""
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
            "rollout.vllm.sync=adapter reaches language layers alone, but model.lora.parts "
            f"adapts {', '.join(sorted(adapted - {'language'}))} too; use sync=merged"
        )
    if "head" in adapted and policy.hf.all_tied_weights_keys:
        raise ConfigError(
            "model.lora.parts adapts the vocabulary head, which this model has in common with its "
            "embeddings, and vLLM holds one weight for both; leave head out, or use "
            "rollout.engine=hf"
        )


def image_runs(prompt: Prompt, processing: Processing) -> list[range]:
    """Positions of each picture's placeholders in `prompt.token_ids`.

    Raises DataError, naming the row, unless pictures, their grids and placeholders match.
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


def usable(
    prompts: Sequence[Prompt], max_tokens: int, processing: Processing, max_new_tokens: int = 1
) -> tuple[list[int], dict[int, DataError]]:
    """Indices of the prompts that `check` lets pass, and the errors of the others by index."""
    refused: dict[int, DataError] = {}
    for index, prompt in enumerate(prompts):
        try:
            check(prompt, max_tokens, processing, max_new_tokens)
        except DataError as error:
            refused[index] = error
    return [index for index in range(len(prompts)) if index not in refused], refused


def collapse_image_tokens(prompt: Prompt, processing: Processing) -> list[int]:
    """Token ids with one placeholder for each picture, which vLLM expands itself.

    Raises DataError as `image_runs`.
    """
    repeated = {place for run in image_runs(prompt, processing) for place in run[1:]}
    return [token for place, token in enumerate(prompt.token_ids.tolist()) if place not in repeated]


def sampling_arguments(
    sampling: SamplingSection,
    count: int,
    seed: int,
    forbidden_ids: Iterable[int],
    stop_ids: Iterable[int],
) -> dict[str, Any]:
    """Plain values for `vllm.SamplingParams(**values)`, and for /inference/v1/generate.

    The distribution is the policy's: `forbidden_ids` get the policy's own finite bias. It must not
    go through endpoints that cut it to ±100, as /v1/completions does. Greedy completions are all
    the same and vLLM makes only one: `n` is then 1. All ids must be below the vocabulary size.
    Raises ConfigError for a temperature that vLLM would change or refuse.
    """
    lowest, highest = TEMPERATURES
    temperature = sampling.temperature
    if temperature and not lowest <= temperature <= highest:
        raise ConfigError(
            f"temperature is {temperature}, but vLLM samples only between {lowest} and {highest}; "
            "change it, or use rollout.engine=hf"
        )
    return {
        "n": count if temperature else 1,
        "temperature": temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        # vLLM gives sample i the seed + i: neighbouring seeds would share their random numbers.
        "seed": derive_seed("vllm", seed) >> 1,
        "max_tokens": sampling.max_new_tokens,
        "stop_token_ids": sorted(stop_ids),
        "logit_bias": dict.fromkeys(sorted(forbidden_ids), EXCLUDED),
        "logprobs": 0,  # of the sampled token alone
        "detokenize": False,
    }


def completion(
    token_ids: Sequence[int],
    logprobs: Sequence[float],
    finish_reason: str | None,
    processing: Processing,
    version: int,
) -> Completion:
    """One of vLLM's outputs as a Completion. Raises EngineError if it is not a finished one."""
    if finish_reason not in ("stop", "length") or not token_ids:
        raise EngineError(f"vLLM ended a completion with {finish_reason!r} instead of finishing it")
    if len(token_ids) != len(logprobs):
        raise EngineError(
            f"vLLM gave {len(logprobs)} log-probabilities for {len(token_ids)} tokens"
        )
    return Completion(
        token_ids=tuple(token_ids),
        logprobs=tuple(logprobs),
        text=processing.decode(token_ids),
        finish_reason=finish_reason,
        policy_version=version,
    )


def load_weights_in_worker(worker: Any, weights: Iterable[tuple[str, torch.Tensor]]) -> int:
    """Give vLLM's model new weights under their checkpoint names; returns the bytes taken.

    Runs inside a vLLM worker. Raises EngineError if a weight is unknown to the engine, or if one
    of the engine's gets no value; it must not be used any more then. The scheduler's prefix and
    encoder caches are the caller's to reset.
    """
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.reload import (
        finalize_layerwise_reload,
        initialize_layerwise_reload,
    )

    runner = worker.model_runner
    model = runner.get_model()
    expected = {name for name, _ in model.named_parameters()}
    taken = 0

    def counted() -> Iterator[tuple[str, torch.Tensor]]:
        nonlocal taken
        for name, tensor in weights:
            taken += tensor.numel() * tensor.element_size()
            yield name, tensor

    with torch.no_grad(), set_current_vllm_config(worker.vllm_config):
        initialize_layerwise_reload(model)
        try:
            loaded = model.load_weights(counted())
            # Before the end of the reload, which fills gaps with the old values.
            missing = sorted((expected - set(loaded)) | _incomplete(model))
        except (ValueError, KeyError, RuntimeError) as error:
            raise EngineError(f"vLLM cannot take the weights: {error}") from error
        finally:
            finalize_layerwise_reload(model, worker.vllm_config.model_config)
        if missing:
            listed = ", ".join(missing[:5])
            raise EngineError(f"vLLM got no value for {len(missing)} of its weights: {listed}")
        _renew_vocabulary_heads(model)
    runner.reset_lora_state()
    runner.reset_encoder_cache()
    runner.reset_mm_cache()
    return taken


def _incomplete(model: torch.nn.Module) -> set[str]:
    """Layers of which only a part was given, such as keys and values without queries."""
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    found = set()
    for name, layer in model.named_modules():
        info = get_layerwise_info(layer)
        # The rows that pad a vocabulary are in no checkpoint.
        if not info.can_load() or isinstance(layer, VocabParallelEmbedding):
            continue
        if 0 < info.load_numel < (info.load_numel_total or 0):
            found.add(name)
    return found


def _renew_vocabulary_heads(model: torch.nn.Module) -> None:
    """On CPUs a tied head keeps a packed copy of the embedding that reloading leaves as it was."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for layer in model.modules():
        if isinstance(layer, ParallelLMHead):
            layer.quant_method.process_weights_after_loading(layer)
