"""One step of several runs, in as many processes as this is started in; what came out is saved.

Arguments: the file to save to, then a config for each run. What its name begins with is the
parallelism strategy: ddp_…, fsdp_… or offload_… (FSDP2 with CPU offload).
"""

import itertools
import math
import os
import sys
from pathlib import Path
from unittest import mock

import torch
from accelerate.state import AcceleratorState

from mm_agrae import config as configs
from mm_agrae.model.compat import prepare
from mm_agrae.model.weights import adapter_weights
from mm_agrae.parallel import sharding
from mm_agrae.progress import Reporter
from mm_agrae.run import checkpoint
from mm_agrae.run.folder import RunFolder
from mm_agrae.trainer import Trainer

SHARDED = ("fsdp", "offload")
LAUNCHED = {name: value for name, value in os.environ.items() if name.startswith("FSDP_")}
"""What accelerate's launcher has set; a run may change it."""


def gradient(parameter) -> torch.Tensor:
    if parameter.grad is None:
        return torch.zeros(parameter.shape)
    return sharding.whole(parameter.grad).clone()


def spoil(trainer) -> None:
    """Make the last rank's first gradient NaN."""
    strategy, calls = trainer.processes.strategy, itertools.count()
    backward = strategy.backward
    last = trainer.rank == trainer.world - 1
    strategy.backward = lambda loss: backward(loss * math.nan if last and next(calls) == 0 else loss)


def first_step(config, strategy: str = "one", spoilt: bool = False) -> dict:
    """Gradients before clipping, weights after a step, and what the step was about."""
    os.environ |= LAUNCHED
    os.environ["ACCELERATE_USE_FSDP"] = str(strategy in SHARDED).lower()
    os.environ["FSDP_OFFLOAD_PARAMS"] = str(strategy == "offload").lower()
    AcceleratorState._reset_state()
    with mock.patch.object(checkpoint, "_checksum", wraps=checkpoint._checksum) as checksum:
        trainer = Trainer(config, Reporter(enabled=False))
    checksums = trainer.processes.gather([checksum.call_count], "checksums")
    assert trainer.policy.is_sharded == (strategy in SHARDED and trainer.world > 1)
    if spoilt:
        spoil(trainer)
    gradients = []
    take = trainer.updater.optimiser_step

    def watched():
        named = trainer.policy.model.named_parameters()
        gradients.append({n: gradient(p) for n, p in named if p.requires_grad})
        return take()

    trainer.updater.optimiser_step = watched
    trainer.train()
    with trainer.policy.gathered():
        learning = {name: p.detach().clone() for name, p in trainer.policy.model.named_parameters() if p.requires_grad}
    # As other engines take them: tensor by tensor, from the shards.
    whole = {name: tensor.clone() for name, tensor in trainer.policy.full_weights()}
    if config.model.lora:
        whole |= dict(adapter_weights(trainer.policy))
    run = RunFolder(config.run_dir)
    if not trainer.is_main:
        return {}
    keys = ("prompt_index", "completion", "reward", "advantage", "images", "success_before", "correction")
    keys += ("variant", "difficulty")
    return {
        "gradients": gradients,
        "learning": learning,
        "whole": whole,
        "rollouts": [[row[key] for key in keys] for row in run.read_rollouts(trainer.steps_done)],
        "metrics": run.read_metrics(),
        "data_state": trainer.collector.data_state,
        "evaluations": [result.pass_at_k for result in run.read_evaluations()],
        "checksums": checksums,
        "has_image": [bool(row["images"]) for row in run.read_rollouts(trainer.steps_done)],
    }


if __name__ == "__main__":
    prepare()
    torch.set_num_threads(1)
    out, *paths = sys.argv[1:]
    found = {}
    for path in paths:
        strategy = Path(path).stem.split("_")[0]
        found[path] = first_step(configs.load(path), strategy, spoilt="spoilt" in path)
    if int(os.environ.get("RANK", "0")) == 0:
        torch.save(found, out)
