"""Whether ratings of difficulty agree with people and with a model's own failures, from arrays (arXiv 2512.18880).

Shapes: M examinees (models, checkpoints), N items. NaN stands for a rating, label or answer that is not there; items
without it are left out. None stands for a statistic that is not defined, as a correlation with a constant is not.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

SATURATED, BRITTLE = 0.9, 0.5
"""An item is saturated if more examinees than this share solve it; an easy one is brittle if fewer do."""
_POOL = {
    "failure": "Spearman of the share that fails and the label",
    "saturated": f"items that over {SATURATED:.0%} solve, %",
    "savant": "the same in the hardest third, %",
    "brittle": f"items of the easiest third that under {BRITTLE:.0%} solve, %",
}
_GRID_Q = np.linspace(-6, 6, 121)
"""Abilities over which the standard normal distribution is summed."""


def spearman(a_N: np.ndarray, b_N: np.ndarray) -> float | None:
    """Rank correlation, average ranks for ties. None for fewer than two items, or if either is constant."""
    known = np.isfinite(a_N) & np.isfinite(b_N)
    a, b = (_ranks(values[known]) - (known.sum() + 1) / 2 for values in (a_N, b_N))
    scale = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / scale) if scale else None


def auroc(rating_N: np.ndarray, failed_N: np.ndarray) -> float | None:
    """Probability that a failed item is rated above a solved one, ties ½. None if all are failed, or none is.

    failed_N: 1, 0, or NaN where there is no answer.
    """
    known = np.isfinite(rating_N) & np.isfinite(failed_N)
    rank, failed = _ranks(rating_N[known]), failed_N[known] > 0
    count, others = int(failed.sum()), int((~failed).sum())
    return float((rank[failed].sum() - count * (count + 1) / 2) / (count * others)) if count and others else None


def rates(correct_MN: np.ndarray, human_N: np.ndarray) -> dict[str, float | None]:
    """Shares of items: `saturated` of all, `savant` (saturated) of the hardest third, `brittle` of the easiest.

    The thirds end at interpolated quantiles of the human difficulty, which belong to them, so that with few items or
    many ties they overlap. None of no items.
    """
    solved_N = pass_rate(correct_MN)
    solved_N, human_N = solved_N[np.isfinite(solved_N)], human_N[np.isfinite(solved_N)]
    easy, hard = np.quantile(human_N, [1 / 3, 2 / 3]) if human_N.size else (np.nan, np.nan)
    saturated = solved_N > SATURATED
    return {
        "saturated": mean(saturated),
        "savant": mean(saturated[human_N >= hard]),
        "brittle": mean(solved_N[human_N <= easy] < BRITTLE),
    }


def pass_rate(correct_MN: np.ndarray) -> np.ndarray:
    """[N] the share of examinees that solve each item, of those that answered it; NaN if none did."""
    count_N = np.isfinite(correct_MN).sum(0)
    return np.where(count_N > 0, np.nansum(correct_MN, 0) / np.maximum(count_N, 1), np.nan)


def ensemble(rating_MN: np.ndarray) -> np.ndarray:
    """[N] the mean rating of each item; NaN where one is missing. Rounded, so that equal means are ties."""
    return np.round(rating_MN.mean(0), 9)


class Rasch(NamedTuple):
    """Abilities and item difficulties in logits, with standard errors.

    Items that all or none solved have difficulty −inf or inf, and ones nobody answered NaN, with error NaN.
    """

    ability_M: np.ndarray
    ability_error_M: np.ndarray
    difficulty_N: np.ndarray
    difficulty_error_N: np.ndarray


def rasch(correct_MN: np.ndarray, tolerance: float = 1e-9, most: int = 5000) -> Rasch:
    """The Rasch model P(m solves i) = σ(θ_m − β_i), β by marginal maximum likelihood with θ ~ N(0, 1).

    EM with a Newton step for each item. Abilities are posterior means and their errors posterior standard deviations;
    an error of β is that of the observed information with the other items held fixed. correct_MN: 1, 0, or NaN for a
    missing answer.
    """
    answered_MN = np.isfinite(correct_MN)
    score_N, count_N = np.nansum(correct_MN, 0), answered_MN.sum(0)
    mixed = (score_N > 0) & (score_N < count_N)
    answered, correct = answered_MN[:, mixed].astype(float), np.nan_to_num(correct_MN[:, mixed])
    score, count = score_N[mixed], count_N[mixed]
    beta = np.log((count - score) / score)
    for _ in range(most):
        solve_NQ = 1 / (1 + np.exp(beta[:, None] - _GRID_Q))
        log_MQ = correct @ np.log(solve_NQ) + (answered - correct) @ np.log1p(-solve_NQ) - _GRID_Q**2 / 2
        weight_MQ = np.exp(log_MQ - log_MQ.max(1, keepdims=True))
        weight_MQ /= weight_MQ.sum(1, keepdims=True)
        taken_NQ = answered.T @ weight_MQ
        information = (taken_NQ * solve_NQ * (1 - solve_NQ)).sum(1)
        step = np.clip(((taken_NQ * solve_NQ).sum(1) - score) / information, -1, 1)
        beta = beta + step
        if not step.size or np.abs(step).max() < tolerance:
            break
    ability = weight_MQ @ _GRID_Q
    error = np.sqrt(np.maximum(weight_MQ @ _GRID_Q**2 - ability**2, 0))
    # What is not known of the abilities is lost from the information (Louis' identity).
    lost = (answered * (weight_MQ @ (solve_NQ**2).T - (weight_MQ @ solve_NQ.T) ** 2)).sum(0)
    difficulty_N = np.where(count_N == 0, np.nan, np.where(score_N > 0, -np.inf, np.inf))
    difficulty_error_N = np.full(len(score_N), np.nan)
    difficulty_N[mixed], difficulty_error_N[mixed] = beta, 1 / np.sqrt(information - lost)
    return Rasch(ability, error, difficulty_N, difficulty_error_N)


def with_interval(
    statistic: Callable[..., float | None], *columns: np.ndarray, bootstrap: int = 2000, seed: int = 0
) -> dict[str, float] | None:
    """A statistic of arrays [..., N] and its 95 % percentile interval over resampled items: value, low and high.

    None if it is not defined. Resamples in which it is not defined are left out.
    """
    value = statistic(*columns)
    if value is None:
        return None
    generator, items = np.random.default_rng(seed), columns[0].shape[-1]
    found = []
    for _ in range(bootstrap):
        rows = generator.integers(items, size=items)
        drawn = statistic(*(column[..., rows] for column in columns))
        if drawn is not None:
            found.append(drawn)
    low, high = np.percentile(found or [value], [2.5, 97.5])
    return {"value": value, "low": float(low), "high": float(high)}


def shown(found: Mapping[str, float] | None, scale: int = 1) -> str:
    """A statistic with its interval as text."""
    digits = 1 if scale > 1 else 2
    return (
        "{} [{}, {}]".format(*(f"{scale * found[k]:.{digits}f}" for k in ("value", "low", "high"))) if found else "–"
    )


def tables(result: Mapping[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """Title, header and rows of the tables that terminal and report show of a task in difficulty.json."""

    def number(value: float | None, digits: str = ".2f") -> str:
        return "–" if value is None else format(value, digits)

    label, pool, examinees = result["label"], result["pool"], result["examinees"]
    ratings = [
        [e["name"], number(100 * e["read"], ".0f"), shown(e["spearman"]), shown(e.get("auroc"))] for e in examinees
    ] + [[f"best {k}", "", number(rho), ""] for k, rho in enumerate(result["best_models"], 1) if k > 1]
    answers = [
        [e["name"], shown(e["accuracy"], 100), number(e["ability"]), number(e["ability_error"])]
        for e in examinees
        if "accuracy" in e
    ]
    levels = [[f"{y:g}", str(n), shown(at, 100), number(rating)] for y, n, at, rating in result["levels"]]
    models = [[what, shown(pool[name], 1 if name == "failure" else 100)] for name, what in _POOL.items()]
    return [
        (f"Ratings ({result['rating']}) against {label}", ["", "read, %", "Spearman", "AUROC, failures"], ratings),
        ("Answers", ["", "correct, %", "ability, logits", "±"], answers),
        (f"By {label}", [label, "items", "solved, %", "mean rating"], levels),
        ("All models", ["", "value"], models),
    ]


def mean(values_N: np.ndarray) -> float | None:
    """Of what is known; None if nothing is."""
    known = values_N[np.isfinite(values_N)]
    return float(known.mean()) if known.size else None


def _ranks(values_N: np.ndarray) -> np.ndarray:
    """Ranks from 1, equal values sharing the mean of theirs."""
    _, where, count = np.unique(values_N, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[where]
