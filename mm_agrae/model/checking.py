"""What a data set is read as, and which of its rows a run would stumble over, before it is started.

Every row is made into a prompt (images decoded, tokens counted), and its gold answer is graded as if the model had
given it: for `mm-agrae data`, `mm-agrae doctor` and, by `data.check`, at the start of a run.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
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
Maker = Callable[[], Processing] | None


class Row(NamedTuple):
    where: str
    tokens: int = 0
    problem: str = ""
    wrong_gold: str = ""
    """The gold answer, if it is graded as wrong when the model gives it."""


def said_of(rows: Sequence[Row], max_tokens: int, *, skip: bool) -> Iterator[tuple[bool, str]]:
    """(whether a run can go on, text); with `skip` it goes on without the rows it cannot use."""
    all_ = f"{len(rows):,}"
    lengths = {row.tokens: row.where for row in reversed(rows) if row.tokens}  # where: the first of that length
    if lengths:
        mean = sum(row.tokens for row in rows) / sum(row.tokens > 0 for row in rows)
        yield True, f"prompt tokens: mean {mean:,.0f}, at most {max(lengths):,} ({lengths[max(lengths)]})"
    if too_long := sum(row.tokens > max_tokens for row in rows):
        text = f"{too_long:,} of {all_} prompts are longer than prompt.max_tokens = {max_tokens:,}"
        yield skip, f"{text}; raise it, lower prompt.max_pixels, or set {SKIP}"
    if bad := [row.problem for row in rows if row.problem]:
        yield skip, f"{len(bad):,} of {all_} rows cannot be used; the first: {bad[0]}"
        yield from ((True, f"also {problem}") for problem in bad[1:3])
    if wrong := [row for row in rows if row.wrong_gold]:
        yield (
            True,
            f"warning: {len(wrong):,} of {all_} gold answers are graded as wrong when a model gives just them, such "
            f"as {wrong[0].where}: {printable(wrong[0].wrong_gold, 100)!r}; see `mm-agrae data`, and set the source's "
            "columns.answer, answer_after or grading (docs/warnings.md#gold-answers)",
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
    said["a_colon"] = f"A: {gold}"
    return verify(example.answer, said.get(place, gold), **settings)


def look_at(example: Example | Row, processing: Processing | None) -> Row:
    """Without `processing` images are only decoded."""
    if isinstance(example, Row):
        return example
    where, tokens, problem = example.origin or example.id, 0, ""
    try:
        if processing is not None:
            tokens = len(processing.prompt(example))
        else:
            for source in example.images:
                open_image(source, origin=where)
    except DataError as error:
        problem = str(error)
    return Row(where, tokens, problem, "" if is_right_by_itself(example) else example.answer)


def look_at_all(task: Concatenation, indices: Sequence[int], make: Maker, reporter: Reporter) -> list[Row]:
    """The examples of a task at `indices`, in worker processes if there are many. Raises ModelError."""
    found: list[Row] = []
    with reporter.bars(), reporter.bar("reading rows", len(indices), lines=True) as advance:
        for rows in _rows(task, indices, make):
            found += rows
            advance(len(rows))
    return found


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _maker(config: Config) -> Maker:
    """What makes prompts of any length, so that the longest is known; None if the config names no model."""
    unbounded = config.prompt.model_copy(update={"max_tokens": 1 << 40})
    make = partial(Processing, config.model.path, unbounded, trust_remote_code=config.model.trust_remote_code)
    return make if config.model.path else None


def _rows(task: Concatenation, indices: Sequence[int], make: Maker) -> Iterator[list[Row]]:
    if len(indices) <= FEW:
        processing = make() if make else None
        for index in indices:
            yield [look_at(_read(task, index), processing)]
        return
    workers = min(cores(), 16)
    waiting: deque[tuple[Call, list[Example | Row]]] = deque()
    with WorkerPool(workers, MEMORY_MB, _prepare, (make,)) as pool:
        for start in range(0, len(indices), CHUNK):
            examples = [_read(task, index) for index in indices[start : start + CHUNK]]
            waiting.append((pool.submit(_look_in_worker, (examples,), LIMIT_S), examples))
            if len(waiting) > 3 * workers:
                yield _result(pool, *waiting.popleft())
        while waiting:
            yield _result(pool, *waiting.popleft())


def _read(task: Concatenation, index: int) -> Example | Row:
    try:
        return task[index]
    except DataError as error:
        return Row(f"row {index}", problem=str(error))


def _result(pool: WorkerPool, call: Call, examples: Sequence[Example | Row]) -> list[Row]:
    try:
        return pool.result(call)
    except CallFailed as error:  # of one of them, in the decoder of an image perhaps
        places = [each.where if isinstance(each, Row) else each.origin or each.id for each in examples]
        return [Row(place, problem=f"{places[0]} to {places[-1]}: reading them {error}") for place in places]


_processing: Processing | None = None  # of a worker process


def _prepare(make: Maker) -> None:
    global _processing
    import torch

    torch.set_num_threads(1)
    _processing = make() if make else None
    prepare_worker()


def _look_in_worker(examples: Sequence[Example | Row]) -> list[Row]:
    return [look_at(example, _processing) for example in examples]


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
    found = look_at_all(task, task.not_generated, make, reporter)
    return task, [*lines, *said_of(found, config.prompt.max_tokens, skip=skip)]


def at_the_start(task: Concatenation, config: Config, reporter: Reporter) -> str:
    """What `data.check` asks for before training: says what is found; returns why the run cannot start, or ""."""
    indices, check = task.not_generated, config.data.check
    if check == "off":
        return ""
    if check == "sample":
        indices = indices[:: max(1, len(indices) // FEW)][:FEW]
    found = look_at_all(task, indices, _maker(config) if check == "all" else None, reporter)
    lines = list(said_of(found, config.prompt.max_tokens, skip=config.data.on_bad_row == "skip"))
    for _, text in lines:
        reporter.say(text)
    return next((text for goes_on, text in lines if not goes_on and check == "all"), "")
