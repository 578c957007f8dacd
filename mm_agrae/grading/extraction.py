r"""Finds the final answer in a completion."""

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, NamedTuple, get_args

from mm_agrae.grading.languages import in_english
from mm_agrae.grading.quantities import unit

Place = Literal["boxed", "answer_is", "tag", "a_colon", "end"]
PLACES: tuple[Place, ...] = ("boxed", "answer_is", "tag", "end")
_TAIL = 20_000  # characters at the end that are searched


def check(name: str, value: str, valid: Sequence[str]) -> None:
    """Raise ValueError unless the value of this setting is a valid one."""
    if value not in valid:
        raise ValueError(f"{name} is {value!r}; valid: {', '.join(valid)}")


class Box(NamedTuple):
    start: int
    end: int
    content: str | None  # None: never closed


def boxes(text: str, at_most: int) -> list[Box]:
    r"""The last \boxed{…} and \fbox{…}, last first; `\boxed 5` counts. Nested: the inner one."""
    found: list[Box] = []
    end = len(text)
    while len(found) < at_most:
        start, command = max((text.rfind(c, 0, end), c) for c in (r"\boxed", r"\fbox"))
        if start < 0:
            break
        found.append(_box(text, start, start + len(command)))
        end = start
    return found


def _box(text: str, start: int, position: int) -> Box:
    opening = re.compile(r"\s*\{").match(text, position)
    if opening is None:
        token = re.compile(r"[ \t]*([^\s${}]*[^\s${}.,;:)\]\\])").match(text, position)
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
    answer_in: Sequence[Place] = PLACES,
    after_thinking: bool = True,
    think_tags: tuple[str, str] = ("<think>", "</think>"),
    answer_tag: str = "answer",
    bare_limit: int = 64,
) -> str | None:
    r"""The final answer of a completion as written, or None if there is none.

    `answer_in` lists where to look for it, in order; the first place found decides:

    * `boxed`: the last `\boxed{…}` or `\fbox{…}`, nested braces and `\boxed 5` included. Boxes
      joined only by "and", "or" or a comma are one answer with several parts. An empty or
      unclosed last box is no answer. "Final answer: …" after the last box overrides it.
    * `answer_is`: what follows the last "answer is", "Answer:" or "####", up to the end of the
      sentence.
    * `tag`: the last `<answer>…</answer>`.
    * `a_colon` (only if asked for): the last line "A: …".
    * `end`: a completion of one line and at most `bare_limit` characters is itself the answer;
      otherwise the formula or number at the end of the last sentence, or the only one in it. A
      completion that was cut off has no such end.

    The phrases around an answer may be English, Chinese, Japanese, Arabic, Hindi, French, German or Spanish.

    `after_thinking`: only text outside the reasoning section counts; if that is never closed there is no answer. A
    closing tag alone ends a section that the prompt has opened; without any tag the whole completion counts.

    Time is linear in the text. Raises ValueError for an unknown place.
    """
    found = readings(completion, answer_in, after_thinking, think_tags, answer_tag, bare_limit)
    return found[0] if found else None


def readings(
    completion: str,
    answer_in: Sequence[Place],
    after_thinking: bool,
    think_tags: tuple[str, str],
    answer_tag: str,
    bare_limit: int,
) -> list[str]:
    """Candidates for the final answer; of a sentence: all of it, its number, …"""
    for place in answer_in:
        check("answer_in", place, get_args(Place))
    text = _outside_thinking(completion, *think_tags) if after_thinking else completion
    if text is None:
        return []
    text = _END_OF_TURN.split(text, maxsplit=1)[0]
    for place in answer_in:
        if place == "boxed":
            found = _from_boxes_or_later(text, "answer_is" in answer_in)
        elif place == "answer_is":
            found = _after_answer_is(text)
        elif place == "tag":
            found = _in_tag(text, answer_tag)
        elif place == "a_colon":
            lines = _A_COLON.findall(text[-_TAIL:])
            found = _said(in_english(lines[-1])) if lines else None
        else:
            found = _at_the_end(text, bare_limit)
        if found is not None:
            return list(dict.fromkeys(stripped for part in found if (stripped := part.strip())))
    return []


