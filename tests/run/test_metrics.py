"""Trackers, the stopwatch and peak memory."""

import logging
import math
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from helpers import run_config

from mm_agrae import config as configs
from mm_agrae.errors import ConfigError
from mm_agrae.run import metrics
from mm_agrae.run.folder import RunFolder
from mm_agrae.run.metrics import MetricLogger, Stopwatch, peak_memory, peak_memory_mb


@pytest.fixture
def folder(tmp_path):
    return RunFolder(tmp_path / "run").create("model: {path: m}\n", {"torch": "2"})


def test_tensorboard_gets_the_same_numbers(folder):
    log = MetricLogger(folder, sinks=("tensorboard",), config={"a": 1})
    log.log(1, {"reward/mean": torch.tensor(0.5), "update/loss": math.nan})
    log.log(2, {"reward/mean": 0.75})
    log.close()
    assert folder.read_metrics()[0] == {"step": 1, "reward/mean": 0.5, "update/loss": None}
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder.path / "tensorboard")).Reload()
    assert events.Tags()["scalars"] == ["reward/mean"]
    assert [(e.step, e.value) for e in events.Scalars("reward/mean")] == [(1, 0.5), (2, 0.75)]


def test_trackio_gets_the_same_numbers(folder):
    """Kept on this machine, in a folder of conftest.py; the dashboard is not started."""
    trackio = pytest.importorskip("trackio")
    log = MetricLogger(folder, sinks=("trackio",), project="mine", config=configs.public(run_config(folder.path)))
    log.log(1, {"reward/mean": torch.tensor(0.5), "update/loss": math.nan})
    log.log(2, {"reward/mean": 0.75})
    log.close()
    (run,) = trackio.Api().runs("mine")
    assert run.name == "run"
    assert run.config["update"]["learning_rate"] == 1e-3
    logged = trackio.SQLiteStorage.get_logs("mine", "run")
    assert [(row["step"], row["reward/mean"]) for row in logged] == [(1, 0.5), (2, 0.75)]
    assert not any("update/loss" in row for row in logged)


def test_wandb_gets_the_same_numbers(folder, monkeypatch):
    """Without a network it writes what `wandb sync` would upload."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    log = MetricLogger(folder, sinks=("wandb",), project="mine", config=configs.public(run_config(folder.path)))
    log.log(1, {"reward/mean": torch.tensor(0.5), "update/loss": math.nan})
    log.log(2, {"reward/mean": 0.75})
    log.close()
    (file,) = folder.path.glob("wandb/offline-run-*/run-*.wandb")
    for _ in range(300):  # written by a process of wandb's own
        if b"0.75" in (stored := file.read_bytes()):  # records whose values are JSON text
            break
        time.sleep(0.1)
    assert all(text in stored for text in (b"mine", b"learning_rate", b"reward/mean", b"0.75"))
    assert b"update/loss" not in stored


@pytest.mark.parametrize("sink", ["wandb", "trackio"])
def test_a_tracker_that_is_not_installed_names_the_extra(folder, monkeypatch, sink):
    monkeypatch.setitem(sys.modules, sink, None)
    with pytest.raises(ConfigError, match=rf"{sink}.*pip install 'mm-agrae\[trackers\]'"):
        MetricLogger(folder, sinks=(sink,))


def test_a_tracker_that_cannot_start(folder):
    (folder.path / "tensorboard").write_text("")
    with pytest.raises(ConfigError, match=r"tensorboard, which cannot start .*remove it from"):
        MetricLogger(folder, sinks=("tensorboard",))


def test_a_tracker_that_fails_is_reported_once_and_the_run_continues(folder, caplog):
    log = MetricLogger(folder, sinks=("tensorboard",))
    log._trackers["tensorboard"].finish()
    shutil.rmtree(folder.path / "tensorboard")  # and it can't open another file either
    (folder.path / "tensorboard").write_text("")
    with caplog.at_level(logging.WARNING):
        for step in range(3):
            log.log(step, {"x": step})
        log.close()
    assert sum("tensorboard failed" in line for line in caplog.messages) == 1
    assert [row["x"] for row in folder.read_metrics()] == [0, 1, 2]


def test_stopwatch_sums_stages_and_laps():
    stopwatch = Stopwatch()
    for _ in range(2):
        with stopwatch("rollout"):
            time.sleep(0.02)
    with pytest.raises(KeyError), stopwatch("update"):
        raise KeyError
    lap = stopwatch.lap()
    assert 0.04 <= lap["seconds/rollout"] <= lap["seconds/total"]
    assert lap["cpu_seconds/rollout"] < lap["seconds/rollout"]
    assert "seconds/update" in lap
    assert set(stopwatch.lap()) == {"seconds/total", "cpu_seconds/total"}
    assert stopwatch.totals["seconds/rollout"] == lap["seconds/rollout"]
    assert stopwatch.totals["seconds/total"] > lap["seconds/total"]


def test_peak_memory_rises_and_is_this_processs_own():
    before = peak_memory_mb()
    block = np.ones(300 << 17)  # 300 MiB
    after = peak_memory_mb()
    assert after >= max(before, 300)
    code = "from mm_agrae.run.metrics import peak_memory_mb; print(peak_memory_mb())"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert 5 < float(child.stdout) < 200  # the parent's 300 MiB are not counted as the child's
    del block
    assert peak_memory_mb() > after - 2  # the kernel counts pages a little loosely


def test_peak_gpu_memory_is_logged_where_a_gpu_is_used(monkeypatch):
    """Where there is none, torch's counter stands in: what is tested is what reaches the metrics."""
    if not torch.cuda.is_available():
        assert peak_memory().keys() == {"memory/peak_mb"}
        stand_in = type("Cuda", (), {"max_memory_allocated": staticmethod(lambda: 3 << 20)})
        monkeypatch.setattr(metrics, "_used_cuda", lambda: stand_in)
        assert peak_memory()["memory/peak_gpu_mb"] == 3
    else:
        torch.zeros(1 << 20, device="cuda")
        assert peak_memory()["memory/peak_gpu_mb"] >= 4
