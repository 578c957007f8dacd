"""The shipped configs on published data: real diagrams, real text, the embedded checkpoints.

The small model solves none of it; that the path is whole is the point.
"""

from pathlib import Path

import pytest
from helpers import REAL_DATA

from mm_agrae import config as configs
from mm_agrae.progress import Reporter
from mm_agrae.records import RunFolder
from mm_agrae.trainer import Trainer

CONFIGS = Path(__file__).parent.parent / "configs"


@pytest.mark.skipif(not REAL_DATA.is_dir(), reason="no data sets; set MM_AGRAE_DATA")
@pytest.mark.parametrize("name", ["geometry3k", "math", "gsm8k"])
def test_a_shipped_config_trains_on_its_data(tmp_path, name, monkeypatch):
    monkeypatch.chdir(CONFIGS.parent)
    shipped = configs.load(CONFIGS / f"{name}.yaml")
    sources = {"train": shipped.data.train, "evaluate": shipped.data.evaluate}
    paths = [
        f"data.{split}.{index}.path={REAL_DATA / name / Path(source.options['path']).name}"
        for split, found in sources.items()
        for index, source in enumerate(found)
    ]
    limits = [f"data.evaluate.{index}.limit=2" for index in range(len(shipped.data.evaluate))]
    config = configs.load(
        CONFIGS / f"{name}.yaml",
        [*paths, *limits, f"run_dir={tmp_path}", "train.steps=2", "rollout.max_new_tokens=32",
         "evaluate.samples=2", "evaluate.max_new_tokens=32"],
    )  # fmt: skip
    Trainer(config, Reporter(enabled=False)).train()
    run = RunFolder(tmp_path)
    for row in run.read_metrics():
        assert 0 <= row["success/mean"] <= 1
        assert 0 < row["completions/mean_tokens"] <= 32
        assert row["update/grad_norm"] >= 0
    records = run.read_rollouts(1)
    assert all(record["answer"] for record in records)
    assert bool(records[0]["images"]) == (name == "geometry3k")
    assert {result.name for result in run.read_evaluations()} == {"before", "after"}
