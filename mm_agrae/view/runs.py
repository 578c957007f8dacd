"""Reading runs for display: metrics as they are written, and the groups of one step at a time.

Only an overview of a step's groups is held in memory (`GroupOverview`); texts are read for the
groups on the screen. So memory does not grow with the length of a run, and a run that is still
going on is followed without reading anything twice.
"""

import itertools
import math
import threading
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mm_agrae.errors import RunFolderError
from mm_agrae.run.folder import MetricsMark, RunFolder
from mm_agrae.run.records import EvaluationResult, sampled_success

Record = Mapping[str, Any]
"""One line of a run's files: metrics of a step, a completion or an evaluation's sample."""

MOST_FOUND = 200  # groups, with which a search over steps ends
STEPS_HELD = 4
"""How many steps to keep overviews of, least recently used out first."""

_LIGHT = (
    "resample_round",
    "prompt_index",
    "success",
    "finish_reason",
    "error",
    "reward",
    "advantage",
    "success_before",
)
_SEARCHED = ("completion", "question", "answer", "example_id")


@dataclass(frozen=True)
class GroupOverview:
    """The completions of one prompt at one `step`, without their texts.

    `rows` are their indices in the step's file. `correct`, `truncated`, `failed` and `timed_out`
    count completions (`failed`: the verifier raised or timed out); `strongest` is the highest
    |A| among them, `reward` their mean.
    """

    step: int
    rows: tuple[int, ...]
    correct: int
    truncated: int
    failed: int
    timed_out: int
    strongest: float
    reward: float

    @property
    def kind(self) -> str:
        """ "all correct", "all incorrect" or "mixed"."""
        return {0: "all incorrect", len(self.rows): "all correct"}.get(self.correct, "mixed")


FILTERS = {
    "all": lambda group: True,
    "mixed": lambda group: group.kind == "mixed",
    "all incorrect": lambda group: group.kind == "all incorrect",
    "all correct": lambda group: group.kind == "all correct",
    "truncated": lambda group: group.truncated > 0,
    "verifier timed out": lambda group: group.timed_out > 0,
    "verifier failed": lambda group: group.failed > 0,
}
ORDERS = {
    "as sampled": lambda group: 0.0,
    "highest |A| first": lambda group: -group.strongest,
    "highest reward first": lambda group: -group.reward,
    "lowest reward first": lambda group: group.reward,
}


@dataclass
class Found:
    """What a search has found: groups, and the (step, row) of each match in them. `searched` counts the newest steps
    that were read until there was enough, `damaged` those of them that could not be."""

    groups: list[GroupOverview]
    rows: set[tuple[int, int]] = field(default_factory=set)
    searched: int = 0
    damaged: int = 0


def select(groups: Sequence[GroupOverview], show: str = "all", order: str = "as sampled") -> list[GroupOverview]:
    """Groups that pass one of FILTERS, in one of ORDERS. Raises KeyError for other names."""
    return sorted(filter(FILTERS[show], groups), key=ORDERS[order])


class RunReader:
    """One run folder, read as far as it has been written. Safe to share between threads."""

    def __init__(self, path: str | Path) -> None:
        self.folder = RunFolder(path)
        self.metrics: list[dict[str, Any]] = []
        self.steps: list[int] = []
        """Steps whose rollouts were kept, ascending."""
        self._mark: MetricsMark | None = None
        self._held: OrderedDict[tuple[int, int, int], list[GroupOverview]] = OrderedDict()
        self._lock = threading.Lock()

    def refresh(self) -> tuple[int, int, int, bool]:
        """Read what has been written since; the stamp returned differs if there was anything.

        Raises RunFolderError if there is no run (any more) or its metrics are damaged.
        """
        with self._lock:
            rows, self._mark, anew = self.folder.follow_metrics(self._mark)
            self.metrics = rows if anew else self.metrics + rows
            self.steps = self.folder.rollout_steps()
            end = self._mark or MetricsMark(0, 0, 0)
            newest = self.steps[-1] if self.steps else 0
            return end.file, end.end, newest, bool(self.folder.read_summary())

    def config(self) -> dict[str, Any]:
        """The resolved config; empty if it is not YAML. Raises RunFolderError without a run."""
        try:
            values = yaml.safe_load(self.folder.read_config())
        except yaml.YAMLError:
            return {}
        return values if isinstance(values, dict) else {}

    def only_evaluations(self) -> bool:
        """Whether this is a folder of `mm-agrae eval`, not of a training run."""
        evaluations = [] if self.metrics else self.folder.read_evaluations()
        return bool(evaluations) and not training_ends(evaluations)

    def progress(self) -> str:
        """How far the run is, in words."""
        last = next((record["step"] for record in reversed(self.metrics) if "step" in record), 0)
        train = self.config().get("train")
        planned = train.get("steps") if isinstance(train, dict) else None
        if self.only_evaluations():
            return "An evaluation of checkpoints, without training."
        if self.folder.read_summary():
            return f"Finished after {last:,} steps."
        if last:
            return f"Not finished: {last:,}{f' of {planned}' if planned else ''} steps so far."
        return "No step has been logged yet."

    def nearest(self, step: float) -> int | None:
        """The kept step closest to `step`; None if none was kept."""
        index = bisect_left(self.steps, step)
        around = self.steps[max(0, index - 1) : index + 1]
        return min(around, key=lambda kept: abs(kept - step), default=None)

    @property
    def stride(self) -> int:
        """The greatest common divisor of the distances between kept steps; 1 for a single one."""
        return math.gcd(*(step - self.steps[0] for step in self.steps)) or 1

    def groups(self, step: int) -> list[GroupOverview]:
        """The groups of a step in the order sampled. Raises RunFolderError."""
        with self._lock:
            stamp = (step, *self.folder.rollout_stamp(step))
            if stamp not in self._held:
                self._held[stamp] = _overviews(step, self.folder.iter_rollouts(step, _LIGHT))
            self._held.move_to_end(stamp)
            while len(self._held) > STEPS_HELD:
                self._held.popitem(last=False)
            return self._held[stamp]

    def rows(self, step: int, groups: Iterable[GroupOverview]) -> list[list[dict[str, Any]]]:
        """The complete records of some groups' completions. Raises RunFolderError."""
        groups = list(groups)
        wanted = [row for group in groups for row in group.rows]
        records = iter(self.folder.read_rollouts(step, rows=wanted))
        return [[next(records) for _ in group.rows] for group in groups]

    def search(self, step: int, text: str) -> set[int]:
        """Rows whose completion, question, answer or id contains `text`, ignoring case."""
        wanted = text.casefold()
        records = itertools.chain.from_iterable(self.folder.iter_rollouts(step, _SEARCHED))
        return {
            row
            for row, record in enumerate(records)
            if any(wanted in str(record[name] or "").casefold() for name in _SEARCHED)
        }

    def find(self, text: str, steps: Sequence[int]) -> Found:
        """The groups that contain `text`, as `search` has it, up to MOST_FOUND, newest step first."""
        found = Found([])
        for step in reversed(steps):
            found.searched += 1
            try:
                rows = self.search(step, text)
                groups = self.groups(step) if rows else []
            except RunFolderError:
                found.damaged += 1
                continue
            found.rows |= {(step, row) for row in rows}
            found.groups += [group for group in groups if rows.intersection(group.rows)]
            if len(found.groups) >= MOST_FOUND:
                break
        return found


