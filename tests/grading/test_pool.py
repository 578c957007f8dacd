"""The worker pool: limits hold, failures come back as messages, no process is left behind."""

import faulthandler
import gc
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from helpers import child_processes

from mm_agrae.grading import accuracy
from mm_agrae.grading.pool import CallFailed, WorkerPool

LIMIT_S = 0.3


def test_pool_calls_and_failures():
    before = child_processes()
    with WorkerPool(1, 256, accuracy.prepare_worker) as pool:
        assert pool.call(max, (3, 5), LIMIT_S) == 5
        for function, args, message in [
            (exec, ("while True: pass",), "timed out after 0.3 s"),
            (bytearray, (10**11,), "ran out of memory"),
            (faulthandler._sigsegv, (), "signal SIGSEGV"),
            (time.sleep, (600,), "timed out after 0.3 s"),
            (int, ("x",), "raised ValueError: invalid literal"),
            (max, (lambda: 0,), "could not be sent"),
        ]:
            with pytest.raises(CallFailed, match=message):
                pool.call(function, args, LIMIT_S)
            assert pool.call(max, (3, 5), LIMIT_S) == 5
        assert len(child_processes() - before) == 1
    assert child_processes() <= before
    with pytest.raises(RuntimeError, match="closed"):
        pool.submit(max, (3, 5), LIMIT_S)
    pool.close()


def test_importing_does_not_count_against_the_limit():
    with WorkerPool(1, 256, time.sleep, (1.0,)) as pool:
        assert pool.call(max, (3, 5), 0.05) == 5


def test_a_worker_killed_while_idle_is_replaced():
    before = child_processes()
    with WorkerPool(1, 256, gc.collect) as pool:
        assert pool.call(max, (3, 5), LIMIT_S) == 5
        (worker,) = child_processes() - before
        os.kill(worker, signal.SIGKILL)
        time.sleep(0.5)  # the pool notices
        assert pool.call(max, (3, 5), LIMIT_S) == 5


SIGNALLED = """
import gc, os, signal, threading, time
from mm_agrae.grading.pool import WorkerPool
signal.signal(signal.SIGTERM, lambda *_: print("asked to end", flush=True))
with WorkerPool(1, 256, gc.collect) as pool:
    pool.call(max, (3, 5), 1.0)
    threading.Timer(0.5, os.killpg, (0, signal.SIGTERM)).start()
    print(pool.call(exec, ("import time; time.sleep(1.5)",), 5.0), flush=True)
"""


def test_a_signal_to_the_whole_group_costs_no_answer():
    result = subprocess.run([sys.executable, "-c", SIGNALLED], capture_output=True, text=True, start_new_session=True)
    assert result.stdout.splitlines() == ["asked to end", "None"], result.stderr


ORPHAN = """
import sys, time
from mm_agrae.grading.pool import WorkerPool
import gc
pool = WorkerPool(1, 256, gc.collect)
pool.call(max, (3, 5), 1.0)
import psutil
print(*[child.pid for child in psutil.Process().children()], flush=True)
time.sleep(600)
"""


def test_workers_end_with_their_parent():
    parent = subprocess.Popen([sys.executable, "-c", ORPHAN], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    workers = [psutil.Process(int(pid)) for pid in parent.stdout.readline().split()]
    assert workers
    parent.kill()
    parent.wait()
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert alive == []
