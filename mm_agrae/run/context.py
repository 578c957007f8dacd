"""What every part of a training run works with."""

from dataclasses import dataclass

from mm_agrae.config import Config
from mm_agrae.parallel.processes import Processes
from mm_agrae.progress import Reporter
from mm_agrae.run.folder import RunFolder
from mm_agrae.run.metrics import Stopwatch


@dataclass(frozen=True)
class RunContext:
    """The run's settings, its processes, where its results go, and what people see of it."""

    config: Config
    processes: Processes
    folder: RunFolder
    reporter: Reporter
    stopwatch: Stopwatch
