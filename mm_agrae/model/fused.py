"""Fused operators for CUDA, where elementwise work is a third of a training step.

- RMSNorm by PyTorch's own operator: one kernel for seven, and its result in autocast's precision at once.
- SwiGLU and rotary positions by liger-kernel (arXiv 2410.10989), where it is installed: one kernel each. Rotated
  queries and keys stay in their own precision, also in a cache, without it too.
- An inner width that is no multiple of 8 (3,420 in Qwen2.5-VL's vision tower) is padded with zeros: products of rows
  that do not begin at 16 bytes take three times as long.

Each one is tried against the model's plain form when the policy is made, and left out with a warning if it does not
agree. On a CPU nothing is replaced. Only forward methods change; parameters, LoRA layers and hooks stay as they are.
"""

import functools
import importlib
import importlib.util
import sys
import types
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm_agrae.errors import one_line
from mm_agrae.model import trial
from mm_agrae.model.vocab_head import compute_dtype

MLP_PARTS = {"gate_proj", "up_proj", "down_proj", "act_fn"}


def install(hf: Any, dtype: torch.dtype, device: torch.device) -> None:
    """Fuse what can be in a transformers model that computes on `device`, if that is CUDA, in `dtype`."""
    if device.type != "cuda":
        return
    for module in hf.modules():
        if type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
            # It is tried, as it runs, in its weight's precision.
            _replace(module, norm, device, module.weight.dtype)
        elif dict(module.named_children()).keys() == MLP_PARTS and _is_silu(module.act_fn):
            _replace(module, swiglu, device, dtype)
    for file in {type(module).__module__ for module in hf.modules()}:
        _replace_rotary(sys.modules[file], device, dtype)


@functools.cache
def liger() -> Any:
    """liger-kernel's operators; None where it is not installed."""
    if importlib.util.find_spec("liger_kernel") is None:
        return None
    try:
        return importlib.import_module("liger_kernel.ops")
    except ImportError as error:
        _left_out("SwiGLU", one_line(error))
        return None


def _is_silu(activation: nn.Module) -> bool:
    return type(activation).__name__ in ("SiLU", "SiLUActivation")


def norm(self: Any, x: Tensor) -> Tensor:
    """RMSNorm of [..., H], as a method of transformers' module; under autocast in its precision."""
    dtype = compute_dtype(x)
    with torch.autocast(x.device.type, enabled=False):
        x = x.to(self.weight.dtype)
        # The cast at the end serves all linear layers that follow; autocast would repeat it in each.
        return F.rms_norm(x, self.weight.shape, self.weight, self.variance_epsilon).to(dtype)


def swiglu(self: Any, x: Tensor) -> Tensor:
    """down(silu(gate(x)) · up(x)), as a method of transformers' module."""
    gate, up, down = layers = self.gate_proj, self.up_proj, self.down_proj
    extra = -gate.out_features % 8
    if not extra or any(type(layer) is not nn.Linear for layer in layers):  # LoRA adds to a layer's output
        return down(_product(gate(x), up(x)))
    inner = (F.linear(x, F.pad(each.weight, (0, 0, 0, extra)), _padded(each.bias, extra)) for each in (gate, up))
    return F.linear(_product(*inner), F.pad(down.weight, (0, extra)), down.bias)


def _padded(bias: Tensor | None, extra: int) -> Tensor | None:
    return None if bias is None else F.pad(bias, (0, extra))


def _product(gate: Tensor, up: Tensor) -> Tensor:
    fused = gate.is_cuda and liger()
    return fused.LigerSiLUMulFunction.apply(gate, up) if fused else F.silu(gate) * up


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
    """q [B,H,S,D] and k [B,K,S,D] turned in place; `cos` and `sin` are [1 or B,S,D]."""
    return liger().LigerRopeFunction.apply(q, k, cos, sin)


def vision_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
    """The same for a vision tower's [S,H,D]; `cos` and `sin` are [S,D]."""
    turned = rotary(q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos[None], sin[None])
    return tuple(x[0].transpose(0, 1) for x in turned)


