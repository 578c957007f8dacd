"""The commands as a person types them: training in a process of its own, the others in this one."""

import contextlib
import importlib.util
import io
import json
import os
import shutil
import socket
import subprocess
import sys

import pytest
import yaml
from helpers import ROOT, TEXT, VL, run_config
from run_folders import evaluate, make_run

from mm_agrae import cli, progress
from mm_agrae import config as configs
from mm_agrae.progress import Reporter
from mm_agrae.run.folder import summarise_evaluations
from mm_agrae.run.step_line import show_summary


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")


def command(*arguments, expect=0):
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        status = cli.main([str(argument) for argument in arguments])
    assert status == expect, output.getvalue()
    return output.getvalue()


def command_in_a_process(*arguments, expect=0):
    result = subprocess.run(
        [sys.executable, "-m", "mm_agrae.cli", *map(str, arguments)],
        capture_output=True, text=True, timeout=600,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "COLUMNS": "200"},
    )  # fmt: skip
    assert result.returncode == expect, result.stdout + result.stderr
    return result.stdout + result.stderr


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    config = run_config(folder / "run", train={"steps": 2})
    (folder / "config.yaml").write_text(configs.dump(config))
    return folder, command_in_a_process("train", folder / "config.yaml")


def test_train_says_what_it_does(finished_run):
    folder, output = finished_run
    plan = output.index("Plan of")
    assert plan < output.index("before: test") < output.index("step 1/2") < output.index("pass@k")
    assert "4 prompts × 4 completions = 16" in output
    assert (folder / "run" / "report.html").stat().st_size > 10_000
    summary = json.loads((folder / "run" / "summary.json").read_text())
    assert summary["pass_at_k"].keys() == {"before", "after"}
    assert {"rollout", "update", "reward", "evaluate", "total"} <= summary["seconds"].keys()


def test_the_summary_names_families_that_fell(tmp_path, capsys):
    run = make_run(tmp_path)
    families = [{"family": name} for name in ("charts", "charts", "counting", "counting")]
    evaluate(run, "before", [4, 2, 1, 1], meta=families)
    more = {"seconds": {"total": 1.0}, "peak_memory_mb": 10.0}
    for solved, line in (([4, 2, 4, 0], "counting -50.0 points at pass@4"), ([4, 2, 1, 4], "no family of problems")):
        evaluate(run, "after", solved, meta=families)
        show_summary(Reporter(), summarise_evaluations(run, "test") | more)
        assert f"fell        {line}\n" in capsys.readouterr().out
    evaluate(run, "after", [0] * 4)
    show_summary(Reporter(), summarise_evaluations(run, "test") | more)
    assert "fell" not in capsys.readouterr().out


def test_train_again_shows_the_result(finished_run):
    folder, _ = finished_run
    output = command("train", folder / "config.yaml")
    assert "step 2/2" not in output
    assert "pass@k" in output


def test_plan_loads_no_model(tmp_path):
    config = run_config(tmp_path / "run", "no/such/model")
    (tmp_path / "c.yaml").write_text(configs.dump(config))
    assert "optimiser steps" in command("train", tmp_path / "c.yaml", "--plan")
    assert not (tmp_path / "run").exists()


def test_overwrite_deletes_only_a_run(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "precious.txt").write_text("mine")
    (tmp_path / "c.yaml").write_text(configs.dump(run_config(tmp_path / "run")))
    output = command("train", tmp_path / "c.yaml", "--overwrite", expect=2)
    assert "holds no run" in output
    assert (tmp_path / "run" / "precious.txt").exists()


def test_eval_side_by_side(finished_run, tmp_path):
    folder, _ = finished_run
    output = command(
        "eval", VL, folder / "run", "--config", folder / "config.yaml", "evaluate.samples=2",
        "--out", tmp_path / "out",
    )  # fmt: skip
    assert "pass@2" in output
    assert sorted(p.name for p in (tmp_path / "out" / "evaluations").iterdir()) == ["run", "vl"]
    command("report", tmp_path / "out")
    own = command("eval", folder / "run", "--out", tmp_path / "own")
    assert "4 problems" in own


