import dataclasses
import itertools
import json
import math
from fractions import Fraction

import numpy as np
import pytest

from mm_agrae.config import EvaluateSection
from mm_agrae.evaluation.evaluate import EvaluatedProblem, write
from mm_agrae.evaluation.statistics import paired_difference, pass_at_k, pass_at_k_table, summarise
from mm_agrae.run.folder import RunFolder
from mm_agrae.run.records import EvaluationResult, PartMeans, SampleRecord
from mm_agrae.types import Example


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample(n):
    for c in range(n + 1):
        verdicts = [True] * c + [False] * (n - c)
        for k in range(1, n + 1):
            hits = [any(subset) for subset in itertools.combinations(verdicts, k)]
            assert pass_at_k(n, c, k) == sum(hits) / len(hits)


def test_pass_at_k_is_exact_for_many_samples():
    n = 1024
    correct = np.array([0, 1, 2, 511, 768, 1022, 1023, 1024])
    for k in (1, 2, 256, 512, 1023, 1024):
        expected = [float(1 - Fraction(math.comb(n - c, k), math.comb(n, k))) for c in correct.tolist()]
        np.testing.assert_array_equal(pass_at_k(n, correct, k), expected)


def test_pass_at_k_keeps_the_shape_and_takes_no_nonsense():
    assert pass_at_k(4, np.zeros((2, 3), dtype=int), 2).shape == (2, 3)
    assert pass_at_k(4, np.zeros(0, dtype=int), 2).shape == (0,)
    for n, c, k in ((4, 2, 5), (4, 2, 0), (4, 5, 1), (4, -1, 1), (4, np.array([0.5]), 1)):
        with pytest.raises(ValueError):
            pass_at_k(n, c, k)


def outcomes(generator, problems, samples, shift=0.0):
    """Problems of varying difficulty, many near 0 and 1, as for a real model."""
    rate = np.clip(generator.beta(0.5, 0.7, size=problems) + shift, 0, 1)
    return generator.random((problems, samples)) < rate[:, None]


def test_table_has_all_ks_and_depends_on_the_seed_alone():
    correct = outcomes(np.random.default_rng(0), 40, 12)
    table = pass_at_k_table(correct, bootstrap=300, seed=3)
    assert list(table) == [1, 2, 4, 8, 12]
    assert table == pass_at_k_table(correct, bootstrap=300, seed=3)
    assert table != pass_at_k_table(correct, bootstrap=300, seed=4)
    assert table[1].mean == pytest.approx(correct.mean())
    assert table[12].mean == pytest.approx(correct.any(1).mean())
    means = [interval.mean for interval in table.values()]
    assert means == sorted(means)
    assert all(interval.low < interval.mean < interval.high for interval in table.values())
    assert list(pass_at_k_table(correct, ks=[3], bootstrap=10)) == [3]
    for bad in (np.zeros((0, 4)), np.zeros((4, 0)), np.zeros(4)):
        with pytest.raises(ValueError, match="problems, samples"):
            pass_at_k_table(bad)
    with pytest.raises(ValueError, match="13"):
        pass_at_k_table(correct, ks=[13])


def test_certain_outcomes_have_intervals_without_width():
    for value in (0.0, 1.0):
        interval = pass_at_k_table(np.full((7, 3), value, dtype=bool), bootstrap=50)[1]
        assert (interval.mean, interval.low, interval.high) == (value, value, value)


def test_the_bootstrap_does_not_depend_on_how_it_is_cut_into_chunks():
    correct = outcomes(np.random.default_rng(1), 5000, 2)
    interval = pass_at_k_table(correct, ks=[1], bootstrap=1000)[1]  # several chunks
    error = correct.mean(1).std() / math.sqrt(5000)
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * error, rel=0.12)


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    """2.5 standard errors of the simulation around 95 %, and a little bias of the bootstrap."""
    generator = np.random.default_rng(7)
    reference = outcomes(generator, 200_000, 8)
    truth = {k: pass_at_k(8, reference.sum(1), k).mean() for k in (1, 4)}
    lift = outcomes(generator, 200_000, 8, shift=0.1).mean() - reference.mean()
    hits = dict.fromkeys([1, 4, "paired"], 0)
    runs = 300
    for seed in range(runs):
        rate = generator.beta(0.5, 0.7, size=80)
        before, after = (generator.random((80, 8)) < np.clip(rate + shift, 0, 1)[:, None] for shift in (0, 0.1))
        table = pass_at_k_table(before, ks=[1, 4], bootstrap=400, seed=seed)
        for k, interval in table.items():
            hits[k] += interval.low <= truth[k] <= interval.high
        difference = paired_difference(before, after, 1, bootstrap=400, seed=seed)
        hits["paired"] += difference.low <= lift <= difference.high
        assert difference.high - difference.low < table[1].high - table[1].low
    assert all(0.90 <= count / runs <= 0.985 for count in hits.values()), hits


def test_paired_difference_is_after_minus_before():
    before = np.zeros((10, 4), dtype=bool)
    after = np.zeros((10, 2), dtype=bool)
    after[:5] = True
    assert paired_difference(before, after, 2).mean == 0.5
    assert paired_difference(after, before, 2).mean == -0.5
    with pytest.raises(ValueError, match="same problems"):
        paired_difference(before, after[:9], 1)
    with pytest.raises(ValueError, match="pass@3"):
        paired_difference(before, after, 3)


