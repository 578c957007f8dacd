"""Where examples come from. A task is a sequence of `Example`s; here are their names.

To add one, write a class with `__len__` and `__getitem__` (IndexError past the end) and put a
line into `TASKS`, or name it as "module:Class" in the config. The keyword arguments of its
constructor are its options in the config. Two arguments are filled in where the constructor has
them: `limit` (stop after so many examples) and `on_bad_row` ("error" or "skip"). A task that
leaves rows out lists the reasons in an attribute `skipped`.
"""

from __future__ import annotations

import importlib
import inspect
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol

from mm_agrae.config import DataSource, nearest
from mm_agrae.errors import ConfigError
from mm_agrae.types import Example

NAMED = (
    "geometry3k",
    "math",
    "math500",
    "gsm8k",
    "aime2024",
    "aime2025",
    "amc23",
    "mathvision",
    "mathverse",
    "vqa_rad",
)
MEDICAL = ("medical_mri", "medical_ct", "medical_xray")

TASKS: dict[str, str] = {
    "synthetic": "mm_agrae.tasks.synthetic:SyntheticTask",
    "files": "mm_agrae.tasks.files:FileTask",
    "gym": "mm_agrae.tasks.gym:GymTask",
    **{name: f"mm_agrae.tasks.catalog:{name}" for name in NAMED},
    **{name: f"mm_agrae.tasks.medical:{name}" for name in MEDICAL},
}

FILLED_IN = ("limit", "on_bad_row")
_REQUIRED = inspect.Parameter.empty


class Task(Protocol):
    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Example: ...


class Concatenation:
    """Several tasks one after the other, each cut to its limit."""

    def __init__(self, tasks: Sequence[Task], limits: Sequence[int | None]):
        self.tasks = tuple(tasks)
        self.lengths = [
            len(task) if limit is None else min(len(task), limit)
            for task, limit in zip(tasks, limits, strict=True)
        ]
        self.skipped = [reason for task in tasks for reason in getattr(task, "skipped", ())]
        """Rows that were left out: file, row and reason."""

    def __len__(self) -> int:
        return sum(self.lengths)

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(index)
        for task, length in zip(self.tasks, self.lengths, strict=True):
            if index < length:
                return task[index]
            index -= length
        raise AssertionError("unreachable")


def load(source: DataSource, *, on_bad_row: Literal["error", "skip"] = "error") -> Concatenation:
    """The examples of one source, cut to its `limit`.

    Raises ConfigError for a wrong option, DataError for data that cannot be read.
    """
    return load_all([source], on_bad_row=on_bad_row)


def load_all(
    sources: Sequence[DataSource], *, on_bad_row: Literal["error", "skip"] = "error"
) -> Concatenation:
    """The examples of several sources, one source after the other. Raises as `load`."""
    for source in sources:
        check(source)
    tasks = []
    for source in sources:
        task_class = _task_class(source)
        filled_in = {"limit": source.limit, "on_bad_row": on_bad_row}
        accepted = _parameters(task_class)
        options = {name: value for name, value in filled_in.items() if name in accepted}
        tasks.append(task_class(**source.options, **options))
    return Concatenation(tasks, [source.limit for source in sources])


def check(source: DataSource) -> None:
    """Compare a source's options with its task's constructor, without reading any data.

    A task class with a `check_options(options)` of its own is asked as well. Raises ConfigError
    that names the option and the nearest valid one.
    """
    task_class = _task_class(source)
    where = f"data source {source.label!r}"
    try:
        check_arguments(task_class, source.options, filled_in=FILLED_IN)
        if hasattr(task_class, "check_options"):
            task_class.check_options(source.options)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def describe(name: str) -> str:
    """A task's options with their defaults and what they mean, as text."""
    task_class = _task_class(DataSource(task=name))
    options = [
        f"  {parameter.name}: {parameter.annotation}"
        + ("" if parameter.default is _REQUIRED else f" = {parameter.default!r}")
        for parameter in _parameters(task_class).values()
        if parameter.name not in FILLED_IN
    ]
    text = inspect.getdoc(task_class) or ""
    return "\n".join([name, *options, "", *(f"  {line}".rstrip() for line in text.splitlines())])


def check_arguments(
    function: Callable[..., Any], arguments: Mapping[str, Any], filled_in: Sequence[str] = ()
) -> None:
    """Compare keyword arguments with a function's (or a class's constructor's) signature.

    `filled_in` are parameters that others set. Raises ConfigError for an unknown name, a missing
    one, and a value of the wrong type.
    """
    from pydantic import ConfigDict, TypeAdapter, ValidationError

    parameters = _parameters(function)
    names = [name for name in parameters if name not in filled_in]
    for name in arguments:
        if name not in names:
            raise ConfigError(f"no option {name!r}; {nearest(name, names)}")
    for name in names:
        if parameters[name].default is _REQUIRED and name not in arguments:
            raise ConfigError(f"needs the option {name!r}")
    hints = typing.get_type_hints(function.__init__ if inspect.isclass(function) else function)
    for name, value in arguments.items():
        if name not in hints:
            continue
        try:
            TypeAdapter(hints[name], config=ConfigDict(strict=True)).validate_python(value)
        except ValidationError as error:
            first = error.errors()[0]
            inside = [
                str(part) for part in first["loc"] if isinstance(value, dict) and part in value
            ]
            key = ".".join([name, *inside])
            problem = first["msg"][:1].lower() + first["msg"][1:]
            raise ConfigError(f"{key}: {problem} (got {first['input']!r})") from None


def _task_class(source: DataSource) -> Any:
    target = TASKS.get(source.task, source.task)
    module, colon, name = target.partition(":")
    if not colon:
        raise ConfigError(f"data: no task {source.task!r}; {nearest(source.task, TASKS)}")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        if source.task in TASKS:
            raise
        raise ConfigError(f"data: task {source.task!r} cannot be imported ({error})") from None


def _parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(function).parameters
