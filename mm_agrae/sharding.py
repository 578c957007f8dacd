"""Weights spread over processes, and put together again where whole ones are needed.

Each process keeps a slice of every parameter, its gradient and its optimiser state. FSDP2 (here)
or DeepSpeed (`zero`) gathers one unit (a layer) at a time for the forward and the backward pass, by
collective calls that all processes must make in the same order. Sampling cannot do that, as
processes take different numbers of decoding steps, and files want whole tensors: for both a `Twin`
of the model is filled with gathered weights, used without any communication, and emptied.

FSDP2's parameters are DTensors. Those of ZeRO-3 are empty, and this process's part of one, flat
and padded to the same size everywhere, is its attribute `ds_tensor`; `ds_shape` is the whole's.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn


def shard(
    module: nn.Module,
    layers: Collection[str],
    whole: Iterable[nn.Module] = (),
    *,
    device: torch.device,
    reshard_after_forward: bool = True,
) -> None:
    """Spread the parameters of `module` over all processes, in place, and move it to `device`.

    Every submodule of a class named in `layers` is a unit; what is left is one more, gathered for
    the whole of the module's forward and backward pass. The parts in `whole`, frozen ones that
    are also used elsewhere, are kept whole on every process.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    kept = [part.to(device) for part in whole]
    ignored = {parameter for part in kept for parameter in part.parameters()}
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    units = [each for each in module.modules() if type(each).__name__ in layers]
    for unit in units:
        if not ignored.issuperset(unit.parameters()):
            fully_shard(
                unit, mesh=mesh, reshard_after_forward=reshard_after_forward, ignored_params=ignored
            )
    root: Any = fully_shard(module, mesh=mesh, ignored_params=ignored)
    # A parameter without a gradient on one process may have one on another.
    root.set_reduce_scatter_unused_params(True)


def reshard(module: nn.Module) -> None:
    """Drop what a forward pass without a backward pass has left gathered."""
    from torch.distributed.fsdp import FSDPModule

    for each in module.modules():
        if isinstance(each, FSDPModule):
            each.reshard()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself, its shards gathered if it has any: then a collective call."""
    return _joined(_own(tensor), tensor)


def _own(tensor: torch.Tensor) -> torch.Tensor:
    """What this process keeps of a tensor. Shares memory with it."""
    return getattr(tensor, "ds_tensor", tensor).detach()


def _joined(part: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The whole of what is spread as the parameter `like` is; `part` if that is not spread."""
    from torch.distributed.tensor import DTensor

    if isinstance(part, DTensor):
        return part.full_tensor()
    if not hasattr(like, "ds_tensor") or part.shape != like.ds_tensor.shape:
        return part
    flat = part.new_empty(dist.get_world_size() * part.numel(), device=like.device)
    dist.all_gather([*flat.view(-1, part.numel())], part.to(like.device))
    return flat[: like.ds_numel].view(like.ds_shape)  # type: ignore[attr-defined]


def spread_like(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """This process's part of a whole tensor that all processes hold, spread as `like` is."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    own = _own(like)
    if hasattr(like, "ds_tensor") and value.shape == like.ds_shape:  # type: ignore[attr-defined]
        size = own.numel()
        found = value.flatten()[dist.get_rank() * size :][:size].to(own)
        return nn.functional.pad(found, (0, size - found.numel()))
    if not isinstance(own, DTensor) or isinstance(value, DTensor):
        return value
    value = value.to(own.device)
    return distribute_tensor(value, own.device_mesh, own.placements, src_data_rank=None)


def kept(parameter: nn.Parameter) -> torch.Tensor:
    """A copy of what this process keeps of a parameter, for `put`."""
    return _own(parameter).clone()


@torch.no_grad()
def put(parameter: nn.Parameter, value: torch.Tensor) -> None:
    """Set a parameter, from a shard or a whole tensor, once nothing of it is left gathered."""
    own, part = _own(parameter), spread_like(value, parameter)
    own.copy_(part)
    if hasattr(parameter, "_z3_optimizer"):
        from deepspeed.utils import safe_set_local_fp32_param

        safe_set_local_fp32_param(parameter, part)  # another copy, if that is in main memory


class Twin:
    """A copy of a model that has no weights of its own; make it before the model is sharded."""

    def __init__(self, model: nn.Module):
        empty = {
            id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad)
            for p in model.parameters()
        }
        self.model = copy.deepcopy(model, dict(empty))  # what it finds there is not copied

    @torch.no_grad()
    def fill(
        self,
        model: nn.Module,
        *,
        device: torch.device | str | None = None,
        learning_only: bool = False,
        keep: bool = True,
    ) -> None:
        """Put the weights of the sharded `model` together: a collective call.

        They are moved to `device`, if one is given. With `learning_only` what is frozen stays
        empty. A process that has no use for them says so by `keep`, and takes part all the same.
        """
        made: dict[int, nn.Parameter] = {}  # tied ones are gathered once
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if learning_only and not parameter.requires_grad:
                continue
            if id(parameter) not in made:
                value = whole(parameter)
                place = value.device if device is None else device
                made[id(parameter)] = nn.Parameter(
                    value.to(place if keep else "meta"), parameter.requires_grad
                )
            _assign(self.model, "_parameters", name, made[id(parameter)])
        for name, buffer in model.named_buffers(remove_duplicate=False):
            _assign(self.model, "_buffers", name, buffer)

    def empty(self) -> None:
        """Give the memory back."""
        for module in self.model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and not parameter.is_meta:
                    module._parameters[name] = nn.Parameter(
                        torch.empty_like(parameter, device="meta"), parameter.requires_grad
                    )


def _assign(model: nn.Module, kind: str, name: str, value: torch.Tensor) -> None:
    owner, _, last = name.rpartition(".")
    getattr(model.get_submodule(owner), kind)[last] = value


def whole_state(optimizer: Any, keep: bool = True) -> dict[str, Any]:
    """An optimiser's state dict; shards are put together in main memory, by a collective call.

    The same on any number of processes. One that sets `keep` to False may get tensors left out.
    """

    def gathered(value: Any, like: torch.Tensor) -> Any:
        tensor = _joined(value, like) if isinstance(value, torch.Tensor) else value
        if tensor is value:
            return value
        return tensor.cpu() if keep else None

    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    found = optimizer.state_dict()
    # In new dictionaries: those of the state dict are the optimiser's own.
    state = {
        index: {name: gathered(value, parameters[index]) for name, value in values.items()}
        for index, values in found["state"].items()
    }
    return {**found, "state": state}


def load_whole_state(optimizer: Any, found: dict[str, Any]) -> None:
    """Put what `whole_state` gave into an optimiser, whose parameters may be sharded."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def spread(value: Any, like: torch.Tensor) -> Any:
        shape = getattr(like, "ds_shape", like.shape)
        moment = isinstance(value, torch.Tensor) and value.shape == shape
        return spread_like(value, like) if moment else value

    state = {
        index: {name: spread(value, parameters[index]) for name, value in values.items()}
        for index, values in found["state"].items()
    }
    optimizer.load_state_dict({**found, "state": state})
