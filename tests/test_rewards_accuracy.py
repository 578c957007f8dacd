r"""Grading: right answers in every way of writing them, wrong ones however near, hostile text."""

import json
import math
import multiprocessing
import os
import random
import subprocess
import sys
import threading
from fractions import Fraction
from functools import cache
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mm_agrae.config import RewardSection
from mm_agrae.rewards import Rewarder
from mm_agrae.rewards.accuracy import extract_answer, verify
from mm_agrae.rewards.equivalence import Number, agree, as_text, normalise, number, symbolic
from mm_agrae.rewards.format import follows
from mm_agrae.types import Completion, Example

# gold answer, answer in the box
RIGHT = r"""
5                  | 5.0
5                  | x = 5
5                  | 5=x
5                  | +5
5                  | \text{5}
5                  | about 5
5                  | 5.
5                  | 500%
0.05               | 5%
50\%               | 1/2
50\%               | 0.5
50\%               | 50
25                 | 25\%
\frac12            | \dfrac{1}{2}
\frac{1}{2}        | 0.5
\frac{1}{2}        | ½
-\frac{1}{2}       | \frac{-1}{2}
-\frac{1}{2}       | \frac{1}{-2}
-\frac{17}7        | -17/7
\frac{1}{3}        | 0.333333
\frac{3}{5}        | 6/10
4 \frac{4}{11}     | 48/11
1\frac{12}{13}     | 25/13
2½                 | 5/2
1,234              | 1234
1234567            | 1,234,567
11,\! 111,\! 100   | 11111100
32{,}000           | 32000
10000              | 10 000
.35625             | 0.35625
1.5\times 10^{3}   | 1500
6.02e23            | 6.02 \times 10^{23}
12345678901234567890 | 12345678901234567890.0
2^{200}            | 1606938044258990275541962092341162602522202993782792835301376
10!                | 3628800
\binom{10}{3}      | 120
1024               | 2^{10} = 1024
113                | m + n = 113
9\pi               | A = \pi r^2 = 9\pi
90                 | m\angle ABC = 90^\circ
18.8               | 18.79
8.246              | \sqrt{68}
3.14               | 3.1416
\$18.90            | 18.9
\$5                | 5 dollars
\$36               | 36.00
5 cm               | 5
5\text{ cm}        | 5cm
5 m                | 500 cm
1 hour             | 60 \text{ minutes}
12\text{ cm}^2     | 12 square centimeters
12                 | 12 \text{ sq cm}
60 mph             | 60 \text{ miles per hour}
24 units           | 24 cm
575\text{ students} | 575
18\text{ ways.}    | 18 \text{ arrangements}
120^\circ          | 120
120^\circ          | 120°
120^\circ          | 120 \text{ degrees}
329° T             | 329
329° T             | 329^\circ \text{T}
20^\circ           | 20^\circ \text{C}
Area $=9 \pi \mathrm{cm}^{2}$ | 9\pi
2\pi               | 2π
2\pi               | 2*pi
2\pi               | 6.283185
\sqrt 2            | \sqrt{2}
2\sqrt{3}          | 2√3
\frac{\sqrt{3}}{2} | sqrt(3)/2
6+9i               | 9i+6
3i                 | 3\text{i}
e^{i\pi}           | -1
\log_2 8           | 3
\sin 30^\circ      | \frac12
x^2+2x+1           | (x+1)^2
x^{0.5}            | \sqrt{x}
0.5x               | x/2
ab                 | ba
|x-2|              | |2-x|
\tan x             | \frac{\sin x}{\cos x}
\frac{x+1}{2}      | (x+1)/2
3s^2               | 3 s^{2}
1,-2               | -2, 1
1,2                | x = 1 \text{ or } x = 2
6, 8\text{, and }10 | 10, 8, 6
\{1,2,3\}          | 3, 2, 1
3 \pm 2\sqrt{2}    | 3-2\sqrt2, 3+2\sqrt2
(3,4)              | \left( 3, 4 \right)
(3,4)              | x=3, y=4
(3,4)              | (x,y) = (3,4)
x=3, y=4           | y = 4, x = 3
(1,2),(3,4)        | (3,4), (1,2)
[0,1)              | 0 \leq x < 1
x \in [-2,7]       | [-2, 7]
x \geq 3           | [3, \infty)
x < 3              | 3 > x
x \ne 2            | (-\infty,2) \cup (2,\infty)
(-\infty,2)\cup(3,\infty) | (3,∞) ∪ (-∞,2)
(-\infty,2)\cup(3,\infty) | x < 2 or x > 3
\mathbb{R}\setminus\{2\} | (-\infty,2) \cup (2,\infty)
\emptyset          | \varnothing
y = 2x+3           | 2x - y + 3 = 0
y = 2x+3           | 2x+3
f(x)=x^2           | x^2
x^2 + y^2 = 1      | 2x^2 + 2y^2 = 2
y \le 2x+3         | 2x+3 \ge y
\begin{pmatrix}1\\2\end{pmatrix} | \begin{bmatrix}1\\2\end{bmatrix}
\begin{pmatrix} 1/2 & 0 \\ 0 & 1 \end{pmatrix} | \begin{pmatrix} 0.5&0\\0&1\end{pmatrix}
1101_2             | 1101_{2}
1101_2             | 1101
\text{A5}_{11}     | A5_{11}
5:6                | 10:12
5:6                | 5/6
\text{Evelyn}      | evelyn
\text{even}        | \textbf{Even}
\text{June 20}     | June 20th
\text{(B)}         | B
\text{(B)}         | (b)
\text{A, D, F}     | D, A, F
\mbox{four}        | 4
3:30 p.m.          | 3:30 \text{ PM}
9\text{ a.m.}      | 9 AM
The pancreas       | Pancreas
Ring-enhancing lesion | ring enhancing lesion
45613              | 45\,613
2.75               | 2,75
10^{-3}            | 10^-3
\frac{3}{4}        | B_{\max} = 0.75
t \le 4            | t \leqq 4
4n+1               | 4n + 1, \ n \in \mathbb{Z}
7^n                | 7^n \text{ for all } n
3^k                | 3^k \text{ ways}
\frac{\pi}{6}      | 30^\circ
3\pi(1+\sqrt{5})   | 3\pi\bigl(1+\sqrt5\bigr)
[1, 5)             | \biggl[1, 5\biggr)
8 - c              | -c + 8
1 - h              | -h + 1
-x < -2            | x > 2
\{2\pm\sqrt{3}, 1\} | 1, 2-\sqrt3, 2+\sqrt3
\begin{pmatrix}4&6\end{pmatrix} | \begin{pmatrix}1&2\end{pmatrix}+\begin{pmatrix}3&4\end{pmatrix}
f(3) = 7           | 7
\frac{6}{3} = 2    | 2
"""
WRONG = r"""
5                  | 500
5                  | -5
5                  | 5.0000001
5                  | 4 or 5
5                  | 4, 5
5                  | 5, 5
5                  | \{4, 5\}
5                  | 55
0.8                | 80
50\%               | 5000
4                  | x^2 = 4
4                  | 4 \pm 0.5
\frac{1}{3}        | 0.33
\frac{1}{3}        | 0.333
\frac{1}{2}        | 2
2\pi               | 6.28
\sqrt{2}           | 1.414
18.8               | 19
18.8               | 18.9
0.5                | 0.54
12.5               | 12.54
3.14               | 3.15
12345678901234567890 | 12345678901234567891
100000000000000000000000 | 100000000000000000000001
2^{200}            | 1606938044258990275541962092341162602522202993782792835301377
5 cm               | 5 m
5 cm               | 5 \text{ apples}
20\text{ days}     | 20 hours
12 cm^2            | 12 cm
9\text{ a.m.}      | 9 p.m.
3i                 | 3
3                  | 3i
i                  | -i
x^2+2x+1           | (x+2)^2
\frac{x+1}{2}      | x+1/2
x                  | |x|
n^2                | N^2
x=5                | y=5
x=3, y=4           | 4, 3
(1,2)              | (2,1)
(1,2)              | [1,2]
[1,2]              | (1,2]
1,2                | [1,2]
\{1,2\}            | (1,2)
1,2                | 1
1                  | 1, 2
1,2,3              | 1,2
1,1,2              | 1,2
[0,1)              | 0 < x < 1
x < 3              | y < 3
x < 3              | x \le 3
(-\infty,2)\cup(3,\infty) | (-\infty,2)
x^2 + y^2 = 1      | x^2 + y^2 = 2
x^2 + y^2 = 13     | 13
\begin{pmatrix}1\\2\end{pmatrix} | \begin{pmatrix}2\\1\end{pmatrix}
\begin{pmatrix}1\\2\end{pmatrix} | \begin{pmatrix}1&2\end{pmatrix}
1101_2             | 1101_3
1101_2             | 13
5:6                | 6:5
\text{even}        | odd
Left hepatic lobe  | Right hepatic lobe
no                 | on
0.56 = 56\%        | 0.56 = 53\%
1/0                | \frac{1}{0}
\text{(B)}         | B or C
\text{(B)}         | not B
\text{(B)}         | BC
23                 | 2\,3
stream             | master
2                  | 2 \text{ for } n \ge 3, 1 \text{ for } n = 2
3                  | x >= 3
4                  | 4m
5R^2 h             | 5R^2
1, 2               | 1 < x < 2
1, 2, 3            | 1, 2, 3, \ldots
(1, 2)             | x^2 - 3x + 2 < 0
\alpha = 30^\circ  | \beta = 30^\circ
2x + 1 = 7         | 7
6:30               | 2:10
12:00              | 1:00
"""


