"""Scores completions: weighted reward parts, computed in worker processes under limits.

    with Rewarder(config.reward, config.rollout.max_new_tokens) as rewarder:
        scores = rewarder.score(examples, completions)

A name in `reward.parts` is one of `parts.PARTS`, or a function of the user's as
"package.module:function" or "path/to/file.py:function".

A part that fails on one completion affects that completion alone: the part counts 0 there, the
completion counts as unsolved, and `Score.error` and `Rewarder.error_counts` say what happened.
A part that returns None does not apply: it adds nothing, and `Score.parts` lacks it.
"""

from __future__ import annotations

import logging
import math
import numbers
import re
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from mm_agrae.config.plugins import is_import_name, load_object
from mm_agrae.errors import ConfigError
from mm_agrae.grading.accuracy import prepare_worker
from mm_agrae.grading.pool import Call, CallFailed, PoolBroken, WorkerPool, describe, limit_computing
from mm_agrae.rewards.parts import PARTS, Part, accuracy, overlong_penalty
from mm_agrae.types import Completion, Example, Score

if TYPE_CHECKING:
    from mm_agrae.config import RewardSection

logger = logging.getLogger(__name__)

_CHUNK = 32


@dataclass(frozen=True)
class _Job:
    """One reward part to compute. `index` is the completion's position in the batch."""

    index: int
    part: str
    example: Example
    completion: Completion


