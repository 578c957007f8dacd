"""The wheel is whole: built from the sdist, installed in an environment of its own, used in an empty folder.

What it depends on is not installed again: a .pth file adds the packages of the environment that runs the tests.
"""

import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import yaml
from helpers import ROOT

PARTS = ("mm_agrae", "demo", "configs", "data", "tests", "README.md", "LICENSE", "pyproject.toml")
SMALL = (
    "train.steps=1", "rollout.prompts_per_step=2", "rollout.completions_per_prompt=2", "rollout.max_new_tokens=8",
    "evaluate.samples=1", "evaluate.max_new_tokens=8", "data.evaluate.0.limit=2", "data.train.0.limit=8",
)  # fmt: skip


def call(*command, cwd, **environment):
    variables = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    variables |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "200"} | environment
    done = subprocess.run([*map(str, command)], cwd=cwd, env=variables, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder with the sdist unpacked, and in dist/ the sdist and the wheel built from it."""
    folder = tmp_path_factory.mktemp("built")
    (folder / "clone").mkdir()
    for name in PARTS:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        ignored = {"ignore": shutil.ignore_patterns("__pycache__", "downloads")} if (ROOT / name).is_dir() else {}
        copy(ROOT / name, folder / "clone" / name, **ignored)
    (folder / "clone" / "data" / "downloads").mkdir()
    (folder / "clone" / "data" / "downloads" / "train.jsonl").write_text("{}")
    build = "import sys, setuptools.build_meta as backend; getattr(backend, sys.argv[1])(sys.argv[2])"
    call(sys.executable, "-c", build, "build_sdist", folder / "dist", cwd=folder / "clone")
    with tarfile.open(next((folder / "dist").glob("*.tar.gz"))) as archive:
        archive.extractall(folder, filter="data")
    call(sys.executable, "-c", build, "build_wheel", folder / "dist", cwd=next(folder.glob("mm_agrae-*")))
    return folder


@pytest.fixture(scope="module")
def environment(built):
    """The bin/ of an environment with the wheel."""
    venv = built / "venv"
    call(sys.executable, "-m", "venv", "--without-pip", venv, cwd=built)
    pip = (sys.executable, "-m", "pip", "--python", venv / "bin" / "python")
    call(*pip, "install", "--no-deps", "--no-index", "--no-compile", *(built / "dist").glob("*.whl"), cwd=built)
    packages = next(venv.glob("lib/python*/site-packages"))
    (packages / "rest.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")))
    return venv / "bin"


@pytest.fixture
def command(environment, tmp_path):
    return lambda *arguments: call(environment / "mm-agrae", *arguments, cwd=tmp_path)


def test_the_sdist_holds_no_data_sets(built):
    data = next(built.glob("mm_agrae-*")) / "data"
    assert {path.name for path in data.iterdir()} == {
        "example_run",
        "example_run_text",
        "model_shapes",
        "trained",
        "warm_start",
    }


def test_the_quickstart_in_an_empty_folder(command, environment, tmp_path):
    assert "pass@1" in command("quickstart", *SMALL)
    run = tmp_path / "runs" / "quickstart"
    assert (run / "report.html").stat().st_size > 10_000
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert Path(config["model"]["path"]).is_relative_to(environment.parent)
    assert "step 1/1" not in command("quickstart", *SMALL)  # the finished run is shown again
    assert command("sample", "quickstart", "-n", 2, "--out", "seen.html") == "seen.html\n"
    read = "import mm_agrae; print(mm_agrae.load_run('data/example_run').rollouts().num_rows)"
    assert int(call(environment / "python", "-c", read, cwd=tmp_path)) > 0


def test_a_shipped_config_as_a_start_for_ones_own(command, tmp_path):
    assert command("configs").split()[0] == "geometry3k"
    (tmp_path / "copy.yaml").write_text(command("configs", "quickstart_text"))
    (tmp_path / "own.yaml").write_text("base: quickstart_text\nadvantage: {rule: dr_grpo}\n")
    assert "agrae / grpo" in command("train", "copy.yaml", "--plan")
    assert "dr_grpo / grpo" in command("train", "own.yaml", "--plan")
    assert "dapo / dapo" in command("train", "copy.yaml", "with/dapo", "--plan")
    assert "nothing stands in the way" in command("doctor", "configs/quickstart_text.yaml")


@pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason="gradio is not installed")
def test_the_demo_in_an_empty_folder(environment, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with (tmp_path / "log").open("w") as log:
        demo = subprocess.Popen(
            [environment / "mm-agrae", "demo", "--no-browser", "--port", str(port)],
            cwd=tmp_path, stdout=log, stderr=log, env=os.environ | {"PYTHONPATH": ""},
        )  # fmt: skip
        try:
            page = _page(f"http://127.0.0.1:{port}/config", demo)
        finally:
            demo.terminate()
            demo.wait(60)
    assert "A-GRAE" in page, (tmp_path / "log").read_text()
    assert "example_run" in page


def _page(address, process):
    end = time.monotonic() + 200
    while process.poll() is None and time.monotonic() < end:
        try:
            with urllib.request.urlopen(address, timeout=20) as reply:
                return reply.read().decode()
        except urllib.error.URLError:
            time.sleep(0.5)
    return ""


def test_a_hint_how_to_install_an_extra_can_be_typed(environment, tmp_path):
    """pip takes mm-agrae as it is installed, and looks for what the extra needs alone."""
    venv = environment.parent
    ask = "from mm_agrae.errors import install; print(install('scripts'))"
    hint = call(environment / "python", "-c", ask, cwd=tmp_path).strip()
    assert hint == f"uv pip install 'mm-agrae[scripts]' --python {venv}"
    typed = [sys.executable, "-m", "pip", "--python", environment / "python", "install", "mm-agrae[scripts]"]
    printed = call(*typed, "--no-index", "--dry-run", cwd=tmp_path)
    assert f"Requirement already satisfied: mm-agrae[scripts] in {venv}" in printed
    assert "Would install" not in printed
    (environment / "pip").touch(mode=0o755)  # as in an environment that has one
    assert call(environment / "python", "-c", ask, cwd=tmp_path).strip().startswith(f"{environment}/pip install")
    path = f"{environment}{os.pathsep}{os.environ['PATH']}"
    assert call(environment / "python", "-c", ask, cwd=tmp_path, PATH=path) == "pip install 'mm-agrae[scripts]'\n"
