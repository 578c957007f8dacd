"""What cannot run on a fake CUDA device, and what takes its place: all of it, in one file.

Import it once the device is there (`device.load`): from then on this process is on the fake device inside
`with FAKE, METER`.
"""

import contextlib
import functools
import importlib
import json
import sys
import types
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import torch
import transformers
from meter import Meter
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._foreach_utils import _foreach_supported_types
from torch.utils._pytree import tree_map
from transformers.initialization import no_init_weights

from mm_agrae.model import fused, shared_prompt

ASSUMED: dict[str, Any] = {
    # Verdicts on numbers that a GPU has computed. The comparisons run, only their outcome is given: "no difference".
    "model/trial.py:_fault": 0.0,
    "model/shared_prompt.py:_probe": 0.0,
    "model/shared_prompt.py:require_agreement": 0.0,
    # Sampled tokens, as lists for the tokenizer.
    "rollout/hf.py:HFEngine._completions": 0,
}
"""Place of a host read -> the number it gets, where that depends on weights. Elsewhere floats are 1.0."""

RESULTS = {
    "isin": False  # no sampled token ends its completion
}
"""Operator -> what its result is taken to hold where that depends on weights."""


FAKE = FakeTensorMode(allow_non_fake_inputs=True)
METER = Meter(ASSUMED, RESULTS)


def move(module: Any, fn: Callable[[Any], Any], recurse: bool = True) -> Any:
    """In the place of Module._apply, behind `.to`, which exchanges fake tensors inside, as autograd forbids."""
    moved: dict[int, tuple[Any, Any]] = {}
    for each in module.modules():
        for own in (each._parameters, each._buffers):
            for name, old in own.items():
                if old is None:
                    continue
                if id(old) not in moved:  # a tied weight stays one
                    with torch.no_grad():
                        new = fn(old)
                    if new is not old and own is each._parameters:
                        new = torch.nn.Parameter(new, old.requires_grad)
                    moved[id(old)] = (new, old)
                own[name] = moved[id(old)][0]
    return module


def sdpa(
    query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False,
    scale: float | None = None, enable_gqa: bool = False,
) -> Any:  # fmt: skip
    """The kernel that a CUDA build would take: flash in 16 bits without a mask, else the memory-efficient one."""
    if torch.is_autocast_enabled("cuda"):
        low = torch.get_autocast_dtype("cuda")
        query, key, value = (x.to(low) for x in (query, key, value))
        attn_mask = attn_mask.to(low) if attn_mask is not None and attn_mask.is_floating_point() else attn_mask
    if attn_mask is None and query.element_size() == 2:
        aten = torch.ops.aten._scaled_dot_product_flash_attention
        return aten(query, key, value, dropout_p, is_causal, False, scale=scale)[0]
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], 1) for x in (key, value))
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, -torch.inf)
        attn_mask = attn_mask.expand(*query.shape[:3], key.shape[2])
    learns = torch.is_grad_enabled() and query.requires_grad
    aten = torch.ops.aten._scaled_dot_product_efficient_attention
    return aten(query, key, value, attn_mask, learns, dropout_p, is_causal, scale=scale)[0]


def tensor(data: Any, *args: Any, original: Any = torch.tensor, **kwargs: Any) -> Any:
    if isinstance(data, list | tuple):
        data = tree_map(lambda x: x.item() if isinstance(x, torch.Tensor) else x, data)
    return original(data, *args, **kwargs)


_probed: set[tuple[type, bool]] = set()


def probe(backbone: Any, original: Any = shared_prompt._probe) -> float:
    """The comparison of packed and plain rows, once for each kind of model: its verdict is ASSUMED anyway."""
    key = type(backbone), torch.is_autocast_enabled("cuda")
    if key in _probed:
        return 0.0
    _probed.add(key)
    return original(backbone)


class Threads(ThreadPoolExecutor):
    """A pool whose threads are on the fake device too."""

    def submit(self, function: Any, *args: Any) -> Any:  # type: ignore[override]
        def run() -> Any:
            with FAKE, METER:
                return function(*args)

        return super().submit(run)


