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
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from mm_agrae import shared_prompt as sharing
from mm_agrae.batching import pad_sequences
from mm_agrae.compat import prepare
from mm_agrae.config import LoraSection, ModelSection
from mm_agrae.errors import ModelError
from mm_agrae.types import MicroBatch, Prompt
from mm_agrae.vocab_head import head_logprobs

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

    `forbidden_ids` get probability 0; `pad_id` fills padding. Raises ModelError if the model
    cannot be loaded or its family does not fit.
    """

    bias_V: torch.Tensor

    def __init__(
        self,
        settings: ModelSection,
        *,
        forbidden_ids: tuple[int, ...],
        pad_id: int,
        temperature: float = 1.0,
        entropy_grad: bool = False,
        shared_prompt: str = "off",
        device: torch.device | str = "cpu",
    ):
        super().__init__()
        self.settings = settings
        self.pad_id = pad_id
        self.temperature = temperature
        self.entropy_grad = entropy_grad
        self.model = _load(settings)
        self.version = 0
        """Number of optimiser steps taken; completions carry the version that sampled them."""
        self._reference: list[nn.Module] = []  # in a list, so that it is no submodule
        self.to(device)
        head = self.hf.get_output_embeddings()
        config = self.hf.config.get_text_config()
        scaled = [name for name in LOGIT_SCALES if getattr(config, name, None) not in (None, 0, 1)]
        if head is None or scaled:
            raise ModelError(
                f"model.path {settings.path!r}: {type(self.hf).__name__} has no plain linear "
                "vocabulary head, which the log-probabilities are computed from"
            )
        self._vision_is_frozen = _vision_is_frozen(self.hf)
        self._features: WeakKeyDictionary[Prompt, Sequence[torch.Tensor]] = WeakKeyDictionary()
        self.repeats_because = self._share_prompts(shared_prompt)
        """Why prompts are repeated in the update, in one line; empty if they are shared."""
        bias_V = torch.zeros(head.weight.shape[0])
        bias_V[[index for index in forbidden_ids if index < len(bias_V)]] = EXCLUDED
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
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def keep_reference(self) -> None:
        """Freeze the present weights as the reference policy. LoRA needs no second model."""
        if not hasattr(self.model, "peft_config"):
            self._reference = [copy.deepcopy(self.model).requires_grad_(False).eval()]

    @torch.no_grad()
    def reference_logprobs(self, batch: MicroBatch) -> torch.Tensor:
        """Log-probabilities [B,T] (nats) under the reference policy."""
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

    def forward(self, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probability and entropy (nats, float32) of each completion token: two [B,T].

        Zeros stand on padding. The entropy carries a gradient only if the policy was made with
        `entropy_grad`.
        """
        repeated = bool(self.repeats_because)
        with self.autocast():
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
        if self.repeats_because or not bool(batch.mask_BT.any()):
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
        pictured = [prompt for prompt in pictured if prompt.pixel_values is not None]
        features = self.frozen_features(pictured) if pictured else None
        hidden_NH = sharing.hidden_states(self.backbone, packed, features)
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
        features = self.frozen_features(pictured)
        if features is not None:
            from transformers.modeling_outputs import BaseModelOutputWithPooling

            output = BaseModelOutputWithPooling(pooler_output=tuple(features))  # type: ignore[arg-type]
            return {"mm_encoder_outputs": {"image": output}}
        pixel_values, grid_N3, _ = self._pictures(pictured)
        return {"pixel_values": pixel_values, "image_grid_thw": grid_N3}

    @torch.no_grad()
    def frozen_features(self, prompts: Sequence[Prompt]) -> list[torch.Tensor] | None:
        """Features [tokens, hidden size] of each picture, kept while its prompt is alive.

        None if the vision tower learns: its output is then another one after every step.
        """
        if not self._vision_is_frozen:
            return None
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._features]
        if new:
            pixel_values, grid_N3, counts = self._pictures(new)
            encoded = self.backbone.get_image_features(pixel_values, grid_N3, return_dict=True)
            features = iter(encoded.pooler_output)
            for prompt, count in zip(new, counts, strict=True):
                self._features[prompt] = list(itertools.islice(features, count))
        return [feature for prompt in prompts for feature in self._features[prompt]]

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

    def load_weights(self, folder: Path) -> None:
        """Take over the weights of a checkpoint of the same architecture, bit for bit."""
        if hasattr(self.model, "peft_config"):
            from peft import set_peft_model_state_dict
            from peft.utils import load_peft_weights

            set_peft_model_state_dict(self.model, load_peft_weights(str(folder), device="cpu"))
            return
        # transformers may store parameters under other names than it uses, so it reads them too.
        dtype = next(self.model.parameters()).dtype
        saved = type(self.model).from_pretrained(folder, dtype=dtype)
        self.model.load_state_dict(saved.state_dict())

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        return (parameter for parameter in self.model.parameters() if parameter.requires_grad)


