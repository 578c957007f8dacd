"""Rules compared over seeds: runs in parallel, reuse, and what is told of them."""

import json
import os
import subprocess
import sys

import pytest
from helpers import ROOT, TEXT, run_config
from run_folders import evaluate

from mm_agrae import config as configs
from mm_agrae.run.folder import RunFolder

FAMILIES = [{"family": "charts"}] * 2 + [{"family": "counting"}] * 2
AFTER = {  # rule: correct samples of 4 for each problem, by seed; before it is 2 of 4 for all
    "grpo": {0: [4, 4, 0, 0], 1: [4, 4, 2, 0], 2: [3, 4, 4, 4]},
    "agrae": {0: [3, 3, 3, 3], 1: [4, 4, 4, 3], 2: [2, 2, 2, 2]},
}


def compare(folder, *arguments, expect=0):
    command = [sys.executable, "scripts/compare_rules.py", str(folder / "config.yaml"), "--out", str(folder / "out")]
    done = subprocess.run(
        [*command, *arguments], capture_output=True, text=True, cwd=ROOT, timeout=600,
        env=os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout + done.stderr


def write_config(folder, **sections):
    (folder / "config.yaml").write_text(configs.dump(run_config(folder / "run", TEXT, **sections)))


@pytest.fixture
def finished(tmp_path):
    """Six finished runs of a comparison, without the training; A-GRAE with another α."""
    write_config(tmp_path, advantage={"rule": "agrae"})
    for rule, seeds in AFTER.items():
        for seed, solved in seeds.items():
            path = tmp_path / "out" / f"{rule}-seed{seed}"
            own = ["advantage={rule: grpo}"] if rule == "grpo" else ["advantage.alpha=0.6"]
            config = configs.load(tmp_path / "config.yaml", [f"run_dir={path}", f"train.seed={seed}", *own])
            run = RunFolder(path).create(configs.dump(config), {"torch": "2.13.0" if seed else "2.12.0"})
            evaluate(run, "before", [2] * 4, meta=FAMILIES, full=True, parts={"rule": [1, 0, 1, 0]})
            evaluate(run, "after", solved, meta=FAMILIES, full=True, parts={"rule": [1, 1, 1, 0]})
            run.write_summary({"finished": True, "seconds": {"total": 60.0 * (1 + seed)}, "peak_memory_mb": 1234.5})
    return tmp_path


OPTIONS = ("--rules", "grpo", "agrae", "--seeds", "0", "1", "2", "--with", "agrae:advantage.alpha=0.6")


def test_figures_and_checks_of_finished_runs(finished):
    output = compare(finished, *OPTIONS)
    assert "1/6  grpo, seed 0: pass@1 50.0 → 50.0 %, pass@4 100.0 → 50.0 %, 1 min 0 s (reused)" in output
    found = json.loads((finished / "out" / "results.json").read_text())
    assert found["versions"] == {"torch": ["2.12.0", "2.13.0"]}
    assert (found["problems"], found["samples"], found["data"]) == (4, 4, "test")
    grpo, agrae = found["rules"]["grpo"], found["rules"]["agrae"]
    assert (grpo["median_seed"], agrae["median_seed"]) == (1, 0)
    assert (grpo["settings"], agrae["settings"]) == ([], ["agrae:advantage.alpha=0.6"])
    run = grpo["seeds"]["1"]
    assert run["before"]["pass@1"] == 0.5
    assert run["after"]["pass@2"] == pytest.approx((1 + 1 + 5 / 6) / 4, abs=1e-6)
    assert run["after"]["greedy"] == 0.75
    assert run["after"]["unsolved"] == 0.25
    assert run["after"]["right rule"] == 1.0  # none of the fourth problem's is correct
    assert run["families"]["counting"] == {
        "problems": 2, "before": {"pass@1": 0.5, "pass@4": 1.0}, "after": {"pass@1": 0.25, "pass@4": 0.5}
    }  # fmt: skip
    assert run["checks"] == {
        "changes": {"pass@1": 0.125, "pass@4": -0.25},
        "families_fallen": {"counting": {"pass@4": -0.5}},
        "greedy_at_least_pass@1": True,
    }
    assert (run["seconds"], run["peak_memory_mb"]) == (120.0, 1234.5)
    text = (finished / "out" / "results.md").read_text()
    assert "| before training | 50.0 | " in text
    assert "| grpo | 68.8 ± 22.5 |" in text  # of 50, 62.5 and 93.75; A-GRAE: 75, 93.75 and 50
    assert "| agrae | 72.9 ± 21.9 |" in text
    assert (
        "- grpo: pass@1 rose in 2 of 3 seeds, pass@4 fell in 2, a family fell in 2, "
        "greedy is at least pass@1 in 3; the median seed by pass@1 is 1."
    ) in text
    assert "| grpo | counting | 2 | 50.0 | 41.7 ± 52.0 | -8.3 ± 52.0 | 1 | 100.0 | 50.0 ± 50.0 |" in text
    assert "| grpo | 0 | +0.0 | -50.0 | counting -50.0 at pass@1, counting -100.0 at pass@4 | yes |" in text
    assert "| grpo | 1 (median) |" in text
    assert "with `agrae:advantage.alpha=0.6`" in text
    assert (finished / "out" / "compare.html").is_file()


def test_a_finished_run_of_other_settings_is_not_passed_off(finished):
    output = compare(finished, *OPTIONS[:-1], "agrae:advantage.alpha=0.7", expect=1)
    assert "agrae-seed0 holds a finished run of other settings (advantage.alpha); delete it or choose" in output


def test_settings_that_cannot_be(tmp_path):
    write_config(tmp_path)
    assert "write RULE:key=value with a rule of --rules (grpo, agrae)" in compare(
        tmp_path, "--with", "dapo:a=1", expect=2
    )
    assert "advantage.rule" in compare(tmp_path, "--rules", "grop", expect=1)
    assert "evaluate.after=true" in compare(tmp_path, "evaluate.after=false", expect=1)
    assert not (tmp_path / "out").exists()


def test_runs_in_parallel_and_a_run_that_fails(tmp_path):
    write_config(tmp_path, train={"steps": 1}, reward={"parts": {"accuracy": 1.0, "rule": 0}})
    options = ("--rules", "grpo", "agrae", "--seeds", "3", "--jobs", "2", "--with", "agrae:advantage.alpha=0.6")
    output = compare(tmp_path, *options)
    assert "2/2  " in output
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {rule: list(each["seeds"]) for rule, each in found["rules"].items()} == {"grpo": ["3"], "agrae": ["3"]}
    assert "step 1/1" in (tmp_path / "out" / "agrae-seed3.log").read_text()
    assert "alpha: 0.6" in (tmp_path / "out" / "agrae-seed3" / "config.yaml").read_text()
    again = compare(tmp_path, *options)
    assert again.count("(reused)") == 2
    output = compare(tmp_path, "model.path=no/such/model", "--rules", "grpo", "--seeds", "4", expect=1)
    assert "error: grpo, seed 4 did not finish; its output is in " in output
    assert "no/such/model" in output
