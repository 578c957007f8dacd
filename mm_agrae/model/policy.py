"""The policy: a vision-language or text model, LoRA or full, and its token log-probabilities.

`Policy` is the one module that accelerate wraps; its forward takes a MicroBatch and returns log-probability and
entropy of each completion token. Rollout, update and evaluation use the same object, so the distribution sampled from
is the one that is trained: softmax(logits / temperature) with the placeholder ids excluded.
"""

import contextlib
import copy
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mm_agrae.batching import pad_sequences
from mm_agrae.config import ModelSection
from mm_agrae.errors import ModelError
from mm_agrae.model import fused, vision_tower, weights
from mm_agrae.model import shared_prompt as sharing
from mm_agrae.model.image_features import (
    ImageFeatures,
    accepts_features,
    dummy_image_forward,
    encode_images,
    feature_inputs,
    pixel_inputs,
)
from mm_agrae.model.loading import load_model, model_modules
from mm_agrae.model.lora import load_lora_weights, model_and_adapter
from mm_agrae.model.processing import Processing
from mm_agrae.model.vocab_head import head_logits, head_logprobs
from mm_agrae.parallel import sharding
from mm_agrae.types import MicroBatch, Prompt

EXCLUDED = -1e4
"""Added to the logit of an id that can't be sampled. Finite, so that 0 · log 0 is not NaN."""


SMALL = 20_000_000
"""Parameters below which a second CPU thread takes longer to wait for than it saves."""


def one_thread_if_small(parameters: int, device: torch.device) -> None:
    """Have torch use one CPU thread for a small model, unless OMP_NUM_THREADS says how many."""
    if device.type == "cpu" and parameters < SMALL and not os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(1)


