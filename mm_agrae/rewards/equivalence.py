r"""Do two written answers say the same thing?

`same` brings both to one notation (`normalise`), takes them apart (lists, tuples, sets, intervals,
matrices) and compares the leaves: as exact rational numbers with units, as text, and only where
neither decides by `symbolic`, which parses with math-verify's LaTeX grammar and lets sympy decide.
Nothing here evaluates text as code, and numbers are never compared as floats.

`same` and everything above `symbolic` is plain string work, linear in the text. `symbolic` can
take any time and memory, so it belongs into a process with limits (`mm_agrae.rewards.pool`).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise
from typing import Any, Literal, NamedTuple

Units = Literal["auto", "ignore", "required"]


@dataclass(frozen=True)
class Rules:
    """What counts as the same. See `mm_agrae.rewards.accuracy.verify`."""

    tolerance: float | None = None
    units: Units = "auto"


Symbolic = Callable[[str, str, float | None], bool]

# ------------------------------------------------------------------------- one notation

_UNICODE = {
    **{"−": "-", "–": "-", "‐": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": "/"},
    **{"π": r"\pi ", "θ": r"\theta ", "∞": r"\infty ", "√": r"\sqrt ", "°": r"^\circ "},
    **{"≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "≈": r"\approx ", "±": r"\pm ", "∠": r"\angle "},
    **{"∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "∅": r"\emptyset ", "ℝ": r"\mathbb{R}"},
    **{"½": r"\frac{1}{2}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}", "⅓": r"\frac{1}{3}"},
    **{"²": "^2", "³": "^3", "⁴": "^4", "，": ",", "：": ":", "（": "(", "）": ")", "％": "%"},
    **{"€": "", "£": "", "’": "'", "\u00a0": " ", "\u202f": " ", "\u2009": " "},
    **{chr(0xFF10 + digit): str(digit) for digit in range(10)},
    # Invisible and harmless: soft hyphen, zero-width space and joiners, byte order mark.
    **dict.fromkeys("\u00ad\u200b\u200c\u200d\u2060\ufeff", ""),
}
_TRANSLATE = str.maketrans(_UNICODE)

_NOT_LETTER = r"(?![a-zA-Z])"
_REWRITES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r"(?<!\\)\\[()\[\]]|\\?\$", ""),  # math delimiters and the dollar sign of money
        (r"\\(?:left|right)\s*\.", ""),
        (rf"\\(?:left|right|[bB]igg?[lr]?|middle){_NOT_LETTER}\s*", ""),
        (r"(?<=\d)(?:,\s*\\!|\{\s*,\s*\}|\\,)\s*(?=\d{3}(?!\d))", ""),  # marked thousands
        (r"\\!", ""),
        (
            r"(?<!\\)\\[,:;> ]|~|\s+|\\(?:q?quad|displaystyle|textstyle|limits|phantom|hline)"
            + _NOT_LETTER,
            " ",
        ),
        (r"\\[dtc]frac", r"\\frac"),
        (
            r"\\(?:text(?:normal|bf|it|rm|sf|tt|up)|math(?:rm|bf|it|sf|tt|normal)|mbox|hbox"
            r"|boldsymbol|bm|text)\s*(?=\{)|\\operatorname\*?\s*(?=\{(?!\w+\}\s*[({\\\[]))",
            r"\\text",
        ),
        (r"\{\s*\\(?:rm|bf|it)\s+", r"\\text{"),
        (r"\\%", "%"),
        (r"(?i)(?<![a-z])\s*(?:per\s?cent(?:age)?|pct)(?![a-z])", "%"),
        (r"\\text\{\s*%\s*\}", "%"),
        (r"\^\s*\{?\s*\\circ\s*\}?|\\degree(?![a-z])", r"^\\circ "),
        (rf"\\leqq|\\leq(?:slant)?{_NOT_LETTER}|<=", r"\\le "),
        (rf"\\geqq|\\geq(?:slant)?{_NOT_LETTER}|>=", r"\\ge "),
        (rf"\\(?:neq){_NOT_LETTER}|!=", r"\\ne "),
        (r"\\varnothing", r"\\emptyset"),
        (rf"\\lt{_NOT_LETTER}", "<"),
        (rf"\\gt{_NOT_LETTER}", ">"),
        (rf"\\lbrace{_NOT_LETTER}", r"\\{"),
        (rf"\\rbrace{_NOT_LETTER}", r"\\}"),
        (rf"\\langle{_NOT_LETTER}", "("),
        (rf"\\rangle{_NOT_LETTER}", ")"),
        (rf"\\[lr]vert{_NOT_LETTER}", "|"),
        (r"(?i)(?<=\d)\s*(?:\\text\{\s*)?([ap])(?:\.\s?)?m\b\.?(?:\s*\})?", r" \1m"),
        (r"\*\*", "^"),
        (r"\*", r"\\cdot "),
        (r"(?<![\\a-zA-Z])pi(?![a-zA-Z])", r"\\pi "),
        (r"(?<![\\a-zA-Z])(?:infinity|inf|oo)(?![a-zA-Z])", r"\\infty "),
        (r"\\?(?<![a-zA-Z])sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"\\sqrt\s*(\d+|[a-z](?![a-z]))", r"\\sqrt{\1}"),
        (r"\^\s*(-\s*(?:\d+|[a-z])|\d{2,})", r"^{\1}"),
        (r"\.{3,}|\\(?:[lc]?dots)(?![a-z])", r" \\dots "),
        (r"\\frac\s*(\w)\s*(\w)", r"\\frac{\1}{\2}"),
        (r"\\frac\s*(\w)\s*(?=\{)", r"\\frac{\1}"),
        (r"(\\frac\s*\{[^{}]*\})\s*(\w)", r"\1{\2}"),
        # "a, b and c", "a or b": one way of writing a list
        (r"\s*,?\s*\\text\{\s*,?\s*(?:and|or)?\s*,?\s*\}\s*", ", "),
        (r"\s*,?\s*(?<![a-zA-Z\\])(?:and|or)(?![a-zA-Z])\s*", ", "),
        (r"\s*;\s*", ", "),
        (r" {2,}", " "),
    ]
]


# "for all n", ", k \in \mathbb{Z}": for which unknowns a formula holds, said after it.
_UNKNOWNS = r"[a-zA-Z](?:\s*,\s*[a-zA-Z])*"
_IN_NUMBERS = r"\s*\\in\s*\\mathbb\s*\{?\s*[A-Z]\s*\}?[\^_+*\s{}\d]*"
_QUALIFIER = re.compile(
    rf"(?:\s*,?\s*(?:\\text\{{\s*,?\s*(?:for|where|with)(?: all| any| every| some)?\s*\}}|\\forall)"
    rf"\s*{_UNKNOWNS}(?:{_IN_NUMBERS})?|\s*,\s*{_UNKNOWNS}{_IN_NUMBERS})$"
)


@lru_cache(maxsize=4096)
def normalise(text: str) -> str:
    """One notation for LaTeX, Unicode and plain writing: spacing, sizes, fonts, short forms."""
    text = text.translate(_TRANSLATE)
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    text = re.sub(r"^\s*(?:=|\\approx|(?:approximately|about) )\s*", "", text)
    text = re.sub(r"(?:(?<!\\)[\s.,:]|\\\\)+$", "", text).strip()
    text = _QUALIFIER.sub("", text)
    while (inner := _enclosed(text, "{", "}")) is not None:
        text = inner.strip()
    # A list or a number set in text as a whole is a list or a number.
    inner = _enclosed(text, r"\text{", "}")
    return text if inner is None or not re.match(r"[^{}]*,|\s*[\d.+-]", inner) else inner.strip()


def _enclosed(text: str, opening: str, closing: str) -> str | None:
    """What stands between the brackets if one pair encloses the whole text."""
    if not (text.startswith(opening) and text.endswith(closing)):
        return None
    inner = text[len(opening) : len(text) - len(closing)]
    depth = 0
    for token in re.findall(r"\\?.", inner, re.DOTALL):
        depth += (token[-1] in "([{") - (token[-1] in ")]}")
        if depth < 0:
            return None
    return inner if depth == 0 else None


def _split(text: str, separator: str) -> list[str]:
    """Split at a separator (regex) outside of all brackets; no split if they do not match up."""
    parts, depth, start = [], 0, 0
    for match in re.finditer(rf"({separator})|\\?[([{{]|\\?[)\]}}]", text):
        if match[1] is not None:
            if depth == 0:
                parts.append(text[start : match.start()].strip())
                start = match.end()
        else:
            depth += 1 if match[0][-1] in "([{" else -1
            if depth < 0:
                return [text]
    parts.append(text[start:].strip())
    return parts if depth == 0 else [text]


def _compact(text: str) -> str:
    """No spaces, save between digits, and no text mark-up: for telling identical writing."""
    text = re.sub(r"\\text\{\s*(.*?)\s*\}|(?<!\d)\s+|\s+(?!\d)", r"\1", text)
    return re.sub(r"([_^])\{(\w)\}(?!\w)", r"\1\2", text)


# ---------------------------------------------------------------------------------- text

_ARTICLES = {"a", "an", "the"}
_WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen twenty"
)
_NUMBER_WORDS = {word: str(value) for value, word in enumerate(_WORDS.split())}
_FUNCTIONS = re.compile(
    r"\\(?:begin|end)\{\w+\}|\\(?!text)[a-zA-Z]+|(?<![a-zA-Z])(?:a?(?:rc)?(?:sin|cos|tan|cot|sec|csc)h?|sqrt|log|ln|exp"
    r"|max|min|gcd|lcm|mod)(?![a-zA-Z])"
)


def as_text(text: str) -> str:
    """Words alone: no case, articles, punctuation or spaces; "four" is 4 and "4th" is 4."""
    text = re.sub(r"\\text\{([^{}]*)\}", r" \1 ", text).lower()
    text = re.sub(r"(?<=\d)(?:st|nd|rd|th)\b", "", text)
    text = re.sub(r"[^\w.:%+\-]+", " ", text)
    text = re.sub(r"(?<!\d)[.:]|[.:](?!\d)", "", text)
    text = re.sub(r"-(?!\d)|(?<=\w)-", " ", text)
    words = [_NUMBER_WORDS.get(word, word) for word in text.split() if word not in _ARTICLES]
    return "".join(words)


def _wordy(text: str) -> bool:
    """Whether this is words and not a formula. Short lower-case runs like xy are products."""
    if re.search(r"\\text\{[^{}]*[^\W\d_]{2}|\d [APap]m$", text):
        return True
    if re.fullmatch(r"[^\W\d_]{3,}", text):
        return True
    formula = re.search(r"[\d+=^{}/\\|<>]", text) is not None
    for word in re.findall(r"[^\W\d_]+", _FUNCTIONS.sub(" ", text)):
        if len(word) > 3 or not word.isascii() or word.lower() in _NUMBER_WORDS:
            return True
        if len(word) > 1 and not word.islower() and not formula:
            return True
    return False


# ------------------------------------------------------------------------------- numbers


class Number(NamedTuple):
    """An exact rational. `step` is the last place of a decimal, None for an exact number."""

    value: Fraction
    step: Fraction | None = None
    digits: int = 0  # significant ones of a decimal

    def times(self, factor: Fraction) -> Number:
        step = None if self.step is None else self.step * abs(factor)
        return Number(self.value * factor, step, self.digits)


_DECIMAL = r"(?:\d{1,3}(?:(?:,\d{3})+|(?: \d{3})+)(?:\.\d*)?|\d+(?:\.\d*)?|\.\d+)"
_NUMBER = re.compile(
    rf"(?P<sign>[+-]?)\s*(?:(?P<decimal>{_DECIMAL})"
    r"(?:\s*(?:\\times|\\cdot|x)\s*10\s*\^\s*\{?\s*(?P<power>[+-]?\s*\d{1,4})\s*\}?"
    r"|[eE](?P<e>[+-]?\d{1,4}))?"
    r"|(?:(?P<whole>\d+)\s*)?\\frac\s*"
    rf"\{{\s*(?P<p>[+-]?\s*{_DECIMAL})\s*\}}\s*\{{\s*(?P<q>[+-]?\s*{_DECIMAL})\s*\}}"
    rf"|(?:(?P<whole2>\d+)\s+)?(?P<p2>{_DECIMAL})\s*/\s*(?P<q2>{_DECIMAL}))",
    re.ASCII,
)
# Python refuses to read longer integers, and no answer needs them.
_MOST_DIGITS = 4000


def number(text: str) -> Number | None:
    r"""Read 5, -1,234.50, 3/4, \frac{3}{4}, 1\frac{3}{4}, 1 3/4, 1.5 \times 10^{3}; else None."""
    if len(text) > _MOST_DIGITS:
        return None
    match = _NUMBER.fullmatch(text)
    if match is None:
        return None
    sign = -1 if match["sign"] == "-" else 1
    if match["decimal"]:
        digits = re.sub("[, ]", "", match["decimal"])
        exponent = int((match["power"] or match["e"] or "0").replace(" ", ""))
        places = len(digits.partition(".")[2])
        scale = Fraction(10) ** (exponent - places)
        whole = int(digits.replace(".", ""))
        if places == 0:
            return Number(sign * whole * scale)
        return Number(sign * whole * scale, scale, len(str(whole)))
    p = match["p"] or match["p2"]
    q = match["q"] or match["q2"]
    p, q = (Fraction(re.sub("[, ]", "", part)) for part in (p, q))
    if q == 0:
        return None
    return Number(sign * (int(match["whole"] or match["whole2"] or 0) + p / q))


def agree(gold: Number, answer: Number, tolerance: float | None = None) -> bool:
    """Equal, or as near as rounding explains.

    With a `tolerance`: within that fraction of the gold. Without one: integers are exact. Other
    exact numbers also take a decimal that they round to, of at least six places and four
    significant digits. A decimal gold of at least three significant digits also takes a more
    precise answer that rounds to it and is within 0.1 % of it.
    """
    gap = abs(gold.value - answer.value)
    if gap == 0:
        return True
    if tolerance is not None:
        return gap <= Fraction(tolerance) * abs(gold.value)
    if gold.step is not None:
        finer = answer.step is None or answer.step < gold.step
        return finer and gold.digits >= 3 and 2 * gap <= gold.step and 1000 * gap <= abs(gold.value)
    if answer.step is not None and gold.value.denominator != 1:
        fine = answer.step <= Fraction(1, 10**6) and answer.digits >= 4
        return fine and 2 * gap <= answer.step
    return False


_BASED = re.compile(r"(-?)0*([0-9A-Za-z]+(?:\.[0-9A-Za-z]+)?)_\{?(\d{1,2}|two|three|eight)\}?")
_BASES = {"two": 2, "three": 3, "eight": 8}


def _based(text: str) -> tuple[str, int] | None:
    """1101_2 as ("1101", 2): digits that are valid in the base."""
    match = _BASED.fullmatch(_compact(text).replace(",", ""))
    if match is None:
        return None
    base = _BASES.get(match[3]) or int(match[3])
    valid = "0123456789abcdefghijklmnopqrstuvwxyz"[:base]
    if base < 2 or base > 36 or set(match[2].lower()) - set(valid) - {"."}:
        return None
    return match[1] + match[2].lower(), base


# --------------------------------------------------------------------------------- units


class Unit(NamedTuple):
    dimension: frozenset[tuple[str, int]]  # such as {("length", 1), ("time", -1)}
    factor: Fraction  # in the base unit of the dimension
    known: bool


_UNIT_TABLE = """
length 1        m meter metre
length 1000     km kilometer kilometre
length 1/10     dm decimeter decimetre
length 1/100    cm centimeter centimetre
length 1/1000   mm millimeter millimetre
length 127/5000 in inch inche
length 381/1250 ft foot feet
length 1143/1250 yd yard
length 201168/125 mi mile
mass 1          g gm gram
mass 1000       kg kilogram
mass 1/1000     mg milligram
mass 45359237/100000 lb lbs pound
mass 45359237/1600000 oz ounce
time 1          s sec second
time 60         min minute
time 3600       h hr hour
time 86400      day
time 604800     week
calendar 1      month
calendar 12     year yr
am 1            am
pm 1            pm
celsius 1       celsius
fahrenheit 1    fahrenheit
volume 1        l liter litre
volume 1/1000   ml milliliter millilitre
angle 1         degree deg
money 1         dollar usd
money 1/100     cent
euro 1          euro
unit 1          unit
"""
_UNITS = {
    name: (line.split()[0], Fraction(line.split()[1]))
    for line in _UNIT_TABLE.strip().splitlines()
    for name in line.split()[2:]
}
_SHORTHAND = {"mph": "mile/hour", "kmh": "km/hour", "kph": "km/hour", "cc": "cm^3"}
_ONE_UNIT = re.compile(
    r"(square|sq|cubic|cu)?\s*(.*?)\s*(squared|cubed)?\s*(?:\^?\s*\{?\s*([23])\s*\}?)?"
)
_POWERS = {"square": 2, "sq": 2, "squared": 2, "cubic": 3, "cu": 3, "cubed": 3}


@lru_cache(maxsize=1024)
def unit(text: str) -> Unit | None:
    """Read cm, "square feet", km/h, "miles per hour", apples. None if these are no words."""
    text = re.sub(r"[.~]|\\(?:cdot|text)", " ", text.lower()).replace("{", "").replace("}", "")
    text = " ".join(text.split())
    text = re.sub(r"\b([ap]) m\b", r"\1m", text)
    text = _SHORTHAND.get(text, text)
    dimension: dict[str, int] = {}
    factor, known = Fraction(1), True
    for position, part in enumerate(re.split(r"\s*/\s*|\s+per\s+|\s+an?\s+", text)):
        match = _ONE_UNIT.fullmatch(part)
        assert match is not None  # every group may be empty
        power = _POWERS.get(match[1] or match[3] or "") or int(match[4] or 1)
        words = re.findall(r"[^\W\d_]+", match[2])
        if not words:
            return None
        name = words[-1]
        singular = name[:-1] if len(name) > 2 and name.endswith("s") and name[-2] != "s" else name
        kind, size = _UNITS.get(name) or _UNITS.get(singular) or ("", Fraction(1))
        known = known and bool(kind)
        power = -power if position else power
        dimension[kind or singular] = dimension.get(kind or singular, 0) + power
        factor *= size**power
    return Unit(frozenset(dimension.items()), factor, known)


def _ratio(gold: Unit | None, answer: Unit | None, rules: Rules) -> Fraction | None:
    """What to multiply the answer by to have it in the gold's unit; None if that cannot be."""
    if rules.units == "ignore":
        return Fraction(1)
    if gold is None or answer is None:
        return None if gold is not None and rules.units == "required" else Fraction(1)
    if gold.dimension == answer.dimension:
        return answer.factor / gold.factor
    names = {name for name, _ in gold.dimension | answer.dimension}
    # 5 units may be 5 cm, 20° may be 20 °C; "18 ways" and "18 orders" count the same things.
    vague = "unit" in names or {"angle"} < names <= {"angle", "celsius", "fahrenheit"}
    return Fraction(1) if vague or not (gold.known or answer.known) else None


