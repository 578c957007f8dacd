"""A run that version 0.1.0 made, before the package was divided into folders, goes on and opens."""

import json
import tarfile
from pathlib import Path

from mm_agrae import cli
from mm_agrae.run.folder import RunFolder

OLD = Path(__file__).with_name("run_0.1.0.tar.xz")
"""Two of its steps, with the model it starts from, its config and its reward."""


def test_a_run_of_version_0_1_0_is_resumed_and_shown(tmp_path, monkeypatch, capsys):
    with tarfile.open(OLD) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    run = RunFolder("run")
    assert [row["step"] for row in run.read_metrics()] == [1, 2]
    before = run.read_rollouts(2)
    assert cli.main(["train", "config.yaml", "train.steps=4", "checkpoint.every=1"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "resumed from run/checkpoints/step_000002 after step 2" in said
    rows = run.read_metrics()
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    # Adam's moments and the data cursor have come along.
    assert rows[3]["data/epoch"] == 2 * rows[1]["data/epoch"]
    assert run.read_rollouts(2) == before
    assert len(run.read_rollouts(4)) == len(before)
    assert rows[1].keys() <= rows[3].keys()
    assert cli.main(["report", "run"]) == 0
    assert "4 steps" in Path("run/report.html").read_text()


def test_a_checkpoint_of_another_format_is_refused_with_a_sentence(tmp_path, monkeypatch, capsys):
    with tarfile.open(OLD) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    state = Path("run/checkpoints/step_000002/mm_agrae.json")
    state.write_text(json.dumps(json.loads(state.read_text()) | {"format": 0}))
    assert cli.main(["train", "config.yaml", "train.steps=4"]) == 2
    assert "is of format 0" in capsys.readouterr().err
