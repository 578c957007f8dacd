"""Scores completions: weighted reward parts, computed in worker processes under limits.

    with Rewarder(config.reward, config.rollout.max_new_tokens) as rewarder:
        scores = rewarder.score(examples, completions)

A name in `reward.parts` is one of `parts.PARTS`, or a function of the user's as
"package.module:function" or "path/to/file.py:function" (see `own.py`).

A part that fails on one completion affects that completion alone: the part counts 0 there, and
`Score.error` and `Rewarder.error_counts` say what happened. Only the part `reward.success` decides
whether the completion is solved. A part that fails on most completions ends a run.
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
from itertools import groupby
from typing import TYPE_CHECKING, Any

from mm_agrae.config.plugins import is_import_name, load_object
from mm_agrae.errors import ConfigError, RewardError
from mm_agrae.grading.accuracy import prepare_worker
from mm_agrae.grading.pool import Call, CallFailed, PoolBroken, WorkerPool, describe, limit_computing
from mm_agrae.rewards.own import About, OwnPart, located
from mm_agrae.rewards.parts import PARTS, Part, accuracy, overlong_penalty
from mm_agrae.types import Completion, Example, Score

if TYPE_CHECKING:
    from mm_agrae.config import RewardSection

logger = logging.getLogger(__name__)

_CHUNK = 32


@dataclass(frozen=True)
class _Job:
    """One reward part to compute for completions of one example. `indices` are their positions in the batch."""

    indices: tuple[int, ...]
    part: str
    example: Example
    completions: tuple[Completion, ...]

    def split(self) -> list[_Job]:
        each = zip(self.indices, self.completions, strict=True)
        return [_Job((index,), self.part, self.example, (completion,)) for index, completion in each]


_Outcome = float | str | None
"""The value of a part, None if it does not apply, or a message that says what is wrong with it."""


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
        self._own: dict[str, About] = {}
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

    def score(self, examples: Sequence[Example], completions: Sequence[Completion], stop: bool = False) -> list[Score]:
        """One score per completion, in order; `completions[i]` answers `examples[i]`.

        Raises ValueError if their numbers differ, ConfigError if a grader cannot be imported, and with `stop`
        RewardError if a part fails on more than `reward.max_failed` of them. Nothing else a part does raises.
        """
        if len(examples) != len(completions):
            raise ValueError(f"{len(examples)} examples for {len(completions)} completions")
        graders = {str(e.grading["grader"]) for e in examples if "grader" in e.grading}
        if new := sorted(graders.difference(self._imports)):
            self._start_pool(new)
        with_images = any("images" in about.wants for about in self._own.values())
        light = {}
        for e in examples:
            columns = dict(e.columns) if self._own else {}  # messages among them may hold images
            images = e.images if with_images else ()
            light[id(e)] = replace(e, images=images, grading=dict(e.grading), meta=dict(e.meta), columns=columns)
        jobs: list[_Job] = []
        for key, positions in groupby(range(len(examples)), key=lambda index: id(examples[index])):
            indices = tuple(positions)
            for part in self.config.parts:
                job = _Job(indices, part, light[key], tuple(completions[index] for index in indices))
                jobs += [job] if part in self._own and self._own[part].batched else job.split()
        values: list[dict[str, float | None]] = [{} for _ in examples]
        errors: list[dict[str, str]] = [{} for _ in examples]
        for index, part, outcome in self._run(jobs):
            values[index][part] = 0.0 if isinstance(outcome, str) else outcome
            if isinstance(outcome, str):
                errors[index][part] = outcome
                self._count(outcome, examples[index])
        if stop:
            self._stop_if_failing(examples, completions, errors)
        return [self._score(*found) for found in zip(values, errors, completions, strict=True)]

    def _count(self, message: str, example: Example) -> None:
        """Log a failure the first time, and the 10th, 100th, … of its kind."""
        kind = re.sub(r"( raised \w+).*", r"\1", message)
        self.error_counts[kind] += 1
        if re.fullmatch("10*", count := str(self.error_counts[kind])):
            often = "" if count == "1" else f" ({count} times so far; repeated messages are left out)"
            logger.warning("reward of example %s: %s%s", example.id, message, often)

    def _stop_if_failing(
        self, examples: Sequence[Example], completions: Sequence[Completion], errors: Sequence[dict[str, str]]
    ) -> None:
        for part in self.config.parts:
            failed = [index for index, found in enumerate(errors) if part in found]
            # A built-in part may well time out on all answers to one problem.
            enough = part not in PARTS or len({id(examples[index]) for index in failed}) > 1
            if not enough or not len(failed) > self.config.max_failed * len(errors):
                continue
            first, text = examples[failed[0]], completions[failed[0]].text
            raise RewardError(
                f"{self._where(part)} fails on {len(failed)} of {len(errors)} completions, more than "
                f"reward.max_failed = {self.config.max_failed:g} allows. The first: {errors[failed[0]][part]}, for "
                f"example {first.id} ({first.origin or 'of no file'}) and the completion "
                f"{text if len(text) <= 200 else text[:200] + '…'!r}. "
                f"Mend {self._own[part].where if part in self._own else 'the data, or raise reward.time_limit_s'}"
            )

    def _score(self, values: dict[str, float | None], errors: dict[str, str], completion: Completion) -> Score:
        parts = {name: value for name in self.config.parts if (value := values[name]) is not None}
        reward = sum(self.config.parts[name] * value for name, value in parts.items())
        if (overlong := self.config.overlong) is not None:
            length = len(completion.token_ids)
            parts["overlong"] = overlong_penalty(length, self.max_new_tokens, overlong.buffer_tokens, overlong.penalty)
            reward += parts["overlong"]
        decides = self.config.success
        success = decides not in errors and parts.get(decides, -math.inf) >= self.config.success_at
        return Score(reward=reward, success=success, parts=parts, error="; ".join(errors.values()))

    def _run(self, jobs: Sequence[_Job]) -> list[tuple[int, str, _Outcome]]:
        """Outcomes with the completion's position and the part.

        Run in chunks. If a chunk fails, its jobs run one by one, each with all its time; if a job of several
        completions does, so do they.
        """
        size = max(1, min(_CHUNK, len(jobs) // (4 * self.config.workers)))
        chunks = [list(jobs[start : start + size]) for start in range(0, len(jobs), size)]
        waiting = deque((self._submit(chunk), chunk, 0) for chunk in chunks)
        done: list[tuple[int, str, _Outcome]] = []
        while waiting:
            call, chunk, attempt = waiting.popleft()
            try:
                outcomes: list[list[_Outcome] | str] = self._pools[-1].result(call)
            except CallFailed as error:
                alone = len(chunk) == 1
                if not alone or (isinstance(error, PoolBroken) and not attempt):
                    waiting.extend((self._submit([job]), [job], int(alone)) for job in chunk)
                    continue
                outcomes = [f"{chunk[0].part}: {error}"]
            for job, outcome in zip(chunk, outcomes, strict=False):
                if isinstance(outcome, str) and len(job.indices) > 1:
                    waiting.extend((self._submit([each]), [each], 0) for each in job.split())
                else:
                    found = [outcome] if isinstance(outcome, str) else outcome
                    done += [(index, job.part, value) for index, value in zip(job.indices, found, strict=True)]
            if rest := chunk[len(outcomes) :]:
                waiting.append((self._submit(rest), rest, 0))
        return done

    def _submit(self, chunk: list[_Job]) -> Call:
        limit_s = self.config.time_limit_s
        return self._pools[-1].submit(_run_chunk, (chunk, limit_s), limit_s * max(len(job.indices) for job in chunk))

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
                (self._imports, list(self.config.parts), self.config.answer_after_thinking),
            )
        )
        errors = {}
        try:
            if new:
                errors, about = self._pools[-1].call(_imported, (), 1.0)
                self._own |= about
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
_own: dict[str, OwnPart] = {}
_import_errors: dict[str, str] = {}


def _prepare(imports: Sequence[str], parts: Sequence[str], answer_after_thinking: bool) -> None:
    """Run once in each worker: import the user's reward parts and the examples' graders."""
    _parts.update(PARTS)
    _parts["accuracy"] = partial(accuracy, after_thinking=answer_after_thinking)
    for name in imports:
        try:
            if name in parts:
                _own[name] = OwnPart(name)
            else:
                load_object(name)
        except ConfigError as error:
            _import_errors[name] = str(error)
        except BaseException as error:  # whatever a module does when it is imported
            _import_errors[name] = f"importing it {describe(error)}"
    if not _import_errors:
        prepare_worker()


def _imported() -> tuple[dict[str, str], dict[str, About]]:
    """What went wrong in `_prepare`, and what the user's parts are, by import name."""
    return _import_errors, {name: own.about for name, own in _own.items()}