class Quantity(NamedTuple):
    head: str
    unit: Unit | None = None
    percent: bool = False


_DEGREES = re.compile(r"(.*\S)\s*\^\\circ\s*(?:\\text\{\s*)?([TCF]?)\s*\}?")
_TEXT_UNIT = re.compile(
    r"(.*?[^\s/])((?:\s*/?\s*\\text\{[^{}]*\}\s*(?:\^\s*\{?\s*-?\d\s*\}?)?)+)\s*", re.DOTALL
)
_PLAIN_UNIT = re.compile(
    r"(.*(?:[\d)}\]]|\\pi))(\s*)([A-Za-z]+(?:\.? [A-Za-z]+)*\.?(?:\s*\^?\s*\{?[23]\}?)?"
    r"(?:\s*/\s*[A-Za-z]+)?)"
)


# Text after a formula that says more than what is counted.
_NO_UNIT = re.compile(
    r"\\text\{\s*.{0,2}\}|\b(?:if|for|when|where|otherwise|is|are|to|at|not|no)\b"
)


@lru_cache(maxsize=4096)
def quantity(text: str) -> Quantity:
    r"""Take the unit off: 5\text{ cm}^2, 12 cm, 120^\circ, 50%, 24 apples. Variables stay."""
    if text.endswith("%"):
        return Quantity(text[:-1].strip(), percent=True)
    if (match := _DEGREES.fullmatch(text)) and not re.search("sin|cos|tan|cot|sec|csc", text):
        scale = {"C": "celsius", "F": "fahrenheit"}.get(match[2], "degree")
        return Quantity(match[1], unit(scale))
    match = _TEXT_UNIT.fullmatch(text)
    found = unit(match[2]) if match else None
    if match and found:
        # "3\text{i}" is a symbol in an upright font, "2\text{ dogs}" a count.
        symbol = re.fullmatch(r"\s*\\text\{\s*[eixyz]\s*\}\s*", match[2])
        counted = not symbol if number(match[1]) else not _NO_UNIT.search(match[2])
        if found.known or counted:
            return Quantity(match[1].strip(), found)
    match = _PLAIN_UNIT.fullmatch(text)
    found = unit(match[3]) if match else None
    if match and found:
        head, space, name = match.groups()
        counted = number(head) is not None and re.match(r"[a-zA-Z]{3,}", name) is not None
        # 5m is a product, 5 m and 5m^2 are measured; R^2 h is a product again.
        measured = len(name) > 1 or bool(space)
        if len(name.rstrip("^{}23 ")) == 1:
            measured = measured and not _letters(head)
        if (found.known and measured) or counted:
            return Quantity(head.strip(), found)
    return Quantity(text)


