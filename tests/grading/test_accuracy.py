r"""Grading: correct answers however they are written, incorrect ones however close."""

import math
import multiprocessing
import subprocess
import sys
import threading
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mm_agrae.grading.accuracy import verify
from mm_agrae.grading.formulas import symbolic
from mm_agrae.grading.quantities import Number, agree, number

# gold answer | answer in the box | another one …
EQUAL = r"""
0.05 | 5\% | 5%
0.111 | 0,111
0,5 | 0.5
33.3 | \frac{100}{3}
\sqrt[3]{8} | ∛8
x^{10} | x¹⁰
x_2 | x₂
\frac{2}{5} | ⅖
7*sin(pi*x/5)+1 | 7 \sin(\frac{\pi}{5}x) + 1
x^0*e^(-8*x)*cos(9*x) | e^{-8x} \cos(9x)
3*cos(sqrt(980/7)*t) | 3\cos(2\sqrt{35}t)
\left(\frac{1}{5}, 2\right) | \\left( \\frac{1}{5}, 2 \\right)
A:B = 1:2 | 1:2
0 < f(x) < 1 | (0, 1)
p=5,q=2;p=7,q=2 | (5,2), (7,2)
(1,2),(3,4) | (1,2), (3,4), (1, 2) | (3,4), (1,2)
\text{no solution} | \emptyset
3:30 PM | 3:30
a = b = 2 | 2
artery | arteries
\alpha + \beta | β + α
5 | 5.0 | x = 5 | 5=x | +5 | \text{5} | about 5 | 5. | 5%
50\% | 1/2 | 0.5 | 50
25 | 25\%
\frac12 | \dfrac{1}{2}
\frac{1}{2} | 0.5 | ½
-\frac{1}{2} | \frac{-1}{2} | \frac{1}{-2}
-\frac{17}7 | -17/7
\frac{1}{3} | 0.333333
\frac{3}{5} | 6/10
4 \frac{4}{11} | 48/11
1\frac{12}{13} | 25/13
2½ | 5/2
1,234 | 1234
1234567 | 1,234,567
11,\! 111,\! 100 | 11111100
32{,}000 | 32000
10000 | 10 000
.35625 | 0.35625
1.5\times 10^{3} | 1500
6.02e23 | 6.02 \times 10^{23}
12345678901234567890 | 12345678901234567890.0
2^{200} | 1606938044258990275541962092341162602522202993782792835301376
10! | 3628800
\binom{10}{3} | 120
1024 | 2^{10} = 1024
113 | m + n = 113
9\pi | A = \pi r^2 = 9\pi
90 | m\angle ABC = 90^\circ
18.8 | 18.79
8.246 | \sqrt{68}
3.14 | 3.1416
\$18.90 | 18.9
\$5 | 5 dollars
\$36 | 36.00
5 cm | 5
5\text{ cm} | 5cm
5 m | 500 cm
1 hour | 60 \text{ minutes}
12\text{ cm}^2 | 12 square centimeters
12 | 12 \text{ sq cm}
60 mph | 60 \text{ miles per hour}
24 units | 24 cm
575\text{ students} | 575
18\text{ ways.} | 18 \text{ arrangements}
120^\circ | 120 | 120° | 120 \text{ degrees}
329° T | 329 | 329^\circ \text{T}
20^\circ | 20^\circ \text{C}
Area $=9 \pi \mathrm{cm}^{2}$ | 9\pi
2\pi | 2π | 2*pi | 6.283185
\sqrt 2 | \sqrt{2}
2\sqrt{3} | 2√3
\frac{\sqrt{3}}{2} | sqrt(3)/2
6+9i | 9i+6
3i | 3\text{i}
e^{i\pi} | -1
\log_2 8 | 3
\sin 30^\circ | \frac12
x^2+2x+1 | (x+1)^2
x^{0.5} | \sqrt{x}
0.5x | x/2
ab | ba
|x-2| | |2-x|
\tan x | \frac{\sin x}{\cos x}
\frac{x+1}{2} | (x+1)/2
3s^2 | 3 s^{2}
1,-2 | -2, 1
1,2 | x = 1 \text{ or } x = 2
6, 8\text{, and }10 | 10, 8, 6
\{1,2,3\} | 3, 2, 1
3 \pm 2\sqrt{2} | 3-2\sqrt2, 3+2\sqrt2
(3,4) | \left( 3, 4 \right) | x=3, y=4 | (x,y) = (3,4)
x=3, y=4 | y = 4, x = 3
[0,1) | 0 \leq x < 1
x \in [-2,7] | [-2, 7]
x \geq 3 | [3, \infty)
x < 3 | 3 > x
x \ne 2 | (-\infty,2) \cup (2,\infty)
(-\infty,2)\cup(3,\infty) | (3,∞) ∪ (-∞,2) | x < 2 or x > 3
\mathbb{R}\setminus\{2\} | (-\infty,2) \cup (2,\infty)
\emptyset | \varnothing
y = 2x+3 | 2x - y + 3 = 0 | 2x+3
f(x)=x^2 | x^2
x^2 + y^2 = 1 | 2x^2 + 2y^2 = 2
y \le 2x+3 | 2x+3 \ge y
\begin{pmatrix}1\\2\end{pmatrix} | \begin{bmatrix}1\\2\end{bmatrix}
\begin{pmatrix} 1/2 & 0 \\ 0 & 1 \end{pmatrix} | \begin{pmatrix} 0.5&0\\0&1\end{pmatrix}
1101_2 | 1101_{2} | 1101
\text{A5}_{11} | A5_{11}
5:6 | 10:12 | 5/6
\text{Evelyn} | evelyn
\text{even} | \textbf{Even}
\text{June 20} | June 20th
\text{(B)} | B | (b)
\text{A, D, F} | D, A, F
\mbox{four} | 4
3:30 p.m. | 3:30 \text{ PM}
9\text{ a.m.} | 9 AM
The pancreas | Pancreas
Ring-enhancing lesion | ring enhancing lesion
45613 | 45\,613
2.75 | 2,75
10^{-3} | 10^-3
\frac{3}{4} | B_{\max} = 0.75
t \le 4 | t \leqq 4
4n+1 | 4n + 1, \ n \in \mathbb{Z}
7^n | 7^n \text{ for all } n
3^k | 3^k \text{ ways}
\frac{\pi}{6} | 30^\circ
3\pi(1+\sqrt{5}) | 3\pi\bigl(1+\sqrt5\bigr)
[1, 5) | \biggl[1, 5\biggr)
8 - c | -c + 8
1 - h | -h + 1
-x < -2 | x > 2
\{2\pm\sqrt{3}, 1\} | 1, 2-\sqrt3, 2+\sqrt3
\begin{pmatrix}4&6\end{pmatrix}
\begin{pmatrix}4&6\end{pmatrix} | \begin{pmatrix}1&2\end{pmatrix}+\begin{pmatrix}3&4\end{pmatrix}
f(3) = 7 | 7
\frac{6}{3} = 2 | 2
\sqrt{1/m} | 1/\sqrt{m} | \frac{1}{\sqrt{m}} | m^{-1/2}
\sqrt{\frac{a}{b}} | \frac{\sqrt{a}}{\sqrt{b}}
"""
DIFFERENT = r"""
1,234 | 1.234
33.3 | 33
A:B = 1:2 | 2:1
p=5,q=2;p=7,q=2 | (5,2), (2,7)
3:30 PM | 3:30 AM
class | clas
x^{10} | x_{10}
12 | 1200\%
4 | \text{we have to solve } x^2 = 4 | x^2 = 4 | 4 \pm 0.5 | 4m
5 | 500 | 500% | -5 | 5.0000001 | 4 or 5 | 4, 5 | 5, 5 | \{4, 5\} | 55
5\% | 500
0.8 | 80
50\% | 5000
\frac{1}{3} | 0.33 | 0.333
\frac{1}{2} | 2
2\pi | 6.28
\sqrt{2} | 1.414
18.8 | 19 | 18.9
0.5 | 0.54
12.5 | 12.54
3.14 | 3.15
12345678901234567890 | 12345678901234567891
100000000000000000000000 | 100000000000000000000001
2^{200} | 1606938044258990275541962092341162602522202993782792835301377
5 cm | 5 m | 5 \text{ apples}
20\text{ days} | 20 hours
12 cm^2 | 12 cm
9\text{ a.m.} | 9 p.m.
3i | 3
3 | 3i | x >= 3
i | -i
x^2+2x+1 | (x+2)^2
\frac{x+1}{2} | x+1/2
x | |x|
n^2 | N^2
x=5 | y=5
x=3, y=4 | 4, 3
(1,2) | (2,1) | [1,2]
[1,2] | (1,2]
1,2 | [1,2] | 1
\{1,2\} | (1,2)
1 | 1, 2
1,2,3 | 1,2
1,1,2 | 1,2
[0,1) | 0 < x < 1
x < 3 | y < 3 | x \le 3
(-\infty,2)\cup(3,\infty) | (-\infty,2)
x^2 + y^2 = 1 | x^2 + y^2 = 2
x^2 + y^2 = 13 | 13
\begin{pmatrix}1\\2\end{pmatrix} | \begin{pmatrix}2\\1\end{pmatrix}
\begin{pmatrix}1\\2\end{pmatrix} | \begin{pmatrix}1&2\end{pmatrix}
1101_2 | 1101_3 | 13
5:6 | 6:5
\text{even} | odd
Left hepatic lobe | Right hepatic lobe
no | on
0.56 = 56\% | 0.56 = 53\%
1/0 | \frac{1}{0}
\text{(B)} | B or C | not B | BC
23 | 2\,3
stream | master
2 | 2 \text{ for } n \ge 3, 1 \text{ for } n = 2
5R^2 h | 5R^2
1, 2 | 1 < x < 2
1, 2, 3 | 1, 2, 3, \ldots
(1, 2) | x^2 - 3x + 2 < 0
\alpha = 30^\circ | \beta = 30^\circ
2x + 1 = 7 | 7
6:30 | 2:10
12:00 | 1:00
x | \sqrt{x^2}
\ln(x^2) | 2\ln x
\sqrt{1/m} | 1/m | \sqrt{m}
\sqrt{x - 50} | \sqrt{x - 51}
"""


