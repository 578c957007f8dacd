"""A run that was cut off and taken up again ends as the uninterrupted one, bit for bit."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from helpers import TEXT, VL, run_config

from mm_agrae import checkpoint
from mm_agrae import config as configs
from mm_agrae.errors import ConfigError, RunFolderError
from mm_agrae.progress import Reporter
from mm_agrae.records import RunFolder
from mm_agrae.trainer import Trainer

LORA = {"lora": {"rank": 4, "alpha": 8, "dropout": 0.1}}
NO_EVALUATION = {"before": False, "after": False}


def train(run_dir, path=VL, steps=4, **sections):
    sections = {"evaluate": NO_EVALUATION, "checkpoint": {"every": 1, "keep": 3}} | sections
    config = run_config(run_dir, path, train={"steps": steps}, **sections)
    trainer = Trainer(config, Reporter(enabled=False))
    trainer.train()
    return trainer


def same_weights(a, b):
    pairs = zip(a.policy.model.parameters(), b.policy.model.parameters(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


def records(run_dir):
    run = RunFolder(run_dir)
    return [
        (r["completion"], r["reward"], r["advantage"])
        for step in run.rollout_steps()
        for r in run.read_rollouts(step)
    ]


@pytest.mark.parametrize("path", [VL, TEXT], ids=["vl", "text"])
@pytest.mark.parametrize("model", [{}, LORA], ids=["full", "lora"])
def test_resumed_equals_uninterrupted(tmp_path, path, model):
    whole = train(tmp_path / "whole", path, model=model)
    train(tmp_path / "cut", path, steps=2, model=model)
    resumed = train(tmp_path / "cut", path, model=model)
    assert same_weights(whole, resumed)
    assert records(tmp_path / "whole") == records(tmp_path / "cut")
    steps = [row["step"] for row in RunFolder(tmp_path / "cut").read_metrics()]
    assert steps == [1, 2, 3, 4]
    assert whole.tokens_seen == resumed.tokens_seen


def test_a_named_checkpoint(tmp_path):
    whole = train(tmp_path / "whole")
    start = tmp_path / "whole" / "checkpoints" / "step_000002"
    config = run_config(
        tmp_path / "other", train={"steps": 4}, evaluate=NO_EVALUATION,
        checkpoint={"every": 1, "keep": 3},
    ).model_copy(update={"resume": str(start)})  # fmt: skip
    branch = Trainer(config, Reporter(enabled=False))
    assert branch.steps_done == 2
    branch.train()
    assert same_weights(whole, branch)


def test_a_finished_run_is_left_as_it_is(tmp_path):
    evaluate = {"before": True, "after": True}
    train(tmp_path / "run", steps=1, evaluate=evaluate)
    files = {p: p.stat().st_mtime_ns for p in (tmp_path / "run" / "evaluations").rglob("*")}
    again = train(tmp_path / "run", steps=1, evaluate=evaluate)
    assert again.steps_done == 1
    assert files == {p: p.stat().st_mtime_ns for p in (tmp_path / "run" / "evaluations").rglob("*")}


def test_other_settings_are_refused_by_name(tmp_path):
    train(tmp_path / "run", steps=1)
    with pytest.raises(ConfigError, match=r"update\.learning_rate: 0\.001 -> 0\.002"):
        train(tmp_path / "run", update={"learning_rate": 2e-3})
    with pytest.raises(ConfigError, match=r"model\.lora"):
        train(tmp_path / "run", model=LORA)
    train(tmp_path / "run", steps=2, checkpoint={"every": 2})  # has no say in the weights


def test_a_damaged_checkpoint_is_passed_over(tmp_path, capsys):
    whole = train(tmp_path / "whole")
    train(tmp_path / "run", steps=3)
    last = tmp_path / "run" / "checkpoints" / "step_000003"
    weights = last / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    assert checkpoint.damaged(last) == ["model.safetensors"]
    config = run_config(
        tmp_path / "run", train={"steps": 4}, evaluate=NO_EVALUATION,
        checkpoint={"every": 1, "keep": 3},
    )  # fmt: skip
    resumed = Trainer(config, Reporter())
    assert "model.safetensors" in capsys.readouterr().out
    assert resumed.steps_done == 2
    resumed.train()
    assert same_weights(whole, resumed)
    (last / "mm_agrae.json").write_text(json.dumps({"sha256": {"gone": "0"}}))
    with pytest.raises(RunFolderError, match="damaged"):
        checkpoint.restore(last, resumed.policy)


def test_half_a_checkpoint_does_not_count(tmp_path):
    train(tmp_path / "run", steps=2)
    folder = tmp_path / "run" / "checkpoints"
    (folder / "step_000002" / "mm_agrae.json").unlink()
    (folder / ".step_000003.partial").mkdir()
    assert checkpoint.newest(folder) == folder / "step_000001"


def test_a_checkpoint_on_a_full_disk_costs_nothing_before_it(tmp_path, monkeypatch):
    trainer = train(tmp_path / "run", steps=2)

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    trainer.steps_done = 3
    with pytest.raises(RunFolderError, match="No space left on device"):
        trainer.save()
    folder = tmp_path / "run" / "checkpoints"
    assert sorted(p.name for p in folder.iterdir()) == ["step_000001", "step_000002"]
    assert checkpoint.damaged(folder / "step_000002") == []


def start_process(config, folder):
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(configs.dump(config))))
    command = [sys.executable, "-m", "mm_agrae.cli", "train", str(path)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )


def wait_for_step(run_dir, step, process):
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        if len(RunFolder(run_dir).read_metrics()) >= step:
            return
        time.sleep(0.02)


def test_killed_at_random_moments(tmp_path):
    """SIGKILL strikes wherever it strikes; the same command goes on."""
    sections = {"evaluate": NO_EVALUATION, "checkpoint": {"every": 1, "keep": 2}}
    whole = train(tmp_path / "whole", TEXT, steps=8, **sections)
    config = run_config(tmp_path / "run", TEXT, train={"steps": 8}, **sections)
    for kill_after in (2, 5):
        process = start_process(config, tmp_path)
        wait_for_step(tmp_path / "run", kill_after, process)
        time.sleep(random.random() * 0.3)
        process.kill()
        process.communicate()
    process = start_process(config, tmp_path)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    resumed = Trainer(config, Reporter(enabled=False))
    assert resumed.steps_done == 8
    assert same_weights(whole, resumed)
    assert records(tmp_path / "whole") == records(tmp_path / "run")


def test_sigterm_finishes_the_step_and_saves(tmp_path):
    config = run_config(tmp_path / "run", TEXT, train={"steps": 200}, evaluate=NO_EVALUATION)
    process = start_process(config, tmp_path)
    wait_for_step(tmp_path / "run", 2, process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert "the same command goes on from there" in output
    steps = len(RunFolder(tmp_path / "run").read_metrics())
    assert checkpoint.newest(tmp_path / "run" / "checkpoints").name == f"step_{steps:06d}"
