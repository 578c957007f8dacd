"""Variants of a problem, easier and harder, with the same answer (DIVA-GRPO, arXiv 2603.01106, section 3).

With `rollout.variants` each problem of a step comes with `count` variants. Which ones follows from its difficulty D,
from 1 (easy) to 9: those of easy problems are harder, those of hard ones easier. D rises where fewer than half of the
completions of a problem and its variants are correct, and falls where more are.

A variant is a function of the row, D and the place in the data order alone, so that nothing needs to be stored, and a
resumed run and one of several processes make the same. Hints are the first steps of a worked solution, without the
answer; wordings come from a file; `picture_operators.py` changes pictures; a task may have variants of its own.
"""

import json
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

from mm_agrae.config.rollout import VariantsSection
from mm_agrae.errors import ConfigError, DataError, nearest
from mm_agrae.grading.extraction import final_answer
from mm_agrae.tasks.picture_operators import PICTURE_OPERATORS, Operator, question_of
from mm_agrae.tasks.registry import Concatenation
from mm_agrae.types import Example

EASIEST, HARDEST = 1.0, 9.0
_TARGET = dict(enumerate((9, 8, 7, 6, 6, 5, 5, 5, 4), 1))
"""D of a problem -> that of its one variant (the authors' released code)."""
_TARGET_MEAN = dict(enumerate((8, 7.5, 7, 6.5, 6, 5.5, 4.5, 3.5, 3), 1))
"""D -> the mean, with a standard deviation of 1, of those of several variants."""
_HINT = "\n\nHere are some thoughts that may help. Write the complete solution from the start.\n"
_STEPS_OF_HINT = {"hint_1": 1, "hint_2": 2, "hint_3": 3, "hint_all": 4}


class Draw(NamedTuple):
    """One group of a step: a variant (0: as it is) of a row, drawn as problem `number` of the run, whose D is this."""

    row: int
    number: int
    variant: int
    difficulty: float


@dataclass(frozen=True)
class Prepared:
    """What `mm-agrae variants --prepare` found for a problem: other wordings, and the steps of a solution."""

    wordings: tuple[str, ...] = ()
    steps: tuple[str, ...] = ()


def next_difficulty(difficulty: float, success: float, *, eta: float = 4.0) -> float:
    """D ← clip(D + η(½ − α), 1, 9), α the share of correct completions of a problem with all its variants."""
    return min(HARDEST, max(EASIEST, difficulty + eta * (0.5 - success)))


