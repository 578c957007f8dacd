"""The embedded task: generated problems about drawn figures, with exact answers.

Three families, four levels, two modalities:

    geometry   angles and lengths in some twenty-five figures; the figure decides the rule
    counting   shapes of three kinds, to be counted and compared
    charts     bars to be read and compared

    level 1    one rule, round numbers that the question repeats
    level 2    one rule, other numbers or more steps
    level 3    two rules, one after the other
    level 4    only the image gives the numbers, and colours matter

    image      the problem is drawn and the question is short
    text       the same problem, described in words

A problem is (family, figure, numbers). Its split follows from a hash of its numbers, so no problem is in two splits,
whether drawn or described, at any level. Item i of a split is the same problem in both modalities.
"""

import random
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from mm_agrae.errors import ConfigError, nearest
from mm_agrae.tasks.picture_operators import Operator
from mm_agrae.tasks.synthetic.problems import MAKERS, Problem, shown_as
from mm_agrae.types import Example

SPLITS = ("train", "validation", "test")
MODALITIES = ("image", "text")
FAMILIES = {"geometry": 0.6, "counting": 0.2, "charts": 0.2}
"""Family -> its share of a split with all families."""
LEVELS = {1: 0.4, 2: 0.3, 3: 0.2, 4: 0.1}
"""Level -> its share of a split with all levels."""
_SIZES = {"train": 8192, "validation": 256, "test": 512}


class SyntheticTask(Sequence[Example]):
    """Examples of one split, made when asked for; item i depends on (seed, split, i) alone.

    `families` and `levels` select some (all if None), `size` is the number of examples, `picture_px` the side of the
    square image (at least 112). Raises ConfigError naming the nearest valid value.
    """

    generated = True

    def __init__(
        self,
        split: str = "train",
        modality: str = "image",
        families: Sequence[str] | None = None,
        levels: Sequence[int] | None = None,
        size: int | None = None,
        seed: int = 0,
        picture_px: int = 112,
    ) -> None:
        self.split = _valid("split", split, SPLITS)
        self.modality = _valid("modality", modality, MODALITIES)
        chosen = _several("families", families, FAMILIES)
        self.families = {name: FAMILIES[name] for name in chosen}
        self.levels = {level: LEVELS[level] for level in _several("levels", levels, LEVELS)}
        self.size = _at_least("size", _SIZES[split] if size is None else size, 1)
        self.picture_px = _at_least("picture_px", picture_px, 112)
        self.seed = seed

    @classmethod
    def check_options(cls, options: Mapping[str, Any]) -> None:
        """Raises ConfigError as the constructor does, which draws nothing."""
        cls(**options)

    def __len__(self) -> int:
        return self.size

    def problem(self, index: int) -> tuple[Problem, random.Random]:
        """The problem of item `index`, and the random generator its image is drawn with."""
        rng = random.Random(f"{self.seed}/{self.split}/{index}")
        family = rng.choices([*self.families], [*self.families.values()])[0]
        level = rng.choices([*self.levels], [*self.levels.values()])[0]
        return MAKERS[family](level, self.split, rng), rng

    def __getitem__(self, index: int) -> Example:  # type: ignore[override]
        if not -self.size <= index < self.size:
            raise IndexError(f"example {index} of {self.size}")
        index %= self.size
        problem, rng = self.problem(index)
        return self._example(index, problem, rng if self.modality == "image" else None)

    variant_names = ("words", "numbers", "picture_only", "redrawn")

    def variants(self, index: int) -> list[Operator]:
        """The problem in words, with its numbers in the question or in the picture alone, or drawn once more."""
        if self.modality != "image":
            return []
        problem, _ = self.problem(index)
        forms = [("words", -2, problem)]
        if problem.family == "geometry":
            hidden = problem.level == 4
            forms += [("numbers", -3, shown_as(problem, 2)) if hidden else ("picture_only", 3, shown_as(problem, 4))]
        if problem.family != "charts":
            forms += [("redrawn", 0, problem)]

        def made(form: Problem, name: str) -> Callable[[Example, random.Random], Example]:
            return lambda _, rng: self._example(index, form, None if name == "words" else rng)

        return [Operator(name, delta, lambda _: True, made(form, name)) for name, delta, form in forms]

    def _example(self, index: int, problem: Problem, rng: random.Random | None) -> Example:
        """A problem drawn with `rng`, or in words without one."""
        image, drawn = problem.draw(rng, self.picture_px) if rng else (None, {})
        choices = list(problem.choices)
        return Example(
            id=f"synthetic-{self.split}-{self.seed}-{index}",
            question=problem.question if image else problem.described,
            answer=problem.answer,
            images=(image,) if image else (),
            grading={"kind": "choice", "choices": choices} if choices else {"kind": "number"},
            origin=f"synthetic {self.split} (seed {self.seed}), example {index}",
            meta={
                "family": problem.family,
                "figure": problem.figure,
                "level": problem.level,
                "key": problem.key,
                "numbers": list(problem.numbers),
                **problem.asked,
                "drawn": drawn,
                "ways": list(problem.ways),
            },
        )


def _valid(option: str, value: Any, choices: Collection[Any]) -> Any:
    if value in list(choices) and not isinstance(value, bool):
        return value
    hint = nearest(str(value), map(str, choices))
    raise ConfigError(f"synthetic task: {option} is {value!r}; {hint}")


def _several(option: str, values: Any, choices: Collection[Any]) -> list[Any]:
    if values is None:
        return list(choices)
    if isinstance(values, str | int):
        values = [values]
    if not values:
        valid = ", ".join(map(str, choices))
        raise ConfigError(f"synthetic task: {option} is empty; valid: {valid}")
    return [_valid(option, value, choices) for value in values]


def _at_least(option: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"synthetic task: {option} is {value!r}; use a number of {least} or more")
    return value
