"""Token log-probability and entropy from hidden states without a [tokens, vocabulary] tensor.

With a vocabulary of 150,000 the logits, their softmax and their gradients take more memory than
the model. Here both passes go over the vocabulary in blocks whose logits for all positions fit a
memory budget: the forward pass keeps two numbers per position (log-normaliser and entropy); the
backward pass recomputes each block's logits and writes that block of the weight's gradient once.

    logits_v = (h · W_v + b_v) / temperature        logp = logits_target − logsumexp(logits)
    entropy  = logsumexp(logits) − Σ_v softmax(logits)_v · logits_v         (nats)

LoRA on the head adds a second product of the same kind, l · B_v with l = scaling · A h.

Shapes: N positions, H hidden size, V vocabulary, R rank.
"""

import itertools
from typing import Any

import torch
from torch import Tensor

CHUNK_BYTES = {"cpu": 4 << 20, "cuda": 256 << 20}
"""Size of one block of logits: on a CPU about what the caches hold, on a GPU large."""


def token_logprobs(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    target_N: Tensor,
    *,
    bias_V: Tensor | None = None,
    low_rank: tuple[Tensor, Tensor] | None = None,
    temperature: float = 1.0,
    entropy_grad: bool = False,
    chunk_bytes: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target and entropy of each distribution, nats, two [N].

    `bias_V` is added to the logits before the temperature; a large negative entry (−1e4, finite)
    excludes an id. `low_rank`, two tensors [N,R] and [V,R], adds their product. Gradients flow to
    all of these that require one, and through the entropy only if `entropy_grad` is set.

    Inputs are multiplied in their own precision, or autocast's where it is on; logits and results
    are float32 (float64 for float64 inputs). A sharded (DTensor) weight is gathered. Raises
    ValueError on shapes that do not fit and on targets outside the vocabulary.
    """
    factors = [(hidden_NH, _whole(weight_VH))]
    if low_rank is not None:
        factors.append((low_rank[0], _whole(low_rank[1])))
    _check(factors, target_N, temperature)
    device = hidden_NH.device.type
    return _TokenLogprobs.apply(
        target_N, _whole(bias_V), 1.0 / temperature, entropy_grad, compute_dtype(hidden_NH),
        chunk_bytes or CHUNK_BYTES.get(device, CHUNK_BYTES["cuda"]),
        *itertools.chain.from_iterable(factors),
    )  # fmt: skip


def head_logprobs(
    head: Any, hidden_NH: Tensor, target_N: Tensor, *, bias_V: Tensor | None = None, **options: Any
) -> tuple[Tensor, Tensor]:
    """`token_logprobs` for a model's vocabulary head, a linear layer with or without LoRA.

    `bias_V` is added to the head's own bias; `options` are those of `token_logprobs`.
    """
    weight_VH, bias_V, low_rank = _parts(head, hidden_NH, bias_V)
    return token_logprobs(hidden_NH, weight_VH, target_N, bias_V=bias_V, low_rank=low_rank, **options)


def head_logits(head: Any, hidden_NH: Tensor, *, bias_V: Tensor | None = None) -> Tensor:
    """The logits [N,V] behind `head_logprobs`, float32: by the same products, so rounded no more than those."""
    weight_VH, bias_V, low_rank = _parts(head, hidden_NH, bias_V)
    dtype, left, right = compute_dtype(hidden_NH), [hidden_NH], [_whole(weight_VH)]
    if low_rank is not None:
        left, right = [*left, low_rank[0]], [*right, low_rank[1]]
    left, right = ([x.to(dtype) for x in factors] for factors in (left, right))
    with torch.autocast(hidden_NH.device.type, enabled=False):
        return _logits(left, right, _whole(bias_V), slice(None), 1.0)


def _parts(head: Any, hidden_NH: Tensor, bias_V: Tensor | None) -> tuple[Tensor, Tensor | None, Any]:
    """Weight, bias and LoRA's factors of a vocabulary head."""
    low_rank = None
    if hasattr(head, "lora_A"):
        low_rank = _low_rank(head, hidden_NH)
        head = head.get_base_layer()
    if head.bias is not None:
        bias_V = head.bias if bias_V is None else head.bias + bias_V
    return head.weight, bias_V, low_rank


def compute_dtype(x: Tensor) -> torch.dtype:
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _low_rank(head: Any, hidden_NH: Tensor) -> tuple[Tensor, Tensor] | None:
    """What PEFT's LoRA layer would add to the logits, as two factors."""
    if head.disable_adapters or not head.active_adapters:
        return None
    low_NR, high_VR = [], []
    for name in head.active_adapters:
        down = head.lora_A[name]
        dropped_NH = head.lora_dropout[name](hidden_NH.to(down.weight.dtype))
        low_NR.append(head.scaling[name] * down(dropped_NH))
        high_VR.append(_whole(head.lora_B[name].weight))
    return torch.cat(low_NR, -1), torch.cat(high_VR, -1)


class _TokenLogprobs(torch.autograd.Function):
    """`factors` alternate left [N,·] and right [V,·]; the logits are the sum of their products."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        target_N: Tensor,
        bias_V: Tensor | None,
        scale: float,
        entropy_grad: bool,
        dtype: torch.dtype,
        chunk_bytes: int,
        *factors: Tensor,
    ) -> tuple[Tensor, Tensor]:
        hidden_NH, weight_VH = factors[:2]
        wide = torch.float64 if hidden_NH.dtype == torch.float64 else torch.float32
        positions = len(hidden_NH)
        # Running maximum, Σ e^x, Σ x e^x (both relative to that maximum) and the target's logit:
        # all that is needed of a block, so that its logits can be dropped.
        max_N = hidden_NH.new_full((positions,), -1e30, dtype=wide)
        sum_N, moment_N, picked_N = hidden_NH.new_zeros(3, positions, dtype=wide)
        left = [each.to(dtype) for each in factors[::2]]
        with torch.autocast(hidden_NH.device.type, enabled=False):
            for v in _blocks(len(weight_VH), positions, chunk_bytes // wide.itemsize):
                right = [each[v].to(dtype) for each in factors[1::2]]
                logits_Nv = _logits(left, right, bias_V, v, scale)
                column_N, inside_N = _column(target_N, v)
                picked_N += inside_N * logits_Nv.gather(-1, column_N[:, None]).squeeze(-1)
                # As in online softmax: what was summed so far is rescaled to the new maximum.
                new_max_N = torch.maximum(max_N, logits_Nv.amax(-1))
                shift_N = max_N - new_max_N
                logits_Nv -= new_max_N[:, None]
                moment_N = shift_N.exp() * (moment_N + shift_N * sum_N)
                sum_N = shift_N.exp() * sum_N
                exp_Nv = logits_Nv.exp()
                sum_N = sum_N + exp_Nv.sum(-1)
                moment_N = moment_N + exp_Nv.mul_(logits_Nv).sum(-1)  # in place: vecdot would make a third block
                max_N = new_max_N
        log_sum_N = sum_N.log()
        norm_N = max_N + log_sum_N
        logp_N, entropy_N = picked_N - norm_N, log_sum_N - moment_N / sum_N
        ctx.save_for_backward(target_N, bias_V, norm_N, entropy_N, *factors)
        ctx.scale, ctx.dtype, ctx.chunk_bytes = scale, dtype, chunk_bytes
        ctx.entropy_grad = entropy_grad
        ctx.set_materialize_grads(False)
        if not entropy_grad:
            ctx.mark_non_differentiable(entropy_N)
        return logp_N, entropy_N

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_logp_N, grad_entropy_N = grads
        target_N, bias_V, norm_N, entropy_N, *factors = ctx.saved_tensors
        if grad_logp_N is None and grad_entropy_N is None:
            return (None,) * (6 + len(factors))
        if grad_logp_N is None:
            grad_logp_N = torch.zeros_like(norm_N)
        wide, dtype = norm_N.dtype, ctx.dtype
        left, right = factors[::2], factors[1::2]
        # The left gradients [N,·] collect a share from every block, the right ones [V,·] get each
        # of their rows from one block.
        pairs = list(zip(factors, ctx.needs_input_grad[6:], strict=True))
        grad_left = [torch.zeros_like(x, dtype=wide) if needs else None for x, needs in pairs[::2]]
        grad_right = [torch.empty_like(x) if needs else None for x, needs in pairs[1::2]]
        grad_bias_V = torch.empty_like(bias_V) if ctx.needs_input_grad[1] else None
        query = [each.to(dtype) for each in left]
        room = ctx.chunk_bytes // wide.itemsize
        with torch.autocast(norm_N.device.type, enabled=False):
            for v in _blocks(len(right[0]), len(norm_N), room):
                key = [each[v].to(dtype) for each in right]
                grad_Nv = _logits(query, key, bias_V, v, ctx.scale)
                grad_Nv -= norm_N[:, None]
                # Now log p. In place from here on, as this is the largest tensor there is:
                # d logp_target / d logit_v = [v = target] − p_v
                # d entropy / d logit_v = −p_v (log p_v + entropy)
                if grad_entropy_N is None:
                    grad_Nv.exp_().mul_(-grad_logp_N[:, None])
                else:
                    factor_Nv = (grad_Nv + entropy_N[:, None]).mul_(grad_entropy_N[:, None])
                    factor_Nv += grad_logp_N[:, None]
                    grad_Nv.exp_().mul_(factor_Nv).neg_()
                # The [v = target] of the first line; adds 0 where the target is in another block.
                column_N, inside_N = _column(target_N, v)
                grad_Nv.scatter_add_(-1, column_N[:, None], (inside_N * grad_logp_N)[:, None])
                if ctx.scale != 1:
                    grad_Nv *= ctx.scale
                if grad_bias_V is not None:
                    grad_bias_V[v] = grad_Nv.sum(0)
                grad_Nv = grad_Nv.to(dtype)
                # The inputs of a product are rounded to `dtype`, its sums are not; where nothing
                # is rounded the product goes straight into the gradient, without a temporary.
                for index, (grad_l, grad_r) in enumerate(zip(grad_left, grad_right, strict=True)):
                    if grad_l is not None and dtype == wide:
                        grad_l.addmm_(grad_Nv, key[index])
                    elif grad_l is not None:
                        grad_l += wide_matmul(grad_Nv, key[index])
                    if grad_r is not None and dtype == grad_r.dtype == wide:
                        torch.mm(grad_Nv.T, query[index], out=grad_r[v])
                    elif grad_r is not None:
                        grad_r[v] = wide_matmul(grad_Nv.T, query[index])
        in_turn: list[Tensor | None] = []
        for each, grad_l, grad_r in zip(left, grad_left, grad_right, strict=True):
            in_turn += [None if grad_l is None else grad_l.to(each.dtype), grad_r]
        return None, grad_bias_V, None, None, None, None, *in_turn


def _blocks(vocabulary: int, positions: int, room: int) -> list[slice]:
    """Blocks of the vocabulary so that positions × block is at most `room` numbers."""
    # Narrower blocks would make the products slow; with very many positions they exceed `room`. GPUs multiply rows
    # that do not begin at 16 bytes two to three times slower.
    width = max(256, room // max(1, positions) // 256 * 256)
    return [slice(v, min(v + width, vocabulary)) for v in range(0, vocabulary, width)]


def _column(target_N: Tensor, v: slice) -> tuple[Tensor, Tensor]:
    """Column of each target within the block, and whether it lies there (else any column)."""
    inside_N = (target_N >= v.start) & (target_N < v.stop)
    return (target_N - v.start).clamp(0, v.stop - v.start - 1), inside_N


def _logits(left: list[Tensor], right: list[Tensor], bias_V: Tensor | None, v: slice, scale: float) -> Tensor:
    logits_Nv = wide_matmul(left[0], right[0].T)
    for more, weight in zip(left[1:], right[1:], strict=True):
        logits_Nv += wide_matmul(more, weight.T)
    if bias_V is not None:
        logits_Nv += bias_V[v]
    if scale != 1:
        logits_Nv *= scale
    return logits_Nv


def wide_matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b with a result of at least float32, without rounding it to 16 bits on the way."""
    if a.dtype.itemsize > 2:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def _whole(x: Any) -> Any:
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def _check(factors: list[tuple[Tensor, Tensor]], target_N: Tensor, temperature: float) -> None:
    (hidden_NH, weight_VH), *more = factors
    if hidden_NH.dim() != 2 or hidden_NH.shape[1:] != weight_VH.shape[1:]:
        raise ValueError(
            f"hidden has shape {tuple(hidden_NH.shape)}, the head {tuple(weight_VH.shape)}; expected [N, H] and [V, H]"
        )
    for low_NR, high_VR in more:
        wanted = ((len(hidden_NH), high_VR.shape[-1]), (len(weight_VH), low_NR.shape[-1]))
        if (low_NR.shape, high_VR.shape) != wanted:
            raise ValueError(
                f"low_rank has shapes {tuple(low_NR.shape)} and {tuple(high_VR.shape)}; expected "
                f"[{len(hidden_NH)}, R] and [{len(weight_VH)}, R]"
            )
    if target_N.shape != hidden_NH.shape[:1]:
        raise ValueError(f"{len(hidden_NH)} hidden states, but targets {tuple(target_N.shape)}")
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}; it must be positive")
    # Checking on a GPU would make the CPU wait for it; there the kernel asserts by itself.
    if target_N.device.type == "cpu" and target_N.numel():
        low, high = int(target_N.min()), int(target_N.max())
        if low < 0 or high >= len(weight_VH):
            raise ValueError(f"targets {low}..{high} outside the vocabulary of {len(weight_VH)}")