class RMSNorm(torch.autograd.Function):
    """What torch.nn.functional.rms_norm is on CUDA; the gradients of input and weight are a kernel each."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        inverse = x.new_empty(x.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(x, weight, inverse)
        METER.launch("rms_norm", 2 * x.nbytes + weight.nbytes + inverse.nbytes)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override]
        x, weight, inverse = ctx.saved_tensors
        METER.launch("rms_norm_backward", 3 * x.nbytes + weight.nbytes + inverse.nbytes)
        if not ctx.needs_input_grad[1]:
            return torch.empty_like(x), None
        METER.launch("rms_norm_backward", 2 * x.nbytes + weight.nbytes + inverse.nbytes)
        return torch.empty_like(x), torch.empty_like(weight)


class LigerSiLUMulFunction(torch.autograd.Function):
    """silu(a) · b by one Triton kernel; the gradients overwrite a and b."""

    @staticmethod
    def forward(ctx: Any, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        ctx.save_for_backward(a, b)
        METER.launch("swiglu", 3 * a.nbytes)
        return torch.empty_like(a)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override]
        METER.launch("swiglu_backward", 5 * grad.nbytes)
        return ctx.saved_tensors


class LigerRopeFunction(torch.autograd.Function):
    """q and k turned in place by one Triton kernel, once they are [B,S,H,D] in memory."""

    @staticmethod
    def forward(ctx: Any, q: Any, k: Any, cos: Any, sin: Any) -> Any:  # type: ignore[override]
        ctx.tables = cos.nbytes + sin.nbytes
        return LigerRopeFunction.turn(ctx.tables, q, k)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:  # type: ignore[override]
        return *LigerRopeFunction.turn(ctx.tables, *grads), None, None

    @staticmethod
    def turn(tables: int, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        rows = [x.transpose(1, 2).contiguous() for x in tensors]
        METER.launch("rope", 2 * sum(x.nbytes for x in rows) + tables)
        return tuple(x.transpose(1, 2) for x in rows)


def set_liger_kernel(installed: bool) -> None:
    """From here on liger-kernel is installed, as the operators of it that the project uses, or it is not."""
    package, ops = types.ModuleType("liger_kernel"), types.ModuleType("liger_kernel.ops")
    package.__spec__ = ModuleSpec("liger_kernel", None)
    ops.LigerSiLUMulFunction, ops.LigerRopeFunction = LigerSiLUMulFunction, LigerRopeFunction  # type: ignore
    sys.modules.update({"liger_kernel": package if installed else None, "liger_kernel.ops": ops})  # type: ignore
    fused.liger.cache_clear()


STAND_INS: dict[str, Any] = {
    # torch asks the kernels that it was built with which of them fits; a CPU build knows none for CUDA.
    "torch.nn.functional:scaled_dot_product_attention": sdpa,
    # A CPU build has the composite form alone, on every device.
    "torch.nn.functional:rms_norm": lambda x, shape, weight, eps: RMSNorm.apply(x, weight),
    # swap_tensors, behind `.to`, refuses fake tensors that autograd has seen.
    "torch.nn:Module._apply": move,
    # torch's own reads a list element by element; a GPU's tensor is copied at once.
    "torch._subclasses.fake_tensor:FakeTensor.tolist": lambda x: METER.tolist(x),
    # A message with a number of the device reads it; torch's own leaves fake tensors out.
    "torch:Tensor.__format__": lambda x, spec: repr(x) if x.dim() else format(x.item(), spec),
    # It reads tensors in a list at their addresses, where a fake one has nothing.
    "torch:tensor": tensor,
    # It starts the CUDA driver, which is not there.
    "torch.cuda:set_device": lambda device: None,
    # Three forward passes of all layers for each policy, for a verdict that is assumed.
    "mm_agrae.model.shared_prompt:_probe": probe,
    # What it runs would leave the fake device.
    "mm_agrae.model.trial:ThreadPoolExecutor": Threads,
}
"""What cannot run on a fake device, "package.module:function", and what takes its place.

A function that launches Triton kernels belongs here too (liger-kernel's: see `set_liger_kernel`). A stand-in makes the
outputs with torch.empty_like and calls `METER.launch(name, bytes read and written)` once for each kernel.
"""

for _name, _stand_in in STAND_INS.items():
    _module, _attribute = _name.split(":")
    *_owner, _attribute = _attribute.split(".")
    with contextlib.suppress(ModuleNotFoundError):  # an optional package
        _target = functools.reduce(getattr, _owner, importlib.import_module(_module))
        getattr(_target, _attribute)  # raises if there is nothing to stand in for
        setattr(_target, _attribute, _stand_in)


_foreach_supported_types.append(FakeTensor)  # gradients of a GPU are clipped all at once


@contextlib.contextmanager
def load_model_files(folder: Path) -> Iterator[str]:
    """Inside, transformers makes a model of random weights for `folder`, which has a config and no weights."""

    def from_pretrained(path: str, *, dtype: Any, attn_implementation: str, **others: Any) -> Any:
        config = transformers.AutoConfig.from_pretrained(path)
        with no_init_weights():  # which would only take time
            made = loader.from_config(config, dtype=dtype, attn_implementation=attn_implementation)
        return made.eval(), {"missing_keys": set()}

    multimodal = "vision_config" in json.loads((folder / "config.json").read_text())
    loader: Any = transformers.AutoModelForImageTextToText if multimodal else transformers.AutoModelForCausalLM
    original, loader.from_pretrained = loader.from_pretrained, from_pretrained
    try:
        yield str(folder)
    finally:
        loader.from_pretrained = original