ROTARY: dict[str, tuple[Callable[..., Any], tuple[int, ...]]] = {
    "apply_rotary_pos_emb": (rotary, (1, 4, 8, 16)),
    "apply_rotary_pos_emb_vision": (vision_rotary, (8, 4, 16)),
}
"""Functions of transformers' modelling files: what takes their place, and a shape to try it on."""


@functools.lru_cache
def _replace_rotary(file: Any, device: torch.device, dtype: torch.dtype) -> None:
    angle = torch.arange(8, device=device)[:, None] * torch.linspace(1, 0.1, 8, device=device).repeat(2)
    for name, (form, shape) in ROTARY.items():
        plain = getattr(file, name, None)
        if plain is None or hasattr(plain, "plain"):
            continue
        fused: Callable[..., Any] | None = form
        if liger():
            turn = {"cos": angle.cos(), "sin": angle.sin()}
            if len(shape) == 4:
                turn = {key: value[None] for key, value in turn.items()}
            ours, theirs = functools.partial(form, **turn), functools.partial(plain, **turn)
            if _left_out(f"{file.__name__}.{name}", trial.fault(ours, theirs, [shape, shape], device, dtype)):
                fused = None
        setattr(file, name, _on_cuda(fused, plain))


def _on_cuda(fused: Callable[..., Any] | None, plain: Callable[..., Any]) -> Callable[..., Any]:
    """`fused` for tensors on CUDA, `plain` for others: all models of a process share the function."""

    @functools.wraps(plain)
    def either(q: Tensor, k: Tensor, *others: Any, **options: Any) -> Any:
        if not q.is_cuda or options or len(others) != 2:
            return plain(q, k, *others, **options)
        # Decoding goes without, as liger's kernel is compiled anew for each number of rows; partly turned heads also.
        if fused and q.shape[-2] > 1 and others[0].shape[-1] == q.shape[-1] and liger():
            return fused(q, k, *others)
        return tuple(x.to(q.dtype) for x in plain(q, k, *others))

    either.plain = plain  # type: ignore[attr-defined]
    return either


_tried: dict[tuple[Any, ...], bool] = {}


def _replace(module: Any, method: Callable[..., Tensor], device: torch.device, dtype: torch.dtype) -> None:
    inner = 0 if method is norm else 128 + module.gate_proj.out_features % 8
    key = (type(module), inner, dtype, device)
    if key not in _tried:
        make = _small_norm if method is norm else _small_mlp

        def run(function: Callable[..., Tensor], x: Tensor, *weights: Tensor) -> Tensor:
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype.itemsize == 2):
                return function(make(module, weights), x)

        shapes = [(64, 32), (32,)] if method is norm else [(64, 32), (inner, 32), (inner, 32), (32, inner)]
        ours, theirs = functools.partial(run, method), functools.partial(run, type(module).forward)
        problem = trial.fault(ours, theirs, shapes, device, dtype, plain_dtype=dtype)
        _tried[key] = not _left_out(type(module).__name__, problem)
    if _tried[key]:
        module.forward = types.MethodType(method, module)


def _small_norm(module: Any, weights: tuple[Tensor, ...]) -> Any:
    """What a norm's forward method needs of it, with other weights."""
    return types.SimpleNamespace(weight=weights[0], variance_epsilon=module.variance_epsilon)


def _small_mlp(module: Any, weights: tuple[Tensor, ...]) -> Any:
    layers: dict[str, Any] = {"act_fn": module.act_fn}
    for name, weight in zip(("gate_proj", "up_proj", "down_proj"), weights, strict=True):
        layers[name] = layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        del layer.weight
        layer.weight = weight  # type: ignore[assignment]  # not a parameter: its gradient is compared
    return types.SimpleNamespace(**layers)


def _left_out(what: str, problem: str) -> str:
    if problem:
        warnings.warn(f"{what} is not fused ({problem}); the plain form is slower", stacklevel=2)
    return problem
