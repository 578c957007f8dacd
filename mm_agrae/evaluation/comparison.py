"""Evaluations held against each other, problem by problem.

Of each sample only the verdict and its place in the file are held; texts are read for the
problems that are looked at.
"""

from __future__ import annotations

import hashlib
import json
import threading
from array import array
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zlib import error as ZlibError

import numpy as np

from mm_agrae.errors import RunFolderError
from mm_agrae.evaluation.evaluate import paired_difference
from mm_agrae.run.records import EvaluationResult, Interval, RunFolder, open_samples

SAMPLES_HELD = 8
"""Evaluations whose verdicts are remembered."""
_LINES_BETWEEN_REPORTS = 2000

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of one task, found in a run folder or a folder of `mm-agrae eval`."""

    folder: RunFolder
    result: EvaluationResult


def find_evaluations(runs: Mapping[str, Path]) -> tuple[dict[str, Evaluation], list[str]]:
    """Name -> evaluation over all runs, and what was wrong with those that cannot be read."""
    found: dict[str, Evaluation] = {}
    troubles = []
    for run, path in runs.items():
        folder = RunFolder(path)
        try:
            for result in folder.read_evaluations():
                found[f"{run} · {result.name} · {result.label}"] = Evaluation(folder, result)
        except RunFolderError as error:
            troubles.append(str(error))
    return found, troubles


@dataclass
class _Problem:
    digest: bytes
    verdicts: list[bool] = field(default_factory=list)
    offsets: array[int] = field(default_factory=lambda: array("q"))


class Samples:
    """The samples of one evaluation by problem: verdicts held, texts read when asked for.

    Problems go by `example_id`. The greedy sample counts only if there are no others.
    """

    def __init__(self, path: Path, on_progress: Callable[[float], None] | None = None) -> None:
        """Raises RunFolderError if the file is missing or damaged."""
        self.path = path
        sampled: dict[str, _Problem] = {}
        greedy: dict[str, _Problem] = {}
        size = 0 if path.suffix == ".gz" else _size(path)
        offset = number = 0
        try:
            with open_samples(path) as file:
                for number, line in enumerate(file, 1):
                    row = json.loads(line)
                    kind = greedy if row.get("sample") == -1 else sampled
                    asked = f"{row.get('question')}\n{row.get('answer')}".encode()
                    key = str(row.get("example_id"))
                    if key not in kind:
                        kind[key] = _Problem(hashlib.sha256(asked).digest()[:8])
                    kind[key].verdicts.append(bool(row.get("success")))
                    kind[key].offsets.append(offset)
                    offset += len(line)
                    if on_progress and size and number % _LINES_BETWEEN_REPORTS == 0:
                        on_progress(min(1.0, offset / size))
        except FileNotFoundError:
            raise RunFolderError(f"{path}: the samples of this evaluation were not kept") from None
        except (ValueError, AttributeError, EOFError, OSError, ZlibError) as error:
            raise RunFolderError(f"{path} line {number + 1} is damaged ({error})") from None
        self._problems = sampled or greedy
        self.verdicts = {key: problem.verdicts for key, problem in self._problems.items()}
        """Right or wrong of every sample by problem."""

    def asks_the_same(self, other: Samples, key: str) -> bool:
        """Whether question and answer of a problem are the same in both."""
        return self._problems[key].digest == other._problems[key].digest

    def rows(self, key: str) -> list[dict[str, Any]]:
        """Everything about the samples of one problem. Raises RunFolderError."""
        found = []
        try:
            with open_samples(self.path) as file:
                for offset in self._problems[key].offsets:
                    file.seek(offset)
                    found.append(json.loads(file.readline()))
        except (ValueError, EOFError, OSError, ZlibError):
            raise RunFolderError(f"{self.path} has been written anew; choose again") from None
        return found

    def trace(self, key: str, right: bool) -> dict[str, Any]:
        """The first sample that is right (or wrong); the first one if none is."""
        verdicts = self._problems[key].verdicts
        return self.rows(key)[verdicts.index(right) if right in verdicts else 0]


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


class SampleReader:
    """Reads the samples of evaluations and remembers the latest. May be shared by threads."""

    def __init__(self) -> None:
        self._held: OrderedDict[tuple[Path, int, int], Samples] = OrderedDict()
        self._lock = threading.Lock()

    def read(
        self, evaluation: Evaluation, on_progress: Callable[[float], None] | None = None
    ) -> Samples:
        """Raises RunFolderError if they were not kept or are damaged."""
        path = evaluation.folder.samples_path(evaluation.result)
        if path is None or not path.exists():
            raise RunFolderError(
                f"the samples of {evaluation.result.name} were not kept in {evaluation.folder.path}"
            )
        state = path.stat()
        stamp = (path, state.st_mtime_ns, state.st_size)
        with self._lock:
            if stamp in self._held:
                self._held.move_to_end(stamp)
                return self._held[stamp]
        samples = Samples(path, on_progress)
        with self._lock:
            self._held[stamp] = samples
            while len(self._held) > SAMPLES_HELD:
                self._held.popitem(last=False)
        return samples


@dataclass(frozen=True)
class Difference:
    """One problem: how many samples of each of two evaluations are right, of how many."""

    key: str
    right: tuple[int, int]
    samples: tuple[int, int]

    @property
    def gain(self) -> float:
        """Share of right samples of the second minus that of the first."""
        return self.right[1] / self.samples[1] - self.right[0] / self.samples[0]


KINDS = {
    "only second": "solved by the second alone",
    "only first": "solved by the first alone",
    "second more": "solved by both, more often by the second",
    "first more": "solved by both, more often by the first",
    "same": "solved by both equally often",
    "neither": "solved by neither",
}
"""Solved: at least one sample is right."""


@dataclass(frozen=True)
class Contrast:
    """Two evaluations on the problems they share, sorted into KINDS, largest gain or loss first.

    `different` counts problems that share their id but not their question or answer.
    """

    first: Samples
    second: Samples
    kinds: dict[str, list[Difference]]
    different: int

    @classmethod
    def of(cls, first: Samples, second: Samples) -> Contrast:
        shared = [key for key in first.verdicts if key in second.verdicts]
        same = [key for key in shared if first.asks_the_same(second, key)]
        kinds: dict[str, list[Difference]] = {kind: [] for kind in KINDS}
        for key in same:
            found = first.verdicts[key], second.verdicts[key]
            difference = Difference(
                key, (sum(found[0]), sum(found[1])), (len(found[0]), len(found[1]))
            )
            kinds[_kind(difference)].append(difference)
        for differences in kinds.values():
            differences.sort(key=lambda d: -abs(d.gain))
        return cls(first, second, kinds, len(shared) - len(same))

    @property
    def problems(self) -> int:
        return sum(map(len, self.kinds.values()))

    def gain(self, k: int) -> Interval | None:
        """pass@k of the second minus that of the first over the shared problems.

        None if either sampled a problem fewer than k times, or problems unequally often.
        """
        keys = [d.key for differences in self.kinds.values() for d in differences]
        tables = []
        for samples in (self.first, self.second):
            sizes = {len(samples.verdicts[key]) for key in keys}
            if len(sizes) != 1 or min(sizes) < k:
                return None
            tables.append(np.array([samples.verdicts[key] for key in keys]))
        return paired_difference(tables[0], tables[1], k)

    def traces(self, difference: Difference) -> tuple[dict[str, Any], dict[str, Any]]:
        """A sample of each that shows the difference: right where more are right, else wrong."""
        gain = difference.gain
        if gain == 0:
            return self.first.trace(difference.key, True), self.second.trace(difference.key, True)
        return (
            self.first.trace(difference.key, gain < 0),
            self.second.trace(difference.key, gain > 0),
        )


def _kind(difference: Difference) -> str:
    right = difference.right
    if not any(right):
        return "neither"
    if not all(right):
        return "only first" if right[0] else "only second"
    if difference.gain == 0:
        return "same"
    return "second more" if difference.gain > 0 else "first more"