def _same_quantity(gold: Number, answer: Number, percent: tuple[bool, bool], rules: Rules) -> bool:
    """A percent sign on one side alone is either a unit left out or a hundredth."""
    if percent[0] == percent[1]:
        return agree(gold, answer, rules.tolerance)
    hundredth = Fraction(1, 100)
    if percent[0]:
        by_value = agree(gold.times(hundredth), answer, rules.tolerance)
    else:
        by_value = agree(gold, answer.times(hundredth), rules.tolerance)
    return by_value or (rules.units != "required" and agree(gold, answer, rules.tolerance))


# ---------------------------------------------------------------------------- structures

_MATRIX = re.compile(
    r"\\begin\{([pbB]?matrix|array)\}(?:\{[lcr| ]*\})?((?:(?!\\begin).)*)\\end\{\1\}", re.DOTALL
)
_COMMA = r",(?!(?<=\d,)\d{3}(?!\d))"  # not the one of 1,234
_ANY_COMMA = ","
_BRACKETS = {"()", "[]", "(]", "[)"}


def _structure(text: str, comma: str) -> tuple[str, list[str]]:
    """The outermost structure: "scalar", "list", "set", "union", a pair of brackets or a matrix."""
    matrix = _enclosed(text, "[", "]") or _enclosed(text, "(", ")") or text
    if match := _MATRIX.fullmatch(matrix.strip()):
        rows = [row for row in re.split(r"\\\\(?:\[[^\]]*\])?", match[2]) if row.strip()]
        cells = [[cell.strip() for cell in row.split("&")] for row in rows]
        shape = "/".join(str(len(row)) for row in cells)
        return f"matrix {shape}", [cell for row in cells for cell in row]
    if (inner := _enclosed(text, r"\{", r"\}")) is not None:
        if re.search(r"\\mid|[|:]", inner):
            return "scalar", [text]
        return "set", _both_signs(_split(inner, comma))
    if text[:1] in "([" and text[-1:] in ")]" and text:
        inner = _enclosed(text, text[0], text[-1])
        if inner is not None:
            parts = _split(inner, comma)
            if len(parts) > 1:
                return text[0] + text[-1], parts
            if text[0] == "(":
                return _structure(inner.strip(), comma)
    parts = _split(text, r"\\cup(?![a-z])")
    if len(parts) > 1:
        return "union", parts
    parts = _both_signs(_split(text, comma))
    return ("list", parts) if len(parts) > 1 else ("scalar", [text])


