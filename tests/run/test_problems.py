"""How hard a run found its problems, and training that starts from it."""

import json
import shutil
from dataclasses import replace

import pytest
from helpers import TEXT, run_config
from run_folders import make_run
from test_resume import records, same_weights

from mm_agrae import cli
from mm_agrae.config import parse
from mm_agrae.errors import ConfigError, DataError, RunFolderError
from mm_agrae.progress import Reporter
from mm_agrae.run.problems import AT_START, difficulty_of, problem_success
from mm_agrae.tasks.order import DataOrder
from mm_agrae.trainer import Trainer
from mm_agrae.types import Group
from mm_agrae.view.report import write_report


def test_success_of_each_problem_by_step(tmp_path, capsys):
    solved = {(0, index): True for index in range(3)}
    run = make_run(tmp_path / "run", steps=[2, 5], meta={(3, 0): {"level": 2}})
    run.write_rollouts(9, [])
    run.write_rollouts(7, [r for r in rows_of(tmp_path, solved) if r.prompt_index == 0])
    problems = problem_success(run.path)
    assert problems["example 0"].completions == {2: 4, 5: 4, 7: 4}
    assert problems["example 0"].correct == {2: 0, 5: 0, 7: 3}
    assert problems["example 0"].rate == 0.25
    assert difficulty_of(run.path) == {"example 0": 7.0, "example 1": 7.0, "example 2": 5.0, "example 3": 3.0}
    assert problems["example 3"].meta == {"level": 2}
    assert cli.main(["difficulty", "--rollouts", str(run.path)]) == 0
    assert "4 problems, 0 never solved, 0 always\nSpearman of D and level: –" in capsys.readouterr().out
    table = run.path / "problems.jsonl"
    lines = [json.loads(line) for line in table.read_text().splitlines()]
    assert [line["difficulty"] for line in lines] == [7, 7, 5, 3]
    assert lines[0]["correct"] == {"2": 0, "5": 0, "7": 3}
    assert difficulty_of(table) == difficulty_of(run.path)
    page = write_report(run.path).read_text()
    assert "4 hardest of 4" in page
    assert "0/4 → 0/4 → 3/4" in page


def test_a_correction_does_not_make_a_problem_easier(tmp_path):
    run = make_run(tmp_path / "run")
    rows = [replace(row, success=True, success_before=False) for row in rows_of(tmp_path, {})]
    run.write_rollouts(1, rows)
    assert set(difficulty_of(run.path).values()) == {9.0}


def rows_of(tmp_path, solved):
    from run_folders import rollouts

    return rollouts(make_run(tmp_path / "other"), 7, success=solved)


def test_runs_and_tables_that_say_nothing(tmp_path):
    with pytest.raises(RunFolderError, match="there is no run here"):
        difficulty_of(tmp_path)
    with pytest.raises(RunFolderError, match="holds no rollouts; it needs"):
        difficulty_of(make_run(tmp_path / "run").path)
    table = tmp_path / "table.jsonl"
    good = '{"example_id": "a", "difficulty": 2}\n'
    for bad in (
        "{",
        "[]",
        "7",
        '{"example_id": "a"}',
        good.replace("2", "0"),
        good.replace("2", "NaN"),
        "[" * 100_000,
    ):
        table.write_text(good + bad)
        with pytest.raises(DataError, match=r"table.jsonl, line 2: not a line such as"):
            difficulty_of(table)
    table.write_text(good)
    assert difficulty_of(table) == {"a": 2.0}


def test_easy_to_hard_visits_every_row_once_an_epoch():
    difficulty = [5.0, 1, 9, 5, 1, 5]
    order = DataOrder(6, seed=3, shuffle=True, difficulty=difficulty)
    epochs = [[order.next() for _ in range(6)] for _ in range(4)]
    assert all(sorted(epoch) == list(range(6)) for epoch in epochs)
    assert all([difficulty[row] for row in epoch] == [1, 1, 5, 5, 5, 9] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1  # the shuffle decides among equal ones
    plain = DataOrder(6, 0, shuffle=False, difficulty=difficulty)
    assert plain.peek(6) == [1, 4, 0, 3, 5, 2]


def settings(source):
    task = {"task": "synthetic", "modality": "text", "split": "train", "size": 12}
    data = {"train": [task], "evaluate": [], "difficulty_from": str(source), "easy_to_hard": True}
    return {"data": data, "checkpoint": {"every": 1, "keep": 4}, "evaluate": {"before": False, "after": False}}


def run(path, steps, source, **more):
    config = run_config(path, TEXT, train={"steps": steps}, **settings(source)).model_copy(update=more)
    trainer = Trainer(config, Reporter(False))
    trainer.train()
    return trainer


def test_training_from_a_run_and_resuming_without_it(tmp_path):
    first = settings("")
    del first["data"]["easy_to_hard"]
    Trainer(run_config(tmp_path / "first", TEXT, **first), Reporter(False)).train()
    rated = difficulty_of(tmp_path / "first")
    assert len(rated) == 8
    whole = run(tmp_path / "whole", 3, tmp_path / "first")
    examples = [whole.task[index] for index in range(12)]
    assert {e.id: e.difficulty for e in examples} == {e.id: rated.get(e.id, 5.0) for e in examples}
    hardest = max(examples, key=lambda example: abs(example.difficulty - 5))
    summary = Group(0, whole.processing.prompt(hardest), [], []).summary()
    assert summary.difficulty == hardest.difficulty != 5
    drawn = [row["example_id"] for step in (1, 2, 3) for row in whole.run.read_rollouts(step)]
    order = [rated.get(name, 5.0) for name in dict.fromkeys(drawn)]
    assert order == sorted(order)
    assert len(order) == 12
    run(tmp_path / "cut", 1, tmp_path / "first")
    shutil.rmtree(tmp_path / "first")  # neither it nor what it would say now is needed
    resumed = run(tmp_path / "cut", 3, tmp_path / "first")
    assert same_weights(whole, resumed)
    assert records(tmp_path / "whole") == records(tmp_path / "cut")
    # Nor for a run that goes on from a checkpoint of another one.
    start = tmp_path / "whole" / "checkpoints" / "step_000002"
    branch = run(tmp_path / "branch", 3, tmp_path / "first", resume=str(start))
    assert same_weights(whole, branch)
    assert difficulty_of(tmp_path / "branch" / AT_START) == rated


def test_a_run_on_other_problems_is_refused(tmp_path):
    other = make_run(tmp_path / "other", steps=[1])
    config = run_config(tmp_path / "run", TEXT, **settings(other.path))
    with pytest.raises(DataError, match="has no id of a training row; name a run on the same data"):
        Trainer(config, Reporter(False))


def test_an_order_needs_a_run():
    values = run_config("run", TEXT).model_dump()
    values["data"] |= {"easy_to_hard": True}
    with pytest.raises(ConfigError, match=r"data.easy_to_hard needs data.difficulty_from"):
        parse(values)
