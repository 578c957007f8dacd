"""A run that was cut off and taken up again ends as the uninterrupted one, bit for bit."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import yaml
from helpers import ROOT, TEXT, VL, run_config

from mm_agrae import config as configs
from mm_agrae.errors import ConfigError, RunFolderError
from mm_agrae.progress import Reporter
from mm_agrae.rollout import cache
from mm_agrae.run import checkpoint
from mm_agrae.run.folder import RunFolder
from mm_agrae.trainer import Trainer

LORA = {"lora": {"rank": 4, "alpha": 8, "dropout": 0.1}}
NO_EVALUATION = {"before": False, "after": False}


def train(run_dir, path=VL, steps=4, **sections):
    sections = {"evaluate": NO_EVALUATION, "checkpoint": {"every": 1, "keep": 3}} | sections
    config = run_config(run_dir, path, train={"steps": steps}, **sections)
    trainer = Trainer(config, Reporter(enabled=False))
    trainer.train()
    return trainer


class Killed(BaseException):
    """Ends a run as a kill does: nothing is saved on the way out."""

    @classmethod
    def during(cls, *arguments):
        raise cls


def same_weights(a, b):
    pairs = zip(a.policy.model.parameters(), b.policy.model.parameters(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


def records(run_dir):
    run = RunFolder(run_dir)
    return [
        (r["completion"], r["reward"], r["advantage"]) for step in run.rollout_steps() for r in run.read_rollouts(step)
    ]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of four steps with a checkpoint of each; tests work on copies of its folder."""
    return train(tmp_path_factory.mktemp("whole") / "run", checkpoint={"every": 1, "keep": 4})


def copied(whole, run_dir, steps):
    """The folder that `whole` had left if it had been cut off after so many steps."""
    shutil.copytree(whole.config.run_dir, run_dir, symlinks=True)
    checkpoint.forget_after(run_dir / "checkpoints", steps)
    return whole.config.model_copy(update={"run_dir": str(run_dir)})


@pytest.mark.parametrize(
    ("path", "model"),
    [(VL, LORA), (TEXT, {}), (TEXT, {"lora": {"rank": 4, "parts": ["language", "head"]}})],
    ids=["vl-lora", "text", "text-lora-head"],
)
def test_resumed_equals_uninterrupted(tmp_path, path, model):
    whole = train(tmp_path / "whole", path, model=model)
    train(tmp_path / "cut", path, steps=2, model=model)
    resumed = train(tmp_path / "cut", path, model=model)
    assert same_weights(whole, resumed)
    assert records(tmp_path / "whole") == records(tmp_path / "cut")
    steps = [row["step"] for row in RunFolder(tmp_path / "cut").read_metrics()]
    assert steps == [1, 2, 3, 4]
    assert whole.tokens_seen == resumed.tokens_seen


def test_a_named_checkpoint(tmp_path, whole):
    copied(whole, tmp_path / "first", 3)
    start = tmp_path / "first" / "checkpoints" / "step_000003"
    config = whole.config.model_copy(update={"run_dir": str(tmp_path / "other"), "resume": str(start)})
    branch = Trainer(config, Reporter(enabled=False))
    assert branch.steps_done == 3
    branch.train()
    assert same_weights(whole, branch)
    # The same command once more goes on with what it has made, also when its start is gone.
    shutil.rmtree(start)
    assert Trainer(config, Reporter(enabled=False)).steps_done == 4
    made = tmp_path / "other" / "checkpoints" / "step_000004"
    broken = shutil.copytree(made, made.with_name("step_000005"))
    (broken / checkpoint.CONFIG_FILE).write_text("}")
    assert Trainer(config, Reporter(enabled=False)).steps_done == 4
    gone = config.model_copy(update={"run_dir": str(tmp_path / "third")})
    with pytest.raises(ConfigError, match=r"resume: .*step_000003 is not a checkpoint"):
        Trainer(gone, Reporter(enabled=False))
    other = str(tmp_path / "first" / "checkpoints" / "step_000002")
    with pytest.raises(ConfigError, match=r"belongs to another run than .*other"):
        Trainer(config.model_copy(update={"resume": other}), Reporter(enabled=False))