def _both_signs(parts: list[str]) -> list[str]:
    """The parts that are not empty, with two for each that holds one plus-minus sign."""
    both: list[str] = []
    for part in filter(None, parts):
        if part.count(r"\pm") + part.count(r"\mp") == 1:
            both += [re.sub(r"\\[pm]{2}\s*", sign, part).lstrip("+") for sign in ("+", "-")]
        else:
            both.append(part)
    return both


_RELATION = re.compile(r"\\le(?![a-z])|\\ge(?![a-z])|\\ne(?![a-z])|<|>")
_SET_LIKE = re.compile(
    r"\\(?:le|ge|ne|cup|cap|setminus|backslash|mathbb|emptyset|varnothing|in|infty|mid)(?![a-z])"
    r"|[<>:]"
)


def _interval(text: str) -> str | None:
    r"""-2 \le x < 7 as [-2,7), and x \ne 2 as a union; None if this is no such inequality."""
    operators = _RELATION.findall(text)
    parts = [part.strip() for part in _RELATION.split(text)]
    if not 1 <= len(operators) <= 2 or not all(parts):
        return None
    if {r"\ge", ">"} >= set(operators):
        flip = {r"\ge": r"\le", ">": "<"}
        parts.reverse()
        operators = [flip[operator] for operator in reversed(operators)]
    variables = [bool(re.fullmatch(r"[a-zA-Z]|\\(?!pi|infty)[a-z]+", part)) for part in parts]
    bounds = [part for part, variable in zip(parts, variables, strict=True) if not variable]
    if sum(variables) != 1 or any(re.search(r"(?<![a-zA-Z\\])[a-zA-Z]", b) for b in bounds):
        return None
    if operators == [r"\ne"]:
        return rf"(-\infty,{bounds[0]}) \cup ({bounds[0]},\infty)"
    if r"\ne" in operators or r"\ge" in operators or ">" in operators:
        return None
    where = variables.index(True)
    if len(parts) == 3 and where != 1:
        return None
    low = "(-\\infty" if where == 0 else ("(" if operators[where - 1] == "<" else "[") + parts[0]
    high = (
        "\\infty)"
        if where == len(parts) - 1
        else (parts[-1] + (")" if operators[where] == "<" else "]"))
    )
    return f"{low},{high}"


