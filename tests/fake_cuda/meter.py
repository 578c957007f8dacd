"""What a GPU would do, counted on fake tensors: kernels, bytes, FLOPs, memory, and what the host waits for.

A fake tensor has no numbers. Those that steer the program (lengths, masks, positions, image sizes) come from the host
and are small, so `Meter` computes each operator on small tensors of known content a second time, for real, on the CPU:
a read by the host then gets the true number. A number that depends on weights is not known; a read of it gets the
value that `assumed` gives for the place of the read.
"""

import gc
import os
import sys
import weakref
from collections import Counter
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import flop_registry

BYTES_PER_SECOND, LAUNCH = 2.6e12, 3e-6
FLOP_PER_SECOND = {2: 650e12, 4: 45e12}
"""By the size in bytes of a product's inputs: tensor cores in 16 bits, float32 without TF32."""
KNOWN_AT_MOST = 1 << 20
"""Elements of a tensor whose content is followed."""

aten = torch.ops.aten
# No kernel, though they are no views in torch's eyes.
_FREE = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "_unsafe_view", "lift_fresh",
         "detach", "alias", "set_", "sym_size", "resize_"}  # fmt: skip
# Read and write only what they pick.
_PICKING = {"index_select", "gather", "embedding", "index", "slice"}
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
_UNKNOWN = object()


class _Content:
    """What a tensor holds, as an attribute of it."""

    def __init__(self, value: Tensor):
        self.value = value

    def __deepcopy__(self, memo: Any) -> "_Content":
        with no_dispatch():
            return _Content(self.value.clone())


def _tensors(values: Any) -> list[Tensor]:
    """Those in an operator's arguments or results, which are nested once at most."""
    if isinstance(values, Tensor):
        return [values]
    if not isinstance(values, list | tuple):
        return []
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += [x for x in value if isinstance(x, Tensor)]
    return found


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


@dataclass
class Counts:
    """Of one stretch of work. `reads` are those for which the host waits, `uploads` copies to the device."""

    kernels: int = 0
    seconds: float = 0.0
    bytes: int = 0
    flops: Counter[int] = field(default_factory=Counter)
    peak: int = 0
    by_operator: Counter[str] = field(default_factory=Counter)
    attention: Counter[tuple[str, int]] = field(default_factory=Counter)
    reads: Counter[str] = field(default_factory=Counter)
    uploads: Counter[str] = field(default_factory=Counter)

    def __sub__(self, other: "Counts") -> "Counts":
        """What this stretch has more than one that it begins with."""
        names = [each.name for each in fields(self) if each.name != "peak"]
        return Counts(**{name: getattr(self, name) - getattr(other, name) for name in names}, peak=self.peak)


