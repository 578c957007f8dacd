"""Studies: the file, the grid, runs trained once, and pages made from the records alone."""

import json
import os
import signal
import subprocess
import sys
import time
import xml.dom.minidom

import pytest
import yaml
from helpers import ROOT, TEXT, run_config
from run_folders import evaluate, metrics

from mm_agrae import config as configs
from mm_agrae.errors import ConfigError, RunFolderError
from mm_agrae.evaluation.study import START, choose, load, record_of, runs_of, write_record
from mm_agrae.evaluation.study_statistics import read_study, write_about
from mm_agrae.run.claim import claim
from mm_agrae.run.folder import RunFolder
from mm_agrae.view.study import write_results, write_study

FAMILIES = [{"family": "charts"}] * 2 + [{"family": "counting"}] * 2
AFTER = {  # arm: correct samples of 4 for each problem, by seed; before it is 2 of 4 for all
    "grpo": {0: [4, 4, 0, 0], 1: [4, 4, 2, 0], 2: [3, 4, 4, 4]},
    "agrae": {0: [3, 3, 3, 3], 1: [4, 4, 4, 3], 2: [2, 2, 2, 2]},
}


def write(folder, config=None, **values):
    made = run_config(folder / "run", TEXT, train={"steps": 1}, reward={"parts": {"accuracy": 1.0, "rule": 0}})
    (folder / "config.yaml").write_text(configs.dump(config or made))
    study = {"title": "T", "config": str(folder / "config.yaml"), "seeds": [0, 1, 2], "ks": [1, 2, 4]}
    study["arms"] = {"grpo": ["advantage={rule: grpo}"], "agrae": ["advantage={rule: agrae, alpha: 0.6}"]}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(study | values, sort_keys=False))
    return folder / "tiny.yaml"


def recorded(folder):
    """A study whose six runs have been recorded, without the training."""
    study = load(write(folder))
    write_about(study, runs_of(study), folder / "studies" / "tiny")
    for run in runs_of(study):
        made = RunFolder(folder / run.name).create(configs.dump(run.config), {"torch": "2.13.0"})
        solved = [2] * 4 if run.seed is None else AFTER[run.arm][run.seed]
        evaluate(made, "after", solved, meta=FAMILIES, full=True, parts={"rule": [1, 1, 1, 0]})
        for step in range(1, 13) if run.seed is not None else ():
            made.append_metrics(metrics(step) | {"cpu_seconds/total": 2.0, "cpu_seconds/evaluate": 0.5})
        write_record(record_of(run, made, "code"), folder / "studies" / "tiny" / "data" / f"{run.name}-code.json")
    return folder / "studies" / "tiny"


def test_the_grid(tmp_path):
    study = load(write(tmp_path, seeds=[5, 6]), overrides=["train.steps=7"])
    titles = ["grpo, seed 5", "agrae, seed 5", "grpo, seed 6", "agrae, seed 6"]
    assert [run.title for run in runs_of(study)] == [START, *titles]
    assert study.compared_with("agrae") == "grpo"
    run = runs_of(study)[-1]
    assert (run.config.train.seed, run.config.train.steps, run.config.advantage.settings["alpha"]) == (6, 7, 0.6)
    assert not run.config.evaluate.before
    assert len({each.name for each in runs_of(study)}) == 5


def test_a_file_laid_over_another_and_its_quick_version(tmp_path):
    write(tmp_path, quick={"arms": ["agrae"], "seeds": [9], "settings": ["train.steps=3"]})
    (tmp_path / "more.yaml").write_text("base: tiny.yaml\ntitle: M\narms: {maxrl: [with/maxrl]}\n")
    study = load(tmp_path / "more.yaml")
    assert (study.title, [*study.arms]) == ("M", ["grpo", "agrae", "maxrl"])
    runs = runs_of(load(tmp_path / "more.yaml", quick=True))
    assert [(run.title, run.config.train.steps) for run in runs] == [(START, 3), ("agrae, seed 9", 3)]


def test_what_makes_another_run(tmp_path):
    def digests(*overrides, **values):
        return [run.digest for run in runs_of(load(write(tmp_path, **values), overrides=overrides))]

    first = digests()
    assert digests("run_dir=elsewhere") == first
    assert digests(seeds=[0, 1, 2, 3])[: len(first)] == first
    other = digests("train.steps=2")
    assert other[0] == first[0]  # the model before training is the same
    assert set(other[1:]) & set(first) == set()
    assert set(digests("evaluate.samples=3")) & set(first) == set()