def table(text):
    rows = [[cell.strip() for cell in line.split(" | ")] for line in text.strip().splitlines()]
    return [(gold, answer) for gold, *answers in rows for answer in answers]


@pytest.mark.parametrize(("gold", "answer"), table(EQUAL))
def test_equal_answers(gold, answer):
    assert verify(gold, rf"So it is $\boxed{{{answer}}}$.")


@pytest.mark.parametrize(("gold", "answer"), table(DIFFERENT))
def test_different_answers(gold, answer):
    assert not verify(gold, rf"So it is $\boxed{{{answer}}}$.")


@pytest.mark.parametrize("gold", [r"$\frac12$", r"\(\frac12\)", r"\boxed{\frac12}", r" \frac12 "])
def test_gold_answer_with_and_without_delimiters(gold):
    assert verify(gold, r"\boxed{1/2}")
    assert not verify(gold, r"\boxed{1/3}")


@pytest.mark.parametrize(
    ("gold", "completion", "correct"),
    [
        ("5", "It could be 4 or 5.", False),
        ("5", "The answer is not 5.", False),
        ("5", "The answer is 5, not 6.", True),
        ("6", "The answer is 5, not 6.", False),
        ("3", "The answer is 5x + 3.", False),
        ("3", "So we have 3 groups of", False),
        ("4", "So we need to solve $x^2 = 4$.", False),
        ("2", "Therefore, the answer is 1/2.", False),
        ("5 cm", "We get $5$ m.", False),
        ("5 cm", "We get $5$ cm.", True),
        ("5 cm", "The answer is 5 kg.", False),
        ("5", "The area is at least 5.", False),
        ("5", "The area is greater than 5.", False),
        ("B", "Option B is false.", False),
        ("1000.99", "so the number is 10 which is 1,000.99m²", True),
        ("2/3", "Therefore, the probability that Alice wins the game is 2/3.", True),
        ("C", "Therefore, the correct option is **C**.", True),
        ("B", "The answer is not (B).", False),
        ("B", "It is either (A) or (B).", False),
        ("yes", "Yes, there is a small effusion. It is on the left side of the image.", True),
        ("no", "No evidence of pneumothorax.", True),
        ("yes", "There is no sign of a fracture.", False),
        ("C. 42", r"\boxed{C}", True),
        ("C. 42", r"\boxed{42}", True),
        ("C. 42", r"\boxed{D}", False),
        ("She has 72 eggs left.\n#### 72", r"\boxed{72}", True),
    ],
)
def test_answers_in_sentences(gold, completion, correct):
    assert verify(gold, completion) is correct


