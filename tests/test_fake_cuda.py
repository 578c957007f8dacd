"""Updates and sampling of Qwen2.5-VL-3B at its true size on a fake CUDA device: `fake_cuda/__main__.py`.

Nothing is computed, so nothing is said of numbers. What is: every tensor is on the device, in the precision that it
should have; the operators accept it; and kernels, memory and reads by the host are those of `fake_cuda/table.json`.
"""

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from fake_cuda.device import compiler
from fake_cuda.reasons import REASONS

DOCS = Path(__file__).parents[1] / "docs"
FOLDER = Path(__file__).parent / "fake_cuda"
TABLE = json.loads((FOLDER / "table.json").read_text(encoding="utf-8"))
WRITE = "python tests/fake_cuda --write"

pytestmark = [
    pytest.mark.skipif(compiler() is None, reason="no C++ compiler (g++, or what CXX names) for a fake CUDA device"),
    pytest.mark.skipif(torch.backends.cuda.is_built(), reason="a CPU build of torch is needed: this one has CUDA"),
]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """The table as it is now, from a process of its own: the fake device stays with a process."""
    out = tmp_path_factory.mktemp("fake_cuda") / "table.json"
    done = subprocess.run([sys.executable, str(FOLDER), "--json", str(out)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    print(done.stdout)
    return json.loads(out.read_text(encoding="utf-8"))["cases"]


def test_every_case_runs(found):
    assert list(found) == list(TABLE["cases"]), f"write the table anew: {WRITE}"


def test_every_host_read_is_argued_for(found):
    """A read makes the host wait for the device, which then has nothing queued."""
    places = {place for case in found.values() for place in case["reads"]}
    assert places <= set(REASONS), f"new reads of the device by the host: {sorted(places - set(REASONS))}"
    assert places >= set(REASONS), f"reads that are gone: take them out of REASONS: {sorted(set(REASONS) - places)}"


def test_the_documented_table():
    rows = [
        [*line.split("|")[1:-1]] for line in (DOCS / "gpu.md").read_text(encoding="utf-8").splitlines() if "|" in line
    ]
    kernels = {row[0].strip(): row[1].strip() for row in rows}
    for name, case in TABLE["cases"].items():
        assert kernels[name] == f"{case['kernels']:,}", f"{name} in docs/gpu.md; write it anew: {WRITE}"


@pytest.mark.parametrize("name", TABLE["cases"])
def test_table(found, name):
    if other := {each: version(each) for each, then in TABLE["versions"].items() if version(each) != then}:
        pytest.skip(f"the table was written with {TABLE['versions']}, here are {other}")
    then, now = TABLE["cases"][name], found[name]
    allowed = {"kernels": 0.01, "ms": 0.02, "peak_gib": 0.02}
    changed = [
        f"{key} {then[key]} in the table, now {now[key]}"
        for key in then
        if (abs(now[key] - then[key]) > allowed[key] * then[key] if key in allowed else now[key] != then[key])
    ]
    assert not changed, f"{name}: {'; '.join(changed)}. If that is meant to be: {WRITE}"