def _as_set(text: str) -> str:
    r"""Inequalities in one unknown, and x \in S, in the notation of intervals."""
    text = re.sub(r"^[a-zA-Z]\s*\\in(?![a-z])\s*", "", text)
    text = re.sub(r"^\\mathbb\s*\{?R\}?$", r"(-\\infty,\\infty)", text)
    if _RELATION.search(text) is None:
        return text
    parts = [_interval(part) for part in _split(text, ",")]
    found = [part for part in parts if part is not None]
    return r" \cup ".join(found) if len(found) == len(parts) else text


# ---------------------------------------------------------------------------- comparison

_LABEL = re.compile(
    r"(?:m\s*)?(?:\\(?:angle|triangle|overline|vec|hat|bar)\s*)?\{?\s*"
    r"(?:\\text\{[^{}]*\}|\\[a-zA-Z]+|[A-Za-z][A-Za-z ]*)\s*\}?(?:_\s*(?:\w|\{[^{}]*\}))?'*"
    r"(?:\^\s*\{?-1\}?)?(?:\s*\(\s*\w+(?:\s*,\s*\w+)*\s*\))?"
    r"|\(\s*[a-z](?:\s*,\s*[a-z])+\s*\)"
)
_SYMBOL = re.compile(r"(?:\\[a-zA-Z]+|[A-Za-z])(?:_\s*(?:\w|\{[^{}]*\}))?")


