"""Token log-probability and entropy from hidden states without a [tokens, vocabulary] tensor.

With a vocabulary of 150,000 the logits, their softmax and their gradients take more memory than
the model. Here both passes go over the vocabulary in blocks whose logits for all positions fit a
memory budget: the forward pass keeps two numbers per position (log-normaliser and entropy), the
backward pass recomputes each block's logits and writes that block of the weight's gradient once.

    logits_v = (h · W_v + b_v) / temperature        logp = logits_target − logsumexp(logits)
    entropy  = logsumexp(logits) − Σ_v softmax(logits)_v · logits_v         (nats)

Shapes: N positions, H hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

CHUNK_BYTES = {"cpu": 4 << 20, "cuda": 256 << 20}
"""Size of one piece of logits. On a CPU it should stay near the caches; a GPU wants large ones."""


def token_logprobs(
    hidden_NH: torch.Tensor,
    weight_VH: torch.Tensor,
    target_N: torch.Tensor,
    *,
    bias_V: torch.Tensor | None = None,
    temperature: float = 1.0,
    entropy_grad: bool = False,
    chunk_bytes: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each target and entropy of each distribution, nats, two [N].

    `bias_V` is added to the logits before the temperature; a large negative entry (−1e4, finite)
    excludes an id. Gradients flow to hidden, weight and bias as far as they require one, and
    through the entropy only if `entropy_grad` is set. Logits are float32 (float64 for float64
    inputs) products of the inputs in their own precision, or in autocast's where it is on; so
    are the results. A sharded (DTensor) weight is gathered. Raises ValueError on shapes that
    do not fit and on targets outside the vocabulary.
    """
    weight_VH, bias_V = _whole(weight_VH), _whole(bias_V)
    _check(hidden_NH, weight_VH.shape, target_N, temperature)
    device = hidden_NH.device.type
    dtype = (
        torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_NH.dtype
    )
    logp_N, entropy_N = _TokenLogprobs.apply(
        hidden_NH, weight_VH, bias_V, target_N, 1.0 / temperature, entropy_grad, dtype,
        chunk_bytes or CHUNK_BYTES.get(device, CHUNK_BYTES["cuda"]),
    )  # fmt: skip
    return logp_N, entropy_N


