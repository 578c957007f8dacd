"""Work that several processes find: one of them does it, and what a dead one left is taken over."""

import json
import os
import subprocess
import sys
import time

from helpers import ROOT

from mm_agrae.run import claim as claims
from mm_agrae.run.claim import claim

RACE = """
import sys, time
from pathlib import Path
from mm_agrae.run.claim import claim
work = Path(sys.argv[1])
while not (work / "go").exists():
    time.sleep(0.001)
for number in range(40):
    if (held := claim(work / "claims" / f"run{number}")):
        held.__enter__()  # never released
        print(number)
time.sleep(300)
"""


def wait_until(so):
    deadline = time.monotonic() + 120
    while not so():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_processes_that_race_share_the_work_out(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-c", RACE, str(tmp_path)]
    racers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) for _ in range(4)]
    time.sleep(1)
    (tmp_path / "go").touch()
    wait_until(lambda: len(list(tmp_path.glob("claims/*.1"))) == 40)
    assert [claim(tmp_path / "claims" / f"run{number}") for number in range(40)] == [None] * 40  # they live
    for racer in racers:
        racer.kill()
    done = [int(line) for racer in racers for line in racer.communicate()[0].split()]
    assert sorted(done) == list(range(40))
    again = claim(tmp_path / "claims" / "run0")  # its owner is dead
    assert again.number == 2
    with again:
        assert claim(tmp_path / "claims" / "run0") is None
    assert list((tmp_path / "claims").glob("run0.*")) == []


def test_a_claim_of_another_machine_counts_until_its_heartbeat_stops(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "HEARTBEAT_S", 0.05)
    held = claim(tmp_path / "run")
    lost = []
    held.on_lost = lambda: lost.append(True)
    held.file.write_text(json.dumps({"host": "elsewhere", "processes": [1]}))
    with held:
        os.utime(held.file, (0, 0))
        wait_until(lambda: held.file.stat().st_mtime > 0)  # its heart beats
        assert claim(tmp_path / "run") is None
        monkeypatch.setattr(claims, "STALE_S", -60.0)
        other = claim(tmp_path / "run")
        wait_until(lambda: lost)
        assert (other.number, lost) == (2, [True])
    assert other.file.exists()  # the former owner leaves the claim of the new one alone


def test_a_claim_stands_as_long_as_one_of_its_processes_lives(tmp_path):
    held = claim(tmp_path / "run")
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    content = json.loads(held.file.read_text())
    for processes, free in (([gone.pid, child.pid], False), ([gone.pid], True)):
        held.file.write_text(json.dumps(content | {"processes": processes}))
        assert bool(claim(tmp_path / "run")) is free
    child.communicate(b"\n")
