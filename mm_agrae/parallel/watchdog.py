"""Notices that another process has failed, is gone or does not come, and says which and where.

Every rank publishes its stage and step every second in the store that torch.distributed keeps, and its error message
before it ends. A collective call hangs if a rank is missing; a barrier through the store can tell which one:

    rank 1 (node-b) failed in evaluate of step 200: DataError: rows.jsonl:17: …
    rank 1 (node-b) has been gone for 45 s; it was last seen in update of step 3
    rank 0 (node-a) has waited 1800 s at rewards of step 3 for rank 1 (node-b), in rollout of step 3
"""

import contextlib
import itertools
import json
import os
import socket
import sys
import threading
import time
from typing import Any

import torch.distributed as dist

from mm_agrae.errors import ProcessError

HEARTBEAT_S = 1.0
LOST_AFTER_S = 45.0
"""A rank on another machine counts as gone after so long without a heartbeat. On the same machine
its process can be looked up."""
GRACE_S = 15.0
"""How long a rank that cannot be interrupted has to end by itself once another one has failed."""

_counter = itertools.count()
"""Numbers the runs of this process, which share one store one after another."""


class Watchdog:
    """Publishes where this rank is and watches where the others are, from a thread of its own (`_watch`)."""

    def __init__(self, rank: int, world: int, timeout_s: float):
        self.rank, self.world, self.timeout_s = rank, world, timeout_s
        store: Any = dist.distributed_c10d._get_default_store()
        prefix = f"mm_agrae/{next(_counter)}"
        self._store = dist.PrefixStore(prefix, store)
        # The thread has its own connection: a waiting call blocks every other call on the same one.
        self._thread_store = dist.PrefixStore(prefix, store.clone())
        self._lock = threading.Lock()
        self._barriers = self._beat = 0
        self._since = time.monotonic()
        self._status: dict[str, Any] = {
            "host": socket.gethostname(), "machine": _machine(), "pid": os.getpid(),
            "stage": "start", "step": 0,
        }  # fmt: skip
        self._peers: list[dict[str, Any]] = []
        self._seen = [(0, time.monotonic())] * world
        self._problem = ""
        self._closed = threading.Event()
        self._publish(self._store)
        self._store.wait([f"status/{other}" for other in range(world)])
        self.barrier("start")
        self._thread = threading.Thread(target=self._watch, name="watch", daemon=True)
        self._thread.start()

    def note(self, stage: str, step: int) -> None:
        """Publish the stage that this rank is in."""
        here = {"stage": stage, "step": step}
        new = not here.items() <= self._status.items()
        with self._lock:
            self._status |= here
            self._since = time.monotonic()
        if new:  # else an error report in the next second would name the stage before
            with contextlib.suppress(RuntimeError):
                self._publish(self._store)

    def barrier(self, where: str) -> None:
        """Wait until every rank is here. Raises ProcessError that names the rank that is not."""
        self._barriers += 1
        number, began = self._barriers, time.monotonic()
        self._store.set(f"{number}/{self.rank}", "here")
        # Everyone has passed the previous barrier, so nobody still waits at the one before it.
        self._store.delete_key(f"{number - 2}/{self.rank}")
        keys = [f"{number}/{rank}" for rank in range(self.world)]
        pause = 0.0005
        while not self._all_have(keys):
            waited = time.monotonic() - began
            if not self._problem and waited > self.timeout_s:
                self._problem = self._timed_out(where, keys, waited)
            if self._problem:
                raise ProcessError(f"{self._problem} (rank {self.rank} was waiting at {where})")
            time.sleep(pause)  # the store's own wait cannot be interrupted and logs warnings
            pause = min(2 * pause, 0.05)
        self._since = time.monotonic()

    def _all_have(self, keys: list[str]) -> bool:
        try:
            return self._store.check(keys)
        except RuntimeError:
            self._problem = self._problem or self._store_is_gone()
            return False

    def explain(self) -> str:
        """What is known about a failure of another rank; waits a little for it to be published."""
        end = time.monotonic() + LOST_AFTER_S + 2 * HEARTBEAT_S
        while not self._problem and time.monotonic() < end:
            time.sleep(HEARTBEAT_S / 5)
        return self._problem

    def announce(self, message: str) -> None:
        """Publish the error that ends this rank."""
        with self._lock:
            self._status["failed"] = message
        with contextlib.suppress(RuntimeError):
            self._publish(self._store)
            time.sleep(3 * HEARTBEAT_S)  # the store may end with this process: let others read it
        self._closed.set()

    def close(self) -> None:
        """Publish that this rank has finished and is no longer needed."""
        self._closed.set()
        with self._lock:
            self._status["done"] = True
        with contextlib.suppress(RuntimeError):
            self._publish(self._store)

    def _timed_out(self, where: str, keys: list[str], waited: float) -> str:
        found = self._read(self._store)
        missing = [rank for rank, key in enumerate(keys) if not self._store.check([key])]
        return (
            f"{_name(self.rank, self._status)} has waited {waited:.0f} s at {where} of step "
            f"{self._status['step']} for {_whereabouts(found, missing)}; if that is only slow, "
            f"raise train.timeout_minutes ({self.timeout_s / 60:g})"
        )

    def _watch(self) -> None:
        problem_since, grace = 0.0, min(GRACE_S, self.timeout_s)
        while not self._closed.wait(HEARTBEAT_S):
            now = time.monotonic()
            try:
                self._publish(self._thread_store)
                self._peers = self._read(self._thread_store)
                self._problem = self._problem or self._look(now)
            except RuntimeError:
                self._problem = self._problem or self._store_is_gone()
            stuck = now - self._since
            if self._status["stage"] == "update" and stuck > self.timeout_s + grace:
                self._problem = self._problem or self._stuck(stuck)
                self._end()
            if self._problem:
                problem_since = problem_since or now
                if now - problem_since > grace:
                    self._end()

    def _look(self, now: float) -> str:
        for rank, peer in enumerate(self._peers):
            if rank == self.rank or peer.get("done"):
                continue
            if failed := peer.get("failed"):
                return f"{_name(rank, peer)} failed in {_stage(peer)}: {failed}"
            if self._seen[rank][0] != peer["beat"]:
                self._seen[rank] = (peer["beat"], now)
            silent = now - self._seen[rank][1]
            if peer["machine"] == self._status["machine"]:
                gone = silent > 2 * HEARTBEAT_S and not _runs(peer["pid"])
            else:
                gone = silent > LOST_AFTER_S
            if gone:
                return (
                    f"{_name(rank, peer)} has been gone for {silent:.0f} s; it was last seen in "
                    f"{_stage(peer)}. If it was killed for its memory, the machine's log says so"
                )
        return ""

    def _stuck(self, seconds: float) -> str:
        others = [rank for rank in range(len(self._peers)) if rank != self.rank]
        return (
            f"{_name(self.rank, self._status)} has been in {_stage(self._status)} for "
            f"{seconds:.0f} s without progress; others: {_whereabouts(self._peers, others)}"
        )

    def _store_is_gone(self) -> str:
        first = f" It was last seen in {_stage(self._peers[0])}." if self._peers else ""
        return f"the store that connects the processes is gone, and with it rank 0.{first}"

    def _end(self) -> None:
        """End the process: the main thread is stuck in a call that never returns."""
        print(f"error: {self._problem} (rank {self.rank} ends)", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(2)

    def _publish(self, store: Any) -> None:
        with self._lock:
            self._beat += 1
            status = self._status | {
                "beat": self._beat, "for_s": round(time.monotonic() - self._since, 1),
            }  # fmt: skip
            store.set(f"status/{self.rank}", json.dumps(status))

    def _read(self, store: Any) -> list[dict[str, Any]]:
        keys = [f"status/{rank}" for rank in range(self.world)]
        return [json.loads(value) for value in store.multi_get(keys)]


def _name(rank: int, status: dict[str, Any]) -> str:
    return f"rank {rank} ({status['host']})"


def _stage(status: dict[str, Any]) -> str:
    return f"{status['stage']} of step {status['step']}"


def _whereabouts(statuses: list[dict[str, Any]], ranks: list[int]) -> str:
    return ", ".join(
        f"{_name(rank, statuses[rank])}, which has been in {_stage(statuses[rank])} for "
        f"{statuses[rank]['for_s']:.0f} s"
        for rank in ranks
    )


def _machine() -> str:
    """Equal for processes that can see each other's ids; host names need not be unique."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="utf-8") as file:
            return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"unknown {socket.gethostname()} {os.getpid()}"


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
            # "Z": a zombie, which has ended, but its parent has not collected it
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except ProcessLookupError:
        return False
    except OSError:  # another user's process, or no /proc here
        return True
