"""Grading on the answers and solutions of published data sets."""

import json
import random
from functools import cache

import pytest
from helpers import REAL_DATA

from mm_agrae.config import RewardSection
from mm_agrae.grading.accuracy import verify
from mm_agrae.grading.notation import as_text, normalise
from mm_agrae.rewards import Rewarder
from mm_agrae.types import Completion, Example

real_data = pytest.mark.skipif(not REAL_DATA.is_dir(), reason="no data sets; set MM_AGRAE_DATA")


@cache
def rows():
    """(data set, row), read once."""
    return [
        (path.parent.name, json.loads(line))
        for path in sorted(REAL_DATA.glob("*/*.jsonl"))
        for line in path.open(encoding="utf-8")
    ]


def verdicts(questions):
    """Success for each (gold, answer, choices), by the reward pool: thousands at once."""
    examples = [
        Example(id=str(k), question="", answer=gold, grading={"choices": choices})
        for k, (gold, _, choices) in enumerate(questions)
    ]
    completions = [Completion((), (), rf"Hence $\boxed{{{answer}}}$.", "stop", 0) for _, answer, _ in questions]
    with Rewarder(RewardSection(), max_new_tokens=1) as rewarder:
        scores = rewarder.score(examples, completions)
    assert [score.error for score in scores if score.error] == []
    return [score.success for score in scores]


@real_data
def test_every_real_gold_answer_is_correct():
    questions = []
    for _, row in rows():
        answer, value = row["answer"], row.get("answer_value")
        choices = tuple(row.get("choices") or ())
        questions.append((answer, answer, choices))
        if value:
            questions += [(value, value, ()), (answer, value, choices), (value, answer, choices)]
    found = verdicts(questions)
    assert [q for q, correct in zip(questions, found, strict=True) if not correct] == []


@real_data
@pytest.mark.slow
def test_other_real_answers_are_incorrect():
    by_set: dict[str, set[str]] = {}
    for name, row in rows():
        by_set.setdefault(name, set()).add(row.get("answer_value") or row["answer"])
    draw = random.Random(0)
    questions = [(*draw.sample(sorted(answers), 2), ()) for answers in by_set.values() for _ in range(150)]
    for (gold, other, _), correct in zip(questions, verdicts(questions), strict=True):
        as_words = [as_text(normalise(text.rpartition("=")[2])) for text in (gold, other)]
        assert not correct or as_words[0] == as_words[1], (gold, other)


@real_data
def test_real_solutions_give_their_answer():
    solved = [(name, row) for name, row in rows() if row.get("solution")]
    assert len(solved) > 1000
    for name, row in solved:
        solution, answer = row["solution"], row["answer"]
        if name == "gsm8k":
            solution += f"\n#### {answer}"
        assert verify(answer, solution), row
        assert verify(answer, f"<think>{solution}</think> The answer is ${answer}$."), row
