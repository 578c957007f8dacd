"""From completions to rewards: weighted parts, computed in worker processes under limits.

    with Rewarder(config.reward, config.rollout.max_new_tokens) as rewarder:
        scores = rewarder.score(examples, completions)

A part is a function `(example, completion) -> float`. `PARTS` holds those of the package; any
other name in `reward.parts` is one's own, as "package.module:function" or
"path/to/file.py:function". Its example comes without pictures.

The part `accuracy` is `accuracy.verify`, unless an example's grading names a function of its own:
`{"grader": "module:function", **settings}` calls `function(example, text, after_thinking=...,
**settings)`, which returns a number from 0 to 1, 1 for success. Such names come from a task's code
or from the config, never from a row of data.

A part that fails, on one completion, costs that completion alone: the part counts 0 there, the
completion as unsolved, and `Score.error` and `Rewarder.error_counts` say what happened.
"""

from __future__ import annotations

import logging
import math
import numbers
import re
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from mm_agrae.config.plugins import is_import_name, load_object
from mm_agrae.errors import ConfigError
from mm_agrae.grading import accuracy
from mm_agrae.rewards import format
from mm_agrae.types import Completion, Example, Score

if TYPE_CHECKING:
    from mm_agrae.config import RewardSection
    from mm_agrae.grading.pool import Call, WorkerPool

logger = logging.getLogger(__name__)

Part = Callable[[Example, Completion], float]


def _accuracy(example: Example, completion: Completion) -> float:
    settings = {"after_thinking": _answer_after_thinking, **example.grading}
    grader = settings.pop("grader", None)
    if grader:
        function: Callable[..., float] = _own.get(grader) or load_object(grader)
        return float(function(example, completion.text, **settings))
    return float(accuracy.verify(example.answer, completion.text, **settings))


def _format(example: Example, completion: Completion) -> float:
    return float(format.follows(completion.text))


PARTS: dict[str, Part] = {"accuracy": _accuracy, "format": _format}

_CHUNK = 32