class Problems:
    """The training problems, each with its variants, and their difficulty D as the run finds it.

    Raises ConfigError for an unknown operator, DataError for a file of wordings and steps that does not fit.
    """

    def __init__(self, task: Concatenation, settings: VariantsSection | None, seed: int):
        self.task, self.settings, self.seed = task, settings or VariantsSection(count=0), seed
        self.size = 1 + self.settings.count
        """Groups of a problem in a step."""
        self.found: dict[int, float] = {}
        """Row -> D, of those that a step has changed. With the data cursor, this is all the state there is."""
        wanted = self.settings.operators
        own = sorted(set(task.variant_names))
        names = [*(each.name for each in PICTURE_OPERATORS), *_STEPS_OF_HINT, "reword", *own]
        for name in wanted:
            if name not in names:
                raise ConfigError(f"rollout.variants.operators: no operator {name!r}; {nearest(name, names)}")
        self.allowed = set(wanted or names)
        self.prepared = read_prepared(self.settings.prepared, task) if self.settings.prepared else {}

    def draws(self, row: int, number: int) -> list[Draw]:
        """The groups of a problem."""
        difficulty = self.found.get(row, self.task.difficulty_of(row))
        return [Draw(row, number, variant, difficulty) for variant in range(self.size)]

    def example(self, draw: Draw) -> Example:
        """Raises DataError for a row, or a picture to be changed, that cannot be used."""
        example = self.task[draw.row]
        if self.size == 1:
            return example
        example = replace(example, difficulty=draw.difficulty)
        operator = self.choose(draw.row, example, draw.number)[draw.variant - 1] if draw.variant else None
        return self.made(example, operator, draw) if operator else example

    def made(self, example: Example, operator: Operator, draw: Draw) -> Example:
        """The variant that an operator makes of a problem for which it fits."""
        made = operator.make(example, self._rng(draw.row, draw.number, draw.variant))
        difficulty = min(HARDEST, max(EASIEST, draw.difficulty + operator.delta))
        return replace(made, id=example.id, meta=example.meta, variant=operator.name, difficulty=difficulty)

    def choose(self, row: int, example: Example, number: int) -> list[Operator | None]:
        """The operators of a problem's variants, all different, at most one a hint; None: the problem as it is."""
        rng = self._rng(row, number, "choice")
        level = int(example.difficulty + 0.5)
        fitting = [each for each in self.operators(row, example) if each.fits(example)]
        chosen: list[Operator | None] = []
        for _ in range(self.settings.count):
            target = _TARGET[level]
            if self.settings.count > 1:
                target = min(9, max(1, round(rng.gauss(_TARGET_MEAN[level], 1))))
            wanted = target - level
            if wanted < 0 and any(each and each.name in _STEPS_OF_HINT for each in chosen):
                wanted = rng.randrange(4)  # for which no further hint is near enough
            # As near as the problem as it is; of these, one step off is as good, and the shuffle decides.
            near = [each for each in fitting if each not in chosen and abs(each.delta - wanted) <= abs(wanted)]
            rng.shuffle(near)
            chosen.append(min(near, key=lambda each: abs(each.delta - wanted) // 2, default=None))
        return chosen

    def operators(self, row: int, example: Example) -> list[Operator]:
        """All that `rollout.variants.operators` allows, whether or not they fit the problem."""
        prepared = self.prepared.get(example.id, Prepared())
        steps = hint_steps(example, prepared.steps, self._rng(row, "steps"))
        every = [
            Operator("reword", 0, lambda _: bool(prepared.wordings), partial(_reword, prepared.wordings)),
            *(
                Operator(name, -2 * count, partial(_has_steps, steps, count), partial(_hint, steps, count))
                for name, count in _STEPS_OF_HINT.items()
            ),
            *self.task.variants(row),
            *PICTURE_OPERATORS,
        ]
        return [each for each in every if each.name in self.allowed]

    def update(self, success: Iterable[tuple[int, int, int]]) -> None:
        """D of each problem of a step, from (row, correct, completions) of all its groups, over all ranks."""
        if self.size == 1:
            return
        correct, completions = Counter[int](), Counter[int]()
        for row, own_correct, own_completions in success:
            correct[row] += own_correct
            completions[row] += own_completions
        for row, count in completions.items():
            before = self.found.get(row, self.task.difficulty_of(row))
            self.found[row] = next_difficulty(before, correct[row] / count, eta=self.settings.eta)

    def siblings(self, position: int) -> range:
        """The positions in the step of a problem's groups."""
        first = position - position % self.size
        return range(first, first + self.size)

    def _rng(self, *key: object) -> random.Random:
        return random.Random("/".join(map(str, (self.seed, *key))))


# ---------------------------------------------------------------------- hints and wordings


def worked_solutions(example: Example) -> list[str]:
    """Of an example: `meta["ways"]`, or its column `solution` if that is more than the answer."""
    found = example.meta.get("ways") or example.columns.get("solution") or ()
    texts = [found] if isinstance(found, str) else found if isinstance(found, list | tuple) else []
    return [text for text in texts if isinstance(text, str) and text.strip() not in ("", example.answer)]


def hint_steps(example: Example, steps: Iterable[str], rng: random.Random) -> list[str]:
    """The steps that a hint may give: those before the first one that holds the answer.

    `steps`, or else those of a worked solution: its lines or sentences.
    """
    given = list(steps)
    if not given and (solutions := worked_solutions(example)):
        given = [step for step in re.split(r"\n+|(?<=[.!?])\s+", rng.choice(solutions).strip()) if step]
    return list(takewhile(lambda step: not holds_answer(step, example), given))


def holds_answer(text: str, example: Example) -> bool:
    """Whether a hint gives the answer away: it stands there and not in the question, or the choice it names."""
    gold, choices = final_answer(example.answer), example.grading.get("choices") or ()
    named = ord(gold.upper()) - ord("A") if len(gold) == 1 else -1
    if 0 <= named < len(choices):  # which a question may list: that says nothing
        return _stands_in(gold, text) or _stands_in(str(choices[named]), text)
    return _stands_in(gold, text) and not _stands_in(gold, example.question)


def _stands_in(answer: str, text: str) -> bool:
    """As a number or words of its own, whatever dollar signs, thousands' separators and spaces there are."""
    for thousands_or_space, instead in ((r"(?<=\d)(,|\\,)(?=\d{3}(?!\d))", ""), (r"\\[,!; ]|\$|\s+", " ")):
        answer, text = (re.sub(thousands_or_space, instead, part) for part in (answer, text))
    answer, text = (re.sub(r" *([^\w .]) *", r"\1", part).strip() for part in (answer, text))
    first, last = (r"\b" if letter.isalpha() else "" for letter in (answer[:1], answer[-1:]))
    whole = rf"(?<!\d)(?<!\d\.){first}{re.escape(answer)}{last}(?!\d|\.\d)"
    return bool(answer) and re.search(whole, text, re.IGNORECASE * (len(answer) > 1)) is not None


def _has_steps(steps: list[str], count: int, _: Example) -> bool:
    return len(steps) >= count


def _hint(steps: list[str], count: int, example: Example, _: random.Random) -> Example:
    given = steps if count == _STEPS_OF_HINT["hint_all"] else steps[:count]
    return replace(example, question=example.question + _HINT + "\n".join(given))


def _reword(wordings: tuple[str, ...], example: Example, rng: random.Random) -> Example:
    return replace(example, question=rng.choice(wordings))


def read_lines(path: str | Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Where each line is, and what it says, of a file as `mm-agrae variants --prepare` writes it.

    Raises DataError for a file that cannot be read, and a line that has not that form.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"wordings and steps: {path}: {error}") from None
    for number, line in filter(lambda item: item[1].strip(), enumerate(text.split("\n"), 1)):
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
            lists = [row.get(name, []) for name in ("wordings", "steps")]
            texts = [row["id"], *lists[0], *lists[1]]
            if {*map(type, lists)} != {list} or {*map(type, texts)} != {str}:
                raise TypeError("wordings and steps are lists of texts")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            form = '{"id": "…", "wordings": ["…"], "steps": ["…"]}'
            raise DataError(f"{where}: {error!r}; each line is {form}") from None
        yield where, row


def read_prepared(path: str, task: Concatenation) -> dict[str, Prepared]:
    """Problem -> its wordings and steps.

    Raises DataError as `read_lines`, for a step that holds the answer, for a wording with other image markers than the
    question, and if no line is of a row of `task`.
    """
    found, known = {row["id"]: (where, row) for where, row in read_lines(path)}, dict[str, Prepared]()
    for index in range(len(task)):
        example = task[index]
        if example.id not in found:
            continue
        where, row = found[example.id]
        each = Prepared(tuple(row.get("wordings", ())), tuple(row.get("steps", ())))
        for step in each.steps:
            if holds_answer(step, example):
                raise DataError(f"{where}: a step holds the answer {example.answer!r}; remove it: {step!r}")
        for wording in each.wordings:
            if not question_of(replace(example, question=wording)) or markers(wording) != markers(example.question):
                problem = "a wording lacks text, or has other image markers than the question"
                raise DataError(f"{where}: {problem}: {wording!r}")
        known[example.id] = each
    if not known:
        raise DataError(f"rollout.variants.prepared={path}: has no id of a training row")
    return known


def markers(text: str) -> list[str]:
    return re.findall(r"<image ?[0-9]{0,3}>", text)
