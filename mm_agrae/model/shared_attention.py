"""Attention in a packed row, where a prompt stands once before all its completions.

A prompt token attends to its prompt, causally; a completion token to the whole prompt and,
causally, to its own completion. Where there is a flash kernel, that is two calls of it and no copy
of the prompt's keys: each prompt and each completion over itself, then completions over their
prompt. The two parts of a completion's attention are merged by their log-normalisers:

    lse = log(exp lse_1 + exp lse_2),   out = out_1 · exp(lse_1 − lse) + out_2 · exp(lse_2 − lse)

Given the merged `out` and `lse`, the kernel's backward of each part is the exact gradient of that part (as in Ring
Attention, arXiv 2310.01889). The kernels are PyTorch's own: the one for CPUs, and on GPUs in 16 bits FlashAttention
for spans of different lengths, once a trial there has given what masked attention gives. Elsewhere, and in layers
whose sliding window cuts a sequence, completions attend to [prompt keys; own keys] under a mask instead.

Shapes: S tokens of the row, C of them in completions, n spans padded to R tokens, H heads of size D (K key heads).
"""

import functools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mm_agrae.errors import ModelError
from mm_agrae.model import trial
from mm_agrae.model.packed_layout import GroupSpans, PackedLayout
from mm_agrae.model.vocab_head import compute_dtype

_aten: Any = torch.ops.aten
_cpu_flash: Any = getattr(_aten, "_scaled_dot_product_flash_attention_for_cpu", None)
_cpu_flash_backward: Any = getattr(_aten, "_scaled_dot_product_flash_attention_for_cpu_backward", None)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: PackedLayout,
    *,
    scale: float,
    window: int | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """[1,H,S,D] -> [1,S,H,D], by the fastest kernel available for these tensors.

    `window` is a sliding window in tokens. Raises ModelError if the row is not the layout's.
    """
    if query.shape[0] != 1 or query.shape[2] != layout.length:
        raise ModelError(
            f"query {tuple(query.shape)} for one row of {layout.length} tokens cannot share "
            "prompts; set update.shared_prompt=off"
        )
    if torch.is_autocast_enabled(query.device.type):
        query, key, value = (x.to(compute_dtype(x)) for x in (query, key, value))
    if window is not None and window >= layout.longest:
        window = None
    kernel = None
    if window is None and dropout == 0 and query.shape[-1] == value.shape[-1]:
        kernel = _kernel(query, key)
    if kernel is None:
        return masked_attention(query, key, value, layout, scale, window, dropout)
    return _MergedAttention.apply(query, key, value, kernel(layout, scale))


def _kernel(query: Tensor, key: Tensor) -> Any:
    """The flash kernel for tensors like these, if there is one."""
    if query.device.type == "cpu":
        return CpuKernel if _cpu_flash is not None else None
    if query.device.type != "cuda" or query.dtype.itemsize != 2:
        return None
    _, heads, _, size = query.shape
    found = _varlen_fault(query.device, query.dtype, heads, key.shape[1], size)
    return None if found else VarlenKernel


@functools.lru_cache(maxsize=32)
def _varlen_fault(device: torch.device, dtype: torch.dtype, heads: int, key_heads: int, size: int) -> str:
    """Why `VarlenKernel` cannot be used, found by running it once; empty if it can."""
    groups = [GroupSpans((0, 5), ((5, 12), (12, 15))), GroupSpans((15, 18), ((18, 21),))]
    layout, scale = PackedLayout(groups, device), size**-0.5
    shapes = [(1, each, layout.length, size) for each in (heads, key_heads, key_heads)]
    problem = trial.fault(
        lambda q, k, v: _MergedAttention.apply(q, k, v, VarlenKernel(layout, scale)),
        lambda q, k, v: masked_attention(q, k, v, layout, scale),
        shapes,
        device,
        dtype,
    )
    if problem:
        warnings.warn(
            f"FlashAttention for spans of different lengths is not used on {device} "
            f"({problem}); masked attention takes its place, which is slower",
            stacklevel=2,
        )
    return problem


