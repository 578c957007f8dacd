"""Attention of prompts that stand once before all their completions in a row.

A prompt token attends to its prompt, causally; a completion token to the whole prompt and,
causally, to its own completion. Where a flash kernel is there this takes two calls of it without
a copy of the prompt's keys: each prompt and each completion over itself, then completions over
their prompt. The two parts of a completion are merged by their log-normalisers:

    lse = log(exp lse_1 + exp lse_2),   out = out_1 · exp(lse_1 − lse) + out_2 · exp(lse_2 − lse)

Given the merged `out` and `lse`, the kernel's backward of each part is the exact gradient of that
part (as in Ring Attention, arXiv 2310.01889). Kernels are PyTorch's own: the one for CPUs, and
FlashAttention for ranges of different lengths on GPUs in 16 bits, once it has reproduced the
masked form there. Elsewhere, and in layers whose sliding window cuts a sequence, completions
attend to [prompt keys; own keys] under a mask instead.

Shapes: S tokens of the row, C of them in completions, n ranges padded to R tokens, H heads of
size D (K key heads).
"""

from __future__ import annotations

import functools
import itertools
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from mm_agrae.errors import ModelError

LEAST_FILL = 0.75
"""Ranges are padded into one batch if none is shorter than this share of the longest."""

_aten: Any = torch.ops.aten
_cpu_flash: Any = getattr(_aten, "_scaled_dot_product_flash_attention_for_cpu", None)
_cpu_flash_backward: Any = getattr(
    _aten, "_scaled_dot_product_flash_attention_for_cpu_backward", None
)

Index = torch.Tensor | slice


# --------------------------------------------------------------------------------------- layout


@dataclass(frozen=True)
class Group:
    """Half-open ranges of the row: one prompt, and its completions right after it."""

    prompt: tuple[int, int]
    completions: tuple[tuple[int, int], ...]

    @property
    def end(self) -> int:
        return self.completions[-1][1] if self.completions else self.prompt[1]


@dataclass(frozen=True, eq=False)
class Bucket:
    """Ranges of similar length as one batch of row indices, padded with their last token.

    `tokens` are the real ones, a slice where they lie one after another without padding. `real`
    and `padding` are flat positions in [n,R]; both are None if there is no padding.
    """

    index_nR: torch.Tensor
    tokens: Index
    real: torch.Tensor | None = None
    padding: torch.Tensor | None = None

    def gather(self, x_SHD: torch.Tensor) -> torch.Tensor:
        """[S,H,…] -> [n,H,R,…]"""
        if isinstance(self.tokens, slice):
            picked = x_SHD[self.tokens]
        else:
            picked = x_SHD.index_select(0, self.index_nR.flatten())
        return picked.unflatten(0, self.index_nR.shape).transpose(1, 2)

    def flatten(self, x_nHRD: torch.Tensor) -> torch.Tensor:
        """[n,H,R,…] -> [tokens,H,…]"""
        flat = x_nHRD.transpose(1, 2).flatten(0, 1)
        return flat if self.real is None else flat.index_select(0, self.real)


