"""Hostile answers, completions and gold answers: graded incorrect, quickly and without harm."""

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mm_agrae.grading.accuracy import verify
from mm_agrae.rewards.parts import follows_format

MARK = "hostile_code_ran"
DEPTHS = (30, 200, 450)
PAIRS = [
    *(("{", "}"), ("(", ")"), ("[", "]"), ("|", "|"), (r"\left(", r"\right)"), (r"\{", r"\}")),
    *((r"\frac{1}{", "}"), (r"\frac{", "}{3}"), (r"\sqrt{", "}"), (r"\sqrt[3]{", "}")),
    *((r"\text{", "}"), (r"\boxed{", "}"), ("x^{", "}"), ("a_{", "}"), (r"\begin{pmatrix}", "")),
    *((r"\sin(", ")"), (r"\log_{2}(", ")"), ("f(", ")"), ("-(", ")"), (r"\overline{", "}")),
]
NESTED = [
    *(opening * depth + "7" + closing * depth for (opening, closing), depth in product(PAIRS, DEPTHS)),
    *(opening * 300 + "7" for opening, _ in PAIRS),
    *("7" + closing * 300 for closing in ("}", ")", "]", r"\right)", r"\}", r"\end{pmatrix}")),
]
BASES = ("9", "99", "x", "(9)", r"\pi", "2.5", "i")
HUGE = [
    *(f"{base}^{{9^{{9^{{9}}}}}}" for base in BASES),
    *(f"{base}^{{999999999}}" for base in BASES),
    *(f"{base}**{base}**{base}**{base}" for base in BASES),
    *(f"({base}^9)^{{9^9}}" for base in BASES),
    *(f"{number}!" for number in ("99999", "(10^9)", "(9!)!", "((5!)!)!", "10!!!!!!!!", "9^9")),
    *(f"factorial({number})" for number in ("10**9", "factorial(99)")),
    *(rf"\binom{{{n}}}{{{k}}}" for n, k in (("10^9", "5"), ("10^{9}", r"5\cdot 10^8"), ("9^9", "x"))),
    *(f"1e{exponent}" for exponent in ("999", "9999", "999999999", "-999999999")),
    *(f"10^{{{exponent}}}" for exponent in ("99999999", "10^{10}", "-10^{10}")),
    *(f"{digit * 1900}" for digit in "789"),
    *("7." + "3" * 1900, "0." + "0" * 1900 + "1", "1/" + "7" * 1900, "7" * 950 + "/" + "3" * 949),
    *("9" * 1_000_000, "7 " * 500_000, "x+" * 500_000, r"\frac{1}{2}" * 90_000, "(" * 1_000_000),
    *(r"\sqrt[99999]{2}", r"\log_{10^{-999999}} 2", "2^{99999999} \\bmod 7", r"\sqrt{2}^{\sqrt{2}^{99}}"),
]
ENDLESS = [
    *(
        rf"{operator} {body}"
        for operator, body in product(
            (
                *(r"\sum_{i=1}^{10^{9}}", r"\sum_{i=1}^{\infty}", r"\prod_{i=1}^{10^8}"),
                *(r"\int_0^{\infty}", r"\int", r"\lim_{x \to 0}", r"\int_0^1 \int_0^1"),
            ),
            (r"\frac{1}{i^{x}+\sin i}", r"x^{x^{x}} \sin(e^{x}) dx", r"\frac{\sin(\tan(\sin x))}{x^{99}}"),
        )
    ),
    *(r"\sum" * 300, r"\int" * 300, r"\lim" * 300, r"\frac{d}{dx}" * 150 + "x", r"x_{x_{x}}" * 200),
    *("(x+1)^{500}(y+1)^{500}", "(a+b+c+d+e)^{90}", r"\sin" * 200 + "x", r"(\sin x)^{200}"),
    *("+".join(f"x_{{{k}}}^{{{k}}}" for k in range(150)), "*".join(f"(x+{k})" for k in range(200))),
]
CODE = [
    *(f"__import__('os').system('touch {MARK}')", f"open('{MARK}','w')", "exit()", "1;1", "lambda: 5"),
    *(f"exec(\"open('{MARK}', 'w')\")", f"eval(\"open('{MARK}','w')\")", "().__class__.__bases__[0]"),
    *("().__class__.__bases__[0].__subclasses__()", "${6*6}", "{{7*7}}", "#{7*7}", "`ls`", "$(ls)"),
    *(f"$(touch {MARK})", f"; touch {MARK}", f"| touch {MARK}", "%n%n%n%s%s", "{0.__class__}", "{!r}"),
    *("lambda x: x", "(lambda: (yield))()", "[x for x in range(10**9)]", "while True: pass", "import os"),
    *("True", "None", "5 if True else 4", "not 4", "print(5)", "input()", "globals()", "quit", "1 # 5"),
    *("Symbol('x')", "sympify('5')", "S(5)", "Integer(5)", "x.subs(x, 5)", "solve(x-5)", "N(5)", "E1(2)"),
    *("'; DROP TABLE x; --", "<script>5</script>", "<answer>5</answer", "\\input{/etc/passwd}"),
    *(r"\def\a{\a\a}\a", r"\newcommand{\x}{\x\x}\x", r"\write18{ls}", r"\csname x\endcsname", r"\catcode`\%=7"),
]
CHARACTERS = [
    *(f"5{chr(code)}" for code in range(32) if chr(code) not in "\t\n\r\x0b\x0c\x1c\x1d\x1e\x1f"),
    *(f"{chr(code)}5" for code in (0, 7, 8, 27, 127, 0xD800, 0xDFFF)),
    *("5\udfff", "\ud8005", "\ud800\udc005", "5\U0010ffff", "5\ufffd", "5\ufffe"),
    *(f"{mark}5" for mark in "\u202a\u202b\u202d\u202e\u2066\u2067\u2068\u061c\u200e\u200f"),
    *("\u06615", "五", "Ⅴ", "⑤", "5" + "\u0301" * 900, "𝕏" * 900, "🙂" * 900, "5🙂", "ﷺ" * 300),
]
REPEATED = [
    *(
        token * (1800 // len(token))
        for token in (
            *("x", "a ", "1 ", "5,", "5%", "x=", "1:", "x<", "{}", "()", "[]", "^", "_", "|", "&", "\\"),
            *(" and ", "or ", ";", r"\cup ", r"\pm ", r"5^\circ", r"\left", "sqrt(", r"\sqrt", r"\frac"),
            *("{,}", r"\!", r"\,", r"\text{}", r"\text{a}", "5\\text{ cm}", "$", "$$", r"\[", r"\(", r"\ "),
            *("1/", "-", "+", "*", "!", "'", '"', "=", "\n", "\t", ".", "..", "0", "½", "√", "²", "°"),
            *("1,000,", "5 or ", "(1,", "{1;", "[1,2)", r"\in", r"\le ", "a:b", "e", "1e", "0x", r"\\"),
        )
    ),
    *("-", "+", ".", ",", "$", "- -", "", " ", "{}", "nan", r"\text{nan}", "zoo", "oo", "1e9999999", "0x5"),
    *("5e", "5 or 1234", "5, 1234", r"\infty - \infty", r"\frac{0}{0}", r"\frac{5}{0}", "0^{-1}", r"\pm\pm5"),
    *(r"\begin{pmatrix}" + "1&" * 600 + r"\end{pmatrix}", r"\begin{pmatrix}" + r"1\\" * 400 + r"\end{pmatrix}"),
    *(r"\begin{matrix}5", r"\end{matrix}5", r"\begin{a}\begin{b}\end{a}", "A" * 30, "B " * 900, "(B" * 600),
]
HOSTILE = list(dict.fromkeys([*NESTED, *HUGE, *ENDLESS, *CODE, *CHARACTERS, *REPEATED]))
GOLDS = ["5", r"\frac{1}{2}", "(1,2)", "x^2+1", "B", "Evelyn", "0.25", r"(-\infty,2)", "yes", "5 cm"]
LIMIT_S = 1.0


def test_there_are_enough():
    assert len(HOSTILE) >= 300


@pytest.mark.parametrize("turn", range(len(GOLDS)))
def test_hostile_answers_are_incorrect_and_harmless(turn, tmp_path, monkeypatch):
    """Each answer against two gold answers, the easily decided "5" and another in turn."""
    monkeypatch.chdir(tmp_path)
    for answer in HOSTILE[turn :: len(GOLDS)]:
        for gold in ("5", GOLDS[turn]):
            boxed = f"\\boxed{{{answer}}}"
            assert not verify(gold, boxed, time_limit_s=LIMIT_S), (gold, answer[:80])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["math", "number", "choice", "yes_no", "text"])
