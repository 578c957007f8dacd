"""reasoning-gym as a task, and graders that an example brings along."""

import logging
from pathlib import Path

import pytest

from mm_agrae import tasks
from mm_agrae.config import DataSource, RewardSection
from mm_agrae.errors import ConfigError
from mm_agrae.rewards import Rewarder
from mm_agrae.tasks.files import FileTask
from mm_agrae.types import Completion, Example

reasoning_gym = pytest.importorskip("reasoning_gym")

from reasoning_gym.factory import DATASETS  # noqa: E402

from mm_agrae.tasks import gym  # noqa: E402

USED = sorted(DATASETS.keys() - gym.LEFT_OUT.keys())


def load(**options):
    return tasks.load_all([DataSource(task="gym", **options)])


def says(text):
    return Completion((1,), (0.0,), text, "stop", 0)


def test_questions_in_turn():
    task = load(names=["countdown", "leg_counting"], size=3, seed=5)
    assert len(task) == 6
    assert [e.meta["data_set"] for e in task] == ["countdown", "leg_counting"] * 3
    assert [e.id for e in task][:3] == ["countdown-5-0", "leg_counting-5-0", "countdown-5-1"]
    assert len({e.question for e in task}) == 6
    assert task[2].question == task[2].question
    with pytest.raises(IndexError):
        task[6]
    assert len(load(names="countdown", size=3, limit=2)) == 2


def test_other_seeds_give_other_questions():
    questions = [{e.question for e in load(names="chain_sum", size=50, seed=seed)} for seed in (0, 1, 2)]
    assert all(len(found) > 45 for found in questions)
    assert len(questions[0] | questions[1] | questions[2]) == sum(map(len, questions))
    again = {e.question for e in load(names="chain_sum", size=50, seed=1)}
    assert again == questions[1]


def test_settings_reach_the_data_set():
    short = load(names="chain_sum", size=5, settings={"chain_sum": {"min_terms": 2, "max_terms": 2}})
    long = load(names="chain_sum", size=5, settings={"chain_sum": {"min_terms": 9, "max_terms": 9}})
    assert max(e.question.count("+") + e.question.count(" - ") for e in short) == 1
    assert max(e.question.count("+") + e.question.count(" - ") for e in long) == 8


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"names": "countdwon"}, "no data set 'countdwon'; did you mean 'countdown'"),
        ({"names": ["countdown", "codeio"]}, "codeio is left out: it runs code"),
        ({"names": "composite"}, "composite is left out: name several"),
        ({"names": []}, "must not be empty"),
        ({"names": "countdown", "size": 0}, "must not be empty"),
        ({"names": "countdown", "settings": {"maze": {}}}, "settings: no data set 'maze'"),
        ({"names": "countdown", "settings": {"countdown": {"min_number": 3}}},
         "settings.countdown: no setting 'min_number'; did you mean 'min_numbers'"),
        ({"names": "countdown", "settings": {"countdown": {"seed": 3}}}, "no setting 'seed'"),
        ({"names": "countdown", "settings": {"countdown": {"min_numbers": 9, "max_numbers": 3}}},
         "settings.countdown: AssertionError"),
        ({"names": "countdown", "settings": {"countdown": {"min_numbers": "x"}}},
         "settings.countdown: TypeError"),
        ({"names": 3}, "names: "),
        ({}, "needs the option 'names'"),
    ],
)  # fmt: skip
def test_wrong_options(options, words):
    with pytest.raises(ConfigError) as caught:
        tasks.check(DataSource(task="gym", **options))
    assert words in str(caught.value)


@pytest.mark.parametrize("name", USED)
def test_gold_answers_of_every_data_set_are_correct(name):
    for example in load(names=name, size=1, seed=3):
        assert example.question.strip()
        settings = {key: value for key, value in example.grading.items() if key != "grader"}
        if settings["entry"]["answer"] is None:
            continue  # several are correct, none is given
        boxed = gym.score(example, f"<think>no</think> \\boxed{{{example.answer}}}", **settings)
        tagged = gym.score(example, f"<answer>{example.answer}</answer>", **settings)
        assert max(boxed, tagged) == 1.0  # braces in an answer do not survive a box
        assert gym.score(example, "<think>" + example.answer, **settings) < 1.0
        assert gym.score(example, "", **settings) < 1.0