def _overviews(step: int, chunks: Iterable[Sequence[Record]]) -> list[GroupOverview]:
    members: dict[tuple[int, int], list[tuple[int, Record]]] = {}
    for row, record in enumerate(itertools.chain.from_iterable(chunks)):
        key = record["resample_round"], record["prompt_index"]
        members.setdefault(key, []).append((row, record))
    groups = []
    for found in members.values():
        records = [record for _, record in found]
        errors = [record["error"] for record in records if record["error"]]
        groups.append(
            GroupOverview(
                step=step,
                rows=tuple(row for row, _ in found),
                correct=sum(map(sampled_success, records)),
                truncated=sum(record["finish_reason"] == "length" for record in records),
                failed=len(errors),
                timed_out=sum("timed out" in error for error in errors),
                strongest=max(abs(record["advantage"] or 0.0) for record in records),
                reward=sum(record["reward"] or 0.0 for record in records) / len(records),
            )
        )
    return groups


def training_ends(results: Sequence[EvaluationResult]) -> list[EvaluationResult]:
    """The evaluation before training and the latest one; only the latest if there is no other.

    Empty if checkpoints were evaluated on their own, without a training run.
    """
    training = [r for r in results if r.name in ("before", "after") or step_of(r) is not None]
    if len(training) > 1 and training[0].name == "before":
        return [training[0], training[-1]]
    return training[-1:]


def step_of(result: EvaluationResult) -> int | None:
    """The step of an evaluation during training, by its name."""
    digits = result.name.removeprefix("step_")
    return int(digits) if digits != result.name and digits.isdecimal() else None


class RunLibrary:
    """The runs that may be shown: the given run folders, and those inside the given folders.

    Runs can only be opened by the names listed here, so a name from outside never becomes a path.
    """

    def __init__(self, paths: Collection[str | Path]) -> None:
        self.paths = [Path(path) for path in paths]
        self._readers: dict[Path, RunReader] = {}
        self._lock = threading.Lock()

    def runs(self) -> dict[str, Path]:
        """Name -> folder of each run that exists now."""
        return find_runs(self.paths)

    def first(self) -> str | None:
        """The run to show first: of the first folder given that has any, the one trained last, otherwise any."""
        own = next(filter(None, (find_runs([path]) for path in self.paths)), {})
        runs = {name: path for name, path in self.runs().items() if path in own.values()}
        logs = {name: path / "metrics.jsonl" for name, path in runs.items()}
        trained = {name: log.stat().st_mtime_ns for name, log in logs.items() if log.is_file()}
        return max(trained, key=trained.__getitem__, default=next(iter(runs), None))

    def open(self, name: str) -> RunReader:
        """The reader of a run, refreshed when first opened. Raises RunFolderError without one."""
        path = self.runs().get(name)
        if path is None:
            raise RunFolderError("there is no such run (any more); choose another")
        with self._lock:
            known = path in self._readers
            reader = self._readers.setdefault(path, RunReader(path))
        if not known:
            reader.refresh()
        return reader


def find_runs(paths: Iterable[Path]) -> dict[str, Path]:
    """Name -> folder of the runs in `paths`, each a run folder or one with runs inside.

    Links that lead out of a folder are not followed.
    """
    found: dict[Path, Path] = {}
    for path in paths:
        root = path.resolve()
        inside = [root] if _is_run(root) else [*sorted(root.glob("*/")), *sorted(root.glob("*/*/"))]
        for folder in inside:
            target = folder.resolve()
            if _is_run(target) and (target == root or root in target.parents):
                found.setdefault(target, target)
    return dict(zip(distinct_names(list(found)), found, strict=True))


def _is_run(path: Path) -> bool:
    return (path / "config.yaml").is_file()


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """Folder names with as many parents as needed to tell them apart. The paths must differ."""
    parts = [path.resolve().parts for path in paths]
    depth = 1
    while len({part[-depth:] for part in parts}) < len(parts):
        depth += 1
    return ["/".join(part[-depth:]) for part in parts]
