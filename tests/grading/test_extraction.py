r"""Finding the final answer in a completion."""

import pytest

from mm_agrae.grading.accuracy import verify
from mm_agrae.grading.extraction import extract_answer


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
        ("one line\n42", "42"),
        (r"\boxed{1} papers and \boxed{2} bins", "1, 2"),
        (r"\boxed{5} and adding one gives \boxed{6}", "6"),
        (r"\boxed{\boxed{7}}", "7"),
        (r"\boxed{255} to begin with. Final Answer: The final answer is $10,455$.", "$10,455$"),
        ("### Final Answer\n\n7", "7"),
        ("The answer is 6.<|im_end|>\n<|im_start|>user\nIs it 7?", "6"),
        ("So we get\n$$\n5 + 6 = 11.\n$$", "\n5 + 6 = 11.\n".strip()),
        ("He spent all of it in the end, so the price of the whole set is **$12.50**.", "$12.50"),
        ("A sum over all of the rows of the table that was given: 3 + 4 = 7.", "7"),
        ("Because of that there are 12 ways to do what the question asks for here.", "12"),
        ("Two of the choices are clearly excluded by the picture. I would go with (B) here.", "B"),
        ("Weighing them all against each other...\n\nC", "C"),
        ("There are 12 ways to do it, of which 5 are counted twice, as you can see.", None),
        ("This text was cut off while it was saying that there are 3 groups, each of", None),
        ("It may well be any of 4 or 5.", "It may well be any of 4 or 5"),
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
    assert extract_answer("42", answer_in=("boxed", "answer_is")) is None
    with pytest.raises(ValueError, match=r"answer_in is 'box'; valid: boxed"):
        extract_answer(text, answer_in=("box",))
    with pytest.raises(ValueError, match="kind is 'maths'"):
        verify("5", "5", kind="maths")
    with pytest.raises(ValueError, match="units is 'none'"):
        verify("5", "5", units="none")
