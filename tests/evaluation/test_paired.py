import json

import numpy as np
import pytest
from run_folders import evaluate, make_run

from mm_agrae.errors import RunFolderError
from mm_agrae.evaluation.paired import OUTCOMES, EvaluationSamples, PairedEvaluations, SampleCache, find_evaluations
from mm_agrae.evaluation.statistics import paired_difference


@pytest.fixture
def run(tmp_path):
    run = make_run(tmp_path / "run")
    evaluate(run, "before", [0, 4, 1, 3, 2, 0, 0])
    evaluate(run, "after", [2, 0, 3, 1, 2, 0, 4])
    return run


def paired_of(run):
    found, errors = find_evaluations({"run": run.path})
    assert not errors
    reader = SampleCache()
    first, second = (found[f"run · {name} · test"] for name in ("before", "after"))
    return PairedEvaluations.of(reader.read(first), reader.read(second))


def rewrite(run, name, change):
    """Pass every row of an evaluation's samples through `change`."""
    path = run.path / "evaluations" / name / "samples.jsonl"
    rows = [change(json.loads(line)) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows if row is not None))


def test_problems_are_sorted_by_who_solves_them(run):
    paired = paired_of(run)
    keys = {name: [p.key[-1] for p in paired.by_outcome[name]] for name in OUTCOMES}
    assert keys == {
        "only second": ["6", "0"],  # the largest gain first
        "only first": ["1"],
        "second more": ["2"],
        "first more": ["3"],
        "same": ["4"],
        "neither": ["5"],
    }
    assert paired.count == 7
    assert paired.mismatched == 0
    (gained,) = paired.by_outcome["second more"]
    assert (gained.correct, gained.samples, gained.gain) == ((1, 3), (4, 4), 0.5)


def test_sample_pairs_show_the_difference(run):
    paired = paired_of(run)
    for outcome, verdicts in {
        "only second": (False, True),
        "only first": (True, False),
        "second more": (False, True),
        "first more": (True, False),
        "same": (True, True),
        "neither": (False, False),
    }.items():
        problem = paired.by_outcome[outcome][0]
        rows = paired.sample_pair(problem)
        assert tuple(row["success"] for row in rows) == verdicts, outcome
        assert {row["example_id"] for row in rows} == {problem.key}
        assert [row["completion"].split("</think>")[0] for row in rows] == [
            "<think>so of before",
            "<think>so of after",
        ]


def test_the_gain_is_the_paired_difference(run):
    before = np.arange(4)[None] < np.array([0, 4, 1, 3, 2, 0, 0])[:, None]
    after = np.arange(4)[None] < np.array([2, 0, 3, 1, 2, 0, 4])[:, None]
    paired = paired_of(run)
    for k in (1, 4):
        gain, wanted = paired.gain(k), paired_difference(before, after, k)
        assert gain.mean == pytest.approx(wanted.mean)
        assert gain.low <= gain.mean <= gain.high
    assert paired.gain(5) is None  # four samples cannot tell


def test_problems_pair_by_id_question_and_answer(run):
    def change(row):
        if row["example_id"] == "problem 0":
            return row | {"answer": "another"}
        return row if row["example_id"] != "problem 1" else None

    rewrite(run, "after", change)
    paired = paired_of(run)
    assert paired.mismatched == 1
    assert paired.count == 5
    assert not paired.by_outcome["only first"]


def test_unequal_numbers_of_samples_have_no_gain_but_shares(run):
    rewrite(run, "after", lambda row: row if (row["example_id"], row["sample"]) != ("problem 6", 3) else None)
    paired = paired_of(run)
    assert paired.gain(1) is None
    assert paired.by_outcome["only second"][0].samples == (4, 3)


def test_greedy_samples_count_only_if_there_are_no_others(run):
    rewrite(run, "before", lambda row: row | {"sample": row["sample"] - 1})
    paired = paired_of(run)
    assert {len(v) for v in paired.first.verdicts.values()} == {3}
    rewrite(run, "before", lambda row: row if row["sample"] == -1 else None)
    paired = paired_of(run)
    assert {len(v) for v in paired.first.verdicts.values()} == {1}


def test_nothing_in_common(run):
    rewrite(run, "after", lambda row: row | {"example_id": f"other {row['example_id']}"})
    paired = paired_of(run)
    assert paired.count == 0
    assert paired.gain(1) is None


def test_evaluations_of_several_runs(tmp_path, run):
    other = make_run(tmp_path / "eval")
    evaluate(other, "models/base", [1, 2], label="geometry")
    damaged = make_run(tmp_path / "damaged")
    evaluate(damaged, "after", [1])
    next(damaged.path.rglob("result.json")).write_text("{")
    runs = {"run": run.path, "eval": other.path, "damaged": damaged.path}
    found, errors = find_evaluations(runs)
    assert list(found) == ["run · before · test", "run · after · test", "eval · models/base · geometry"]
    (error,) = errors
    assert "damaged" in error
    assert find_evaluations({}) == ({}, [])


def test_samples_are_cached_until_they_are_rewritten(run):
    found, _ = find_evaluations({"run": run.path})
    after = found["run · after · test"]
    reader = SampleCache()
    samples = reader.read(after)
    assert reader.read(after) is samples
    evaluate(run, "after", [4, 4])
    again = reader.read(find_evaluations({"run": run.path})[0]["run · after · test"])
    assert again.verdicts == {"problem 0": [True] * 4, "problem 1": [True] * 4}
    with pytest.raises(RunFolderError, match="has been rewritten"):
        samples.rows("problem 6")


@pytest.mark.parametrize("content", ["{", "[1]\n", "\xff\n", '{"example_id": 1}\n{"exam'])
def test_damaged_samples_are_named(run, content):
    path = run.path / "evaluations" / "after" / "samples.jsonl"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(RunFolderError, match=r"samples\.jsonl line \d is damaged"):
        EvaluationSamples(path)


def test_missing_samples_are_named(run):
    found, _ = find_evaluations({"run": run.path})
    after = found["run · after · test"]
    (run.path / "evaluations" / "after" / "samples.jsonl").unlink()
    with pytest.raises(RunFolderError, match="not kept"):
        SampleCache().read(after)


def test_progress_of_a_long_file_is_reported(tmp_path):
    run = make_run(tmp_path / "run")
    evaluate(run, "after", [1] * 1600)
    shares = []
    EvaluationSamples(run.path / "evaluations" / "after" / "samples.jsonl", shares.append)
    assert len(shares) >= 3
    assert shares == sorted(shares)
    assert 0 < shares[0] < shares[-1] <= 1