PAYLOADS = [
    "__import__('pathlib').Path('{}').touch()",
    "[__import__('pathlib').Path('{}').touch()]",
    "1 + __import__('pathlib').Path('{}').touch()",
    "[open('{}', 'w') for x in 'a']",
]


def payloads(path):
    return [payload.format(path) for payload in PAYLOADS]


@pytest.mark.parametrize("name", sorted(gym.EVALUATED_AS_PYTHON | gym.EVALUATED_BY_SYMPY))
def test_some_of_its_functions_would_run_an_answer(name, tmp_path):
    """Without the pattern: the reason for it, and the proof that the next test could fail."""
    data = reasoning_gym.create_dataset(name, size=1, seed=1)
    for payload in payloads(tmp_path / "made"):
        try:
            data.score_answer(payload, data[0])
        except Exception:
            continue
    assert (tmp_path / "made").exists()


@pytest.mark.parametrize("name", USED)
def test_no_answer_is_run(name, tmp_path):
    (example,) = load(names=name, size=1, seed=1)
    settings = {key: value for key, value in example.grading.items() if key != "grader"}
    for payload in payloads(tmp_path / "made"):
        try:
            gym.score(example, f"<answer>{payload}</answer>", **settings)
        except (ValueError, TypeError, AttributeError, LookupError) as error:
            # Reaches the rewarder, which counts the completion as unsolved.
            logging.info("%s: %s", name, error)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("name", "answer", "harmless"),
    [
        ("countdown", "(8 + 2) * 3 - 7 / .5 + 1.25", True),
        ("simple_integration", "3*x**2/2 + sin(x)*exp(-x) + C", True),
        ("polynomial_multiplication", "2*x*y**2 - 7*z", True),
        ("countdown", "preview(1)", False),
        ("countdown", "x.y", False),
        ("countdown", "(1).real", False),
        ("countdown", "S('1')", False),
        ("countdown", "1e99999999", False),
        ("countdown", "sinx", False),
        ("countdown", "1" * 3000 + "!", False),
        ("countdown", "1" * 5000, False),
        ("countdown", "__x__", False),
        ("countdown", "Σ", False),
        ("spiral_matrix", "[1, -2, 3]", True),
        ("binary_matrix", "[[0, 1], [1, 0]]", True),
        ("n_queens", "[['_', 'Q'], ['Q', '_']]", True),
        ("string_insertion", '["A", "B"]', True),
        ("spiral_matrix", "exit()", False),
        ("spiral_matrix", "[9**9]", False),
        ("spiral_matrix", "f'{x}'", False),
        ("spiral_matrix", "a.b", False),
        ("spiral_matrix", "'\\x41'", False),
        ("maze", "anything (at) all, it is compared as text.", True),
    ],
)
def test_what_may_be_evaluated(name, answer, harmless):
    assert gym._harmless(name, answer) is harmless


# In the worker processes


@pytest.fixture(scope="module")
def rewarder():
    config = RewardSection(parts={"accuracy": 1.0}, workers=1)
    with Rewarder(config, 64) as rewarder:
        yield rewarder


def test_scores_come_from_the_workers(rewarder):
    examples = list(load(names=["chain_sum", "countdown"], size=2))
    plain = Example("a", "1 + 1?", "2")
    answers = [f"\\boxed{{{example.answer}}}" for example in examples]
    scores = rewarder.score(
        [*examples, *examples, plain],
        [says(text) for text in [*answers, *["\\boxed{-7}"] * len(examples), "\\boxed{2}"]],
    )
    assert [score.success for score in scores] == [True] * 4 + [False] * 4 + [True]
    assert [score.reward for score in scores[:4]] == [1.0] * 4
    assert all(0 <= score.reward < 1 for score in scores[4:8])
    assert not any(score.error for score in scores)