_NUMERIC = re.compile(r"(?:[\d\s.,+\-/^{}()%!]|\\(?:frac|sqrt|pi|cdot|times|circ)(?![a-z]))+")


def _letters(text: str) -> set[str]:
    return set(re.findall(r"[a-zA-Z]", re.sub(r"\\[a-zA-Z]+", "", text)))


def _value_of(sides: list[str], other: str) -> str | None:
    """What an equation gives as its value: the right side of x = 5 or a + b = 5, not of x^2 = 4."""
    left, right = sides[0], sides[-1]
    if _LABEL.fullmatch(left):
        return right
    if _SYMBOL.fullmatch(right) and not _letters(left):
        return left
    if _RELATION.search(left) or "," in left or r"\text" in left:
        return None
    letters = _letters(left)
    solved = len(letters) != 1 or r"\sin" in left or r"\cos" in left or r"\tan" in left
    return right if solved or letters <= _letters(other) else None


def _without_labels(gold: str, answer: str) -> tuple[str, str] | None:
    """Drop x =, Area =, f(x) = where they only name the value; None if the names disagree."""
    sides_gold, sides_answer = _split(gold, "="), _split(answer, "=")
    if all(map(_NUMERIC.fullmatch, sides_gold)):
        sides_gold = sides_gold[-1:]  # 14/25 = 0.56
        gold = sides_gold[0]
    several = any(len(_split(side, ",")) > 1 for side in sides_gold[1:-1] + sides_answer[1:-1])
    if several or len(sides_gold) == 1 == len(sides_answer):  # several: x = 1, y = 2
        return gold, answer
    if len(sides_gold) > 1 and len(sides_answer) > 1:
        names = [sides_gold[0], sides_answer[0]]
        if not all(_LABEL.fullmatch(name) for name in names):
            return gold, answer
        symbols = all(_SYMBOL.fullmatch(name) for name in names)
        if symbols and _compact(names[0]) != _compact(names[1]):
            return None
    if len(sides_gold) > 1 and _LABEL.fullmatch(sides_gold[0]):
        gold = _value_of(sides_gold, answer) or gold
    if len(sides_answer) > 1:
        value = _value_of(sides_answer, gold)
        if value is None and len(_split(answer, ",")) == 1 and len(_split(gold, "=")) == 1:
            return None
        answer = value or answer
    return gold, answer


def _leaf(gold: str, answer: str, rules: Rules, symbolic: Symbolic) -> bool:
    if _compact(gold) == _compact(answer):
        return True
    stripped = _without_labels(gold, answer)
    if stripped is None:
        return False
    gold, answer = stripped
    g, a = quantity(gold), quantity(answer)
    g_number, a_number = number(g.head), number(a.head)
    ratio = _ratio(g.unit, a.unit, rules)
    if g_number and a_number:
        if ratio is None:
            return False
        return _same_quantity(g_number, a_number.times(ratio), (g.percent, a.percent), rules)
    g_based, a_based = _based(gold), _based(answer)
    if g_based or a_based:
        g_digits, g_base = g_based or (_compact(gold).lower(), 0)
        a_digits, a_base = a_based or (_compact(answer).lower(), 0)
        return g_digits == a_digits and 0 in (g_base, a_base, g_base - a_base)
    if _wordy(g.head) or _wordy(a.head):
        return as_text(gold) == as_text(answer) != ""
    g_parts, a_parts = _split(gold, ":"), _split(answer, ":")
    if len(g_parts) == 2 or len(a_parts) == 2:
        if all(re.fullmatch(r"\d{1,2}:\d\d", text) for text in (gold, answer)):
            return False  # times of day
        return _same_proportion(g_parts, a_parts, rules, symbolic)
    if ratio == 1 and g.percent == a.percent and symbolic(g.head, a.head, rules.tolerance):
        return True
    # "3 s^2" may be seconds or three times a variable, as the other side has it.
    either = (g.unit is None) != (a.unit is None)
    return either and symbolic(gold, answer, rules.tolerance)


def _same_proportion(gold: list[str], answer: list[str], rules: Rules, symbolic: Symbolic) -> bool:
    """2:3 against 4:6 or 2/3; times such as 3:30 are equal as written or not at all."""
    fractions = [
        rf"\frac{{{parts[0]}}}{{{parts[1]}}}" if len(parts) == 2 else parts[0]
        for parts in (gold, answer)
    ]
    if len(gold) > 2 or len(answer) > 2 or not all(gold + answer):
        return False
    return _leaf(fractions[0], fractions[1], rules, symbolic)


def _by_name(items: list[str]) -> bool:
    """Whether the items are values of different unknowns."""
    names = [_split(item, "=") for item in items]
    return all(len(sides) > 1 for sides in names) and len({sides[0] for sides in names}) > 1


