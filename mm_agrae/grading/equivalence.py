r"""Do two written answers mean the same?

`same` brings both to one notation (`notation.py`), takes them apart (lists, tuples, sets, intervals, matrices) and
compares the leaves: as exact numbers with units (`quantities.py`), as text, and only if neither decides by `symbolic`
(`formulas.py`), which the caller passes in. Everything else is plain string work.
"""

import re
from collections.abc import Callable

from mm_agrae.grading.formulas import TO_DO, no_formula, too_large
from mm_agrae.grading.notation import as_text, compact, inside, letters_in, normalise, split, wordy
from mm_agrae.grading.quantities import Rules, based, number, quantity, same_quantity, unit_ratio

Symbolic = Callable[[str, str, float | None], bool]

_MATRIX = re.compile(r"\\begin\{([pbB]?matrix|array)\}(?:\{[lcr| ]*\})?((?:(?!\\begin).)*)\\end\{\1\}", re.DOTALL)
_COMMA = r",(?!(?<=\d,)\d{3}(?!\d))"  # not the one of 1,234
_BRACKETS = {"()", "[]", "(]", "[)"}


def _structure(text: str, comma: str) -> tuple[str, list[str]]:
    """Outermost structure (scalar, list, set, union, a pair of brackets or a matrix), and parts."""
    matrix = inside(text, "[", "]") or inside(text, "(", ")") or text
    if match := _MATRIX.fullmatch(matrix.strip()):
        rows = [row for row in re.split(r"\\\\(?:\[[^\]]*\])?", match[2]) if row.strip()]
        cells = [[cell.strip() for cell in row.split("&")] for row in rows]
        shape = "/".join(str(len(row)) for row in cells)
        return f"matrix {shape}", [cell for row in cells for cell in row]
    if (inner := inside(text, r"\{", r"\}")) is not None:
        described = re.search(r"\\mid|[|:]", inner)  # as {x | x > 0}
        return ("scalar", [text]) if described else ("set", _both_signs(split(inner, comma)))
    if text[:1] + text[-1:] in _BRACKETS:
        inner = inside(text, text[0], text[-1])
        if inner is not None:
            if len(parts := split(inner, comma)) > 1:
                return text[0] + text[-1], parts
            if text[0] == "(":
                return _structure(inner.strip(), comma)
    if len(parts := split(text, r"\\cup(?![a-z])")) > 1:
        return "union", parts
    parts = _both_signs(split(text, comma))
    return ("list", parts) if len(parts) > 1 else ("scalar", [text])


def _both_signs(parts: list[str]) -> list[str]:
    """The non-empty parts; one with a single plus-minus sign becomes two."""
    both: list[str] = []
    for part in filter(None, parts):
        signs = ("+", "-") if part.count(r"\pm") + part.count(r"\mp") == 1 else ()
        both += [re.sub(r"\\[pm]{2}\s*", sign, part).lstrip("+") for sign in signs] or [part]
    return both


_RELATION = re.compile(r"\\le(?![a-z])|\\ge(?![a-z])|\\ne(?![a-z])|<|>")
_SET_LIKE = re.compile(
    r"\\(?:le|ge|ne|cup|cap|setminus|backslash|mathbb|emptyset|varnothing|in|infty|mid)(?![a-z])"
    r"|[<>:]"
)
_UNKNOWN = re.compile(r"[a-zA-Z](?:\([a-zA-Z]\))?|\\(?!pi|infty)[a-z]+")


