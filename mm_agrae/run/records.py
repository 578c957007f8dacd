"""What a run records: rollouts, evaluations and their samples, as dataclasses.

`folder` writes and reads them. Version 0.1.0 used other names for some metrics and one column;
reading translates them (`current_name`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError

from mm_agrae.run.files import clean_text, to_json

if TYPE_CHECKING:
    from pyarrow import Table

_RENAMED = {
    "groups/all_right": "groups/all_correct",
    "groups/all_wrong": "groups/all_incorrect",
    "completions/right": "completions/correct",
    "draw": "resample_round",
}


def current_name(name: str) -> str:
    """Today's name of a metric or a rollout column that version 0.1.0 may have written."""
    return _RENAMED.get(name, name)


@dataclass(frozen=True, kw_only=True)
class RolloutRecord:
    """One completion of a training step. The fields are the columns of the step's Parquet file.

    `resample_round` is the round of dynamic sampling that its group comes from, 0 the first. `images` are paths
    relative to the run folder, as `RunFolder.store_image` returns them. `tokens` is the completion's length, `entropy`
    the mean over its tokens in nats. The three advantages are the normalised reward before any rescaling, after the
    sample level, and the final one. Where guided correction has dealt with the completion, `correction` holds the
    fields of `types.Correction`; text, reward and success are the corrected one's, `success_before` the sampled one's.
    `variant` names what was made of the problem (empty: nothing), and `difficulty` is D, from 1 to 9, of this variant.
    """

    step: int
    resample_round: int = 0
    prompt_index: int
    completion_index: int
    example_id: str
    question: str
    prompt_text: str
    answer: str
    images: tuple[str, ...] = ()
    completion: str
    tokens: int
    finish_reason: str
    reward: float
    success: bool
    parts: Mapping[str, float] = field(default_factory=dict)
    error: str = ""
    advantage_before: float | None = None
    advantage_sample_level: float | None = None
    advantage: float | None = None
    entropy: float | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)
    success_before: bool | None = None
    correction: Mapping[str, Any] = field(default_factory=dict)
    variant: str = ""
    difficulty: float | None = None


ROLLOUT_COLUMNS = get_type_hints(RolloutRecord)
"""Name -> type of every column of a rollout file, in the order stored."""

LATER_COLUMNS = {"success_before", "correction", "variant", "difficulty"}
"""Those that files of earlier versions lack."""


def sampled_success(row: Mapping[str, Any]) -> bool:
    """Whether the completion of a rollout file's row was correct as sampled, before guided correction."""
    before = row.get("success_before")
    return bool(row["success"] if before is None else before)


_JSON_COLUMNS = {name for name, hint in ROLLOUT_COLUMNS.items() if get_origin(hint) is Mapping}


def rollout_table(records: Sequence[RolloutRecord]) -> Table:
    """Rollout records as an Arrow table; mappings become JSON text that any reader can show."""
    import pyarrow as pa

    kinds: dict[Any, tuple[Callable[[Any], Any], Any]] = {
        int: (int, pa.int64()),
        float: (float, pa.float64()),
        float | None: (lambda value: None if value is None else float(value), pa.float64()),
        bool: (bool, pa.bool_()),
        bool | None: (lambda value: value, pa.bool_()),
        str: (clean_text, pa.string()),
        tuple[str, ...]: (lambda texts: [*map(clean_text, texts)], pa.list_(pa.string())),
    }
    columns = {}
    for name, hint in ROLLOUT_COLUMNS.items():
        convert, arrow_type = kinds.get(hint, (to_json, pa.string()))
        columns[name] = pa.array([convert(getattr(row, name)) for row in records], arrow_type)
    return pa.table(columns)


def rollout_rows(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of a rollout file by today's names, with the JSON text of mappings decoded."""
    return [
        {current_name(name): json.loads(value) if name in _JSON_COLUMNS else value for name, value in row.items()}
        for row in rows
    ]


@dataclass(frozen=True)
class SampleRecord:
    """One completion of an evaluation. `sample` counts from 0; the greedy one has -1."""

    example_id: str
    sample: int
    question: str
    answer: str
    completion: str
    success: bool
    tokens: int
    finish_reason: str
    images: tuple[str, ...] = ()
    entropy: float | None = None
    error: str = ""
    meta: Mapping[str, Any] = field(default_factory=dict)
    parts: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class SubsetResult:
    """pass@1 and pass@n on the problems that share a value of an entry of `meta`."""

    problems: int
    pass_at_k: dict[int, Interval]


@dataclass(frozen=True)
class PartMeans:
    """Means of a reward part over the samples it applies to, and over the correct ones; None if there are none."""

    mean: float | None
    correct: float | None


@dataclass(frozen=True)
class EvaluationResult:
    """What one evaluation of one task found. Shares and accuracies are in [0, 1].

    `name` is "before", "step_000050", "after" or the user's own; `label` names the task. `mean_tokens` is the mean
    length of a completion, `truncated` the share cut off by the token limit, `entropy` the mean over all sampled
    tokens in nats (None: not measured), `unsolved` the share of problems with no correct completion. `groups` breaks
    the result down by the entries of the examples' `meta`: `{"level": {"3": SubsetResult}}`. `seconds` and `tokens`
    are what the evaluation took. `parts` are the means of each reward part, greedy completions left out.
    """

    name: str
    label: str
    problems: int
    samples: int
    pass_at_k: dict[int, Interval]
    greedy: Interval | None
    mean_tokens: float
    truncated: float
    entropy: float | None
    unsolved: float
    groups: dict[str, dict[str, SubsetResult]]
    seconds: float
    tokens: int
    parts: dict[str, PartMeans] = field(default_factory=dict)

    def metrics(self) -> dict[str, float]:
        """Flat numbers for the metric log, named `evaluate/<label>/…`."""
        values = {f"pass@{k}": interval.mean for k, interval in self.pass_at_k.items()}
        values |= {name: getattr(self, name) for name in ("mean_tokens", "truncated", "unsolved")}
        if self.greedy is not None:
            values["greedy"] = self.greedy.mean
        if self.entropy is not None:
            values["entropy"] = self.entropy
        return {f"evaluate/{self.label}/{name}": value for name, value in values.items()}

    def falls(self, before: EvaluationResult, key: str) -> dict[str, dict[int, float]]:
        """Kind of problem by `key` -> k -> change of pass@k, where it fell by one problem's worth or more."""
        found = {}
        for kind, group in self.groups.get(key, {}).items():
            old = before.groups.get(key, {}).get(kind, group).pass_at_k
            changes = {k: new.mean - old[k].mean for k, new in group.pass_at_k.items() if k in old}
            found[kind] = {k: change for k, change in changes.items() if change * group.problems < -1 + 1e-9}
        return {kind: changes for kind, changes in found.items() if changes}

    def to_json(self) -> str:
        return to_json(asdict(self), indent=2) + "\n"

    @staticmethod
    def from_json(text: str) -> EvaluationResult:
        """Read what `to_json` wrote. Raises ValueError if it is not that."""
        try:
            return _RESULT_ADAPTER.validate_json(text)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            raise ValueError(": ".join([*map(str, first["loc"]), first["msg"]])) from None


_RESULT_ADAPTER = TypeAdapter(EvaluationResult)
