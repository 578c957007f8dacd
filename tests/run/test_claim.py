"""Work that several processes find: one of them does it, and what a dead one left is free."""

import errno
import fcntl
import os
import subprocess
import sys
import time

import pytest
from helpers import ROOT

from mm_agrae.errors import RunFolderError
from mm_agrae.run.claim import claim

RACE = """
import sys, time
from contextlib import ExitStack
from pathlib import Path
from mm_agrae.run.claim import claim
work = Path(sys.argv[1])
while not (work / "go").exists():
    time.sleep(0.001)
stack = ExitStack()
for number in range(40):
    if stack.enter_context(claim(work / "claims" / f"run{number}")) is not None:
        (work / f"done{number}.{sys.argv[2]}").touch()
(work / f"end.{sys.argv[2]}").touch()
time.sleep(300)
"""


def free(path):
    with claim(path) as held:
        return held is not None


def test_processes_that_race_share_the_work_out(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    racers = [
        subprocess.Popen([sys.executable, "-c", RACE, str(tmp_path), str(number)], env=environment)
        for number in range(4)
    ]
    time.sleep(1)
    (tmp_path / "go").touch()
    deadline = time.monotonic() + 120
    while len(list(tmp_path.glob("end.*"))) < 4:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert sorted(file.stem for file in tmp_path.glob("done*")) == sorted(f"done{number}" for number in range(40))
    claims = [tmp_path / "claims" / f"run{number}" for number in range(40)]
    assert not any(map(free, claims))  # their owners live
    for racer in racers:
        racer.kill()
        racer.wait()
    assert all(map(free, claims))


def test_a_claim_stands_as_long_as_a_child_lives(tmp_path):
    with claim(tmp_path / "run") as held:
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=[held])
        assert not free(tmp_path / "run")
    assert not free(tmp_path / "run")
    child.communicate(b"\n")
    assert free(tmp_path / "run")


def test_an_error_in_the_work_gives_it_back(tmp_path):
    with pytest.raises(BlockingIOError), claim(tmp_path / "run"):
        raise BlockingIOError
    assert free(tmp_path / "run")


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(RunFolderError, match=r"run: cannot be locked \(Operation not supported\).* choose a folder"):
        free(tmp_path / "run")
