"""Variants of problems in a run: what a step holds, what is replaced together, and what is stored."""

import itertools
import json
import math

import pytest
from helpers import TEXT, VL, run_config

from mm_agrae.batching import StepTable
from mm_agrae.errors import DataError
from mm_agrae.progress import Reporter
from mm_agrae.rewards import Rewarder
from mm_agrae.run.folder import RunFolder
from mm_agrae.run.problems import problem_success
from mm_agrae.trainer import Trainer
from mm_agrae.view.report import write_report

ROLLOUT = {"prompts_per_step": 6, "completions_per_prompt": 2, "max_new_tokens": 12}
NO_EVALUATION = {"before": False, "after": False}


def made_trainer(run_dir, path=VL, variants=None, rollout=None, **sections):
    rollout = ROLLOUT | {"variants": {"count": 2} | (variants or {})} | (rollout or {})
    sections = {"advantage": {"rule": "diva"}, "evaluate": NO_EVALUATION} | sections
    return Trainer(run_config(run_dir, path, rollout=rollout, **sections), Reporter(enabled=False))


def groups_of(trainer, step=0):
    with Rewarder(trainer.config.reward, trainer.config.rollout.max_new_tokens) as rewarder:
        trainer.collector.rewarder = rewarder
        return trainer.collector.collect(step, last=True)


def by_problem(groups):
    return [[*own] for _, own in itertools.groupby(groups, key=lambda group: group.problem)]


def graded(tmp_path, code):
    """A reward that is the success as well, and looks at the example alone."""
    path = tmp_path / "reward.py"
    path.write_text(f"def reward(example, completion):\n    return float({code})\n")
    name = f"{path}:reward"
    return {"parts": {name: 1.0}, "success": name}


def rows_config(tmp_path, rows, **more):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"task": "files", "path": str(path)}
    return {"train": [source], "evaluate": [], "shuffle": False, "check": "off"} | more


def all_are_easy(trainer):
    """So that each has harder variants."""
    trainer.collector.problems.found = dict.fromkeys(range(len(trainer.task)), 1.0)


def test_a_problem_and_its_variants_are_neighbours_and_compared(tmp_path):
    """All of the problem as it is are right, all of its variants wrong: each group is flat, and still learnt from."""
    trainer = made_trainer(tmp_path / "run", reward=graded(tmp_path, "not example.variant"))
    all_are_easy(trainer)
    groups = groups_of(trainer)
    assert [group.position for group in groups] == [*range(6)]
    assert [group.problem for group in groups] == [0, 0, 0, 3, 3, 3]
    assert [group.summary().problem for group in groups] == [0, 0, 0, 3, 3, 3]
    for problem in by_problem(groups):
        examples = [group.prompt.example for group in problem]
        assert len({(example.id, example.answer) for example in examples}) == 1
        assert [bool(example.variant) for example in examples] == [False, True, True]
        assert [group.summary().is_variant for group in problem] == [False, True, True]
        assert examples[1].variant != examples[2].variant
        assert [group.summary().difficulty for group in problem] == [example.difficulty for example in examples]
    advantage_PG = StepTable.of([group.summary() for group in groups]).advantages(trainer.config).advantage_PG
    for position, advantage_G in enumerate(advantage_PG):
        assert (advantage_G > 0).all() if position % 3 == 0 else (advantage_G < 0).all()


