"""Parallelism strategies: what each process holds of the model, gradients and optimiser state.

`Replicated` keeps a copy on every process (DDP), `Fsdp2` a shard, on the GPU or, with `fsdp_offload_params: true`, in
the CPU's memory. accelerate's launcher chooses, by environment variables.
"""

import contextlib
import os
from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin, parse_flag_from_env
from torch import nn

from mm_agrae.errors import ConfigError
from mm_agrae.parallel.sharding import shard

Shard = Callable[[nn.Module, Collection[str], Iterable[nn.Module]], None]
"""Shards a module in place: (module, class names of its layers, parts to leave whole)."""


class Replicated:
    """Every process holds a copy of the model (DDP), or there is only one process."""

    sharded = offloads = False
    shard: Shard | None = None

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator

    def prepare(self, policy: nn.Module, optimizer: Any) -> tuple[Any, Any]:
        """The module whose backward pass sums gradients over all processes; the optimiser."""
        if self.accelerator.num_processes == 1:  # torchrun starts one as if it were several
            return policy, self.accelerator.prepare(optimizer)
        return self.accelerator.prepare(policy, optimizer)

    def micro_batch(self, module: Any, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Around forward and backward pass; gradients are summed over processes in the `last`."""
        return contextlib.nullcontext() if last else self.accelerator.no_sync(module)

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradient of a loss whose denominator counts all processes."""
        # DDP and FSDP2 average over processes; the sum is wanted.
        self.accelerator.backward(loss * self.accelerator.num_processes)

    def clip(self, parameters: list[nn.Parameter], max_norm: float) -> float:
        """Clip the gradient to `max_norm`; returns the norm it had, over all processes."""
        norm = self.accelerator.clip_grad_norm_(parameters, max_norm)
        return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)


class Fsdp2(Replicated):
    """Every process holds a shard of every weight, gradient and moment (FSDP2)."""

    sharded = True

    def __init__(self, accelerator: Accelerator):
        super().__init__(accelerator)
        self.shard = self._shard
        self.offloads = _offloads()

    def _shard(self, module: nn.Module, layers: Collection[str], whole: Iterable[nn.Module]) -> None:
        # accelerate itself ignores what its launcher was told about FSDP on a CPU.
        plugin = FullyShardedDataParallelPlugin()
        shard(
            module,
            layers,
            whole,
            device=self.accelerator.device,
            reshard_after_forward=bool(plugin.reshard_after_forward),
            offload=self.offloads,
        )

    def prepare(self, policy: nn.Module, optimizer: Any) -> tuple[Any, Any]:
        return policy, optimizer

    def micro_batch(self, module: Any, last: bool) -> contextlib.AbstractContextManager[Any]:
        # Reduced after every micro-batch: whole gradients, kept until the last, would not fit.
        return contextlib.nullcontext()


def make_strategy(accelerator: Accelerator) -> Replicated:
    """The strategy that accelerate's launcher asks for."""
    sharded = accelerator.num_processes > 1 and parse_flag_from_env("ACCELERATE_USE_FSDP")
    return Fsdp2(accelerator) if sharded else Replicated(accelerator)


def _offloads() -> bool:
    return parse_flag_from_env("ACCELERATE_USE_FSDP") and parse_flag_from_env("FSDP_OFFLOAD_PARAMS")


def backend(on_cpu: bool) -> str | None:
    """The backend of torch.distributed; None leaves the choice to accelerate."""
    # Gradients that are offloaded are clipped in the CPU's memory, over all processes.
    wanted = _offloads() and not on_cpu and torch.cuda.is_available()
    return "cpu:gloo,cuda:nccl" if wanted else None


def check_environment() -> None:
    """Raise ConfigError for settings of accelerate's launcher that are not supported.

    Call it before anything is loaded: it changes one that would be harmful.
    """
    # Asked for it, transformers gives all ranks but 0 zeros for weights, and expects accelerate to send them.
    # `Processes.loading_device` loads once too, without that memory and also on resuming.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        raise ConfigError(
            "the accelerate config asks for DeepSpeed, which is not supported; use "
            "configs/accelerate/fsdp2.yaml, with fsdp_offload_params: true to keep weights and "
            "optimiser state in the CPU's memory"
        )
    if not parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise ConfigError("the accelerate config asks for FSDP 1; set fsdp_version: 2")
    if parse_flag_from_env("FSDP_ACTIVATION_CHECKPOINTING"):
        raise ConfigError(
            "the accelerate config sets fsdp_activation_checkpointing; use "
            "model.gradient_checkpointing=true in its place"
        )
