"""Worker processes that run calls under limits of time and memory.

pebble's ProcessPool does the work: it kills a worker that runs past its limit, notices one that
died, and starts another. Added here:

* Workers are spawned, so threads and CUDA state of the training process are not copied into
  them, and they do not import the program's main script, which may load torch.
* Time limits count CPU time, so a busy machine does not use them up; a call that sleeps or waits
  is ended after `WAITING` times its limit of wall-clock time.
* `prepare` runs before a worker's first call, so imports do not count against a limit.
* The memory limit (RLIMIT_AS, on systems that have it) is what calls may use on top of what the
  prepared worker has.
* Every failure comes back as a `CallFailed` that says what happened; exceptions of the other
  process are never unpickled.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import multiprocessing.spawn
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, TimeoutError
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import Any, NamedTuple

from pebble import ProcessExpired, ProcessPool

WAITING = 5
"""Seconds of wall-clock time that a call may take for each second of its limit."""
_OUT_OF_MEMORY = 86  # exit status of a worker that ran out of memory
_TIME_IS_UP = getattr(signal, "SIGPROF", 0)
_STALLED_S = 120.0  # without any result for this long, the pool itself is broken


class CallFailed(Exception):
    """A call gave no result. The message says why."""


class PoolBroken(CallFailed):
    """The pool broke down, perhaps not because of this call: try once more."""


class Call(NamedTuple):
    """A submitted call."""

    future: Future
    pool: ProcessPool
    limit_s: float


class WorkerPool:
    """`workers` processes that run calls, each call under its own limits.

    `prepare(*prepare_args)` runs once in each process before its first call; like every function
    called here it must be defined at the top level of a module. May be used from any thread. Close
    it, or use it as a context manager, and no process is left behind.
    """

    def __init__(
        self, workers: int, memory_limit_mb: int, prepare: Callable[..., None], prepare_args: Sequence[Any] = ()
    ):
        self._memory_limit_mb = memory_limit_mb
        self._start = partial(
            ProcessPool,
            max_workers=workers,
            initializer=_initialise,
            initargs=(memory_limit_mb, prepare, tuple(prepare_args)),
            context=_Context(),
        )
        self._lock = threading.Lock()
        self._last_sign_of_life = time.monotonic()
        self._closed = False
        self._pool = self._start()

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def submit(self, function: Callable[..., Any], args: Sequence[Any], limit_s: float) -> Call:
        """Schedule `function(*args)`, which is killed after `limit_s` seconds of CPU time."""
        with self._lock:
            if self._closed:
                raise RuntimeError("the worker pool is closed")
            pool = self._pool if self._pool.active else self._replace(self._pool)
            self._last_sign_of_life = time.monotonic()
            call = (function, tuple(args), limit_s)
            future = pool.schedule(_call, args=call, timeout=WAITING * limit_s)
        future.add_done_callback(self._alive)
        return Call(future, pool, limit_s)

    def result(self, call: Call) -> Any:
        """Wait for a submitted call. Raises CallFailed, or PoolBroken if it is worth a retry."""
        error = self._wait(call)
        if error is None:
            returned, value = call.future.result()
            if returned:
                return value
            raise CallFailed(value)
        if isinstance(error, TimeoutError | ProcessExpired):
            exitcode = getattr(error, "exitcode", -_TIME_IS_UP)
            raise CallFailed(self._how_it_ended(exitcode, call.limit_s))
        if isinstance(error, TypeError | AttributeError | pickle.PicklingError):
            raise CallFailed(f"could not be sent to a worker process: {error}")
        with self._lock:
            self._replace(call.pool)
        raise PoolBroken("lost its worker process")

    def _wait(self, call: Call) -> BaseException | None:
        while True:
            try:
                return call.future.exception(timeout=1.0)
            except TimeoutError:
                stalled = time.monotonic() - self._last_sign_of_life
                if stalled > _STALLED_S + WAITING * call.limit_s:
                    return BrokenProcessPool()
            except CancelledError as error:
                return error

    def call(self, function: Callable[..., Any], args: Sequence[Any], limit_s: float) -> Any:
        """Run `function(*args)` and return its value. Raises CallFailed."""
        try:
            return self.result(self.submit(function, args, limit_s))
        except PoolBroken:
            return self.result(self.submit(function, args, limit_s))

    def close(self) -> None:
        """End all workers, whatever they are doing."""
        with self._lock:
            self._closed = True
            self._pool.stop()
            self._pool.join()

    def _replace(self, broken: ProcessPool) -> ProcessPool:
        if broken is self._pool and not self._closed:
            broken.stop()
            broken.join()
            self._pool = self._start()
        return self._pool

    def _alive(self, _: Future) -> None:
        self._last_sign_of_life = time.monotonic()

    def _how_it_ended(self, exitcode: int, limit_s: float) -> str:
        if exitcode == -_TIME_IS_UP:
            return f"timed out after {limit_s:g} s"
        if exitcode == _OUT_OF_MEMORY:
            return f"ran out of memory (limit {self._memory_limit_mb} MB)"
        if exitcode < 0:
            return f"ended its worker process by signal {signal.Signals(-exitcode).name}"
        return f"ended its worker process with exit code {exitcode}"


def describe(error: BaseException) -> str:
    """What a function raised, in one short line."""
    try:
        message = " ".join(str(error).split())
    except Exception:
        message = "(no message: its __str__ raises)"
    message = message if len(message) <= 200 else message[:197] + "..."
    return f"raised {type(error).__name__}: {message}".removesuffix(": ")


def _initialise(memory_limit_mb: int, prepare: Callable[..., None], args: tuple[Any, ...]) -> None:
    # Ctrl-C and a scheduler's SIGTERM go to the whole process group, but the trainer finishes its
    # step and needs the workers for that. They end with their parent in any case.
    if hasattr(os, "setpgrp"):
        os.setpgrp()
    # pebble's handler would wait for the interpreter, which a call may hold.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    prepare(*args)
    _limit_memory(memory_limit_mb)


def _limit_memory(limit_mb: int) -> None:
    try:
        import resource

        with open("/proc/self/statm", encoding="ascii") as status:
            taken = int(status.read().split()[0]) * resource.getpagesize()
    except (ImportError, OSError):  # not Linux: only the time limit applies
        return
    limit = taken + limit_mb * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def limit_computing(seconds: float) -> None:
    """End this process after this much CPU time from now on; 0 for no limit.

    The kernel does it, so a call stuck in C code is ended as well.
    """
    if _TIME_IS_UP:
        signal.setitimer(signal.ITIMER_PROF, seconds)


def _call(function: Callable[..., Any], args: tuple[Any, ...], limit_s: float) -> tuple[bool, Any]:
    # If the parent dies, nobody else would end a call that waits for ever.
    with open(os.devnull, "w") as nowhere:
        faulthandler.dump_traceback_later(WAITING * limit_s + 10, exit=True, file=nowhere)
        limit_computing(limit_s)
        try:
            return True, function(*args)
        except MemoryError:
            os._exit(_OUT_OF_MEMORY)  # whatever holds the memory may stay: start afresh
        except BaseException as error:  # sys.exit() among them
            return False, describe(error)
        finally:
            limit_computing(0)
            faulthandler.cancel_dump_traceback_later()


_starting = threading.Lock()


class _Process(SpawnProcess):
    """A spawned process that does not import the program's main script.

    multiprocessing imports it to find functions defined in it. Here there are none, its imports
    would cost each worker seconds, and a script without `if __name__ == "__main__"` would start
    itself again. Daemonic processes may start one too: it ends with its pipe.
    """

    def start(self) -> None:
        starter = threading.get_ident()
        config: dict[str, Any] = multiprocessing.current_process()._config  # type: ignore[attr-defined]
        with _starting:
            preparation_data = multiprocessing.spawn.get_preparation_data
            daemon = config.get("daemon")

            def without_main(name: str) -> dict[str, Any]:
                data = preparation_data(name)
                mine = threading.get_ident() == starter
                return {k: v for k, v in data.items() if not (mine and k.startswith("init_main"))}

            multiprocessing.spawn.get_preparation_data = without_main  # type: ignore[assignment]
            config["daemon"] = False
            try:
                super().start()
            finally:
                multiprocessing.spawn.get_preparation_data = preparation_data
                config["daemon"] = daemon


class _Context(SpawnContext):
    Process = _Process  # type: ignore[assignment]
