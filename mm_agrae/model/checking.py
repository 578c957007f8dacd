"""What a data set is read as, and which of its rows a run would stumble over, before it is started.

Every row is made into a prompt (images decoded, tokens counted), and its gold answer is graded as if the model had
given it. Used by `mm-agrae data`, `mm-agrae doctor` and, for `data.check`, at the start of a run.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

from mm_agrae.config import Config, DataSource
from mm_agrae.errors import SKIP, DataError, ModelError
from mm_agrae.grading.accuracy import prepare_worker, verify
from mm_agrae.grading.extraction import PLACES, final_answer
from mm_agrae.grading.pool import Call, CallFailed, WorkerPool
from mm_agrae.model.processing import Processing
from mm_agrae.progress import Reporter
from mm_agrae.tasks import Concatenation, load_all
from mm_agrae.tasks.images import open_image, printable
from mm_agrae.types import Example

CHUNK = 16
FEW = 4 * CHUNK
"""So many rows are looked at when a run starts, and without worker processes, which take longer to start."""
LIMIT_S, MEMORY_MB = 300.0, 8192
"""Of one chunk in a worker process: CPU seconds, and memory beyond what processor and grader take."""


class Row(NamedTuple):
    """What was found of one example."""

    where: str
    tokens: int = 0
    problem: str = ""
    wrong_gold: str = ""
    """The gold answer, if it is graded as wrong when the model gives it."""


@dataclass
class Findings:
    """What was found of many."""

    rows: int = 0
    tokens: int = 0
    longest: tuple[int, str] = (0, "")
    too_long: int = 0
    bad: list[str] = field(default_factory=list)
    wrong_golds: list[str] = field(default_factory=list)

    def add(self, row: Row, max_tokens: int) -> None:
        self.rows += 1
        self.tokens += row.tokens
        self.too_long += row.tokens > max_tokens
        self.longest = max(self.longest, (row.tokens, row.where), key=lambda pair: pair[0])
        if row.problem:
            self.bad.append(row.problem)
        if row.wrong_gold:
            self.wrong_golds.append(f"{row.where}: {printable(row.wrong_gold, 100)!r}")

    def lines(self, max_tokens: int, *, skip: bool) -> Iterator[tuple[bool, str]]:
        """(whether a run can go on, text); with `skip` it goes on without the rows it cannot use."""
        if self.tokens:
            mean = self.tokens / (self.rows - len(self.bad))
            yield True, f"prompt tokens: mean {mean:,.0f}, at most {self.longest[0]:,} ({self.longest[1]})"
        if self.too_long:
            text = f"{self.too_long:,} of {self.rows:,} prompts are longer than prompt.max_tokens = {max_tokens:,}"
            yield skip, f"{text}; raise it, lower prompt.max_pixels, or set {SKIP}"
        if self.bad:
            yield skip, f"{len(self.bad):,} of {self.rows:,} rows cannot be used; the first: {self.bad[0]}"
            yield from ((True, f"also {problem}") for problem in self.bad[1:3])
        if self.wrong_golds:
            yield (
                True,
                f"warning: {len(self.wrong_golds):,} of {self.rows:,} gold answers are graded as wrong when a model "
                f"gives just them, such as {self.wrong_golds[0]}; see `mm-agrae data`, and set the source's "
                "columns.answer, answer_after or grading",
            )


def is_right_by_itself(example: Example) -> bool:
    """Whether a model that says just the gold answer is graded as correct. One's own grader is not asked: what it
    wants to read only it knows."""
    settings = dict(example.grading)
    if "grader" in settings:
        return True
    gold, tag = final_answer(example.answer), settings.get("answer_tag", "answer")
    place = (*settings.get("answer_in", ()), *PLACES)[0]
    said = {"boxed": rf"\boxed{{{gold}}}", "tag": f"<{tag}>{gold}</{tag}>", "answer_is": f"The answer is {gold}"}
    return verify(example.answer, said.get(place, gold), **settings)


def look_at(examples: Iterable[Example], processing: Processing | None) -> list[Row]:
    """Without `processing` images are only decoded."""
    found = []
    for example in examples:
        where, tokens, problem = example.origin or example.id, 0, ""
        try:
            if processing is not None:
                tokens = len(processing.prompt(example))
            else:
                for source in example.images:
                    open_image(source, origin=where)
        except DataError as error:
            problem = str(error)
        found.append(Row(where, tokens, problem, "" if is_right_by_itself(example) else example.answer))
    return found


def look_at_all(
    task: Concatenation,
    indices: Sequence[int],
    make: Callable[[], Processing] | None,
    config: Config,
    reporter: Reporter,
) -> Findings:
    """The examples of a task at `indices`, in worker processes if there are many. Raises ModelError."""
    findings = Findings()
    with reporter.bars(), reporter.bar("reading rows", len(indices)) as advance:
        for rows in _rows(task, indices, make):
            for row in rows:
                findings.add(row, config.prompt.max_tokens)
            advance(len(rows))
    return findings


def _maker(config: Config) -> Callable[[], Processing] | None:
    """What makes prompts of any length, so that the longest is known; None if the config names no model."""
    unbounded = config.prompt.model_copy(update={"max_tokens": 1 << 40})
    make = partial(Processing, config.model.path, unbounded, trust_remote_code=config.model.trust_remote_code)
    return make if config.model.path else None


def _rows(task: Concatenation, indices: Sequence[int], make: Callable[[], Processing] | None) -> Iterator[list[Row]]:
    chunks = (_read(task, indices[start : start + CHUNK]) for start in range(0, len(indices), CHUNK))
    if len(indices) <= FEW:
        processing = make() if make else None
        for examples, bad in chunks:
            yield bad + look_at(examples, processing)
        return
    workers = max(1, min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1, 16))
    with WorkerPool(workers, MEMORY_MB, _prepare, (make,)) as pool:
        waiting: deque[tuple[Call, list[Example]]] = deque()
        for examples, bad in chunks:
            yield bad
            waiting.append((pool.submit(_look_in_worker, (examples,), LIMIT_S), examples))
            if len(waiting) > 3 * workers:
                yield _result(pool, *waiting.popleft())
        while waiting:
            yield _result(pool, *waiting.popleft())


def _read(task: Concatenation, indices: Sequence[int]) -> tuple[list[Example], list[Row]]:
    examples, bad = [], []
    for index in indices:
        try:
            examples.append(task[index])
        except DataError as error:
            bad.append(Row(f"row {index}", problem=str(error)))
    return examples, bad


def _result(pool: WorkerPool, call: Call, examples: Sequence[Example]) -> list[Row]:
    try:
        return pool.result(call)
    except CallFailed as error:  # of one of them, in the decoder of an image perhaps
        places = [example.origin or example.id for example in examples]
        return [Row(place, problem=f"{places[0]} to {places[-1]}: reading them {error}") for place in places]


_processing: Processing | None = None  # of a worker process


def _prepare(make: Callable[[], Processing] | None) -> None:
    global _processing
    import torch

    torch.set_num_threads(1)
    _processing = make() if make else None
    prepare_worker()


def _look_in_worker(examples: Sequence[Example]) -> list[Row]:
    return look_at(examples, _processing)


def report(source: DataSource, config: Config, reporter: Reporter) -> tuple[Concatenation, list[tuple[bool, str]]]:
    """A source's examples, and what there is to say of them as (whether a run can go on, text). Raises UserError."""
    skip, make = config.data.on_bad_row == "skip", _maker(config)
    task = load_all([source], on_bad_row="skip")
    lines = [(len(task) > 0, f"{source.label}: {len(task):,} rows"), *((True, note) for note in task.notes)]
    if task.skipped:
        left_out = f"{len(task.skipped):,} rows cannot be read; the first: {task.skipped[0]}"
        lines.append((skip, left_out if skip else f"{left_out}; fix them or set data.on_bad_row=skip"))
    try:
        _ = make and make()  # in this process first, where its error can be said
    except ModelError as error:
        lines.append((True, f"prompt lengths are not counted: {error}"))
        make = None
    found = look_at_all(task, task.not_generated, make, config, reporter)
    return task, [*lines, *found.lines(config.prompt.max_tokens, skip=skip)]


def at_the_start(task: Concatenation, config: Config, reporter: Reporter) -> str:
    """What `data.check` asks for before training: says what is found; returns why the run cannot start, or ""."""
    indices, check = task.not_generated, config.data.check
    if check == "off":
        return ""
    if check == "sample":
        indices = indices[:: max(1, len(indices) // FEW)][:FEW]
    found = look_at_all(task, indices, _maker(config) if check == "all" else None, config, reporter)
    problems = []
    for goes_on, text in found.lines(config.prompt.max_tokens, skip=config.data.on_bad_row == "skip"):
        reporter.say(text)
        problems += [] if goes_on else [text]
    return problems[0] if problems and check == "all" else ""
