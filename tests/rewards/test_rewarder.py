"""The Rewarder: whatever a reward function does, only its own completion is affected."""

import threading
from dataclasses import replace

import pytest
from helpers import child_processes
from PIL import Image

from mm_agrae.config import RewardSection
from mm_agrae.errors import ConfigError
from mm_agrae.rewards import Rewarder
from mm_agrae.types import Completion, Example

LIMIT_S = 0.3

OWN = """
import os, signal, sys, time
import helper_beside

def score(example, completion):
    what = completion.text.strip()
    if what == "stuck": 
        while True: pass
    if what == "stuck in C": return sum(range(10**14))
    if what == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        while True:
            try: time.sleep(0.01)
            except BaseException: pass
    if what == "hog": return len([0] * 10**10)
    if what == "hoards":
        everything = [bytes(10**6)]
        while True: everything.append(bytes(10**6) + everything[-1][:1])
    if what == "dies": os._exit(3)
    if what == "exits": sys.exit("enough")
    if what == "raises": raise ValueError("no such thing\\n" + "x" * 1000)
    if what == "raises oddly":
        class Odd(Exception):
            def __str__(self): raise RuntimeError
            def __reduce__(self): raise RuntimeError
        raise Odd
    if what == "interrupt": raise KeyboardInterrupt
    if what == "deep": return score(example, completion)
    values = {"nan": float("nan"), "inf": float("inf"), "None": None, "text": "1.0", "list": [1.0],
              "true": True, "int": 1, "half": 0.5, "prints": print("from a worker")}
    return values.get(what, 0.25)

def modules(example, completion):
    return float("torch" in sys.modules or "transformers" in sys.modules)

def sees(example, completion):
    seen = (len(completion.token_ids), completion.logprobs[:1], example.images, example.meta["k"],
            example.answer, example.grading.get("kind"), helper_beside.VALUE)
    return float(seen == (3, (-0.5,), (), "v", "5", "number", 7))

def grades(example, text, after_thinking):
    return None if text == "None" else 1.0

not_callable = 3
"""

FAILURES = {
    "stuck": "timed out after 0.3 s",
    "stuck in C": "timed out after 0.3 s",
    "deaf": "timed out after 0.3 s",
    "hog": "ran out of memory (limit 256 MB)",
    "hoards": "ran out of memory (limit 256 MB)",
    "dies": "ended its worker process with exit code 3",
    "exits": "raised SystemExit: enough",
    "raises": "raised ValueError: no such thing xxx",
    "raises oddly": "raised Odd: (no message: its __str__ raises)",
    "interrupt": "raised KeyboardInterrupt",
    "deep": "raised RecursionError: maximum recursion depth exceeded",
    "nan": "returned nan, not a finite number",
    "inf": "returned inf, not a finite number",
    "text": "returned str, not a number",
    "list": "returned list, not a number",
}


def example(answer="5", **settings):
    return Example(id="e1", question="?", answer=answer, **settings)


def completion(text, tokens=3, finish_reason="stop"):
    return Completion((1,) * tokens, (-0.5,) * tokens, text, finish_reason, 0)


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    (folder / "own_rewards.py").write_text(OWN)
    (folder / "helper_beside.py").write_text("VALUE = 7")
    return folder / "own_rewards.py"


@pytest.fixture(scope="module")
def rewarder(own):
    config = RewardSection(
        parts={"accuracy": 0.9, f"{own}:score": 0.1, "format": 0.0},
        time_limit_s=LIMIT_S,
        memory_limit_mb=256,
        workers=2,
    )
    with Rewarder(config, max_new_tokens=16) as rewarder:
        yield rewarder


def test_failures_cost_only_the_completion_that_caused_them(rewarder, own, caplog):
    before = rewarder.error_counts.copy()
    texts = [text for what in FAILURES for text in (r"\boxed{5}", what)]
    scores = rewarder.score([example()] * len(texts), [completion(text) for text in texts])
    for good, bad, (what, message) in zip(scores[::2], scores[1::2], FAILURES.items(), strict=True):
        assert good.error == ""
        assert good.success
        assert good.reward == pytest.approx(0.9 + 0.1 * 0.25)
        assert bad.error.startswith(f"{own}:score"), what
        assert message in bad.error, (what, bad.error)
        assert len(bad.error) < 2 * len(str(own)) + 280
        assert bad.parts == {"accuracy": 0.0, f"{own}:score": 0.0, "format": 0.0}
        assert not bad.success
        assert bad.reward == 0.0
    line = 1 + OWN[: OWN.index("raise ValueError")].count("\n")
    assert f"({own}:{line})" in scores[2 * list(FAILURES).index("raises") + 1].error
    counts = rewarder.error_counts - before
    assert counts.total() == len(FAILURES)
    assert counts[f"{own}:score: timed out after 0.3 s"] == 3
    assert counts[f"{own}:score raised ValueError"] == 1
    assert "reward of example e1" in caplog.text


def test_a_failed_part_leaves_the_others_and_the_success(rewarder, own):
    text = "nan"
    score = rewarder.score([example(answer="nan")], [completion(text)])[0]
    assert score.parts["accuracy"] == 1.0
    assert score.reward == pytest.approx(0.9)
    assert score.success
    assert score.error == f"{own}:score returned nan, not a finite number"


