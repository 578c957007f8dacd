"""A run in which one process fails, dies or does not come ends soon, and says which and where."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, TEXT, run_config

from mm_agrae import config as configs
from mm_agrae.errors import ConfigError
from mm_agrae.parallel.strategies import check_environment

WORKER = Path(__file__).parent / "failing_worker.py"
TROUBLES = ("fails", "dies", "dies_in_update", "sleeps", "sleeps_in_update", "starves_in_update")


@pytest.fixture(scope="module")
def ends(tmp_path_factory):
    """{trouble: [(exit status, what was said) of rank 0, of rank 1]}"""
    folder = tmp_path_factory.mktemp("ends")
    for trouble in TROUBLES:
        config = run_config(
            folder / f"run_{trouble}", TEXT,
            train={"steps": 3, "timeout_minutes": 20 / 60},
            rollout={"prompts_per_step": 2, "completions_per_prompt": 2, "max_new_tokens": 12},
            evaluate={"before": False, "after": False},
        )  # fmt: skip
        (folder / f"{trouble}.yaml").write_text(configs.dump(config))
    subprocess.run(
        [sys.executable, str(WORKER), str(folder)], check=True, timeout=900,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    return {
        trouble: [
            (int((folder / f"{trouble}.{rank}.status").read_text()), (folder / f"{trouble}.{rank}").read_text())
            for rank in (0, 1)
        ]
        for trouble in TROUBLES
    }


def test_the_main_process_speaks_for_all(ends):
    for (_, said), (_, told) in ends.values():
        assert "on 2 processes" in said
        assert said.count("step 1/3") == 1
        assert "Plan of" not in told
        assert "step 1/3" not in told


def test_a_message_reaches_all_processes(ends):
    (first, said), (second, told) = ends["fails"]
    assert (first, second) == (2, 2)
    assert told.splitlines()[-1] == "error: rows.jsonl:17: this row is bad"
    assert "error: rank 1 (" in said
    assert "failed in rollout of step 2: DataError: rows.jsonl:17: this row is bad" in said


def test_a_process_without_memory(ends):
    (first, said), (second, told) = ends["starves_in_update"]
    assert (first, second) == (2, 2)
    assert "Traceback" not in said + told
    message = "out of memory in update: 4.19e+06 GiB more were asked for. What lowers it"
    assert f"error: {message}" in told
    assert f"failed in update of step 2: OutOfMemoryError: {message}" in said


@pytest.mark.parametrize(("trouble", "stage"), [("dies", "rollout"), ("dies_in_update", "update")])
def test_a_process_that_is_killed(ends, trouble, stage):
    (first, said), (second, _) = ends[trouble]
    assert (first, second) == (2, -9)
    assert "error: rank 1 (" in said
    assert "has been gone for" in said
    assert f"it was last seen in {stage} of step 2" in said


def test_a_process_that_does_not_come(ends):
    (first, said), (second, told) = ends["sleeps"]
    assert (first, second) == (2, 2)
    assert "error: rank 0 (" in said
    assert "at refused rows of step 2 for rank 1 (" in said
    assert "which has been in rollout of step 2 for" in said
    # It cannot be woken up, so that its own watch ends it.
    assert "error: rank 0 (" in told
    assert "(rank 1 ends)" in told


def test_a_process_caught_in_a_collective_call(ends):
    """Rank 0 waits inside torch for rank 1, which sleeps: nothing there can be interrupted."""
    (first, said), (second, told) = ends["sleeps_in_update"]
    assert (first, second) == (2, 2)
    for text in (said, told):
        assert "in update of step 2" in text


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("FSDP_VERSION", "1", "fsdp_version: 2"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "fsdp_offload_params: true"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "true", "model.gradient_checkpointing"),
    ],
)
def test_what_is_not_supported_is_refused(monkeypatch, variable, value, message):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    check_environment()
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError, match=message):
        check_environment()
