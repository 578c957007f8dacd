"""How large a model is under a run's settings, counted without loading weights.

`measure` builds the real module on torch's meta device, with adapters and frozen modules in place,
so that its counts are exact; `memory` works out from them what a run takes.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mm_agrae.config import Config, ModelSection
from mm_agrae.config.shipped import shipped
from mm_agrae.errors import ModelError
from mm_agrae.model.compat import prepare
from mm_agrae.model.loading import freeze_modules
from mm_agrae.model.lora import add_lora, model_and_adapter

SHAPES = shipped("data/model_shapes")
"""Published configs of the paper's models, for machines that do not have the models."""


@dataclass(frozen=True)
class FsdpUnit:
    """What FSDP2 gathers at once: its bytes, and how many of its parameters are trained."""

    bytes: int
    trainable: int


@dataclass(frozen=True)
class ModelSize:
    """A model's size under given settings, from its transformers config alone."""

    config: Any
    """The transformers config."""
    parameters: int
    trainable: int
    weight_bytes: int
    """Of all parameters, in the precisions they are stored in."""
    cast_parameters: int
    """Trainable weights of linear layers, of which autocast keeps 16-bit copies."""
    largest: int
    """Size of the largest trainable parameter."""
    tied: int
    """Size of trainable embeddings that also serve as the vocabulary head; 0 if there are none."""
    trained_modules: frozenset[str]
    rank: int
    """Of the LoRA adapters; 0 for full tuning."""
    layer: FsdpUnit
    """The largest layer."""
    root: FsdpUnit
    """Everything outside the layers, mostly embeddings and head: gathered for the whole update."""
    unsharded: int
    """Bytes of a frozen vision tower, which FSDP2 leaves whole on every process."""

    @property
    def text(self) -> Any:
        return self.config.get_text_config()

    @property
    def head_dim(self) -> int:
        text = self.text
        return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads

    @property
    def kv_size(self) -> int:
        heads = getattr(self.text, "num_key_value_heads", None) or self.text.num_attention_heads
        return heads * self.head_dim

    @property
    def checkpoint_bytes(self) -> int:
        """One checkpoint: weights (or adapters) and two moments of each trainable parameter."""
        weights = 4 * self.trainable if self.rank else self.weight_bytes
        return weights + 8 * self.trainable


def find_model_config(path: str, trust_remote_code: bool = False) -> tuple[Any, str]:
    """The transformers config of a model and where it was found.

    Looked for in the folder or the hub's local cache, then among the published shapes that come
    with the project, then on the hub. Raises ModelError if it is nowhere.
    """
    prepare()
    from transformers import AutoConfig

    def load(**options: Any) -> Any:
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code, **options)

    errors = (OSError, ValueError, KeyError, ImportError)
    try:
        return load(local_files_only=True), "its own config.json"
    except errors as error:
        reason = error
    file = SHAPES / f"{path.replace('/', '--')}.json"
    if file.is_file():
        values = json.loads(file.read_text(encoding="utf-8"))
        return AutoConfig.for_model(**values), "the published shape"
    try:
        return load(), "its config.json on the hub"
    except errors:
        raise ModelError(
            f"model.path {path!r}: no config.json there, in the hub's cache or on the hub ({reason})"
        ) from None


def measure(config: Config, model_config: Any) -> ModelSize:
    """Count parameters as a run would have them. Raises ModelError as loading would."""
    settings = config.model
    try:
        model, modules, rank = _build(settings, model_config)
    except (OSError, ValueError, KeyError, AttributeError, NotImplementedError) as error:
        raise ModelError(f"model.path {settings.path!r}: cannot be built: {error}") from error
    frozen_bytes = 2 if rank and settings.dtype == "bfloat16" else 4
    parameters = list(model.parameters())
    trainable = sum(p.numel() for p in parameters if p.requires_grad)
    total = sum(p.numel() for p in parameters)
    embeddings = model.get_input_embeddings().weight
    head = model.get_output_embeddings().weight
    linear = {
        module.weight for module in model.modules() if isinstance(module, nn.Linear) and module.weight.requires_grad
    }
    trained = frozenset(
        name for name, module in modules.items() if any(parameter.requires_grad for parameter in module.parameters())
    )
    frozen_tower: set[nn.Parameter] = set()
    if "vision" in modules and "vision" not in trained:
        frozen_tower = set(modules["vision"].parameters())

    def unit(members: Iterable[nn.Parameter]) -> FsdpUnit:
        sharded = set(members) - frozen_tower
        learning = sum(p.numel() for p in sharded if p.requires_grad)
        frozen = sum(p.numel() for p in sharded if not p.requires_grad)
        return FsdpUnit(4 * learning + frozen_bytes * frozen, learning)

    names = getattr(model, "_no_split_modules", None) or ()
    layers = [module for module in model.modules() if type(module).__name__ in names]
    in_layers = {p for module in layers for p in module.parameters()}
    units = [unit(module.parameters()) for module in layers]
    return ModelSize(
        config=model_config,
        parameters=total,
        trainable=trainable,
        weight_bytes=4 * trainable + frozen_bytes * (total - trainable),
        cast_parameters=sum(weight.numel() for weight in linear),
        largest=max((p.numel() for p in parameters if p.requires_grad), default=0),
        tied=embeddings.numel() if embeddings is head and embeddings.requires_grad else 0,
        trained_modules=trained,
        rank=rank,
        layer=max(units, key=lambda each: each.bytes, default=FsdpUnit(0, 0)),
        root=unit(set(parameters) - in_layers),
        unsharded=frozen_bytes * sum(p.numel() for p in frozen_tower),
    )


def _build(settings: ModelSection, model_config: Any) -> tuple[Any, dict[str, nn.Module], int]:
    """The model on the meta device with frozen modules and adapters as in a run; its modules by
    name, and the adapters' rank (0: none)."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    sees = hasattr(model_config, "vision_config")
    loader = AutoModelForImageTextToText if sees else AutoModelForCausalLM
    with torch.device("meta"):
        model: Any = loader.from_config(model_config, trust_remote_code=settings.trust_remote_code)
    model.tie_weights()
    path, adapter = model_and_adapter(settings.path)
    modules = freeze_modules(model, settings, path)
    if adapter is not None:
        from peft import PeftConfig, get_peft_model

        found: Any = PeftConfig.from_pretrained(adapter)
        found.inference_mode = False
        return get_peft_model(model, found), modules, found.r
    if settings.lora is not None:
        return add_lora(model, settings.lora, modules), modules, settings.lora.rank
    return model, modules, 0
