"""The list of tasks. A task is a sequence of `Example`s.

To add one, write a class with `__len__` and `__getitem__` (IndexError past the end) and put a line into `TASKS`, or
name it as "module:Class" or "path/to/file.py:Class" in the config. A published data set needs only an entry in
`catalog.py`. The keyword arguments of the constructor are the task's options in the config; `**options` stand for
those of the base class, less the names in the class attribute `fixed`. Two options are filled in, if the constructor
has them: `limit` (stop after so many examples) and `on_bad_row` ("error" or "skip"). A task that leaves rows out lists
the reasons in an attribute `skipped`; what people should know of its rows it says in `notes`. `generated = True` says
that its examples are made by a program and need no check. `variants(index)` returns `Operator`s of a row's own, with
names from the class attribute `variant_names`.
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain, repeat
from typing import Any, Literal, Protocol

from mm_agrae.config import DataSource
from mm_agrae.config.plugins import UNSET, check_arguments, is_import_name, load_object, signature
from mm_agrae.errors import ConfigError, DataError, nearest
from mm_agrae.tasks import catalog, medical
from mm_agrae.tasks.picture_operators import Operator
from mm_agrae.types import Example


class Task(Protocol):
    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Example: ...


TASKS: dict[str, str | type[Task]] = {
    "synthetic": "mm_agrae.tasks.synthetic.task:SyntheticTask",
    "files": "mm_agrae.tasks.files:FileTask",
    "gym": "mm_agrae.tasks.gym:GymTask",
    **catalog.TASKS,
    **medical.TASKS,
}


def _filled_in(task_class: Any) -> Sequence[str]:
    """Parameters of a task that are no options."""
    return "limit", "on_bad_row", *getattr(task_class, "fixed", ())


class Concatenation:
    """Several tasks one after the other, each cut to its limit."""

    def __init__(self, tasks: Sequence[Task], limits: Sequence[int | None]):
        self.tasks = tuple(tasks)
        self.lengths = [
            len(task) if limit is None else min(len(task), limit) for task, limit in zip(tasks, limits, strict=True)
        ]
        self.skipped = [reason for task in tasks for reason in getattr(task, "skipped", ())]
        """Rows left out: file, row and reason."""
        self.notes = [note for task in tasks for note in getattr(task, "notes", ())]
        """What the tasks read their rows as, a line each."""
        self.difficulty: list[float] = []
        """D of each example, once `rate` has been called."""

    def __len__(self) -> int:
        return sum(self.lengths)

    @property
    def not_generated(self) -> list[int]:
        """Indices of examples that come from outside, and may be bad."""
        marks = map(repeat, (getattr(task, "generated", False) for task in self.tasks), self.lengths)
        return [index for index, generated in enumerate(chain(*marks)) if not generated]

    def __getitem__(self, index: int) -> Example:
        task, row = self._at(index)
        return replace(task[row], difficulty=self.difficulty_of(index)) if self.difficulty else task[row]

    def difficulty_of(self, index: int) -> float:
        return self.difficulty[index] if self.difficulty else Example.difficulty

    @property
    def variant_names(self) -> list[str]:
        return [name for task in self.tasks for name in getattr(task, "variant_names", ())]

    def variants(self, index: int) -> Sequence[Operator]:
        """The variants that an example's task itself has of it."""
        task, row = self._at(index)
        return task.variants(row) if hasattr(task, "variants") else ()

    def _at(self, index: int) -> tuple[Task, int]:
        """The task of an example, and its index there."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        row = index
        for task, length in zip(self.tasks, self.lengths, strict=True):
            if row < length:
                return task, row
            row -= length
        raise AssertionError("unreachable")

    def rate(self, difficulty: Mapping[str, float], source: str) -> str:
        """Give the examples their difficulty by id, the others the default; returns what to say of it.

        Raises DataError if `source`, where it is from, has none of them.
        """
        ids = [self[index].id for index in range(len(self))]
        self.difficulty = [difficulty.get(name, Example.difficulty) for name in ids]
        rated = sum(name in difficulty for name in ids)
        if not rated:
            raise DataError(f"data.difficulty_from={source}: has no id of a training row; name a run on the same data")
        return f"difficulty of {rated:,} of {len(ids):,} problems from {source}"


def load_all(sources: Sequence[DataSource], *, on_bad_row: Literal["error", "skip"] = "error") -> Concatenation:
    """The examples of sources, one after the other, each cut to its `limit`.

    Raises ConfigError for a wrong option, DataError for data that cannot be read.
    """
    for source in sources:
        check(source)
    tasks = []
    for source in sources:
        task_class = _task_class(source)
        filled_in = {"limit": source.limit, "on_bad_row": on_bad_row}
        accepted = filled_in.keys() & signature(task_class)
        tasks.append(task_class(**source.options, **{name: filled_in[name] for name in accepted}))
    return Concatenation(tasks, [source.limit for source in sources])


def check(source: DataSource) -> None:
    """Compare a source's options with its task's constructor, without reading any data.

    Also calls `check_options(options)` of the task class, if it has one. Raises ConfigError that
    names the option and the nearest valid one.
    """
    task_class = _task_class(source)
    try:
        check_arguments(task_class, source.options, _filled_in(task_class))
        if hasattr(task_class, "check_options"):
            task_class.check_options(source.options)
    except ConfigError as error:
        raise ConfigError(f"data source {source.label!r}: {error}") from None


def describe(name: str) -> str:
    """A task's options with their defaults and meaning, as text."""
    task_class = _task_class(DataSource(task=name))
    options = [
        f"  {parameter.name}: {parameter.annotation}"
        + ("" if parameter.default is UNSET else f" = {parameter.default!r}")
        for parameter in signature(task_class).values()
        if parameter.name not in _filled_in(task_class)
    ]
    text = inspect.getdoc(task_class) or ""
    return "\n".join([name, *options, "", *(f"  {line}".rstrip() for line in text.splitlines())])


def _task_class(source: DataSource) -> Any:
    target = TASKS.get(source.task, source.task)
    if not isinstance(target, str):
        return target
    if not is_import_name(target):
        raise ConfigError(f"data: no task {source.task!r}; {nearest(source.task, TASKS)}")
    try:
        return load_object(target)
    except Exception as error:  # whatever a user's module does when it is imported
        if source.task in TASKS:
            raise
        problem = str(error) or type(error).__name__
        raise ConfigError(f"data: task {source.task!r} cannot be imported: {problem}") from error
