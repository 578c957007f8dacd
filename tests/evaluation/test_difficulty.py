"""The statistics of `mm-agrae difficulty` against golden numbers, brute force and finite differences."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest

from mm_agrae.evaluation.difficulty import auroc, ensemble, pass_rate, rasch, rates, spearman, with_interval

GOLDEN = json.loads((Path(__file__).parent.parent / "golden" / "neighbours.json").read_text())["alignment_cases"]
NAN = math.nan


@pytest.mark.parametrize("case", GOLDEN, ids=range(len(GOLDEN)))
def test_golden_cases(case):
    human, rating, correct = (np.array(case[name], dtype=float) for name in ("human", "predicted", "correct"))
    ours = {
        "rho_pred": [spearman(each, human) for each in rating],
        "rho_ensemble": spearman(ensemble(rating), human),
        "rho_irt": spearman(-pass_rate(correct), human),
        "auroc": [auroc(*pair) for pair in zip(rating, 1 - correct, strict=True)],
        **rates(correct, human),
    }
    assert ours.keys() == case["metrics"].keys()
    for name, expected in case["metrics"].items():
        assert ours[name] == pytest.approx(expected, abs=1e-6), name


def test_spearman_is_not_defined_for_constants_and_single_items():
    assert spearman(np.full(5, 0.1), np.arange(5.0)) is None
    assert spearman(np.arange(5.0), np.full(5, 3.0)) is None
    assert spearman(np.array([1.0]), np.array([2.0])) is None
    assert spearman(np.array([]), np.array([])) is None
    assert spearman(np.array([1.0, NAN, NAN]), np.array([1.0, 2.0, 3.0])) is None  # one known pair


def test_spearman_of_three_classes_is_the_correlation_of_average_ranks():
    a, b = np.array([1.0, 1, 2, 2, 3, NAN, 3]), np.array([2.0, 1, 2, 3, 3, 9, 2])
    ranks = [1.5, 1.5, 3.5, 3.5, 5.5, 5.5], [3, 1, 3, 5.5, 5.5, 3]
    assert spearman(a, b) == pytest.approx(np.corrcoef(*ranks)[0, 1], abs=1e-12)


def test_auroc_is_the_share_of_pairs_in_order():
    generator = np.random.default_rng(0)
    rating, failed = generator.integers(0, 4, 40).astype(float), generator.integers(0, 2, 40).astype(float)
    rating[:5], failed[3:8] = NAN, NAN
    known = [(r, f) for r, f in zip(rating, failed, strict=True) if r == r and f == f]
    pairs = [(a, b) for (a, fa), (b, fb) in itertools.product(known, known) if fa and not fb]
    assert auroc(rating, failed) == pytest.approx(np.mean([(a > b) + (a == b) / 2 for a, b in pairs]))


@pytest.mark.parametrize("failed", [[0.0, 0, 0], [1.0, 1, 1], [1.0, NAN, NAN], []])
def test_auroc_needs_failures_and_successes(failed):
    assert auroc(np.arange(len(failed), dtype=float), np.array(failed)) is None


def test_saturation_is_strict_and_thirds_include_their_ends():
    correct = np.ones((10, 3))
    correct[0, 0] = 0  # exactly 90 % solve it
    assert rates(correct, np.arange(3.0)) == {"saturated": pytest.approx(2 / 3), "savant": 1.0, "brittle": 0.0}
    # All labels equal: every item belongs to both thirds.
    half = np.array([[1.0, 0, 0], [1, 0, 1]])
    expected = {"saturated": 1 / 3, "savant": 1 / 3, "brittle": 1 / 3}
    assert rates(half, np.full(3, 2.0)) == pytest.approx(expected)
    assert rates(np.zeros((2, 0)), np.array([])) == {"saturated": None, "savant": None, "brittle": None}


def test_items_without_an_answer_count_for_nothing():
    correct = np.array([[1.0, NAN, 0], [1, NAN, NAN]])
    np.testing.assert_array_equal(pass_rate(correct), [1, NAN, 0])
    assert rates(correct, np.arange(3.0)) == rates(correct[:, [0, 2]], np.array([0.0, 2]))
    # Resamples may hold items without an answer alone.
    found = with_interval(lambda v, y: rates(v, y)["saturated"], correct, np.arange(3.0), bootstrap=100)
    assert found == {"value": 0.5, "low": 0.0, "high": 1.0}


def answers(examinees=60, items=12, missing=0.2, seed=1):
    generator = np.random.default_rng(seed)
    ability, beta = generator.normal(size=examinees), np.linspace(-2, 2, items)
    correct = (generator.random((examinees, items)) < 1 / (1 + np.exp(beta - ability[:, None]))).astype(float)
    correct[generator.random(correct.shape) < missing] = NAN
    return correct, ability, beta


def marginal_likelihood(correct, beta):
    """Σ over examinees of log ∫ N(θ) Π P dθ, by Gauss-Hermite quadrature instead of the grid."""
    node, weight = np.polynomial.hermite_e.hermegauss(80)
    solve = 1 / (1 + np.exp(beta[:, None] - node))
    cells = np.where(np.isnan(correct)[..., None], 1, np.where(correct[..., None] == 1, solve, 1 - solve))
    return np.log(cells.prod(1) @ weight).sum()


def test_rasch_is_at_the_maximum_of_the_marginal_likelihood():
    correct, _, _ = answers()
    fit, h = rasch(correct), 1e-3
    best = marginal_likelihood(correct, fit.difficulty_N)
    for item, error in enumerate(fit.difficulty_error_N):
        shift = np.zeros(len(fit.difficulty_N))
        shift[item] = h
        above, below = (marginal_likelihood(correct, fit.difficulty_N + sign * shift) for sign in (1, -1))
        assert abs(above - below) / (2 * h) < 1e-5
        assert error == pytest.approx((-(above - 2 * best + below) / h**2) ** -0.5, rel=1e-4)


def test_rasch_recovers_what_the_answers_were_drawn_from():
    correct, ability, beta = answers(examinees=600, items=20)
    fit = rasch(correct)
    assert np.abs((fit.difficulty_N - beta) / fit.difficulty_error_N).max() < 4
    assert np.mean(np.abs(fit.ability_M - ability) < 1.96 * fit.ability_error_M) == pytest.approx(0.95, abs=0.03)


def test_rasch_difficulty_falls_with_the_pass_rate_and_is_infinite_at_its_ends():
    correct, _, _ = answers(missing=0)
    correct[:, 0], correct[:, 1], correct[:, 2] = 1, 0, NAN
    fit = rasch(correct)
    assert fit.difficulty_N[:2].tolist() == [-math.inf, math.inf]
    assert np.isnan(fit.difficulty_N[2])
    assert np.isnan(fit.difficulty_error_N[:3]).all()
    assert spearman(fit.difficulty_N[3:], -pass_rate(correct[:, 3:])) == pytest.approx(1)
    one = rasch(np.array([[1.0, 0, 1]]))  # nothing to compare: the prior
    assert one.ability_M == pytest.approx([0], abs=1e-9)
    assert one.ability_error_M == pytest.approx([1], abs=1e-6)


def test_intervals_are_over_items_and_depend_on_the_seed_alone():
    generator = np.random.default_rng(0)
    human = generator.normal(size=80)
    rating = human + generator.normal(size=80)
    found = with_interval(spearman, rating, human, bootstrap=300, seed=2)
    assert found == with_interval(spearman, rating, human, bootstrap=300, seed=2)
    assert found != with_interval(spearman, rating, human, bootstrap=300, seed=3)
    assert found["value"] == spearman(rating, human)
    assert found["low"] < found["value"] < found["high"]
    assert with_interval(spearman, np.ones(80), human) is None
    # A resample of two items is constant every other time.
    two = with_interval(spearman, np.array([1.0, 2]), np.array([1.0, 2]), bootstrap=50)
    assert two == {"value": pytest.approx(1), "low": pytest.approx(1), "high": pytest.approx(1)}