def test_back_to_an_earlier_checkpoint_of_the_same_run(tmp_path, whole):
    config = copied(whole, tmp_path / "run", 4)
    folder = tmp_path / "run" / "checkpoints"
    config = config.model_copy(update={"resume": str(folder / "step_000003")})
    again = Trainer(config, Reporter(enabled=False))
    assert again.steps_done == 3
    again.updater.optimiser_step = Killed.during
    with pytest.raises(Killed):
        again.train()
    # Checkpoints of the course that was left must not be taken for those of the new one.
    assert checkpoint.newest(folder).name == "step_000003"
    again = Trainer(config, Reporter(enabled=False))
    again.train()
    assert same_weights(whole, again)
    assert Trainer(config, Reporter(enabled=False)).steps_done == 4


def test_rollouts_of_a_killed_step_are_read_from_the_cache(tmp_path, whole):
    config = copied(whole, tmp_path / "run", 2)
    trainer = Trainer(config, Reporter(enabled=False))
    trainer.updater.run = Killed.during
    with pytest.raises(Killed):
        trainer.train()
    kept = (tmp_path / "run" / "rollout_cache_0.safetensors").read_bytes()
    resumed = Trainer(config, Reporter(enabled=False))
    generate, sampled = resumed.engine.generate, []
    resumed.collector._mismatch_checked = True

    def counting(*arguments, **settings):
        sampled.append(resumed.steps_done)
        return generate(*arguments, **settings)

    resumed.engine.generate = counting
    resumed.train()
    assert resumed.steps_done == 4
    assert sampled == [3]
    assert same_weights(whole, resumed)
    assert records(whole.config.run_dir) == records(tmp_path / "run")
    assert not (tmp_path / "run" / "rollout_cache_0.safetensors").exists()
    # They belong to the checkpoint they were sampled after, and count only if they are whole.
    path = tmp_path / "kept"
    path.write_bytes(kept)
    assert len(cache.read(path, trainer.checkpointer.id)[0]) == 4
    assert cache.read(path, resumed.checkpointer.id) is None
    for damage in (kept[:-1], kept[:200], b""):
        path.write_bytes(damage)
        assert cache.read(path, trainer.checkpointer.id) is None


def test_the_latest_and_the_best_checkpoint(tmp_path):
    evaluate = {"before": False, "after": True, "every": 1, "samples": 4, "bootstrap": 10}
    run_dir = tmp_path / "run"
    sections = {
        "evaluate": evaluate,
        "update": {"learning_rate": 3e-2},
        "checkpoint": {"every": 2, "keep": 1, "best": "test/pass@1", "background": True},
    }
    train(run_dir, TEXT, steps=3, **sections)
    trainer = train(run_dir, TEXT, steps=5, **sections)
    values = {result.name: result.pass_at_k[1].mean for result in RunFolder(run_dir).read_evaluations()}
    values["step_000005"] = values.pop("after")
    best = max(sorted(values), key=values.get)
    assert best not in ("step_000004", "step_000005")  # else it shows nothing
    folder = run_dir / "checkpoints"
    assert [path.name for path in checkpoint.candidates(folder)] == ["step_000005", best]
    assert os.readlink(folder / "latest") == "step_000005"
    assert os.readlink(folder / "best") == best
    found = json.loads((folder / "best.json").read_text())
    assert found == {"step": int(best[-6:]), "metric": "test/pass@1", "value": values[best]}
    assert RunFolder(run_dir).read_summary()["best"] == found
    # Checkpoints are found without the links, and beside stale ones.
    (folder / "latest").unlink()
    (folder / "latest").symlink_to("step_000099")
    assert Trainer(trainer.config, Reporter(enabled=False)).steps_done == 5


