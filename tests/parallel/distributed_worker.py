"""One step of several runs, in as many processes as this is started in; what came out is saved.

Arguments: the file to save to, then a config for each run. What its name begins with is the form of
the model: ddp_…, fsdp_…, zero_… (ZeRO-3) or offload_… (ZeRO-3, all that can be in main memory).
"""

import itertools
import math
import os
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState

from mm_agrae import config as configs
from mm_agrae.model.compat import prepare
from mm_agrae.model.weights import adapter_weights
from mm_agrae.parallel import sharding
from mm_agrae.progress import Reporter
from mm_agrae.run.records import RunFolder
from mm_agrae.trainer import Trainer


def gradient(parameter) -> torch.Tensor:
    if hasattr(parameter, "ds_tensor"):
        from deepspeed.utils import safe_get_full_grad

        return safe_get_full_grad(parameter).clone()
    if parameter.grad is None:
        return torch.zeros_like(parameter)
    return sharding.whole(parameter.grad).clone()


def spoil(trainer) -> None:
    """Have the last process's first gradient be no number."""
    backward, calls = trainer.processes.backward, itertools.count()
    last = trainer.rank == trainer.world - 1
    trainer.processes.backward = lambda loss: backward(
        loss * math.nan if last and next(calls) == 0 else loss
    )


def first_step(config, form: str = "one", spoilt: bool = False) -> dict:
    """Gradients before they are cut, weights after a step, and what the step was about."""
    os.environ["ACCELERATE_USE_FSDP"] = str(form == "fsdp").lower()
    os.environ["FSDP_VERSION"] = "2"
    os.environ["ACCELERATE_USE_DEEPSPEED"] = str(form in ("zero", "offload")).lower()
    os.environ["ACCELERATE_DEEPSPEED_ZERO_STAGE"] = "3"
    for part in ("OPTIMIZER", "PARAM"):
        device = "cpu" if form == "offload" else "none"
        os.environ[f"ACCELERATE_DEEPSPEED_OFFLOAD_{part}_DEVICE"] = device
    AcceleratorState._reset_state()
    trainer = Trainer(config, Reporter(enabled=False))
    sharded = form in ("fsdp", "zero", "offload") and trainer.world > 1
    assert trainer.policy.is_sharded == sharded
    if spoilt:
        spoil(trainer)
    gradients = []
    take = trainer._optimiser_step

    def watched():
        named = trainer.policy.model.named_parameters()
        gradients.append({n: gradient(p) for n, p in named if p.requires_grad})
        return take()

    trainer._optimiser_step = watched
    trainer.train()
    with trainer.policy.gathered():
        learning = {
            name: p.detach().clone()
            for name, p in trainer.policy.model.named_parameters()
            if p.requires_grad
        }
    # As engines of other kinds take them: tensor by tensor, from the shards.
    whole = {name: tensor.clone() for name, tensor in trainer.policy.full_weights()}
    if config.model.lora:
        whole |= dict(adapter_weights(trainer.policy))
    run = RunFolder(config.run_dir)
    if not trainer.is_main:
        return {}
    keys = ("prompt_index", "completion", "reward", "advantage", "images")
    return {
        "gradients": gradients,
        "learning": learning,
        "whole": whole,
        "rollouts": [[row[key] for key in keys] for row in run.read_rollouts(trainer.steps_done)],
        "metrics": run.read_metrics(),
        "evaluations": [result.pass_at_k for result in run.read_evaluations()],
        "pictured": [bool(row["images"]) for row in run.read_rollouts(trainer.steps_done)],
    }


if __name__ == "__main__":
    prepare()
    torch.set_num_threads(1)
    out, *paths = sys.argv[1:]
    found = {}
    for path in paths:
        form = Path(path).stem.split("_")[0]
        found[path] = first_step(configs.load(path), form, spoilt="spoilt" in path)
    if int(os.environ.get("RANK", "0")) == 0:
        torch.save(found, out)