def _interval(text: str) -> str | None:
    r"""-2 \le x < 7 as [-2,7), and x \ne 2 as a union; None for anything else."""
    operators = _RELATION.findall(text)
    parts = [part.strip() for part in _RELATION.split(text)]
    if not 1 <= len(operators) <= 2 or not all(parts):
        return None
    if {r"\ge", ">"} >= set(operators):
        parts.reverse()
        operators = [{r"\ge": r"\le", ">": "<"}[operator] for operator in reversed(operators)]
    variables = [bool(_UNKNOWN.fullmatch(part)) for part in parts]
    bounds = [part for part, variable in zip(parts, variables, strict=True) if not variable]
    if sum(variables) != 1 or any(re.search(r"(?<![a-zA-Z\\])[a-zA-Z]", b) for b in bounds):
        return None
    if operators == [r"\ne"]:
        return rf"(-\infty,{bounds[0]}) \cup ({bounds[0]},\infty)"
    where = variables.index(True)
    if not {r"\le", "<"} >= set(operators) or (len(parts) == 3 and where != 1):
        return None
    low, high = r"(-\infty", r"\infty)"
    if where > 0:
        low = ("(" if operators[where - 1] == "<" else "[") + parts[0]
    if where < len(parts) - 1:
        high = parts[-1] + (")" if operators[where] == "<" else "]")
    return f"{low},{high}"


def _as_set(text: str) -> str:
    r"""Inequalities in one unknown, and x \in S, in the notation of intervals."""
    text = re.sub(r"^[a-zA-Z]\s*\\in(?![a-z])\s*", "", text)
    text = re.sub(r"^\\mathbb\s*\{?R\}?$", r"(-\\infty,\\infty)", text)
    if _RELATION.search(text) is None:
        return text
    parts = [_interval(part) for part in split(text, ",")]
    return text if None in parts else r" \cup ".join(filter(None, parts))


_LABEL = re.compile(
    r"(?:[A-Z]\w*(?:_\s*(?:\w|\{[^{}]*\}))?\s*:\s*)?"  # of A:B = 1:2
    r"(?:m\s*)?(?:\\(?:angle|triangle|overline|vec|hat|bar)\s*)?\{?\s*"
    r"(?:\\text\{[^{}]*\}|\\[a-zA-Z]+|[A-Za-z][A-Za-z ]*)\s*\}?(?:_\s*(?:\w|\{[^{}]*\}))?'*"
    r"(?:\^\s*\{?-1\}?)?(?:\s*\(\s*\w+(?:\s*,\s*\w+)*\s*\))?"
    r"|\(\s*[a-z](?:\s*,\s*[a-z])+\s*\)"
)
_SYMBOL = re.compile(r"(?:\\[a-zA-Z]+|[A-Za-z])(?:_\s*(?:\w|\{[^{}]*\}))?")
_NUMERIC = re.compile(r"(?:[\d\s.,+\-/^{}()%!]|\\(?:frac|sqrt|pi|cdot|times|circ)(?![a-z]))+")


def _value_of(sides: list[str], other: str) -> str | None:
    """The value an equation states: the right side of x = 5 or a + b = 5, not of x^2 = 4."""
    left, right = sides[0], sides[-1]
    if _LABEL.fullmatch(left):
        return right
    if _SYMBOL.fullmatch(right) and not letters_in(left):
        return left
    if _RELATION.search(left) or "," in left or r"\text" in left:
        return None
    if "^" in left and re.search(r"(?<![\\a-zA-Z])[a-zA-Z]{3}", left):
        return None  # "we have to solve x^2 = 4"
    letters = letters_in(left)
    solved = len(letters) != 1 or r"\sin" in left or r"\cos" in left or r"\tan" in left
    return right if solved or letters <= letters_in(other) else None


