"""The last layer of a packed row: its MLP runs only on tokens that predict another.

Once the last layer's attention has read a prompt's keys and values, only the hidden state of the prompt's last token
is still used. `install` replaces the forward of the last layer's MLP by one that skips the others; parameters, LoRA
layers and hooks stay where they are. The attention of the same layer announces in every call which tokens count, so a
layer that is recomputed (gradient checkpointing) skips the same tokens again, and a plain forward skips none.
"""

import functools
import types
from typing import Any

from torch import Tensor, nn

LEAST_SAVED = 0.05
"""Skip tokens only if they are at least this share of the row: selecting the rest costs a copy."""


class _TokensThatCount:
    """A message from the attention to the MLP after it, read once."""

    index: Tensor | None = None
    replaced: Any = None
    """The forward method that the MLP object had in the place of its class's."""


def install(hf: Any) -> None:
    """Apply to a transformers model (below PEFT) whose last layer has `self_attn` and `mlp`."""
    uninstall(hf)
    attention, mlp = _attention_and_mlp(hf)
    if attention is not None and mlp is not None:
        attention._counting = mlp._counting = _TokensThatCount()
        mlp._counting.replaced = mlp.__dict__.get("forward")
        mlp.forward = types.MethodType(_forward, mlp)


def uninstall(hf: Any) -> None:
    attention, mlp = _attention_and_mlp(hf)
    if counting := getattr(mlp, "_counting", None):
        del attention._counting, mlp._counting, mlp.forward
        if counting.replaced:
            mlp.forward = counting.replaced


def announce(attention: nn.Module, index: Tensor, length: int) -> None:
    """Only the tokens at `index` of the row of `length` count after this attention."""
    tokens: _TokensThatCount | None = attention.__dict__.get("_counting")
    if tokens is not None and len(index) <= (1 - LEAST_SAVED) * length:
        tokens.index = index


def _attention_and_mlp(hf: Any) -> tuple[Any, Any]:
    """Attention and MLP of the last layer, None for one that is not there."""
    layers = getattr(getattr(hf.base_model, "language_model", hf.base_model), "layers", None)
    last = layers[-1] if layers else None
    return getattr(last, "self_attn", None), getattr(last, "mlp", None)


def _forward(self: Any, x_1SH: Tensor) -> Any:
    index, self._counting.index = self._counting.index, None
    original = self._counting.replaced or functools.partial(type(self).forward, self)
    if index is None:
        return original(x_1SH)
    out = original(x_1SH.index_select(1, index))
    return out.new_zeros(1, x_1SH.shape[1], out.shape[-1]).index_copy(1, index, out)