def result(**changes):
    correct = np.array([[1, 1], [1, 0], [0, 0], [0, 0]], dtype=bool)
    values = {
        "name": "before",
        "label": "figures",
        "correct_PN": correct,
        "greedy_correct_P": np.array([True, True, False, True]),
        "length_PN": np.array([[10, 30], [10, 10], [20, 20], [40, 0]]),
        "truncated_PN": np.array([[0, 0], [0, 0], [0, 1], [1, 0]], dtype=bool),
        "entropy_PN": np.array([[1.0, 2.0], [1, 1], [1, np.nan], [1, np.nan]]),
        "meta_P": [{"level": i // 2, "seed": i, "family": "f"} for i in range(4)],
        "seconds": 1.5,
        "tokens": 140,
        "bootstrap": 100,
    }
    return summarise(**(values | changes))


def test_summarise_by_hand():
    found = result()
    assert (found.problems, found.samples) == (4, 2)
    assert found.pass_at_k[1].mean == 3 / 8
    assert found.pass_at_k[2].mean == 1 / 2
    assert found.greedy.mean == 3 / 4
    assert found.mean_tokens == 17.5
    assert found.truncated == 1 / 4
    assert found.entropy == pytest.approx((10 + 60 + 10 + 10 + 20 + 40) / 120)
    assert found.unsolved == 1 / 2
    assert list(found.groups) == ["level"]  # one family only; every seed is another
    assert found.groups["level"]["0"].problems == 2
    assert found.groups["level"]["0"].pass_at_k[1].mean == 3 / 4
    assert found.groups["level"]["1"].pass_at_k[2].mean == 0
    assert found.metrics()["evaluate/figures/pass@2"] == 1 / 2
    assert found.metrics()["evaluate/figures/greedy"] == 3 / 4


@pytest.mark.parametrize(
    "changes", [{}, {"greedy_correct_P": None, "entropy_PN": None}, {"parts": {"rule": np.full((4, 2), np.nan)}}]
)
def test_result_survives_json(changes):
    found = result(**changes)
    assert EvaluationResult.from_json(found.to_json()) == found
    assert json.loads(found.to_json())["pass_at_k"]["1"]["mean"] == 3 / 8


def test_means_of_parts_by_hand():
    nan = np.nan
    parts = {
        "rule": np.array([[1, 0], [1, 0], [1, nan], [nan, nan]]),  # correct are the first three of the first four
        "rare": np.array([[nan, nan], [nan, nan], [1, 0], [nan, nan]]),
        "absent": np.full((4, 2), nan),
    }
    found = result(parts=parts).parts
    assert found == {"rule": PartMeans(3 / 5, 2 / 3), "rare": PartMeans(1 / 2, None), "absent": PartMeans(None, None)}


def test_results_of_earlier_versions_have_no_parts():
    stored = json.loads(result(parts={"rule": np.ones((4, 2))}).to_json())
    assert stored["parts"] == {"rule": {"mean": 1.0, "correct": 1.0}}
    del stored["parts"]
    assert EvaluationResult.from_json(json.dumps(stored)) == result()


def test_falls_are_of_one_problem_or_more():
    family = [{"family": name} for name in ("charts", "charts", "counting", "counting")]
    changes = {"meta_P": family, "greedy_correct_P": None}
    before = result(**changes, correct_PN=np.array([[1, 1], [1, 0], [1, 1], [1, 1]], dtype=bool))
    after = result(**changes, correct_PN=np.array([[1, 1], [0, 0], [1, 0], [1, 1]], dtype=bool))
    assert after.falls(before, "family") == {"charts": {2: -1 / 2}}  # pass@1 of both fell by half a problem
    assert before.falls(after, "family") == after.falls(before, "level") == {}
    fewer = dataclasses.replace(before, groups={"family": {"counting": before.groups["family"]["charts"]}})
    assert after.falls(fewer, "family") == {}


def test_kinds_are_entries_of_one_value_with_few_of_them():
    correct = np.ones((82, 2), dtype=bool)
    tables = {"correct_PN": correct, "length_PN": correct, "truncated_PN": correct, "entropy_PN": None}
    meta = [{"figure": i % 40, "key": i % 41, "ways": ["Sum."]} for i in range(82)]
    assert list(result(**tables, greedy_correct_P=None, meta_P=meta).groups) == ["figure"]


def test_samples_and_result_keep_the_parts(tmp_path):
    def record(problem, number, success, parts):
        return SampleRecord(f"p{problem}", number, "?", "5", "text", success, 3, "stop", parts=parts)

    rows = [
        [(False, {}), (True, {"rule": 1.0}), (True, {"rule": 0.0})],
        [(True, {"rule": 0.0}), (False, {"rule": 1.0}), (True, {})],
    ]
    problems = [
        EvaluatedProblem(i, Example(f"p{i}", "?", "5"), [], [record(i, n - 1, *row) for n, row in enumerate(own)])
        for i, own in enumerate(rows)
    ]
    run = RunFolder(tmp_path).create("", {})
    found = write(run, "after", "test", problems, EvaluateSection(samples=2, bootstrap=10), 1.0)
    assert found.parts == {"rule": PartMeans(2 / 3, 1 / 2)}  # the greedy ones do not count
    assert run.read_evaluations() == [found]
    assert [row["parts"] for row in run.read_samples(found)] == [parts for own in rows for _, parts in own]


def test_summarise_refuses_shapes_that_disagree():
    for changes in (
        {"length_PN": np.zeros((4, 3))},
        {"truncated_PN": np.zeros((3, 2))},
        {"parts": {"rule": np.zeros((4, 3))}},
        {"meta_P": []},
        {"greedy_correct_P": np.zeros(3)},
    ):
        with pytest.raises(ValueError):
            result(**changes)
