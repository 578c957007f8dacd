r"""Exact numbers with units: 1,234.50, 3/4, 1101_2, 5 cm, 60%, 120 degrees.

Numbers are rationals and are never compared as floats.
"""

from __future__ import annotations

import re
from fractions import Fraction
from functools import lru_cache
from typing import Literal, NamedTuple

from mm_agrae.grading.notation import compact, letters_in

Units = Literal["auto", "ignore", "required"]


class Rules(NamedTuple):
    """What counts as equal. See `accuracy.verify`."""

    tolerance: float | None = None
    units: Units = "auto"


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
    match = _NUMBER.fullmatch(text) if len(text) <= _MOST_DIGITS else None
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
    p, q = (Fraction(re.sub("[, ]", "", match[name] or match[name + "2"])) for name in "pq")
    whole = int(match["whole"] or match["whole2"] or 0)
    return Number(sign * (whole + p / q)) if q else None


def agree(gold: Number, answer: Number, tolerance: float | None = None) -> bool:
    """Equal, or equal up to rounding.

    With a `tolerance`: within that fraction of the gold number. Without: integers must be exact.
    Other exact numbers also match a decimal that they round to, of at least six places and four
    significant digits. A decimal gold number of at least three significant digits also matches an
    exact answer that rounds to it, and a longer decimal that does and is within 0.1 % of it.
    """
    gap = abs(gold.value - answer.value)
    if gap == 0:
        return True
    if tolerance is not None:
        return gap <= Fraction(tolerance) * abs(gold.value)
    if gold.step is not None:
        rounds = gold.digits >= 3 and 2 * gap <= gold.step
        if answer.step is None:
            return rounds and answer.value.denominator != 1
        return rounds and answer.step < gold.step and 1000 * gap <= abs(gold.value)
    if answer.step is None or gold.value.denominator == 1:
        return False
    fine = answer.step <= Fraction(1, 10**6) and answer.digits >= 4
    return fine and 2 * gap <= answer.step


_BASED = re.compile(r"(-?)0*([0-9A-Za-z]+(?:\.[0-9A-Za-z]+)?)_\{?(\d{1,2}|two|three|eight)\}?")
_BASES = {"two": 2, "three": 3, "eight": 8}


def based(text: str) -> tuple[str, int] | None:
    """1101_2 as ("1101", 2): digits that are valid in the base."""
    if (match := _BASED.fullmatch(compact(text).replace(",", ""))) is None:
        return None
    base, digits = _BASES.get(match[3]) or int(match[3]), match[2].lower()
    valid = set("0123456789abcdefghijklmnopqrstuvwxyz"[:base] + ".")
    return (match[1] + digits, base) if 2 <= base <= 36 and set(digits) <= valid else None


class Unit(NamedTuple):
    dimension: frozenset[tuple[str, int]]  # such as {("length", 1), ("time", -1)}
    factor: Fraction  # in the base unit of the dimension
    known: bool