def table(text):
    return [tuple(cell.strip() for cell in line.split(" | ")) for line in text.strip().splitlines()]


@pytest.mark.parametrize(("gold", "answer"), table(RIGHT))
def test_same_answer_written_otherwise(gold, answer):
    assert verify(gold, rf"So it is $\boxed{{{answer}}}$.")


@pytest.mark.parametrize(("gold", "answer"), table(WRONG))
def test_other_answer(gold, answer):
    assert not verify(gold, rf"So it is $\boxed{{{answer}}}$.")


@pytest.mark.parametrize("gold", [r"$\frac12$", r"\(\frac12\)", r"\boxed{\frac12}", r" \frac12 "])
def test_gold_answer_with_and_without_delimiters(gold):
    assert verify(gold, r"\boxed{1/2}")
    assert not verify(gold, r"\boxed{1/3}")


@pytest.mark.parametrize(
    ("gold", "answer", "choices", "right"),
    [
        ("B", "B", ("1", "2", "3"), True),
        ("B", "2", ("1", "2", "3"), True),
        ("B", "B) 2", ("1", "2", "3"), True),
        ("B", "B - 2", ("1", "2", "3"), True),
        ("B", "Option B", ("1", "2", "3"), True),
        ("B", r"\textbf{(B)}\ 2", ("1", "2", "3"), True),
        ("B", "B) 3", ("1", "2", "3"), False),
        ("B", "B, because 2", ("1", "2", "3"), False),
        ("B", "A or B", ("1", "2", "3"), False),
        ("B", "E", ("1", "2", "3"), False),
        ("B", "3", ("1", "2", "3"), False),
        ("2", "B", ("1", "2", "3"), True),
        ("2", "C", ("1", "2", "3"), False),
        ("B", "0.5", (r"\frac13", r"$\frac12$"), True),
        ("B", r"15 \text{ cm}", ("12 cm", "15 cm"), True),
        ("A", "a triangle", ("a triangle", "a square"), True),
        ("B", "a triangle", ("a triangle", "a square"), False),
        ("B", "A square", ("a triangle", "a square"), True),
        ("B", "they met", ("A. They parted.", "B. They met."), True),
        ("C", "Yes", ("No", "Maybe", "Yes"), True),
        ("C\nD", "C, D", ("a", "b", "c", "d"), True),
        ("C", "D", ("9", "12", "18", "18"), True),
        ("18", "D", ("9", "12", "18", "18"), True),
        ("18", "C, D", ("9", "12", "18", "18"), False),
        ("C\nD", "C", ("a", "b", "c", "d"), False),
        ("B", "B) 15", (), True),
        ("B", "B, C", (), False),
        ("B", "Both A and B", (), False),
    ],
)
def test_choice(gold, answer, choices, right):
    completion = rf"\boxed{{{answer}}}"
    assert verify(gold, completion, kind="choice", choices=choices) is right
    if choices:
        assert verify(gold, completion, choices=choices) is right


