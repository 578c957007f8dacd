"""Memory that runs out ends a run with one message, of which the next command can follow the advice."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import TEXT, run_config

from mm_agrae import config as configs
from mm_agrae.config.plan import RESUMABLE
from mm_agrae.errors import EngineError, OutOfMemoryError
from mm_agrae.out_of_memory import SETTINGS, during, explained
from mm_agrae.progress import Reporter
from mm_agrae.trainer import Trainer

CUDA = (
    "CUDA out of memory. Tried to allocate 2.32 GiB. GPU 0 has a total capacity of 79.19 GiB of which 512.00 MiB is "
    "free. Including non-PyTorch memory, this process has 78.60 GiB memory in use. Of the allocated memory 75.11 GiB "
    "is allocated by PyTorch, and 1.50 GiB is reserved by PyTorch but unallocated."
)
CPU = "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to allocate {} bytes."
LARGE = {
    "rollout": {"prompts_per_step": 8, "completions_per_prompt": 8, "max_new_tokens": 128, "engine": "hf"},
    "update": {"micro_batch_completions": 64},
    "evaluate": {"before": False, "after": False},
    "checkpoint": {"every": 1},
}


def starved(tmp_path, stage: str, room: int = 1 << 20) -> tuple[Path, str]:
    file = tmp_path / "config.yaml"
    file.write_text(configs.dump(run_config(tmp_path / "run", TEXT, **LARGE)))
    result = subprocess.run(
        [sys.executable, Path(__file__).with_name("starving_worker.py"), "train", file],
        capture_output=True, text=True, timeout=300,
        env=os.environ
        | {"STARVED": stage, "ROOM": str(room), "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert result.returncode == 2, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    return file, result.stderr[result.stderr.index("error: ") :]


def test_in_the_update(tmp_path):
    file, message = starved(tmp_path, "update")
    assert re.match(r"error: out of memory in update: [\d.e-]+ GiB more were asked for\. What lowers it", message)
    advice = [message.index(name) for name in ("micro_batch_completions (now 64)", "gradient_checkpointing=true")]
    assert advice == sorted(advice)
    assert "vllm" not in message
    changed = ["update.micro_batch_completions=2", "model.gradient_checkpointing=true"]
    trainer = Trainer(configs.load(file, changed), Reporter(enabled=False))
    assert trainer.steps_done == 1
    trainer.train()
    assert trainer.steps_done == 2


@pytest.mark.parametrize("room", [0, 1 << 20])
def test_in_loading(tmp_path, room):
    _, message = starved(tmp_path, "loading", room)
    assert message.startswith("error: out of memory in loading: ")
    assert "*model.lora" in message


@pytest.mark.parametrize(
    ("stage", "sections", "first", "absent"),
    [
        ("update", {}, "update.micro_batch_completions (now 16)", "micro_batch_tokens"),
        ("update", {"update": {"micro_batch_tokens": 9}}, "update.micro_batch_tokens (now 9)", "completions"),
        ("rollout", {"rollout": {"engine": "vllm"}}, "rollout.batch_completions (now 128)", "sleep"),
        ("evaluate", {}, "evaluate.batch_completions (now 256)", "vllm"),
        ("checkpoint", {"checkpoint": {"background": True}}, "checkpoint.background=false", "model."),
    ],
)
def test_advice_begins_with_what_costs_least(tmp_path, stage, sections, first, absent):
    with pytest.raises(torch.OutOfMemoryError) as caught, during("outer"), during(stage):
        raise torch.OutOfMemoryError(CUDA)
    told = explained(caught.value, run_config(tmp_path, TEXT, **sections))
    assert isinstance(told, OutOfMemoryError)
    before, advice = str(told).split("What lowers it, what costs least first: ")
    assert before == (
        f"out of memory in {stage}: 2.32 GiB more were asked for, and of the 79.2 GiB of GPU 0 0.5 GiB were free. "
    )
    assert advice.startswith(first)
    assert absent not in advice


def test_a_resumed_run_may_change_what_is_not_marked():
    names = {entry.partition("=")[0] for entry in " ".join(SETTINGS.values()).split()} - {"FSDP2"}
    for name in names:
        free = any(f"{name}.".startswith(f"{each}.") for each in RESUMABLE)
        assert free != name.startswith("*"), name


def test_the_cause_of_another_error_counts():
    engine = EngineError("the engine cannot start")
    engine.__cause__ = RuntimeError(CPU.format(3 << 30))
    assert "3 GiB more were asked for" in str(explained(engine))
    assert "the request's size is not known" in str(explained(MemoryError()))
    for other in (ValueError("no"), EngineError("lost")):
        assert explained(other) is other