_UNIT_TABLE = """
length: 1 m meter metre, 1000 km kilometer kilometre, 1/10 dm decimeter decimetre
length: 1/100 cm centimeter centimetre, 1/1000 mm millimeter millimetre
length: 1 米 メートル mètre metro, 1 متر, 1000 千米 公里 كم kilomètre kilómetro, 1/10 分米, 1/1000 毫米 ミリメートル
length: 1/100 سم 厘米 公分 センチメートル センチ zentimeter centimètre centímetro
mass: 1 克 グラム gramm gramme gramo, 1000 千克 公斤 キログラム kilo, 1/1000 毫克, 1000000 吨
time: 1 秒 sekunde seconde segundo, 60 分钟 minuto, 3600 小时 时 時間 stunde heure hora, 86400 天 日 tag jour día
calendar: 1 个月 月 ヶ月, 12 年
volume: 1 升 リットル litro, 1/1000 毫升 ミリリットル
angle: 1 度 grad degré grado
celsius: 1 摄氏度
yuan: 1 元 yuan, 1/10 角
yen: 1 円 yen
length: 127/5000 in inch inche, 381/1250 ft foot feet, 1143/1250 yd yard, 201168/125 mi mile
mass: 1 g gm gram, 1000 kg kilogram, 1/1000 mg milligram
mass: 45359237/100000 lb lbs pound, 45359237/1600000 oz ounce
time: 1 s sec second, 60 min minute, 3600 h hr hour, 86400 day, 604800 week
calendar: 1 month, 12 year yr
am: 1 am
pm: 1 pm
celsius: 1 celsius
fahrenheit: 1 fahrenheit
volume: 1 l liter litre, 1/1000 ml milliliter millilitre
angle: 1 degree deg
money: 1 dollar usd, 1/100 cent
euro: 1 euro
unit: 1 unit
"""
_UNITS = {
    name: (dimension, Fraction(factor))
    for dimension, sizes in (line.split(": ") for line in _UNIT_TABLE.strip().splitlines())
    for factor, *names in map(str.split, sizes.split(", "))
    for name in names
}
_SHORTHAND = {"mph": "mile/hour", "kmh": "km/hour", "kph": "km/hour", "cc": "cm^3"}
_ONE_UNIT = re.compile(
    r"(square|sq|cubic|cu|平方|立方|quadrat)?\s*(.*?)\s*(squared|cubed|carrés?|cuadrados?)?\s*(?:\^?\s*\{?\s*([23])\s*\}?)?"
)
_POWERS = {"square": 2, "sq": 2, "squared": 2, "cubic": 3, "cu": 3, "cubed": 3}
_POWERS |= dict.fromkeys(("平方", "quadrat", "carré", "carrés", "cuadrado", "cuadrados"), 2) | {"立方": 3}


@lru_cache(maxsize=1024)
def unit(text: str) -> Unit | None:
    """Read cm, "square feet", km/h, "miles per hour", apples. None if these are no words."""
    text = re.sub(r"[.~]|\\(?:cdot|text)", " ", text.lower()).replace("{", "").replace("}", "")
    text = re.sub(r"\b([ap]) m\b", r"\1m", " ".join(text.split()))
    text = _SHORTHAND.get(text, text)
    dimension: dict[str, int] = {}
    factor, known = Fraction(1), True
    for position, part in enumerate(re.split(r"\s*/\s*|\s+per\s+|\s+an?\s+|\s*每\s*", text)):
        match = _ONE_UNIT.fullmatch(part)
        assert match is not None  # every group may be empty
        power = _POWERS.get(match[1] or match[3] or "") or int(match[4] or 1)
        words = re.findall(r"[^\W\d_]+", match[2])
        if not words:
            return None
        name = words[-1]
        singular = name[:-1] if len(name) > 2 and name.endswith("s") and name[-2] != "s" else name
        kind, size = _UNITS.get(name) or _UNITS.get(singular) or ("", Fraction(1))
        known = known and kind != ""
        power = -power if position else power
        dimension[kind or singular] = dimension.get(kind or singular, 0) + power
        factor *= size**power
    return Unit(frozenset(dimension.items()), factor, known)


def unit_ratio(gold: Unit | None, answer: Unit | None, rules: Rules) -> Fraction | None:
    """What to multiply the answer by to convert it to the gold unit; None if impossible."""
    if rules.units == "ignore":
        return Fraction(1)
    if gold is None or answer is None:
        return None if gold is not None and rules.units == "required" else Fraction(1)
    if gold.dimension == answer.dimension:
        return answer.factor / gold.factor
    names = {name for name, _ in gold.dimension | answer.dimension}
    # 5 units may be 5 cm, 20° may be 20 °C; "18 ways" and "18 orders" count the same.
    vague = "unit" in names or {"angle"} < names <= {"angle", "celsius", "fahrenheit"}
    return Fraction(1) if vague or not (gold.known or answer.known) else None


class Quantity(NamedTuple):
    head: str
    unit: Unit | None = None
    percent: bool = False