@pytest.mark.parametrize(
    ("gold", "answer", "right"),
    [
        ("yes", "Yes, there is", True),
        ("Yes", r"\text{yes}", True),
        ("no", "No.", True),
        ("yes", "Yes, no effusion", True),
        ("Yes", "no", False),
        ("no", "None", False),
        ("no", "not sure", False),
        ("yes", "yes/no", False),
        ("yes", "yes or no", False),
    ],
)
def test_yes_no(gold, answer, right):
    assert verify(gold, rf"\boxed{{{answer}}}") is right


@pytest.mark.parametrize(
    ("gold", "answer", "options", "right"),
    [
        ("5", "It takes 5 days.", {}, True),
        ("5", "It takes 4 to 5 days.", {}, False),
        ("1234", "It is 1,234 in all", {}, True),
        ("12.5", "The area is 12.5 cm^2", {}, True),
        ("12.5", "12.6", {"tolerance": 0.01}, True),
        ("12.5", "12.7", {"tolerance": 0.01}, False),
        ("100", "101", {"tolerance": 0.01}, True),
        ("100", "101", {}, False),
        ("5 cm", "5", {"units": "required"}, False),
        ("5 cm", "5 cm", {"units": "required"}, True),
        ("5 cm", "5 m", {"units": "ignore"}, True),
    ],
)
def test_number_settings(gold, answer, options, right):
    assert verify(gold, rf"\boxed{{{answer}}}", kind="number", **options) is right


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        (r"\boxed{5}", "5"),
        (r"first \boxed{3}, no: it must be \boxed{5}", "5"),
        (r"\boxed{\frac{1}{\sqrt{2}}} holds", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed {5}", "5"),
        (r"$\boxed 5$.", "5"),
        (r"\fbox{5}", "5"),
        (r"\boxed{x = \boxed{5}}", "5"),
        (r"\boxed{4} or \boxed{5}", "4, 5"),
        (r"\boxed{\text{(B)}}", r"\text{(B)}"),
        (r"\boxed{5} <answer>7</answer>", "5"),
        (r"\boxed{}", None),
        (r"\boxed{ }", None),
        (r"\boxed{5} or rather \boxed{6", None),
        ("The answer is 5.", "5"),
        ("The final answer is: $\\frac12$. I hope it is correct.", r"$\frac12$"),
        ("answer is 4. No, the answer is 5 cm, because of that.", "5 cm"),
        ("**Answer:** 5", "5"),
        ("The answer to this is $10!$.", "$10!$"),
        ("Final answer:\n\\[\nx^2\n\\]", "\nx^2\n".strip()),
        ("so 18 * 2 = 36\n#### 36", "36"),
        ("Final Answer: The largest such $n$ is 34. I hope it is correct.", "34"),
        ("Therefore $x = 7$ is the solution.", "x = 7"),
        (r"\[\boxed{-2} \quad \text{and} \quad \boxed{1}.\]", "-2, 1"),
        ("<answer> 5 </answer>", "5"),
        ("42", "42"),
        ("A sentence that is far too long to be an answer by itself, for it goes on and on.", None),
        ("one line\n42", None),
        ("", None),
    ],
)
def test_where_the_answer_stands(completion, expected):
    assert extract_answer(completion) == expected


