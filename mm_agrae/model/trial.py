"""A trial of a fast operator beside the plain one, before a model uses it."""

import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from mm_agrae.errors import one_line

Operator = Callable[..., Any]
"""Takes tensors and returns a tensor or several."""


def fault(
    fast: Operator,
    plain: Operator,
    shapes: Sequence[Sequence[int]],
    device: torch.device,
    dtype: torch.dtype,
    plain_dtype: torch.dtype = torch.float32,
) -> str:
    """Why `fast` cannot take the place of `plain`, in one line; empty if it can.

    Both run once on random tensors of these shapes, `plain` in `plain_dtype`. Outputs and gradients must agree as
    well as `dtype` allows. A kernel that fails to compile or start counts as a fault; nothing is raised.
    """
    # In a thread of its own the trial is seen by no saved-tensor hook (gradient checkpointing) and no autocast.
    # It begins on the first GPU, where Triton would start its kernels.
    on_device = functools.partial(torch.cuda.set_device, device.index or 0) if device.type == "cuda" else None
    with ThreadPoolExecutor(1, initializer=on_device) as thread:
        return thread.submit(_fault, ((fast, dtype), (plain, plain_dtype)), shapes, device).result()


def _fault(operators: Any, shapes: Sequence[Sequence[int]], device: torch.device) -> str:
    dtype = operators[0][1]
    generator = torch.Generator().manual_seed(0)
    rounded = [torch.randn(*shape, generator=generator).to(device, dtype) for shape in shapes]
    try:
        ours, theirs = (
            _run(operator, [x.detach().to(wide).requires_grad_() for x in rounded]) for operator, wide in operators
        )
        pairs = zip(ours, theirs, strict=True)
        # Python's max() loses a NaN behind a number.
        error = float(torch.stack([(a - b).norm() / b.norm().clamp(min=1e-30) for a, b in pairs]).amax())
    except Exception as failure:  # other people's compilers and kernels may fail in any way
        return f"{type(failure).__name__}: {one_line(failure)}"
    return "" if error < (1e-4 if dtype.itemsize > 2 else 0.02) else f"it differs by {error:.1g}"


def _run(operator: Operator, tensors: list[Tensor]) -> list[Tensor]:
    # Operators may work in place, which a leaf does not allow.
    found = operator(*(x.clone() for x in tensors))
    outputs = [found] if isinstance(found, Tensor) else list(found)
    weights = [torch.arange(x.numel(), device=x.device).view(x.shape).cos() for x in outputs]
    total = sum((x.float() * w).sum() for x, w in zip(outputs, weights, strict=True))
    grads = torch.autograd.grad(total, tensors)  # type: ignore[arg-type]
    return [x.detach().float() for x in (*outputs, *grads)]