class Rewarder:
    """Scores completions by the weighted parts of `config`. A context manager.

    The worker processes start on first use and end with the context. May be used from any thread.
    Raises ConfigError if one of the user's functions cannot be imported.
    """

    def __init__(self, config: RewardSection, max_new_tokens: int):
        self.config = config
        self.max_new_tokens = max_new_tokens
        self.error_counts: Counter[str] = Counter()
        """How often each kind of failure has happened, such as "accuracy: timed out after 1 s"."""
        own = [name for name in config.parts if name not in PARTS]
        for name in own:
            if not is_import_name(name):
                raise ConfigError(
                    f"reward.parts.{name}: neither a built-in part ({', '.join(PARTS)}) nor "
                    'a function as "package.module:function" or "path/to/file.py:function"'
                )
        self._imports: list[str] = []
        self._pools: list[WorkerPool] = []  # the last is in use
        self._start_pool(own)

    def __enter__(self) -> Rewarder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the worker processes."""
        for pool in self._pools:
            pool.close()

    def score(self, examples: Sequence[Example], completions: Sequence[Completion]) -> list[Score]:
        """One score per completion, in order; `completions[i]` answers `examples[i]`.

        Raises ValueError if their numbers differ, ConfigError if a grader cannot be imported;
        nothing a reward part does raises.
        """
        if len(examples) != len(completions):
            raise ValueError(f"{len(examples)} examples for {len(completions)} completions")
        graders = {str(e.grading["grader"]) for e in examples if "grader" in e.grading}
        if new := sorted(graders.difference(self._imports)):
            self._start_pool(new)
        light = {id(e): replace(e, images=(), grading=dict(e.grading), meta=dict(e.meta)) for e in examples}
        jobs = [
            _Job(index, part, light[id(example)], completion)
            for index, (example, completion) in enumerate(zip(examples, completions, strict=True))
            for part in self.config.parts
        ]
        values: list[dict[str, float | None]] = [{} for _ in examples]
        errors: list[list[str]] = [[] for _ in examples]
        for job, outcome in self._run(jobs):
            if isinstance(outcome, str):
                values[job.index][job.part] = 0.0
                errors[job.index].append(outcome)
                self.error_counts[re.sub(r"( raised \w+).*", r"\1", outcome)] += 1
                logger.warning("reward of example %s: %s", job.example.id, outcome)
            else:
                values[job.index][job.part] = outcome
        return [self._score(*found) for found in zip(values, errors, completions, strict=True)]

    def _score(self, values: dict[str, float | None], errors: list[str], completion: Completion) -> Score:
        parts = {name: value for name in self.config.parts if (value := values[name]) is not None}
        reward = sum(self.config.parts[name] * value for name, value in parts.items())
        if (overlong := self.config.overlong) is not None:
            length = len(completion.token_ids)
            parts["overlong"] = overlong_penalty(length, self.max_new_tokens, overlong.buffer_tokens, overlong.penalty)
            reward += parts["overlong"]
        success = parts["accuracy"] == 1.0 and not errors
        return Score(reward=reward, success=success, parts=parts, error="; ".join(errors))

    def _run(self, jobs: Sequence[_Job]) -> list[tuple[_Job, float | str | None]]:
        """Run jobs in chunks. If a chunk fails, its jobs run one by one, each with all its time."""
        size = max(1, min(_CHUNK, len(jobs) // (4 * self.config.workers)))
        chunks = [list(jobs[start : start + size]) for start in range(0, len(jobs), size)]
        waiting = deque((self._submit(chunk), chunk, 0) for chunk in chunks)
        done: list[tuple[_Job, float | str | None]] = []
        while waiting:
            call, chunk, attempt = waiting.popleft()
            try:
                outcomes = self._pools[-1].result(call)
            except CallFailed as error:
                alone = len(chunk) == 1
                if alone and (attempt or not isinstance(error, PoolBroken)):
                    done.append((chunk[0], f"{chunk[0].part}: {error}"))
                else:
                    waiting.extend((self._submit([job]), [job], int(alone)) for job in chunk)
                continue
            done.extend(zip(chunk, outcomes, strict=False))
            if rest := chunk[len(outcomes) :]:
                waiting.append((self._submit(rest), rest, 0))
        return done

    def _submit(self, chunk: list[_Job]) -> Call:
        limit_s = self.config.time_limit_s
        return self._pools[-1].submit(_run_chunk, (chunk, limit_s), limit_s)

    def _start_pool(self, new: list[str]) -> None:
        """Start workers that import `new` too. Raises ConfigError if one cannot be imported.

        Another thread may be waiting for the old workers; idle ones cost only memory.
        """
        self._imports = [*self._imports, *new]  # the old workers keep theirs
        self._pools.append(
            WorkerPool(
                self.config.workers,
                self.config.memory_limit_mb,
                _prepare,
                (self._imports, self.config.answer_after_thinking),
            )
        )
        errors = {}
        try:
            if new:
                errors = self._pools[-1].call(_errors_at_import, (), 1.0)
        except CallFailed:
            errors = {", ".join(new): "importing it ends the process, or never finishes"}
        except BaseException:
            self.close()
            raise
        if errors:
            self.close()
            raise ConfigError("\n".join(f"{self._where(name)}: {problem}" for name, problem in errors.items()))

    def _where(self, name: str) -> str:
        return f"reward.parts.{name}" if name in self.config.parts else f"grader {name}"


_parts: dict[str, Part] = {}
_import_errors: dict[str, str] = {}


def _prepare(imports: Sequence[str], answer_after_thinking: bool) -> None:
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


def _errors_at_import() -> dict[str, str]:
    """What went wrong in `_prepare`, by import name."""
    return _import_errors


def _run_chunk(chunk: Sequence[_Job], limit_s: float) -> list[float | str | None]:
    """Outcomes of the first jobs: at least one, and as many as fit into half a time limit.

    The limit starts anew with each job, so a slow one does not eat into the time of the next.
    """
    start = time.monotonic()
    outcomes: list[float | str | None] = []
    for job in chunk:
        if outcomes and time.monotonic() - start > limit_s / 2:
            break
        outcomes.append(_outcome(job, limit_s))
    return outcomes


def _outcome(job: _Job, limit_s: float) -> float | str | None:
    """The value of a part, None if it does not apply, or a message that says what is wrong with it."""
    limit_computing(limit_s)
    try:
        value: Any = _parts[job.part](job.example, job.completion)
        value = value.item() if hasattr(value, "item") else value  # numpy, torch
    except MemoryError:
        raise  # the worker has to be replaced
    except BaseException as error:
        return f"{job.part} {describe(error)}"
    if value is None:
        return None
    if not isinstance(value, numbers.Real):
        return f"{job.part} returned {type(value).__name__}, not a number"
    if not math.isfinite(value):
        return f"{job.part} returned {float(value)}, not a finite number"
    return float(value)