def test_hostile_answers_of_every_kind(kind):
    choices = ("12", r"\frac{1}{3}", "no") if kind == "choice" else ()
    options = {"kind": kind, "choices": choices, "time_limit_s": LIMIT_S}
    for gold, answer in product(["12", "yes"], HOSTILE[::4]):
        assert not verify(gold, f"\\boxed{{{answer}}}", **options), answer[:80]


@pytest.mark.parametrize("form", ["{}", "The answer is {}", "So we have\n{}.", "<answer>{}</answer>"])
def test_hostile_answers_outside_boxes(form):
    for answer in HOSTILE[len(form) % 3 :: 3]:
        if "boxed" not in answer:
            completion = form.replace("{}", answer)
            assert verify("1234567", completion, time_limit_s=LIMIT_S) is False, answer[:80]


def test_hostile_gold_answers():
    for gold in [*(text for text in HOSTILE if text not in ENDLESS)][::4]:
        assert verify(gold, r"\boxed{17}", time_limit_s=LIMIT_S) is False, gold[:80]
        # Compared to itself it is correct unless it is empty or too long to be considered.
        assert verify(gold, f"\\boxed{{{gold}}}", time_limit_s=LIMIT_S) in (True, False)


def test_hostile_completions():
    million = 1_000_000
    for text in (
        r"\boxed{" * 100_000,
        r"\boxed{" * 50_000 + "}" * 50_000,
        r"\boxed{7} and " * 50_000,
        r"\boxed{7}" * 50_000,
        "{" * 100_000,
        "answer is " * 100_000,
        "answer to " * 100_000,
        "final answer\n" * 50_000,
        "final answer: " * 50_000,
        "<think>" * 100_000,
        "</think>" * 100_000,
        "<answer>" * 100_000,
        "</answer>" * 100_000,
        r"\boxed" + " " * million,
        r"\boxed " + "a" * million,
        "\\" * million,
        "$" * million,
        "$ " * (million // 2),
        r"\[ " * (million // 3),
        r"\( " * (million // 3),
        r"\begin{align}" * 50_000,
        "\n" * million,
        "6 " * million,
        "is " * (million // 3),
        "= 6" * (million // 3),
        "6. A" * (million // 4),
        "*" * million,
        "not " * (million // 4),
        "a" * million,
    ):
        assert not verify("5", text)
        assert not follows_format(text)
        assert not verify("yes", text)
        follows_format("<think>a</think>" + text)  # comes to an end


def test_a_formula_that_sympy_cannot_decide_in_time_is_incorrect():
    endless = [rf"\sum_{{k=1}}^{{10^{{9}}}} \sqrt{{k + {a}}}" for a in (1, 2)]
    assert not verify(endless[0], rf"\boxed{{{endless[1]}}}", time_limit_s=0.3)
    assert verify("x^2 + 2x + 1", r"\boxed{(x+1)^2}")


PIECES = r"""\boxed{ \fbox{ \boxed \frac \sqrt \text{ \left( \right) \{ \} \begin{pmatrix} \\ & \pm
\end{pmatrix} \cup \infty \le < > = \approx \circ ^\circ % \% \$ $ 1 23 4.5 , . and or ( ) [ ] { }
x y e i A B) (C) yes No cm ^2 ^ _ / : - + * ** ! | two π √ ½ ° square per feet Answer: <think>
</think> <answer> </answer> answer is"""
TOKENS = st.sampled_from([*PIECES.split(), " ", "\n", "\0"])
ANYTHING = st.lists(TOKENS | st.characters(), max_size=14).map("".join)
KINDS = st.sampled_from(["auto", "number", "choice", "yes_no", "text"])


@settings(max_examples=400, deadline=None)
@given(gold=ANYTHING, completion=ANYTHING, kind=KINDS)
def test_never_raises(gold, completion, kind):
    for text in (completion, rf"\boxed{{{completion}}}"):
        assert verify(gold, text, kind=kind, choices=("12", "x + 1")) in (True, False)
        assert follows_format(text) in (True, False)
