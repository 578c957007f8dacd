"""The command line in one process and in two: same samples, same advantages, same weights.

tests/test_fsdp.py compares the gradients themselves.
"""

import os
import subprocess
import sys

import pytest
from helpers import VL, run_config
from safetensors.torch import load_file

from mm_agrae import config as configs
from mm_agrae.records import RunFolder


def run(folder, processes, **sections):
    config = run_config(
        folder / f"run{processes}",
        VL,
        rollout={"prompts_per_step": 5},
        update={"micro_batch_completions": 3, "mini_batch_prompts": 5, "learning_rate": 1e-3},
        evaluate={"before": False, "after": True},
        **sections,
    )
    path = folder / f"{processes}.yaml"
    path.write_text(configs.dump(config))
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    result = subprocess.run(
        [sys.executable, *launch, "-m", "mm_agrae.cli", "train", str(path)],
        capture_output=True, text=True, timeout=600, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    return RunFolder(config.run_dir), result.stdout


def test_two_processes_equal_one(tmp_path):
    (one, _), (two, output) = (run(tmp_path, n) for n in (1, 2))
    assert "on 2 processes" in output
    assert output.count("step 1/2") == 1
    for step in (1, 2):
        a, b = one.read_rollouts(step), two.read_rollouts(step)
        keys = ("prompt_index", "completion", "reward", "advantage", "images")
        assert [[row[k] for k in keys] for row in a] == [[row[k] for k in keys] for row in b]
    files = [next((r.path / "checkpoints").glob("*/*model.safetensors")) for r in (one, two)]
    first, second = (load_file(file) for file in files)
    assert first.keys() == second.keys()
    assert max((first[k] - second[k]).abs().max().item() for k in first) < 1e-5
    metrics = [r.read_metrics()[-1] for r in (one, two)]
    for name in ("update/loss", "update/grad_norm", "policy/entropy", "tokens/completion"):
        assert metrics[0][name] == pytest.approx(metrics[1][name], rel=1e-4, abs=1e-7)
    results = [r.read_evaluations()[0] for r in (one, two)]
    assert results[0].pass_at_k == results[1].pass_at_k
