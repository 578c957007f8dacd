"""The built-in reward parts."""

import os
import subprocess
import sys

import pytest

from mm_agrae.config.schema import OverlongPenalty, RewardSection
from mm_agrae.rewards import Rewarder
from mm_agrae.rewards.parts import follows_format, overlong_penalty, rule
from mm_agrae.types import Completion, Example


def example(**settings):
    return Example(id="e1", question="?", answer="5", **settings)


def completion(text, tokens=3, finish_reason="stop"):
    return Completion((1,) * tokens, (-0.5,) * tokens, text, finish_reason, 0)


def test_accuracy_and_format():
    long = "word " * 50
    texts = [
        r"<think>a</think> \boxed{5}",
        r"<think>\boxed{5}</think> well",
        r"\boxed{5}",
        rf"{long} \boxed{{5",
        rf"{long} \boxed{{5}}",
    ]
    completions = [completion(text) for text in texts[:3]]
    completions += [completion(text, finish_reason="length") for text in texts[3:]]
    with Rewarder(RewardSection(parts={"accuracy": 0.9, "format": 0.1}), 16) as rewarder:
        scores = rewarder.score([example()] * 5, completions)
        assert [score.success for score in scores] == [True, False, True, False, True]
        assert [score.reward for score in scores] == pytest.approx([1.0, 0.0, 0.9, 0.0, 0.9])
        wrong_kind = rewarder.score([example(grading={"kind": "maths"})], completions[:1])[0]
        assert wrong_kind.error.startswith("accuracy raised ValueError: kind is 'maths'; valid:")
    with Rewarder(RewardSection(answer_after_thinking=False), 16) as rewarder:
        examples = [example(), example(grading={"after_thinking": True})]
        scores = rewarder.score(examples, [completions[1]] * 2)
        assert [score.success for score in scores] == [True, False]


WAYS = ["Given 70, 40. Exterior angle: 70+40=110.", "Given 70, 40. Sum: 180-70-40=70. Straight line: 180-70=110."]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (rf"<think>{WAYS[0]}</think> \boxed{{110}}", True),
        (rf"<think>{WAYS[1]}</think> no box", True),
        (r"<think>Given 30, 40. Exterior angle: 30+40=71.</think> \boxed{71}", True),  # the sum may be wrong
        (rf" {WAYS[0]}</think> \boxed{{110}}", True),  # the prompt has opened the reasoning
        (rf"<think>{WAYS[0]} So.</think> \boxed{{110}}", False),
        (rf"<think>{WAYS[0]} {WAYS[1]}</think> \boxed{{110}}", False),
        (r"<think>Given 70, 40. Straight line: 180-70=110.</think> \boxed{110}", False),
        (rf"<think></think> {WAYS[0]}", False),
        (rf"<think>{WAYS[0]}", False),
        ("", False),
    ],
)
def test_rule(text, named):
    assert rule(example(meta={"ways": WAYS}), completion(text)) == float(named)


def test_rule_needs_the_examples_ways_and_weighs_nothing():
    texts = [rf"<think>{way}</think> \boxed{{5}}" for way in (WAYS[0], "Guess.", WAYS[0])]
    examples = [example(meta={"ways": WAYS}), example(meta={"ways": WAYS[0]}), example()]
    with Rewarder(RewardSection(parts={"accuracy": 0.9, "rule": 0}), 16) as rewarder:
        scores = rewarder.score(examples, list(map(completion, texts)))
    accurate = {"accuracy": 1.0}
    assert [score.parts for score in scores] == [accurate | {"rule": 1.0}, accurate | {"rule": 0.0}, accurate]
    assert [(score.reward, score.success, score.error) for score in scores] == [(0.9, True, "")] * 3


