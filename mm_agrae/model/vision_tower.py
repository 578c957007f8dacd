"""A faster vision tower for Qwen's models: the same weights under the same names, fewer and larger operators.

- The patch embedding is a convolution whose kernel equals its stride: a matrix product, which some versions of cuDNN
  run 10 to 20 times slower as a convolution (pytorch#174051).
- Attention within windows is one call per window under sdpa, more than a thousand for one picture. transformers hands
  an attention function whose name holds "flash" the bounds of all windows instead: one call per block, on CUDA in 16
  bits and where a trial gives what sdpa gives.
"""

import functools
import itertools
import types
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm_agrae.model import trial
from mm_agrae.model.loading import model_modules

ATTENTION = "mm_agrae_flash_vision"
"""Name of the attention function in transformers' registry."""


def install(hf: Any, dtype: torch.dtype) -> None:
    """Apply to a transformers model with a vision tower. `dtype` is the precision that it computes in."""
    tower: Any = model_modules(hf).get("vision")
    if tower is None:
        return
    embed: Any = getattr(tower, "patch_embed", None)
    projection = getattr(embed, "proj", None)
    if isinstance(projection, nn.Conv3d) and projection.kernel_size == projection.stride:
        embed.forward = types.MethodType(_patches, embed)
    heads = getattr(tower.config, "num_heads", None)
    device = next(tower.parameters()).device
    if device.type != "cuda" or dtype.itemsize != 2 or heads is None:
        return
    size = (getattr(tower.config, "embed_dim", None) or tower.config.hidden_size) // heads
    bounds = torch.tensor([0, 5, 8, 20], dtype=torch.int32)
    one_call = functools.partial(_varlen, bounds=bounds.to(device), longest=12, scale=size**-0.5)
    call_each = functools.partial(_one_by_one, bounds=bounds.tolist(), scale=size**-0.5)
    if problem := trial.fault(one_call, call_each, [(20, heads, size)] * 3, device, dtype):
        warnings.warn(f"the vision tower calls attention once per window ({problem}), which is slower", stacklevel=2)
        return
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, attention)
    hf.set_attn_implementation({"vision_config": ATTENTION})


def _patches(self: Any, pixels: Tensor) -> Tensor:
    """[patches, values of one] -> [patches, hidden size]"""
    weight = self.proj.weight.flatten(1)
    return F.linear(pixels.view(-1, weight.shape[1]).to(weight.dtype), weight, self.proj.bias)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int = 0,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention function for transformers' registry: [1,H,S,D] -> [1,S,H,D]. Each span sees all of itself."""
    assert cu_seq_lens_q is not None
    assert scaling is not None
    rows = (x[0].transpose(0, 1) for x in (query, key, value))
    return _varlen(*rows, bounds=cu_seq_lens_q, longest=max_length_q, scale=scaling)[None], None


def _varlen(q: Tensor, k: Tensor, v: Tensor, *, bounds: Tensor, longest: int, scale: float) -> Tensor:
    return torch.ops.aten._flash_attention_forward(
        q, k, v, bounds, bounds, longest, longest, 0.0, False, False, scale=scale
    )[0]


def _one_by_one(q: Tensor, k: Tensor, v: Tensor, *, bounds: list[int], scale: float) -> Tensor:
    lengths = [end - start for start, end in itertools.pairwise(bounds)]
    spans = zip(*(x.transpose(0, 1)[None].split(lengths, 2) for x in (q, k, v)), strict=True)
    outs = [F.scaled_dot_product_attention(q, k, v, scale=scale) for q, k, v in spans]
    return torch.cat(outs, 2)[0].transpose(0, 1)