def test_dynamic_sampling_replaces_whole_problems(tmp_path):
    """Not flat groups of a mixed one. D of a problem that is replaced moves as well: it was sampled."""
    odd = "not example.variant and int(example.id[-1]) % 2"
    rollout = {"prompts_per_step": 18, "dynamic_sampling": {"max_draws": 2}, "max_new_tokens": 4}
    trainer = made_trainer(tmp_path / "run", rollout=rollout, reward=graded(tmp_path, odd))
    all_are_easy(trainer)
    problems = by_problem(groups_of(trainer))
    assert [len(problem) for problem in problems] == [3] * 6
    for problem in problems:
        (resample_round,) = {group.resample_round for group in problem}
        (name,) = {group.prompt.example.id for group in problem}
        assert resample_round == 2 or int(name[-1]) % 2
    assert {problem[0].resample_round for problem in problems} >= {0, 2}
    task = trainer.task
    found = {row: difficulty for row, difficulty in trainer.collector.problems.found.items() if difficulty != 1}
    kept = {problem[0].prompt.example.id for problem in problems}
    assert len(found) == trainer.collector.order.position > 6
    for row, difficulty in found.items():
        name = task[row].id
        assert difficulty == (pytest.approx(1 + 4 / 6) if int(name[-1]) % 2 else 3)
    assert kept < {task[row].id for row in found}


def test_dynamic_sampling_keeps_a_problem_of_which_one_group_has_a_signal(tmp_path):
    spread = "bool(example.variant) * (sum(completion.token_ids) % 97 / 97)"
    reward = graded(tmp_path, spread)
    rollout = {"dynamic_sampling": {"max_draws": 1}, "completions_per_prompt": 4}
    trainer = made_trainer(tmp_path / "run", rollout=rollout, reward=reward, advantage={"rule": "grpo"})
    all_are_easy(trainer)
    groups = groups_of(trainer)
    flat = [len({score.reward for score in group.scores}) == 1 for group in groups]
    assert flat[0]
    assert flat[3]
    assert not all(flat)
    assert {group.resample_round for group in groups} == {0}


@pytest.mark.parametrize("threads", [0, 2])
def test_a_bad_row_is_replaced_with_all_its_variants(tmp_path, threads):
    rows = [{"id": str(i), "question": f"{i} + {i}?", "answer": str(2 * i), "solution": "Add."} for i in range(6)]
    rows[1]["question"] = "x" * 9000
    prepared = tmp_path / "prepared.jsonl"  # a variant of the bad row that could be used
    prepared.write_text(json.dumps({"id": "1", "wordings": ["One and one?"]}))
    data = rows_config(tmp_path, rows, on_bad_row="skip", prefetch_threads=threads)
    trainer = made_trainer(tmp_path / "run", TEXT, {"prepared": str(prepared)}, data=data, train={"steps": 2})
    trainer.train()
    names = [[group[0] for group in drawn] for drawn in drawn_in(trainer)]
    assert names == [["0"] * 3 + ["2"] * 3, ["3"] * 3 + ["4"] * 3]
    assert [row["data/rows_skipped"] for row in trainer.run.read_metrics()] == [1, 1]
    with pytest.raises(DataError, match=r"rows\.jsonl.*prompt"):
        made_trainer(tmp_path / "strict", TEXT, data=data | {"on_bad_row": "error"}).train()


def drawn_in(trainer):
    """(problem, variant, D) of each group of each step."""
    for step in trainer.run.rollout_steps():
        rows = [row for row in trainer.run.read_rollouts(step) if row["completion_index"] == 0]
        yield [(row["example_id"], row["variant"], row["difficulty"]) for row in rows]


@pytest.mark.parametrize("fits", [True, False])
def test_a_variant_of_too_many_tokens_gives_way_to_the_problem(tmp_path, fits):
    rows = [{"question": "7 + 8 - 3?", "answer": "12", "solution": "Add 7 and 8, of which we know a lot. " * 4}]
    data = rows_config(tmp_path, rows, on_bad_row="skip")
    prompt = {"max_tokens": 400 if fits else 50}
    trainer = made_trainer(tmp_path / "run", TEXT, data=data, prompt=prompt)
    trainer.collector.problems.found = {0: 9.0}
    examples = [group.prompt.example for group in groups_of(trainer)]
    assert sum(example.variant.startswith("hint") for example in examples) == (2 if fits else 0)
    assert {example.difficulty for example in examples if not example.variant} == {9.0}
    assert trainer.collector.rows_skipped == 0


# ---------------------------------------------------------------------- what is stored