class Layout:
    """Which tokens of a row belong together."""

    def __init__(self, groups: Sequence[Group], device: torch.device | str = "cpu"):
        self.groups = tuple(groups)
        self.length = max((group.end for group in groups), default=0)
        self.device = device
        self._masks: dict[tuple[Any, ...], torch.Tensor] = {}
        self.longest = max(
            (
                g.prompt[1] - g.prompt[0] + end - start
                for g in groups
                for start, end in g.completions
            ),
            default=self.length,
        )

    @functools.cached_property
    def ranges(self) -> tuple[tuple[int, int], ...]:
        """Every prompt and every completion, in the order of the row."""
        return tuple(each for group in self.groups for each in (group.prompt, *group.completions))

    @functools.cached_property
    def shared(self) -> tuple[Group, ...]:
        """The groups that have completions."""
        return tuple(group for group in self.groups if group.completions)

    @functools.cached_property
    def buckets(self) -> tuple[Bucket, ...]:
        return tuple(_bucket(part, self.device) for part in _by_length(self.ranges))

    @functools.cached_property
    def by_group(self) -> tuple[Bucket | None, ...]:
        """All completions of each group as one bucket."""
        return tuple(
            _bucket(group.completions, self.device) if group.completions else None
            for group in self.groups
        )

    @functools.cached_property
    def prompt_tokens(self) -> Index:
        """Tokens of the prompts that have completions, [tokens]."""
        return self._tokens([group.prompt for group in self.shared])

    @functools.cached_property
    def completion_tokens(self) -> Index:
        return self._tokens([(group.prompt[1], group.end) for group in self.shared])

    @functools.cached_property
    def predicting(self) -> torch.Tensor:
        """Tokens whose hidden state predicts one: each prompt's last, and all of completions."""
        ends = [(group.prompt[1] - 1, group.end) for group in self.groups]
        return torch.cat([torch.arange(*each, device=self.device) for each in ends])

    @functools.cached_property
    def bounds(self) -> tuple[torch.Tensor, int]:
        """Cumulative lengths of `ranges`, int32 [ranges + 1], and the longest."""
        return self._bounds(self.ranges)

    @functools.cached_property
    def prompt_bounds(self) -> tuple[torch.Tensor, torch.Tensor, int, int]:
        """The same of `shared` groups' completions, and of their prompts."""
        queries, most_queries = self._bounds([(g.prompt[1], g.end) for g in self.shared])
        keys, most_keys = self._bounds([g.prompt for g in self.shared])
        return queries, keys, most_queries, most_keys

    def _bounds(self, ranges: Sequence[tuple[int, int]]) -> tuple[torch.Tensor, int]:
        lengths = [end - start for start, end in ranges]
        total = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
        return total.to(self.device), max(lengths)

    def _tokens(self, ranges: Sequence[tuple[int, int]]) -> Index:
        if len(ranges) == 1:
            return slice(*ranges[0])
        return torch.cat([torch.arange(*each, device=self.device) for each in ranges])

    def mask(
        self, past: int, own: int, window: int | None, repeats: int, like: torch.Tensor
    ) -> torch.Tensor:
        """Additive mask [repeats · own, past + own]: causal, at most `window` tokens back.

        One tensor serves all layers, which keeps it out of each layer's saved activations.
        """
        key = (past, own, window, repeats, like.dtype)
        if key not in self._masks:
            query_R1 = torch.arange(past, past + own, device=like.device)[:, None]
            key_1S = torch.arange(past + own, device=like.device)[None]
            hidden = key_1S > query_R1
            if window is not None:
                hidden |= key_1S <= query_R1 - window
            mask = torch.zeros(hidden.shape, dtype=like.dtype, device=like.device)
            self._masks[key] = mask.masked_fill(hidden, float("-inf")).repeat(repeats, 1)
        return self._masks[key]


