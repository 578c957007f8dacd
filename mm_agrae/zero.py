"""Weights spread over processes by DeepSpeed's ZeRO-3, where accelerate's launcher asks for it.

DeepSpeed gathers the weights of a module for its forward and backward pass and sums gradients
into each process's part of them. The norm of the gradient, what is done about it, and the learning
rate are ours, as with DDP and FSDP2. What learns stays in float32; DeepSpeed's own modes of 16
bits stay off, since `Policy.autocast` decides on those.

DeepSpeed is imported when it is asked for only.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from mm_agrae.errors import ConfigError

SIZES = {
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps",
    "steps_per_print", "wall_clock_breakdown", "zero_optimization", "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
}  # fmt: skip
"""Keys of a DeepSpeed config that may say what they like: they are set here, or of no weight."""
STAGE = {
    "stage", "offload_optimizer", "offload_param", "overlap_comm", "contiguous_gradients",
    "sub_group_size", "reduce_bucket_size", "stage3_prefetch_bucket_size",
    "stage3_param_persistence_threshold", "stage3_model_persistence_threshold",
    "stage3_max_live_parameters", "stage3_max_reuse_distance",
    "stage3_gather_16bit_weights_on_model_save", "round_robin_gradients", "allgather_sequential",
}  # fmt: skip
"""Keys of its zero_optimization that do not change what is computed."""
MOMENTS = ("exp_avg", "exp_avg_sq")


def asked_for() -> bool:
    """Whether accelerate's launcher was told to use DeepSpeed."""
    from accelerate.utils import parse_flag_from_env

    return parse_flag_from_env("ACCELERATE_USE_DEEPSPEED")


@contextlib.contextmanager
def unseen_by_accelerate() -> Iterator[None]:
    """Within, accelerate starts the processes' connection and nothing of DeepSpeed."""
    asked = os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
    try:
        yield
    finally:
        if asked is not None:
            os.environ["ACCELERATE_USE_DEEPSPEED"] = asked


def settings() -> dict[str, Any]:
    """The `zero_optimization` of accelerate's config, or of the DeepSpeed config it names.

    Raises ConfigError for what would change the arithmetic or is not supported, and where
    DeepSpeed is missing.
    """
    from accelerate.utils import DeepSpeedPlugin

    if importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(
            "the accelerate config asks for DeepSpeed, which is not installed; run "
            "pip install 'mm-agrae[deepspeed]', or use configs/accelerate/fsdp2.yaml"
        )
    try:
        found: Mapping[str, Any] = DeepSpeedPlugin().deepspeed_config
    except (ValueError, OSError) as error:
        raise ConfigError(f"the DeepSpeed config cannot be used: {error}") from error
    return checked(found)


def checked(found: Mapping[str, Any]) -> dict[str, Any]:
    """The `zero_optimization` of a DeepSpeed config. Raises ConfigError as `settings`."""
    stage = {k: v for k, v in found["zero_optimization"].items() if v not in ("auto", None)}
    if stage.get("stage") != 3:
        raise ConfigError(
            f"the DeepSpeed config asks for ZeRO stage {stage.get('stage')}, and stage 3 is "
            "supported: set zero_stage: 3; for copies of the model use multi_gpu.yaml"
        )
    for key in ("offload_optimizer", "offload_param"):
        device = (offload := dict(stage.pop(key, {}))).get("device", "none")
        if device not in ("none", "cpu") or offload.get("ratio", 1) != 1:
            raise ConfigError(f"the DeepSpeed config sets {key} to {offload}; cpu or none fit")
        if device == "cpu":
            stage[key] = {"device": "cpu", "pin_memory": offload.get("pin_memory", False)}
    others = {k: v for k, v in found.items() if k not in SIZES} | {
        f"zero_optimization.{k}": v for k, v in stage.items() if k not in STAGE
    }
    for key, value in others.items():
        value = value.get("enabled", True) if isinstance(value, Mapping) else value
        if value not in ("auto", None, False, 0, "none"):
            raise ConfigError(
                f"the DeepSpeed config sets {key}, which is not supported; remove it. The config "
                "of mm-agrae decides on precision (model.dtype), clipping (update.max_grad_norm), "
                "optimiser and schedule"
            )
    return {key: value for key, value in stage.items() if key in STAGE}


