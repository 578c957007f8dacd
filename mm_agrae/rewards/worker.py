"""What runs in the worker processes of a `Rewarder`: one reward part at a time."""

from __future__ import annotations

import math
import numbers
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from mm_agrae.config.plugins import load_object
from mm_agrae.errors import ConfigError
from mm_agrae.grading.accuracy import prepare_worker
from mm_agrae.grading.pool import describe, limit_computing
from mm_agrae.rewards.parts import PARTS, Part, accuracy
from mm_agrae.types import Completion, Example


@dataclass(frozen=True)
class Job:
    """One reward part to compute. `index` is the completion's position in the batch."""

    index: int
    part: str
    example: Example
    completion: Completion


_parts: dict[str, Part] = {}
_import_errors: dict[str, str] = {}


def prepare(imports: Sequence[str], answer_after_thinking: bool) -> None:
    """Run once in each worker: import the user's reward parts and the examples' graders."""
    _parts.update(PARTS)
    _parts["accuracy"] = partial(accuracy, after_thinking=answer_after_thinking)
    for name in imports:
        try:
            _parts[name] = load_object(name)
        except ConfigError as error:
            _import_errors[name] = str(error)
        except BaseException as error:  # whatever a module does when it is imported
            _import_errors[name] = f"importing it {describe(error)}"
    if not _import_errors:
        prepare_worker()


def import_errors() -> dict[str, str]:
    """What went wrong in `prepare`, by import name."""
    return _import_errors


def run_chunk(chunk: Sequence[Job], limit_s: float) -> list[float | str]:
    """Outcomes of the first jobs: at least one, and as many as fit into half a time limit.

    The limit starts anew with each job, so a slow one does not eat into the time of the next.
    """
    start = time.monotonic()
    outcomes: list[float | str] = []
    for job in chunk:
        if outcomes and time.monotonic() - start > limit_s / 2:
            break
        outcomes.append(_outcome(job, limit_s))
    return outcomes


def _outcome(job: Job, limit_s: float) -> float | str:
    """The value of a part, or a message that says what is wrong with it."""
    limit_computing(limit_s)
    try:
        value = _parts[job.part](job.example, job.completion)
        value = value.item() if hasattr(value, "item") else value  # numpy, torch
    except MemoryError:
        raise  # the worker has to be replaced
    except BaseException as error:
        return f"{job.part} {describe(error)}"
    if not isinstance(value, numbers.Real):
        return f"{job.part} returned {type(value).__name__}, not a number"
    if not math.isfinite(value):
        return f"{job.part} returned {float(value)}, not a finite number"
    return float(value)