class _MergedAttention(torch.autograd.Function):
    """Every span over itself, then completions over prompts, merged; see the module docstring."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, kernel: Any
    ) -> Tensor:
        layout = kernel.layout
        q_SHD, k_SKD, v_SKD = (x[0].transpose(0, 1) for x in (q, k, v))
        out_SHD, lse_SH = kernel.own(q_SHD, k_SKD, v_SKD)
        if layout.shared:
            tokens = layout.completion_tokens
            far, far_lse = kernel.prompts(q_SHD, k_SKD, v_SKD)
            near, near_lse = out_SHD[tokens], lse_SH[tokens]
            lse = torch.logaddexp(near_lse, far_lse)
            merged = near * (near_lse - lse).exp().unsqueeze(-1)
            merged += far * (far_lse - lse).exp().unsqueeze(-1)
            out_SHD[tokens] = merged.to(out_SHD.dtype)
            lse_SH[tokens] = lse
        out = out_SHD.unsqueeze(0)
        ctx.save_for_backward(q, k, v, out, lse_SH)
        ctx.kernel = kernel
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_1SHD: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out_1SHD, lse_SH = ctx.saved_tensors
        rows = [x[0].transpose(0, 1) for x in (q, k, v)]
        saved = (grad_1SHD[0].contiguous(), *rows, out_1SHD[0], lse_SH)
        grads = ctx.kernel.own_backward(*saved)
        if ctx.kernel.layout.shared:
            ctx.kernel.add_prompts_backward(grads, *saved)
        return *(x.transpose(0, 1)[None] for x in grads), None


@dataclass(frozen=True, eq=False)
class _Kernel:
    """Attention over the spans of a row.

    For the backward pass `saved` are the output's gradient, q, k, v, the output and its
    log-normaliser; `grads` are those of q, k and v.
    """

    layout: PackedLayout
    scale: float


class CpuKernel(_Kernel):
    """The flash kernel for CPUs, which takes spans of equal length: padded, or one by one."""

    def own(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Each span over itself, causally: output [S,H,D] and log-normaliser [S,H]."""
        out_SHD = q.new_empty(q.shape)
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        lse_SH = q.new_empty(q.shape[:2], dtype=wide)
        for batch in self.layout.batches:
            parts = (batch.gather(x) for x in (q, k, v))
            out, lse = _cpu_flash(*parts, 0.0, True, scale=self.scale)
            out_SHD[batch.tokens] = batch.flatten(out)
            lse_SH[batch.tokens] = batch.flatten(lse)
        return out_SHD, lse_SH

    def prompts(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Completions over their prompts: output [C,H,D] and log-normaliser [C,H]."""
        found = []
        for tokens, keys in self._completions_and_prompts():
            parts = (_heads_first(x) for x in (q[tokens], k[keys], v[keys]))
            out, lse = _cpu_flash(*parts, 0.0, False, scale=self.scale)
            found.append((out[0].transpose(0, 1), lse[0].T))
        if len(found) == 1:
            return found[0]
        return torch.cat([out for out, _ in found]), torch.cat([lse for _, lse in found])

    def own_backward(self, *saved: Tensor) -> tuple[Tensor, ...]:
        grads = tuple(x.new_empty(x.shape) for x in saved[1:4])
        for batch in self.layout.batches:
            grad_nHRD, *others = (batch.gather(x) for x in saved)
            if batch.padding is not None:
                # A padding query repeats a real one; it must not pass a gradient back as well.
                grad_nHRD.transpose(1, 2).flatten(0, 1).index_fill_(0, batch.padding, 0)
            parts = _cpu_flash_backward(grad_nHRD, *others, 0.0, True, scale=self.scale)
            for total, part in zip(grads, parts, strict=True):
                total[batch.tokens] = batch.flatten(part)
        return grads

    def add_prompts_backward(self, grads: Sequence[Tensor], *saved: Tensor) -> None:
        grad, q, k, v, out, lse = saved
        for tokens, keys in self._completions_and_prompts():
            rows = (grad[tokens], q[tokens], k[keys], v[keys], out[tokens])
            parts = _cpu_flash_backward(*map(_heads_first, rows), lse[tokens].T[None], 0.0, False, scale=self.scale)
            for total, part, where in zip(grads, parts, (tokens, keys, keys), strict=True):
                total[where] += part[0].transpose(0, 1)

    def _completions_and_prompts(self) -> list[tuple[slice, slice]]:
        return [(slice(g.prompt[1], g.end), slice(*g.prompt)) for g in self.layout.shared]


def _heads_first(x_SHD: Tensor) -> Tensor:
    """[S,H,D] -> [1,H,S,D]"""
    return x_SHD.transpose(0, 1)[None]


class VarlenKernel(_Kernel):
    """FlashAttention over spans of different lengths: one call each, without padding."""

    def own(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        bounds, longest = self.layout.bounds
        out, lse_HS, *_ = _aten._flash_attention_forward(
            q, k, v, bounds, bounds, longest, longest, 0.0, True, False, scale=self.scale
        )
        return out, lse_HS.T.contiguous()

    def prompts(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        tokens, keys = self.layout.completion_tokens, self.layout.prompt_tokens
        out, lse_HC, *_ = _aten._flash_attention_forward(
            q[tokens], k[keys], v[keys], *self.layout.prompt_bounds, 0.0, False, False,
            scale=self.scale,
        )  # fmt: skip
        return out, lse_HC.T

    def own_backward(self, *saved: Tensor) -> tuple[Tensor, ...]:
        *rows, lse = saved
        bounds, longest = self.layout.bounds
        return _aten._flash_attention_backward(
            *rows, lse.T.contiguous(), bounds, bounds, longest, longest, 0.0, True,
            *self.layout.no_dropout, scale=self.scale,
        )  # fmt: skip

    def add_prompts_backward(self, grads: Sequence[Tensor], *saved: Tensor) -> None:
        grad, q, k, v, out, lse = saved
        tokens, keys = self.layout.completion_tokens, self.layout.prompt_tokens
        parts = _aten._flash_attention_backward(
            grad[tokens], q[tokens], k[keys], v[keys], out[tokens], lse[tokens].T.contiguous(),
            *self.layout.prompt_bounds, 0.0, False, *self.layout.no_dropout, scale=self.scale,
        )  # fmt: skip
        for total, part, where in zip(grads, parts, (tokens, keys, keys), strict=True):
            total[where] += part


def masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: PackedLayout,
    scale: float,
    window: int | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """The same by `scaled_dot_product_attention` over [prompt keys; own keys], on any device."""
    repeats = q.shape[1] // k.shape[1]
    q_SHD, k_SKD, v_SKD = (x[0].transpose(0, 1) for x in (q, k, v))
    parts = []
    for group, batch in zip(layout.groups, layout.by_group, strict=True):
        start, end = group.prompt
        k_P, v_P = k[:, :, start:end], v[:, :, start:end]
        if window is None:
            out = F.scaled_dot_product_attention(
                q[:, :, start:end], k_P, v_P, dropout_p=dropout, is_causal=True, scale=scale,
                enable_gqa=repeats > 1,
            )  # fmt: skip
        else:
            mask = layout.mask(0, end - start, window, repeats, q)
            out = _sdpa(q[:, :, start:end], k_P, v_P, mask, dropout, scale)
        parts.append(out[0].transpose(0, 1))
        if batch is None:
            continue
        n, longest = batch.index_nR.shape
        k_all = torch.cat([k_P.expand(n, -1, -1, -1), batch.gather(k_SKD)], dim=2)
        v_all = torch.cat([v_P.expand(n, -1, -1, -1), batch.gather(v_SKD)], dim=2)
        mask = layout.mask(end - start, longest, window, repeats, q)
        out = _sdpa(batch.gather(q_SHD), k_all, v_all, mask, dropout, scale)
        parts.append(batch.flatten(out))
    return torch.cat(parts)[None]


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, dropout: float, scale: float) -> Tensor:
    """Masked attention of H heads with K key heads, the keys not copied.

    The heads that share a key head are stacked along the queries instead (the mask's rows are
    repeated to match): kernels that take a mask do not all take grouped heads.
    """
    repeats = q.shape[1] // k.shape[1]
    stacked = q.unflatten(1, (k.shape[1], repeats)).flatten(2, 3)
    out = F.scaled_dot_product_attention(stacked, k, v, attn_mask=mask, dropout_p=dropout, scale=scale)
    return out.unflatten(2, (repeats, q.shape[2])).flatten(1, 2)