def test_files_and_choices_that_cannot_be(tmp_path):
    for values, message in (
        ({"arms": {START: []}}, "is the name of the model before training"),
        ({"against": {"agrae": "grop"}}, "arm 'grop' is not in arms; did you mean 'grpo'"),
        ({"sedes": [1]}, "sedes: unknown setting; did you mean 'seeds'"),
    ):
        with pytest.raises(ConfigError, match=message):
            load(write(tmp_path, **values))
    with pytest.raises(ConfigError, match=r"evaluate\.after=true"):
        runs_of(load(write(tmp_path, settings=["evaluate.after=false"])))
    runs = runs_of(load(write(tmp_path)))
    assert [run.title for run in choose(runs, ["grpo"], [2])] == [START, "grpo, seed 2"]
    with pytest.raises(ConfigError, match="--arms grop: not in the study; did you mean 'grpo'"):
        choose(runs, ["grop"], None)


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "studies").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_studies(path):
    for quick in (False, True):
        study = load(path, quick=quick).model_copy(update={"seeds": (0,)})
        assert len(runs_of(study)) == 1 + len(study.arms)
        assert {study.compared_with(arm) for arm in study.arms} <= study.arms.keys()


def test_pages_from_records_alone(tmp_path):
    folder = recorded(tmp_path)
    (tmp_path / "protocol.md").touch()
    page = write_study(folder).read_text()
    text = write_results(folder.parent, tmp_path / "results.md").read_text()
    assert "fixed before: [Protocol](protocol.md)" in text
    assert "| before training | 1 | 50.0 | 83.3 | 100.0 | – | 0.4 | 12 | 75.0 |" in text
    assert "| grpo | 3 | 68.8 ± 22.5 |" in text  # of 50, 62.5 and 93.75; A-GRAE: 75, 93.75 and 50
    assert "| agrae | 3 | 72.9 ± 21.9 |" in text
    # pass@4 of agrae is 1 in each seed; of grpo ½, ¾ and 1.
    assert " | +25.0 [" in next(line for line in text.splitlines() if line.startswith("| agrae − grpo |"))
    assert "] 2/3 | – | too few seeds |" in text
    assert "| grpo | 95.8 ± 7.2 | 100.0 ± 0.0 | 41.7 ± 52.0 | 50.0 ± 50.0 |" in text  # charts, counting
    # ω is .012 times the step, below .6 at all twelve; entropy 1/step; 1.5 CPU-seconds a step.
    curves = "| 0.293 ± 0 → 0.16 ± 0 | 0.066 ± 0 → 0.09 ± 0 |"
    assert f"| agrae {curves} 100.0 ± 0.0 | 50.0 ± 0.0 → 50.0 ± 0.0 | 0 of 3 | 18 ± 0 | " in text
    assert f"| grpo {curves} – | 50.0 ± 0.0 → 50.0 ± 0.0 | 0 of 3 |" in text
    assert "7 runs recorded; mm_agrae ?; torch 2.13.0" in text
    assert "<svg" in page
    assert "+25.0" in page
    for figure in (
        "pass_at_k_test",
        "differences_test",
        "success_by_step",
        "entropy_by_step",
        "success_by_cpu_seconds",
    ):
        assert f"![{figure}](studies/tiny/{figure}.svg)" in text
        xml.dom.minidom.parse(str(folder / f"{figure}.svg"))


def test_records_that_are_missing_of_other_settings_or_damaged(tmp_path):
    folder = recorded(tmp_path)
    first, second, *_ = sorted((folder / "data").glob("grpo*.json"))
    first.unlink()
    second.rename(second.with_name("grpo-seed1-another-code.json"))
    text = write_results(folder.parent, tmp_path / "results.md").read_text()
    assert "not run yet: 2 (grpo 2); 1 records of other settings left out" in text
    assert "fixed before" not in text
    found = json.loads((third := next((folder / "data").glob("agrae*.json"))).read_text())
    third.write_text("{")
    with pytest.raises(RunFolderError, match=r"cannot be read .* delete it, and the study makes it again"):
        read_study(folder)
    found["evaluations"]["test"]["problems"] = "others"
    third.write_text(json.dumps(found))
    with pytest.raises(RunFolderError, match="hold different problems of test"):
        read_study(folder)
    (folder / "study.json").write_text('{"runs": {"grpo, seed 0": "0123456789"}}')
    with pytest.raises(RunFolderError, match=r"study\.json is of another version; run the study anew"):
        read_study(folder)


