"""LoRA adapters: new ones on chosen modules, or trained ones from a folder that PEFT wrote."""

import json
import warnings
from pathlib import Path
from typing import Any

from torch import nn

from mm_agrae.config import LoraSection
from mm_agrae.errors import ModelError, one_line
from mm_agrae.model import lora_linear


def model_and_adapter(path: str) -> tuple[str, str | None]:
    """What `model.path` names: (a model, None), or (its base model, a LoRA adapter folder).

    Raises ModelError for a run folder, and for an adapter that does not name its base.
    """
    folder = Path(path)
    if checkpoints := sorted(folder.glob("checkpoints/step_*")):
        raise ModelError(f"model.path {path!r} is a run folder; name a checkpoint, the newest is {checkpoints[-1]}")
    file = folder / "adapter_config.json"
    if not file.is_file():
        return path, None
    try:
        base = json.loads(file.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{file}: names no base model ({one_line(error)})") from None
    if not isinstance(base, str) or not base:
        raise ModelError(f"{file}: base_model_name_or_path names no base model; add it")
    return base, path


def add_lora(hf: Any, lora: LoraSection, modules: dict[str, nn.Module]) -> Any:
    """The model with new adapters on the linear layers that `lora` chooses.

    `modules` are its `model_modules`. Raises ModelError if no layer is chosen.
    """
    from peft import LoraConfig, get_peft_model

    names = {id(module): name for name, module in hf.named_modules()}
    # The merger is a submodule of the vision tower, but is adapted only when named itself.
    merger = modules.get("merger")
    inside_merger = {id(module) for module in merger.modules()} if merger is not None else set()
    targets: list[str] = []
    for part in lora.parts:
        for module in modules[part].modules():
            if not isinstance(module, nn.Linear):
                continue
            if part != "merger" and id(module) in inside_merger:
                continue
            full_name = names[id(module)]
            if part == "head" or not lora.modules or full_name.split(".")[-1] in lora.modules:
                targets.append(full_name)
    if not targets:
        raise ModelError(f"model.lora: no linear layer named {', '.join(lora.modules)} in {', '.join(lora.parts)}")
    config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=targets)
    with warnings.catch_warnings():
        # About merging a head that is tied to the embeddings; `export` unties them.
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings")
        adapted = get_peft_model(hf, config)
    lora_linear.install(adapted)
    return adapted


def load_lora(hf: Any, adapter: str, lora: LoraSection | None) -> Any:
    """The model with the adapter of a folder, to go on training it.

    Raises ModelError if it is not plain LoRA, contradicts `lora` or does not fit the model.
    """
    from peft import LoraConfig, PeftConfig, PeftModel

    where = f"model.path {adapter!r}"
    try:
        config = PeftConfig.from_pretrained(adapter)
    except Exception as error:
        raise ModelError(f"{where}: cannot read adapter_config.json: {one_line(error)}") from None
    if not isinstance(config, LoraConfig):
        raise ModelError(f"{where} is an adapter of kind {config.peft_type}; LoRA fits")
    # Merging and the fused vocabulary head would silently leave these out.
    names = (
        "modules_to_save", "trainable_token_indices", "lora_bias", "bias", "use_dora", "use_bdlora", "arrow_config",
        "alora_invocation_tokens", "kasa_config", "monteclora_config", "velora_config",
    )  # fmt: skip
    values = {name: getattr(config, name, None) for name in names}
    if unusual := [f"{name}={value}" for name, value in values.items() if value and value != "none"]:
        raise ModelError(
            f"{where} is not plain LoRA ({', '.join(unusual)}); merge it into its base with "
            "PEFT's merge_and_unload and name the result"
        )
    if lora is not None and (lora.rank, lora.alpha) != (config.r, config.lora_alpha):
        raise ModelError(
            f"{where} is a LoRA adapter of rank {config.r} and alpha {config.lora_alpha}, and "
            f"model.lora asks for {lora.rank} and {lora.alpha}; leave model.lora out to go on "
            "with the adapter"
        )
    config.inference_mode = False
    try:
        adapted = PeftModel(hf, config)
    except Exception as error:
        raise _unfit(adapter, hf, one_line(error)) from None
    if not next(hf.parameters()).is_meta:  # where another process sends the weights
        load_lora_weights(adapted, adapter)
    lora_linear.install(adapted)
    return adapted


def load_lora_weights(model: Any, folder: str) -> None:
    """Load an adapter's weights into a PEFT model that has the same LoRA layers.

    Raises ModelError unless every weight in the file has its layer and every layer its weights.
    """
    from peft import set_peft_model_state_dict
    from peft.utils import SAFETENSORS_WEIGHTS_NAME, load_peft_weights

    if not (Path(folder) / SAFETENSORS_WEIGHTS_NAME).is_file():
        raise ModelError(  # PEFT would fall back to a pickle, which may run code
            f"model.path {folder!r} has no {SAFETENSORS_WEIGHTS_NAME}, and weights in other "
            "formats are not loaded; if you trust them, convert them with PEFT's save_pretrained"
        )
    try:
        saved = load_peft_weights(folder, device="cpu")
        result: Any = set_peft_model_state_dict(model, saved)
    except Exception as error:
        raise _unfit(folder, model, one_line(error)) from None
    missing = [key for key in result.missing_keys if "lora_" in key]
    if result.unexpected_keys or missing:
        found = [
            f"{len(keys)} of its weights {what} (such as {keys[0]})"
            for keys, what in ((result.unexpected_keys, "belong to no layer"), (missing, "are missing"))
            if keys
        ]
        raise _unfit(folder, model, " and ".join(found))
    other = {
        type(layer.get_base_layer()).__name__
        for layer in model.modules()
        if hasattr(layer, "lora_A") and not isinstance(layer.get_base_layer(), nn.Linear)
    }
    if other:
        raise ModelError(f"model.path {folder!r} adapts {', '.join(other)}; only linear layers fit")


def _unfit(adapter: str, model: Any, problem: str) -> ModelError:
    base, _ = model_and_adapter(adapter)
    hf = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = hf.config.get_text_config()
    return ModelError(
        f"model.path {adapter!r} is a LoRA adapter for {base!r}, and does not fit the model there, "
        f"a {type(hf).__name__} of {config.num_hidden_layers} layers and hidden size "
        f"{config.hidden_size}: {problem}"
    )
