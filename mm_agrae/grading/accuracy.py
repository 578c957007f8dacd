r"""Is the final answer of a completion correct?

    >>> verify("1/2", r"<think>a quarter, twice</think> It is \boxed{\dfrac{1}{2}}.")
    True

`verify` finds the final answer (`extraction.py`), decides what kind of answer the gold one is, and compares the two
(`equivalence.py`). It can be called from any thread with any text: text is never evaluated, and formulas that need
sympy are compared in a worker process with a time and a memory limit, started on first use.

In a process prepared by `prepare_worker` everything is compared in place: there the limits of the
pool it belongs to apply.
"""

from __future__ import annotations

import os
import re
import string
import threading
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from itertools import islice, zip_longest
from typing import TYPE_CHECKING, Literal, get_args

from mm_agrae.grading import formulas
from mm_agrae.grading.equivalence import Symbolic, same
from mm_agrae.grading.extraction import PLACES, Place, check, final_answer, readings
from mm_agrae.grading.languages import YES_NO
from mm_agrae.grading.notation import as_text, normalise
from mm_agrae.grading.quantities import Rules, Units

if TYPE_CHECKING:
    from mm_agrae.grading.pool import WorkerPool

Kind = Literal["auto", "math", "number", "choice", "yes_no", "text"]

MEMORY_LIMIT_MB = 2048
"""Memory for one comparison in the worker process that `verify` starts."""


def verify(
    gold: str,
    completion: str,
    *,
    kind: Kind = "auto",
    choices: Sequence[str] = (),
    answer_in: Sequence[Place] = PLACES,
    after_thinking: bool = True,
    think_tags: tuple[str, str] = ("<think>", "</think>"),
    answer_tag: str = "answer",
    bare_limit: int = 64,
    tolerance: float | None = None,
    units: Units = "auto",
    time_limit_s: float = 1.0,
) -> bool:
    r"""Whether the completion's final answer equals the gold answer.

    `gold` may be bare (`\frac12`, `12 cm`), in math delimiters, or a solution whose answer is boxed
    or follows "answer is" or "####". An empty gold answer never matches. `answer_in`,
    `after_thinking`, `think_tags`, `answer_tag` and `bare_limit` say where to find the final
    answer: see `extraction.extract_answer`. If the answer is a sentence ("There are 12 ways"), both
    the whole and the value in it are tried.

    `kind` says how the two are compared:

    * `math`: numbers exactly, with units; text ignoring case and articles; lists and sets in any
      order, tuples and intervals in order; formulas by their values and by math-verify.
      A name in front of the value (x =, Area =) is dropped.
    * `number`: as math; if the answer is a sentence with a single number in it, also that number.
    * `choice`: by letter, or by the text of a choice; incorrect if the two disagree.
    * `yes_no`: by the first word, unless its opposite follows as an alternative.
    * `text`: by words, ignoring case, punctuation, articles, plural s and spaces.
    * `auto`: choice if there are `choices` or the gold answer is one letter A to J or a choice
      such as "C. 42", yes_no if it is yes or no, else math.

    `tolerance` is relative to the gold number. Without it integers and fractions must be exact, and
    rounding is allowed as `quantities.agree` says. A percent sign on one side only is either an
    omitted unit (50% and 50) or a hundredth (50% and 1/2); 500% does not equal 5.

    `units`: auto compares and converts them if both sides have one (5 m equals 500 cm, not 5 cm),
    required demands the gold answer's unit, ignore drops them.

    `time_limit_s` bounds the comparison of formulas; past it the answer counts as incorrect.

    Raises ValueError for a setting that is not one of the above, never for the text.
    """
    check("kind", kind, get_args(Kind))
    check("units", units, get_args(Units))
    answers = readings(completion, answer_in, after_thinking, think_tags, answer_tag, bare_limit)
    gold = final_answer(gold).strip()
    question = (gold, kind, tuple(choices), Rules(tolerance, units))
    return gold != "" and any(
        not _too_odd(answer, gold) and _is_correct_within(question, answer, time_limit_s) for answer in answers
    )


