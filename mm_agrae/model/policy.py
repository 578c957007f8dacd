"""The policy: a vision-language or text model, LoRA or full, and its token log-probabilities.

`Policy` is the one module that accelerate wraps; its forward takes a MicroBatch and returns
log-probability and entropy of each completion token. Rollout, update and evaluation go through
the same object, so what was sampled and what is learnt from are the same distribution:
softmax(logits / temperature) with the placeholder ids excluded.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mm_agrae.batching import pad_sequences
from mm_agrae.config import LoraSection, ModelSection
from mm_agrae.errors import ModelError
from mm_agrae.model import shared_prompt as sharing
from mm_agrae.model import weights
from mm_agrae.model.compat import prepare
from mm_agrae.model.image_features import Pictures
from mm_agrae.model.processing import Processing, cannot_load, model_and_adapter, one_line
from mm_agrae.model.vocab_head import head_logprobs
from mm_agrae.parallel import sharding
from mm_agrae.types import MicroBatch, Prompt

EXCLUDED = -1e4
"""Added to the logit of an id that can't be sampled. Finite, so that 0 · log 0 is not NaN."""


LOGIT_SCALES = (
    "final_logit_softcapping",
    "logits_scaling",
    "logit_scale",
    "lm_head_multiplier",
    "output_multiplier",
)
"""Config fields of families that do something to the logits after the vocabulary head."""


