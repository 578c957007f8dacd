"""Fits to other versions: a broken torchvision, and checkpoints that transformers 4.57 reads too.

A CPU build of torch next to the default torchvision wheel leaves torchvision's compiled library unloadable; importing
torchvision then fails with "operator torchvision::nms does not exist". None of its operators is used here, so
declaring their schemas is enough. The default wheels of torchaudio and torchcodec, which vLLM installs and
transformers imports where it finds them, fail in the same way; neither is used, so they are treated as not installed.
"""

import importlib.util
import inspect
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def prepare() -> None:
    """Make `import torchvision` safe. Call before importing transformers' vision classes."""
    if "torchvision" in sys.modules or importlib.util.find_spec("torchvision") is None:
        return
    import torch

    try:
        import torchvision
    except (RuntimeError, AttributeError):
        for name in [module for module in sys.modules if module.startswith("torchvision")]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "FRAGMENT")
        for schema in (
            "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
            "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
        ):
            if not hasattr(torch.ops.torchvision, schema.split("(")[0]):
                library.define(schema)
        _kept_alive.append(library)
        import torchvision  # noqa: F401

        for name in ("torchaudio", "torchcodec"):
            _hide_if_broken(name)


def cache_argument(backbone: Any) -> str:
    """What a transformers model calls its cache of keys and values: `cache` from 5.24 on."""
    return "cache" if "cache" in inspect.signature(backbone.forward).parameters else "past_key_values"


def _hide_if_broken(name: str) -> None:
    try:
        importlib.import_module(name)
    except ImportError:
        return
    except (OSError, RuntimeError):
        for module in [known for known in sys.modules if known.split(".")[0] == name]:
            del sys.modules[module]
        sys.modules[name] = None  # type: ignore[assignment]  # as if not installed


def readable_by_4(folder: Path) -> None:
    """Add to a checkpoint that transformers 5 has written what 4.57 looks for: names of its own for RoPE, experts and
    the tokenizer, a file for each preprocessor. Version 5 reads the same from it as before."""
    _edit(folder / "config.json", _config_for_4)
    _edit(folder / "tokenizer_config.json", _tokenizer_for_4)
    if (whole := folder / "processor_config.json").is_file():
        values = json.loads(whole.read_text(encoding="utf-8"))
        for part, prefix in (("image_processor", ""), ("video_processor", "video_")):
            if part in values:
                own = json.dumps({"processor_class": values.get("processor_class"), **values[part]}, indent=2)
                (folder / f"{prefix}preprocessor_config.json").write_text(own + "\n", encoding="utf-8")


def _edit(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    if file.is_file():
        values = json.loads(file.read_text(encoding="utf-8"))
        change(values)
        file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _config_for_4(values: dict[str, Any]) -> None:
    for part in (values, *(value for value in values.values() if isinstance(value, dict) and "model_type" in value)):
        if experts := part.get("num_local_experts"):
            part.setdefault("num_experts", experts)
        rope = part.get("rope_parameters") or {}
        if "full_attention" in rope:  # by kind of layer, as Gemma has it
            part["rope_local_base_freq"] = rope.get("sliding_attention", rope["full_attention"])["rope_theta"]
            rope = rope["full_attention"]
        if "rope_theta" in rope:
            scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
            plain = scaling.keys() <= {"rope_type"} and scaling.get("rope_type") in (None, "default", "axial")
            part |= {"rope_theta": rope["rope_theta"], "rope_scaling": None if plain else scaling}


def _tokenizer_for_4(values: dict[str, Any]) -> None:
    if isinstance(values.get("extra_special_tokens"), list):
        values["additional_special_tokens"] = values.pop("extra_special_tokens")
    if values.get("tokenizer_class") == "TokenizersBackend":
        values["tokenizer_class"] = "PreTrainedTokenizerFast"


_kept_alive: list[object] = []
"""A torch Library unregisters its operators when it is garbage-collected."""
