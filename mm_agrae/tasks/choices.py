"""Multiple choice in the shapes that data sets have: what the choices are, and which of them is the gold one."""

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from mm_agrae.errors import DataError
from mm_agrae.grading.equivalence import same
from mm_agrae.grading.extraction import final_answer
from mm_agrae.grading.quantities import Rules
from mm_agrae.tasks.rows import first_of, literal, show

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_LABELS = ("label", "key", "id", "letter")
_TEXTS = ("text", "value", "content", "answer")


def read_choices(values: Any, origin: str) -> tuple[list[str], list[str]]:
    """Texts of the choices without their letters ("" where a choice is only its letter), and the row's own labels of
    them; no labels if it has none. Raises DataError naming the row.

    Read are lists of texts, `{"A": text}`, `{"text": [...], "label": [...]}`, lists of such mappings of one choice,
    and texts that spell one of them or list the choices as "A. 12 B. 15".
    """
    given, labels = values, []
    if isinstance(values, str):
        values = literal(values) or _lettered(values)
    if isinstance(values, Mapping):
        text, label = first_of(values, _TEXTS), first_of(values, _LABELS)
        if isinstance(text, list) and isinstance(label, list) and len(text) == len(label):
            values, labels = text, label
        else:
            pairs = [(key, value) for key, value in values.items() if value is not None]
            if all(re.fullmatch("[A-Za-z]", str(key)) for key, _ in pairs):
                pairs.sort(key=lambda pair: str(pair[0]).upper())
            labels, values = [key for key, _ in pairs], [value for _, value in pairs]
    elif isinstance(values, list | tuple) and values and all(isinstance(value, Mapping) for value in values):
        labels = [first_of(value, _LABELS) for value in values]
        values = [first_of(value, _TEXTS) for value in values]
        labels = [] if None in labels else labels
    if not isinstance(values, list | tuple) or not all(isinstance(value, str | int | float) for value in values):
        raise DataError(f"{origin}: choices: expected a list of texts or a mapping of labels, got {show(given)}")
    if len(values) == 1 or len(values) > len(LETTERS):
        raise DataError(f"{origin}: choices: {len(values)} of them; 2 to 26 can be graded")
    texts = [str(value).strip() for value in values]
    lettered = zip(LETTERS, texts, strict=False)
    bare = [re.sub(rf"^\(?{letter}\s?(?:[).:]\s*|$)", "", text, flags=re.I) for letter, text in lettered]
    labelled = all(a != b for a, b in zip(texts, bare, strict=True))
    return bare if labelled else texts, [str(label).strip() for label in labels]


def _lettered(text: str) -> list[str] | None:
    """The choices in "A. 12 B. 15" or "a ) 12 , b ) 15"; None if the text does not list any."""
    parts, rest = [], text.strip()
    for letter, after in pairwise(LETTERS):
        start = re.match(rf"\(?{letter}\s?[).:]\s*", rest, re.I)
        if not start:
            return None
        end = re.search(rf"[\s,;]+(?=\(?{after}\s?[).:])", rest, re.I)
        parts.append(rest[start.end() : end.start() if end else None].strip(" ,;\n"))
        if not end:
            return parts
        rest = rest[end.end() :]
    return None


def gold_letters(answer: str, texts: Sequence[str], labels: Sequence[str], origin: str) -> str:
    """The gold answer as a letter (several as "C, D"), given as letters, labels, a choice's text or its value.

    Raises DataError for one that is no choice, or could be two.
    """
    letters = LETTERS[: len(texts)]
    letter_of = dict(zip(labels or letters, letters, strict=True))
    said = re.sub(r"(?:option|choice|answer)\b[\s:]*", "", final_answer(answer), count=1, flags=re.I).strip()
    for text in dict.fromkeys((answer, said)):
        if not labels and text in letter_of and text in texts and texts.index(text) != letters.index(text):
            raise DataError(
                f"{origin}: answer: {show(answer)} is the letter of one choice and the text of another; "
                "write the gold answers as texts, or choices without single letters"
            )
        if found := _letters_of(text, texts, letter_of):
            return ", ".join(found)
    position = "; if it is the position of the choice, set choice_index: 0, or 1 to count from 1"
    raise DataError(
        f"{origin}: answer: {show(answer)} is neither a letter up to {letters[-1]} nor the text of one choice"
        f"{position if answer.isdecimal() else ''}; for a free answer set columns: {{choices: null}}"
    )


def _letters_of(answer: str, texts: Sequence[str], letter_of: Mapping[str, str]) -> list[str]:
    """Letters of the choices that a gold answer names; none if it names none or is not clear."""
    text_of = dict(zip(LETTERS, texts, strict=False))
    parts = [part for word in re.split(r"[\s,;]+|\band\b", answer) if (part := word.strip("()[].:* "))]
    if parts and set(parts) <= letter_of.keys():
        return [letter_of[part] for part in parts]
    if named := [letter for letter, text in text_of.items() if text == answer]:
        return named if len(named) == 1 else []
    upper = {label.upper(): letter for label, letter in letter_of.items()}
    if parts and all(len(part) == 1 and part.upper() in upper for part in parts):
        return [upper[part.upper()] for part in parts]
    if len(answer) > 1 and len(set(answer)) == len(answer) and set(answer) <= text_of.keys():
        return list(answer)
    lettered = re.match(r"\(?([A-Za-z])\s*[).:–-]\s*(?=\S)", answer)
    letter = upper.get(lettered[1].upper()) if lettered else None  # "B. 6": letter and text must agree
    if lettered and letter and (not text_of[letter] or _means(text_of[letter], answer[lettered.end() :])):
        return [letter]
    by_value = [letter for letter, text in text_of.items() if _means(text, answer)]
    return by_value if len(by_value) == 1 else []


def _means(text: str, said: str) -> bool:
    return same(text, said, Rules(), lambda *_: False)
