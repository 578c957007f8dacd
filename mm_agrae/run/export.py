"""`mm-agrae export`: a policy as a plain Hugging Face checkpoint, LoRA merged into its weights."""

import json
import shutil
from pathlib import Path
from typing import Any, Literal

import torch

from mm_agrae.config import ModelSection, PromptSection
from mm_agrae.errors import RunFolderError
from mm_agrae.model.compat import readable_by_4
from mm_agrae.model.lora import model_and_adapter
from mm_agrae.model.policy import Policy
from mm_agrae.model.processing import Processing
from mm_agrae.run import checkpoint
from mm_agrae.run.versions import versions

EXPORT_FILE = "mm_agrae_export.json"
"""In an export: what it was made from."""

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


def export(source: Path, out: Path, dtype: Dtype = "auto", *, trust_remote_code: bool = False) -> dict[str, Any]:
    """Write `source` to the new folder `out`, for transformers (4.57 or later), vLLM or this package to load.

    `source` is a checkpoint (full or LoRA), a LoRA adapter, or a run folder (its newest checkpoint). `dtype` "auto"
    keeps that of the (base) model's files; LoRA is merged in float32 and rounded once. Returns what is written to
    `mm_agrae_export.json`: source, step, dtype, parameters, versions.

    Raises ModelError if the source cannot be loaded, RunFolderError if `out` is not empty or
    cannot be written. The folder is written whole or not at all.
    """
    from huggingface_hub import save_torch_state_dict

    out = out.resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunFolderError(f"export: {out} exists and is not empty; name a new folder")
    folder = Path(checkpoint.of(str(source)))
    state: dict[str, Any] = {}
    if (folder / checkpoint.STATE_FILE).is_file():
        state = checkpoint.checked_state(folder)
    processing = Processing(str(folder), PromptSection(), trust_remote_code=trust_remote_code)
    policy = Policy(ModelSection(path=str(folder), trust_remote_code=trust_remote_code), processing)
    hf = policy.hf
    target = _stored_dtype(str(folder)) if dtype == "auto" else getattr(torch, dtype)
    weights = {
        name: tensor.to(target) if tensor.is_floating_point() else tensor for name, tensor in policy.full_weights()
    }
    for name, tensor in weights.items():
        if tensor.untyped_storage().nbytes() > tensor.nbytes:  # an expert, sliced from all: safetensors refuses it
            weights[name] = tensor.clone()
    facts = {
        "source": str(folder),
        "step": state.get("step"),
        "dtype": str(target).removeprefix("torch."),
        "parameters": sum(tensor.numel() for tensor in weights.values()),
        "versions": versions(),
    }
    if hf.all_tied_weights_keys and hasattr(hf.get_output_embeddings(), "lora_A"):
        # The merged head no longer equals the embeddings.
        hf.config.tie_word_embeddings = hf.config.get_text_config().tie_word_embeddings = False
    hf.config.dtype = target
    hf.config.architectures = [type(hf).__name__]
    # Generation by plain transformers stops where training did.
    hf.generation_config.eos_token_id = list(processing.eos_ids)
    hf.generation_config.pad_token_id = processing.pad_id
    with checkpoint.written_whole(out) as temporary:
        save_torch_state_dict(weights, temporary)
        hf.config.save_pretrained(temporary)
        hf.generation_config.save_pretrained(temporary)
        processing.save(str(temporary))
        readable_by_4(temporary)
        config = folder / checkpoint.CONFIG_FILE
        if config.is_file():
            shutil.copy(config, temporary / config.name)
        (temporary / EXPORT_FILE).write_text(json.dumps(facts, indent=1), encoding="utf-8")
    return facts


def _stored_dtype(path: str) -> torch.dtype:
    from transformers import PreTrainedConfig

    model, _ = model_and_adapter(path)
    # Read as the base class, so that no code of the model's own is needed.
    values, _ = PreTrainedConfig.get_config_dict(model)
    name = values.get("dtype") or values.get("torch_dtype") or "float32"
    return getattr(torch, name)
