r"""Written answers in one notation, and their parts.

`normalise` brings LaTeX, Unicode and plain text to one form; `split` and `inside` take it apart
at brackets; `as_text` is for answers in words. Plain string work, linear in the text.
"""

import re
import unicodedata
from functools import lru_cache

_COMMANDS = {
    **{"×": "times", "·": "cdot", "⋅": "cdot", "∞": "infty", "±": "pm", "∠": "angle"},
    **{"√": "sqrt", "∛": "sqrt[3]", "∜": "sqrt[4]", "≤": "le", "≥": "ge", "≠": "ne"},
    **{"≈": "approx", "∪": "cup", "∩": "cap", "∈": "in", "∅": "emptyset"},
    **{
        char: unicodedata.name(char).split()[-1].replace("LAMDA", "LAMBDA").lower()
        for char in "αβγδεζηθικλμνξπρστφχψω"
    },
}
_TRANSLATE = str.maketrans("−–‐÷⁄∕∶，：（）％’", "---///:,:()%'") | str.maketrans(
    {
        **{char: rf"\{command} " for char, command in _COMMANDS.items()},
        **{"°": r"^\circ ", "ℝ": r"\mathbb{R}", "€": "", "£": ""},
        **{
            char: r"\frac{{{}}}{{{}}}".format(*unicodedata.normalize("NFKC", char).split("⁄"))
            for char in "½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞"
        },
        # Full-width, Arabic, Persian and Devanagari digits, and the Arabic decimal point.
        **{chr(zero + digit): str(digit) for zero in (0xFF10, 0x660, 0x6F0, 0x966) for digit in range(10)},
        **{"٫": ".", "٬": ",", "٪": "%", "．": ".", "、": ","},
        **{chr(0x1D7CE + place): str(place % 10) for place in range(50)},  # bold, double-struck, ...
        **dict.fromkeys("\u00a0\u2002\u2003\u2009\u202f", " "),
        # Invisible and harmless: soft hyphen, zero-width space and joiners, byte order mark.
        **dict.fromkeys("\u00ad\u200b\u200c\u200d\u2060\ufeff", ""),
    }
)
_RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n")
_LOWERED = str.maketrans("₀₁₂₃₄₅₆₇₈₉₊₋ₙ", "0123456789+-n")

_SIGNS = {
    **{"lt": "<", "gt": ">", "[lr]vert": "|", "langle": "(", "rangle": ")"},
    **{"lbrace": r"\\{", "rbrace": r"\\}"},
}
_NOT_LETTER = r"(?![a-zA-Z])"
_REWRITES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (  # \\frac: backslashes escaped once too often
            r"(?<!\\)\\\\(?=(?:[dt]?frac|left|right|sqrt|pi|text|mathrm|cdot|times|leq?|geq?|infty|cup|circ"
            r"|pm|begin|end)(?![a-zA-Z]))",
            r"\\",
        ),
        (r"(?<!\\)\\[()\[\]]|\\?\$", ""),  # math delimiters and the dollar sign of money
        (r"\\(?:left|right)\s*\.", ""),
        (rf"\\(?:left|right|[bB]igg?[lr]?|middle){_NOT_LETTER}\s*", ""),
        (r"(?<=\d)(?:,\s*\\!|\{\s*,\s*\}|\\,)\s*(?=\d{3}(?!\d))", ""),  # marked thousands
        (r"\\!", ""),
        (
            r"(?:(?<!\\)\\[,:;> ]|~|\s|\\(?:q?quad|displaystyle|textstyle|limits|phantom|hline)" + _NOT_LETTER + ")+",
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
        *((rf"\\{name}{_NOT_LETTER}", sign) for name, sign in _SIGNS.items()),
        (r"(?i)(?<=\d)\s*(?:\\text\{\s*)?([ap])(?:\.\s?)?m\b\.?(?:\s*\})?", r" \1m"),
        (r"\*\*", "^"),
        (r"\*", r"\\cdot "),
        (r"(?<![\\a-zA-Z])pi(?![a-zA-Z])", r"\\pi "),
        (r"(?<![\\a-zA-Z])(?:infinity|inf|oo)(?![a-zA-Z])", r"\\infty "),
        (r"\\?(?<![a-zA-Z])sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"\\sqrt\s*(\[[^\[\]]*\])?\s*(\d+|[a-z](?![a-z]))", r"\\sqrt\1{\2}"),
        (
            r"(?<![\\a-zA-Z])((?:arc(?=[sct]))?)(sinh?|cosh?|tanh?|cot|sec|csc|ln|log|exp)"
            r"(?=\s*[(^_\\]|\s+[a-z\d](?![a-z]))",
            r"\\\1\2 ",
        ),
        (r"\^\s*(-\s*(?:\d+|[a-z])|\d{2,}|\([^()]*\))", r"^{\1}"),
        (r"\.{3,}|\\(?:[lc]?dots)(?![a-z])", r" \\dots "),
        (r"\\frac\s*(\w)\s*(\w)", r"\\frac{\1}{\2}"),
        (r"\\frac\s*(\w)\s*(?=\{)", r"\\frac{\1}"),
        (r"(\\frac\s*\{[^{}]*\})\s*(\w)", r"\1{\2}"),
        (r"\\text\s*\{\s*\}", " "),
        # "a, b and c", "a or b": one way of writing a list
        (r"\s*,?\s*\\text\{\s*,?\s*(?:and|or)?\s*,?\s*\}\s*", ", "),
        (r"\s*,?\s*(?<![a-zA-Z\\])(?:and|or)(?![a-z])\s*", ", "),
        (r"\s*;\s*", ", "),
        (r" {2,}", " "),
    ]
]
# "for all n", ", k \in \mathbb{Z}" after a formula: the unknowns it holds for.
_UNKNOWNS = r"[a-zA-Z](?:\s*,\s*[a-zA-Z])*"
_IN_NUMBERS = r"\s*\\in\s*\\mathbb\s*\{?\s*[A-Z]\s*\}?[\^_+*\s{}\d]*"
_QUALIFIER = re.compile(
    rf"(?:\s*,?\s*(?:\\text\{{\s*,?\s*(?:for|where|with)(?: all| any| every| some)?\s*\}}|\\forall)"
    rf"\s*{_UNKNOWNS}(?:{_IN_NUMBERS})?|\s*,\s*{_UNKNOWNS}{_IN_NUMBERS})$"
)


