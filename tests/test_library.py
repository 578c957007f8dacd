"""The package as a library, as a notebook uses it."""

import pytest
from helpers import TEXT, VL, run_config

import mm_agrae
from mm_agrae.errors import ConfigError, RunFolderError, UserError
from mm_agrae.tasks.synthetic.task import SyntheticTask


def test_advantages_of_plain_lists():
    rewards = [[1, 0, 0, 0], [1, 1, 1, 0]]
    hard, easy = mm_agrae.advantages(rewards, alpha=0.5).tolist()
    assert hard[0] == pytest.approx(-easy[3])
    assert mm_agrae.advantages([[0.5, 0.25]], [[1, 0]], rule="dr_grpo").tolist() == [[0.125, -0.125]]
    with pytest.raises(ValueError, match="a success must be 0 or 1"):
        mm_agrae.advantages([[0.5, 0.25]])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    steps, evaluations = [], []
    config = run_config(tmp_path_factory.mktemp("run") / "run", TEXT, train={"steps": 2})
    run = mm_agrae.train(
        config,
        quiet=True,
        on_step=lambda step, metrics: steps.append((step, metrics)),
        on_evaluation=evaluations.append,
    )
    return run, steps, evaluations


def test_callbacks_get_what_the_run_folder_gets(trained):
    run, steps, evaluations = trained
    metrics = run.metrics()
    assert [step for step, _ in steps] == [1, 2] == list(metrics.index)
    assert [values["reward/mean"] for _, values in steps] == list(metrics["reward/mean"])
    assert [result.name for result in evaluations] == ["before", "after"] == [r.name for r in run.evaluations]
    assert evaluations == run.evaluations
    assert run.summary["steps"] == 2
    assert run.config.model.path == TEXT


def test_rollouts_are_one_table(trained):
    run, _, _ = trained
    table = run.rollouts()
    rows = [row for step in (1, 2) for row in run.folder.read_rollouts(step)]
    assert table.num_rows == len(rows)
    assert table["parts/accuracy"].to_pylist() == [row["parts"]["accuracy"] for row in rows]
    assert table.to_pandas()["completion"].tolist() == [row["completion"] for row in rows]
    assert run.rollouts([2], ["step", "reward"]).to_pydict().keys() == {"step", "reward"}
    with pytest.raises(RunFolderError, match="no rollouts of step 3"):
        run.rollouts([3])


def test_a_checkpoint_answers(trained):
    run, _, _ = trained
    example = SyntheticTask("test", "text")[0]
    model = mm_agrae.load_model(run.path)
    assert model.path == str(run.checkpoint)
    first = model.ask(example.question, answer=example.answer, max_new_tokens=60)
    assert first == model.ask(example.question, answer=example.answer, max_new_tokens=60)
    assert first.success is (first.final == example.answer)
    assert len(model.sample(example.question, count=3, max_new_tokens=4)) == 3
    with pytest.raises(UserError, match="at most 20,000"):
        model.ask("?" * 20_001)
    with pytest.raises(UserError, match="nowhere"):
        mm_agrae.load_model("/nowhere").ask("?")


def test_a_checkpoint_sees_a_file(tmp_path):
    example = SyntheticTask("test", "image")[0]
    example.images[0].save(tmp_path / "drawing.png")
    model = mm_agrae.load_model(VL)
    seen = model.ask(example.question, tmp_path / "drawing.png", max_new_tokens=8)
    assert seen == model.ask(example.question, example.images[0], max_new_tokens=8)


def test_evaluate_returns_results(trained, tmp_path):
    run, _, _ = trained
    (own,) = mm_agrae.evaluate(run.path, out=tmp_path / "own", quiet=True)
    assert own.pass_at_k == run.evaluations[-1].pass_at_k
    assert mm_agrae.load_run(tmp_path / "own").evaluations == [own]
    with pytest.raises(ConfigError, match="pass a config"):
        mm_agrae.evaluate(TEXT, out=tmp_path / "none")
    with pytest.raises(RunFolderError, match="there is no run here"):
        mm_agrae.load_run(tmp_path / "none")


def test_an_error_in_a_callback_keeps_the_step(tmp_path):
    def fail(step, metrics):
        raise ZeroDivisionError

    config = run_config(tmp_path / "run", TEXT, train={"steps": 2}, evaluate={"before": False, "after": False})
    with pytest.raises(ZeroDivisionError):
        mm_agrae.train(config, quiet=True, on_step=fail)
    run = mm_agrae.load_run(tmp_path / "run")
    assert list(run.metrics().index) == [1]
    assert run.checkpoint.name == "step_000001"