class Zero3:
    """The form in which each process keeps a part of every weight, gradient and moment.

    `stage` is what `settings` gives.
    """

    sharded = True

    def __init__(self, stage: Mapping[str, Any], device: torch.device):
        os.environ.setdefault("DS_ACCELERATOR", device.type)
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        # About calls that DeepSpeed makes.
        warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)
        self._device, self._world = device, dist.get_world_size()
        self._config = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "steps_per_print": sys.maxsize,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "zero_optimization": {"memory_efficient_linear": False, **stage},
        }
        self._engine: Any = None
        self._hidden: Callable[[], contextlib.AbstractContextManager[None]]

    def shard(self, policy: Any) -> None:
        """Spread the weights and move what is left to the device; before the optimiser is made."""
        policy.shard(self._spread)
        policy.release = self._release

    def _spread(self, module: nn.Module, layers: Iterable[str], whole: Iterable[nn.Module]) -> None:
        import deepspeed

        deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)
        kept = list(whole)
        # A frozen vision tower runs once a prompt, which is not the same number everywhere.
        self._hidden = lambda: _without(module, kept)
        with self._hidden():
            deepspeed.zero.Init(module=module, config_dict_or_path=self._config)
        for buffer in module.buffers():
            buffer.data = buffer.data.to(self._device)
        for part in kept:
            part.to(self._device)

    def _release(self) -> None:
        if self._engine is not None:
            with self._hidden():
                self._engine.empty_partition_cache()

    def prepare(self, policy: Any, optimizer: Any) -> tuple[Any, Any]:
        import deepspeed

        # The policy's own forward pass uses them, not the head's.
        for parameter in policy.hf.get_output_embeddings().parameters():
            deepspeed.zero.register_external_parameter(policy, parameter)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        with self._hidden():
            self._engine, *_ = deepspeed.initialize(
                model=policy, optimizer=optimizer, config=self._config
            )
        return self._engine, _Optimizer(self._engine, optimizer, parameters, self._hidden)

    def micro_batch(self, module: Any, last: bool) -> contextlib.AbstractContextManager[Any]:
        self._engine.set_gradient_accumulation_boundary(last)
        return contextlib.nullcontext()

    def backward(self, loss: torch.Tensor) -> None:
        self._engine.backward(loss * self._world)  # DeepSpeed takes the mean over processes

    def clip(self, parameters: list[nn.Parameter], most: float) -> float:
        from deepspeed.utils import safe_get_local_grad, safe_set_local_grad

        # One by one: where moments are in main memory, each part is a copy on the device.
        parts = (safe_get_local_grad(parameter) for parameter in parameters)
        squares = sum(torch.linalg.vector_norm(part).double().square() for part in parts)
        dist.all_reduce(squares)
        norm = math.sqrt(squares)
        if math.isfinite(norm) and norm > most:
            for parameter in parameters:
                part = safe_get_local_grad(parameter)
                safe_set_local_grad(parameter, part * (most / (norm + 1e-6)))
        return norm


class _Optimizer:
    """What the trainer needs of an optimiser. Moments in its state dict are this process's parts.

    Adam's count of steps is one for all parameters, as DeepSpeed keeps them in one tensor.
    """

    def __init__(
        self,
        engine: Any,
        optimizer: torch.optim.Optimizer,
        parameters: list[nn.Parameter],
        hidden: Callable[[], contextlib.AbstractContextManager[None]],
    ):
        self._engine, self._adam, self._hidden = engine, optimizer, hidden
        self._parameters = parameters

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        (group,) = self._adam.param_groups
        return [group | {"params": self._parameters}]

    def step(self) -> None:
        with self._hidden():
            self._engine.step()

    def zero_grad(self) -> None:
        zero = self._engine.optimizer
        zero.zero_grad()
        # Else a weight without a gradient in the next step would get its last one again.
        zero.grad_partitions_flat_buffer.zero_()
        for flat in zero.fp32_partitioned_groups_flat:
            if flat.grad is not None:
                flat.grad.zero_()

    def state_dict(self) -> dict[str, Any]:
        from deepspeed.utils import safe_get_local_optimizer_state

        indices = range(len(self._parameters))
        state: dict[int, dict[str, Any]] = {}
        if self._adam.state:
            step = next(iter(self._adam.state.values()))["step"].cpu()
            for index, p in enumerate(self._parameters):
                parts = {key: safe_get_local_optimizer_state(p, key) for key in MOMENTS}
                state[index] = {"step": step.clone(), **parts}
        return {"state": state, "param_groups": [self.param_groups[0] | {"params": [*indices]}]}

    def load_state_dict(self, found: dict[str, Any]) -> None:
        from deepspeed.utils import safe_set_local_optimizer_state

        (group,), (saved,) = self._adam.param_groups, found["param_groups"]
        group.update({key: value for key, value in saved.items() if key != "params"})
        self._adam.state.clear()
        if not found["state"]:
            return
        # Fewer steps than the others has a weight that had no gradient for some of them.
        step = max(float(values["step"]) for values in found["state"].values())
        for flat in self._engine.optimizer.fp32_partitioned_groups_flat:
            place = flat.device if group.get("fused") or group.get("capturable") else "cpu"
            self._adam.state[flat] = {
                "step": torch.tensor(step, dtype=torch.float32, device=place),
                **{key: torch.zeros_like(flat.detach()) for key in MOMENTS},
            }
        for index, values in found["state"].items():
            for key in MOMENTS:
                safe_set_local_optimizer_state(self._parameters[index], values[key], key)


@contextlib.contextmanager
def _without(module: nn.Module, parts: list[nn.Module]) -> Iterator[None]:
    """Within, `parts` are no submodules of `module`; their places stay empty."""
    ids = {id(part) for part in parts}
    places = [
        (owner, name, child)
        for owner in module.modules()
        for name, child in owner._modules.items()
        if id(child) in ids
    ]
    for owner, name, _ in places:
        owner._modules[name] = None
    try:
        yield
    finally:
        for owner, name, child in places:
            owner._modules[name] = child
