"""The policy's weights as a Hugging Face checkpoint stores them.

Rollout engines and exports need checkpoint names and whole tensors. A model in training differs: LoRA weights are
separate, FSDP keeps shards, tied weights occur twice, and transformers renames parameters when it loads a model. All
four are undone here, one tensor at a time, without changing the model.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mm_agrae.parallel.sharding import whole


@torch.no_grad()
def full_weights(policy: Any) -> Iterator[tuple[str, Tensor]]:
    """(name in a checkpoint's safetensors, whole tensor) of every weight, LoRA merged in.

    A merged weight is W + scaling · B A, computed in float32 and returned in W's dtype. Tied
    weights are given once, under the name that is stored. Shards are gathered, a collective call:
    every process consumes the whole iterator. Tensors that needed neither merging nor gathering
    share memory with the model: copy what is kept past the next step.
    """
    hf = policy.hf
    conversions = getattr(hf, "_weight_conversions", None) or ()
    from transformers.core_model_loading import WeightRenaming, revert_weight_conversion

    if all(type(each) is WeightRenaming for each in conversions):
        for name, tensor in _merged(hf):
            yield from revert_weight_conversion(hf, {name: tensor}).items()
    else:
        # Weights that are split or stacked on loading, such as experts, are converted together.
        yield from revert_weight_conversion(hf, dict(_merged(hf))).items()


def adapter_weights(policy: Any) -> Iterator[tuple[str, Tensor]]:
    """(PEFT's name, whole tensor) of every LoRA weight, as in an adapter_model.safetensors.

    Collective if sharded, like `full_weights`. Raises ValueError for a policy without LoRA.
    """
    if not hasattr(policy.model, "peft_config"):
        raise ValueError("the policy has no LoRA adapter")
    from peft import get_peft_model_state_dict

    parameters = policy.model.state_dict(keep_vars=True)
    # Otherwise PEFT adds the base weights of an adapted head.
    adapter = get_peft_model_state_dict(policy.model, parameters, save_embedding_layers=False)
    for name, tensor in adapter.items():
        yield name, whole(tensor)


def adapter_config(policy: Any) -> dict[str, Any]:
    """The content of the adapter's adapter_config.json."""
    config = policy.model.peft_config["default"].to_dict().items()
    plain = {name: sorted(value) if isinstance(value, set) else value for name, value in config}
    # PEFT marks an adapter in training; the one on disk is for inference.
    return json.loads(json.dumps(plain | {"inference_mode": True}, default=str))


def save_adapter(folder: Path, weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Write `adapter_weights` and `adapter_config` as PEFT and vLLM read them from a folder."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous().cpu() for name, tensor in weights.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")


def _merged(hf: Any) -> Iterator[tuple[str, Tensor]]:
    """(name in memory without LoRA, whole merged tensor), each tied weight once."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    modules = hf.named_modules()
    adapted = {name: module for name, module in modules if isinstance(module, BaseTunerLayer)}
    # Of tied weights only the source is stored; weights the checkpoint unties are all stored.
    left_out = {*hf.all_tied_weights_keys, *(hf._keys_to_ignore_on_save or ())}
    for key, tensor in hf.state_dict(keep_vars=True).items():
        parts = key.split(".")
        parents = (".".join(parts[:end]) for end in range(len(parts) - 1, 0, -1))
        owner = next((name for name in parents if name in adapted), None)
        if owner is None:
            if key not in left_out:
                yield key, whole(tensor)
            continue
        _, is_base, rest = key.removeprefix(owner).partition(".base_layer.")
        if not is_base:
            continue  # LoRA's own weight
        base = whole(tensor)
        yield f"{owner}.{rest}", _with_lora(base, adapted[owner]) if rest == "weight" else base


def _with_lora(weight: Tensor, layer: Any) -> Tensor:
    merged = weight.float()
    for name in layer.active_adapters:
        low = whole(layer.lora_A[name].weight).float()
        high = whole(layer.lora_B[name].weight).float()
        merged = merged + layer.scaling[name] * (high @ low)
    return merged.to(weight.dtype)