class Policy(nn.Module):
    """A causal language model with or without a vision tower.

    `processing` says which ids get probability 0 and which one pads. `compute_device` is where `distribute` will take
    its shards, if not `device`. Raises ModelError if the model cannot be loaded or its family does not fit.
    """

    bias_V: Tensor

    def __init__(
        self,
        settings: ModelSection,
        processing: Processing,
        *,
        temperature: float = 1.0,
        entropy_grad: bool = False,
        shared_prompt: str = "off",
        device: torch.device | str = "cpu",
        compute_device: torch.device | None = None,
    ):
        super().__init__()
        self.settings = settings
        self.pad_id = processing.pad_id
        self.temperature = temperature
        self.entropy_grad = entropy_grad
        self._is_empty = torch.device(device).type == "meta"  # until the main process sends the weights
        self.model = load_model(settings, empty=self._is_empty)
        self.version = 0
        """Number of optimiser steps taken; completions carry the version that sampled them."""
        self._reference_model: list[nn.Module] = []  # in a list, so that it is no submodule
        self._reference_weights: dict[str, Tensor] = {}
        self._replica: sharding.GatheredReplica | None = None
        self._in_replica = self._always_runs_vision = False
        self._barrier: Callable[[], None] = lambda: None
        self.to(device)
        one_thread_if_small(sum(p.numel() for p in self.model.parameters()), compute_device or torch.device(device))
        bias_V = torch.zeros(self.hf.get_output_embeddings().weight.shape[0])
        excluded = [index for index in processing.forbidden_ids if index < len(bias_V)]
        bias_V[excluded] = EXCLUDED
        self.register_buffer("bias_V", bias_V.to(device), persistent=False)
        self.dtype = torch.float32 if settings.dtype == "float32" else torch.bfloat16
        """The precision that it computes in."""
        for operators in (vision_tower, fused):
            operators.install(self.hf, self.dtype, compute_device or torch.device(device))
        self._accepts_features = accepts_features(self.hf)
        tower = model_modules(self.hf).get("vision")
        trained = tower is None or any(p.requires_grad for p in tower.parameters())
        self.image_features = ImageFeatures(frozen=self._accepts_features and not trained)
        self.repeats_because = self._share_prompts(shared_prompt)
        """Why prompts are repeated in the update, in one line; empty if they are shared."""

    @property
    def hf(self) -> Any:
        """The transformers model, LoRA layers (if any) in place."""
        return self.model.get_base_model() if self.is_adapted else self.model

    @property
    def is_adapted(self) -> bool:
        """Whether LoRA adapters are trained, and not the model's own weights."""
        return hasattr(self.model, "peft_config")

    @property
    def backbone(self) -> Any:
        """The model below the vocabulary head."""
        return self.hf.base_model

    @property
    def device(self) -> torch.device:
        return self.bias_V.device

    @property
    def is_multimodal(self) -> bool:
        return hasattr(self.hf.config, "vision_config")

    def autocast(self, *, keep_copies: bool = True) -> contextlib.AbstractContextManager[Any]:
        """`keep_copies`: weights are cast once within the context, not in each use."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        # Copies of all weights in 16 bits would undo what sharding saves.
        cache = keep_copies and (not self.is_sharded or self._in_replica)
        return torch.autocast(self.device.type, dtype=torch.bfloat16, cache_enabled=cache)

    # ------------------------------------------------------------------ log-probabilities

    def forward(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """Log-probability and entropy (nats, float32) of each completion token: two [B,T].

        Zeros stand on padding. The entropy carries a gradient only if the policy was made with `entropy_grad`.
        """
        hidden_states = self._repeated if self.repeats_because else self._shared
        no_images = all(prompt.pixel_values is None for prompt in batch.prompts)
        dummy = self._always_runs_vision and no_images
        images = dummy_image_forward(self.hf, self.device) if dummy else contextlib.nullcontext()
        with self.autocast(), images:
            hidden_NH, row_N, column_N = hidden_states(batch)
            logp_N, entropy_N = head_logprobs(
                self.hf.get_output_embeddings(),
                hidden_NH,
                batch.token_BT[row_N, column_N],
                bias_V=self.bias_V,
                temperature=self.temperature,
                entropy_grad=self.entropy_grad,
            )
        shape = batch.token_BT.shape
        logp_BT = logp_N.new_zeros(shape).index_put((row_N, column_N), logp_N)
        entropy_BT = entropy_N.new_zeros(shape).index_put((row_N, column_N), entropy_N)
        return logp_BT, entropy_BT

    def _shared(self, batch: MicroBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states that predict each completion token, its row and column; prompts once."""
        packed = sharing.pack(self.backbone, batch)
        images = self.vision_inputs(packed.prompts)
        hidden_NH = sharing.hidden_states(self.backbone, packed, images)
        return hidden_NH, packed.row_N, packed.column_N

    def _repeated(self, batch: MicroBatch) -> tuple[Tensor, Tensor, Tensor]:
        """As `_shared`, with the prompt repeated in each row."""
        prompts = [batch.prompts[index] for index in batch.prompt_index_B.tolist()]
        lengths = batch.length_B.tolist()
        completions = [row[:n] for row, n in zip(batch.token_BT.cpu(), lengths, strict=True)]
        hidden_BSH = self.padded(prompts, completions)[0].last_hidden_state
        row_N, column_N = batch.mask_BT.nonzero(as_tuple=True)
        start_B = torch.tensor([len(prompt) - 1 for prompt in prompts], device=self.device)
        return hidden_BSH[row_N, start_B[row_N] + column_N], row_N, column_N

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits in float32, forbidden ids excluded, before the temperature."""
        return head_logits(self.hf.get_output_embeddings(), hidden, bias_V=self.bias_V)

    def vision_inputs(self, prompts: Sequence[Prompt]) -> dict[str, Any]:
        """The backbone's keyword arguments for the images of `prompts`, in their order.

        Features where the backbone accepts them; pixels are then read only of images whose features are not cached.
        """
        if not self._accepts_features or all(prompt.pixel_values is None for prompt in prompts):
            return pixel_inputs(prompts, self.device)
        encode = functools.partial(encode_images, self.backbone, device=self.device)
        return feature_inputs(self.image_features.of(prompts, encode))

    def padded(
        self, prompts: Sequence[Prompt], completions: Sequence[Tensor] | None = None
    ) -> tuple[Any, Tensor, Tensor]:
        """Run the backbone on padded rows: prompts to sample from, or prompts with completions.

        Returns its output, the attention mask [B,S] and the next free position of each row, [B].
        Prompts alone are padded on the left, and the output then has a cache.
        """
        side = "left" if completions is None else "right"
        inputs = pad_sequences(prompts, completions, pad_id=self.pad_id, side=side, device=self.device)
        attention_BS = inputs.attention_mask
        positions = (attention_BS.cumsum(-1) - 1).clamp(min=0)
        next_B = attention_BS.sum(-1)
        if self.is_multimodal and inputs.image_grid_thw is not None:
            # Always explicit: left to itself, the model silently falls back to one-dimensional
            # positions for image prompts when any of these is missing.
            positions, delta_B1 = self.backbone.get_rope_index(
                inputs.input_ids,
                mm_token_type_ids=inputs.mm_token_type_ids,
                image_grid_thw=inputs.image_grid_thw,
                attention_mask=attention_BS,
            )
            next_B = next_B + delta_B1.reshape(-1)
        output = self.backbone(
            input_ids=inputs.input_ids,
            attention_mask=attention_BS,
            position_ids=positions,
            use_cache=completions is None,
            **self.vision_inputs(prompts),
        )
        return output, attention_BS, next_B

    # ------------------------------------------------------------------ shared prompts

    def _share_prompts(self, wanted: str) -> str:
        if wanted == "off" or self._is_empty:
            return "update.shared_prompt is off"
        reason = sharing.unsupported_reason(self.hf, functools.partial(self.autocast, keep_copies=False))
        if reason is None:
            sharing.install(self.hf)
        elif wanted == "on":
            raise ModelError(f"update.shared_prompt is on, but {reason}")
        return reason or ""

    @torch.no_grad()
    def check_sharing(self, batch: MicroBatch) -> None:
        """Compare shared and repeated prompts on a few real completions.

        Raises ModelError if their log-probabilities disagree.
        """
        if self.repeats_because:
            return
        few = {name: getattr(batch, name)[:4] for name in ("prompt_index_B", "token_BT", "mask_BT", "length_B")}
        batch = replace(batch, **few)
        training = self.training
        self.eval()
        try:
            shared_BT = self(batch)[0]
            self.repeats_because = "check_sharing compares"
            repeated_BT = self(batch)[0]
        finally:
            self.repeats_because = ""
            self.train(training)
        sharing.require_agreement(shared_BT, repeated_BT, batch.mask_BT, self.dtype)

    # ------------------------------------------------------------------ several processes

    @property
    def update_runs_vision(self) -> bool:
        """Whether the vision tower runs in the update: it does unless its features are cached."""
        return self.is_multimodal and not self.image_features.frozen

    @property
    def is_sharded(self) -> bool:
        return self._replica is not None

    def distribute(self, barrier: Callable[[], None], shard: Callable[..., None] | None) -> None:
        """Become one of several processes' policies, before the optimiser is made.

        `barrier` is called before weights are gathered. `shard(policy, layers, whole)`, if given, spreads the
        parameters over the processes. It gets the class names of the text model's and the vision tower's layers, and
        the modules that every process keeps whole: a frozen vision tower, which runs once per prompt and so not
        equally often on all processes. On a sharded policy only `forward` may be called, by all processes alike;
        everything else belongs inside `gathered`.
        """
        self._barrier, self._always_runs_vision = barrier, self.update_runs_vision
        if shard is not None:
            barrier()
            self.repeats_because = sharding.agree_with_main(self.hf, self.repeats_because)
            if self._is_empty and not self.repeats_because:
                sharing.install(self.hf)
            self._replica = sharding.GatheredReplica(self.model)
            frozen = [model_modules(self.hf)["vision"]] if self.image_features.frozen else []
            shard(self, getattr(self.hf, "_no_split_modules", None) or (), frozen)

    def _reshard(self) -> None:
        """Free the weights that forward passes have left gathered on a sharded policy."""
        if not self._in_replica:
            sharding.reshard(self)

    @contextlib.contextmanager
    def gathered(self, *, saving: bool = False, keep: bool = True) -> Iterator[None]:
        """Inside, a sharded policy has whole weights and works without the other processes.

        Entering is a collective call; a process without `keep` discards the result. `saving` puts the weights into
        main memory, with LoRA the adapter alone. A policy that is not sharded stays as it is.
        """
        if self._replica is None or self._in_replica:
            yield
            return
        self._barrier()
        self._reshard()
        device, learning_only = "cpu" if saving else None, saving and self.is_adapted
        self._replica.fill(self.model, device=device, learning_only=learning_only, keep=keep)
        trained, self.model, self._in_replica = self.model, self._replica.model, True
        try:
            yield
        finally:
            self.model, self._in_replica = trained, False
            self._replica.empty()

    # ------------------------------------------------------------------ weights

    def keep_reference(self) -> None:
        """Make the present weights the reference policy. LoRA needs no second model for that."""
        if (self.is_sharded and not self.is_adapted) or model_and_adapter(self.settings.path)[1]:
            self._reference_weights = self._trained_weights()
        elif not self.is_adapted:
            self._reference_model = [copy.deepcopy(self.model).requires_grad_(False).eval()]

    @torch.no_grad()
    def reference_logprobs(self, batch: MicroBatch) -> Tensor:
        """Log-probabilities [B,T] (nats) under the reference policy."""
        if self._reference_weights:
            present = self._trained_weights()
            try:
                self._set_weights(self._reference_weights)
                return self(batch)[0]
            finally:
                self._set_weights(present)
        if self.is_adapted:
            with self.model.disable_adapter():
                return self(batch)[0]
        if not self._reference_model:
            raise RuntimeError("keep_reference() was not called")
        trained, self.model = self.model, self._reference_model[0]
        try:
            return self(batch)[0]
        finally:
            self.model = trained

    def _trained_weights(self) -> dict[str, Tensor]:
        """Copies of the parameters that are trained, as shards if they are sharded."""
        self._reshard()
        named = self.model.named_parameters()
        return {name: p.detach().clone() for name, p in named if p.requires_grad}

    def _set_weights(self, values: dict[str, Tensor]) -> None:
        """Set parameters by name, from shards or from whole tensors."""
        self._reshard()
        for name, parameter in self.model.named_parameters():
            if name in values:
                sharding.set_parameter(parameter, values[name])

    def full_weights(self) -> Iterator[tuple[str, Tensor]]:
        """All weights as a checkpoint stores them. See `weights.full_weights`."""
        return weights.full_weights(self)

    def load_weights(self, folder: Path) -> None:
        """Load a checkpoint of the same architecture, bit for bit."""
        if self.is_adapted:
            with self.gathered(saving=True):
                load_lora_weights(self.model, str(folder))
                loaded = self._trained_weights() if self.is_sharded else {}
            self._set_weights(loaded)
            return
        # transformers may store parameters under other names than it uses, so it reads them too.
        # With this model's config: a damaged checkpoint's may ask for a model of any size.
        config, dtype = copy.deepcopy(self.model.config), next(self.model.parameters()).dtype
        config._attn_implementation = "sdpa"  # transformers would look for the vision tower's on the hub
        where = "meta" if self._is_empty else None
        saved, found = type(self.model).from_pretrained(
            folder, config=config, dtype=dtype, device_map=where, use_safetensors=True, output_loading_info=True
        )
        if missing := sorted(found["missing_keys"]):
            raise ModelError(f"{folder} lacks {len(missing)} weights (such as {missing[0]})")
        if self.is_sharded:
            values = dict(saved.named_parameters(remove_duplicate=False))
            self._barrier()
            for name, parameter in self.model.named_parameters():
                sharding.set_parameter(parameter, sharding.from_main(values[name], parameter.device))
        else:
            self.model.load_state_dict(saved.state_dict())

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        return (parameter for parameter in self.model.parameters() if parameter.requires_grad)