FOUR_ROWS = [{"task": "synthetic", "split": "train", "size": 4}]
RESUMED = {
    "data": {"train": FOUR_ROWS, "evaluate": []},
    "train": {"steps": 4},
    "checkpoint": {"every": 1, "keep": 4},
    "reward": {"parts": {"accuracy": 0.9, "format": 0.1}},
}


class Killed(BaseException):
    pass


def records(trainer):
    return [trainer.run.read_rollouts(step) for step in trainer.run.rollout_steps()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    trainer = made_trainer(tmp_path_factory.mktemp("whole") / "run", **RESUMED)
    trainer.train()
    return trainer


def test_difficulty_follows_success_from_step_to_step(whole):
    expected = dict.fromkeys((example.id for example in whole.collector.task), 5.0)
    variants = set()
    for step in records(whole):
        sampled = {}
        for row in step:
            sampled.setdefault(row["example_id"], []).append(row["success"])
            variants.add(row["variant"])
            if not row["variant"]:
                assert row["difficulty"] == expected[row["example_id"]]
        for name, success in sampled.items():
            expected[name] = min(9, max(1, expected[name] + 4 * (0.5 - sum(success) / len(success))))
    found = whole.collector.data_state["difficulty"]
    assert {whole.collector.task[row].id: D for row, D in found.items()} == expected
    assert set(expected.values()) != {5.0}
    assert len(variants) > 4


def test_metrics_tell_problems_from_their_variants(whole):
    for metrics, rows in zip(whole.run.read_metrics(), records(whole), strict=True):
        made = [row for row in rows if row["variant"]]
        plain = [row for row in rows if not row["variant"]]
        assert metrics["variants/share"] == pytest.approx(len(made) / len(rows))
        assert metrics["variants/success"] == pytest.approx(sum(row["success"] for row in made) / len(made))
        assert metrics["variants/success_original"] == pytest.approx(sum(r["success"] for r in plain) / len(plain))
        mean = sum(row["difficulty"] for row in plain) / len(plain)
        assert metrics["variants/difficulty"] == pytest.approx(mean)
        assert all(math.isfinite(value) for value in metrics.values())


def test_how_hard_problems_were_is_said_of_originals_alone(whole):
    rows = [row for step in records(whole) for row in step if not row["variant"]]
    found = problem_success(whole.run.path)
    assert {name: sum(each.completions.values()) for name, each in found.items()} == {
        name: sum(row["example_id"] == name for row in rows) for name in found
    }
    assert sum(sum(each.correct.values()) for each in found.values()) == sum(row["success"] for row in rows)
    assert write_report(whole.run.path).is_file()


@pytest.mark.parametrize("from_cache", [True, False])
def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path, whole, from_cache):
    cut = made_trainer(tmp_path / "cut", **RESUMED)
    update = cut.updater.run

    def killed(*arguments):
        if cut.steps_done == 2:
            raise Killed
        return update(*arguments)

    cut.updater.run = killed
    with pytest.raises(Killed):
        cut.train()
    if not from_cache:
        cut.collector.cache_path.unlink()
    resumed = made_trainer(tmp_path / "cut", **RESUMED)
    assert resumed.collector.problems.found
    collect, collected = resumed.collector.collect, []
    resumed.collector.collect = lambda step, last: [collected.append(step), collect(step, last)][1]
    resumed.train()
    assert collected == ([3] if from_cache else [2, 3])
    assert records(resumed) == records(whole)
    assert resumed.collector.data_state == whole.collector.data_state
    assert RunFolder(tmp_path / "cut").read_metrics()[-1]["reward/mean"] == whole.run.read_metrics()[-1]["reward/mean"]


def test_without_variants_nothing_is_kept(tmp_path):
    trainer = made_trainer(tmp_path / "run", rollout={"variants": None}, train={"steps": 1})
    trainer.train()
    assert trainer.collector.data_state["difficulty"] == {}
    assert not any(name.startswith("variants/") for name in trainer.run.read_metrics()[0])
    assert {row["variant"] for row in trainer.run.read_rollouts(1)} == {""}
