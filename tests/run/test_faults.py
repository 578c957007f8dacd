"""What goes wrong around a run costs no more than the step it strikes.

After each fault the same config is run again and must end with the weights of a run that nothing
happened to.
"""

import json
import os
import subprocess
from contextlib import ExitStack, contextmanager

import pytest
import torch
from helpers import TEXT, run_config, small_files
from hypothesis import given, settings
from hypothesis import strategies as st

from mm_agrae.errors import ModelError, RunFolderError, UserError
from mm_agrae.progress import Reporter
from mm_agrae.run import checkpoint
from mm_agrae.run.folder import RunFolder
from mm_agrae.trainer import Trainer

STEPS = 3


def make(run_dir, reporter=None, **sections):
    sections = {
        "train": {"steps": STEPS},
        "evaluate": {"before": False, "after": False},
        "update": {"mini_batch_prompts": 2, "schedule": "cosine"},
        "model": {"lora": {"rank": 4, "alpha": 8, "dropout": 0.1}},
    } | sections
    return Trainer(run_config(run_dir, TEXT, **sections), reporter or Reporter(enabled=False))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The weights at the end of a run that nothing happened to."""
    trainer = make(tmp_path_factory.mktemp("whole"))
    trainer.train()
    return dict(trainer.policy.model.named_parameters())


def goes_on(run_dir, whole, after=None, **sections):
    """The same config again ends as the run that nothing happened to; it starts `after` a step."""
    trainer = make(run_dir, **sections)
    assert after is None or trainer.steps_done == after
    trainer.train()
    assert [row["step"] for row in RunFolder(run_dir).read_metrics()] == [1, 2, 3]
    same = (torch.equal(p, whole[n]) for n, p in trainer.policy.model.named_parameters())
    assert all(same)


def checkpoints(run_dir):
    """Names of the checkpoints, all of which are whole."""
    found = checkpoint.candidates(run_dir / "checkpoints")
    assert [checkpoint.damaged(path) for path in found] == [[]] * len(found)
    assert not list((run_dir / "checkpoints").glob(".*"))
    return [path.name for path in reversed(found)]


# ---------------------------------------------------------------------------- the disk


@pytest.mark.parametrize(
    ("limit", "background", "every", "message"),
    [
        (1_000, False, 9, r"writing rollouts/step_000002.parquet failed.*disk or quota is full"),
        (60_000, False, 1, "checkpoints/step_000002: cannot be written"),
        (60_000, True, 1, "checkpoints/step_000002: cannot be written"),
    ],
    ids=["rollouts", "checkpoint", "background"],
)
def test_a_disk_that_fills_up(tmp_path, whole, limit, background, every, message):
    sections = {"checkpoint": {"every": every, "background": background}}
    trainer = make(tmp_path, **sections)
    step = trainer.step
    with ExitStack() as stack:

        def filling():
            if trainer.steps_done == 1:
                trainer.checkpointer.wait()
                stack.enter_context(small_files(limit))
            return step()

        trainer.step = filling
        with pytest.raises(RunFolderError, match=message):
            trainer.train()
    assert checkpoints(tmp_path) == ["step_000001"] * (every == 1)
    goes_on(tmp_path, whole, after=int(every == 1), **sections)


@contextmanager
def tmpfs(folder, size):
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("needs the right to mount")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_file_system_that_is_full_and_then_read_only(tmp_path, whole):
    with tmpfs(tmp_path / "disk", "1200k") as disk:
        sections = {"checkpoint": {"every": 1, "keep": 9}}
        with pytest.raises(RunFolderError, match="No space left"):
            make(disk / "run", **sections).train()
        names = checkpoints(disk / "run")
        assert 1 <= len(names) < STEPS
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        with pytest.raises(RunFolderError, match="read-only here: choose another run_dir"):
            make(disk / "run", **sections).train()
        assert checkpoints(disk / "run") == names
        subprocess.run(["mount", "-o", "remount,rw,size=64m", str(disk)], check=True)
        goes_on(disk / "run", whole, after=len(names), **sections)


# ---------------------------------------------------------------------------- the run itself


@pytest.mark.parametrize("where", ["rollout", "update"])
def test_an_engine_or_a_gpu_that_breaks_down(tmp_path, whole, capsys, where):
    """In the rollout of step 3: a checkpoint of step 2 is saved. In the update, whose first half
    has changed the weights: none, for half a step is never saved."""
    trainer = make(tmp_path, Reporter())
    target, name = (trainer.engine, "generate") if where == "rollout" else (trainer.updater, "optimiser_step")
    working = getattr(target, name)

    def breaking(*arguments, **options):
        if trainer.policy.version == (4 if where == "rollout" else 5):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return working(*arguments, **options)

    setattr(target, name, breaking)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        trainer.train()
    shown = " ".join(capsys.readouterr().out.split())
    assert "failed after step 2" in shown
    saved = ["step_000002"] if where == "rollout" else []
    assert checkpoints(tmp_path) == saved
    assert ("the same command goes on from" in shown) == bool(saved)
    goes_on(tmp_path, whole, after=2 * len(saved))


def test_rewards_that_are_nan_and_workers_that_die(tmp_path):
    order = make(tmp_path / "order").collector.order
    first = order.peek(2)
    (tmp_path / "mine.py").write_text(
        f"import os, signal\nKILLED, NAN = {first}\n"
        "def reward(example, completion):\n"
        "    number = int(example.id.rpartition('-')[2])\n"
        "    if number == KILLED:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return float('nan') if number == NAN else 0.5\n"
    )
    part = f"{tmp_path / 'mine.py'}:reward"
    make(tmp_path / "run", train={"steps": 1}, reward={"parts": {"accuracy": 1.0, part: 1.0}}).train()
    run = RunFolder(tmp_path / "run")
    records = run.read_rollouts(1)
    failed = [r for r in records if r["error"]]
    assert any("nan, not a finite number" in r["error"] for r in failed)
    assert any("SIGKILL" in r["error"] or "killed" in r["error"] for r in failed)
    assert len(failed) < len(records)
    assert not any(r["success"] for r in failed)
    assert all(r["reward"] == r["parts"]["accuracy"] + r["parts"][part] for r in records)
    assert run.read_metrics()[0]["reward/errors"] == len(failed)


def test_bad_gradients_are_counted_over_a_resume(tmp_path):
    sections = {"checkpoint": {"every": 1}, "update": {"max_bad_gradients": 1}}
    trainer = make(tmp_path, train={"steps": 1}, **sections)
    parameter = next(iter(trainer.policy.trainable_parameters()))
    parameter.register_hook(lambda gradient: gradient * float("nan"))
    trainer.train()
    trainer = make(tmp_path, train={"steps": 2}, **sections)
    parameter = next(iter(trainer.policy.trainable_parameters()))
    parameter.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(ModelError, match="not finite 2 times in a row"):
        trainer.train()
    assert RunFolder(tmp_path).read_metrics()[-1]["update/bad_gradients"] == 1


# ---------------------------------------------------------------------------- checkpoints


def test_checkpoints_that_cannot_be_taken_up(tmp_path, capsys):
    make(tmp_path, train={"steps": 2}, checkpoint={"every": 1}, update={}).train()
    sections = {"train": {"steps": 3}, "update": {}}
    states = sorted(tmp_path.glob("checkpoints/step_*/mm_agrae.json"))
    earlier, last = (json.loads(path.read_text()) for path in states)

    def put(path, state, **changed):
        path.write_text(json.dumps(state | changed))

    put(states[1], last, format=99, versions={"mm_agrae": "9.9"})
    message = r"step_000002 is of format 99 \(written by mm-agrae 9\.9\).*reads format 1.*run_dir"
    with pytest.raises(RunFolderError, match=message):
        make(tmp_path, **sections)

    put(states[1], last, versions=last["versions"] | {"torch": "2.0.0", "peft": "0.1"})
    assert make(tmp_path, Reporter(), **sections).steps_done == 2
    shown = " ".join(capsys.readouterr().out.split())
    assert "may differ in the last digits: peft 0.1 -> " in shown
    assert "torch 2.0.0 -> " in shown

    states[1].write_text("{")
    assert make(tmp_path, Reporter(), **sections).steps_done == 1
    assert "step_000002 is damaged" in " ".join(capsys.readouterr().out.split())

    put(states[0], earlier, sha256=earlier["sha256"] | {"training.pt": "0"})
    with pytest.raises(RunFolderError, match=r"all checkpoints.*damaged.*--overwrite"):
        make(tmp_path, **sections)


class Dangerous:
    """Unpickling it would make a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_checkpoint_cannot_run_code(tmp_path):
    folder, harm = tmp_path / "step_000001", tmp_path / "harm"
    folder.mkdir()
    torch.save({"optimizer": Dangerous(harm), "scheduler": {}}, folder / "training.pt")
    sums = {"training.pt": checkpoint._checksum(folder / "training.pt")}
    counts = dict.fromkeys(checkpoint.COUNTS, 1)
    (folder / "mm_agrae.json").write_text(json.dumps({"sha256": sums, **counts}))
    assert checkpoint.damaged(folder) == []
    with pytest.raises(RunFolderError, match=r"training\.pt cannot be read"):
        checkpoint.restore(folder, None)
    assert not harm.exists()
    torch.load(folder / "training.pt", weights_only=False)  # and this is what was kept out
    assert harm.exists()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)
known = st.sampled_from(["sha256", "format", "versions", *checkpoint.COUNTS])


@settings(max_examples=100, deadline=None)
@given(st.one_of(st.binary(max_size=60), json_values, st.dictionaries(known, json_values)))
def test_any_state_file_is_taken_or_refused(tmp_path_factory, content):
    folder = tmp_path_factory.getbasetemp() / "state"
    folder.mkdir(exist_ok=True)
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    (folder / "mm_agrae.json").write_bytes(data)
    with pytest.raises(UserError, match=str(folder)):  # there is no training.pt in any case
        checkpoint.restore(folder, None)
