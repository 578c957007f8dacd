"""`mm-agrae export`: a policy as a plain Hugging Face checkpoint, LoRA merged into its weights."""

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any, Literal

import torch

from mm_agrae import config as configs
from mm_agrae.config import ModelSection, PromptSection
from mm_agrae.errors import ConfigError, RunFolderError, one_line
from mm_agrae.model.compat import readable_by_4
from mm_agrae.model.lora import model_and_adapter
from mm_agrae.model.policy import Policy
from mm_agrae.model.processing import Processing
from mm_agrae.run import checkpoint
from mm_agrae.run.model_card import CARD_FILE, model_card
from mm_agrae.run.versions import versions

EXPORT_FILE = "mm_agrae_export.json"
"""In an export: what it was made from."""

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


def export(
    source: Path, out: Path, dtype: Dtype = "auto", *, trust_remote_code: bool = False, push: str | None = None
) -> dict[str, Any]:
    """Write `source` to the new folder `out`, for transformers (4.57 or later), vLLM or this package to load.

    `source` is a checkpoint (full or LoRA), a LoRA adapter, or a run folder (its newest checkpoint). `dtype` "auto"
    keeps that of the (base) model's files; LoRA is merged in float32 and rounded once. Returns what is written to
    `mm_agrae_export.json`: source, step, dtype, parameters, versions. A model card (README.md) says how it was made.
    `push` names a repository of the hub (user/name) to upload it to; its `address` is then returned as well.

    Raises ModelError if the source cannot be loaded, RunFolderError if `out` is not empty or cannot be written,
    ConfigError for the hub. The folder is written whole or not at all.
    """
    from huggingface_hub import save_torch_state_dict

    out = out.resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunFolderError(f"export: {out} exists and is not empty; name a new folder")
    if push:
        require_hub(push)
    folder = Path(checkpoint.of(str(source)))
    state: dict[str, Any] = {}
    if (folder / checkpoint.STATE_FILE).is_file():
        state = checkpoint.checked_state(folder)
    elif (folder / EXPORT_FILE).is_file():
        state = json.loads((folder / EXPORT_FILE).read_text(encoding="utf-8"))
    processing = Processing(str(folder), PromptSection(), trust_remote_code=trust_remote_code)
    policy = Policy(ModelSection(path=str(folder), trust_remote_code=trust_remote_code), processing)
    hf, config = policy.hf, None
    if state.get("step") is not None:
        with contextlib.suppress(ConfigError):  # an earlier version's
            config = configs.load(folder / checkpoint.CONFIG_FILE)
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
    with checkpoint.written_whole(out) as temporary:
        save_torch_state_dict(weights, temporary)
        hf.config.save_pretrained(temporary)
        processing.save(str(temporary), config.rollout if config else None)
        readable_by_4(temporary)
        if (file := folder / checkpoint.CONFIG_FILE).is_file():
            shutil.copy(file, temporary)
        card = model_card(config, policy, processing, state, folder.resolve().parent.parent, merged=True)
        (temporary / CARD_FILE).write_text(card, encoding="utf-8")
        (temporary / EXPORT_FILE).write_text(json.dumps(facts, indent=1), encoding="utf-8")
    return facts | {"address": upload(out, push)} if push else facts


def require_hub(name: str) -> None:
    """Raise ConfigError if `name` can be no repository, or the hub cannot be entered: no token, no network."""
    from huggingface_hub import constants, whoami
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
        if "/" not in name:
            raise ConfigError("name a repository as user/name or organisation/name")
        whoami()
    except Exception as error:  # of many kinds, those of its HTTP library among them
        raise ConfigError(f"--push {name}: {one_line(error)} ({constants.ENDPOINT})") from None


def upload(folder: Path, name: str) -> str:
    """Upload an export to a repository of the hub, made private if there is none; its address. Raises ConfigError."""
    from huggingface_hub import create_repo, upload_folder

    try:
        address = create_repo(name, private=True, exist_ok=True)
        upload_folder(repo_id=name, folder_path=folder, commit_message="Export of mm-agrae")
    except Exception as error:  # as above
        again = f"the export is in {folder}; to try again: hf upload {name} {folder} ."
        raise ConfigError(f"--push {name}: {one_line(error)}; {again}") from None
    return str(address)


def _stored_dtype(path: str) -> torch.dtype:
    from transformers import PreTrainedConfig

    model, _ = model_and_adapter(path)
    # Read as the base class, so that no code of the model's own is needed.
    values, _ = PreTrainedConfig.get_config_dict(model)
    name = values.get("dtype") or values.get("torch_dtype") or "float32"
    return getattr(torch, name)
