"""This process among those of a run: what it exchanges with them, and how the model is spread.

accelerate's launcher says how many processes there are and which parallelism strategy to use
(`strategies`). Every exchange begins with a barrier that can name a missing rank (`watchdog`).
"""

import contextlib
import functools
import signal
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, gather_object

from mm_agrae.config import Config
from mm_agrae.errors import ConfigError, ProcessError
from mm_agrae.out_of_memory import explained
from mm_agrae.parallel.strategies import backend, check_environment, make_strategy
from mm_agrae.parallel.watchdog import GRACE_S, Watchdog

Method = TypeVar("Method", bound=Callable[..., Any])
Result = TypeVar("Result")


def start(config: Config) -> PartialState:
    """Join the other processes, if there are any."""
    check_environment()
    on_cpu = config.model.device == "cpu"
    return PartialState(cpu=on_cpu, backend=backend(on_cpu), timeout=_timeout(config))


def _timeout(config: Config) -> timedelta:
    # Collective calls give up a little later than our barriers, which can say who is missing.
    return timedelta(minutes=config.train.timeout_minutes, seconds=2 * GRACE_S)


def announced(method: Method) -> Method:
    """For methods of an object with `processes` and `config`: tell the other ranks what ends this one."""

    @functools.wraps(method)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return method(self, *args, **kwargs)
        except BaseException as error:
            problem = explained(error, self.config)
            if processes := getattr(self, "processes", None):
                processes.announce(problem)
            if problem is error:
                raise
            raise problem from error

    return cast(Method, run)


class Processes:
    """This process among all those of a run. With a single process every method is trivial.

    Raises ConfigError for launcher settings that are not supported.
    """

    def __init__(self, config: Config):
        check_environment()
        on_cpu = config.model.device == "cpu"
        self.accelerator = Accelerator(
            cpu=on_cpu,
            kwargs_handlers=[
                # Gradients live in DDP's buckets, of which there would else be a second copy.
                DistributedDataParallelKwargs(gradient_as_bucket_view=True),
                InitProcessGroupKwargs(backend=backend(on_cpu), timeout=_timeout(config)),
            ],
        )
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        self.is_main = self.accelerator.is_main_process
        self.device = self.accelerator.device
        self.strategy = make_strategy(self.accelerator)
        if self.world > config.rollout.prompts_per_step:
            raise ConfigError(
                f"rollout.prompts_per_step = {config.rollout.prompts_per_step} is less than the "
                f"{self.world} processes, each of which needs a prompt; raise it or start fewer"
            )
        timeout_s = 60 * config.train.timeout_minutes
        self._watchdog = Watchdog(self.rank, self.world, timeout_s) if self.world > 1 else None

    @property
    def loading_device(self) -> torch.device:
        """Where the model is loaded.

        A whole one may not fit on the device, nor one for each process in main memory: of a sharded model, processes
        other than the main one know the shapes alone ("meta") until they get their shards.
        """
        if not self.strategy.sharded:
            return self.device
        return torch.device("cpu" if self.is_main else "meta")

    def note(self, stage: str, step: int) -> None:
        """Publish what this process is doing, for the error messages of those that wait for it."""
        if self._watchdog is not None:
            self._watchdog.note(stage, step)

    def barrier(self, where: str) -> None:
        """Wait until all processes are here. Raises ProcessError naming one that is not."""
        if self._watchdog is not None:
            self._watchdog.barrier(where)

    def gather(self, items: list[Any], where: str) -> list[Any]:
        """Items of all processes, in the order of ranks. Raises ProcessError as `barrier`."""
        if self._watchdog is None:
            return items
        self.barrier(where)
        with self.explained():
            return gather_object(items)

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """Around collective calls: if one fails because of another rank, say which."""
        try:
            yield
        except RuntimeError as error:
            if self._watchdog is None or not _is_communication_error(error):
                raise
            if problem := self._watchdog.explain():
                raise ProcessError(problem) from error
            raise

    def announce(self, error: BaseException) -> None:
        """Tell the other processes that this one ends, and why."""
        if self._watchdog is not None:
            self._watchdog.announce(f"{type(error).__name__}: {error}")

    def close(self) -> None:
        """Leave: from now on no process needs this one."""
        if self._watchdog is not None:
            self._watchdog.close()


def _is_communication_error(error: RuntimeError) -> bool:
    words = ("gloo", "nccl", "connection", "timed out", "timeout")
    return isinstance(error, dist.DistError) or any(word in str(error).lower() for word in words)


class Stopped(Exception):
    """An evaluation ends, on every rank alike, because one of them was asked to stop."""


class _CutShort(BaseException):
    """Raised by a signal in what need not be finished; no `except Exception` may take it for an error."""


class StopRequest:
    """Whether the run was asked to stop: the step is finished and saved instead of ending at once.

    `say` is called when it first is. `exit_status` is 130 once SIGINT has cut an evaluation short, else 0.
    """

    def __init__(self, processes: Processes, say: Callable[[str], None]):
        self.requested = False
        self.exit_status = 0
        self._processes, self._say = processes, say
        self._at_once = False
        self._signal = 0

    def everywhere(self) -> bool:
        """Whether any rank was asked to; every rank calls this."""
        self.requested = any(self._processes.gather([self.requested], "stop"))
        return self.requested

    def interruptible(self, work: Callable[[], Result]) -> Result:
        """What `work` returns; a signal ends it at once. Raises Stopped on all ranks if any was asked to stop.

        With several processes a signal must not part them in a collective call: there `check`, called where there is
        none, ends the work of the process that was asked, and the others finish theirs.
        """
        result: list[Result] = []
        if not self.everywhere():
            try:
                try:
                    self._at_once = self._processes.world == 1
                    result.append(work())
                finally:
                    self._at_once = False
            except _CutShort:
                self.exit_status = 130 if self._signal == signal.SIGINT else 0
        if self.everywhere():
            raise Stopped
        return result[0]

    def check(self) -> None:
        """Within the work of `interruptible`: end it if this process was asked to stop."""
        if self.requested:
            raise _CutShort

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """While active, the first SIGINT or SIGTERM asks for a stop; the second raises."""
        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread receives signals
            return

        def ask(number: int, frame: Any) -> None:
            if self.requested:
                raise KeyboardInterrupt
            self.requested, self._signal = True, number
            self._say("stopping: a step is finished first, an evaluation is not; once more to stop at once")
            if self._at_once:
                raise _CutShort

        earlier = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in earlier.items():
                signal.signal(number, handler)
