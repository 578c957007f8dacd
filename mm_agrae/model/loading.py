"""Load a checkpoint for training: a transformers model, its modules frozen or given LoRA adapters.

Every family that trains here has a plain linear vocabulary head, an ordinary attention cache and,
with images, Qwen's numbering of image tokens; `misfit` says in one line what another one lacks.
"""

import inspect
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mm_agrae.config import ModelSection
from mm_agrae.errors import ModelError, no_model, one_line
from mm_agrae.model.compat import cache_argument, prepare
from mm_agrae.model.lora import add_lora, load_lora, model_and_adapter

LOGIT_SCALES = ("final_logit_softcapping", "logits_scaling", "logit_scale", "lm_head_multiplier", "output_multiplier")
"""Config fields of families that rescale or cap the logits after the vocabulary head."""


def load_model(settings: ModelSection, *, empty: bool = False) -> Any:
    """The model of `settings.path` with what `settings` freezes, adapts and checkpoints.

    `empty` leaves its weights on "meta", for a process that gets them from another one.
    Raises ModelError naming `model.path` if it cannot be loaded or its family does not fit.
    """
    prepare()
    path, adapter = model_and_adapter(settings.path)
    adapted = settings.lora is not None or adapter is not None
    model = _pretrained(settings, path, adapted, "meta" if empty else None)
    modules = freeze_modules(model, settings, path)
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if adapter is not None:
        return load_lora(model, adapter, settings.lora)
    if settings.lora is not None:
        return add_lora(model, settings.lora, modules)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ModelError("model.freeze leaves nothing to train; remove a module from it")
    return model


def freeze_modules(model: Any, settings: ModelSection, path: str) -> dict[str, nn.Module]:
    """Freeze what `settings` freezes; returns the model's `model_modules`.

    Raises ModelError if its family does not fit or lacks a module to freeze or adapt.
    """
    if reason := misfit(model):
        raise ModelError(f"model.path {path!r} ({model.config.model_type}): {reason}")
    modules = model_modules(model)
    for name in (*settings.freeze, *(settings.lora.parts if settings.lora else ())):
        if name not in modules:
            raise ModelError(
                f"model.path {path!r} has no module {name!r} to freeze or adapt; it has " + ", ".join(sorted(modules))
            )
    for name in settings.freeze:
        modules[name].requires_grad_(False)
    return modules


def _pretrained(settings: ModelSection, path: str, adapted: bool, device: str | None) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    frozen_dtype = torch.bfloat16 if settings.dtype == "bfloat16" else torch.float32
    options: dict[str, Any] = {
        # Trained weights stay in float32: at these learning rates bfloat16 rounds updates away.
        "dtype": frozen_dtype if adapted else torch.float32,
        "device_map": device,
        "attn_implementation": settings.attn_implementation,
        "trust_remote_code": settings.trust_remote_code,
        "use_safetensors": True,  # other weight files are pickles, which may run code
    }
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=settings.trust_remote_code)
        if getattr(config, "is_encoder_decoder", False):
            raise ModelError(
                f"model.path {path!r}: {config.model_type} is an encoder-decoder; only "
                "decoder-only models can be trained"
            )
        multimodal = hasattr(config, "vision_config")
        loader = AutoModelForImageTextToText if multimodal else AutoModelForCausalLM
        loaded: Any = loader.from_pretrained(path, output_loading_info=True, **options)
    except ModelError:
        raise
    except Exception as error:  # other people's files and, if trusted, their code
        raise cannot_load(settings.path, "model", error) from error
    model, report = loaded
    if missing := sorted(report["missing_keys"]):
        raise ModelError(
            f"model.path {path!r}: its files lack {len(missing)} weights of a "
            f"{type(model).__name__}, such as {missing[0]}"
        )
    return model


def model_modules(hf: Any) -> dict[str, nn.Module]:
    """The modules of a transformers model by the names that `model.freeze` and `lora.parts` use."""
    backbone = hf.base_model
    found = {"embeddings": hf.get_input_embeddings(), "head": hf.get_output_embeddings()}
    visual = getattr(backbone, "visual", None) or getattr(backbone, "vision_tower", None)
    found["language"] = getattr(backbone, "language_model", backbone)
    if visual is not None:
        found["vision"] = visual
        # Qwen3-VL has further mergers for the features it feeds to deeper layers.
        mergers = [
            module
            for owner, name in (
                (visual, "merger"),
                (visual, "deepstack_merger_list"),
                (backbone, "multi_modal_projector"),
            )
            if (module := getattr(owner, name, None)) is not None
        ]
        if mergers:
            found["merger"] = nn.ModuleList(mergers)
    return found


def misfit(hf: Any) -> str | None:
    """Why a transformers model cannot be trained here, in one line; None if it can."""
    kind, config = type(hf).__name__, hf.config.get_text_config()
    head = hf.get_output_embeddings()
    scaled = [field for field in LOGIT_SCALES if getattr(config, field, None) not in (None, 0, 1)]
    if scaled or not isinstance(head, nn.Linear):
        because = f" ({scaled[0]} = {getattr(config, scaled[0])})" if scaled else ""
        return f"{kind} has no plain linear vocabulary head{because}, which log-probabilities are computed from"
    accepted = inspect.signature(hf.base_model.forward).parameters
    needed = ("attention_mask", "position_ids", cache_argument(hf.base_model))
    if lacking := [name for name in needed if name not in accepted]:
        return (
            f"{type(hf.base_model).__name__} takes no {', '.join(lacking)}; only models with an "
            "ordinary attention cache fit"
        )
    kinds = set(getattr(config, "layer_types", None) or ())
    if other := kinds - {"full_attention", "sliding_attention"}:
        return f"{kind} has layers of kind {', '.join(sorted(other))}; only attention fits"
    if hasattr(hf.config, "vision_config") and not hasattr(hf.base_model, "get_rope_index"):
        return (
            f"{kind} does not number image tokens as Qwen's models do (get_rope_index); Qwen2-VL, "
            "Qwen2.5-VL and Qwen3-VL fit"
        )
    return None


def cannot_load(path: str, what: str, error: Exception) -> ModelError:
    """A ModelError that says which of the files behind `model.path` failed."""
    base, adapter = model_and_adapter(path)
    problem = one_line(error)
    if no_model(base):  # what transformers says of it is no help
        problem = "there is no such folder"
    elif "contains custom code" in str(error):
        problem = "it brings code of its own; set model.trust_remote_code=true if you trust it"
    elif "no file named model.safetensors" in str(error):
        problem = "it has no model.safetensors, and weights in other formats are not loaded"
    elif not Path(base).exists():
        problem = f"there is no such folder in {Path.cwd()}, and as a hub id: {problem}"
    if adapter is None:
        return ModelError(f"model.path {path!r}: its {what} cannot be loaded: {problem}")
    return ModelError(
        f"model.path {path!r} is a LoRA adapter for the base model {base!r}, whose {what} cannot "
        f"be loaded: {problem}; put that model there, or correct base_model_name_or_path in "
        "adapter_config.json"
    )
