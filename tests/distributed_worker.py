"""One step of several runs, in as many processes as this is started in; what came out is saved.

Arguments: the file to save to, then a config for each run; FSDP2 is used for those called fsdp….
"""

import os
import sys

import torch
from accelerate.state import AcceleratorState

from mm_agrae import config as configs
from mm_agrae import sharding
from mm_agrae.compat import prepare
from mm_agrae.progress import Reporter
from mm_agrae.records import RunFolder
from mm_agrae.trainer import Trainer


def first_step(config, fsdp: bool) -> dict:
    """Gradients before they are cut, weights after a step, and what the step was about."""
    os.environ["ACCELERATE_USE_FSDP"] = str(fsdp).lower()
    os.environ["FSDP_VERSION"] = "2"
    AcceleratorState._reset_state()
    trainer = Trainer(config, Reporter(enabled=False))
    assert trainer.policy.is_sharded == (fsdp and trainer.world > 1)
    gradients = []
    take = trainer._optimiser_step

    def watched():
        named = trainer.policy.model.named_parameters()
        gradients.append(
            {
                n: torch.zeros_like(p) if p.grad is None else sharding.whole(p.grad).clone()
                for n, p in named
                if p.requires_grad
            }
        )
        return take()

    trainer._optimiser_step = watched
    trainer.train()
    with trainer.policy.gathered():
        learning = {
            name: p.detach().clone()
            for name, p in trainer.policy.model.named_parameters()
            if p.requires_grad
        }
        whole = {name: tensor.clone() for name, tensor in trainer.policy.full_weights()}
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
        found[path] = first_step(configs.load(path), fsdp="/fsdp" in path)
    if int(os.environ.get("RANK", "0")) == 0:
        torch.save(found, out)
