"""Logging of metrics (metrics.jsonl and trackers), timing by stage, peak memory."""

from __future__ import annotations

import logging
import math
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm_agrae.errors import ConfigError, install
from mm_agrae.out_of_memory import during
from mm_agrae.run.folder import RunFolder

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

logger = logging.getLogger(__name__)


class MetricLogger:
    """Writes one line per step to the run folder and sends the same numbers to the trackers.

    sinks: any of "tensorboard" (files under `<run>/tensorboard`), "trackio", "wandb". Raises
    ConfigError if a tracker is not installed or cannot start. One that fails later is reported
    once and dropped; the run continues. Raises RunFolderError if the run folder itself fails.
    """

    def __init__(
        self,
        run_folder: RunFolder,
        sinks: Sequence[str] = (),
        project: str = "mm-agrae",
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self.run_folder = run_folder
        self._trackers: dict[str, GeneralTracker] = {}
        for sink in sinks:
            try:
                self._trackers[sink] = _start(sink, run_folder.path, project, dict(config or {}))
            except Exception as error:
                problem, remedy = f"cannot start ({error})", "set it up"
                if isinstance(error, ImportError):
                    problem = f"is not installed ({error})"
                    remedy = f"run {install('trackers')}"
                raise ConfigError(
                    f"log.sinks holds {sink}, which {problem}; {remedy} or remove it from log.sinks"
                ) from error

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Write one step's numbers; those that are not finite are null and not sent to trackers."""
        numbers = {name: float(value) for name, value in metrics.items() if value is not None}
        self.run_folder.append_metrics({"step": step} | numbers)
        finite = {name: value for name, value in numbers.items() if math.isfinite(value)}
        self._each(lambda tracker: tracker.log(finite, step=step))

    def close(self) -> None:
        self._each(lambda tracker: tracker.finish())
        self._trackers = {}

    def _each(self, act: Callable[[GeneralTracker], Any]) -> None:
        for sink, tracker in list(self._trackers.items()):
            try:
                act(tracker)
            except Exception as error:
                logger.warning("%s failed and gets no more numbers of this run: %s", sink, error)
                del self._trackers[sink]


def _start(sink: str, path: Path, project: str, config: dict[str, Any]) -> GeneralTracker:
    from accelerate import PartialState, tracking

    PartialState()  # trackers need it; in a run it exists by now
    tracker: GeneralTracker
    if sink == "tensorboard":
        tracker = tracking.TensorBoardTracker("tensorboard", logging_dir=path)
    elif sink == "trackio":
        tracker = tracking.TrackioTracker(project, name=path.name, config=config)
    else:
        tracker = tracking.WandBTracker(project, name=path.name, config=config, dir=str(path))
    tracker.start()
    return tracker


class Stopwatch:
    """Wall and CPU seconds by stage.

        with stopwatch("rollout"):
            ...
        metrics |= stopwatch.lap()

    CPU seconds are this process's, over all its threads, without child processes (reward
    workers). The GPU is synchronised at both ends of a stage, else queued work would be charged
    to the next stage that waits. A stage inside a stage counts in both.
    """

    def __init__(self, on_stage: Callable[[str], None] | None = None) -> None:
        self._on_stage = on_stage
        self.totals: dict[str, float] = {}
        """Seconds by `seconds/<stage>` and `cpu_seconds/<stage>` since the start."""
        self._lap: dict[str, float] = {}
        self._since = (time.perf_counter(), time.process_time())

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        if self._on_stage:
            self._on_stage(stage)
        _synchronise_gpu()
        wall, cpu = time.perf_counter(), time.process_time()
        try:
            with during(stage):
                yield
        finally:
            _synchronise_gpu()
            self._add(stage, time.perf_counter() - wall, time.process_time() - cpu)

    def lap(self) -> dict[str, float]:
        """Seconds by stage since the last lap; `total` includes what no stage covered."""
        now = (time.perf_counter(), time.process_time())
        self._add("total", now[0] - self._since[0], now[1] - self._since[1])
        self._since = now
        lap, self._lap = self._lap, {}
        return lap

    def wall_seconds(self) -> dict[str, float]:
        """Wall seconds by stage since the start."""
        by_name = [(name.split("/", 1), value) for name, value in self.totals.items()]
        return {stage: value for (kind, stage), value in by_name if kind == "seconds"}

    def _add(self, stage: str, wall: float, cpu: float) -> None:
        for key, seconds in ((f"seconds/{stage}", wall), (f"cpu_seconds/{stage}", cpu)):
            self._lap[key] = self._lap.get(key, 0.0) + seconds
            self.totals[key] = self.totals.get(key, 0.0) + seconds


def _used_cuda() -> Any:
    """torch.cuda if this process has used it; asking must not initialise it."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_initialized() else None


def _synchronise_gpu() -> None:
    if (cuda := _used_cuda()) is not None:
        cuda.synchronize()


def peak_memory() -> dict[str, float]:
    """Peak memory of this process so far as metrics (MiB); what torch has allocated on the current
    GPU only if one is used."""
    found = {"memory/peak_mb": peak_memory_mb()}
    if (cuda := _used_cuda()) is not None:
        found["memory/peak_gpu_mb"] = cuda.max_memory_allocated() / (1 << 20)
    return found


def peak_memory_mb() -> float:
    """Highest resident memory of this process so far, in MiB."""
    try:  # ru_maxrss includes the parent process's peak from before exec
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    except OSError:
        pass
    unit = 1 << 20 if sys.platform == "darwin" else 1 << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
