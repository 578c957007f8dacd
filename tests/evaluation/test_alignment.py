"""`mm-agrae difficulty` with the embedded models: what is asked, what is read, and what is written."""

import json

import pytest
from helpers import TEXT, run_config

from mm_agrae import cli
from mm_agrae import config as configs
from mm_agrae.errors import ConfigError
from mm_agrae.evaluation.alignment import label_value, rating_in
from mm_agrae.evaluation.difficulty import tables
from mm_agrae.run.folder import RunFolder
from mm_agrae.view.report import write_report


@pytest.mark.parametrize(
    ("reply", "rating"),
    [
        (r"Hard to say: \boxed{10}. No, \boxed{72.5}", 72.5),
        (r"<think>\boxed{3}</think> \boxed{\text{40}}", 40),
        (r"\boxed{$1$.}", 1),
        (r"\boxed{100}", 100),
        (r"\boxed{0.5}", None),
        (r"\boxed{101}", None),
        (r"\boxed{-5}", None),
        (r"\boxed{50\%}", None),
        (r"\boxed{5e1}", None),
        (r"\boxed{nan} or inf", None),
        (r"\boxed{9**9**9}", None),
        (r"\boxed{__import__('os').abort()}", None),
        (r"\boxed{٤٠}", None),
        (r"\boxed{" + "9" * 5000 + "}", None),
        (r"\boxed{20} \boxed{", None),
        (r"\boxed{hard}", None),
        ("It is 30.", None),
        ("", None),
    ],
)
def test_a_rating_is_the_last_box_if_it_is_on_the_scale(reply, rating):
    assert rating_in(reply, words=False) == rating


@pytest.mark.parametrize(
    ("reply", "rating"),
    [(r"easy? \boxed{\textbf{Hard}}", 3), (r"\boxed{medium}", 2), (r"\boxed{easy or hard}", None), ("easy", None)],
)
def test_a_rating_in_words(reply, rating):
    assert rating_in(reply, words=True) == rating


def test_labels_are_numbers_or_three_words():
    assert [label_value(value) for value in (3, "4.5", " Medium ", None, "", float("nan"))] == [
        3,
        4.5,
        2,
        None,
        None,
        None,
    ]
    for value in ("tricky", True, "inf", [1]):
        with pytest.raises(ConfigError, match="name another with --label"):
            label_value(value)


def difficulty(*arguments, expect=0):
    assert cli.main(["difficulty", *map(str, arguments)]) == expect


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("config")
    source = {"task": "synthetic", "modality": "text", "split": "test", "name": "test", "limit": 6}
    made = run_config(folder / "run", TEXT, data={"evaluate": [source]}, prompt={"system": "s.", "instruction": "i."})
    (folder / "config.yaml").write_text(configs.dump(made))
    return folder / "config.yaml"


def test_two_examinees_as_actors_and_observers(config, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    copy = tmp_path / "copy"
    copy.symlink_to(TEXT)
    out = tmp_path / "out"
    difficulty(TEXT, copy, "--config", config, "--out", out, "--proficiency", "none,low")
    printed = capsys.readouterr().out
    assert "6 items with a level" in printed
    assert max(len(line) for line in printed.splitlines() if line[:1] in "┏┃┡│└") <= 80
    folder = RunFolder(out)
    names = ["copy", "copy (low)", "text", "text (low)"]
    assert sorted(result.name for result in folder.read_evaluations()) == names
    replies = [json.loads(line) for line in (out / "observers.jsonl").read_text().splitlines()]
    assert len(replies) == 24
    assert all(f"The correct answer is {each['answer']}. Do not answer" in each["question"] for each in replies)
    result = folder.read_difficulty()["test"]
    by_name = {each["name"]: each for each in result["examinees"]}
    assert by_name.keys() == {*names, "copy (mean)", "text (mean)"}
    for name in names:  # the same weights: equal in all but the name
        assert by_name[name] | {"name": ""} == by_name[name.replace("copy", "text")] | {"name": ""}
        own = [each for each in replies if each["model"] == name]
        assert by_name[name]["read"] == pytest.approx(sum("rating" in each["parts"] for each in own) / 6)
        evaluation = next(each for each in folder.read_evaluations() if each.name == name)
        assert by_name[name]["accuracy"]["value"] == pytest.approx(evaluation.pass_at_k[1].mean)
    assert result["table"]["solved"] == [float(each) for each in result["table"]["solved"]]
    assert {*result["table"]["label"]} <= {1, 2, 3, 4}
    assert sum(count for _, count, *_ in result["levels"]) == 6
    page = write_report(out).read_text()
    assert "Ratings (spoken) against level" in page
    (out / "difficulty.json").write_text('{"test": {"label": 1}}')
    assert cli.main(["report", str(out)]) == 2
    assert "difficulty.json: damaged" in capsys.readouterr().err


def test_uncertainty_stands_in_for_ratings(config, tmp_path):
    out = tmp_path / "out"
    difficulty(TEXT, "--config", config, "--out", out, "--proficiency", "none", "--rating", "uncertainty")
    result = RunFolder(out).read_difficulty()["test"]
    assert result["rating"] == "uncertainty"
    assert all(0 <= rating <= 1 for rating in result["table"]["rating"])
    assert result["examinees"][0]["read"] == 1
    assert not (out / "observers.jsonl").exists()
    assert "Ratings (uncertainty) against level" in [title for title, *_ in tables(result)]


def test_a_label_in_words_from_a_column(config, tmp_path):
    rows = [
        {"question": f"{n}+1?", "answer": n + 1, "how": how} for n, how in enumerate(["easy", "Hard", None, "medium"])
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = f"data.evaluate=[{{task: files, name: own, path: {tmp_path}/rows.jsonl}}]"
    difficulty(TEXT, source, "--config", config, "--out", tmp_path / "out", "--label", "how", "--proficiency", "none")
    result = RunFolder(tmp_path / "out").read_difficulty()["own"]
    assert result["table"]["label"] == [1, 3, 2]  # the row without one is not asked
    replies = [json.loads(line) for line in (tmp_path / "out" / "observers.jsonl").read_text().splitlines()]
    assert all("final rating, easy, medium, hard, into" in each["question"] for each in replies)
    assert len(replies) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([TEXT, "--label", "levle"], "no row has a 'levle'; did you mean 'level'?"),
        ([TEXT, "--label", "family"], "neither a number nor one of easy, medium, hard; name another with --label"),
        ([TEXT, "--proficiency", "none,weak"], "--proficiency: no 'weak'"),
        ([TEXT, "data.evaluate=[]"], "data.evaluate is empty"),
        (["evaluate.seed=1"], "name at least one model or checkpoint"),
        (["--rollouts", "nowhere"], "there is no run here"),
    ],
)
def test_mistakes_say_what_to_do(arguments, message, config, tmp_path, capsys):
    difficulty(*arguments, "--config", config, "--out", tmp_path / "out", expect=2)
    assert message in capsys.readouterr().err
