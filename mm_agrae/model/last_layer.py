"""The last layer of a packed row: its MLP runs only on tokens that predict one.

Once the last layer's attention has read the keys and values of a prompt, nothing looks at the
prompt's hidden states any more, but for its last token's. `install` gives the MLP of a model's
last layer a forward of its own that leaves the others out. Parameters, LoRA layers and hooks
stay where they are. The attention of the same layer says which tokens count (`announce`), so
that recomputing the layer (gradient checkpointing) does the same again, and a plain forward
does what it always did.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import nn

LEAST_SAVED = 0.05
"""Share of the row that must be left out to be worth picking the others."""


class _Tokens:
    """A message of the attention to the MLP after it, read once."""

    index: torch.Tensor | None = None

    def take(self) -> torch.Tensor | None:
        index, self.index = self.index, None
        return index


def install(hf: Any) -> None:
    """Use it in a transformers model (below PEFT), if its last layer is made of the usual two."""
    uninstall(hf)
    attention, mlp = _parts(hf)
    if attention is not None and mlp is not None:
        attention._counting = mlp._counting = _Tokens()
        mlp.forward = types.MethodType(_forward, mlp)


def uninstall(hf: Any) -> None:
    for part in _parts(hf):
        if part is not None and part.__dict__.pop("_counting", None) is not None:
            part.__dict__.pop("forward", None)


def announce(attention: nn.Module, index: torch.Tensor, length: int) -> None:
    """Only the tokens at `index` of the row of `length` count after this attention."""
    tokens: _Tokens | None = attention.__dict__.get("_counting")
    if tokens is not None and len(index) <= (1 - LEAST_SAVED) * length:
        tokens.index = index


def _parts(hf: Any) -> tuple[Any, Any]:
    """Attention and MLP of the last layer, None for what is not there."""
    layers = getattr(getattr(hf.base_model, "language_model", hf.base_model), "layers", None)
    last = layers[-1] if layers else None
    return getattr(last, "self_attn", None), getattr(last, "mlp", None)


def _forward(self: Any, x_1SH: torch.Tensor) -> Any:
    index = self._counting.take()
    own = type(self).forward
    if index is None:
        return own(self, x_1SH)
    out = own(self, x_1SH.index_select(1, index))
    return out.new_zeros(1, x_1SH.shape[1], out.shape[-1]).index_copy(1, index, out)