def test_places_are_settings():
    text = r"The answer is 3. <answer>4</answer> \boxed{5}"
    assert extract_answer(text, answer_in=("tag", "boxed")) == "4"
    assert extract_answer(text, answer_in=("answer_is",)) == "3"
    assert extract_answer("<final>6</final>", answer_in=("tag",), answer_tag="final") == "6"
    assert extract_answer("42", bare_limit=0) is None
    with pytest.raises(ValueError, match=r"answer_in is 'box'; valid: boxed"):
        extract_answer(text, answer_in=("box",))
    with pytest.raises(ValueError, match="kind is 'maths'"):
        verify("5", "5", kind="maths")
    with pytest.raises(ValueError, match="units is 'none'"):
        verify("5", "5", units="none")


@pytest.mark.parametrize(
    ("completion", "right", "right_anywhere"),
    [
        (r"<think>hm</think> \boxed{5}", True, True),
        (r"<think>\boxed{5}</think> so be it", False, True),
        (r"<think>\boxed{5}</think>", False, True),
        (r"<think>\boxed{4}</think> \boxed{5}", True, True),
        (r"<think>it is \boxed{5}", False, True),
        (r"opened by the prompt: \boxed{4} </think> \boxed{5}", True, True),
        (r"opened by the prompt: \boxed{5} </think> I do not know", False, True),
        (r"<think>a</think> \boxed{5} <think>b</think>", True, True),
        (r"<think>a</think> \boxed{5} <think>b", False, True),
        (r"no tags \boxed{5}", True, True),
    ],
)
def test_answer_after_thinking(completion, right, right_anywhere):
    assert verify("5", completion) is right
    assert verify("5", completion, after_thinking=False) is right_anywhere