class Meter(TorchDispatchMode):
    """Counts what is dispatched to the device. Enter it inside a FakeTensorMode.

    `assumed` gives, for a place "file:function", the value of a number that only a GPU could know; 1.0 for floats of
    other places. `results` gives, for an operator's name, what its unknown result is taken to hold.
    """

    def __init__(self, assumed: dict[str, Any], results: dict[str, Any]):
        super().__init__()
        self.assumed, self.results = assumed, results
        self.counts = Counts()
        self._live: dict[int, int] = {}
        self._held = self._base = 0
        self._stale: dict[int, Tensor] = {}  # known values overwritten by unknown ones, kept alive

    def start(self) -> None:
        """Count from here on; memory above what is held now."""
        gc.collect()
        self.counts = Counts()
        self._base = self._held

    # ------------------------------------------------------------------ dispatch

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled, and torch's guard against it takes longer than the counting

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:
            return args[0].device
        kwargs = kwargs or {}
        name = func._overloadpacket.__name__
        if name in ("_local_scalar_dense", "equal"):
            return self._read(func, args)
        args = self._without_masks(name, args)
        if torch.Tag.dynamic_output_shape in func.tags and name != "index":
            out = self._sized(func, args, kwargs)
        else:
            out = func(*args, **kwargs)
            self._follow(func, name, args, kwargs, out)
        self._count(func, name, args, kwargs, out)
        return out

    def _count(self, func: Any, name: str, args: Any, kwargs: Any, out: Any) -> None:
        outs = _tensors(out)
        ins = _tensors(args) + _tensors(list(kwargs.values()))
        on_device = [x for x in outs if x.device.type == "cuda"]
        for x in on_device:
            self._hold(x)
        if name in ("_to_copy", "copy_"):
            self._count_transfer(name, ins, outs)
        free = func.is_view or name in _FREE or func._schema.name.startswith("prim")
        if free or not (on_device or any(x.device.type == "cuda" for x in ins)):
            return
        alien = [x for x in ins if x.device.type == "cpu" and x.dim() and name not in ("_to_copy", "copy_")]
        if alien and name in _INDEXING:  # they copy an index from the host by themselves
            self.counts.uploads[place()] += len(alien)
        elif alien:
            raise AssertionError(f"{func} at {place()} mixes CPU tensors {[tuple(x.shape) for x in alien]} with CUDA")
        moved = sum(map(_bytes, outs)) + sum(map(_bytes, ins))
        if name in _PICKING:
            moved = 2 * sum(map(_bytes, outs))
        # A flash kernel also takes its log-normaliser, in float32.
        size = min((x.element_size() for x in ins if x.is_floating_point()), default=4)
        flops = self._flops(func, name, args, kwargs, out)
        self.launch(name, moved, flops, size)
        if "attention" in name and "backward" not in name:
            self.counts.attention[name, ins[0].shape[-1]] += 1

    def launch(self, name: str, moved: int, flops: int = 0, size: int = 2) -> None:
        """Count one kernel that moves so many bytes and computes so much with inputs of `size` bytes."""
        counts = self.counts
        counts.kernels += 1
        counts.by_operator[name] += 1
        counts.bytes += moved
        if flops:
            counts.flops[size] += flops
        counts.seconds += max(moved / BYTES_PER_SECOND, flops / FLOP_PER_SECOND.get(size, 45e12), LAUNCH)

    def _flops(self, func: Any, name: str, args: Any, kwargs: Any, out: Any) -> int:
        if name in ("_flash_attention_forward", "_flash_attention_backward"):
            return self._varlen_flops(name, args)
        formula = flop_registry.get(func._overloadpacket)
        return formula(*args, **kwargs, out_val=out) if formula else 0

    def _varlen_flops(self, name: str, args: Any) -> int:
        backward = name.endswith("backward")
        query, bounds_q, bounds_k, causal = (args[i] for i in ((1, 6, 7, 11) if backward else (0, 3, 4, 8)))
        with no_dispatch():
            lengths = [self.known(bounds).long().diff() for bounds in (bounds_q, bounds_k)]
            pairs = int((lengths[0] * lengths[1]).sum()) / (2 if causal else 1)
        return int(4 * pairs * query.shape[-1] * query.shape[-2] * (2.5 if backward else 1))

    # ------------------------------------------------------------------ memory

    def _hold(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        key = storage._cdata
        if key in self._live:
            return
        size = self._live[key] = storage.nbytes()
        self._held += size
        self.counts.peak = max(self.counts.peak, self._held - self._base)
        weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self._held -= self._live.pop(key, 0)

    # ------------------------------------------------------------------ known content

    def known(self, x: Tensor) -> Tensor:
        """The content of a tensor, on the CPU. Raises AssertionError if it is not known."""
        value = self._value(x)
        if value is _UNKNOWN:
            raise AssertionError(
                f"{place()} needs the content of a tensor {tuple(x.shape)} of {x.dtype}, which depends on what a GPU "
                "computes; name the operator it comes from in RESULTS, or the place in ASSUMED"
            )
        return value

    def _value(self, x: Tensor) -> Any:
        if not isinstance(x, FakeTensor):
            return x
        content = getattr(x, "_content", None)
        if content is None or content.value.untyped_storage()._cdata in self._stale:
            return _UNKNOWN
        return content.value

    def _follow(self, func: Any, name: str, args: Any, kwargs: Any, out: Any) -> None:
        """Compute the content of `out` where that of all inputs is known."""
        tensors = _tensors(args) + _tensors(list(kwargs.values()))
        if func._schema.is_mutable and any(self._value(x) is _UNKNOWN for x in tensors):
            for x, argument in zip(args, func._schema.arguments, strict=False):
                written = argument.alias_info is not None and argument.alias_info.is_write
                if written and isinstance(x, FakeTensor) and self._value(x) is not _UNKNOWN:
                    value = self._value(x)
                    self._stale[value.untyped_storage()._cdata] = value
        outs = _tensors(out)
        if any(self._value(x) is _UNKNOWN for x in tensors):
            if name in self.results:
                with no_dispatch():
                    for x in outs:
                        x._content = _Content(torch.full(x.shape, self.results[name], dtype=x.dtype))
            return
        if "empty" in name:
            return
        if torch.Tag.nondeterministic_seeded in func.tags or any(x.numel() > KNOWN_AT_MOST for x in outs):
            return
        with no_dispatch():
            found = func(*self._real(args), **self._real(kwargs))
        for x, value in zip(outs, _tensors(found), strict=True):
            if isinstance(x, FakeTensor):
                x._content = _Content(value)

    def _real(self, arguments: Any) -> Any:
        def convert(x: Any) -> Any:
            if isinstance(x, Tensor):
                return self._value(x)
            return torch.device("cpu") if isinstance(x, torch.device) else x

        return tree_map(convert, arguments)

    # ------------------------------------------------------------------ what the host waits for

    def _read(self, func: Any, args: Any) -> Any:
        if any(x.device.type == "cuda" for x in args):
            self.counts.reads[place()] += 1
        values = [self._value(x) for x in args]
        if _UNKNOWN not in [v if v is _UNKNOWN else None for v in values]:
            with no_dispatch():
                return func(*values)
        return self._guess(args[0])

    def tolist(self, x: Tensor) -> Any:
        """The numbers of a tensor as a list, by one read."""
        if x.device.type == "cuda":
            self.counts.reads[place()] += 1
        value = self._value(x)
        with no_dispatch():
            return (torch.full(x.shape, self._guess(x), dtype=x.dtype) if value is _UNKNOWN else value).tolist()

    def _guess(self, x: Tensor) -> Any:
        where = place()
        if where not in self.assumed and not x.is_floating_point():
            self.known(x)  # says what is missing
        return self.assumed.get(where, 1.0)

    def _count_transfer(self, name: str, ins: list[Tensor], outs: list[Tensor]) -> None:
        source = ins[-1] if name == "copy_" else ins[0]
        pair = source.device.type, outs[0].device.type
        if pair == ("cuda", "cpu"):
            self.counts.reads[place()] += 1
        elif pair == ("cpu", "cuda") and source.dim():
            self.counts.uploads[place()] += 1

    def _without_masks(self, name: str, args: Any) -> Any:
        """An index by a mask is one by positions, whose number the host has to know."""
        if name not in _INDEXING:
            return args
        indices: list[Any] = []
        for index in args[1]:
            if index is None or index.dtype not in (torch.bool, torch.uint8):
                indices.append(index)
                continue
            content, device = self.known(index), index.device
            if device.type == "cuda":
                self.counts.reads[place()] += 1
                self.launch("nonzero", _bytes(index))
            with no_dispatch():
                positions = content.nonzero().unbind(1)
            indices += [self._fake(each, device) for each in positions]
        return (args[0], indices, *args[2:])

    def _sized(self, func: Any, args: Any, kwargs: Any) -> Any:
        """An operator whose result's shape depends on content."""
        tensors = _tensors(args) + _tensors(list(kwargs.values()))
        device = tensors[0].device
        if device.type == "cuda" and kwargs.get("output_size") is None:
            self.counts.reads[place()] += 1
        for x in tensors:
            self.known(x)
        with no_dispatch():
            found = func(*self._real(args), **self._real(kwargs))
        return tree_map(lambda x: self._fake(x, device) if isinstance(x, Tensor) else x, found)

    @staticmethod
    def _fake(value: Tensor, device: torch.device) -> Tensor:
        made = torch.empty(value.shape, dtype=value.dtype, device=device)
        made._content = _Content(value)  # type: ignore[attr-defined]
        return made


def place() -> str:
    """The innermost function outside torch that runs now, as "file:Class.function"."""
    frame: Any = sys._getframe(1)
    torch_folder, own = os.path.dirname(torch.__file__) + os.sep, os.path.dirname(__file__) + os.sep
    while frame is not None:
        code = frame.f_code
        if not code.co_filename.startswith((torch_folder, own, "<")) and not code.co_name.startswith("<"):
            file = code.co_filename.split("site-packages/")[-1].split("/mm_agrae/")[-1]
            owner = frame.f_locals.get("self")
            owner = f"{type(owner).__name__}." if owner is not None else ""
            return f"{file}:{owner}{code.co_name}"
        frame = frame.f_back
    return "(autograd)"
