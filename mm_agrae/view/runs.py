"""A run read for people: its numbers as they come, and the groups of one step at a time.

Of a step only what fits on a line is held (`Group`); the texts of the groups that are looked at
are read when they are looked at. So memory does not grow with the length of a run, and a run
that goes on is followed without reading anything twice.
"""

from __future__ import annotations

import math
import threading
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mm_agrae.errors import RunFolderError
from mm_agrae.run.folder import MetricsMark, RunFolder

Row = Mapping[str, Any]

STEPS_HELD = 4
"""Steps whose groups (not their texts) are remembered, the latest ones looked at."""

_LIGHT = (
    *("resample_round", "prompt_index", "example_id", "success", "finish_reason", "error"),
    *("reward", "advantage"),
)
_SEARCHED = ("completion", "question", "answer", "example_id")


@dataclass(frozen=True)
class Group:
    """The completions of one prompt at one step, without their texts.

    `rows` are their places in the step's file. `right`, `truncated`, `failed` and `timed_out`
    count completions (`failed`: the verifier raised or timed out); `strongest` is the highest
    |A| among them, `reward` their mean.
    """

    rows: tuple[int, ...]
    right: int
    truncated: int
    failed: int
    timed_out: int
    strongest: float
    reward: float

    @property
    def kind(self) -> str:
        """ "all right", "all wrong" or "mixed"."""
        return {0: "all wrong", len(self.rows): "all right"}.get(self.right, "mixed")