def final_answer(solution: str) -> str:
    """The answer of a gold solution: boxed, after "answer is", or else the whole text."""
    if found := from_boxes(solution):
        return found
    return next(iter(_after_answer_is(solution) or ()), "") or solution


# End of a turn or start of another, present in the text if special tokens are not skipped.
_END_OF_TURN = re.compile(
    r"<\|(?:im_end|eot_id|endoftext|end_of_text|end|eom_id)\|>|(?<=\S)\s*<\|im_start\|>"
    r"|</s>|<eos>|<end_of_turn>|<｜end▁of▁sentence｜>"
)


def _outside_thinking(text: str, open_tag: str, close_tag: str) -> str | None:
    kept: list[str] = []
    inside, position = False, 0
    for tag in re.finditer(f"{re.escape(open_tag)}|{re.escape(close_tag)}", text):
        closes = tag[0] == close_tag
        if closes and not inside:
            kept.clear()  # the prompt had opened it
        elif not inside:
            kept.append(text[position : tag.start()])
        inside, position = not closes, tag.end()
    return None if inside else "\n".join([*kept, text[position:]])


_GAP = r"(?:[\s$]|\\[()\[\]]|\\q?quad(?![a-z]))*"
_AND = r"(?:\\text\s*\{[^{}.]{0,25})?\b(?:and|or)\b(?:\s*\})?"
_JOINED = re.compile(
    rf"{_GAP}(?:[,;]|,?\s*{_AND}){_GAP}|[ $]*"
    # "\boxed{1} papers and \boxed{2} bins", "y_1 = \boxed{2} and y_2 = \boxed{3}"
    rf"|{_GAP}(?:\w+ ){{0,3}}{_AND}{_GAP}(?:[a-zA-Z]\w{{0,2}}\s*=)?{_GAP}"
)
_MOST_BOXES = 20


def from_boxes(text: str) -> str | None:
    """The content of the last box, or of the last boxes if they are parts of one answer."""
    found = boxes(text, _MOST_BOXES)
    if not found:
        return None
    parts = [found[0].content or ""]
    for later, earlier in pairwise(found):
        between = text[earlier.end : later.start]
        joined = earlier.end <= later.start and len(between) <= 40 and _JOINED.fullmatch(between)
        if not earlier.content or not joined:
            break
        if between.strip(" $") or earlier.content.strip() != parts[-1].strip():
            parts.append(earlier.content)
    return ", ".join(reversed(parts))


def _from_boxes_or_later(text: str, or_later: bool) -> list[str] | None:
    content = from_boxes(text)
    if content is None:
        return None
    rest = text[boxes(text, 1)[0].end :]
    final = re.search(r"\bfinal answer\b[\s*_]*(?:is\b|[:：])", rest, re.IGNORECASE)
    return (_after_answer_is(rest) if final and or_later else None) or [content]


_ANSWER_IS = re.compile(
    r"(?:\banswers?\b(?:\s+(?:to|for|of|choice|option)\b[^.:\n]{0,60}?)?[\s*_]*(?:\b(?:is|are|was)\b"
    r"|[:=：])|答案\s*(?:是|为|[:：])|\bcorrect (?:option|choice|letter)\b[\s*_]*(?:is\b|:)|####"
    r"|\bfinal answer(?:[\s*_]*\n|\s+(?=[\d$\\-])))[\s*_:：]*",
    re.IGNORECASE,
)
_A_COLON = re.compile(r"^[ \t*_#>]*A[*_]*[ \t]?[:：][ \t*_]*(\S.*?)[ \t*_]*$", re.MULTILINE)
_DELIMITED = re.compile(r"\$\$(.+?)\$\$|\\\[(.+?)\\\]|\\\((.+?)\\\)", re.DOTALL)
_SENTENCE_END = re.compile(r"[.?](?=\s|$)|\n|,?\s+(?:because|since|which|so that|where)\b|,\s+so\b")