def _too_odd(answer: str, gold: str) -> bool:
    # Controls, halves of surrogate pairs, and marks that change the direction of writing.
    odd = "[\x00-\x08\x0e-\x1f\x7f\ud800-\udfff\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]"
    return len(answer) > max(2000, 4 * len(gold)) or re.search(odd, answer) is not None


_Question = tuple[str, Kind, tuple[str, ...], Rules]  # gold answer, …
_Equal = Callable[[str, str], bool]
_LETTERS = string.ascii_uppercase
_LETTER = re.compile(r"\(?\s*([A-J])\s*\)?")
_LETTERED_GOLD = re.compile(r"(?:\(([A-J])\)|([A-J])[.):])\s+(?=\S)")  # "C. 42"


def _is_correct(question: _Question, answer: str, symbolic: Symbolic) -> bool:
    gold, kind, choices, rules = question
    equal = partial(same, rules=rules, symbolic=symbolic)
    if kind == "auto":
        kind = _kind_of(gold, choices)
    if kind == "choice":
        return _same_choice(gold, answer, choices, equal)
    if kind == "yes_no":
        return _yes_or_no(answer) == _yes_or_no(gold) is not None
    if kind == "text":
        return as_text(gold) == as_text(answer) != ""
    return equal(gold, answer) or (kind == "number" and _same_single_number(gold, answer, equal))


def _kind_of(gold: str, choices: Sequence[str]) -> Kind:
    if choices or _LETTER.fullmatch(_plain(gold)) or _LETTERED_GOLD.match(gold):
        return "choice"
    return "yes_no" if _plain(gold).lower() in ("yes", "no") else "math"


def _plain(text: str) -> str:
    return re.sub(r"\\text\{([^{}]*)\}", r"\1", normalise(text)).strip(" .,")


def _yes_or_no(text: str) -> str | None:
    text = _plain(text).lower()
    words = re.findall(r"[a-z]+", YES_NO.get(text.strip("。！!،,"), text))
    if not words or words[0] not in ("yes", "no"):
        return None
    opposite = "no" if words[0] == "yes" else "yes"
    # "Yes, no sign of a fracture" is a yes; "yes or no" is neither.
    return None if words[1:] == [opposite] else words[0]


def _same_single_number(gold: str, answer: str, equal: _Equal) -> bool:
    text = re.sub(r"\^\s*\{?[23]\}?", "", normalise(answer))
    if "\\" in text or "/" in text:
        return False
    any_number = r"(?<![\w.])[+-]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?!\w*\d)"
    found = {part for part in re.findall(any_number, text) if re.search(r"\d", part)}
    return len(found) == 1 and equal(gold, found.pop())


_LETTERED = re.compile(r"\(?\s*([A-Za-z])\s*(?:\)\s*[.:,]?|[.:,](?!\d)|$)\s*(.*)", re.DOTALL)
_LETTER_SPACE = re.compile(r"\(?\s*([A-Z])\s*\)?\s*(?:-|–|\s)\s*(.*)", re.DOTALL)
_OPTION = re.compile(r"^(?:(?:the\s+)?(?:correct\s+)?(?:option|choice|answer)\s+(?:is\s+)?|\w+\s*=)", re.IGNORECASE)
_MORE = re.compile(r"(?:or|and|not)\b|[^\w\s$\\(\[]", re.IGNORECASE)