def _without_labels(gold: str, answer: str) -> tuple[str, str] | None:
    """Drop x =, Area =, f(x) = if they only name the value; None if the names disagree."""
    sides_gold, sides_answer = split(gold, "="), split(answer, "=")
    ends_in_number = "," not in gold and _NUMERIC.fullmatch(sides_gold[-1])  # a = b = 2
    if all(map(_NUMERIC.fullmatch, sides_gold)) or (len(sides_gold) > 2 and ends_in_number):
        sides_gold = sides_gold[-1:]  # 14/25 = 0.56
        gold = sides_gold[0]
    several = any(len(split(side, ",")) > 1 for side in sides_gold[1:-1] + sides_answer[1:-1])
    if several or len(sides_gold) == 1 == len(sides_answer):  # several: x = 1, y = 2
        return gold, answer
    if len(sides_gold) > 1 and len(sides_answer) > 1:
        names = [sides_gold[0], sides_answer[0]]
        if not all(_LABEL.fullmatch(name) for name in names):
            return gold, answer
        symbols = all(_SYMBOL.fullmatch(name) for name in names)
        if symbols and compact(names[0]) != compact(names[1]):
            return None
    if len(sides_gold) > 1 and _LABEL.fullmatch(sides_gold[0]):
        gold = _value_of(sides_gold, answer) or gold
    if len(sides_answer) > 1:
        value = _value_of(sides_answer, gold)
        if value is None and len(split(answer, ",")) == 1 and len(split(gold, "=")) == 1:
            return None
        answer = value or answer
    return gold, answer


def _leaf(gold: str, answer: str, rules: Rules, symbolic: Symbolic) -> bool:
    if compact(gold) == compact(answer):
        return True
    if (stripped := _without_labels(gold, answer)) is None:
        return False
    gold, answer = stripped
    g, a = quantity(gold), quantity(answer)
    g_number, a_number = number(g.head), number(a.head)
    ratio = unit_ratio(g.unit, a.unit, rules)
    if g_number and a_number:
        percent = (g.percent, a.percent)
        return ratio is not None and same_quantity(g_number, a_number.times(ratio), percent, rules)
    g_based, a_based = based(gold), based(answer)
    if g_based or a_based:
        g_digits, g_base = g_based or (compact(gold).lower(), 0)
        a_digits, a_base = a_based or (compact(answer).lower(), 0)
        return g_digits == a_digits and 0 in (g_base, a_base, g_base - a_base)
    if wordy(g.head) or wordy(a.head):
        return as_text(gold) == as_text(answer) != ""
    g_parts, a_parts = split(gold, ":"), split(answer, ":")
    if len(g_parts) == 2 or len(a_parts) == 2:
        if all(re.fullmatch(r"\d{1,2}:\d\d", text) for text in (g.head, a.head)):
            return ratio is not None and g.head == a.head  # times of day
        return _same_proportion(g_parts, a_parts, rules, symbolic)
    if ratio == 1 and g.percent == a.percent and symbolic(g.head, a.head, rules.tolerance):
        return True
    # "3 s^2" may be seconds or three times a variable, depending on the other side.
    either = (g.unit is None) != (a.unit is None)
    return either and symbolic(gold, answer, rules.tolerance)


def _same_proportion(gold: list[str], answer: list[str], rules: Rules, symbolic: Symbolic) -> bool:
    """2:3 against 4:6 or 2/3."""
    if len(gold) > 2 or len(answer) > 2 or not all(gold + answer):
        return False
    g, a = (rf"\frac{{{parts[0]}}}{{{parts[1]}}}" if len(parts) == 2 else parts[0] for parts in (gold, answer))
    return _leaf(g, a, rules, symbolic)


def _by_name(items: list[str]) -> bool:
    """Whether the items are values of different unknowns."""
    names = [split(item, "=") for item in items]
    return all(len(sides) > 1 for sides in names) and len({sides[0] for sides in names}) > 1


