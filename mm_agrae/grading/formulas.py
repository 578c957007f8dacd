r"""Compares formulas by their values, or by math-verify if they have none.

Text is parsed with math-verify's LaTeX grammar and never evaluated as code. `symbolic` may take any
amount of time and memory, so run it in a process with limits (`pool.py`).
"""

import logging
import re
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

from mm_agrae.grading.quantities import Number, agree, number

_SAMPLES = ("7/5", "-11/7", "23/9", "-5/13", "19/6", "31/17", "-29/8", "3/11")
_PRECISION = 50
_LONGEST = 1500
_DEEPEST = 15
_HUGE = re.compile(
    r"\d{2000}|\d{5,}\s*\)?\s*!|!\s*\)*\s*!|\^\s*\{?\s*\(?-?\d{6,}"
    r"|\d\s*\)?\s*\^\s*[{(]*\s*-?\d+\s*\)?\s*\^|\^\s*\{?\s*\d+\s*\}?\s*\)\s*!|__"
    r"|\^\s*(?:[\d.]+|\{[\d.]+\}|[a-z]|\([^()]*\)|\\[a-z]+)\s*\^|\^\s*\{[^{}]*\^\s*\{[^{}]*\^|\[\d{3,}\]"
    r"|\)\s*\^\s*\{?\d{3,}|\d[eE]-?\d{4,}|\\binom\s*\{[^{}]*(?:\^|\d{6})|([|!_^&])(?:\s*\1){4}"
)
TO_DO = re.compile(r"\\(?:i*int|oint|sum|prod|lim)(?![a-z])")
_NO_FORMULA = re.compile(r"[^\x20-\x7e]|[#@?`\"]|^[^\w\\]*$|\\(?:def|newcommand|write|input|csname|catcode)(?![a-z])")


def no_formula(text: str) -> bool:
    """Whether this cannot be a formula: foreign signs, no letter or digit, unmatched braces."""
    braces = re.findall(r"(?<!\\)[{}]", text)
    return _NO_FORMULA.search(text) is not None or 2 * braces.count("{") != len(braces)


def too_large(text: str) -> bool:
    """Whether a formula is too costly to parse: long, deeply nested, or a huge number."""
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
    from latex2sympy2_extended import latex2sympy2 as grammar

    # Decimals as fractions, so that 0.1 x is exactly x/10.
    text = re.sub(r"(\d*)\.(\d+)", lambda m: rf"(\frac{{{m[1]}{m[2]}}}{{1{'0' * len(m[2])}}})", text)
    text = re.sub(r"(\d+|\{[^{}]*\})\s*\^\\circ", r"(\\frac{\1 \\pi}{180})", text)
    text = re.sub(r"\\text\{([^{}]*)\}", r"\1", text)
    cleaning = grammar.NormalizationConfig(units=False, malformed_operators=True, nits=True, boxed="none")
    try:
        return grammar.latex2sympy(
            grammar.normalize_latex(text, cleaning),
            is_real=real,
            normalization_config=None,
            conversion_config=grammar.ConversionConfig(lowercase_symbols=False),
        )
    except Exception:  # the grammar raises bare Exception if this is no formula
        return None


class _Value(NamedTuple):
    real: Fraction
    imaginary: Fraction = Fraction(0)
    exact: bool = True  # else to 50 digits


def _evaluate(expression: Any) -> _Value | None:
    """The value of a constant, or None if it has no finite one."""
    expression = expression.doit()
    if expression.is_Rational:
        return _Value(Fraction(int(expression.p), int(expression.q)))
    parts = expression.evalf(_PRECISION).as_real_imag()
    if not all((part.is_Float or part.is_Rational) and part.is_finite for part in parts):
        return None
    return _Value(Fraction(str(parts[0])), Fraction(str(parts[1])), exact=False)


def _near(gold: _Value, answer: _Value) -> bool:
    if gold.exact and answer.exact:
        return gold.real == answer.real
    slack = max(Fraction(1), abs(gold.real), abs(gold.imaginary)) / 10 ** (_PRECISION - 10)
    return max(abs(g - a) for g, a in zip(gold[:2], answer[:2], strict=True)) <= slack


def symbolic(gold: str, answer: str, tolerance: float | None) -> bool:
    """Whether two formulas are equal, by their values, or by math-verify if they have none.

    Constants are compared to 50 digits, expressions in unknowns at eight points, which tells
    different functions apart. Relations, sets and everything else are left to math-verify. May take
    long: run it in a process with limits.
    """
    from sympy import Expr

    real = not re.search(r"(?<![a-zA-Z])\\?i(?:math)?(?![a-zA-Z])", gold + " " + answer)
    g, a = _parse(gold, real), _parse(answer, real)
    if g is None or a is None:
        return False
    try:
        if isinstance(g, Expr) and isinstance(a, Expr):
            verdict = _same_values(g, a, gold, answer, tolerance, real)
            if verdict is not None:
                return verdict
        from math_verify import verify

        # math-verify's own limits use signals, which work in the main thread only.
        return bool(verify(g, a, timeout_seconds=None, allow_set_relation_comp=True))
    except Exception:  # sympy raises anything on odd input: not shown to be equal
        return False


def _same_values(g: Any, a: Any, gold: str, answer: str, tolerance: float | None, real: bool) -> bool | None:
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
        if g_value is None or a_value is None or (real and g_value.imaginary and a_value.imaginary):
            continue  # a root of a negative number: neither formula is meant there
        if not _near(g_value, a_value):
            return False
        agreements += 1
    return True if agreements >= 3 else None


def warm_up() -> None:
    """Import math-verify and fill its parser's tables, so that the first comparison is fast."""
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns of having no time limit
    formulas = [
        *(r"\frac{x+1}{2}", r"\sqrt{2}\pi - x^{3}", r"\sin^2 x + \log_2 8", r"\sin^2 x + 3"),
        *(r"\sqrt[3]{2} + 6i", r"2^{1/3} + 6i", r"(1,2] \cup \{5\}", r"\{5\} \cup (1,2]"),
        *(r"x \le 2y", r"2y \ge x", r"x^2 + y^2 = 1", r"1 - y^2 = x^2", r"|x| - \tan 1"),
    ]
    for gold, answer in pairwise(formulas):
        symbolic(gold, answer, None)