@pytest.mark.parametrize(
    ("checkpoint", "evaluate", "message"),
    [
        ({"best": "test/pass@3"}, {"every": 1}, r"checkpoint\.best is 'test/pass@3'.*test/pass@"),
        ({"best": "tset/greedy"}, {"every": 1}, "did you mean 'test/greedy'"),
        ({"best": "test/greedy"}, {"every": 1, "greedy": False}, "which no evaluation measures"),
        ({"best": "test/pass@2"}, {"every": 0}, r"evaluate\.every is 0"),
    ],
)
def test_a_best_that_is_never_measured(checkpoint, evaluate, message):
    with pytest.raises(ConfigError, match=message):
        run_config("run", TEXT, checkpoint=checkpoint, evaluate=evaluate)


def test_a_background_checkpoint_is_of_the_step_it_was_taken_at(tmp_path, whole):
    """It is written only when the next step is done, and holds nothing of that step."""
    config = copied(whole, tmp_path / "run", 2)
    settings = config.checkpoint.model_copy(update={"background": True})
    trainer = Trainer(config.model_copy(update={"checkpoint": settings}), Reporter(enabled=False))
    stepped = threading.Event()
    write, record = trainer.checkpointer._write, trainer._record

    def late(*arguments):
        assert stepped.wait(60)
        write(*arguments)

    def told(*arguments):
        if trainer.steps_done == 4:
            stepped.set()
        record(*arguments)

    trainer.checkpointer._write, trainer._record = late, told
    trainer.train()
    for step in ("step_000003", "step_000004"):
        sums = [
            checkpoint.checked_state(Path(run_dir) / "checkpoints" / step)["sha256"]
            for run_dir in (whole.config.run_dir, tmp_path / "run")
        ]
        assert {n for n, s in sums[0].items() if s != sums[1][n]} == {"mm_agrae.yaml"}
        assert sums[0].keys() == sums[1].keys()


def test_a_finished_run_is_left_as_it_is(tmp_path):
    evaluate = {"before": True, "after": True}
    train(tmp_path / "run", steps=1, evaluate=evaluate)
    files = {p: p.stat().st_mtime_ns for p in (tmp_path / "run" / "evaluations").rglob("*")}
    again = train(tmp_path / "run", steps=1, evaluate=evaluate)
    assert again.steps_done == 1
    assert files == {p: p.stat().st_mtime_ns for p in (tmp_path / "run" / "evaluations").rglob("*")}


def test_a_run_keeps_the_dtype_it_began_with(tmp_path):
    """Begun where auto means bfloat16, and taken up on this machine, where it means float32."""
    train(tmp_path, TEXT, steps=1, model={"dtype": "bfloat16"})
    resumed = train(tmp_path, TEXT, steps=2)
    assert (resumed.steps_done, resumed.config.model.dtype) == (2, "bfloat16")
    assert configs.load(tmp_path / "config.yaml").model.dtype == "bfloat16"
    start = str(tmp_path / "checkpoints" / "step_000002")
    branch = run_config(tmp_path / "branch", TEXT).model_copy(update={"resume": start})
    assert Trainer(branch, Reporter(enabled=False)).config.model.dtype == "bfloat16"
    with pytest.raises(ConfigError, match=r"model\.dtype: 'bfloat16' -> 'float32'"):
        train(tmp_path, TEXT, steps=3, model={"dtype": "float32"})


def test_other_settings_are_refused_by_name(tmp_path):
    train(tmp_path / "run", steps=1)
    with pytest.raises(ConfigError, match=r"update\.learning_rate: 0\.001 -> 0\.002"):
        train(tmp_path / "run", update={"learning_rate": 2e-3})
    with pytest.raises(ConfigError, match=r"model\.lora"):
        train(tmp_path / "run", model=LORA)
    train(tmp_path / "run", steps=2, checkpoint={"every": 2})  # has no say in the weights


def test_a_damaged_checkpoint_is_passed_over(tmp_path, capsys, whole):
    config = copied(whole, tmp_path / "run", 4)
    last = tmp_path / "run" / "checkpoints" / "step_000004"
    weights = last / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    assert checkpoint.damaged(last) == ["model.safetensors"]
    resumed = Trainer(config, Reporter())
    assert "model.safetensors" in capsys.readouterr().out
    assert resumed.steps_done == 3
    resumed.train()
    assert same_weights(whole, resumed)
    (last / "mm_agrae.json").write_text(json.dumps({"sha256": {"gone": "0"}}))
    with pytest.raises(RunFolderError, match="damaged"):
        checkpoint.restore(last, resumed.policy)