def test_eval_without_a_config_says_so(tmp_path):
    assert "pass a config with --config" in command("eval", VL, "--out", tmp_path / "o", expect=2)


def test_reports(finished_run, tmp_path):
    folder, _ = finished_run
    command("report", folder / "run")
    shutil.copytree(folder / "run", tmp_path / "other")
    command("report", folder / "run", tmp_path / "other", "--out", tmp_path / "compare.html")
    assert "<svg" in (tmp_path / "compare.html").read_text()


@pytest.mark.parametrize("name", ["sample.html", "sample.png"])
def test_sample(tmp_path, name):
    (tmp_path / "c.yaml").write_text(configs.dump(run_config(tmp_path / "run")))
    command("sample", tmp_path / "c.yaml", "-n", 3, "--out", tmp_path / name)
    assert (tmp_path / name).stat().st_size > 3_000


def test_sample_with_completions(tmp_path):
    (tmp_path / "c.yaml").write_text(configs.dump(run_config(tmp_path / "run", TEXT)))
    out = tmp_path / "sample.html"
    command("sample", tmp_path / "c.yaml", "-n", 2, "--completions", 2, "--out", out)
    assert out.read_text().count('class="completion') == 4


def test_lists():
    assert "agrae" in command("rules")
    assert "synthetic" in command("tasks")
    assert "torch" in command("doctor")


def test_doctor_looks_at_a_config(tmp_path):
    (tmp_path / "c.yaml").write_text(configs.dump(run_config(tmp_path / "run")))
    path = tmp_path / "c.yaml"
    output = command("doctor", path, "rollout.max_new_tokens=12", "--gpus", 2, "--gpu-memory", 8)
    assert "64 sampled" not in output
    assert "up to 192 sampled" in output
    assert "each of 2 processes, model sharded by FSDP2, with 8.0 GiB" in output
    assert "nothing stands in the way" in output
    assert "no config.json" in command("doctor", path, "model.path=no/model", expect=1)
    assert "--gpus is 0" in command("doctor", path, "--gpus", 0, expect=2)
    assert "--gpu-memory is 1e+300" in command("doctor", path, "--gpu-memory", 1e300, expect=2)
    assert "of 0.0 MiB usable" in command("doctor", path, "--gpu-memory", 0.1, expect=1)


