"""Which tokens of a packed row belong together: prompts, their completions, batches of spans.

A packed row holds the groups of a micro-batch one after another, each prompt followed by its
completions (see `shared_prompt`). Attention asks its `PackedLayout` for the index tensors, masks
and lengths that its kernels take; each is made once and serves all layers.

Shapes: S tokens of the row, n spans padded to R tokens, H heads of size D.
"""

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

LEAST_FILL = 0.75
"""Spans are padded into one batch if none is shorter than this share of the longest."""

Index = Tensor | slice
Span = tuple[int, int]
"""Half-open: (first token, token after the last)."""


@dataclass(frozen=True)
class GroupSpans:
    """Where one group stands in the row: its prompt, and its completions right after it."""

    prompt: Span
    completions: tuple[Span, ...]

    @property
    def end(self) -> int:
        return self.completions[-1][1] if self.completions else self.prompt[1]


@dataclass(frozen=True, eq=False)
class SpanBatch:
    """Spans of similar length as one batch of row indices, each padded with its last token.

    `tokens` are the row indices without padding, a slice where they are consecutive. `real` and
    `padding` are flat positions in [n,R]; both are None if there is no padding.
    """

    index_nR: Tensor
    tokens: Index
    real: Tensor | None = None
    padding: Tensor | None = None

    def gather(self, x_SHD: Tensor) -> Tensor:
        """[S,H,…] -> [n,H,R,…]"""
        if isinstance(self.tokens, slice):
            picked = x_SHD[self.tokens]
        else:
            picked = x_SHD.index_select(0, self.index_nR.flatten())
        return picked.unflatten(0, self.index_nR.shape).transpose(1, 2)

    def flatten(self, x_nHRD: Tensor) -> Tensor:
        """[n,H,R,…] -> [tokens,H,…]"""
        flat = x_nHRD.transpose(1, 2).flatten(0, 1)
        return flat if self.real is None else flat.index_select(0, self.real)


class PackedLayout:
    """The groups of a row, and what attention needs to know of them.

    `length` is the row's, `longest` that of the longest prompt with one of its completions.
    """

    def __init__(self, groups: Sequence[GroupSpans], device: torch.device | str = "cpu"):
        self.groups = tuple(groups)
        self.length = max((group.end for group in groups), default=0)
        self.device = device
        self._masks: dict[tuple[Any, ...], Tensor] = {}
        pairs = ((*g.prompt, *completion) for g in groups for completion in g.completions)
        lengths = (prompt_end - prompt + end - start for prompt, prompt_end, start, end in pairs)
        self.longest = max(lengths, default=self.length)

    @functools.cached_property
    def spans(self) -> tuple[Span, ...]:
        """Every prompt and every completion, in the order of the row."""
        return tuple(each for group in self.groups for each in (group.prompt, *group.completions))

    @functools.cached_property
    def shared(self) -> tuple[GroupSpans, ...]:
        """The groups that have completions."""
        return tuple(group for group in self.groups if group.completions)

    @functools.cached_property
    def batches(self) -> tuple[SpanBatch, ...]:
        """All `spans`, in batches of similar length."""
        return tuple(_batch(part, self.device) for part in _by_length(self.spans))

    @functools.cached_property
    def by_group(self) -> tuple[SpanBatch | None, ...]:
        """All completions of each group as one batch."""
        found = (group.completions for group in self.groups)
        return tuple(_batch(spans, self.device) if spans else None for spans in found)

    @functools.cached_property
    def prompt_tokens(self) -> Index:
        """Tokens of the prompts that have completions, [tokens]."""
        return self._tokens([group.prompt for group in self.shared])

    @functools.cached_property
    def completion_tokens(self) -> Index:
        return self._tokens([(group.prompt[1], group.end) for group in self.shared])

    @functools.cached_property
    def predicting(self) -> Tensor:
        """Tokens that predict another one: each prompt's last, and all of the completions'."""
        return self._indices([(group.prompt[1] - 1, group.end) for group in self.groups])

    @functools.cached_property
    def bounds(self) -> tuple[Tensor, int]:
        """Cumulative lengths of `spans`, int32 [spans + 1], and the longest."""
        return self._bounds(self.spans)

    @functools.cached_property
    def prompt_bounds(self) -> tuple[Tensor, Tensor, int, int]:
        """The same for the completions of each `shared` group together, and for their prompts."""
        queries, most_queries = self._bounds([(g.prompt[1], g.end) for g in self.shared])
        keys, most_keys = self._bounds([g.prompt for g in self.shared])
        return queries, keys, most_queries, most_keys

    @functools.cached_property
    def no_dropout(self) -> tuple[Tensor, Tensor]:
        """The random state that FlashAttention takes and, without dropout, does not use."""
        return (
            torch.zeros(2, dtype=torch.uint64, device=self.device),
            torch.empty(0, dtype=torch.uint64, device=self.device),
        )

    def _bounds(self, spans: Sequence[Span]) -> tuple[Tensor, int]:
        lengths = [end - start for start, end in spans]
        total = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
        return total.to(self.device), max(lengths)

    def _tokens(self, spans: Sequence[Span]) -> Index:
        return slice(*spans[0]) if len(spans) == 1 else self._indices(spans)

    def _indices(self, spans: Sequence[Span]) -> Tensor:
        return torch.cat([torch.arange(*each, device=self.device) for each in spans])

    def mask(self, past: int, own: int, window: int | None, repeats: int, like: Tensor) -> Tensor:
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


def _by_length(spans: Sequence[Span]) -> Iterator[list[Span]]:
    part: list[Span] = []
    for start, end in sorted(spans, key=lambda each: each[0] - each[1]):
        if part and end - start < LEAST_FILL * (part[0][1] - part[0][0]):
            yield part
            part = []
        part.append((start, end))
    if part:
        yield part


def _batch(spans: Sequence[Span], device: torch.device | str) -> SpanBatch:
    spans = sorted(spans)
    start_n1, end_n1 = torch.tensor(spans, device=device).unsqueeze(-1).unbind(1)
    longest = max(end - start for start, end in spans)
    step_1R = torch.arange(longest, device=device)[None]
    index_nR = torch.minimum(start_n1 + step_1R, end_n1 - 1)
    if min(end - start for start, end in spans) == longest:
        first, last = spans[0][0], spans[-1][1]
        together = last - first == index_nR.numel()
        return SpanBatch(index_nR, slice(first, last) if together else index_nR.flatten())
    inside = (start_n1 + step_1R < end_n1).flatten()
    real = inside.nonzero().squeeze(-1)
    return SpanBatch(index_nR, index_nR.flatten()[real], real, (~inside).nonzero().squeeze(-1))
