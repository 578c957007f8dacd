r"""Is the final answer of a completion right?

    >>> verify("1/2", r"<think>a quarter, twice</think> It is \boxed{\dfrac{1}{2}}.")
    True

`verify` finds the final answer (`extract_answer`), decides what kind of answer the gold one is,
and compares the two (`mm_agrae.rewards.equivalence`). It can be called from any thread with any
text: text is never evaluated, and a formula that needs sympy is decided in a worker process
with a time and a memory limit, started on first use.

Inside the worker processes of `mm_agrae.rewards.Rewarder` the pool's own limits hold instead.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

from mm_agrae.rewards import equivalence
from mm_agrae.rewards.equivalence import Rules, Symbolic, Units, same

if TYPE_CHECKING:
    from mm_agrae.rewards.pool import WorkerPool

Kind = Literal["auto", "math", "number", "choice", "yes_no", "text"]
Place = Literal["boxed", "answer_is", "tag"]

MEMORY_LIMIT_MB = 2048
"""What one comparison may take in the worker that `verify` starts by itself."""


def verify(
    gold: str,
    completion: str,
    *,
    kind: Kind = "auto",
    choices: Sequence[str] = (),
    answer_in: Sequence[Place] = ("boxed", "answer_is", "tag"),
    after_thinking: bool = True,
    think_tags: tuple[str, str] = ("<think>", "</think>"),
    answer_tag: str = "answer",
    bare_limit: int = 64,
    tolerance: float | None = None,
    units: Units = "auto",
    time_limit_s: float = 1.0,
) -> bool:
    r"""Whether the completion's final answer is the gold answer.

    `gold` may be bare (`\frac12`, `12 cm`), in math delimiters, or in a box. An empty one is
    never matched. `answer_in`, `after_thinking`, `think_tags`, `answer_tag` and `bare_limit`
    say where the final answer stands: see `extract_answer`.

    `kind` says how the two are compared:

    * `math`: numbers exactly, with units; text without case and articles; lists and sets in any
      order, tuples and intervals in theirs; formulas by their values and by math-verify.
      A name in front of the value (x =, Area =) is dropped.
    * `number`: as math, and if the answer is a sentence with a single number in it, that number.
    * `choice`: by letter, or by the text of a choice; wrong if the two disagree.
    * `yes_no`: the first word, unless the opposite one follows as an alternative.
    * `text`: words without case, punctuation, articles and spaces; nothing else is dropped.
    * `auto`: choice if there are `choices` or the gold answer is one letter A to J, yes_no if it
      is yes or no, else math.

    `tolerance` is relative to the gold number. Without one integers and fractions are exact, and
    rounding is forgiven as `equivalence.agree` says. A percent sign on one side is either a unit
    left out (50% and 50) or a hundredth (50% and 1/2).

    `units`: auto compares them where both sides have one and converts (5 m is 500 cm, not
    5 cm), required wants the gold's unit in the answer, ignore drops them.

    `time_limit_s` bounds the comparison of formulas; past it the answer counts as wrong.

    Raises ValueError for a setting that is not one of the above, never for the text.
    """
    _check("kind", kind, get_args(Kind))
    _check("units", units, get_args(Units))
    answer = extract_answer(
        completion,
        answer_in=answer_in,
        after_thinking=after_thinking,
        think_tags=think_tags,
        answer_tag=answer_tag,
        bare_limit=bare_limit,
    )
    gold = (_from_boxes(gold) or gold).strip()
    if not gold or answer is None or _too_odd(answer, gold):
        return False
    question = _Question(gold, kind, tuple(choices), Rules(tolerance, units))
    if _limits_hold_here:
        return _decide(question, answer)
    try:
        return _is_right(question, answer, _ask_a_worker)
    except _NeedsWorker:
        from mm_agrae.rewards.pool import CallFailed

        try:
            return _decide_in_worker(question, answer, time_limit_s)
        except CallFailed:
            return False


def _check(name: str, value: str, valid: Sequence[str]) -> None:
    if value not in valid:
        raise ValueError(f"{name} is {value!r}; valid: {', '.join(valid)}")


# ------------------------------------------------------------------------ finding the answer


class Box(NamedTuple):
    start: int
    end: int
    content: str | None  # None: never closed


def boxes(text: str, at_most: int) -> list[Box]:
    r"""The last \boxed{…} and \fbox{…}, from the end; `\boxed 5` counts. Nested: the inner one."""
    found: list[Box] = []
    end = len(text)
    while len(found) < at_most:
        start, command = max((text.rfind(c, 0, end), c) for c in (r"\boxed", r"\fbox"))
        if start < 0:
            break
        found.append(_box(text, start, start + len(command)))
        end = start
    return found


_TOKEN = re.compile(r"[ \t]*([^\s${}]*[^\s${}.,;:)\]\\])")


def _box(text: str, start: int, position: int) -> Box:
    opening = re.compile(r"\s*\{").match(text, position)
    if opening is None:
        token = _TOKEN.match(text, position)
        return Box(start, token.end(), token[1]) if token else Box(start, position, None)
    depth = 1
    for brace in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, opening.end()):
        depth += (brace[0] == "{") - (brace[0] == "}")
        if depth == 0:
            return Box(start, brace.end(), text[opening.end() : brace.start()])
    return Box(start, len(text), None)


def extract_answer(
    completion: str,
    *,
    answer_in: Sequence[Place] = ("boxed", "answer_is", "tag"),
    after_thinking: bool = True,
    think_tags: tuple[str, str] = ("<think>", "</think>"),
    answer_tag: str = "answer",
    bare_limit: int = 64,
) -> str | None:
    r"""The final answer of a completion as written, or None if there is none.

    `answer_in` lists where it is looked for; the first place that the completion has decides:

    * `boxed`: the last `\boxed{…}` or `\fbox{…}`, nested braces and `\boxed 5` included. Boxes
      joined by nothing but "and", "or" or a comma are one answer with several parts. An empty or
      unclosed last box is no answer.
    * `answer_is`: what follows the last "answer is", "Answer:" or "####", up to the end of the
      sentence.
    * `tag`: the last `<answer>…</answer>`.

    Failing all, a completion of one line and at most `bare_limit` characters is itself the
    answer; 0 turns that off.

    `after_thinking`: only text outside the reasoning part counts, and a part that is not closed
    means no answer. A closing tag alone ends a part that the prompt has opened; without any
    tag the whole completion counts.

    Time is linear in the text. Raises ValueError for an unknown place.
    """
    for place in answer_in:
        _check("answer_in", place, get_args(Place))
    text: str | None = completion
    if after_thinking:
        text = _outside_thinking(completion, *think_tags)
    if text is None:
        return None
    for place in answer_in:
        if place == "boxed":
            found = _from_boxes(text)
        elif place == "answer_is":
            found = _after_answer_is(text)
        else:
            found = _in_tag(text, answer_tag)
        if found is not None:
            return found.strip() or None
    text = text.strip()
    return _said(text) if 0 < len(text) <= bare_limit and "\n" not in text else None


def _outside_thinking(text: str, open_tag: str, close_tag: str) -> str | None:
    kept: list[str] = []
    inside, position = False, 0
    for tag in re.finditer(f"{re.escape(open_tag)}|{re.escape(close_tag)}", text):
        if tag[0] == close_tag:
            if not inside:
                kept.clear()  # the prompt had opened it
            inside = False
        else:
            if not inside:
                kept.append(text[position : tag.start()])
            inside = True
        position = tag.end()
    return None if inside else "\n".join([*kept, text[position:]])


_GAP = r"(?:[\s$]|\\[()\[\]]|\\q?quad(?![a-z]))*"
_JOINED = re.compile(rf"{_GAP}(?:[,;]|,?\s*(?:\\text\s*\{{\s*)?(?:and|or)(?:\s*\}})?){_GAP}")
_MOST_BOXES = 20


def _from_boxes(text: str) -> str | None:
    found = boxes(text, _MOST_BOXES)
    if not found:
        return None
    parts = [found[0].content or ""]
    for later, earlier in pairwise(found):
        between = text[earlier.end : later.start]
        if not earlier.content or len(between) > 40 or not _JOINED.fullmatch(between):
            break
        parts.append(earlier.content)
    return ", ".join(reversed(parts))


_ANSWER_IS = re.compile(
    r"(?:\banswers?\b(?:\s+(?:to|for|of|choice|option)\b[^.:\n]{0,60}?)?[\s*_]*(?:\b(?:is|are|was)\b"
    r"|[:=：])|####)[\s*_:：]*",
    re.IGNORECASE,
)
_DELIMITED = re.compile(r"\$\$(.+?)\$\$|\\\[(.+?)\\\]|\\\((.+?)\\\)", re.DOTALL)
_SENTENCE_END = re.compile(r"[.?](?=\s|$)|\n|,?\s+(?:because|since|which|so that|where)\b|,\s+so\b")


_TAIL = 20_000  # the final answer stands in the last so many characters


def _after_answer_is(text: str) -> str | None:
    text = text[-_TAIL:]
    ends = [marker.end() for marker in _ANSWER_IS.finditer(text)]
    if not ends:
        return None
    rest = text[ends[-1] :]
    if delimited := _DELIMITED.match(rest):
        return next(group for group in delimited.groups() if group is not None)
    end = _SENTENCE_END.search(rest)
    return _said(rest[: end.start() if end else None]).strip('*`"“”')


_FORMULA = re.compile(r"\$\$?([^$]+)\$?\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)


def _said(sentence: str) -> str:
    """The answer in a sentence that names it: "The largest n is 34", "so we get $x = 3$"."""
    sentence = sentence.strip()
    if re.match(r"the\b.*\s(?:is|are)\s", sentence, re.IGNORECASE | re.DOTALL):
        return re.split(r"\s(?:is|are)\s", sentence)[-1]
    formulas = list(_FORMULA.finditer(sentence))
    if len(formulas) == 1 and re.search(r"[a-z]{2}", sentence[: formulas[0].start()]):
        return next(group for group in formulas[0].groups() if group is not None)
    return sentence


def _in_tag(text: str, tag: str) -> str | None:
    end = text.rfind(f"</{tag}>")
    start = text.rfind(f"<{tag}>", 0, max(end, 0))
    return None if start < 0 else text[start + len(tag) + 2 : end]


# --------------------------------------------------------------------------- comparing it

# Characters that no answer holds: controls, halves of surrogate pairs, and marks that make a
# text read otherwise than it is stored.
_FORBIDDEN = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]"
)


def _too_odd(answer: str, gold: str) -> bool:
    return len(answer) > max(2000, 4 * len(gold)) or _FORBIDDEN.search(answer) is not None


class _Question(NamedTuple):
    gold: str
    kind: Kind
    choices: tuple[str, ...]
    rules: Rules


_LETTER = re.compile(r"\(?\s*([A-J])\s*\)?")


def _is_right(question: _Question, answer: str, symbolic: Symbolic) -> bool:
    gold, kind, choices, rules = question
    if kind == "auto":
        kind = _kind_of(gold, choices)
    if kind == "choice":
        return _same_choice(gold, answer, choices, rules, symbolic)
    if kind == "yes_no":
        return _yes_or_no(answer) == _yes_or_no(gold) is not None
    if kind == "text":
        return equivalence.as_text(gold) == equivalence.as_text(answer) != ""
    if same(gold, answer, rules, symbolic):
        return True
    return kind == "number" and _same_single_number(gold, answer, rules, symbolic)


def _kind_of(gold: str, choices: Sequence[str]) -> Kind:
    if choices or _LETTER.fullmatch(_plain(gold)):
        return "choice"
    return "yes_no" if _plain(gold).lower() in ("yes", "no") else "math"


def _plain(text: str) -> str:
    text = equivalence.normalise(text)
    return re.sub(r"\\text\{([^{}]*)\}", r"\1", text).strip(" .,")


def _yes_or_no(text: str) -> str | None:
    words = re.findall(r"[a-z]+", _plain(text).lower())
    if not words or words[0] not in ("yes", "no"):
        return None
    opposite = "no" if words[0] == "yes" else "yes"
    # "Yes, no sign of a fracture" is a yes; "yes or no" is neither.
    return None if words[1:] == [opposite] else words[0]


_NUMBER_IN_TEXT = re.compile(r"(?<![\w.])[+-]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?![\w]*\d)")


def _same_single_number(gold: str, answer: str, rules: Rules, symbolic: Symbolic) -> bool:
    text = re.sub(r"\^\s*\{?[23]\}?", "", equivalence.normalise(answer))
    if "\\" in text or "/" in text:
        return False
    found = {match[0] for match in _NUMBER_IN_TEXT.finditer(text) if re.search(r"\d", match[0])}
    return len(found) == 1 and same(gold, found.pop(), rules, symbolic)


_LETTERED = re.compile(r"\(?\s*([A-Za-z])\s*(?:\)\s*[.:,]?|[.:,](?!\d)|$)\s*(.*)", re.DOTALL)
_LETTER_SPACE = re.compile(r"\(?\s*([A-Z])\s*\)?\s*(?:-|–|\s)\s*(.*)", re.DOTALL)
_OPTION = re.compile(
    r"^(?:(?:the\s+)?(?:correct\s+)?(?:option|choice|answer)\s+(?:is\s+)?|\w+\s*=)", re.IGNORECASE
)
_MORE = re.compile(r"(?:or|and|not)\b|[^\w\s$\\(\[]", re.IGNORECASE)


def _same_choice(
    gold: str, answer: str, choices: tuple[str, ...], rules: Rules, symbolic: Symbolic
) -> bool:
    choices = tuple(_without_letter(choice, index) for index, choice in enumerate(choices))
    right = _letters(gold, len(choices)) or _letter_of_text(gold, choices, rules, symbolic)
    if not right:
        return same(gold, answer, rules, symbolic)
    answer = _OPTION.sub("", _strip_text(answer))
    chosen = _letters(answer, len(choices))
    if len(chosen) > 1 or len(right) > 1:
        return chosen == right
    first = ord(min(right)) - ord("A")
    if choices:  # a choice that stands there twice has two letters
        twins = enumerate(choice == choices[first] for choice in choices[:26])
        right = {chr(ord("A") + index) for index, equal in twins if equal}
    if chosen:
        return chosen <= right
    lettered = _LETTERED.fullmatch(answer) or _LETTER_SPACE.fullmatch(answer)
    if lettered and (index := ord(lettered[1].upper()) - ord("A")) < (len(choices) or 10):
        # A letter and a text must agree.
        if lettered[1].upper() in right:
            if not choices:
                return lettered.re is _LETTERED and not _MORE.match(lettered[2])
            return same(choices[index], lettered[2], rules, symbolic)
        if choices and same(choices[index], lettered[2], rules, symbolic):
            return False
    return bool(choices) and same(choices[first], answer, rules, symbolic)


def _without_letter(choice: str, index: int) -> str:
    return (
        re.sub(rf"^\s*\(?{chr(ord('A') + index)}\s*[.:)]\s*", "", choice) if index < 26 else choice
    )


def _strip_text(text: str) -> str:
    r"""\textbf{(B)} 12 as (B) 12, and no math delimiters around the whole."""
    text = re.sub(r"\\(?:text|math)(?:bf|rm|it|normal)?\s*\{([^{}]*)\}", r"\1", text)
    return text.replace("$", "").replace("*", "").strip().rstrip(".").strip()


def _letters(text: str, count: int) -> set[str]:
    """{"B"} for B, (b), "B."; {"A", "C"} for "A, C" and "A and C"; empty for anything else."""
    text = _strip_text(text)
    found = re.split(r"\s*(?:,|;|\n|\band\b|&)\s*|\s+", text)
    letters = [re.sub(r"[().:\s]", "", part).upper() for part in found if part]
    highest = ord("A") + (count or 10)
    valid = all(len(letter) == 1 and ord("A") <= ord(letter) < highest for letter in letters)
    return set(letters) if valid and len(letters) == len(set(letters)) else set()


def _letter_of_text(
    text: str, choices: tuple[str, ...], rules: Rules, symbolic: Symbolic
) -> set[str]:
    """The first letter of the choice with this text; as written, or else of the same value."""
    written = [equivalence.normalise(choice) for choice in choices[:26]]
    if (plain := equivalence.normalise(text)) in written:
        return {chr(ord("A") + written.index(plain))}
    for index, choice in enumerate(choices[:26]):
        if same(choice, text, rules, symbolic):
            return {chr(ord("A") + index)}
    return set()


# --------------------------------------------------------------------------- where it runs

_limits_hold_here = False  # True in a pool's worker processes
_lock = threading.Lock()
_pool: WorkerPool | None = None


class _NeedsWorker(Exception):
    pass


def _ask_a_worker(gold: str, answer: str, tolerance: float | None) -> bool:
    raise _NeedsWorker


@lru_cache(maxsize=4096)
def _decide(question: _Question, answer: str) -> bool:
    """Decide in this process, however long it takes. A group often gives one answer many times."""
    return _is_right(question, answer, equivalence.symbolic)


@lru_cache(maxsize=4096)
def _decide_in_worker(question: _Question, answer: str, time_limit_s: float) -> bool:
    """As `_decide`, in a process that this one keeps for it. Raises CallFailed."""
    global _pool
    from mm_agrae.rewards.pool import WorkerPool

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
    equivalence.warm_up()