@lru_cache(maxsize=4096)
def normalise(text: str) -> str:
    """One notation for LaTeX, Unicode and plain text: spacing, sizes, fonts, short forms."""
    text = re.sub("[⁰¹²³⁴-⁻ⁿ]+", lambda m: f"^{{{m[0].translate(_RAISED)}}}", text)
    text = re.sub("[₀-₋ₙ]+", lambda m: f"_{{{m[0].translate(_LOWERED)}}}", text)
    text = _grouped(text.translate(_TRANSLATE))
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    text = re.sub(r"^\s*(?:=|\\approx|(?:approximately|about) )\s*", "", text)
    text = re.sub(r"(?:(?<!\\)[\s.,:]|\\\\)+$", "", text).strip()
    text = _QUALIFIER.sub("", text)
    while (inner := inside(text, "{", "}")) is not None:
        text = inner.strip()
    # A list or a number set entirely in \text is a list or a number.
    inner = inside(text, r"\text{", "}")
    return text if inner is None or not re.match(r"[^{}]*,|\s*[\d.+-]", inner) else inner.strip()


def _grouped(text: str) -> str:
    """p=5, q=2; p=7, q=2 as (p=5, q=2), (p=7, q=2): semicolons between groups of equal size."""
    groups = text.strip("$ ").split(";")
    commas = {group.count(",") for group in groups}
    if len(groups) < 2 or commas in ({0}, set()) or len(commas) > 1 or re.search(r"[()\[\]]", text):
        return text
    return ", ".join(f"({group.strip()})" for group in groups)


def inside(text: str, opening: str, closing: str) -> str | None:
    """What is between the brackets if one pair encloses the whole text, else None."""
    if not (text.startswith(opening) and text.endswith(closing)):
        return None
    inner = text[len(opening) : len(text) - len(closing)]
    depth = 0
    for token in re.findall(r"\\?.", inner, re.DOTALL):
        depth += (token[-1] in "([{") - (token[-1] in ")]}")
        if depth < 0:
            return None
    return inner if depth == 0 else None


def split(text: str, separator: str) -> list[str]:
    """Split at a separator (regex) outside all brackets; no split if brackets are unbalanced."""
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


def compact(text: str) -> str:
    """Without spaces (except between digits) and \\text, to compare texts as written."""
    text = re.sub(r"\\text\{\s*(.*?)\s*\}|(?<!\d)\s+|\s+(?!\d)", r"\1", text)
    return re.sub(r"([_^])\{(\w)\}(?!\w)", r"\1\2", text)


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
    """Words alone, without case, articles, punctuation or spaces; "four" and "4th" are 4."""
    text = re.sub(r"\\text\{([^{}]*)\}", r" \1 ", text).lower()
    text = re.sub(r"(?<=\d)(?:st|nd|rd|th)\b", "", text)
    text = re.sub(r"[^\w.:%+\-]+", " ", text)
    text = re.sub(r"(?<!\d)[.:]|[.:](?!\d)", "", text)
    text = re.sub(r"-(?!\d)|(?<=\w)-", " ", text)
    words = [word for word in text.split() if word not in _ARTICLES]
    return "".join(_NUMBER_WORDS.get(word) or _singular(word) for word in words)


def _singular(word: str) -> str:
    if len(word) < 4 or not word.endswith("s") or word.endswith(("ss", "us", "is")):
        return word
    if word.endswith("ies"):
        return word[:-3] + "y"
    return word[:-2] if word.endswith(("sses", "xes", "ches", "shes")) else word[:-1]


def wordy(text: str) -> bool:
    """Whether this is words and not a formula. Short lower-case runs like xy are products."""
    if re.search(r"\\text\{[^{}]*[^\W\d_]{2}|\d [APap]m$|\A[^\W\d_]{3,}\Z", text):
        return True
    formula = re.search(r"[\d+=^{}/\\|<>]", text) is not None
    return any(
        len(word) > 3
        or not word.isascii()
        or word.lower() in _NUMBER_WORDS
        or (len(word) > 1 and not word.islower() and not formula)
        for word in re.findall(r"[^\W\d_]+", _FUNCTIONS.sub(" ", text))
    )


def letters_in(text: str) -> set[str]:
    """The Latin letters of a formula, except those of its commands."""
    return set(re.findall(r"[a-zA-Z]", re.sub(r"\\[a-zA-Z]+", "", text)))
