"""What is said of a study's records, against cases worked out by hand."""

import math

import numpy as np
import pytest

from mm_agrae.evaluation.study_statistics import (
    Difference,
    StudyData,
    collapse,
    difference,
    differences,
    holm,
    never_sampled,
    share_below_alpha,
    student_quantile,
    success_at,
    values_P,
)


def record(correct=(), samples=4, greedy=None, drawn=None, solved=None, alpha=None, **curves):
    training = {} if drawn is None else {"drawn": drawn, "solved": solved}
    found = {"samples": samples, "correct": list(correct), "greedy": greedy} | training
    return {"evaluations": {"test": found}, "alpha": alpha, "curves": curves}


def test_holm():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx(
        [0.03, 0.06, 0.06]
    )  # 3 × .01, 2 × .03, the greater of .04 and .06
    assert holm([0.5, 0.6]) == [1.0, 1.0]
    assert holm([]) == []


@pytest.mark.parametrize(
    ("freedom", "quantile"), [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (9, 2.262), (29, 2.045)]
)
def test_student(freedom, quantile):
    assert student_quantile(freedom) == pytest.approx(quantile, rel=0.008)


def test_differences_that_can_be_seen_without_a_bootstrap():
    one = difference(np.array([[0.5, 0.0]]))
    assert (one.mean, one.low, one.high, one.p) == (0.25, -math.inf, math.inf, 1.0)
    same = difference(np.full((3, 4), 0.25))
    assert (same.mean, same.low, same.high, same.seeds, same.ahead) == (0.25, 0.25, 0.25, 3, 3)
    assert same.p == pytest.approx(1 / 10_001)
    none = difference(np.zeros((10, 4)))
    assert (none.mean, none.p, none.ahead) == (0.0, 1.0, 0)


def test_the_interval_of_two_seeds():
    """Gains of 0 and 1 whatever the problem: a resample's mean is 0, ½ or 1, spread by √2 · 12.706 / 1.96."""
    found = difference(np.array([[0.0] * 5, [1.0] * 5]))
    reach = 0.5 * math.sqrt(2) * 12.7062 / 1.959964
    assert (found.low, found.high) == pytest.approx((0.5 - reach, 0.5 + reach), rel=0.01)
    assert found.p == pytest.approx(0.5, abs=0.03)  # a quarter of the resamples is below 0


def test_few_gains_of_one_sign_are_no_difference():
    """By a sign test five of five have p = 1/16."""
    gain_SP = np.zeros((10, 32))
    gain_SP[[0, 2, 2, 5, 6], [10, 1, 23, 1, 23]] = -1
    assert difference(gain_SP).p > 1 / 16


def test_intervals_hold_what_they_promise():
    """Ten seeds, 40 problems, a true mean of 0: about 95 % of the intervals hold it."""
    generator = np.random.default_rng(0)
    for of_seed, of_problem, of_both in ((0.05, 0.0, 0.1), (0.03, 0.1, 0.1), (0.0, 0.0, 0.3)):
        held = 0
        for number in range(300):
            gains = of_seed * generator.normal(size=(10, 1)) + of_problem * generator.normal(size=(1, 40))
            found = difference(gains + of_both * generator.normal(size=(10, 40)), resamples=500, seed=number)
            held += found.low <= 0 <= found.high
        assert 0.92 <= held / 300 <= 0.99


def test_verdicts():
    def verdict(**values):
        return Difference(**{"mean": 0.1, "low": 0, "high": 1, "p": 0.01, "seeds": 10, "ahead": 9} | values).verdict

    assert [verdict(), verdict(adjusted=0.04), verdict(adjusted=0.04, mean=-0.1)] == ["", "more", "less"]
    assert verdict(adjusted=0.06) == "cannot tell"


def test_only_arms_with_enough_seeds_are_judged():
    """... and only their p-values are adjusted together, for the k that were named as main ones."""
    found = {"grpo": [1, 2, 1, 2], "much": [3, 4, 3, 4], "same": [1, 2, 2, 1], "few": [4, 4, 4, 4]}
    runs = {arm: {seed: record(own) for seed in range(2 if arm == "few" else 10)} for arm, own in found.items()}
    about = {"arms": [*found], "against": dict.fromkeys(found, "grpo"), "ks": [1, 2, 4], "main_ks": [1, 4]}
    judged = differences(StudyData(about, runs))
    assert {(arm, k): each.verdict for (arm, _, k), each in judged.items()} == {
        ("much", 1): "more", ("much", 2): "", ("much", 4): "cannot tell",
        ("same", 1): "cannot tell", ("same", 2): "", ("same", 4): "cannot tell",
        ("few", 1): "", ("few", 2): "", ("few", 4): "",
    }  # fmt: skip
    assert judged["much", "test", 1].adjusted == pytest.approx(4 * judged["much", "test", 1].p)


def test_values_of_problems():
    found = record([0, 1, 4], greedy=[0, 1, 1])
    assert values_P(found, "test", 2).tolist() == [0.0, 0.5, 1.0]
    assert values_P(found, "test", "greedy").tolist() == [0.0, 1.0, 1.0]


def test_what_happened_in_training():
    assert share_below_alpha(record(alpha=0.5, omega=[0.2, 0.49, 0.5, 0.9])) == 0.5
    assert share_below_alpha(record(alpha=None, omega=[0.2])) is None
    quiet, falling = [0.4] * 20, [0.4] * 10 + [0.1] * 10
    assert collapse(record(unsolved=quiet)) is None
    assert collapse(record(unsolved=falling)) is None
    # Means of ten rise from .1 by .06 a step, above .25 with the fifth.
    assert collapse(record(unsolved=falling + [0.7] * 10)) == 25
    run = record(success=[0.0, 0.2, 0.4, 0.9], cpu_seconds=[1.0, 2.0, 3.0, 9.0])
    assert success_at(run, 3.5) == pytest.approx(0.2)
    assert success_at(run, 9.0) == pytest.approx(0.375)


def test_never_sampled():
    start = record([1, 2, 0, 4])
    after = record([3, 0, 1, 4], drawn=[8, 8, 16, 0], solved=[0, 3, 0, 0])  # the last was never drawn
    count, before, now = never_sampled(after, start, "test")
    assert (count, before, now) == (2, 0.125, 0.5)
    assert never_sampled(after, None, "test") is None
    assert never_sampled(start, start, "test") is None
    assert never_sampled(record([1], drawn=[8], solved=[1]), record([1]), "test")[0] == 0