def _compare(gold: str, answer: str, comma: str, rules: Rules, symbolic: Symbolic) -> bool:
    g_kind, g_items = _structure(gold, comma)
    a_kind, a_items = _structure(answer, comma)

    def equal(g: str, a: str) -> bool:
        g, a = g.strip(), a.strip()
        if _structure(g, comma)[0] == "scalar" == _structure(a, comma)[0]:
            return _leaf(g, a, rules, symbolic)
        return _compare(g, a, comma, rules, symbolic)

    def ordered() -> bool:
        return len(g_items) == len(a_items) and all(map(equal, g_items, a_items))

    def unordered() -> bool:
        left = list(a_items)
        if len(g_items) != len(left):
            return False
        if _by_name(g_items) != _by_name(a_items):
            return ordered()  # x = 1, y = 2 against 1, 2
        for g in g_items:
            found = next((a for a in left if equal(g, a)), None)
            if found is None:
                return False
            left.remove(found)
        return True

    if g_kind == "scalar" == a_kind:
        return _leaf(g_items[0], a_items[0], rules, symbolic)
    if g_kind.startswith("matrix") or a_kind.startswith("matrix"):
        if "scalar" in (g_kind, a_kind) and "matrix}" in gold and "matrix}" in answer:
            return symbolic(gold, answer, rules.tolerance)  # a sum or product of matrices
        return g_kind == a_kind and ordered()
    loose = {"list", "set"}
    if g_kind in _BRACKETS and a_kind in _BRACKETS:
        return g_kind == a_kind and ordered()
    if g_kind == "()" and a_kind == "list":
        return ordered()
    if g_kind == "list" and (a_kind == "()" or (a_kind == "[]" and len(a_items) > 2)):
        return unordered()
    if g_kind in loose and a_kind in loose:
        return unordered()
    if "union" in (g_kind, a_kind) and {g_kind, a_kind} <= {"union", *loose} and unordered():
        return True
    for kind, items, other in ((g_kind, g_items, answer), (a_kind, a_items, gold)):
        if kind == "set" and len(items) == 1:
            first, second = (items[0], other) if kind == g_kind else (other, items[0])
            return equal(first, second)
    if _SET_LIKE.search(gold) and _SET_LIKE.search(answer):
        return symbolic(gold, answer, rules.tolerance)
    return False


def same(gold: str, answer: str, rules: Rules, symbolic: Symbolic) -> bool:
    """Whether the answer says what the gold answer says.

    `symbolic(gold, answer, tolerance)` is called for formulas that string work cannot decide.
    """
    gold, answer = normalise(gold), normalise(answer)
    if not gold or not answer:
        return False
    if _compact(gold) == _compact(answer):
        return True
    if too_large(gold) or too_large(answer):
        return False
    if re.fullmatch(r"-?\d+\.\d+", gold) and re.fullmatch(r"-?\d+,\d+", answer):
        return same(gold, answer.replace(",", "."), rules, symbolic)  # 2,5 for 2.5
    if _TO_DO.search(answer) and not _TO_DO.search(gold):
        return False  # an integral or a sum is a question, not an answer
    if r"\approx" in answer:
        return any(same(gold, part, rules, symbolic) for part in answer.split(r"\approx"))
    if _wordy(gold) and _wordy(answer) and as_text(gold) == as_text(answer) != "":
        return True
    stripped = _without_labels(gold, answer)
    if stripped is None:
        return False
    gold, answer = stripped
    named = [_letters(text) for text in stripped if _RELATION.search(text)]
    if len(named) < 2 or named[0] == named[1]:  # x < 3 is not y < 3
        sets = _as_set(gold), _as_set(answer)
        for relation, other in ((0, 1), (1, 0)):
            solved = _RELATION.search(stripped[relation]) and sets[relation] != stripped[relation]
            if solved and _structure(sets[other], _COMMA)[0] in ("list", "set"):
                return False  # 1 < x < 2 is not "1, 2"
        gold, answer = sets
    if _compare(gold, answer, _COMMA, rules, symbolic):
        return True
    ambiguous = any(re.search(r"\d,\d{3}(?!\d)", text) for text in (gold, answer))
    return ambiguous and _compare(gold, answer, _ANY_COMMA, rules, symbolic)


# ------------------------------------------------------------------------------ formulas

_SAMPLES = ("7/5", "-11/7", "23/9", "-5/13", "19/6", "31/17", "-29/8", "3/11")
_PRECISION = 50
_LONGEST = 1500
_DEEPEST = 40
_HUGE = re.compile(
    r"\d{2000}|\d{5,}\s*\)?\s*!|!\s*\)*\s*!|\^\s*\{?\s*\(?-?\d{6,}"
    r"|\d\s*\)?\s*\^\s*[{(]*\s*-?\d+\s*\)?\s*\^|\^\s*\{?\s*\d+\s*\}?\s*\)\s*!|__"
    r"|\\binom\s*\{[^{}]*(?:\^|\d{6})|([|!_^&])(?:\s*\1){4}"
)
_TO_DO = re.compile(r"\\(?:i*int|oint|sum|prod|lim)(?![a-z])")


def too_large(text: str) -> bool:
    """Whether a formula would only cost time: long, deep, or a number beyond any use."""
    if len(text) > _LONGEST or _HUGE.search(text):
        return True
    depth = deepest = 0
    for char in text:
        depth += (char in "([{") - (char in ")]}")
        deepest = max(deepest, depth)
    return deepest > _DEEPEST