@pytest.mark.parametrize(
    ("completion", "good"),
    [
        (r"<think>two and two</think> It is \boxed{4}.", True),
        (r"  <think>a \boxed{3}?</think>\boxed{\frac{1}{2}}", True),
        (r"<think></think> \boxed{4}", False),
        (r"<think> </think> \boxed{4}", False),
        (r"\boxed{4}", False),
        (r"Well <think>a</think> \boxed{4}", False),
        (r"<think>a</think> 4", False),
        (r"<think>a</think> \boxed{}", False),
        (r"<think>a</think> \boxed{4", False),
        (r"<think>a</think> \boxed{4} \boxed{5}", False),
        (r"<think>a <think>b</think> \boxed{4}", False),
        (r"<think>a</think> \boxed{4} </think>", False),
        (r"<think>a \boxed{4}", False),
        ("", False),
    ],
)
def test_format(completion, good):
    assert follows(completion) is good


def test_format_with_other_tags():
    completion = r"<reason>a</reason> \boxed{4}"
    assert follows(completion, open_tag="<reason>", close_tag="</reason>")
    assert not follows(completion)
    assert follows(r"opened by the prompt</think> \boxed{4}", open_tag="")
    assert not follows(r"</think> \boxed{4}", open_tag="")


# ------------------------------------------------------------------------------ hostile text

HARD = ("x^2 + 2x + 1", r"\boxed{(x+1)^2}")  # needs sympy, so a worker process
MARK = "hostile_code_ran"
HOSTILE = [
    *("", " ", r"\boxed{}", "{}", "{", "}", "{" * 1900, "(" * 900 + "1" + ")" * 900),
    *("9**9**9**9", "9^{9^{9^9}}", r"9^{9^9}", "10^{10^{10}}", r"(10^9)!", "99999!", "5!!!!!!!!"),
    *("factorial(10**9)", r"\binom{10^{9}}{5\cdot 10^8}", r"\sum_{i=1}^{10^{9}} \frac{1}{i}"),
    *(r"\int_0^{\infty} x^{x^{x}} \sin(e^{x}) dx", r"\prod_{k=1}^{10^8} k", r"2^{99999999}"),
    *(r"\lim_{x \to 0} \frac{\sin(\tan(\sin x))}{x^{99}}", r"\sqrt[99999]{2}", "7" * 1900),
    *("9" * 1_000_000, r"\frac{1}{" * 150 + "1" + "}" * 150, r"\text{" * 200 + "}" * 200),
    *(
        f"__import__('os').system('touch {MARK}')",
        f"open('{MARK}','w')",
        "exit()",
        "1;1",
        "lambda: 5",
    ),
    *(
        f"exec(\"open('{MARK}', 'w')\")",
        "().__class__.__bases__[0].__subclasses__()",
        "${6*6}",
        "{{7*7}}",
    ),
    *("5\x00", "\x005", "\ud8005", "5\udfff", "\u202e5", "5\u200f", "\u06615", "٥", "५"),
    *(
        "x" * 1500,
        "a " * 900,
        "1 " * 900,
        "5," * 900,
        "5%" * 900,
        "x=" * 900,
        "1:" * 900,
        "x<" * 900,
    ),
    *(" and " * 400, r"\cup" * 400, r"\pm" * 600, r"5^\circ" * 250, r"\begin{pmatrix}" * 100),
    *(
        r"\begin{pmatrix}" + "1&" * 600 + r"\end{pmatrix}",
        r"\def\a{\a\a}\a",
        r"\input{/etc/passwd}",
    ),
    *(
        "nan",
        r"\text{nan}",
        "zoo",
        "oo",
        r"\infty - \infty",
        r"\frac{0}{0}",
        "-",
        "+",
        ".",
        ",",
        "$",
    ),
    *(
        r"\left" * 300,
        "sqrt(" * 300,
        r"\sqrt" * 300,
        r"\frac" * 300,
        "^" * 900,
        "_" * 900,
        "|" * 900,
    ),
    *("True", "5 if True else 4", "5 or 1234", "5, 1234", "1e999", "1e9999999", "0x5", "5e", "- -"),
]
GOLDS = ["5", r"\frac{1}{2}", "(1,2)", r"x^2+1", "B", "Evelyn", "0.25", r"(-\infty,2)"]


