r"""Does a completion keep the form asked for: reasoning inside tags, then one boxed answer?

The form of the paper's system prompts (arXiv 2602.05548, Appendix C.2):

    <think> … </think> … \boxed{answer} …
"""

from __future__ import annotations

from mm_agrae.grading.extraction import boxes


def follows(
    completion: str,
    *,
    open_tag: str = "<think>",
    close_tag: str = "</think>",
) -> bool:
    r"""Whether a completion is one reasoning part followed by one boxed answer.

    True if the completion, leading and trailing white space aside, starts with `open_tag`, holds
    each tag exactly once with some text between them, and what follows holds exactly one
    \boxed{…} (or \fbox{…}) that is closed and not empty. Text around that box may be anything;
    boxes inside the reasoning part are not counted. Whether the answer is right plays no part.

    `open_tag=""`: the chat template has opened the reasoning part already, so the completion
    starts inside it. Time is linear in the text.
    """
    text = completion.strip()
    if not text.startswith(open_tag):
        return False
    reasoning, closed, rest = text[len(open_tag) :].partition(close_tag)
    if not closed or not reasoning.strip() or close_tag in rest:
        return False
    if open_tag and (open_tag in reasoning or open_tag in rest):
        return False
    found = boxes(rest, at_most=2)
    return len(found) == 1 and bool(found[0].content and found[0].content.strip())