class Rewarder:
    """Scores completions by the weighted parts of `config`. A context manager.

    The worker processes start with the first use and end with the context. May be used from any
    thread. Raises ConfigError if a function of one's own cannot be imported.
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
                    f"reward.parts.{name}: neither a part of the package ({', '.join(PARTS)}) nor "
                    'a function as "package.module:function" or "path/to/file.py:function"'
                )
        self._text_only = not own
        self._imports = own
        self._retired: list[WorkerPool] = []
        self._pool: WorkerPool = self._start_pool()
        if own:
            self._check_imports(own)

    def __enter__(self) -> Rewarder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the worker processes."""
        for pool in (self._pool, *self._retired):
            pool.close()

    def _start_pool(self) -> WorkerPool:
        from mm_agrae.grading.pool import WorkerPool

        return WorkerPool(
            self.config.workers,
            self.config.memory_limit_mb,
            _prepare_worker,
            (self._imports, self.config.answer_after_thinking),
        )

    def _import_graders(self, examples: Sequence[Example]) -> None:
        """Have workers that import the examples' graders before their first call.

        Raises ConfigError if one cannot be imported.
        """
        named = {str(e.grading["grader"]) for e in examples if "grader" in e.grading}
        if new := sorted(named.difference(self._imports)):
            # Another thread may be waiting for the old workers; idle ones cost only memory.
            self._retired.append(self._pool)
            self._imports = [*self._imports, *new]
            self._pool = self._start_pool()
            self._check_imports(new)

    def _check_imports(self, names: Sequence[str]) -> None:
        from mm_agrae.grading.pool import CallFailed

        try:
            errors = self._pool.call(_import_errors, (), 1.0)
        except CallFailed:
            problem = "importing it ends the process, or does not come to an end"
            errors = {", ".join(names): problem}
        except BaseException:
            self.close()
            raise
        if errors:
            self.close()
            raise ConfigError(
                "\n".join(f"{self._where(name)}: {problem}" for name, problem in errors.items())
            )

    def _where(self, name: str) -> str:
        return f"reward.parts.{name}" if name in self.config.parts else f"grader {name}"

    def score(self, examples: Sequence[Example], completions: Sequence[Completion]) -> list[Score]:
        """One score per completion, in order; `examples[i]` is what `completions[i]` answers.

        Raises ValueError if their numbers differ, ConfigError if a grader cannot be imported;
        nothing a reward part does raises.
        """
        if len(examples) != len(completions):
            raise ValueError(f"{len(examples)} examples for {len(completions)} completions")
        self._import_graders(examples)
        light = {id(example): _light(example) for example in examples}
        trimmed = [self._trim(completion) for completion in completions]
        jobs = [
            _Job(index, part, light[id(example)], completion)
            for index, (example, completion) in enumerate(zip(examples, trimmed, strict=True))
            for part in self.config.parts
        ]
        values: list[dict[str, float]] = [{} for _ in examples]
        errors: list[list[str]] = [[] for _ in examples]
        for job, outcome in self._run(jobs):
            if isinstance(outcome, str):
                values[job.index][job.part] = 0.0
                errors[job.index].append(outcome)
                self.error_counts[re.sub(r"( raised \w+).*", r"\1", outcome)] += 1
                logger.warning("reward of example %s: %s", job.example.id, outcome)
            else:
                values[job.index][job.part] = outcome
        penalties = self._overlong(completions)
        return [self._score(*row) for row in zip(values, errors, penalties, strict=True)]

    def _score(self, values: dict[str, float], errors: list[str], penalty: float | None) -> Score:
        parts = {name: values[name] for name in self.config.parts}
        reward = sum(weight * parts[name] for name, weight in self.config.parts.items())
        if penalty is not None:
            parts["overlong"] = penalty
            reward += penalty
        return Score(
            reward=reward,
            success=parts["accuracy"] == 1.0 and not errors,
            parts=parts,
            error="; ".join(errors),
        )

    def _overlong(self, completions: Sequence[Completion]) -> Sequence[float | None]:
        settings = self.config.overlong
        if settings is None:
            return [None] * len(completions)
        import torch

        from mm_agrae.loss import overlong_penalty

        length_B = torch.tensor([len(c.token_ids) for c in completions], dtype=torch.float64)
        return overlong_penalty(
            length_B, self.max_new_tokens, settings.buffer_tokens, settings.penalty
        ).tolist()

    def _trim(self, completion: Completion) -> Completion:
        """The parts of the package read the text alone; the rest need not travel."""
        return replace(completion, token_ids=(), logprobs=()) if self._text_only else completion

    def _run(self, jobs: Sequence[_Job]) -> list[tuple[_Job, float | str]]:
        """Run jobs in chunks. If a chunk fails, its jobs run one by one, each with all its time."""
        from mm_agrae.grading.pool import CallFailed, PoolBroken

        size = max(1, min(_CHUNK, len(jobs) // (4 * self.config.workers)))
        chunks = [list(jobs[start : start + size]) for start in range(0, len(jobs), size)]
        waiting = deque((self._submit(chunk), chunk, 0) for chunk in chunks)
        done: list[tuple[_Job, float | str]] = []
        while waiting:
            call, chunk, attempt = waiting.popleft()
            try:
                outcomes = self._pool.result(call)
            except CallFailed as error:
                broken = isinstance(error, PoolBroken)
                if len(chunk) == 1 and (attempt or not broken):
                    done.append((chunk[0], f"{chunk[0].part}: {error}"))
                else:
                    attempt = attempt + 1 if len(chunk) == 1 else 0
                    waiting.extend((self._submit([job]), [job], attempt) for job in chunk)
                continue
            done.extend(zip(chunk, outcomes, strict=False))
            if rest := chunk[len(outcomes) :]:
                waiting.append((self._submit(rest), rest, 0))
        return done

    def _submit(self, chunk: list[_Job]) -> Call:
        limit_s = self.config.time_limit_s
        return self._pool.submit(_run_chunk, (chunk, limit_s), limit_s)


@dataclass(frozen=True)
class _Job:
    index: int
    part: str
    example: Example
    completion: Completion


def _light(example: Example) -> Example:
    return replace(example, images=(), grading=dict(example.grading), meta=dict(example.meta))


# ------------------------------------------------------------------------ in the worker

_answer_after_thinking = True
_own: dict[str, Callable[..., float]] = {}
_own_errors: dict[str, str] = {}


def _prepare_worker(own: Sequence[str], answer_after_thinking: bool) -> None:
    global _answer_after_thinking
    _answer_after_thinking = answer_after_thinking
    from mm_agrae.grading.pool import describe

    for name in own:
        try:
            _own[name] = load_object(name)
        except ConfigError as error:
            _own_errors[name] = str(error)
        except BaseException as error:  # whatever a module does when it is imported
            _own_errors[name] = f"importing it {describe(error)}"
    if not _own_errors:
        accuracy.prepare_worker()


def _import_errors() -> dict[str, str]:
    return _own_errors


def _run_chunk(chunk: Sequence[_Job], limit_s: float) -> list[float | str]:
    """The outcomes of the first jobs: at least one, and as many as half a time limit allows.

    The limit starts anew with each job, so that a slow one does not cost the next its time.
    """
    start = time.monotonic()
    outcomes: list[float | str] = []
    for job in chunk:
        if outcomes and time.monotonic() - start > limit_s / 2:
            break
        outcomes.append(_outcome(job, limit_s))
    return outcomes


def _outcome(job: _Job, limit_s: float) -> float | str:
    """The value of a part, or what is wrong with it."""
    from mm_agrae.grading.pool import describe, limit_computing

    limit_computing(limit_s)
    try:
        value = (PARTS.get(job.part) or _own[job.part])(job.example, job.completion)
        value = value.item() if hasattr(value, "item") else value  # numpy, torch
    except MemoryError:
        raise  # the worker has to go
    except BaseException as error:
        return f"{job.part} {describe(error)}"
    if not isinstance(value, numbers.Real):
        return f"{job.part} returned {type(value).__name__}, not a number"
    if not math.isfinite(value):
        return f"{job.part} returned {float(value)}, not a finite number"
    return float(value)