# ------------------------------------------------------------------------------- real runs


def start(folder, *arguments):
    command = [sys.executable, "-m", "mm_agrae.cli", "study", str(folder / "tiny.yaml")]
    return subprocess.Popen(
        [*command, "--out", str(folder / "studies"), *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip


def study(folder, *arguments, expect=0):
    process = start(folder, *arguments)
    output = process.communicate(timeout=500)[0]
    assert process.returncode == expect, output
    return output


def test_runs_in_parallel_reuse_and_a_run_that_fails(tmp_path):
    source = {"task": "synthetic", "modality": "text", "limit": 4}
    sets = [{**source, "name": split, "split": split} for split in ("test", "train")]
    arms = {"grpo": ["advantage={rule: grpo}"], "broken": ["model.path=no/such/model"]}
    limited = ["data.train.0.limit=4"]  # all of which the one step draws
    write(tmp_path, evaluate=sets, arms=arms, seeds=[3], settings=limited)
    output = study(tmp_path, "--jobs", "2", expect=1)
    assert "broken, seed 3: failed: status 2; the end of " in output
    assert "no/such/model" in output
    assert "grpo, seed 3: test pass@1 " in output
    data = tmp_path / "studies" / "tiny" / "data"
    record = json.loads(next(data.glob("grpo*.json")).read_text())
    folder = RunFolder(tmp_path / "studies" / "tiny" / "runs" / next(data.glob("grpo*.json")).stem)
    result = next(each for each in folder.read_evaluations() if each.label == "test")
    found = record["evaluations"]["test"]
    assert sum(found["correct"]) / (found["samples"] * result.problems) == pytest.approx(result.pass_at_k[1].mean)
    assert sum(found["greedy"]) / 4 == result.greedy.mean
    assert record["evaluations"]["train"]["drawn"] == [4] * 4
    assert sum(record["evaluations"]["train"]["solved"]) == folder.read_metrics()[0]["completions/correct"]
    assert len(record["curves"]["entropy"]) == 1
    assert not (folder.path / "checkpoints").exists()
    again = study(tmp_path, "--arms", "grpo")
    assert again.count("(recorded)") == 2
    (tmp_path / "tiny.yaml").rename(tmp_path / "other.yaml")
    (tmp_path / "tiny.yaml").write_text("base: other.yaml\narms: {same: ['advantage={rule: grpo}']}\n")
    (tmp_path / "studies" / "tiny").rename(tmp_path / "studies" / "former")  # a run of a study beside it is taken over
    assert study(tmp_path, "--arms", "same").count("(recorded)") == 2
    assert not list(data.glob("same*"))
    assert set(read_study(data.parent).runs) == {"before training", "grpo", "same"}
    (tmp_path / "studies" / "tiny" / "index.html").unlink()
    assert "seed 3:" not in study(tmp_path, "--tables")
    assert (tmp_path / "studies" / "tiny" / "index.html").is_file()
    assert "# Results" in (tmp_path / "results.md").read_text()


def test_an_interrupted_study_goes_on(tmp_path):
    write(tmp_path, settings=["train.steps=300"], seeds=[3])
    process = start(tmp_path, "--arms", "grpo")
    runs = tmp_path / "studies" / "tiny" / "runs"
    deadline = time.monotonic() + 200
    while not list(runs.glob("grpo*/metrics.jsonl")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.1)
    assert "grpo, seed 3: under way elsewhere" in study(tmp_path, "--arms", "grpo")
    process.send_signal(signal.SIGTERM)
    assert process.wait(200) == 130
    run = RunFolder(next(path for path in runs.glob("grpo*") if path.is_dir()))
    assert 0 < run.read_summary()["steps"] < 300
    assert not run.read_summary()["finished"]
    with claim(next(runs.glob("grpo*.lock"))) as held:
        assert held is not None
    assert not list((tmp_path / "studies" / "tiny" / "data").glob("grpo*"))