@pytest.mark.parametrize("gold", GOLDS)
def test_hostile_answers_are_wrong_and_harmless(gold, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(HOSTILE) * len(GOLDS) > 300
    for answer in HOSTILE:
        assert not verify(gold, f"\\boxed{{{answer}}}", time_limit_s=0.5), answer[:80]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["math", "number", "choice", "yes_no", "text"])
def test_hostile_answers_of_every_kind(kind):
    choices = ("12", r"\frac{1}{3}", "no") if kind == "choice" else ()
    for gold, answer in product(["12", "yes"], HOSTILE):
        settings = {"kind": kind, "choices": choices, "time_limit_s": 0.5}
        assert not verify(gold, f"\\boxed{{{answer}}}", **settings), answer[:80]


def test_hostile_completions():
    million = 1_000_000
    for text in (
        r"\boxed{" * 100_000,
        r"\boxed{" * 50_000 + "}" * 50_000,
        "{" * 100_000,
        "answer is " * 100_000,
        "answer to " * 100_000,
        "<think>" * 100_000,
        "<answer>" * 100_000,
        r"\boxed" + " " * million,
        r"\boxed " + "a" * million,
        "\\" * million,
        "$" * million,
        "\n" * million,
        "5 " * million,
    ):
        assert not verify("5", text)
        assert not follows(text)
        follows("<think>a</think>" + text)  # comes to an end


def test_a_formula_that_sympy_cannot_decide_in_time_is_wrong():
    endless = [rf"\sum_{{k=1}}^{{10^{{9}}}} \sqrt{{k + {a}}}" for a in (1, 2)]
    assert not verify(endless[0], rf"\boxed{{{endless[1]}}}", time_limit_s=0.3)
    assert verify(*HARD)


def test_an_empty_gold_answer_is_never_matched():
    for gold in ("", " ", r"\boxed{}", "$$"):
        for answer in ("", " ", "0", "{}", "$$"):
            assert not verify(gold, rf"\boxed{{{answer}}}")


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
        assert follows(text) in (True, False)


# ----------------------------------------------------------------------------------- numbers


@given(st.fractions(max_denominator=10**6), st.integers(1, 99))
def test_fractions_are_exact(value, factor):
    p, q = value.numerator, value.denominator
    assert number(f"{p * factor}/{q * factor}" if p >= 0 else f"-{-p * factor}/{q * factor}") == (
        Number(value)
    )
    sign = "-" if p < 0 else ""
    assert verify(f"{p}/{q}", rf"\boxed{{{sign}\frac{{{abs(p) * factor}}}{{{q * factor}}}}}")
    assert not verify(
        f"{p}/{q}", rf"\boxed{{{sign}\frac{{{abs(p) * factor + 1}}}{{{q * factor}}}}}"
    )


@given(st.integers(-(10**80), 10**80), st.integers(1, 10**9))
def test_integers_are_exact(value, other):
    assert verify(str(value), rf"\boxed{{{value:,}}}")
    assert not verify(str(value), rf"\boxed{{{value + other}}}")


def test_what_rounding_explains():
    third, pi = Number(Fraction(1, 3)), Number(Fraction(math.pi))
    assert agree(third, number("0.333333"))
    assert not agree(third, number("0.333332"))
    assert not agree(third, number("0.33333"))
    assert agree(pi, number("3.141593"))
    assert not agree(pi, number("3.1416"))
    assert agree(number("31.4"), Number(Fraction(math.pi) * 10))
    assert not agree(number("31.4"), number("31.5"))
    assert not agree(Number(Fraction(5)), number("4.99999999"))
    assert agree(Number(Fraction(1, 8)), number("0.125"))
    assert not agree(Number(Fraction(1, 8)), number("0.13"))


