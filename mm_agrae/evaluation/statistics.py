"""pass@k with intervals, and everything an evaluation reports, from arrays of outcomes.

Intervals are 95 % percentile bootstraps over problems, since the question is how a model would do
on other problems of the same kind. The spread among a problem's own samples is included, since
every problem comes with the samples it happened to get.

Shapes: P problems, N samples of each, K values of k.
"""

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from mm_agrae.config.schema import passes
from mm_agrae.run.records import EvaluationResult, Interval, PartMeans, SubsetResult


def pass_at_k(n: int, c: int | np.ndarray, k: int) -> np.ndarray:
    """Unbiased estimate of the probability that at least one of k samples is correct.

    1 − C(n−c, k) / C(n, k) for c correct ones among n (arXiv 2107.03374, Eq. 1), correctly
    rounded: it is a quotient of whole numbers.

    n: samples drawn; c: correct ones, one number or an array [P]; returns float64 of c's shape.
    Raises ValueError unless 1 ≤ k ≤ n and 0 ≤ c ≤ n.
    """
    correct = np.asarray(c)
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} cannot be estimated from {n} samples; k must be 1 to {n}")
    if correct.size and (correct.dtype.kind not in "iu" or correct.min() < 0 or correct.max() > n):
        raise ValueError(f"the number of correct samples must be a whole number from 0 to {n}: {c}")
    distinct, where = np.unique(correct, return_inverse=True)
    values = np.array([_pass_at_k(n, int(count), k) for count in distinct], dtype=np.float64)
    return values[where].reshape(correct.shape)


@lru_cache(maxsize=65536)
def _pass_at_k(n: int, c: int, k: int) -> float:
    every = math.comb(n, k)
    return (every - math.comb(n - c, k)) / every


def pass_at_k_table(
    correct_PN: np.ndarray, ks: Sequence[int] | None = None, bootstrap: int = 2000, seed: int = 0
) -> dict[int, Interval]:
    """pass@k over problems for each k, with its 95 % interval.

    correct_PN: bool. All k share the same resamples, so the curves of one table move together.
    If all samples are correct (or none), the interval has no width: the bootstrap cannot see what
    did not happen. Raises ValueError for no problems, or a k above N.
    """
    correct = _as_bool(correct_PN, "correct_PN")
    samples = correct.shape[1]
    ks = passes(samples) if ks is None else list(ks)
    values_PK = np.stack([pass_at_k(samples, correct.sum(1), k) for k in ks], axis=1)
    return dict(zip(ks, _intervals(values_PK, bootstrap, seed), strict=True))


def paired_difference(a_PN: np.ndarray, b_PN: np.ndarray, k: int, bootstrap: int = 2000, seed: int = 0) -> Interval:
    """pass@k of b minus pass@k of a on the same problems, with its 95 % interval.

    Row p of both is problem p; the numbers of samples may differ. Pairing removes the variance
    between problems, so the interval is narrower than two separate ones suggest. Raises
    ValueError if the numbers of rows differ or k is above either number of samples.
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
    parts: Mapping[str, np.ndarray] | None = None,
) -> EvaluationResult:
    """Everything an evaluation reports.

    correct_PN, truncated_PN: bool; length_PN: tokens; entropy_PN: mean over a completion's tokens
    in nats, NaN where unknown, None if not measured; greedy_correct_P: bool, None if there was no
    greedy decoding. meta_P: the examples' own; entries with few distinct values become groups.
    parts: reward part -> its values [P, N], NaN where it does not apply. seconds, tokens: what the
    evaluation took. Raises ValueError if the shapes disagree.
    """
    correct = _as_bool(correct_PN, "correct_PN")
    length = np.asarray(length_PN, dtype=np.float64)
    truncated = _as_bool(truncated_PN, "truncated_PN")
    greedy = None if greedy_correct_P is None else np.asarray(greedy_correct_P, dtype=bool)
    entropy = None if entropy_PN is None else np.asarray(entropy_PN, dtype=np.float64)
    parts = parts or {}
    for title, array in {"length_PN": length, "truncated_PN": truncated, "entropy_PN": entropy, **parts}.items():
        if array is not None and array.shape != correct.shape:
            raise ValueError(f"{title} is {array.shape}, correct_PN {correct.shape}")
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
        groups=_by_meta(correct, meta_P, bootstrap, seed),
        seconds=float(seconds),
        tokens=int(tokens),
        parts={name: PartMeans(_mean(values), _mean(values[correct])) for name, values in parts.items()},
    )


def _mean(values: np.ndarray) -> float | None:
    known = values[np.isfinite(values)]
    return float(known.mean()) if known.size else None


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


def _by_meta(
    correct: np.ndarray, meta_P: Sequence[Mapping[str, Any]], bootstrap: int, seed: int
) -> dict[str, dict[str, SubsetResult]]:
    """pass@1 and pass@n for every value of every `meta` entry that sorts problems into kinds.

    An entry with more than 40 values, or whose values are hardly ever shared by two problems, is
    an identifier rather than a kind.
    """
    groups: dict[str, dict[str, SubsetResult]] = {}
    ks = sorted({1, correct.shape[1]})
    for key in sorted({str(key) for meta in meta_P for key in meta}):
        members: dict[str, list[int]] = {}
        for row, meta in enumerate(meta_P):
            if isinstance(meta.get(key), str | int | bool):
                members.setdefault(str(meta[key]), []).append(row)
        if 2 <= len(members) <= min(40, len(correct) // 2):
            groups[key] = {
                value: SubsetResult(len(rows), pass_at_k_table(correct[rows], ks, bootstrap, seed))
                for value, rows in sorted(members.items())
            }
    return groups