def _run_chunk(chunk: Sequence[_Job], limit_s: float) -> list[list[_Outcome] | str]:
    """Outcomes of the first jobs: at least one, and as many as fit into half a time limit.

    The limit starts anew with each job, so a slow one does not eat into the time of the next.
    """
    start = time.monotonic()
    outcomes: list[list[_Outcome] | str] = []
    for job in chunk:
        if outcomes and time.monotonic() - start > limit_s / 2:
            break
        outcomes.append(_outcome(job, limit_s * len(job.indices)))
    return outcomes


def _outcome(job: _Job, limit_s: float) -> list[_Outcome] | str:
    """One outcome per completion, or the message of what the whole call raised."""
    limit_computing(limit_s)
    own = _own.get(job.part)
    try:
        if own is None:
            values: list[Any] = [_parts[job.part](job.example, job.completions[0])]
        else:
            values = own(job.example, job.completions)
        return [_checked(job.part, value) for value in values]
    except MemoryError:
        raise  # the worker has to be replaced
    except BaseException as error:
        of_user = own is not None or "grader" in job.example.grading
        what = located(error, own.about.where.rpartition(":")[0] if own else "") if of_user else describe(error)
        return f"{job.part} {what}"


def _checked(part: str, value: Any) -> _Outcome:
    value = value.item() if hasattr(value, "item") else value  # numpy, torch
    if value is None:
        return None
    if not isinstance(value, numbers.Real):
        return f"{part} returned {type(value).__name__}, not a number"
    if not math.isfinite(value):
        return f"{part} returned {float(value)}, not a finite number"
    return float(value)