BREVITY = """
from mm_agrae.rewards import PARTS

def brevity(example, completion):
    return 1.0 if len(completion.token_ids) < 200 else 0.0

PARTS["brevity"] = brevity
"""
SCORE_WITH_BREVITY = """
from mm_agrae.config import RewardSection
from mm_agrae.rewards import Rewarder
from mm_agrae.types import Completion, Example

completions = [Completion((1,) * n, (0.0,) * n, "5", "stop", 0) for n in (100, 500)]
with Rewarder(RewardSection(parts={"accuracy": 1.0, "brevity": 1.0}), 1000) as rewarder:
    scores = rewarder.score([Example("e", "?", "5")] * 2, completions)
print([score.parts for score in scores])
"""


def test_a_built_in_part_sees_the_token_ids(tmp_path):
    """The `brevity` of docs/rewards.md, added to PARTS in every process that starts."""
    (tmp_path / "sitecustomize.py").write_text(BREVITY)
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    result = subprocess.run(
        [sys.executable, "-c", SCORE_WITH_BREVITY],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
    )
    assert result.stdout.splitlines() == ["[{'accuracy': 1.0, 'brevity': 1.0}, {'accuracy': 1.0, 'brevity': 0.0}]"], (
        result.stderr
    )


@pytest.mark.parametrize(
    ("completion", "good"),
    [
        (r"<think>two and two</think> It is \boxed{4}.", True),
        (r"  <think>a \boxed{3}?</think>\boxed{\frac{1}{2}}", True),
        (r"<think></think> \boxed{4}", False),
        (r"<think> </think> \boxed{4}", False),
        (r"\boxed{4}", False),
        (r"Well <think>a</think> \boxed{4}", False),
        (r"<think>a</think> 4", False),
        (r"<think>a</think> \boxed{}", False),
        (r"<think>a</think> \boxed{4", False),
        (r"<think>a</think> \boxed{4} \boxed{5}", False),
        (r"<think>a <think>b</think> \boxed{4}", False),
        (r"<think>a</think> \boxed{4} </think>", False),
        (r"<think>a \boxed{4}", False),
        ("", False),
    ],
)
def test_format(completion, good):
    assert follows_format(completion) is good


def test_format_with_other_tags():
    completion = r"<reason>a</reason> \boxed{4}"
    assert follows_format(completion, open_tag="<reason>", close_tag="</reason>")
    assert not follows_format(completion)
    assert follows_format(r"opened by the prompt</think> \boxed{4}", open_tag="")
    assert not follows_format(r"</think> \boxed{4}", open_tag="")


def test_overlong_penalty():
    lengths = (1, 80, 81, 90, 99, 100, 120)
    expected = [0, 0, -0.05, -0.5, -0.95, -1, -1]
    assert [overlong_penalty(n, 100, 20, 1.0) for n in lengths] == pytest.approx(expected)
    smaller = [0.4 * value for value in expected]
    assert [overlong_penalty(n, 100, 20, 0.4) for n in lengths] == pytest.approx(smaller)
    assert all(overlong_penalty(n, 100, 20, 0.0) == 0 for n in lengths)
    assert [overlong_penalty(n, 100, 100) for n in (0, 50, 100)] == [0, -0.5, -1]


@pytest.mark.parametrize(("buffer", "penalty"), [(0, 1.0), (101, 1.0), (20, -1.0)])
def test_overlong_penalty_refuses_impossible_settings(buffer, penalty):
    with pytest.raises(ValueError, match=r"buffer_tokens|penalty"):
        overlong_penalty(50, 100, buffer, penalty)


def test_overlong_penalty_is_added():
    overlong = OverlongPenalty(buffer_tokens=4, penalty=0.5)
    config = RewardSection(parts={"accuracy": 2.0}, overlong=overlong)
    completions = [completion(r"\boxed{5}", tokens) for tokens in (3, 12, 14, 16)]
    with Rewarder(config, max_new_tokens=16) as rewarder:
        scores = rewarder.score([example()] * 4, completions)
    assert [score.parts["overlong"] for score in scores] == [0, 0, -0.25, -0.5]
    assert [score.reward for score in scores] == [2, 2, 1.75, 1.5]
