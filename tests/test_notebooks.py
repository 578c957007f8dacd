"""The notebooks run from top to bottom in an empty folder, with fewer steps of training."""

import os

import pytest
from helpers import ROOT

nbformat = pytest.importorskip("nbformat", reason="nbclient is not installed: pip install 'mm-agrae[notebook]'")
nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed: pip install 'mm-agrae[notebook]'")

NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
def test_a_notebook_runs(path, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    book = nbformat.read(path, as_version=4)
    first = next(cell for cell in book.cells if "STEPS = " in cell.source)
    before, _, after = first.source.partition("STEPS = ")
    first.source = f"{before}STEPS = 2  # {after}"
    nbclient.NotebookClient(book, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    assert code[-1].outputs[-1]["data"]["text/plain"].startswith("{")
    run = next(iter((tmp_path / "runs").glob("*/metrics.jsonl")))
    assert len(run.read_text().splitlines()) == 2


@pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
def test_a_notebook_is_stored_without_outputs(path):
    cells = nbformat.read(path, as_version=4).cells
    assert [cell.source for cell in cells if cell.get("outputs")] == []