def adapter_base(path: str) -> str | None:
    """Base model of a LoRA adapter folder, or None if `path` is no adapter."""
    file = Path(path) / "adapter_config.json"
    if not file.is_file():
        return None
    return json.loads(file.read_text(encoding="utf-8"))["base_model_name_or_path"]


def parts(model: Any) -> dict[str, nn.Module]:
    """The named parts of a transformers model that settings can freeze or adapt."""
    backbone = model.base_model
    found = {"embeddings": model.get_input_embeddings()}
    visual = getattr(backbone, "visual", None) or getattr(backbone, "vision_tower", None)
    found["language"] = getattr(backbone, "language_model", backbone)
    if visual is not None:
        found["vision"] = visual
        merger = getattr(visual, "merger", None) or getattr(backbone, "multi_modal_projector", None)
        if merger is not None:
            found["merger"] = merger
    return found


def _vision_is_frozen(model: Any) -> bool:
    """Whether image features can be kept and handed to the backbone in place of pixels."""
    visual = parts(model).get("vision")
    if visual is None or any(parameter.requires_grad for parameter in visual.parameters()):
        return False
    return "mm_encoder_outputs" in inspect.signature(model.base_model.forward).parameters


def _load(settings: ModelSection) -> Any:
    prepare()
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    base = adapter_base(settings.path)
    path = base or settings.path
    adapted = settings.lora is not None or base is not None
    frozen_dtype = torch.bfloat16 if settings.dtype == "bfloat16" else torch.float32
    options: dict[str, Any] = {
        # What learns stays in float32: at these learning rates bfloat16 rounds updates away.
        "dtype": frozen_dtype if adapted else torch.float32,
        "attn_implementation": settings.attn_implementation,
        "trust_remote_code": settings.trust_remote_code,
    }
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=settings.trust_remote_code)
        multimodal = hasattr(config, "vision_config")
        loader = AutoModelForImageTextToText if multimodal else AutoModelForCausalLM
        model: Any = loader.from_pretrained(path, **options)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(f"model.path {path!r}: cannot be loaded: {error}") from error
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
    if base is not None:
        from peft import PeftModel

        return PeftModel.from_pretrained(model, settings.path, is_trainable=True)
    if settings.lora is not None:
        return _add_lora(model, settings.lora, known)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ModelError("model.freeze leaves nothing to learn; remove one part from it")
    return model


def _add_lora(model: Any, lora: LoraSection, known: dict[str, nn.Module]) -> Any:
    from peft import LoraConfig, get_peft_model

    names = {id(module): name for name, module in model.named_modules()}
    # The merger stands inside the vision tower; it gets adapters only when named itself.
    merger = known.get("merger")
    inside_merger = {id(module) for module in merger.modules()} if merger is not None else set()
    targets: list[str] = []
    for part in lora.parts:
        for name, module in known[part].named_modules():
            if not isinstance(module, nn.Linear):
                continue
            if part != "merger" and id(module) in inside_merger:
                continue
            if not lora.modules or name.split(".")[-1] in lora.modules:
                targets.append(names[id(module)])
    if not targets:
        raise ModelError(
            f"model.lora: no linear layer named {', '.join(lora.modules)} in "
            f"{', '.join(lora.parts)}"
        )
    return get_peft_model(
        model,
        LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=targets,
        ),
    )
