"""The built-in rewards.

A reward part is a function `(example, completion) -> float | None`, None where it does not apply. To add one, write it
here and put a line into `PARTS`; `reward.parts` in the config then takes its name and weight. It runs in a worker
process, and gets the whole completion (token ids and log-probabilities too) and the example without its images.
"""

import re
from collections.abc import Callable

from mm_agrae.config.plugins import load_object
from mm_agrae.grading.accuracy import verify
from mm_agrae.grading.extraction import boxes
from mm_agrae.types import Completion, Example

Part = Callable[[Example, Completion], float | None]


def accuracy(example: Example, completion: Completion, *, after_thinking: bool = True) -> float:
    """1 if the final answer is correct, else 0, by `grading.accuracy.verify`.

    `example.grading` are that function's settings. With `{"grader": "module:function",
    **settings}` it is `function(example, text, after_thinking=..., **settings)` that grades, with
    a number from 0 to 1, 1 for success. Such names come from a task's code or from the config,
    never from a row of data.
    """
    settings = {"after_thinking": after_thinking, **example.grading}
    grader = settings.pop("grader", None)
    if grader:
        return float(load_object(grader)(example, completion.text, **settings))  # raises for None
    return float(verify(example.answer, completion.text, **settings))


def format(example: Example, completion: Completion) -> float:
    """1 if the completion is `<think>…</think>` followed by one boxed answer, else 0."""
    return float(follows_format(completion.text))


def rule(example: Example, completion: Completion) -> float | None:
    """1 if the reasoning has the words of one of the example's worked derivations, else 0.

    `example.meta["ways"]` are the derivations, such as "Given 70, 40. Exterior angle: 70+40=110."; without them the
    part does not apply. Only letters are compared: which rule is named counts, not whether the sum comes out.
    """
    ways = example.meta.get("ways")
    if not ways:
        return None
    reasoning, closed, _ = completion.text.partition("</think>")
    words = _words(reasoning.strip().removeprefix("<think>"))
    return float(bool(closed) and words in map(_words, [ways] if isinstance(ways, str) else ways))


def _words(text: str) -> list[str]:
    return re.findall("[A-Za-z]+", text)


PARTS: dict[str, Part] = {"accuracy": accuracy, "format": format, "rule": rule}


def follows_format(text: str, *, open_tag: str = "<think>", close_tag: str = "</think>") -> bool:
    r"""Whether a completion is one reasoning section followed by one boxed answer.

    The format of the paper's system prompts (arXiv 2602.05548, Appendix C.2):

        <think> … </think> … \boxed{answer} …

    True if the completion, stripped of white space, starts with `open_tag` and holds each tag exactly once with some
    text in between, and the rest holds exactly one \boxed{…} (or \fbox{…}) that is closed and not empty. Any text may
    surround that box; boxes in the reasoning section are not counted. Whether the answer is correct plays no part.

    `open_tag=""`: the chat template has already opened the reasoning section, so the completion
    starts inside it. Time is linear in the length of the text.
    """
    text = text.strip()
    if not text.startswith(open_tag):
        return False
    reasoning, closed, rest = text[len(open_tag) :].partition(close_tag)
    if not closed or not reasoning.strip() or close_tag in rest:
        return False
    if open_tag and (open_tag in reasoning or open_tag in rest):
        return False
    found = boxes(rest, at_most=2)
    return len(found) == 1 and bool(found[0].content and found[0].content.strip())


def overlong_penalty(length: int, max_new_tokens: int, buffer_tokens: int, penalty: float = 1.0) -> float:
    """DAPO's soft overlong punishment (arXiv 2503.14476, Eq. 13), to be added to the reward.

    0 up to max_new_tokens − buffer_tokens tokens, from there falling linearly to −penalty at max_new_tokens, and
    −penalty beyond. Raises ValueError if the buffer is not in 1 … max_new_tokens or the penalty is negative.
    """
    if not 1 <= buffer_tokens <= max_new_tokens:
        raise ValueError(f"buffer_tokens = {buffer_tokens} must be in 1 … {max_new_tokens}")
    if penalty < 0:
        raise ValueError(f"penalty = {penalty} must not be negative; it is subtracted")
    excess = (length - (max_new_tokens - buffer_tokens)) / buffer_tokens
    return -penalty * min(max(excess, 0.0), 1.0)