_DEGREES = re.compile(r"(.*\S)\s*\^\\circ\s*(?:\\text\{\s*)?([TCF]?)\s*\}?")
_TEXT_UNIT = re.compile(r"(.*?[^\s/])((?:\s*/?\s*\\text\{[^{}]*\}\s*(?:\^\s*\{?\s*-?\d\s*\}?)?)+)\s*", re.DOTALL)
_PLAIN_UNIT = re.compile(
    r"(.*(?:[\d)}\]]|\\pi))(\s*)([A-Za-zÀ-ÿ]+(?:\.? [A-Za-zÀ-ÿ]+)*\.?(?:\s*\^?\s*\{?[23]\}?)?"
    r"(?:\s*/\s*[A-Za-z]+)?)"
)
# Text after a formula that is not just a name of what is counted.
_NO_UNIT = re.compile(r"\\text\{\s*.{0,2}\}|\b(?:if|for|when|where|otherwise|is|are|to|at|not|no)\b")


_ASIAN = "|".join(
    sorted((name for name in _UNITS if re.match("[\u0600-\u06ff\u3040-\u9fff]", name)), key=len, reverse=True)
)
_ASIAN_UNIT = re.compile(
    rf"(.*(?:[\d)}}\]]|\\pi))\s*((?:平方|立方)?(?:{_ASIAN})(?:\s*[/每]\s*(?:{_ASIAN}))?"
    r"|[个個名人只本张种次条棵件辆支块页岁匹枚](?:(?![以多左不到上下])[\u4e00-\u9fff]){0,4})"
)


@lru_cache(maxsize=4096)
def quantity(text: str) -> Quantity:
    r"""Split off the unit: 5\text{ cm}^2, 12 cm, 120^\circ, 50%, 24 apples. Variables stay."""
    if text.endswith("%"):
        return Quantity(text[:-1].strip(), percent=True)
    if (match := _DEGREES.fullmatch(text)) and not re.search("sin|cos|tan|cot|sec|csc", text):
        scale = {"C": "celsius", "F": "fahrenheit"}.get(match[2], "degree")
        return Quantity(match[1], unit(scale))
    if (match := _TEXT_UNIT.fullmatch(text)) and (found := unit(match[2])):
        # "3\text{i}" is a symbol in an upright font, "2\text{ dogs}" a count.
        symbol = re.fullmatch(r"\s*\\text\{\s*[eixyz]\s*\}\s*", match[2])
        counted = not symbol if number(match[1]) else not _NO_UNIT.search(match[2])
        if found.known or counted:
            return Quantity(match[1].strip(), found)
    if (match := _ASIAN_UNIT.fullmatch(text)) and (found := unit(match[2])):
        return Quantity(match[1].strip(), found)
    if (match := _PLAIN_UNIT.fullmatch(text)) and (found := unit(match[3])):
        head, space, name = match.groups()
        counted = number(head) is not None and re.match(r"[a-zA-Z]{3,}", name) is not None
        # 5m is a product, 5 m and 5m^2 are measured; R^2 h is a product again.
        measured = len(name) > 1 or bool(space)
        if len(name.rstrip("^{}23 ")) == 1:
            measured = measured and not letters_in(head)
        if (found.known and measured) or counted:
            return Quantity(head.strip(), found)
    return Quantity(text)


def same_quantity(gold: Number, answer: Number, percent: tuple[bool, bool], rules: Rules) -> bool:
    """A percent sign on one side alone is either an omitted unit or a hundredth.

    It is not a hundredth beside an integer above 1: 500% does not mean 5.
    """
    one_sided = percent[0] != percent[1]
    if not (one_sided and rules.units == "required") and agree(gold, answer, rules.tolerance):
        return True
    bare = answer if percent[0] else gold
    if not one_sided or (bare.value.denominator == 1 and abs(bare.value) > 1):
        return False
    if percent[0]:
        gold = gold.times(Fraction(1, 100))
    else:
        answer = answer.times(Fraction(1, 100))
    return agree(gold, answer, rules.tolerance)