def _by_length(ranges: Sequence[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
    part: list[tuple[int, int]] = []
    for start, end in sorted(ranges, key=lambda each: each[0] - each[1]):
        if part and end - start < LEAST_FILL * (part[0][1] - part[0][0]):
            yield part
            part = []
        part.append((start, end))
    if part:
        yield part


def _bucket(ranges: Sequence[tuple[int, int]], device: torch.device | str) -> Bucket:
    ranges = sorted(ranges)
    start_n1, end_n1 = torch.tensor(ranges, device=device).unsqueeze(-1).unbind(1)
    longest = max(end - start for start, end in ranges)
    step_1R = torch.arange(longest, device=device)[None]
    index_nR = torch.minimum(start_n1 + step_1R, end_n1 - 1)
    if min(end - start for start, end in ranges) == longest:
        first, last = ranges[0][0], ranges[-1][1]
        together = last - first == index_nR.numel()
        return Bucket(index_nR, slice(first, last) if together else index_nR.flatten())
    inside = (start_n1 + step_1R < end_n1).flatten()
    real = inside.nonzero().squeeze(-1)
    return Bucket(index_nR, index_nR.flatten()[real], real, (~inside).nonzero().squeeze(-1))


# ------------------------------------------------------------------------------------ attention


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: Layout,
    *,
    scale: float,
    window: int | None = None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """[1,H,S,D] -> [1,S,H,D], by the fastest way there is for these tensors.

    `window` is a sliding window in tokens. Raises ModelError if the row is not the layout's.
    """
    if query.shape[0] != 1 or query.shape[2] != layout.length:
        raise ModelError(
            f"query {tuple(query.shape)} for one row of {layout.length} tokens cannot share "
            "prompts; set update.shared_prompt=off"
        )
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if window is not None and window >= layout.longest:
        window = None
    kernel = None
    if window is None and dropout == 0 and query.shape[-1] == value.shape[-1]:
        kernel = _kernel(query, key)
    if kernel is None:
        return masked_attention(query, key, value, layout, scale, window, dropout)
    return _MergedAttention.apply(query, key, value, layout, scale, kernel)


def _kernel(query: torch.Tensor, key: torch.Tensor) -> Any:
    """The flash kernel for such tensors, if there is one."""
    if query.device.type == "cpu":
        return CpuKernel if _cpu_flash is not None else None
    if query.device.type != "cuda" or query.dtype.itemsize != 2:
        return None
    _, heads, _, size = query.shape
    found = _varlen_fault(query.device, query.dtype, heads, key.shape[1], size)
    return None if found else VarlenKernel


@functools.lru_cache(maxsize=32)
def _varlen_fault(
    device: torch.device, dtype: torch.dtype, heads: int, key_heads: int, size: int
) -> str:
    """Why `VarlenKernel` cannot be used, found by running it once; empty if it can.

    Output and gradients must be as near to the masked form in float32 as 16 bits allow.
    """
    layout = Layout([Group((0, 5), ((5, 12), (12, 15))), Group((15, 18), ((18, 21),))], device)
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, each, layout.length, size) for each in (heads, key_heads, key_heads)]
    exact = [torch.randn(shape, generator=generator).to(device, dtype).float() for shape in shapes]
    results = []
    try:
        with torch.enable_grad(), torch.autocast(device.type, enabled=False):
            for merged in (True, False):
                tensors = [(x.to(dtype) if merged else x).detach().requires_grad_() for x in exact]
                q, k, v = tensors
                if merged:
                    out = _MergedAttention.apply(q, k, v, layout, size**-0.5, VarlenKernel)
                else:
                    out = masked_attention(q, k, v, layout, size**-0.5)
                weight = torch.arange(out.numel(), device=device).view(out.shape).cos()
                grads = torch.autograd.grad((out.float() * weight).sum(), tensors)
                results.append([out.detach().float(), *(grad.float() for grad in grads)])
        errors = [
            float((ours - theirs).norm() / theirs.norm())
            for ours, theirs in zip(*results, strict=True)
        ]
        fault = "" if max(errors) < 0.02 else f"it differs by {max(errors):.1g}"
    except (RuntimeError, NotImplementedError, AttributeError, TypeError) as error:
        fault = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if fault:
        warnings.warn(
            f"FlashAttention for ranges of different lengths is not used on {device} "
            f"({fault}); masked attention takes its place, which is slower",
            stacklevel=2,
        )
    return fault


