"""What every section of a config is made of, and the settings of guided correction (`rollout/correction.py`)."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

PositiveInt = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(gt=0, le=1)]
NonNegative = Annotated[float, Field(ge=0)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class CorrectSection(Section):
    """What becomes of an incorrect completion before advantages are computed, by the probability of each branch.

    In the texts {answer} is the gold answer, {boxed} that in a box, {solution} the row's own solution.
    """

    reflect: NonNegative = 0.5
    """The cue is appended, and the policy goes on writing."""
    answer: NonNegative = 0.25
    """The gold answer is appended."""
    solution: NonNegative = 0.25
    """The row's own solution takes the completion's place; without one the answer is appended."""
    reflect_tokens: PositiveInt = 256
    """The most that the policy writes after the cue, within rollout.max_new_tokens for the whole."""
    train_on: Literal["all", "added"] = "all"
    """added: of a corrected completion only what the policy wrote after the cue is learnt, so nothing of an answer or
    a solution. Their rewards count all the same."""
    reflect_cue: str = "\n\nWait, something is wrong here. Let me check it again.\n\n"
    answer_cue: str = "\n\nThe correct answer is {boxed}."
    """Also ends a solution whose answer is not in a box. An open thinking section is closed before it."""
    solution_text: str = "{solution}"

    @model_validator(mode="after")
    def _check(self) -> CorrectSection:
        total = self.reflect + self.answer + self.solution
        if not 0 < total <= 1 + 1e-9:
            raise ValueError(
                f"rollout.correct: reflect, answer and solution add up to {total:g}; as probabilities they need more "
                "than 0 and at most 1. rollout.correct=null turns correction off"
            )
        for name, needed in {
            "reflect_cue": r"\S",
            "answer_cue": "{answer}|{boxed}",
            "solution_text": "{solution}",
        }.items():
            if not re.search(needed, getattr(self, name)):
                what = "words" if needed == r"\S" else needed.replace("|", " or ")
                raise ValueError(f"rollout.correct.{name} lacks {what}")
        return self
