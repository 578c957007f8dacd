"""Two evaluations compared problem by problem.

For each sample only the verdict and the offset in the file are kept; texts are read when needed.
"""

from __future__ import annotations

import hashlib
import json
import threading
from array import array
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zlib import error as ZlibError

import numpy as np

from mm_agrae.errors import RunFolderError
from mm_agrae.evaluation.statistics import paired_difference
from mm_agrae.run.files import open_lines
from mm_agrae.run.folder import RunFolder
from mm_agrae.run.records import EvaluationResult, Interval

CACHED_EVALUATIONS = 8
"""Evaluations whose verdicts `SampleCache` keeps."""
_LINES_BETWEEN_REPORTS = 2000


@dataclass(frozen=True)
class StoredEvaluation:
    """One evaluation of one task, found in a run folder or a folder of `mm-agrae eval`."""

    folder: RunFolder
    result: EvaluationResult


def find_evaluations(runs: Mapping[str, Path]) -> tuple[dict[str, StoredEvaluation], list[str]]:
    """Name -> evaluation over all runs, and the errors of those that cannot be read."""
    found: dict[str, StoredEvaluation] = {}
    errors = []
    for run, path in runs.items():
        folder = RunFolder(path)
        try:
            for result in folder.read_evaluations():
                name = f"{run} · {result.name} · {result.label}"
                found[name] = StoredEvaluation(folder, result)
        except RunFolderError as error:
            errors.append(str(error))
    return found, errors


@dataclass
class _ProblemSamples:
    digest: bytes
    verdicts: list[bool] = field(default_factory=list)
    offsets: array[int] = field(default_factory=lambda: array("q"))


class EvaluationSamples:
    """The samples of one evaluation by problem (`example_id`).

    The greedy sample counts only if there are no others.
    """

    def __init__(self, path: Path, on_progress: Callable[[float], None] | None = None) -> None:
        """Raises RunFolderError if the file is missing or damaged."""
        self.path = path
        sampled: dict[str, _ProblemSamples] = {}
        greedy: dict[str, _ProblemSamples] = {}
        offset = number = 0
        try:
            size = 0 if path.suffix == ".gz" else path.stat().st_size
            with open_lines(path) as file:
                for number, line in enumerate(file, 1):
                    row = json.loads(line)
                    problems = greedy if row.get("sample") == -1 else sampled
                    asked = f"{row.get('question')}\n{row.get('answer')}".encode()
                    key = str(row.get("example_id"))
                    if key not in problems:
                        problems[key] = _ProblemSamples(hashlib.sha256(asked).digest()[:8])
                    problems[key].verdicts.append(bool(row.get("success")))
                    problems[key].offsets.append(offset)
                    offset += len(line)
                    if on_progress and size and number % _LINES_BETWEEN_REPORTS == 0:
                        on_progress(min(1.0, offset / size))
        except FileNotFoundError:
            raise RunFolderError(f"{path}: the samples of this evaluation were not kept") from None
        except (ValueError, AttributeError, EOFError, OSError, ZlibError) as error:
            raise RunFolderError(f"{path} line {number + 1} is damaged ({error})") from None
        self._problems = sampled or greedy
        self.verdicts = {key: problem.verdicts for key, problem in self._problems.items()}
        """Problem -> whether each of its samples is correct."""

    def same_problem(self, other: EvaluationSamples, key: str) -> bool:
        """Whether question and answer of a problem are the same in both."""
        return self._problems[key].digest == other._problems[key].digest

    def rows(self, key: str) -> list[dict[str, Any]]:
        """The full samples of one problem. Raises RunFolderError."""
        found = []
        try:
            with open_lines(self.path) as file:
                for offset in self._problems[key].offsets:
                    file.seek(offset)
                    found.append(json.loads(file.readline()))
        except (ValueError, EOFError, OSError, ZlibError):
            raise RunFolderError(f"{self.path} has been rewritten; choose again") from None
        return found

    def first_sample(self, key: str, correct: bool) -> dict[str, Any]:
        """The first sample that is correct (or incorrect); the first one if there is none."""
        verdicts = self.verdicts[key]
        return self.rows(key)[verdicts.index(correct) if correct in verdicts else 0]