def _same_choice(gold: str, answer: str, choices: tuple[str, ...], equal: _Equal) -> bool:
    if not choices and (lettered := _LETTERED_GOLD.match(gold)):
        letter = lettered[1] or lettered[2]
        choices = ("",) * _LETTERS.index(letter) + (gold[lettered.end() :],)
        gold = letter
    choices = tuple(
        re.sub(rf"^\s*\(?{letter}\s*[.:)]\s*", "", choice) if letter else choice
        for letter, choice in zip_longest(_LETTERS[: len(choices)], choices)
    )
    run_together = re.compile(rf"[{_LETTERS[: len(choices) or 1]}]{{2,}}")
    if choices and not {normalise(gold), normalise(answer)} & set(map(normalise, choices)):
        gold, answer = (
            ", ".join(text) if run_together.fullmatch(text) else text
            for text in (_strip_text(gold), _strip_text(answer))
        )
    correct = _letters(gold, len(choices)) or _letter_of_text(gold, choices, equal)
    if not correct:
        return equal(gold, answer)
    answer = _OPTION.sub("", _strip_text(answer))
    chosen = _letters(answer, len(choices))
    if len(chosen) > 1 or len(correct) > 1:
        return chosen == correct
    first = _LETTERS.index(min(correct))
    if choices:  # a choice listed twice has two letters
        listed = zip(_LETTERS, choices, strict=False)
        correct = {letter for letter, choice in listed if choice == choices[first]}
    if chosen:
        return chosen <= correct
    lettered = _LETTERED.fullmatch(answer) or _LETTER_SPACE.fullmatch(answer)
    if lettered and (letter := lettered[1].upper()) in _LETTERS[: len(choices) or 10]:
        # A letter and a text must agree.
        if not choices and letter in correct:
            return lettered.re is _LETTERED and not _MORE.match(lettered[2])
        agree = bool(choices) and equal(choices[_LETTERS.index(letter)], lettered[2])
        if agree or letter in correct:
            return agree and letter in correct
    return bool(choices) and equal(choices[first], answer)


def _strip_text(text: str) -> str:
    r"""\textbf{(B)} 12 as (B) 12, and no math delimiters around the whole."""
    text = re.sub(r"\\(?:text|math)(?:bf|rm|it|normal)?\s*\{([^{}]*)\}", r"\1", text)
    return text.replace("$", "").replace("*", "").strip().rstrip(".").strip()


def _letters(text: str, count: int) -> set[str]:
    """{"B"} for B, (b), "B."; {"A", "C"} for "A, C" and "A and C"; empty for anything else."""
    text = _strip_text(text)
    found = re.split(r"\s*(?:,|;|\n|\band\b|&)\s*|\s+", text)
    letters = [re.sub(r"[().:\s]", "", part).upper() for part in found if part]
    valid = set(letters) <= set(_LETTERS[: count or 10]) and len(letters) == len(set(letters))
    return set(letters) if valid else set()


def _letter_of_text(text: str, choices: Sequence[str], equal: _Equal) -> set[str]:
    """Letter of the first choice with this text, or else of the first with the same value."""
    lettered = list(zip(_LETTERS, choices, strict=False))
    as_written = [letter for letter, choice in lettered if normalise(choice) == normalise(text)]
    by_value = (letter for letter, choice in lettered if equal(choice, text))
    return set(as_written[:1]) or set(islice(by_value, 1))


_limits_hold_here = False  # True in a pool's worker processes
_lock = threading.Lock()
_pool: WorkerPool | None = None


class _NeedsWorker(Exception):
    pass


def _is_correct_within(question: _Question, answer: str, time_limit_s: float) -> bool:
    if _limits_hold_here:
        return _decide(question, answer)
    try:
        return _is_correct(question, answer, _ask_a_worker)
    except _NeedsWorker:
        from mm_agrae.grading.pool import CallFailed

    try:
        return _decide_in_worker(question, answer, time_limit_s)
    except CallFailed:
        return False


def _ask_a_worker(gold: str, answer: str, tolerance: float | None) -> bool:
    raise _NeedsWorker


@lru_cache(maxsize=4096)
def _decide(question: _Question, answer: str) -> bool:
    """Decide in this process, however long it takes. Cached: a group often repeats an answer."""
    return _is_correct(question, answer, formulas.symbolic)


@lru_cache(maxsize=4096)
def _decide_in_worker(question: _Question, answer: str, time_limit_s: float) -> bool:
    """As `_decide`, in a worker process that is kept for the next call. Raises CallFailed."""
    global _pool
    from mm_agrae.grading.pool import WorkerPool

    with _lock:
        if _pool is None:
            _pool = WorkerPool(1, MEMORY_LIMIT_MB, prepare_worker)
    return bool(_pool.call(_decide, (question, answer), time_limit_s))


def _after_fork() -> None:
    """A forked child has none of its parent's threads, so it cannot use the parent's pool."""
    global _pool, _lock
    _pool, _lock = None, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def prepare_worker() -> None:
    """Run once in each worker process: load what a comparison needs."""
    global _limits_hold_here
    _limits_hold_here = True
    formulas.warm_up()
