"""One step of several runs, in as many processes as this is started in; what came out is saved.

Arguments: the file to save to, then a config for each run; those called fsdp… are spread by FSDP2,
those called zero… by ZeRO-3.
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


def gradient(parameter) -> torch.Tensor:
    if hasattr(parameter, "ds_tensor"):
        from deepspeed.utils import safe_get_full_grad

        return safe_get_full_grad(parameter).clone()
    if parameter.grad is None:
        return torch.zeros_like(parameter)
    return sharding.whole(parameter.grad).clone()


def first_step(config, form: str = "one") -> dict:
    """Gradients before they are cut, weights after a step, and what the step was about."""
    os.environ["ACCELERATE_USE_FSDP"] = str(form == "fsdp").lower()
    os.environ["FSDP_VERSION"] = "2"
    os.environ["ACCELERATE_USE_DEEPSPEED"] = str(form == "zero").lower()
    os.environ.setdefault("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    AcceleratorState._reset_state()
    trainer = Trainer(config, Reporter(enabled=False))
    assert trainer.policy.is_sharded == (form in ("fsdp", "zero") and trainer.world > 1)
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
        form = next((form for form in ("fsdp", "zero") if f"/{form}" in path), "ddp")
        found[path] = first_step(configs.load(path), form)
    if int(os.environ.get("RANK", "0")) == 0:
        torch.save(found, out)
