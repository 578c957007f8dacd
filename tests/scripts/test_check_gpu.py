"""scripts/check_gpu.py at small shapes on a CPU: the code that runs on a GPU."""

import argparse
import json
import os
import subprocess
import sys

import pytest
from helpers import ROOT

sys.path.append(str(ROOT / "scripts"))
import check_gpu


def check(out, *arguments, budget=500, **environment):
    command = [sys.executable, check_gpu.__file__, "--out", str(out), "--budget", str(budget), "--tiny", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=590, env={**os.environ, **environment})
    return done, json.loads((out / "gpu.json").read_text())


def test_parts_report_what_they_measured(tmp_path):
    done, report = check(tmp_path, "--only", "env", "attention")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [*report["parts"]] == ["env", "attention"]
    assert {part["status"] for part in report["parts"].values()} == {"ok"}
    assert report["versions"]["torch"]
    assert report["parts"]["env"]["figures"]["copy GB/s"] > 0
    attention = report["parts"]["attention"]
    assert all(0 <= attention["figures"][f"{name} error"] < 1e-5 for name in ("out", "dq", "dk", "dv"))
    assert "64x16 G=4 repeated ms" in attention["figures"]
    assert attention["skipped"] == ["the self-test of FlashAttention needs CUDA"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["gpu.json", "parts.log"]


def test_a_part_that_fails_costs_no_other(tmp_path):
    # `models` finds none to load; `env` needs none.
    done, report = check(tmp_path, "--only", "env", "models", MM_AGRAE_WARM_START=str(tmp_path / "nowhere"))
    assert done.returncode == 1
    assert "models     failed" in done.stdout
    assert report["parts"]["env"]["status"] == "ok"
    models = report["parts"]["models"]
    assert models["status"] == "failed"
    assert all("nowhere" in error for error in models["errors"][:2])
    cases = {error.split(":")[0] for error in models["errors"]}
    assert {"image against the CPU", "text trained", "bf16 trained", "resumed"} < cases


def test_a_part_is_stopped_at_its_limit(tmp_path):
    options = argparse.Namespace(out=tmp_path, tiny=True)
    found = check_gpu.run("models", options, 1.5)
    assert found["status"] == "failed"
    assert 1.5 <= found["seconds"] < 5
    assert found["errors"][0].startswith("stopped after 2 s")


def test_what_does_not_fit_the_budget_is_skipped(tmp_path):
    done, report = check(tmp_path, budget=10)
    assert done.returncode == 1, "nothing ran"
    assert [*report["parts"]] == [*check_gpu.PARTS]
    assert all(part["skipped"] == ["budget"] for part in report["parts"].values())


def test_an_output_folder_that_cannot_be_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    command = [sys.executable, check_gpu.__file__, "--out", str(tmp_path / "file"), "--tiny"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2
    assert "file: File exists" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_every_part_passes_on_a_cpu(tmp_path):
    done, report = check(tmp_path)
    assert done.returncode == 0, done.stdout
    assert {name: part["status"] for name, part in report["parts"].items()} == dict.fromkeys(check_gpu.PARTS, "ok")
    figures = report["parts"]["update"]["figures"]
    assert figures["shared against repeated gradients"] < 5e-2
    assert figures["full MFU"] > 0
    assert report["parts"]["nccl"]["figures"]["backend"] == "gloo"