FILTERS = {
    "all": lambda group: True,
    "mixed": lambda group: group.kind == "mixed",
    "all wrong": lambda group: group.kind == "all wrong",
    "all right": lambda group: group.kind == "all right",
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


def select(groups: Sequence[Group], show: str = "all", order: str = "as sampled") -> list[Group]:
    """Those that pass a filter of FILTERS, in an order of ORDERS. Raises KeyError for others."""
    return sorted(filter(FILTERS[show], groups), key=ORDERS[order])


class RunView:
    """One run folder, read as far as it has been written. May be shared between threads."""

    def __init__(self, path: str | Path) -> None:
        self.folder = RunFolder(path)
        self.metrics: list[dict[str, Any]] = []
        self.steps: list[int] = []
        """Steps whose rollouts were kept, ascending."""
        self._mark: MetricsMark | None = None
        self._held: OrderedDict[tuple[int, int, int], list[Group]] = OrderedDict()
        self._lock = threading.Lock()

    def refresh(self) -> tuple[int, int, int, bool]:
        """Read what was written since; returns a stamp that differs if there was anything.

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
        """Whether this is a folder of `mm-agrae eval`: a run is evaluated "before" any step."""
        evaluations = [] if self.metrics else self.folder.read_evaluations()
        return any(result.name != "before" for result in evaluations)

    def progress(self) -> str:
        """How far the run is, in words."""
        last = next((row["step"] for row in reversed(self.metrics) if "step" in row), 0)
        train = self.config().get("train")
        planned = train.get("steps") if isinstance(train, dict) else None
        if self.folder.read_summary():
            return f"Finished after {last:,} steps."
        if last:
            return f"Not finished: {last:,}{f' of {planned}' if planned else ''} steps so far."
        if self.only_evaluations():
            return "Checkpoints evaluated by themselves."
        return "No step has been logged yet."

    def nearest(self, step: float) -> int | None:
        """The kept step next to `step`; None if none was kept."""
        place = bisect_left(self.steps, step)
        around = self.steps[max(0, place - 1) : place + 1]
        return min(around, key=lambda kept: abs(kept - step), default=None)

    @property
    def stride(self) -> int:
        """The largest number that all kept steps lie a multiple of apart; 1 for a single one."""
        return math.gcd(*(step - self.steps[0] for step in self.steps)) or 1

    def groups(self, step: int) -> list[Group]:
        """The groups of a step in the order sampled. Raises RunFolderError, see `RunFolder`."""
        with self._lock:
            stamp = (step, *self.folder.rollout_stamp(step))
            if stamp not in self._held:
                self._held[stamp] = _group(self.folder.iter_rollouts(step, _LIGHT))
            self._held.move_to_end(stamp)
            while len(self._held) > STEPS_HELD:
                self._held.popitem(last=False)
            return self._held[stamp]

    def rows(self, step: int, groups: Iterable[Group]) -> list[list[dict[str, Any]]]:
        """Everything about the completions of some groups. Raises RunFolderError."""
        groups = list(groups)
        found = self.folder.read_rollouts(step, rows=[row for g in groups for row in g.rows])
        parts = iter(found)
        return [[next(parts) for _ in group.rows] for group in groups]

    def search(self, step: int, text: str) -> set[int]:
        """Places of rows whose completion, question, answer or id holds `text`, in any case."""
        wanted = text.casefold()
        places: set[int] = set()
        start = 0
        for part in self.folder.iter_rollouts(step, _SEARCHED):
            for place, row in enumerate(part, start):
                if any(wanted in str(row[name] or "").casefold() for name in _SEARCHED):
                    places.add(place)
            start += len(part)
        return places


def _group(parts: Iterable[Sequence[Row]]) -> list[Group]:
    members: dict[tuple[int, int], list[tuple[int, Row]]] = {}
    place = 0
    for part in parts:
        for row in part:
            key = row["resample_round"], row["prompt_index"]
            members.setdefault(key, []).append((place, row))
            place += 1
    groups = []
    for found in members.values():
        rows = [row for _, row in found]
        errors = [row["error"] for row in rows if row["error"]]
        groups.append(
            Group(
                rows=tuple(place for place, _ in found),
                right=sum(bool(row["success"]) for row in rows),
                truncated=sum(row["finish_reason"] == "length" for row in rows),
                failed=len(errors),
                timed_out=sum("timed out" in error for error in errors),
                strongest=max(abs(row["advantage"] or 0.0) for row in rows),
                reward=sum(row["reward"] or 0.0 for row in rows) / len(rows),
            )
        )
    return groups


# -- which runs there are


class Library:
    """The runs that may be looked at: folders that hold one, or hold folders that do.

    Runs are asked for by the names listed here and no other way, so that a name from outside
    never becomes a path.
    """

    def __init__(self, paths: Collection[str | Path]) -> None:
        self.paths = [Path(path) for path in paths]
        self._views: dict[Path, RunView] = {}
        self._lock = threading.Lock()

    def runs(self) -> dict[str, Path]:
        """Name -> folder of each run there is now."""
        return find_runs(self.paths)

    def first(self) -> str | None:
        """The run to begin with: the one trained last, else any."""
        runs = self.runs()
        logs = {name: path / "metrics.jsonl" for name, path in runs.items()}
        trained = {name: log.stat().st_mtime_ns for name, log in logs.items() if log.is_file()}
        return max(trained, key=trained.__getitem__, default=next(iter(runs), None))

    def open(self, name: str) -> RunView:
        """A run as far as it was read last. Raises RunFolderError if there is no such run."""
        path = self.runs().get(name)
        if path is None:
            raise RunFolderError("there is no such run here (any more); choose another")
        with self._lock:
            known = path in self._views
            view = self._views.setdefault(path, RunView(path))
        if not known:
            view.refresh()
        return view


def find_runs(paths: Iterable[Path]) -> dict[str, Path]:
    """Name -> folder of the runs in `paths`, each a run folder or one with runs inside.

    Links that lead out of a folder are not followed.
    """
    found: dict[Path, Path] = {}
    for path in paths:
        root = path.resolve()
        inside = [root] if _is_run(root) else [*sorted(root.glob("*/")), *sorted(root.glob("*/*/"))]
        for folder in inside:
            place = folder.resolve()
            if _is_run(place) and (place == root or root in place.parents):
                found.setdefault(place, place)
    return dict(zip(distinct_names(list(found)), found, strict=True))


def _is_run(path: Path) -> bool:
    return (path / "config.yaml").is_file()


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """Folder names, with as many parents as it takes to tell them apart. All must differ."""
    parts = [path.resolve().parts for path in paths]
    depth = 1
    while len({part[-depth:] for part in parts}) < len(parts):
        depth += 1
    return ["/".join(part[-depth:]) for part in parts]