@lru_cache(maxsize=2048)
def _parse(text: str, real: bool) -> Any:
    """A sympy expression by math-verify's grammar, or None. No text is ever evaluated as code."""
    from latex2sympy2_extended.latex2sympy2 import (
        ConversionConfig,
        NormalizationConfig,
        latex2sympy,
        normalize_latex,
    )

    # Decimals as fractions, so that 0.1 x is exactly x/10.
    text = re.sub(
        r"(\d*)\.(\d+)",
        lambda m: rf"(\frac{{{m[1]}{m[2]}}}{{1{'0' * len(m[2])}}})",
        text,
    )
    text = re.sub(r"(\d+|\{[^{}]*\})\s*\^\\circ", r"(\\frac{\1 \\pi}{180})", text)
    text = re.sub(r"\\text\{([^{}]*)\}", r"\1", text)
    cleaning = NormalizationConfig(units=False, malformed_operators=True, nits=True, boxed="none")
    try:
        return latex2sympy(
            normalize_latex(text, cleaning),
            is_real=real,
            convert_degrees=False,
            normalization_config=None,
            conversion_config=ConversionConfig(lowercase_symbols=False),
        )
    except Exception:  # the grammar raises bare Exception; whatever it is, this is no formula
        return None


class _Value(NamedTuple):
    real: Fraction
    imaginary: Fraction
    exact: bool  # else to 50 digits


def _evaluate(expression: Any) -> _Value | None:
    """The value of a constant, or None if it has no finite one."""
    expression = expression.doit()
    if expression.is_Rational:
        return _Value(Fraction(int(expression.p), int(expression.q)), Fraction(0), True)
    parts = expression.evalf(_PRECISION).as_real_imag()
    if not all((part.is_Float or part.is_Rational) and part.is_finite for part in parts):
        return None
    return _Value(Fraction(str(parts[0])), Fraction(str(parts[1])), False)


def _near(gold: _Value, answer: _Value) -> bool:
    if gold.exact and answer.exact:
        return gold.real == answer.real
    slack = max(Fraction(1), abs(gold.real), abs(gold.imaginary)) / 10 ** (_PRECISION - 10)
    gaps = abs(gold.real - answer.real), abs(gold.imaginary - answer.imaginary)
    return max(gaps) <= slack


def symbolic(gold: str, answer: str, tolerance: float | None) -> bool:
    """Whether two formulas are equal, by their values, or by math-verify where they have none.

    Constants are compared to 50 digits; expressions in unknowns at eight points, which tells
    any two of them apart that are not the same function. Relations, sets and whatever else is
    left to math-verify. May take long: run it in a process with limits.
    """
    from sympy import Expr

    real = not re.search(r"(?<![a-zA-Z])\\?i(?:math)?(?![a-zA-Z])", gold + " " + answer)
    g, a = _parse(gold, real), _parse(answer, real)
    if g is None or a is None:
        return False
    try:
        if isinstance(g, Expr) and isinstance(a, Expr):
            verdict = _same_values(g, a, gold, answer, tolerance)
            if verdict is not None:
                return verdict
        from math_verify import verify

        # math-verify's own limits use signals, which only the main thread has.
        return bool(verify(g, a, timeout_seconds=None, allow_set_relation_comp=True))
    except Exception:  # sympy raises anything on odd input; it then shows no equality
        return False


def _same_values(g: Any, a: Any, gold: str, answer: str, tolerance: float | None) -> bool | None:
    from sympy import I, Rational, Symbol

    unit_i = {s: I for s in g.free_symbols | a.free_symbols if s.name == "i"}
    g, a = g.subs(unit_i), a.subs(unit_i)
    unknowns: list[Symbol] = sorted(g.free_symbols | a.free_symbols, key=str)
    if not unknowns:
        g_value, a_value = _evaluate(g), _evaluate(a)
        if g_value is None or a_value is None:
            return None
        if _near(g_value, a_value):
            return True
        if g_value.imaginary or a_value.imaginary:
            return False
        g_number = number(gold) or Number(g_value.real)
        return agree(g_number, number(answer) or Number(a_value.real), tolerance)
    agreements = 0
    for start in range(len(_SAMPLES)):
        point = {
            unknown: Rational(_SAMPLES[(start + 3 * index) % len(_SAMPLES)]) + index
            for index, unknown in enumerate(unknowns)
        }
        g_value, a_value = _evaluate(g.subs(point)), _evaluate(a.subs(point))
        if g_value is None or a_value is None:
            continue
        if not _near(g_value, a_value):
            return False
        agreements += 1
    return True if agreements >= 3 else None


def warm_up() -> None:
    """Import math-verify and fill its parser's tables, so that the first answer is not slow."""
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it says that it has no time limit
    formulas = [
        *(r"\frac{x+1}{2}", r"\sqrt{2}\pi - x^{3}", r"\sin^2 x + \log_2 8", r"\sin^2 x + 3"),
        *(r"\sqrt[3]{2} + 6i", r"2^{1/3} + 6i", r"(1,2] \cup \{5\}", r"\{5\} \cup (1,2]"),
        *(r"x \le 2y", r"2y \ge x", r"x^2 + y^2 = 1", r"1 - y^2 = x^2", r"|x| - \tan 1"),
    ]
    for gold, answer in pairwise(formulas):
        symbolic(gold, answer, None)


__all__ = ["Rules", "agree", "as_text", "normalise", "number", "quantity", "same", "symbolic"]
