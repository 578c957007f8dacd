"""The example run: a small run cut from a large one."""

import os
import subprocess
import sys

from helpers import ROOT
from run_folders import evaluate, make_run

from mm_agrae.run.folder import RunFolder
from mm_agrae.view.report import write_report
from mm_agrae.view.runs import RunReader


def opened(run):
    reader = RunReader(run.path)
    reader.refresh()
    return reader


def cut(run, out, *options):
    command = [sys.executable, "scripts/make_example_run.py", str(run.path), str(out), *options]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)


def test_an_example_run_shows_what_the_run_showed(tmp_path):
    run = make_run(tmp_path / "run", range(1, 31))
    evaluate(run, "before", [0, 1])
    evaluate(run, "after", [2, 3])
    run.write_summary({"steps": 30})
    done = cut(run, tmp_path / "small", "--steps", "4")
    assert done.returncode == 0, done.stderr
    small = opened(RunFolder(tmp_path / "small"))
    assert small.steps == [6, 14, 22, 30]
    assert [row["step"] for row in small.metrics] == list(range(1, 31))
    groups = small.groups(30)
    assert small.rows(30, groups) == opened(run).rows(30, groups)
    for step in small.steps:
        for row in small.folder.read_rollouts(step):
            assert all(map(small.folder.image_path, row["images"]))
    for kept, result in zip(small.folder.read_evaluations(), run.read_evaluations(), strict=True):
        assert kept == result
        assert list(small.folder.read_samples(kept)) == list(run.read_samples(result))
        assert all(small.folder.image_path(row["images"][0]) for row in run.read_samples(result))
    size = sum(path.stat().st_size for path in small.folder.path.rglob("*") if path.is_file())
    assert "Step 30: 4 groups" in write_report(small.folder.path).read_text("utf-8")
    # Again, into less room: fewer steps.
    done = cut(run, tmp_path / "small", "--steps", "4", "--limit-kb", str(size // 1000))
    assert done.returncode == 0, done.stderr
    assert len(opened(RunFolder(tmp_path / "small")).steps) < 4


def test_an_example_run_takes_no_folder_that_holds_something_else(tmp_path):
    run = make_run(tmp_path / "run", [1])
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "text").write_text("precious")
    done = cut(run, tmp_path / "thesis")
    assert (done.returncode, done.stderr) == (
        2, f"error: {tmp_path / 'thesis'} exists and is not a run folder; it is left alone\n"
    )  # fmt: skip
    done = cut(run, tmp_path / "small", "--limit-kb", "0")
    assert done.returncode == 2
    assert "train with fewer prompts_per_step" in done.stderr
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["run", "thesis"]
