"""Parameters sharded over processes by FSDP2, and put together where whole ones are needed.

Each process keeps a shard of every parameter, its gradient and its optimiser state; FSDP2 gathers one unit (a layer)
at a time for the forward and the backward pass, by collective calls that all processes make in the same order.
Sampling cannot do that, because processes take different numbers of decoding steps, and files want whole tensors. For
both a `GatheredReplica` of the model is filled with gathered weights, used without any communication, and emptied.
"""

import copy
from collections.abc import Collection, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


def shard(
    module: nn.Module,
    layers: Collection[str],
    whole: Iterable[nn.Module] = (),
    *,
    device: torch.device,
    reshard_after_forward: bool = True,
    offload: bool = False,
) -> None:
    """Shard the parameters of `module` over all processes, in place, and move it to `device`.

    Every submodule of a class named in `layers` is a unit; what is left is one more, gathered for
    the whole of the module's forward and backward pass. The parts in `whole`, frozen ones that
    are also used elsewhere, are kept whole on every process. With `offload` shards, gradients and
    optimiser state stay in the CPU's memory, and a unit is copied to the device when it is used.
    """
    kept = [part.to(device) for part in whole]
    ignored = {parameter for part in kept for parameter in part.parameters()}
    offloading = CPUOffloadPolicy(pin_memory=device.type == "cuda") if offload else OffloadPolicy()
    options: dict[str, Any] = {
        "mesh": init_device_mesh(device.type, (dist.get_world_size(),)),
        "ignored_params": ignored,
        "offload_policy": offloading,
    }
    for unit in [each for each in module.modules() if type(each).__name__ in layers]:
        if not ignored.issuperset(unit.parameters()):
            fully_shard(unit, reshard_after_forward=reshard_after_forward, **options)
    root: Any = fully_shard(module, **options)
    # A parameter without a gradient on one process may have one on another. Before torch 2.13 there is no such call.
    if hasattr(root, "set_reduce_scatter_unused_params"):
        root.set_reduce_scatter_unused_params(True)


def reshard(module: nn.Module) -> None:
    """Drop what a forward pass without a backward pass has left gathered."""
    for each in module.modules():
        if isinstance(each, FSDPModule):
            each.reshard()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself, or of a shard all of it, gathered by a collective call."""
    tensor = tensor.detach()
    if not isinstance(tensor, DTensor):
        return tensor
    # Offloaded shards are on the CPU, and are gathered by way of the device.
    on_device: Any = tensor.to(tensor.device_mesh.device_type)
    return on_device.full_tensor()


def shard_like(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """This process's shard of a whole tensor that every process holds, sharded as `like` is."""
    if not isinstance(like, DTensor) or isinstance(value, DTensor):
        return value
    mesh = like.device_mesh
    value = value.to(mesh.device_type)
    return distribute_tensor(value, mesh, like.placements, src_data_rank=None).to(like.device)


@torch.no_grad()
def set_parameter(parameter: nn.Parameter, value: torch.Tensor) -> None:
    """Set a parameter, from a shard or a whole tensor, while nothing of it is gathered."""
    parameter.copy_(shard_like(value, parameter.detach()))


class GatheredReplica:
    """A copy of a model without weights of its own. Make it before the model is sharded."""

    def __init__(self, model: nn.Module):
        empty = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in model.parameters()}
        self.model = copy.deepcopy(model, dict(empty))  # parameters are taken from this memo

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
                target = value.device if device is None else device
                made[id(parameter)] = nn.Parameter(value.to(target if keep else "meta"), parameter.requires_grad)
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
    """An optimiser's state dict with whole tensors, in the CPU's memory and by a collective call if they are sharded.

    The same on any number of processes; one that sets `keep` to False gets None for tensors.
    torch.distributed.checkpoint.state_dict is not used: it refuses a state in which a parameter
    has not had a gradient yet, as a vision tower before the first image.
    """

    def gathered(value: Any) -> Any:
        if not hasattr(value, "full_tensor"):
            return value
        tensor = whole(value)
        return tensor.cpu() if keep else None

    found = optimizer.state_dict()
    # In new dictionaries: those of the state dict are the optimiser's own.
    state = {
        index: {name: gathered(value) for name, value in values.items()} for index, values in found["state"].items()
    }
    return {**found, "state": state}


def load_whole_state(optimizer: Any, found: dict[str, Any]) -> None:
    """Load what `whole_state` returned into an optimiser, whose parameters may be sharded."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def sharded(value: Any, like: torch.Tensor) -> Any:
        is_moment = isinstance(value, torch.Tensor) and value.shape == like.shape
        return shard_like(value, like) if is_moment else value

    state = {
        index: {name: sharded(value, parameters[index]) for name, value in values.items()}
        for index, values in found["state"].items()
    }
    optimizer.load_state_dict({**found, "state": state})