def test_a_part_that_does_not_apply_is_left_out(rewarder, own):
    scores = rewarder.score([example()] * 2, [completion("None"), completion("half")])
    assert scores[0].parts == {"accuracy": 0.0, "format": 0.0}
    assert list(scores[1].parts) == ["accuracy", f"{own}:score", "format"]
    assert [score.error for score in scores] == ["", ""]
    assert [score.reward for score in scores] == pytest.approx([0.0, 0.05])


def test_accuracy_always_applies(own):
    graded = [example(grading={"grader": f"{own}:grades"})] * 2
    with Rewarder(RewardSection(parts={"accuracy": 1.0}), 16) as rewarder:
        good, bad = rewarder.score(graded, [completion("5"), completion("None")])
    assert (good.success, bad.success, bad.parts) == (True, False, {"accuracy": 0.0})
    assert bad.error.startswith("accuracy raised TypeError")


def test_scores_come_in_order(rewarder):
    answers = [str(k) for k in range(200)]
    texts = [rf"<think>hm</think> \boxed{{{k if k % 3 else k + 1}}}" for k in range(200)]
    scores = rewarder.score([example(answer) for answer in answers], list(map(completion, texts)))
    assert [score.success for score in scores] == [k % 3 != 0 for k in range(200)]
    assert all(score.parts["format"] == 1.0 for score in scores)
    assert all(score.error == "" for score in scores)


@pytest.mark.parametrize(("text", "value"), [("true", 1.0), ("int", 1.0), ("half", 0.5)])
def test_numbers_of_any_type(rewarder, own, text, value):
    score = rewarder.score([example()], [completion(text)])[0]
    assert score.parts[f"{own}:score"] == value
    assert type(score.parts[f"{own}:score"]) is float


def test_from_another_thread(rewarder):
    found = []
    thread = threading.Thread(
        target=lambda: found.extend(rewarder.score([example()] * 2, [completion(r"\boxed{5}"), completion("stuck")]))
    )
    thread.start()
    thread.join()
    assert [score.success for score in found] == [True, False]


def test_nothing_to_score_and_uneven_lists(rewarder):
    assert rewarder.score([], []) == []
    with pytest.raises(ValueError, match="2 examples for 1 completions"):
        rewarder.score([example()] * 2, [completion("5")])


def test_what_own_functions_get(own, monkeypatch):
    config = RewardSection(parts={"accuracy": 0.0, f"{own}:sees": 1.0, "own_rewards:modules": 1.0}, time_limit_s=5.0)
    full = example(images=(Image.new("RGB", (4, 4)),), meta={"k": "v"}, grading={"kind": "number"})
    monkeypatch.chdir(own.parent)
    with Rewarder(config, 16) as rewarder:
        score = rewarder.score([full], [completion("5")])[0]
        unpicklable = replace(full, meta={"k": lambda: 0})
        good, bad = rewarder.score([full, unpicklable], [completion("5")] * 2)
    assert score.error == ""
    assert score.parts == {"accuracy": 1.0, f"{own}:sees": 1.0, "own_rewards:modules": 0.0}
    assert score.reward == 1.0
    assert good.error == ""
    assert not bad.success
    assert "could not be sent to a worker process" in bad.error


def test_accuracy_that_never_ends_is_named():
    endless = [rf"\sum_{{k=1}}^{{10^{{9}}}} \sqrt{{k + {a}}}" for a in (1, 2)]
    examples = [example(endless[0]), example("x^2 + 2x + 1")]
    completions = [completion(rf"\boxed{{{endless[1]}}}"), completion(r"\boxed{(x+1)^2}")]
    with Rewarder(RewardSection(time_limit_s=1.0), 16) as rewarder:
        scores = rewarder.score(examples, completions)
        assert rewarder.error_counts == {"accuracy: timed out after 1 s": 1}
    assert [score.success for score in scores] == [False, True]
    assert scores[0].error == "accuracy: timed out after 1 s"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("acuracy", "neither a built-in part (accuracy, format"),
        ("no_such_module_here:score", "there is no module 'no_such_module_here'"),
        ("json:no_such_function", "json has no function or class 'no_such_function'; it has "),
        ("{own}:not_callable", "no function or class 'not_callable'; it has score, modules, sees"),
        ("{folder}/absent.py:score", "there is no file "),
        ("{folder}/broken.py:score", "importing it raised SyntaxError"),
        ("{folder}/needy.py:score", "importing it raised ModuleNotFoundError: No module named 'gone'"),
        ("{folder}/leaves.py:score", "importing it raised SystemExit"),
        ("{folder}/dies.py:score", "importing it ends the process, or never finishes"),
    ],
)
def test_functions_that_cannot_be_imported(own, name, message):
    folder = own.parent
    (folder / "broken.py").write_text("def score(:")
    (folder / "needy.py").write_text("import gone")
    (folder / "leaves.py").write_text("raise SystemExit(1)")
    (folder / "dies.py").write_text("import os; os._exit(1)")
    name = name.format(own=own, folder=folder)
    before = child_processes()
    with pytest.raises(ConfigError) as caught:
        Rewarder(RewardSection(parts={"accuracy": 1.0, name: 1.0}), 16)
    assert str(caught.value).startswith(f"reward.parts.{name}: ")
    assert message in str(caught.value)
    assert child_processes() <= before
