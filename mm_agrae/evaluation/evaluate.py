"""An engine and a task -> graded samples per problem -> result and samples in a run folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from mm_agrae.config import EvaluateSection
from mm_agrae.errors import DataError
from mm_agrae.evaluation.statistics import summarise
from mm_agrae.rollout import Engine, derive_seed
from mm_agrae.run.folder import RunFolder
from mm_agrae.run.records import EvaluationResult, SampleRecord
from mm_agrae.types import Completion, Example, Prompt, Score

if TYPE_CHECKING:
    from PIL.Image import Image

    from mm_agrae.model.processing import Processing
    from mm_agrae.rewards import Rewarder
    from mm_agrae.tasks import Task


@dataclass
class EvaluatedProblem:
    """One problem with its samples, the greedy one (if any) first."""

    index: int
    example: Example
    images: list[Image]
    records: list[SampleRecord]


def run(
    engine: Engine,
    processing: Processing,
    rewarder: Rewarder,
    task: Task,
    indices: Sequence[int],
    section: EvaluateSection,
    *,
    on_bad_row: str = "error",
    on_progress: Callable[[int], None] | None = None,
) -> list[EvaluatedProblem]:
    """Sample and grade the examples of `task` at `indices`.

    The seeds of a problem depend on `section.seed` and its index alone, so that checkpoints are
    compared with the same random numbers. Raises DataError for a row that cannot be used, unless
    `on_bad_row` is "skip".
    """
    problems: list[EvaluatedProblem] = []
    prompts: list[Prompt] = []
    refused: set[int] = set()
    for index in indices:
        try:
            prompts.append(processing.prompt(task[index]))
        except DataError:
            if on_bad_row == "error":
                raise
            continue
        problems.append(EvaluatedProblem(index, prompts[-1].example, list(prompts[-1].images), []))
    decodings = [(range(section.samples), section)]
    if section.greedy:
        decodings.insert(0, (range(-1, 0), section.model_copy(update={"temperature": 0.0})))
    for numbers, sampling in decodings:
        seeds = [derive_seed(section.seed, "evaluate", problem.index) for problem in problems]
        groups = engine.generate(prompts, len(numbers), sampling, seeds, on_progress)
        refused |= {p.index for p, group in zip(problems, groups, strict=True) if not group}
        sampled = [
            (problem, number, completion)
            for problem, group in zip(problems, groups, strict=True)
            for number, completion in zip(numbers, group, strict=bool(group))
        ]
        scores = rewarder.score([p.example for p, _, _ in sampled], [c for _, _, c in sampled])
        for (problem, number, completion), score in zip(sampled, scores, strict=True):
            problem.records.append(_sample_record(problem.example, number, completion, score))
    if refused and on_bad_row == "error":
        row = next(problem.example for problem in problems if problem.index in refused)
        raise DataError(
            f"{row.origin or row.id}: the rollout server refused this row; its own message is in "
            "the log. Set data.on_bad_row=skip to continue without it"
        )
    return [problem for problem in problems if problem.index not in refused]


def write(
    run_folder: RunFolder,
    name: str,
    label: str,
    problems: Sequence[EvaluatedProblem],
    section: EvaluateSection,
    seconds: float,
) -> EvaluationResult:
    """Summarise what `run` returned; write result, samples and images into the run folder.

    Raises DataError if there are no problems.
    """
    result = _summarise(name, label, problems, section, seconds)
    samples = [
        replace(record, images=tuple(run_folder.store_image(image) for image in problem.images))
        for problem in problems
        for record in problem.records
    ]
    run_folder.write_evaluation(result, samples)
    return result


def _summarise(
    name: str,
    label: str,
    problems: Sequence[EvaluatedProblem],
    section: EvaluateSection,
    seconds: float,
) -> EvaluationResult:
    if not problems:
        raise DataError(f"evaluation {label!r} holds no usable rows")
    sampled = [[r for r in problem.records if r.sample >= 0] for problem in problems]
    greedy = [[r.success for r in problem.records if r.sample < 0] for problem in problems]
    return summarise(
        name,
        label,
        correct_PN=np.array([[r.success for r in row] for row in sampled]),
        greedy_correct_P=np.array(greedy)[:, 0] if section.greedy else None,
        length_PN=np.array([[r.tokens for r in row] for row in sampled]),
        truncated_PN=np.array([[r.finish_reason == "length" for r in row] for row in sampled]),
        entropy_PN=np.array(
            [[np.nan if r.entropy is None else r.entropy for r in row] for row in sampled]
        ),
        meta_P=[problem.example.meta for problem in problems],
        seconds=seconds,
        tokens=sum(r.tokens for problem in problems for r in problem.records),
        bootstrap=section.bootstrap,
        seed=section.seed,
    )


def one_line(result: EvaluationResult) -> str:
    """A result's most important numbers, for the terminal."""
    shown = [k for k in (1, 4, 16, 64, 256) if k in result.pass_at_k]
    parts = [f"pass@{k} {result.pass_at_k[k].mean:.1%}" for k in shown]
    if result.greedy is not None:
        parts.append(f"greedy {result.greedy.mean:.1%}")
    return f"{result.name}: {result.label}  " + "  ".join(parts)


def _sample_record(
    example: Example, number: int, completion: Completion, score: Score
) -> SampleRecord:
    return SampleRecord(
        example_id=example.id,
        sample=number,
        question=example.question,
        answer=example.answer,
        completion=completion.text,
        success=score.success,
        tokens=len(completion.token_ids),
        finish_reason=completion.finish_reason,
        # The mean of −log p over sampled tokens is an unbiased estimate of the entropy.
        entropy=-float(np.mean(completion.logprobs)) if completion.logprobs else None,
        error=score.error,
        meta=dict(example.meta),
    )