def _after_answer_is(text: str) -> list[str] | None:
    text = in_english(text[-_TAIL:])
    ends = [marker.end() for marker in _ANSWER_IS.finditer(text)]
    if not ends:
        return None
    rest = text[ends[-1] :]
    if delimited := _DELIMITED.match(rest):
        return [delimited[delimited.lastindex or 0]]
    end = _SENTENCE_END.search(rest)
    return _said(rest[: end.start() if end else None])


# A formula in single dollar signs stays on one line; a display formula may span several.
_FORMULA = re.compile(
    r"\$\$(.+?)\$\$|(?<!\\)\$((?:\\.|[^$\\\n])+)\$|\\\(([^\n]+?)\\\)|\\\[(.+?)\\\]"
    r"|\\begin\{(?:align|aligned|equation|gather)\*?\}(.+?)\\end\{",
    re.DOTALL,
)
_NUMBER = r"[-−+]?\s?[$€£]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:[.,]\d+)?(?:\s?/\s?\d+)?(?:\s?%|°)?"
_LONE_NUMBER = re.compile(rf"(?<![\w.,/^\\{{])(?=[-−+$€£.\d]){_NUMBER}(?![\w^/]*\d|[/^\\{{]|[a-eknt-z]\b)")
_SUM = re.compile(rf"(?:^|[\s(])[$\d][\d\s.,+*/×x·()$%−-]*=\s*(?P<total>{_NUMBER})(?![\w.,/^]*\d|[/^\\])(?!.*\d)")
_UNIT_AFTER = re.compile(r"\s?(?:(?:square|cubic|sq|cu)\.? )?[^\W\d_]+(?:[²³]|\^[23])?(?:/[^\W\d_]+)?")
_OPERATOR = re.compile(r"[=^\\<>|{}_]|\d\s*[+*×·/−-]|[+*×·/]\s*\d")
_GIVES = re.compile(
    r".*\b(?:is|are|was|were|be|equals?|equal to|it's|gives?|gets?|have|has)\b[\s:*_]*(?=\S)",
    re.IGNORECASE | re.DOTALL,
)
_HENCE = re.compile(r"\b(?:therefore|thus|hence|so|then|finally|in conclusion)\b[\s,:]*", re.IGNORECASE)
_CHOSEN = re.compile(r"\(([A-J])\)|\b(?:[Oo]ption|[Cc]hoice)\s+\(?\**([A-J])\b")
_REFUTED = re.compile(r"\b(?:false|wrong|incorrect|fausse|falsch|incorrecta)\b", re.IGNORECASE)
_INSTEAD = re.compile(r"[,(]\s*(?:and )?not\b|\b(?:rather than|instead of)\b")
# "is not 5", "step 5", and a sentence that was cut off: "so there are 5 of"
_UNSAID = re.compile(
    r"(?:\b(?:not|cannot|never|nor|than|at least|at most)|n't)\b(?:\s+(?:be|equal|to|option|choice))*"
    r"[\s$*\\(]*(?:-?\d[\d.,/]*(?!.*\d)|[A-J]\b)"
    r"|\b(?:step|page|case|figure|problem|question|part|equation|example)\s*\d"
    r"|(?:\b(?:of|the|to|and|or|is|are|an?|in|for|with|by|that|then|so|we|which)|[=+,:(-])$",
    re.IGNORECASE,
)
_LONGEST_SENTENCE = 2000
_MARKS = ' \t\n*_`"“”'
_POLITE = re.compile(r"\s*I hope (?:it|this|that)(?:'s| is) (?:correct|right|helpful)\.?\s*$")


def _content(formula: re.Match[str]) -> str:
    """What is between the delimiters; of several aligned lines the last."""
    content = formula[formula.lastindex or 0]
    return content if formula[5] is None else content.rpartition(r"\\")[2].replace("&", "")


def _bare(text: str) -> str:
    """Without Markdown marks, quotes and the final full stop (an ellipsis stays)."""
    text = text.replace('\\"', '"').strip(_MARKS)
    return text[:-1].rstrip(_MARKS) if text.endswith(".") and text[-2:] != ".." else text


