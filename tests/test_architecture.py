"""The shape of the package: imports go one way, light modules stay light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "mm_agrae"

LAYERS = [
    {"errors", "types", "advantage_input", "loss", "progress", "grading"},
    {"advantage"},
    {"config", "out_of_memory"},
    {"batching", "parallel", "tasks"},
    {"rewards"},
    {"model"},
    {"run"},
    {"rollout", "step"},
    {"evaluation"},
    {"view", "adapters"},
    {"trainer", "doctor"},
    {"cli"},
    {"__init__"},  # the library: its functions import what they need when they are called
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def stage_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_stages(path: Path) -> set[str]:
    """Stages of this package that a file imports, anywhere in it (type checking included)."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
            if node.module == "mm_agrae":
                names = [f"mm_agrae.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "mm_agrae" and len(parts) > 1 and parts[1] != "__version__":
                found.add(parts[1])
    return found


def upward_edges(files):
    for path in files:
        stage = stage_of(path)
        for other in imported_stages(path) - {stage}:
            if LEVEL[other] >= LEVEL[stage]:
                yield f"{path.relative_to(PACKAGE)} imports {other}"


def test_every_file_has_a_layer():
    assert {stage_of(path) for path in PACKAGE.rglob("*.py")} <= LEVEL.keys()


def test_imports_go_one_way():
    assert list(upward_edges(PACKAGE.rglob("*.py"))) == []


def test_grading_is_usable_alone():
    files = (PACKAGE / "grading").glob("*.py")
    assert set().union(*map(imported_stages, files)) == {"grading"}


def test_an_upward_import_would_be_found(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    file = tmp_path / "loss.py"
    file.write_text("def f():\n    from mm_agrae.trainer import Trainer\n")
    assert list(upward_edges([file])) == ["loss.py imports trainer"]


def test_the_sizes_of_the_house(monkeypatch):
    """Files, functions, folders and lines stay within the limits of scripts/house.py."""
    monkeypatch.syspath_prepend(str(PACKAGE.parent / "scripts"))
    import house

    figures = house.measure(PACKAGE.parent)
    assert house.violations(figures) == []
    assert house.violations(figures | {"longest file": 501}) == ["longest file: 501, at most 500"]


def loaded_after(code: str) -> set[str]:
    """Top-level packages that are imported once `code` has run in a fresh interpreter."""
    script = f"{code}\nimport sys\nprint(' '.join(sys.modules))"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return {name.split(".")[0] for name in result.stdout.splitlines()[-1].split()}


HELP = """
import contextlib, mm_agrae.cli
with contextlib.suppress(SystemExit):
    mm_agrae.cli.main(["--help"])
"""


@pytest.mark.parametrize(
    ("code", "heavy"),
    [
        ("import mm_agrae", {"torch"}),
        (HELP, {"torch", "transformers", "vllm", "gradio"}),
        ("import mm_agrae.advantage, mm_agrae.loss", {"transformers", "vllm", "gradio"}),
        ("import mm_agrae.config, mm_agrae.tasks", {"torch", "transformers", "vllm", "gradio"}),
        ("import mm_agrae.rewards.rewarder", {"torch", "transformers", "datasets"}),
        ("import mm_agrae.adapters.verl", {"transformers", "trl", "verl", "ray"}),
        ("import mm_agrae.grading.accuracy", {"torch", "transformers", "pydantic", "yaml"}),
        ("import mm_agrae.trainer", {"vllm", "gradio", "trl", "matplotlib"}),
    ],
    ids=["package", "help", "core", "config", "rewards", "verl", "grading", "trainer"],
)
def test_light_modules_stay_light(code, heavy):
    assert loaded_after(code) & heavy == set()