def test_formulas_are_told_apart():
    assert symbolic(r"\frac{x^2-1}{x-1}", "x+1", None)
    assert symbolic(r"\sqrt{12}", r"2\sqrt{3}", None)
    assert not symbolic(r"\sqrt{12}", r"2\sqrt{3} + 10^{-15}", None)
    assert not symbolic("x^2", "x^2 + 10^{-15}", None)
    assert symbolic(r"\sqrt{2}", "1.42", 0.01)
    assert not symbolic("no formula {", "no formula {", None)


# ------------------------------------------------------------------------------ where it runs


def test_from_threads():
    verdicts = []

    def work(k):
        verdicts.append(verify(rf"x^2 + {2 * k}x + {k * k}", rf"\boxed{{(x+{k})^2}}"))

    threads = [threading.Thread(target=work, args=(k,)) for k in range(2, 10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert verdicts == [True] * 8


def _in_child(queue):
    queue.put(verify(*HARD))


@pytest.mark.filterwarnings("ignore:.*fork.*")
@pytest.mark.skipif(sys.platform != "linux", reason="needs fork")
def test_from_a_forked_daemonic_process():
    assert verify(*HARD)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_in_child, args=(queue,), daemon=True)
    child.start()
    assert queue.get(timeout=60) is True
    child.join()


def test_a_script_without_a_main_guard(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "print('started')\n"
        "from mm_agrae.rewards.accuracy import verify\n"
        f"print(verify({HARD[0]!r}, {HARD[1]!r}))\n"
    )
    result = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=120
    )
    assert result.stdout.split() == ["started", "True"], result.stderr
    assert result.stderr == ""


# ---------------------------------------------------------------------------------- real data

DATA = Path(os.environ.get("MM_AGRAE_DATA") or Path(__file__).parents[2] / "shared" / "data")
real_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"needs the data sets in {DATA}")


@cache
def rows():
    """(data set, row), read once."""
    return [
        (path.parent.name, json.loads(line))
        for path in sorted(DATA.glob("*/*.jsonl"))
        for line in path.open(encoding="utf-8")
    ]


def verdicts(questions):
    """Success for each (gold, answer, choices), by the reward pool: thousands at once."""
    examples = [
        Example(id=str(k), question="", answer=gold, grading={"choices": choices})
        for k, (gold, _, choices) in enumerate(questions)
    ]
    completions = [
        Completion((), (), rf"Hence $\boxed{{{answer}}}$.", "stop", 0) for _, answer, _ in questions
    ]
    with Rewarder(RewardSection(), max_new_tokens=1) as rewarder:
        scores = rewarder.score(examples, completions)
    assert [score.error for score in scores if score.error] == []
    return [score.success for score in scores]


@real_data
def test_every_real_gold_answer_is_right():
    questions = []
    for _, row in rows():
        answer, value = row["answer"], row.get("answer_value")
        choices = tuple(row.get("choices") or ())
        questions.append((answer, answer, choices))
        if value:
            questions += [(value, value, ()), (answer, value, choices), (value, answer, choices)]
    found = verdicts(questions)
    assert [q for q, right in zip(questions, found, strict=True) if not right] == []


@real_data
def test_other_real_answers_are_wrong():
    by_set: dict[str, set[str]] = {}
    for name, row in rows():
        by_set.setdefault(name, set()).add(row.get("answer_value") or row["answer"])
    draw = random.Random(0)
    questions = [
        (*draw.sample(sorted(answers), 2), ()) for answers in by_set.values() for _ in range(150)
    ]
    for (gold, other, _), right in zip(questions, verdicts(questions), strict=True):
        as_words = [as_text(normalise(text.rpartition("=")[2])) for text in (gold, other)]
        assert not right or as_words[0] == as_words[1], (gold, other)


@real_data
def test_real_solutions_give_their_answer():
    solved = [(name, row) for name, row in rows() if row.get("solution")]
    assert len(solved) > 1000
    for name, row in solved:
        solution, answer = row["solution"], row["answer"]
        if name == "gsm8k":
            solution += f"\n#### {answer}"
        assert verify(answer, solution), row
        assert verify(answer, f"<think>{solution}</think> The answer is ${answer}$."), row