class Policy(nn.Module):
    """A causal language model with or without a vision tower.

    Of `processing` it takes the ids that get probability 0 and the one that fills padding. Raises
    ModelError if the model cannot be loaded or its family does not fit.
    """

    bias_V: torch.Tensor

    def __init__(
        self,
        settings: ModelSection,
        processing: Processing,
        *,
        temperature: float = 1.0,
        entropy_grad: bool = False,
        shared_prompt: str = "off",
        device: torch.device | str = "cpu",
    ):
        super().__init__()
        self.settings = settings
        self.pad_id = processing.pad_id
        self.temperature = temperature
        self.entropy_grad = entropy_grad
        self.model = _load(settings)
        self.version = 0
        """Number of optimiser steps taken; completions carry the version that sampled them."""
        self._reference: list[nn.Module] = []  # in a list, so that it is no submodule
        self._first: dict[str, torch.Tensor] = {}
        self._replica: sharding.GatheredReplica | None = None
        self._in_replica = self._always_runs_vision = False
        self._barrier: Callable[[], None] = lambda: None
        self.to(device)
        head = self.hf.get_output_embeddings()
        self._vision_is_frozen = _vision_is_frozen(self.hf)
        self._takes_features = _takes_features(self.hf)
        self._patch = _patch_size(self.hf) if self.vision_learns else 0
        self.pictures = Pictures(frozen=self._vision_is_frozen)
        self.repeats_because = self._share_prompts(shared_prompt)
        """Why prompts are repeated in the update, in one line; empty if they are shared."""
        bias_V = torch.zeros(head.weight.shape[0])
        bias_V[[index for index in processing.forbidden_ids if index < len(bias_V)]] = EXCLUDED
        self.register_buffer("bias_V", bias_V.to(device), persistent=False)

    @property
    def hf(self) -> Any:
        """The transformers model, LoRA layers (if any) in place."""
        return self.model.get_base_model() if hasattr(self.model, "peft_config") else self.model

    @property
    def device(self) -> torch.device:
        return self.bias_V.device

    @property
    def is_multimodal(self) -> bool:
        return hasattr(self.hf.config, "vision_config")

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.settings.dtype == "float32":
            return contextlib.nullcontext()
        # Copies of all weights in 16 bits would undo what sharding saves.
        cache = not self.is_sharded or self._in_replica
        return torch.autocast(self.device.type, dtype=torch.bfloat16, cache_enabled=cache)

    # ------------------------------------------------------------------ several processes

    @property
    def vision_learns(self) -> bool:
        return self.is_multimodal and not self._vision_is_frozen

    @property
    def is_sharded(self) -> bool:
        return self._replica is not None

    def distribute(self, barrier: Callable[[], None], shard: Callable[..., None] | None) -> None:
        """Be one of several processes: see `parallel.strategies.Distributable`.

        `shard(policy, layers, whole)` gets the class names of the text model's and the vision
        tower's layers, and the parts that every process keeps whole: a frozen vision tower, which
        runs once a prompt, not the same number of times everywhere. Only `forward` may be called
        on a sharded policy, by all processes alike; everything else belongs inside `gathered`.
        """
        self._barrier, self._always_runs_vision = barrier, self.vision_learns
        if shard is not None:
            self._replica = sharding.GatheredReplica(self.model)
            frozen = [parts(self.hf)["vision"]] if self._vision_is_frozen else []
            shard(self, getattr(self.hf, "_no_split_modules", None) or (), frozen)

    def _reshard(self) -> None:
        """Drop what forward passes have left gathered of a sharded policy."""
        if not self._in_replica:
            sharding.reshard(self)

    @contextlib.contextmanager
    def gathered(self, *, saving: bool = False, keep: bool = True) -> Iterator[None]:
        """Within, a sharded policy holds whole weights and needs no other process.

        Entering is a collective call, whose result a process without `keep` throws away. `saving`
        puts the weights into main memory, under LoRA the adapter alone. Nothing happens to a
        policy that is not sharded.
        """
        if self._replica is None or self._in_replica:
            yield
            return
        self._barrier()
        self._reshard()
        self._replica.fill(
            self.model,
            device="cpu" if saving else None,
            learning_only=saving and hasattr(self.model, "peft_config"),
            keep=keep,
        )
        trained, self.model, self._in_replica = self.model, self._replica.model, True
        try:
            yield
        finally:
            self.model, self._in_replica = trained, False
            self._replica.empty()

    # ------------------------------------------------------------------ the reference

    def keep_reference(self) -> None:
        """Freeze the present weights as the reference policy. LoRA needs no second model."""
        adapted = hasattr(self.model, "peft_config")
        if (self.is_sharded and not adapted) or model_and_adapter(self.settings.path)[1]:
            self._first = self._learning()
        elif not adapted:
            self._reference = [copy.deepcopy(self.model).requires_grad_(False).eval()]

    @torch.no_grad()
    def reference_logprobs(self, batch: MicroBatch) -> torch.Tensor:
        """Log-probabilities [B,T] (nats) under the reference policy."""
        if self._first:
            present = self._learning()
            try:
                self._put(self._first)
                return self(batch)[0]
            finally:
                self._put(present)
        if hasattr(self.model, "peft_config"):
            with self.model.disable_adapter():
                return self(batch)[0]
        if not self._reference:
            raise RuntimeError("keep_reference() was not called")
        trained, self.model = self.model, self._reference[0]
        try:
            return self(batch)[0]
        finally:
            self.model = trained

    def _learning(self) -> dict[str, torch.Tensor]:
        """Copies of the parameters that learn, in shards if they are sharded."""
        self._reshard()
        named = self.model.named_parameters()
        return {name: p.detach().clone() for name, p in named if p.requires_grad}

    def _put(self, values: dict[str, torch.Tensor]) -> None:
        """Set parameters by name, from shards or from whole tensors."""
        self._reshard()
        for name, parameter in self.model.named_parameters():
            if name in values:
                sharding.set_parameter(parameter, values[name])

    def forward(self, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probability and entropy (nats, float32) of each completion token: two [B,T].

        Zeros stand on padding. The entropy carries a gradient only if the policy was made with
        `entropy_grad`.
        """
        repeated = bool(self.repeats_because)
        blind = self._always_runs_vision and all(p.pixel_values is None for p in batch.prompts)
        with self.autocast(), self._seeing_nothing() if blind else contextlib.nullcontext():
            hidden_NH, row_N, column_N = (self._repeated if repeated else self._shared)(batch)
            logp_N, entropy_N = self._head(hidden_NH, batch.token_BT[row_N, column_N])
        shape = batch.token_BT.shape
        logp_BT = logp_N.new_zeros(shape).index_put((row_N, column_N), logp_N)
        entropy_BT = entropy_N.new_zeros(shape).index_put((row_N, column_N), entropy_N)
        return logp_BT, entropy_BT

    def _share_prompts(self, wanted: str) -> str:
        if wanted == "off":
            return "update.shared_prompt is off"
        reason = sharing.unsupported_reason(self.hf)
        if reason is None:
            sharing.install(self.hf)
        elif wanted == "on":
            raise ModelError(f"update.shared_prompt is on, but {reason}")
        return reason or ""

    @torch.no_grad()
    def check_sharing(self, batch: MicroBatch) -> None:
        """Compare both ways on a few real completions. Raises ModelError if they disagree."""
        if self.repeats_because:
            return
        few = slice(0, 4)
        batch = replace(
            batch,
            prompt_index_B=batch.prompt_index_B[few],
            token_BT=batch.token_BT[few],
            mask_BT=batch.mask_BT[few],
        )
        training, reason = self.training, self.repeats_because
        self.eval()
        try:
            shared_BT = self(batch)[0]
            self.repeats_because = "check_sharing compares"
            repeated_BT = self(batch)[0]
        finally:
            self.repeats_because = reason
            self.train(training)
        dtype = torch.float32 if self.settings.dtype == "float32" else torch.bfloat16
        sharing.require_agreement(shared_BT, repeated_BT, batch.mask_BT, dtype)

    def _shared(self, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Hidden states that predict each completion token, its row and column; prompts once."""
        packed = sharing.pack(self.backbone, batch)
        pictured = [batch.prompts[index] for index in packed.prompts]
        hidden_NH = sharing.hidden_states(self.backbone, packed, self._features(pictured))
        return hidden_NH, packed.row_N, packed.column_N

    def _repeated(self, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As `_shared`, with the prompt repeated in each row."""
        lengths_B = batch.mask_BT.sum(-1).long().tolist()
        prompts = [batch.prompts[index] for index in batch.prompt_index_B.tolist()]
        completions = [
            row[:length].cpu() for row, length in zip(batch.token_BT, lengths_B, strict=True)
        ]
        inputs = pad_sequences(
            prompts, completions, pad_id=self.pad_id, side="right", device=self.device
        )
        positions, _ = self.positions(
            inputs.input_ids, inputs.attention_mask, inputs.mm_token_type_ids, inputs.image_grid_thw
        )
        hidden_BSH = self.backbone(
            input_ids=inputs.input_ids,
            attention_mask=inputs.attention_mask,
            position_ids=positions,
            use_cache=False,
            **self.vision_inputs(prompts),
        ).last_hidden_state
        row_N, column_N = batch.mask_BT.nonzero(as_tuple=True)
        start_B = torch.tensor([len(prompt) - 1 for prompt in prompts], device=self.device)
        return hidden_BSH[row_N, start_B[row_N] + column_N], row_N, column_N

    @property
    def backbone(self) -> Any:
        """The model below the vocabulary head."""
        return self.hf.base_model

    def vision_inputs(self, prompts: Sequence[Prompt]) -> dict[str, Any]:
        """Arguments of the backbone for the pictures of `prompts`, in their order."""
        pictured = [prompt for prompt in prompts if prompt.pixel_values is not None]
        if not pictured:
            return {}
        features = self._features(pictured)
        if features is not None:
            from transformers.modeling_outputs import BaseModelOutputWithPooling

            output = BaseModelOutputWithPooling(pooler_output=tuple(features))  # type: ignore[arg-type]
            return {"mm_encoder_outputs": {"image": output}}
        pixel_values, grid_N3, _ = self._pictures(pictured)
        return {"pixel_values": pixel_values, "image_grid_thw": grid_N3}

    @contextlib.contextmanager
    def _seeing_nothing(self) -> Iterator[None]:
        """Within, 0 is added to the embeddings by way of the vision tower.

        For a process whose texts have no pictures: where the tower learns, the others wait for
        its part in gathering the tower's weights and in summing its gradients. The 0 comes in
        where pictures do, so that forward and backward pass take the same course.
        """
        nothing = self._nothing_seen()
        embeddings = self.hf.get_input_embeddings()
        hook = embeddings.register_forward_hook(lambda module, args, output: output + nothing)
        try:
            yield
        finally:
            hook.remove()

    def _nothing_seen(self) -> torch.Tensor:
        size = self.hf.config.vision_config.spatial_merge_size
        blank = torch.zeros(size * size, self._patch, device=self.device)
        grid_13 = torch.tensor([[1, size, size]], device=self.device)
        seen = dict(self.backbone.get_image_features(blank, grid_13, return_dict=True))
        seen.pop("last_hidden_state", None)  # before the merger: of pictures it is not used either
        return sum(0 * tensor.float().sum() for tensor in _tensors(seen))  # type: ignore[return-value]

    def _features(self, prompts: Sequence[Prompt]) -> list[torch.Tensor] | None:
        """Features [tokens, hidden size] of each picture of `prompts`.

        None if there are no pictures, or if the backbone must be given their pixels.
        """
        if not self._takes_features or all(prompt.pixel_values is None for prompt in prompts):
            return None

        def encode(new: list[Prompt]) -> list[list[torch.Tensor]]:
            pixel_values, grid_N3, counts = self._pictures(new)
            encoded = self.backbone.get_image_features(pixel_values, grid_N3, return_dict=True)
            features = iter(encoded.pooler_output)
            return [list(itertools.islice(features, count)) for count in counts]

        return self.pictures.features(prompts, encode)

    def _pictures(self, prompts: Sequence[Prompt]) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
        """Pixels and sizes of all pictures, and how many each prompt has."""
        pixels = [p.pixel_values for p in prompts if p.pixel_values is not None]
        grids = [p.image_grid_thw for p in prompts if p.image_grid_thw is not None]
        return (
            torch.cat(pixels).to(self.device),
            torch.cat(grids).to(self.device),
            [len(grid) for grid in grids],
        )

    def positions(
        self,
        ids_BS: torch.Tensor,
        attention_BS: torch.Tensor,
        kind_BS: torch.Tensor,
        grid_N3: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Position ids ([3,B,S] with images, else [B,S]) and the next free position of each row.

        Always explicit: left to itself, the model silently falls back to one-dimensional
        positions for image prompts when any of the inputs is missing.
        """
        if self.is_multimodal and grid_N3 is not None:
            positions, delta_B1 = self.backbone.get_rope_index(
                ids_BS,
                mm_token_type_ids=kind_BS,
                image_grid_thw=grid_N3,
                attention_mask=attention_BS,
            )
            return positions, attention_BS.sum(-1) + delta_B1.reshape(-1)
        positions = (attention_BS.cumsum(-1) - 1).clamp(min=0)
        return positions, attention_BS.sum(-1)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits in float32, forbidden ids excluded, before the temperature."""
        return self.hf.get_output_embeddings()(hidden).float() + self.bias_V

    def _head(
        self, hidden_NH: torch.Tensor, target_N: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return head_logprobs(
            self.hf.get_output_embeddings(),
            hidden_NH,
            target_N,
            bias_V=self.bias_V,
            temperature=self.temperature,
            entropy_grad=self.entropy_grad,
        )

    def full_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """All weights as a checkpoint stores them. See `weights.full_weights`."""
        return weights.full_weights(self)

    def load_weights(self, folder: Path) -> None:
        """Take over the weights of a checkpoint of the same architecture, bit for bit."""
        if hasattr(self.model, "peft_config"):
            with self.gathered(saving=True):
                _load_adapter(self.model, str(folder))
                loaded = self._learning() if self.is_sharded else {}
            self._put(loaded)
            return
        # transformers may store parameters under other names than it uses, so it reads them too.
        # By this model's config: that of a damaged checkpoint may ask for a model of any size.
        saved, found = type(self.model).from_pretrained(
            folder,
            config=copy.deepcopy(self.model.config),
            dtype=next(self.model.parameters()).dtype,
            use_safetensors=True,
            output_loading_info=True,
        )
        if lacking := sorted(found["missing_keys"]):
            raise ModelError(f"{folder} lacks {len(lacking)} weights (such as {lacking[0]})")
        if self.is_sharded:
            self._put(dict(saved.named_parameters()))
        else:
            self.model.load_state_dict(saved.state_dict())

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        return (parameter for parameter in self.model.parameters() if parameter.requires_grad)


def parts(model: Any) -> dict[str, nn.Module]:
    """The named parts of a transformers model that settings can freeze or adapt."""
    backbone = model.base_model
    found = {"embeddings": model.get_input_embeddings(), "head": model.get_output_embeddings()}
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


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """All tensors in nested dicts and sequences."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        yield from itertools.chain.from_iterable(map(_tensors, value.values()))
    elif isinstance(value, list | tuple):
        yield from itertools.chain.from_iterable(map(_tensors, value))


def _vision_is_frozen(model: Any) -> bool:
    """Whether image features can be kept and handed to the backbone in place of pixels."""
    visual = parts(model).get("vision")
    if visual is None or any(parameter.requires_grad for parameter in visual.parameters()):
        return False
    return _takes_features(model)


def _takes_features(model: Any) -> bool:
    """Whether image features can be handed to the backbone in place of pixels."""
    visual = parts(model).get("vision")
    # With a deepstack they are more than one tensor an image.
    if visual is None or hasattr(visual, "deepstack_merger_list"):
        return False
    return "mm_encoder_outputs" in inspect.signature(model.base_model.forward).parameters


def _patch_size(model: Any) -> int:
    """Numbers that the vision tower takes for one patch of a picture."""
    tower: Any = parts(model)["vision"]
    return next(p.shape[1:].numel() for p in tower.patch_embed.parameters() if p.dim() > 1)


def _load(settings: ModelSection) -> Any:
    prepare()
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    path, adapter = model_and_adapter(settings.path)
    adapted = settings.lora is not None or adapter is not None
    frozen_dtype = torch.bfloat16 if settings.dtype == "bfloat16" else torch.float32
    options: dict[str, Any] = {
        # What learns stays in float32: at these learning rates bfloat16 rounds updates away.
        "dtype": frozen_dtype if adapted else torch.float32,
        "attn_implementation": settings.attn_implementation,
        "trust_remote_code": settings.trust_remote_code,
        "use_safetensors": True,  # other weight files are pickles, which may run code
    }
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=settings.trust_remote_code)
        if getattr(config, "is_encoder_decoder", False):
            raise ModelError(
                f"model.path {path!r}: {config.model_type} is an encoder and a decoder; only "
                "models that go on writing their prompt fit"
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
    if reason := misfit(model):
        raise ModelError(f"model.path {path!r} ({config.model_type}): {reason}")
    known = parts(model)
    for name in (*settings.freeze, *(settings.lora.parts if settings.lora else ())):
        if name not in known:
            raise ModelError(
                f"model.path {path!r} has no part {name!r} to freeze or adapt; it has "
                + ", ".join(sorted(known))
            )
    for name in settings.freeze:
        known[name].requires_grad_(False)
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if adapter is not None:
        return _add_adapter(model, adapter, settings.lora)
    if settings.lora is not None:
        return add_lora(model, settings.lora, known)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ModelError("model.freeze leaves nothing to learn; remove one part from it")
    return model


def misfit(hf: Any) -> str | None:
    """Why a transformers model cannot be trained here, in one line; None if it can."""
    kind, config = type(hf).__name__, hf.config.get_text_config()
    head = hf.get_output_embeddings()
    scaled = [field for field in LOGIT_SCALES if getattr(config, field, None) not in (None, 0, 1)]
    if scaled or not isinstance(head, nn.Linear):
        because = f" ({scaled[0]} = {getattr(config, scaled[0])})" if scaled else ""
        return (
            f"{kind} has no plain linear vocabulary head{because}, which the log-probabilities "
            "are computed from"
        )
    takes = inspect.signature(hf.base_model.forward).parameters
    lacks = [
        arg for arg in ("attention_mask", "position_ids", "past_key_values") if arg not in takes
    ]
    if lacks:
        return (
            f"{type(hf.base_model).__name__} takes no {', '.join(lacks)}; only models with an "
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


def _add_adapter(model: Any, adapter: str, lora: LoraSection | None) -> Any:
    from peft import LoraConfig, PeftConfig, PeftModel

    where = f"model.path {adapter!r}"
    try:
        config = PeftConfig.from_pretrained(adapter)
    except Exception as error:
        raise ModelError(f"{where}: cannot read adapter_config.json: {one_line(error)}") from None
    if not isinstance(config, LoraConfig):
        raise ModelError(f"{where} is an adapter of kind {config.peft_type}; LoRA fits")
    # What the merged weights and the fused vocabulary head would leave out without a word.
    unusual = [
        f"{name}={value}"
        for name in ("use_dora", "modules_to_save", "trainable_token_indices", "lora_bias")
        if (value := getattr(config, name, None))
    ]
    if config.bias != "none":
        unusual.append(f"bias={config.bias}")
    if unusual:
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
        adapted = PeftModel(model, config)
    except Exception as error:
        raise _unfit_adapter(adapter, model, one_line(error)) from None
    _load_adapter(adapted, adapter)
    return adapted


def _load_adapter(model: Any, folder: str) -> None:
    """Put an adapter's weights into a model that has LoRA layers. Raises ModelError if not all
    of them find their place, and leave none empty."""
    from peft import set_peft_model_state_dict
    from peft.utils import SAFETENSORS_WEIGHTS_NAME, load_peft_weights

    if not (Path(folder) / SAFETENSORS_WEIGHTS_NAME).is_file():
        raise ModelError(  # PEFT would take a pickle in its place, which may run code
            f"model.path {folder!r} has no {SAFETENSORS_WEIGHTS_NAME}, and weights in other "
            "formats are not loaded; if you trust them, convert them with PEFT's save_pretrained"
        )
    try:
        saved = load_peft_weights(folder, device="cpu")
        result: Any = set_peft_model_state_dict(model, saved)
    except Exception as error:
        raise _unfit_adapter(folder, model, one_line(error)) from None
    missing = [key for key in result.missing_keys if "lora_" in key]
    if result.unexpected_keys or missing:
        found = [
            f"{len(keys)} of its weights {what} (such as {keys[0]})"
            for keys, what in ((result.unexpected_keys, "have no place there"), (missing, "lack"))
            if keys
        ]
        raise _unfit_adapter(folder, model, " and ".join(found))
    other = {
        type(layer.get_base_layer()).__name__
        for layer in model.modules()
        if hasattr(layer, "lora_A") and not isinstance(layer.get_base_layer(), nn.Linear)
    }
    if other:
        raise ModelError(f"model.path {folder!r} adapts {', '.join(other)}; only linear layers fit")


def _unfit_adapter(adapter: str, model: Any, problem: str) -> ModelError:
    base, _ = model_and_adapter(adapter)
    hf = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = hf.config.get_text_config()
    return ModelError(
        f"model.path {adapter!r} is a LoRA adapter for {base!r}, and does not fit the model there, "
        f"a {type(hf).__name__} of {config.num_hidden_layers} layers and hidden size "
        f"{config.hidden_size}: {problem}"
    )


def add_lora(model: Any, lora: LoraSection, known: dict[str, nn.Module]) -> Any:
    """The model with the adapters that `lora` asks for; `known` are its `parts`.

    Raises ModelError if there is nothing to adapt.
    """
    from peft import LoraConfig, get_peft_model

    names = {id(module): name for name, module in model.named_modules()}
    # The merger stands inside the vision tower; it gets adapters only when named itself.
    merger = known.get("merger")
    inside_merger = {id(module) for module in merger.modules()} if merger is not None else set()
    targets: list[str] = []
    for part in lora.parts:
        for module in known[part].modules():
            if not isinstance(module, nn.Linear):
                continue
            if part != "merger" and id(module) in inside_merger:
                continue
            full_name = names[id(module)]
            if part == "head" or not lora.modules or full_name.split(".")[-1] in lora.modules:
                targets.append(full_name)
    if not targets:
        raise ModelError(
            f"model.lora: no linear layer named {', '.join(lora.modules)} in "
            f"{', '.join(lora.parts)}"
        )
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
    )
    with warnings.catch_warnings():
        # Of merging a head that is tied to the embeddings; `export` keeps them apart.
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings")
        return get_peft_model(model, config)