def test_half_a_checkpoint_does_not_count(tmp_path, whole):
    copied(whole, tmp_path / "run", 2)
    folder = tmp_path / "run" / "checkpoints"
    (folder / "step_000002" / "mm_agrae.json").unlink()
    (folder / ".step_000003.partial").mkdir()
    assert checkpoint.newest(folder) == folder / "step_000001"
    checkpoint.prune(folder, 9)
    assert not (folder / ".step_000003.partial").exists()


def start_process(config, folder):
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(configs.dump(config))))
    command = [sys.executable, "-m", "mm_agrae.cli", "train", str(path)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def wait_for_step(run_dir, step, process):
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        if len(RunFolder(run_dir).read_metrics()) >= step:
            return
        time.sleep(0.02)


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path):
    """SIGKILL while sampling, updating, saving, and once more anywhere; the long form of this is
    the script's default."""
    out = tmp_path / "found.json"
    script = [sys.executable, str(ROOT / "scripts" / "kill_and_resume.py")]
    options = ["--runs", "3", "--cells", "text-lora", "--fresh", "0", "--out", str(out)]
    result = subprocess.run([*script, *options], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    found = json.loads(out.read_text())
    assert found["equal"] == 3
    assert found["kills"] >= 3


def test_sigterm_finishes_the_step_and_saves(tmp_path):
    config = run_config(
        tmp_path / "run", TEXT, train={"steps": 200}, evaluate=NO_EVALUATION,
        checkpoint={"background": True},
    )  # fmt: skip
    process = start_process(config, tmp_path)
    wait_for_step(tmp_path / "run", 2, process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert "the same command goes on from there" in output
    steps = len(RunFolder(tmp_path / "run").read_metrics())
    saved = checkpoint.newest(tmp_path / "run" / "checkpoints")
    assert saved.name == f"step_{steps:06d}"
    assert checkpoint.damaged(saved) == []


class SignalsInEvaluation(Reporter):
    """Sends this process a signal at the first completion of an evaluation that has one of these names."""

    def __init__(self, number, name):
        super().__init__(enabled=False)
        self.number, self.name = number, name

    @contextlib.contextmanager
    def bar(self, name, *arguments, **options):
        def advance(units):
            if self.name in name:
                os.kill(os.getpid(), self.number)
                raise AssertionError("the evaluation went on")

        yield advance


@pytest.mark.parametrize(
    ("number", "name", "steps", "status"),
    [(signal.SIGINT, "(before)", 0, 130), (signal.SIGTERM, "(step_000001)", 1, 0), (signal.SIGINT, "(after)", 2, 130)],
)
def test_a_signal_cuts_an_evaluation_short(tmp_path, number, name, steps, status):
    config = run_config(tmp_path / "run", TEXT, evaluate={"every": 1})
    trainer = Trainer(config, SignalsInEvaluation(number, name))
    trainer.train()
    assert (trainer.steps_done, trainer.stop.exit_status) == (steps, status)
    run = RunFolder(tmp_path / "run")
    assert checkpoint.newest(tmp_path / "run" / "checkpoints").name == f"step_{steps:06d}"
    assert len(run.read_evaluations()) == steps
    assert not run.read_summary()["finished"]
    Trainer(config, Reporter(enabled=False)).train()
    assert [result.name for result in run.read_evaluations()] == ["before", "step_000001", "after"]
    assert run.read_summary()["finished"]


def test_fewer_steps_than_the_run_has_done_are_refused(whole, tmp_path):
    config = copied(whole, tmp_path / "run", 4)
    fewer = config.model_copy(update={"train": config.train.model_copy(update={"steps": 3})})
    with pytest.raises(ConfigError, match="has done 4 steps, more than the 3 of"):
        Trainer(fewer, Reporter(enabled=False))