def _said(sentence: str) -> list[str]:
    """Candidates in a sentence: all of it, what follows "is", its formula, number or letter."""
    if len(sentence) > _LONGEST_SENTENCE:
        return [sentence]
    sentence = _HENCE.sub("", _bare(_INSTEAD.split(sentence)[0]), count=1)
    if _UNSAID.search(sentence):
        return [sentence]
    if re.match(r"the\b", sentence, re.IGNORECASE) and (after := _GIVES.match(sentence)):
        return [*_said(sentence[after.end() :]), sentence]
    given = [sentence]
    if found := list(_FORMULA.finditer(sentence)):
        given = _formula_said(sentence, found) + given
    elif re.search(r"[^\W\d_]{2}|[\u0900-\u097f]", sentence):
        given += _number_said(sentence)
    letters = set() if _REFUTED.search(sentence) else {one or other for one, other in _CHOSEN.findall(sentence)}
    return given + (list(letters) if len(letters) == 1 else [])


def _formula_said(sentence: str, found: list[re.Match[str]]) -> list[str]:
    last, rest = found[-1], sentence[found[-1].end() :]
    if not re.search(r"[a-z]{2}", sentence[: last.start()] + rest):
        return []
    if len(found) > 1:
        between = sentence[found[-2].end() : last.start()]
        if rest.strip(_MARKS + ".") or re.fullmatch(r"\W*(?:and|or)?\W*", between):
            return []
    unit = re.fullmatch(r"\\?%|°|(?!(?:is|are|was)\b)[a-zA-Z./^²³ ]{1,20}", rest.strip())
    return [_content(last) + rest if unit else _content(last)]


def _number_said(sentence: str) -> list[str]:
    if after := _GIVES.match(sentence):
        rest = sentence[after.end() :]
        if re.match(r"[-−+$€£.(\d\\]", rest) and not re.search(r"\b(?:or|and|to|than)\b", rest):
            return [_bare(rest)]
    if sums := list(_SUM.finditer(sentence)):
        return [sums[-1]["total"]]
    found = [match for match in _LONE_NUMBER.finditer(sentence) if re.search(r"\d", match[0])]
    if len(found) != 1 or _OPERATOR.search(sentence):
        return []
    measured = _UNIT_AFTER.match(sentence, found[0].end())
    known = measured and (said := unit(measured[0])) and said.known
    return [found[0][0] + (measured[0] if measured and known else "")]


def _at_the_end(text: str, bare_limit: int) -> list[str] | None:
    text = _POLITE.sub("", in_english(text[-_TAIL:].strip()[-2 * _LONGEST_SENTENCE :])).strip()
    said: list[str] = []
    if yes_no := re.match(r"\W{0,3}((?:yes|no)\b[^.\n]{0,200})", text, re.IGNORECASE):
        said.append(yes_no[1])
    if len(text) <= bare_limit and "\n" not in text:
        return _said(text) + said
    sentence = re.split(r"\n|(?<=[.!?])[*$)\]]*\s+(?=[A-Z*])", text)[-1]
    if letter := re.fullmatch(r"[\s*_(]*([A-J])[\s*_).]*", sentence):
        return [letter[1]]
    if not re.search(r"[\d.!?)\]}$%°*`²³]$", text):  # cut off
        return said or None
    last = next(reversed(list(_FORMULA.finditer(text))), None)
    ending = r"[\s.*_]*(?:align|aligned|equation|gather)?[*}]*[\s.]*"
    if last and re.fullmatch(ending, text[last.end() :]):
        return [_content(last), *said]
    whole = _HENCE.sub("", _bare(sentence), count=1)
    words = re.search(r"[a-zA-Z]{2}", whole)
    return [part for part in _said(sentence) if part != whole or not words] + said or None


def _in_tag(text: str, tag: str) -> list[str] | None:
    end = text.rfind(f"</{tag}>")
    start = text.rfind(f"<{tag}>", 0, max(end, 0))
    return None if start < 0 else _said(in_english(text[start + len(tag) + 2 : end]))