def head_logprobs(
    head: nn.Module,
    hidden_NH: torch.Tensor,
    target_N: torch.Tensor,
    *,
    bias_V: torch.Tensor | None = None,
    temperature: float = 1.0,
    entropy_grad: bool = False,
    chunk_bytes: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`token_logprobs` for a model's vocabulary head; `bias_V` adds to the head's own bias.

    A head that is not a plain `nn.Linear`, such as one with LoRA, is called as it is, on chunks
    of positions that are recomputed in the backward pass.
    """
    if type(head) is nn.Linear:
        if head.bias is not None:
            bias_V = head.bias if bias_V is None else head.bias + bias_V
        return token_logprobs(
            hidden_NH, head.weight, target_N, bias_V=bias_V, temperature=temperature,
            entropy_grad=entropy_grad, chunk_bytes=chunk_bytes,
        )  # fmt: skip
    vocabulary = getattr(head, "out_features", None) or _whole(head.weight).shape[0]
    _check(hidden_NH, (vocabulary, hidden_NH.shape[1]), target_N, temperature)
    budget = chunk_bytes or CHUNK_BYTES.get(hidden_NH.device.type, CHUNK_BYTES["cuda"])

    def piece(hidden_nH: torch.Tensor, target_n: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits_nV = _at_least_float32(head(hidden_nH))
        if bias_V is not None:
            logits_nV = logits_nV + bias_V
        logp_nV = torch.log_softmax(logits_nV / temperature, dim=-1)
        entropy_n = -(logp_nV.exp() * logp_nV).sum(-1)
        logp_n = logp_nV.gather(-1, target_n[:, None]).squeeze(-1)
        return logp_n, entropy_n if entropy_grad else entropy_n.detach()

    rows = max(1, budget // (4 * vocabulary))
    pieces = [
        checkpoint(piece, hidden_nH, target_n, use_reentrant=False)
        for hidden_nH, target_n in zip(hidden_NH.split(rows), target_N.split(rows), strict=True)
    ]
    return torch.cat([logp for logp, _ in pieces]), torch.cat([entropy for _, entropy in pieces])


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden_NH: torch.Tensor,
        weight_VH: torch.Tensor,
        bias_V: torch.Tensor | None,
        target_N: torch.Tensor,
        scale: float,
        entropy_grad: bool,
        dtype: torch.dtype,
        chunk_bytes: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        wide = torch.float64 if hidden_NH.dtype == torch.float64 else torch.float32
        positions = len(hidden_NH)
        # Running maximum, Σ e^x, Σ x e^x (both relative to that maximum) and the target's logit.
        max_N = hidden_NH.new_full((positions,), -1e30, dtype=wide)
        sum_N, moment_N, picked_N = hidden_NH.new_zeros(3, positions, dtype=wide)
        query_NH = hidden_NH.to(dtype)
        with torch.autocast(hidden_NH.device.type, enabled=False):
            for v in _blocks(len(weight_VH), positions, chunk_bytes // wide.itemsize):
                logits_Nv = _logits(query_NH, weight_VH[v].to(dtype), bias_V, v, scale)
                column_N, inside_N = _column(target_N, v)
                picked_N += inside_N * logits_Nv.gather(-1, column_N[:, None]).squeeze(-1)
                new_max_N = torch.maximum(max_N, logits_Nv.amax(-1))
                shift_N = max_N - new_max_N
                logits_Nv -= new_max_N[:, None]
                moment_N = shift_N.exp() * (moment_N + shift_N * sum_N)
                sum_N = shift_N.exp() * sum_N
                exp_Nv = logits_Nv.exp()
                sum_N = sum_N + exp_Nv.sum(-1)
                moment_N = moment_N + torch.linalg.vecdot(exp_Nv, logits_Nv)
                max_N = new_max_N
        log_sum_N = sum_N.log()
        norm_N = max_N + log_sum_N
        logp_N, entropy_N = picked_N - norm_N, log_sum_N - moment_N / sum_N
        ctx.save_for_backward(hidden_NH, weight_VH, bias_V, target_N, norm_N, entropy_N)
        ctx.scale, ctx.dtype, ctx.chunk_bytes = scale, dtype, chunk_bytes
        ctx.entropy_grad = entropy_grad
        ctx.set_materialize_grads(False)
        if not entropy_grad:
            ctx.mark_non_differentiable(entropy_N)
        return logp_N, entropy_N

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        grad_logp_N, grad_entropy_N = grads
        hidden_NH, weight_VH, bias_V, target_N, norm_N, entropy_N = ctx.saved_tensors
        if grad_logp_N is None and grad_entropy_N is None:
            return (None,) * 8
        if grad_logp_N is None:
            grad_logp_N = torch.zeros_like(norm_N)
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        wide, dtype = norm_N.dtype, ctx.dtype
        grad_hidden_NH = torch.zeros_like(hidden_NH, dtype=wide) if wants_hidden else None
        grad_weight_VH = torch.empty_like(weight_VH) if wants_weight else None
        grad_bias_V = torch.empty_like(bias_V) if wants_bias else None
        query_NH = hidden_NH.to(dtype)
        room = ctx.chunk_bytes // wide.itemsize
        with torch.autocast(hidden_NH.device.type, enabled=False):
            for v in _blocks(len(weight_VH), len(hidden_NH), room):
                weight_vH = weight_VH[v].to(dtype)
                grad_Nv = _logits(query_NH, weight_vH, bias_V, v, ctx.scale)
                grad_Nv -= norm_N[:, None]
                # d logp_target / d logit_v = [v = target] − p_v
                # d entropy / d logit_v = −p_v (log p_v + entropy)
                if grad_entropy_N is None:
                    grad_Nv.exp_().mul_(-grad_logp_N[:, None])
                else:
                    factor_Nv = (grad_Nv + entropy_N[:, None]).mul_(grad_entropy_N[:, None])
                    factor_Nv += grad_logp_N[:, None]
                    grad_Nv.exp_().mul_(factor_Nv).neg_()
                column_N, inside_N = _column(target_N, v)
                grad_Nv.scatter_add_(-1, column_N[:, None], (inside_N * grad_logp_N)[:, None])
                if ctx.scale != 1:
                    grad_Nv *= ctx.scale
                if grad_bias_V is not None:
                    grad_bias_V[v] = grad_Nv.sum(0)
                grad_Nv = grad_Nv.to(dtype)
                if grad_hidden_NH is not None and dtype == wide:
                    grad_hidden_NH.addmm_(grad_Nv, weight_vH)
                elif grad_hidden_NH is not None:
                    grad_hidden_NH += _matmul(grad_Nv, weight_vH)
                if grad_weight_VH is not None and dtype == grad_weight_VH.dtype == wide:
                    torch.mm(grad_Nv.T, query_NH, out=grad_weight_VH[v])
                elif grad_weight_VH is not None:
                    grad_weight_VH[v] = _matmul(grad_Nv.T, query_NH)
        if grad_hidden_NH is not None:
            grad_hidden_NH = grad_hidden_NH.to(hidden_NH.dtype)
        return grad_hidden_NH, grad_weight_VH, grad_bias_V, None, None, None, None, None


def _blocks(vocabulary: int, positions: int, room: int) -> list[slice]:
    """Cut the vocabulary so that positions × block fits into `room` numbers."""
    # Narrower blocks would make the matrix products slow; memory then grows with the positions.
    width = max(256, room // max(1, positions))
    return [slice(v, min(v + width, vocabulary)) for v in range(0, vocabulary, width)]


def _column(target_N: torch.Tensor, v: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """Column of each target within the block, and whether it lies there (else any column)."""
    inside_N = (target_N >= v.start) & (target_N < v.stop)
    return (target_N - v.start).clamp(0, v.stop - v.start - 1), inside_N


def _logits(
    hidden_NH: torch.Tensor,
    weight_vH: torch.Tensor,
    bias_V: torch.Tensor | None,
    v: slice,
    scale: float,
) -> torch.Tensor:
    logits_Nv = _matmul(hidden_NH, weight_vH.T)
    if bias_V is not None:
        logits_Nv += bias_V[v]
    if scale != 1:
        logits_Nv *= scale
    return logits_Nv


def _matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b with a result of at least float32, without rounding it to 16 bits on the way."""
    if a.dtype.itemsize > 2:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def _at_least_float32(x: torch.Tensor) -> torch.Tensor:
    return x.float() if x.dtype.itemsize < 4 else x


def _whole(x: Any) -> Any:
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def _check(
    hidden_NH: torch.Tensor,
    weight_shape: tuple[int, ...] | torch.Size,
    target_N: torch.Tensor,
    temperature: float,
) -> None:
    if hidden_NH.dim() != 2 or hidden_NH.shape[1] != weight_shape[1]:
        raise ValueError(
            f"hidden has shape {tuple(hidden_NH.shape)}, the head {tuple(weight_shape)}; "
            "expected [N, H] and [V, H]"
        )
    if target_N.shape != hidden_NH.shape[:1]:
        raise ValueError(f"{len(hidden_NH)} hidden states, but targets {tuple(target_N.shape)}")
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}; it must be positive")
    # Reading the targets back would make a GPU wait; there the kernel's own assertion stops it.
    if target_N.device.type == "cpu" and target_N.numel():
        low, high = int(target_N.min()), int(target_N.max())
        if low < 0 or high >= weight_shape[0]:
            raise ValueError(f"targets {low}..{high} outside the vocabulary of {weight_shape[0]}")
