"""Procedural tasks of reasoning-gym (Stojanovski et al. 2025), generated on access.

    - {task: gym, names: [countdown, maze], size: 1000, seed: 1, settings: {maze: {max_dist: 6}}}

Needs `pip install mm-agrae[gym]`. The final answer of a completion is graded by the data set's own `score_answer`, a
number from 0 to 1 (1 is success), in the worker processes and under the limits of `mm_agrae.rewards`. Some of these
functions evaluate the answer as Python, or by sympy, which does the same. Their answers must first match a pattern of
numbers, operators, variables, a few functions and lists; anything else counts as no answer.
"""

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from functools import lru_cache
from typing import Any

from mm_agrae.errors import ConfigError, install, nearest
from mm_agrae.types import Example

LEFT_OUT = {
    "codeio": "it runs code from its data to make its questions",
    "composite": "name several data sets instead",
}
EVALUATED_AS_PYTHON = frozenset({"binary_matrix", "n_queens", "spiral_matrix", "string_insertion"})
EVALUATED_BY_SYMPY = frozenset(
    {"countdown", "intermediate_integration", "polynomial_multiplication", "puzzle24", "simple_integration"}
)
# Without parentheses, dots and operators nothing is called, looked up or computed.
_LISTS = re.compile(r"[\w\s,\[\]'\"-]*", re.ASCII)
_FUNCTIONS = "sin|cos|tan|sec|csc|cot|asin|acos|atan|sinh|cosh|tanh|log|ln|exp|sqrt|Abs|pi"
# A name is a one-letter variable or a listed function; only digits may precede a dot.
_FORMULA = re.compile(rf"\d+(?:\.\d*)?|\.\d+|(?<![\w.])(?:[A-Za-z]|{_FUNCTIONS})\b|[\s+*/^()-]+", re.ASCII)


class GymTask:
    """Questions of one or several data sets of reasoning-gym, in turn.

    `names`: which data sets, such as countdown or [countdown, maze].
    `size`: questions of each. `seed`: different seeds give different questions; use different ones
    to train and to evaluate.
    `settings`: settings of a data set by its name: `{countdown: {min_numbers: 3}}`.

    Raises ConfigError for a name or setting that reasoning-gym does not have.
    """

    def __init__(
        self,
        names: str | Sequence[str],
        *,
        size: int = 500,
        seed: int = 0,
        settings: Mapping[str, Mapping[str, Any]] | None = None,
    ):
        self.check_options({"names": names, "size": size, "settings": settings})
        self.names = _names(names)
        self.size, self.seed = size, seed
        self.settings = {name: dict((settings or {}).get(name, {})) for name in self.names}
        # reasoning-gym seeds question i with seed + i: neighbouring seeds would share questions.
        self._data = [_make(name, size, _seed_of(f"{name} {seed}"), self.settings[name]) for name in self.names]

    @staticmethod
    def check_options(options: Mapping[str, Any]) -> None:
        registered = _registered()
        names, settings = _names(options["names"]), options.get("settings") or {}
        if not names or options.get("size", 1) < 1:
            raise ConfigError("gym: names and size must not be empty")
        for name in names:
            if name in LEFT_OUT:
                raise ConfigError(f"gym: {name} is left out: {LEFT_OUT[name]}")
            if name not in registered:
                raise ConfigError(f"gym: no data set {name!r}; {nearest(name, registered)}")
        for name, values in settings.items():
            if name not in names:
                raise ConfigError(f"settings: no data set {name!r}; {nearest(name, names)}")
            valid = {item.name for item in fields(registered[name][1])} - {"seed", "size"}
            for key in values:
                if key not in valid:
                    raise ConfigError(f"settings.{name}: no setting {key!r}; {nearest(str(key), sorted(valid))}")
            _make(name, 1, 0, values)

    generated = True

    def __len__(self) -> int:
        return self.size * len(self.names)

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(index)
        row, which = divmod(index, len(self.names))
        name, entry = self.names[which], self._data[which][row]
        answer = entry["answer"]
        return Example(
            id=f"{name}-{self.seed}-{row}",
            question=entry["question"],
            answer="(several are correct)" if answer is None else str(answer),
            grading={"grader": f"{__name__}:score", "name": name, "settings": self.settings[name], "entry": entry},
            origin=f"gym {name}, seed {self.seed}, question {row}",
            meta={"data_set": name},
        )


def score(
    example: Example,
    completion: str,
    *,
    name: str,
    settings: Mapping[str, Any],
    entry: Mapping[str, Any],
    **extraction: Any,
) -> float:
    """The data set's `score_answer` of a completion's final answer, from 0 to 1.

    `extraction` are arguments of `grading.extraction.extract_answer`.
    """
    from mm_agrae.grading.extraction import extract_answer

    answer = extract_answer(completion, **{"bare_limit": 4096, **extraction})
    if answer is not None and not _harmless(name, answer):
        answer = None
    return float(_scorer(name, json.dumps(settings, sort_keys=True))(answer, entry))


def _harmless(name: str, answer: str) -> bool:
    if len(answer) > 4096:
        return False
    if name in EVALUATED_AS_PYTHON:
        return _LISTS.fullmatch(answer) is not None
    return name not in EVALUATED_BY_SYMPY or _FORMULA.sub("", answer) == ""


@lru_cache(maxsize=64)
def _scorer(name: str, settings: str) -> Callable[[str | None, Mapping[str, Any]], float]:
    return _make(name, 1, 0, json.loads(settings)).score_answer


def _make(name: str, size: int, seed: int, settings: Mapping[str, Any]) -> Any:
    import reasoning_gym

    try:
        return reasoning_gym.create_dataset(name, size=size, seed=seed, **settings)
    except Exception as error:  # whatever its settings assert
        raise ConfigError(f"settings.{name}: {type(error).__name__}: {error}") from None


def _registered() -> Mapping[str, Any]:
    try:
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise ConfigError(f"gym needs reasoning-gym: {install('gym')} ({error})") from None
    return DATASETS


def _names(names: str | Sequence[str]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)


def _seed_of(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