class SampleCache:
    """Reads the samples of evaluations and keeps the latest. May be shared by threads."""

    def __init__(self) -> None:
        self._held: OrderedDict[tuple[Path, int, int], EvaluationSamples] = OrderedDict()
        self._lock = threading.Lock()

    def read(
        self, evaluation: StoredEvaluation, on_progress: Callable[[float], None] | None = None
    ) -> EvaluationSamples:
        """Raises RunFolderError if they were not kept or are damaged."""
        path = evaluation.folder.samples_path(evaluation.result)
        if path is None or not path.exists():
            raise RunFolderError(f"the samples of {evaluation.result.name} were not kept in {evaluation.folder.path}")
        state = path.stat()
        stamp = (path, state.st_mtime_ns, state.st_size)
        with self._lock:
            if stamp in self._held:
                self._held.move_to_end(stamp)
                return self._held[stamp]
        samples = EvaluationSamples(path, on_progress)
        with self._lock:
            self._held[stamp] = samples
            while len(self._held) > CACHED_EVALUATIONS:
                self._held.popitem(last=False)
        return samples


@dataclass(frozen=True)
class PairedProblem:
    """One problem: how many samples of each of two evaluations are correct, of how many."""

    key: str
    correct: tuple[int, int]
    samples: tuple[int, int]

    @property
    def gain(self) -> float:
        """Share of correct samples of the second evaluation minus that of the first."""
        return self.correct[1] / self.samples[1] - self.correct[0] / self.samples[0]

    @property
    def outcome(self) -> str:
        """A key of OUTCOMES."""
        if not any(self.correct):
            return "neither"
        if not all(self.correct):
            return "only first" if self.correct[0] else "only second"
        if self.gain == 0:
            return "same"
        return "second more" if self.gain > 0 else "first more"


OUTCOMES = {
    "only second": "solved by the second alone",
    "only first": "solved by the first alone",
    "second more": "solved by both, more often by the second",
    "first more": "solved by both, more often by the first",
    "same": "solved by both equally often",
    "neither": "solved by neither",
}
"""Solved: at least one sample is correct."""


@dataclass(frozen=True)
class PairedEvaluations:
    """Two evaluations on the problems they share, by outcome, largest gain or loss first.

    `mismatched` counts problems that share their id but not their question or answer.
    """

    first: EvaluationSamples
    second: EvaluationSamples
    by_outcome: dict[str, list[PairedProblem]]
    mismatched: int

    @classmethod
    def of(cls, first: EvaluationSamples, second: EvaluationSamples) -> PairedEvaluations:
        shared = [key for key in first.verdicts if key in second.verdicts]
        same = [key for key in shared if first.same_problem(second, key)]
        by_outcome: dict[str, list[PairedProblem]] = {outcome: [] for outcome in OUTCOMES}
        for key in same:
            a, b = first.verdicts[key], second.verdicts[key]
            problem = PairedProblem(key, (sum(a), sum(b)), (len(a), len(b)))
            by_outcome[problem.outcome].append(problem)
        for problems in by_outcome.values():
            problems.sort(key=lambda problem: -abs(problem.gain))
        return cls(first, second, by_outcome, len(shared) - len(same))

    @property
    def count(self) -> int:
        """How many problems are paired."""
        return sum(map(len, self.by_outcome.values()))

    def gain(self, k: int, among: Collection[str] | None = None) -> Interval | None:
        """pass@k of the second minus that of the first over the shared problems, or those `among` them.

        None if either sampled a problem fewer than k times, or problems unequally often.
        """
        shared = [problem.key for problems in self.by_outcome.values() for problem in problems]
        keys = [key for key in shared if among is None or key in among]
        tables = []
        for samples in (self.first, self.second):
            sizes = {len(samples.verdicts[key]) for key in keys}
            if len(sizes) != 1 or min(sizes) < k:
                return None
            tables.append(np.array([samples.verdicts[key] for key in keys]))
        return paired_difference(tables[0], tables[1], k)

    def sample_pair(self, problem: PairedProblem) -> tuple[dict[str, Any], dict[str, Any]]:
        """A sample of each that shows the gain: correct from the better one, else incorrect."""
        key, gain = problem.key, problem.gain
        return self.first.first_sample(key, gain <= 0), self.second.first_sample(key, gain >= 0)
