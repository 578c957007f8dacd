"""Several runs at once, of two processes each, whose second one gets into trouble in step 2.

    python failing_worker.py FOLDER    runs FOLDER/<trouble>.yaml for every trouble

What process R says goes to FOLDER/<trouble>.R, its exit status to FOLDER/<trouble>.R.status.
Nothing starts or ends a process for another one, as a launcher would.
"""

import os
import signal
import socket
import sys
import time
from pathlib import Path

import torch

from mm_agrae.cli import main
from mm_agrae.errors import DataError
from mm_agrae.model.compat import prepare
from mm_agrae.rollout.collector import Collector
from mm_agrae.step import Updater

generate, backward = Collector._generate, Updater.backward


def in_rollout(self, prompts, step, *args, **kwargs):
    if self.processes.rank == 1 and step == 1:
        if self.trouble == "fails":
            raise DataError("rows.jsonl:17: this row is bad")
        if self.trouble == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.trouble == "sleeps":
            time.sleep(3000)
    return generate(self, prompts, step, *args, **kwargs)


def in_update(self, *args, **kwargs):
    if self.processes.rank == 1 and self.policy.version == 1:
        if self.trouble == "dies_in_update":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.trouble == "starves_in_update":
            torch.empty(1 << 50)
        if self.trouble == "sleeps_in_update":
            time.sleep(3000)
    return backward(self, *args, **kwargs)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def start(config: Path, rank: int, port: int) -> int:
    if pid := os.fork():
        return pid
    file = os.open(config.with_suffix(f".{rank}"), os.O_CREAT | os.O_WRONLY)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    Collector.trouble = Updater.trouble = config.stem
    Collector._generate, Updater.backward = in_rollout, in_update
    status = main(["train", str(config)])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    prepare()
    running = {}
    for config in sorted(Path(sys.argv[1]).glob("*.yaml")):
        port = free_port()
        running |= {start(config, rank, port): config.with_suffix(f".{rank}") for rank in (0, 1)}
    while running:
        pid, status = os.wait()
        name = running.pop(pid)
        name.with_suffix(f"{name.suffix}.status").write_text(str(os.waitstatus_to_exitcode(status)))