def _compare(gold: str, answer: str, comma: str, rules: Rules, symbolic: Symbolic) -> bool:
    g_kind, g_items = _structure(gold, comma)
    a_kind, a_items = _structure(answer, comma)
    if "," in "".join(g_items):  # pairs: a set of solutions, which may repeat one
        g_items, a_items = (list({compact(item): item for item in items}.values()) for items in (g_items, a_items))

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
            if (found := next((a for a in left if equal(g, a)), None)) is None:
                return False
            left.remove(found)
        return True

    if g_kind == "scalar" == a_kind:
        return _leaf(g_items[0], a_items[0], rules, symbolic)
    if g_kind.startswith("matrix") or a_kind.startswith("matrix"):
        if "scalar" in (g_kind, a_kind) and "matrix}" in gold and "matrix}" in answer:
            return symbolic(gold, answer, rules.tolerance)  # a sum or product of matrices
        return g_kind == a_kind and ordered()
    if g_kind in _BRACKETS and a_kind in _BRACKETS:
        return g_kind == a_kind and ordered()
    if g_kind == "()" and a_kind == "list":
        return ordered()
    if g_kind == "list" and (a_kind == "()" or (a_kind == "[]" and len(a_items) > 2)):
        return unordered()
    if {g_kind, a_kind} <= {"list", "set"}:
        return unordered()
    if {g_kind, a_kind} <= {"list", "set", "union"} and unordered():
        return True
    if g_kind == "set" and len(g_items) == 1:
        return equal(g_items[0], answer)
    if a_kind == "set" and len(a_items) == 1:
        return equal(gold, a_items[0])
    if _SET_LIKE.search(gold) and _SET_LIKE.search(answer):
        return symbolic(gold, answer, rules.tolerance)
    return False


_DECIMAL_COMMA = re.compile(r"-?(?:0|\d{4,}),\d+|-?\d+,(?!\d{3}$)\d+")  # and not 1,234
_NOTHING = re.compile(
    r"(?:\\text\{)?\s*(?:there (?:is|are) )?(?:no (?:real |integer )?solutions?|none)\s*\}?"
    r"|\\emptyset|\\\{\s*\\\}",
    re.IGNORECASE,
)


def same(gold: str, answer: str, rules: Rules, symbolic: Symbolic) -> bool:
    """Whether the answer means the same as the gold answer.

    `symbolic(gold, answer, tolerance)` is called for formulas that string work cannot decide.
    """
    gold, answer = normalise(gold), normalise(answer)
    if not gold or not answer:
        return False
    if compact(gold) == compact(answer):
        return True
    if too_large(gold) or too_large(answer):
        return False
    for comma, point in ((gold, answer), (answer, gold)):
        if _DECIMAL_COMMA.fullmatch(comma) and re.fullmatch(r"-?\d+\.\d+", point):
            return same(comma.replace(",", "."), point, rules, symbolic)  # 2,5 for 2.5
    if _NOTHING.fullmatch(gold) and _NOTHING.fullmatch(answer):
        return True
    if TO_DO.search(answer) and not TO_DO.search(gold):
        return False  # an integral or a sum is a question, not an answer
    if r"\approx" in answer:
        return any(same(gold, part, rules, symbolic) for part in answer.split(r"\approx"))
    if wordy(gold) and wordy(answer) and as_text(gold) == as_text(answer) != "":
        return True
    if (stripped := _without_labels(gold, answer)) is None:
        return False
    gold, answer = stripped
    named = [letters_in(text) for text in stripped if _RELATION.search(text)]
    if len(named) < 2 or named[0] == named[1]:  # x < 3 is not y < 3
        sets = _as_set(gold), _as_set(answer)
        for relation, other in ((0, 1), (1, 0)):
            solved = _RELATION.search(stripped[relation]) and sets[relation] != stripped[relation]
            if solved and _structure(sets[other], _COMMA)[0] in ("list", "set"):
                return False  # 1 < x < 2 is not "1, 2"
        gold, answer = sets

    def decide(gold: str, answer: str, tolerance: float | None) -> bool:
        return not (no_formula(gold) or no_formula(answer)) and symbolic(gold, answer, tolerance)

    if _compare(gold, answer, _COMMA, rules, decide):
        return True
    ambiguous = any(re.search(r"\d,\d{3}(?!\d)", text) for text in (gold, answer))
    return ambiguous and _compare(gold, answer, ",", rules, decide)
