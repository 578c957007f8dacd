"""Evaluation: pass@k with intervals, greedy accuracy, length, entropy.

Intervals are 95 % percentile bootstraps over PROBLEMS: the question is how a model would do on
other problems of the same kind, so problems are what is drawn anew. The spread of a problem's
own samples is within that, since every problem comes with the samples it happened to get.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mm_agrae.config import EvaluateSection
from mm_agrae.config.schema import passes
from mm_agrae.errors import DataError
from mm_agrae.rollout import Engine, derive_seed
from mm_agrae.run.records import EvaluationResult, Interval, RunFolder, SampleRecord, write_jsonl
from mm_agrae.types import Completion, Example, Prompt, Score

if TYPE_CHECKING:
    from PIL.Image import Image

    from mm_agrae.model.processing import Processing
    from mm_agrae.rewards import Rewarder
    from mm_agrae.tasks import Task

__all__ = [
    "EvaluationResult",
    "Interval",
    "SampleRecord",
    "paired_difference",
    "pass_at_k",
    "pass_at_k_table",
    "save_samples",
    "summarise",
]


def pass_at_k(n: int, c: int | np.ndarray, k: int) -> np.ndarray:
    """Unbiased estimate of the chance that one of k samples is right.

    1 − C(n−c, k) / C(n, k) for c right ones among n (arXiv 2107.03374, Eq. 1), correctly rounded:
    it is a quotient of whole numbers.

    n: samples drawn; c: right ones, one number or an array [P]; returns float64 of c's shape.
    Raises ValueError unless 1 ≤ k ≤ n and 0 ≤ c ≤ n.
    """
    right = np.asarray(c)
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} cannot be estimated from {n} samples; k must be 1 to {n}")
    if right.size and (right.dtype.kind not in "iu" or right.min() < 0 or right.max() > n):
        raise ValueError(f"the number of right samples must be a whole number from 0 to {n}: {c}")
    distinct, where = np.unique(right, return_inverse=True)
    values = np.array([_pass_at_k(n, int(count), k) for count in distinct], dtype=np.float64)
    return values[where].reshape(right.shape)


@lru_cache(maxsize=65536)
def _pass_at_k(n: int, c: int, k: int) -> float:
    every = math.comb(n, k)
    return (every - math.comb(n - c, k)) / every


def pass_at_k_table(
    correct_PN: np.ndarray, ks: Sequence[int] | None = None, bootstrap: int = 2000, seed: int = 0
) -> dict[int, Interval]:
    """pass@k over problems for each k, with its 95 % interval.

    correct_PN: bool [problems, samples]. All k share the same resamples, so the curves of one
    table move together. With all problems right (or none) the interval has no width: the
    bootstrap cannot see what did not happen. Raises ValueError for no problems, or a k above N.
    """
    correct = _as_bool(correct_PN, "correct_PN")
    samples = correct.shape[1]
    ks = passes(samples) if ks is None else list(ks)
    values_PK = np.stack([pass_at_k(samples, correct.sum(1), k) for k in ks], axis=1)
    return dict(zip(ks, _intervals(values_PK, bootstrap, seed), strict=True))


def paired_difference(
    a_PN: np.ndarray, b_PN: np.ndarray, k: int, bootstrap: int = 2000, seed: int = 0
) -> Interval:
    """pass@k of b minus pass@k of a on the same problems, with its 95 % interval.

    Row p of both is problem p; the numbers of samples may differ. Pairing takes out what the
    problems differ in, so this is narrower than two intervals held side by side. Raises
    ValueError if the rows disagree or k is above either number of samples.
    """
    a, b = _as_bool(a_PN, "a_PN"), _as_bool(b_PN, "b_PN")
    if len(a) != len(b):
        raise ValueError(f"a has {len(a)} problems and b {len(b)}; rows must be the same problems")
    gain_P = pass_at_k(b.shape[1], b.sum(1), k) - pass_at_k(a.shape[1], a.sum(1), k)
    return _intervals(gain_P[:, None], bootstrap, seed)[0]


def summarise(
    name: str,
    label: str,
    correct_PN: np.ndarray,
    greedy_correct_P: np.ndarray | None,
    length_PN: np.ndarray,
    truncated_PN: np.ndarray,
    entropy_PN: np.ndarray | None,
    meta_P: Sequence[Mapping[str, Any]],
    seconds: float,
    tokens: int,
    bootstrap: int = 2000,
    seed: int = 0,
) -> EvaluationResult:
    """Everything an evaluation reports, from P problems of N samples each.

    correct_PN, truncated_PN: bool; length_PN: tokens; entropy_PN: mean over a completion's tokens
    in nats, NaN where unknown, None if not measured; greedy_correct_P: bool, None if there was no
    greedy decoding. meta_P: the examples' own; entries with few distinct values become groups.
    seconds, tokens: what the evaluation took. Raises ValueError if the shapes disagree.
    """
    correct = _as_bool(correct_PN, "correct_PN")
    length = np.asarray(length_PN, dtype=np.float64)
    truncated = _as_bool(truncated_PN, "truncated_PN")
    greedy = None if greedy_correct_P is None else np.asarray(greedy_correct_P, dtype=bool)
    entropy = None if entropy_PN is None else np.asarray(entropy_PN, dtype=np.float64)
    for array, title in ((length, "length"), (truncated, "truncated"), (entropy, "entropy")):
        if array is not None and array.shape != correct.shape:
            raise ValueError(f"{title}_PN is {array.shape}, correct_PN {correct.shape}")
    if len(meta_P) != len(correct) or (greedy is not None and greedy.shape != correct.shape[:1]):
        raise ValueError(f"meta_P and greedy_correct_P must have {len(correct)} entries")
    return EvaluationResult(
        name=name,
        label=label,
        problems=correct.shape[0],
        samples=correct.shape[1],
        pass_at_k=pass_at_k_table(correct, None, bootstrap, seed),
        greedy=None if greedy is None else _intervals(greedy[:, None], bootstrap, seed)[0],
        mean_tokens=float(length.mean()),
        truncated=float(truncated.mean()),
        entropy=_token_mean(entropy, length),
        unsolved=float((~correct.any(1)).mean()),
        groups=_by_group(correct, meta_P, bootstrap, seed),
        seconds=float(seconds),
        tokens=int(tokens),
    )


def save_samples(path: str | Path, rows: Iterable[SampleRecord | Mapping[str, Any]]) -> None:
    """Write all samples of an evaluation as JSON lines. Raises RunFolderError."""
    write_jsonl(Path(path), rows)


def _as_bool(values: np.ndarray, name: str) -> np.ndarray:
    array = np.asarray(values)
    if array.ndim != 2 or not array.size:
        raise ValueError(f"{name} must be [problems, samples] and not empty, not {array.shape}")
    return array.astype(bool)


def _intervals(values_PK: np.ndarray, bootstrap: int, seed: int) -> list[Interval]:
    """Mean of each column with its percentile interval over resampled rows."""
    problems = len(values_PK)
    generator = np.random.default_rng(seed)
    chunk = max(1, 2_000_000 // problems)  # bounds memory
    means = []
    for start in range(0, bootstrap, chunk):
        size = min(chunk, bootstrap - start)
        drawn = generator.integers(problems, size=(size, problems))
        cells = drawn + np.arange(size)[:, None] * problems
        times = np.bincount(cells.ravel(), minlength=size * problems).reshape(size, problems)
        means.append(times @ values_PK / problems)
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5], axis=0)
    mean = values_PK.mean(0, dtype=np.float64)
    return [Interval(*map(float, row)) for row in zip(mean, low, high, strict=True)]


def _token_mean(entropy: np.ndarray | None, length: np.ndarray) -> float | None:
    """Mean over tokens of per-completion means: weighted by length."""
    if entropy is None:
        return None
    known = np.isfinite(entropy) & (length > 0)
    if not known.any():
        return None
    return float((entropy[known] * length[known]).sum() / length[known].sum())


def _by_group(
    correct: np.ndarray, meta_P: Sequence[Mapping[str, Any]], bootstrap: int, seed: int
) -> dict[str, dict[str, dict[str, Any]]]:
    """pass@1 and pass@n for every value of every entry of `meta` that sorts problems into kinds.

    An entry with more than 24 values, or hardly any problem that shares one, is an identifier
    rather than a kind.
    """
    groups: dict[str, dict[str, dict[str, Any]]] = {}
    samples = correct.shape[1]
    for key in sorted({str(key) for meta in meta_P for key in meta}):
        members: dict[str, list[int]] = {}
        for row, meta in enumerate(meta_P):
            if isinstance(meta.get(key), str | int | bool):
                members.setdefault(str(meta[key]), []).append(row)
        if 2 <= len(members) <= min(24, len(correct) // 2):
            groups[key] = {
                value: {
                    "problems": len(rows),
                    "pass_at_k": pass_at_k_table(
                        correct[rows], sorted({1, samples}), bootstrap, seed
                    ),
                }
                for value, rows in sorted(members.items())
            }
    return groups


@dataclass
class Problem:
    """One problem of an evaluation with its samples, the greedy one (if any) first."""

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
) -> list[Problem]:
    """Sample and grade the examples of `task` at `indices`.

    The samples of a problem depend on `section.seed` and its index alone, so that two
    checkpoints are compared with the same random numbers. Raises DataError for a row that cannot
    be used, unless `on_bad_row` is "skip".
    """
    problems: list[Problem] = []
    prompts: list[Prompt] = []
    refused: set[int] = set()
    for index in indices:
        try:
            prompts.append(processing.prompt(task[index]))
        except DataError:
            if on_bad_row == "error":
                raise
            continue
        problems.append(Problem(index, prompts[-1].example, list(prompts[-1].images), []))
    decodings = [(range(section.samples), section)]
    if section.greedy:
        decodings.insert(0, (range(-1, 0), section.model_copy(update={"temperature": 0.0})))
    for numbers, sampling in decodings:
        seeds = [derive_seed(section.seed, "evaluate", problem.index) for problem in problems]
        groups = engine.generate(prompts, len(numbers), sampling, seeds, on_progress)
        for problem, group in zip(problems, groups, strict=True):
            if not group:
                refused.add(problem.index)
        pairs = zip(problems, groups, strict=True)
        answered = [(problem, completion) for problem, group in pairs for completion in group]
        scores = rewarder.score([p.example for p, _ in answered], [c for _, c in answered])
        # A refused problem has no completions, so that it takes no numbers either.
        drawn = itertools.chain.from_iterable(numbers for group in groups if group)
        for (problem, completion), number, score in zip(answered, drawn, scores, strict=True):
            problem.records.append(_sample_record(problem.example, number, completion, score))
    if refused and on_bad_row == "error":
        where = next(problem.example for problem in problems if problem.index in refused)
        raise DataError(
            f"{where.origin or where.id}: the rollout server refused this row; its own message is "
            "in the log. Set data.on_bad_row=skip to go on without it"
        )
    return [problem for problem in problems if problem.index not in refused]


def summarise_problems(
    name: str, label: str, problems: Sequence[Problem], section: EvaluateSection, seconds: float
) -> EvaluationResult:
    """`summarise` for what `run` returned. Raises DataError if there is no problem at all."""
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


def write(
    run_folder: RunFolder,
    name: str,
    label: str,
    problems: Sequence[Problem],
    section: EvaluateSection,
    seconds: float,
) -> EvaluationResult:
    """Summarise problems and write result, samples and pictures into a run folder."""
    result = summarise_problems(name, label, problems, section, seconds)
    samples = [
        replace(record, images=tuple(run_folder.store_image(image) for image in problem.images))
        for problem in problems
        for record in problem.records
    ]
    run_folder.write_evaluation(result, samples)
    return result


def one_line(result: EvaluationResult) -> str:
    """What a person wants to know first."""
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