def test_an_endless_formula_costs_its_completion_alone(rewarder):
    (example,) = load(names="countdown", size=1)
    hostile = ["9**9**9**9", "(" * 3000]
    texts = [f"<answer>{text}</answer>" for text in hostile]
    texts.append(f"<answer>{example.answer}</answer>")
    scores = rewarder.score([example] * 3, [says(text) for text in texts])
    assert [score.success for score in scores] == [False, False, True]
    assert scores[0].error.startswith("accuracy: ")


def test_own_graders(rewarder, tmp_path, monkeypatch):
    file = tmp_path / "own_grader.py"
    file.write_text(
        "def length(example, text, *, after_thinking, wanted, scale=1):\n"
        "    return scale * float(len(text) == wanted)\n"
        "def fails(example, text, **settings):\n"
        "    raise ValueError('never')\n"
    )
    monkeypatch.chdir(tmp_path)

    def graded(function, **settings):
        return Example("a", "?", "1", grading={"grader": f"own_grader.py:{function}", **settings})

    examples = [graded("length", wanted=3), graded("length", wanted=4), graded("fails")]
    scores = rewarder.score(examples, [says("abc")] * 3)
    assert [score.success for score in scores] == [True, False, False]
    assert scores[2].error == f"accuracy raised ValueError: never ({tmp_path / 'own_grader.py'}:4)"


@pytest.mark.parametrize("name", ["no_such_module:f", "json:no_such_function", "gone.py:f"])
def test_a_grader_that_cannot_be_imported(name):
    with (
        Rewarder(RewardSection(parts={"accuracy": 1.0}, workers=1), 64) as rewarder,
        pytest.raises(ConfigError, match=f"grader {name}: "),
    ):
        rewarder.score([Example("a", "?", "1", grading={"grader": name})], [says("1")])


def test_a_row_of_data_names_no_grader(tmp_path):
    file = tmp_path / "x.jsonl"
    file.write_text('{"problem": "?", "answer": "1", "grader": "os:abort", '
                    '"grading": {"grader": "os:abort"}}')  # fmt: skip
    assert FileTask(str(file))[0].grading == {}
    own = FileTask(str(file), grading={"grader": "own:f", "any": 1})[0]
    assert own.grading == {"grader": "own:f", "any": 1}
    with pytest.raises(ConfigError, match="grading: grader: 'own' is not"):
        FileTask(str(file), grading={"grader": "own"})


def test_a_run_on_images_and_generated_text(tmp_path):
    from helpers import run_config

    from mm_agrae.progress import Reporter
    from mm_agrae.run.folder import RunFolder
    from mm_agrae.trainer import Trainer

    generated = {"task": "gym", "names": ["chain_sum", "gcd"], "size": 4}
    images = {"task": "synthetic", "modality": "image", "split": "train", "limit": 4}
    config = run_config(
        tmp_path,
        data={"train": [generated, images], "evaluate": [generated | {"seed": 1, "limit": 2}]},
        rollout={"prompts_per_step": 12, "completions_per_prompt": 2, "max_new_tokens": 8},
        train={"steps": 1},
    )
    Trainer(config, Reporter(enabled=False)).train()
    records = RunFolder(tmp_path).read_rollouts(1)
    assert len(records) == 24
    assert sum(bool(record["images"]) for record in records) == 8
    assert not any(record["error"] for record in records)
    assert {result.name for result in RunFolder(tmp_path).read_evaluations()} == {"before", "after"}


def test_the_list_of_what_evaluates_is_whole():
    """A data set that starts to evaluate answers would show in its module's source."""
    import inspect
    import re

    harmless = {
        # These evaluate what they have made themselves, or have a parser of that name.
        "basic_arithmetic", "bitwise_arithmetic", "gsm_symbolic", "number_sorting",
        "propositional_logic",
    }  # fmt: skip
    found = set()
    for name in USED:
        folder = Path(inspect.getfile(DATASETS[name][0]))
        source = folder.read_text(encoding="utf-8")
        if re.search(r"\beval\(|\bexec\(|\bparse_expr\(|\bsympify\(|parse_latex|pickle", source):
            found.add(name)
    assert found - harmless == gym.EVALUATED_AS_PYTHON | gym.EVALUATED_BY_SYMPY