class _MergedAttention(torch.autograd.Function):
    """Everything over itself, then completions over prompts, merged; see the module's text."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layout: Layout,
        scale: float,
        kernel: Any,
    ) -> torch.Tensor:
        q_SHD, k_SKD, v_SKD = (x[0].transpose(0, 1) for x in (q, k, v))
        out_SHD, lse_SH = kernel.own(q_SHD, k_SKD, v_SKD, layout, scale)
        if layout.shared:
            tokens = layout.completion_tokens
            far, far_lse = kernel.prompts(q_SHD, k_SKD, v_SKD, layout, scale)
            near, near_lse = out_SHD[tokens], lse_SH[tokens]
            lse = torch.logaddexp(near_lse, far_lse)
            merged = near * (near_lse - lse).exp().unsqueeze(-1)
            merged += far * (far_lse - lse).exp().unsqueeze(-1)
            out_SHD[tokens] = merged.to(out_SHD.dtype)
            lse_SH[tokens] = lse
        out = out_SHD.unsqueeze(0)
        ctx.save_for_backward(q, k, v, out, lse_SH)
        ctx.layout, ctx.scale, ctx.kernel = layout, scale, kernel
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_1SHD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, out_1SHD, lse_SH = ctx.saved_tensors
        rows = [x[0].transpose(0, 1) for x in (q, k, v)]
        saved = (grad_1SHD[0].contiguous(), *rows, out_1SHD[0], lse_SH, ctx.layout, ctx.scale)
        grads = ctx.kernel.own_backward(*saved)
        if ctx.layout.shared:
            ctx.kernel.add_prompts_backward(*grads, *saved)
        return *(x.transpose(0, 1)[None] for x in grads), None, None, None


class CpuKernel:
    """The flash kernel for CPUs, which takes ranges of equal length: padded, or one by one."""

    @staticmethod
    def own(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: Layout, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Each range over itself, causally: output [S,H,D] and log-normaliser [S,H]."""
        out_SHD = q.new_empty(q.shape)
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        lse_SH = q.new_empty(q.shape[:2], dtype=wide)
        for bucket in layout.buckets:
            out, lse = _cpu_flash(*(bucket.gather(x) for x in (q, k, v)), 0.0, True, scale=scale)
            out_SHD[bucket.tokens] = bucket.flatten(out)
            lse_SH[bucket.tokens] = bucket.flatten(lse)
        return out_SHD, lse_SH

    @staticmethod
    def prompts(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: Layout, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Completions over their prompts: output [C,H,D] and log-normaliser [C,H]."""
        found = []
        for group in layout.shared:
            tokens, keys = slice(group.prompt[1], group.end), slice(*group.prompt)
            parts = (_heads_first(x) for x in (q[tokens], k[keys], v[keys]))
            out, lse = _cpu_flash(*parts, 0.0, False, scale=scale)
            found.append((out[0].transpose(0, 1), lse[0].T))
        if len(found) == 1:
            return found[0]
        return torch.cat([out for out, _ in found]), torch.cat([lse for _, lse in found])

    @staticmethod
    def own_backward(
        grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
        out: torch.Tensor, lse: torch.Tensor, layout: Layout, scale: float,
    ) -> tuple[torch.Tensor, ...]:  # fmt: skip
        grads = tuple(x.new_empty(x.shape) for x in (q, k, v))
        for bucket in layout.buckets:
            grad_nHRD = bucket.gather(grad)
            if bucket.padding is not None:
                # Whatever a padding query attended to, it passes nothing back.
                grad_nHRD.transpose(1, 2).flatten(0, 1).index_fill_(0, bucket.padding, 0)
            parts = _cpu_flash_backward(
                grad_nHRD, *(bucket.gather(x) for x in (q, k, v, out, lse)), 0.0, True, scale=scale
            )
            for total, part in zip(grads, parts, strict=True):
                total[bucket.tokens] = bucket.flatten(part)
        return grads

    @staticmethod
    def add_prompts_backward(
        grad_q: torch.Tensor, grad_k: torch.Tensor, grad_v: torch.Tensor,
        grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
        out: torch.Tensor, lse: torch.Tensor, layout: Layout, scale: float,
    ) -> None:  # fmt: skip
        for group in layout.shared:
            tokens, keys = slice(group.prompt[1], group.end), slice(*group.prompt)
            parts = _cpu_flash_backward(
                *(_heads_first(x) for x in (grad[tokens], q[tokens], k[keys], v[keys])),
                _heads_first(out[tokens]), lse[tokens].T[None], 0.0, False, scale=scale,
            )  # fmt: skip
            for total, part in zip(
                (grad_q[tokens], grad_k[keys], grad_v[keys]), parts, strict=True
            ):
                total += part[0].transpose(0, 1)


def _heads_first(x_SHD: torch.Tensor) -> torch.Tensor:
    """[S,H,D] -> [1,H,S,D]"""
    return x_SHD.transpose(0, 1)[None]


class VarlenKernel:
    """FlashAttention over ranges of different lengths: one call each, without padding."""

    @staticmethod
    def own(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: Layout, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        bounds, longest = layout.bounds
        out, lse_HS, *_ = _aten._flash_attention_forward(
            q, k, v, bounds, bounds, longest, longest, 0.0, True, False, scale=scale
        )
        return out, lse_HS.T.contiguous()

    @staticmethod
    def prompts(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: Layout, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        tokens, keys = layout.completion_tokens, layout.prompt_tokens
        out, lse_HC, *_ = _aten._flash_attention_forward(
            q[tokens], k[keys], v[keys], *layout.prompt_bounds, 0.0, False, False, scale=scale
        )
        return out, lse_HC.T

    @staticmethod
    def own_backward(
        grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
        out: torch.Tensor, lse: torch.Tensor, layout: Layout, scale: float,
    ) -> tuple[torch.Tensor, ...]:  # fmt: skip
        bounds, longest = layout.bounds
        return _aten._flash_attention_backward(
            grad, q, k, v, out, lse.T.contiguous(), bounds, bounds, longest, longest,
            0.0, True, *_no_dropout(q), scale=scale,
        )  # fmt: skip

    @staticmethod
    def add_prompts_backward(
        grad_q: torch.Tensor, grad_k: torch.Tensor, grad_v: torch.Tensor,
        grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
        out: torch.Tensor, lse: torch.Tensor, layout: Layout, scale: float,
    ) -> None:  # fmt: skip
        tokens, keys = layout.completion_tokens, layout.prompt_tokens
        parts = _aten._flash_attention_backward(
            grad[tokens], q[tokens], k[keys], v[keys], out[tokens], lse[tokens].T.contiguous(),
            *layout.prompt_bounds, 0.0, False, *_no_dropout(q), scale=scale,
        )  # fmt: skip
        for total, part, where in zip(
            (grad_q, grad_k, grad_v), parts, (tokens, keys, keys), strict=True
        ):
            total[where] += part


def _no_dropout(like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The random state that the kernel asks for and, without dropout, does not use."""
    return (
        torch.zeros(2, dtype=torch.uint64, device=like.device),
        torch.empty(0, dtype=torch.uint64, device=like.device),
    )


def masked_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: Layout,
    scale: float,
    window: int | None = None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """The same by `scaled_dot_product_attention` over [prompt keys; own keys], on any device."""
    repeats = q.shape[1] // k.shape[1]
    q_SHD, k_SKD, v_SKD = (x[0].transpose(0, 1) for x in (q, k, v))
    parts = []
    for group, bucket in zip(layout.groups, layout.by_group, strict=True):
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
        if bucket is None:
            continue
        n, longest = bucket.index_nR.shape
        k_all = torch.cat([k_P.expand(n, -1, -1, -1), bucket.gather(k_SKD)], dim=2)
        v_all = torch.cat([v_P.expand(n, -1, -1, -1), bucket.gather(v_SKD)], dim=2)
        mask = layout.mask(end - start, longest, window, repeats, q)
        out = _sdpa(bucket.gather(q_SHD), k_all, v_all, mask, dropout, scale)
        parts.append(bucket.flatten(out))
    return torch.cat(parts)[None]


def _sdpa(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor,
    dropout: float,
    scale: float,
) -> torch.Tensor:
    """Masked attention of H heads with K key heads, the keys not copied.

    The heads that share a key head are stacked along the queries instead (the mask's rows are
    repeated to match): kernels that take a mask do not all take grouped heads.
    """
    repeats = q.shape[1] // k.shape[1]
    stacked = q.unflatten(1, (k.shape[1], repeats)).flatten(2, 3)
    out = F.scaled_dot_product_attention(
        stacked, k, v, attn_mask=mask, dropout_p=dropout, scale=scale
    )
    return out.unflatten(2, (repeats, q.shape[2])).flatten(1, 2)