@pytest.mark.parametrize(
    ("gold", "answer", "choices", "correct"),
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
        ("AC", "C, A", ("a", "b", "c", "d"), True),
        ("AC", "A", ("a", "b", "c", "d"), False),
        ("B", "BC", ("AB", "BC", "CA"), True),
        ("B", "B) 15", (), True),
        ("B", "B, C", (), False),
        ("B", "Both A and B", (), False),
    ],
)
def test_choice(gold, answer, choices, correct):
    completion = rf"\boxed{{{answer}}}"
    assert verify(gold, completion, kind="choice", choices=choices) is correct
    if choices:
        assert verify(gold, completion, choices=choices) is correct


@pytest.mark.parametrize(
    ("gold", "answer", "correct"),
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
def test_yes_no(gold, answer, correct):
    assert verify(gold, rf"\boxed{{{answer}}}") is correct


@pytest.mark.parametrize(
    ("gold", "answer", "options", "correct"),
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
def test_number_settings(gold, answer, options, correct):
    assert verify(gold, rf"\boxed{{{answer}}}", kind="number", **options) is correct


@pytest.mark.parametrize(
    ("completion", "correct", "correct_anywhere"),
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
def test_answer_after_thinking(completion, correct, correct_anywhere):
    assert verify("5", completion) is correct
    assert verify("5", completion, after_thinking=False) is correct_anywhere


HARD = ("x^2 + 2x + 1", r"\boxed{(x+1)^2}")  # needs sympy, so a worker process


def test_an_empty_gold_answer_is_never_matched():
    for gold in ("", " ", r"\boxed{}", "$$"):
        for answer in ("", " ", "0", "{}", "$$"):
            assert not verify(gold, rf"\boxed{{{answer}}}")


# ----------------------------------------------------------------------------------- numbers


@given(st.fractions(max_denominator=10**6), st.integers(1, 99))
def test_fractions_are_exact(value, factor):
    p, q = value.numerator, value.denominator
    assert number(f"{p * factor}/{q * factor}" if p >= 0 else f"-{-p * factor}/{q * factor}") == (Number(value))
    sign = "-" if p < 0 else ""
    assert verify(f"{p}/{q}", rf"\boxed{{{sign}\frac{{{abs(p) * factor}}}{{{q * factor}}}}}")
    assert not verify(f"{p}/{q}", rf"\boxed{{{sign}\frac{{{abs(p) * factor + 1}}}{{{q * factor}}}}}")


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
        f"print('started')\nfrom mm_agrae.grading.accuracy import verify\nprint(verify({HARD[0]!r}, {HARD[1]!r}))\n"
    )
    result = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120)
    assert result.stdout.split() == ["started", "True"], result.stderr
    assert result.stderr == ""