def test_an_engine_that_is_not_installed_is_found_before_anything_is_loaded(tmp_path, monkeypatch):
    """train and eval refuse it by name; doctor, --plan and --launch-plan do not sample."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "vllm" else find(name, *rest))
    path = tmp_path / "c.yaml"
    path.write_text(configs.dump(run_config(tmp_path / "run", rollout={"engine": "vllm"})))
    for arguments in (["train", path], ["eval", VL, "--config", path]):
        output = command(*arguments, expect=2)
        assert "pip install 'mm-agrae[vllm]'" in output
        assert "rollout.engine=hf" in output
        assert "Plan of" not in output
    assert not (tmp_path / "run").exists()
    assert "sampled a step" in command("train", path, "--plan")
    for arguments in (["train", path, "--overwrite"], ["eval", VL, "--config", path]):
        assert command(*arguments, "--launch-plan").split()[2:] == [
            "one",
            os.environ.get("OMP_NUM_THREADS", "1"),
            "vllm",
        ]
    assert "pip install 'mm-agrae[vllm]'" in command("doctor", path, expect=1)


def test_a_second_file_overrides_the_first(tmp_path):
    (tmp_path / "c.yaml").write_text(configs.dump(run_config(tmp_path / "run")))
    (tmp_path / "over.yaml").write_text("advantage: {rule: dr_grpo}\n")
    assert "dr_grpo / grpo" in command("train", tmp_path / "c.yaml", tmp_path / "over.yaml", "--plan")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"rollout": {"engine": "hg", "prompts_per_step": 4}}, "did you mean 'hf'"),
        ({"modle": {}}, "did you mean 'model'"),
        ({"model": {"path": "no/such/model"}}, "model.path 'no/such/model'"),
        ({"data": {"train": [{"task": "synthetic", "spilt": "train"}]}}, "did you mean 'split'"),
        ({"data": {"train": [{"task": "sinthetic"}]}}, "synthetic"),
        ({"data": {"train": [{"task": "files", "path": "absent.jsonl"}]}}, "absent.jsonl"),
    ],
)
def test_a_mistake_is_one_clear_line(tmp_path, change, expected):
    values = yaml.safe_load(configs.dump(run_config(tmp_path / "run", TEXT))) | change
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(values))
    run = command_in_a_process if "modle" in change else command
    output = run("train", tmp_path / "c.yaml", expect=2)
    assert expected in output
    assert "Traceback" not in output


def test_what_is_not_there_is_refused_at_once(tmp_path, monkeypatch):
    """Folders, ports and suffixes, in one line each and before torch is imported."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "quickstart").mkdir(parents=True)
    busy = socket.create_server(("127.0.0.1", 0))
    port = busy.getsockname()[1]
    cases = {
        "eval runs/quickstrat": "did you mean 'runs/quickstart'?",
        "eval nowhere --config c.yaml": "eval 'nowhere': there is no such folder",
        "difficulty nowhere --config c.yaml": "difficulty 'nowhere': there is no such folder",
        "demo runs/other": "`hf download runs/other`",
        "export /no/where out": "export '/no/where': there is no such folder",
        f"demo --port {port}": f"listen on 127.0.0.1, port {port} (Address already in use); give another --port",
        "demo --port 70000": "--port is 70000; it must be from 1 to 65535",
        "demo --host 192.0.2.1": "a --host of this machine",
        "sample c.yaml --out x.pdf": "--out x.pdf: end the name in .html or .png",
        "data c.yaml --out x.pdf": "end the name in .html or .png",
        "report a b --out x.pdf": "end the name in .html",
    }
    script = f"""
import sys
from mm_agrae import cli
for line in {list(cases)}:
    assert cli.main(line.split()) == 2, line
assert "torch" not in sys.modules
"""
    with busy:
        result = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
        )
    assert result.returncode == 0, result.stderr
    for expected, line in zip(cases.values(), result.stderr.splitlines(), strict=True):
        assert line.startswith("error: ")
        assert expected in line


PART = """
import os, signal
def interrupting(example, completion):
    with open({calls!r}, "ab") as file:
        file.write(b".")
        if file.tell() == 14:  # the second model's
            os.kill(os.getppid(), signal.SIGINT)
    return 0.0
"""


def test_an_interrupted_eval_keeps_what_was_finished(tmp_path):
    (tmp_path / "part.py").write_text(PART.format(calls=str(tmp_path / "calls")))
    parts = {"accuracy": 1.0, f"{tmp_path / 'part.py'}:interrupting": 0.0}
    (tmp_path / "c.yaml").write_text(configs.dump(run_config(tmp_path / "run", TEXT, reward={"parts": parts})))
    shutil.copytree(TEXT, tmp_path / "second")
    out = tmp_path / "out"
    output = command("eval", TEXT, tmp_path / "second", "--config", tmp_path / "c.yaml", "--out", out, expect=130)
    assert f"interrupted; the evaluations that were finished are in {out}" in output
    assert [path.name for path in (out / "evaluations").iterdir()] == ["text"]


def test_tables_fit_80_columns(capsys):
    columns = [["", *"abc"], *([f"model {n}", *["100.0% [100.0%, 100.0%]"] * 3] for n in range(4))]
    header, *rows = zip(*columns, strict=True)
    Reporter().table("test", header, rows)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert [sum(f"model {n}" in line for line in lines) for n in range(4)] == [1, 1, 1, 1]
    assert sum("│ b " in line for line in lines) == 2
    assert sum("test" in line for line in lines) == 1


def test_without_a_terminal_a_bar_is_a_line_now_and_then(capsys, monkeypatch):
    reporter = Reporter()
    with reporter.bars(), reporter.bar("evaluate", 2000, lines=True) as advance:
        advance(1000)
        monkeypatch.setattr(progress, "LINE_EVERY_S", 0.0)
        advance(500)
    assert capsys.readouterr().out == "evaluate: 1,500 of 2,000 in 0 s\n"
