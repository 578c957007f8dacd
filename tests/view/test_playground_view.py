"""What the playground shows of completions: reasoning, agreement, progress and markup."""

import pytest

from mm_agrae.view import playground_view as view
from mm_agrae.view.playground import CheckpointTraces, Question, Token, Trace, split_thinking
from mm_agrae.view.playground_view import agreement, progress_line


@pytest.mark.parametrize(
    ("text", "opened", "expected"),
    [
        ("<think>a</think> b", False, ("a", "b")),
        ("a</think>b", True, ("a", "b")),
        ("a</think>b", False, ("a", "b")),
        ("<think>a", False, ("a", "")),
        ("a", True, ("a", "")),
        ("a", False, ("", "a")),
        ("", False, ("", "")),
        ("<think>a</think>b</think>c", False, ("a</think>b", "c")),
        ("x <think>a", False, ("x a", "")),
    ],
)
def test_reasoning_is_split_from_the_answer(text, opened, expected):
    assert split_thinking(text, opened) == expected


def trace(final, success=None, state="stop", text="t") -> Trace:
    return Trace(text, 1, state, "", text, final, success)


def test_agreement_counts_equal_values_as_one_answer():
    traces = [trace(a, a == "1/2") for a in ("7", "1/2", "0.5", "7", r"\frac{1}{2}", "7.0")]
    traces += [trace(None, False), trace(None, False), trace("9", None, "stopped")]
    groups = agreement(traces, {"kind": "number"})
    assert [(g[0].final, len(g)) for g in groups] == [("7", 3), ("1/2", 3), (None, 2)]
    markup = view.traces((CheckpointTraces("a", "done", traces=tuple(traces)),), Question("?"))
    assert [markup.count(f"{n} · {100 * n / 8:.1f}\N{NO-BREAK SPACE}%") for n in (3, 2)] == [2, 1]
    assert agreement([], {}) == []


def test_agreement_of_choices_knows_letter_and_text():
    grading = {"kind": "choice", "choices": ["12", "15"]}
    groups = agreement([trace("B"), trace("15"), trace("A")], grading)
    assert [(group[0].final, len(group)) for group in groups] == [("B", 2), ("A", 1)]


def test_progress_in_words():
    shown = (
        CheckpointTraces("base", "writing", traces=(trace("1"), trace(None, state="writing")), seconds=0.5),
        CheckpointTraces("GRPO", "loading"),
        CheckpointTraces("A", "failed", "no such folder"),
    )
    assert progress_line(shown) == ("base: 1 of 2 written, 2 tokens, 4 tokens/s · GRPO: loading · A: failed")


def test_correct_samples_are_counted():
    shown = CheckpointTraces("a", "done", traces=(trace("1", True), trace("2", False)))
    markup = view.traces((shown,), Question("?"))
    assert "<b>1 of 2 correct (50.0\N{NO-BREAK SPACE}%)</b>" in markup


HOSTILE = '<script>alert(1)</script><img src=x onerror="alert(2)">\x1b[31m\ud800'


def test_a_hostile_text_stays_text():
    token = Token(HOSTILE, 0.5, 1.0, ((HOSTILE, 0.5),))
    hostile = Trace(HOSTILE, 1, "stop", HOSTILE, HOSTILE, HOSTILE, False, (token,))
    failed = CheckpointTraces(HOSTILE, "failed", HOSTILE, HOSTILE, (hostile, hostile))
    shown = (
        view.traces((failed,), Question(HOSTILE))
        + view.tokens(hostile, view.ENTROPY)
        + view.note_on_images({HOSTILE: False, "b": True})
    )
    assert "<script" not in shown
    assert "<img" not in shown
    assert shown.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 9
    shown.encode()  # no half of a surrogate pair is left


def test_tokens_have_the_colour_of_their_numbers():
    numbers = [(0.995, 0.01), (0.95, 0.2), (0.8, 0.5), (0.5, 1.0), (0.2, 1.5), (0.05, 3.0)]
    tokens = tuple(Token(f"t{i}", p, e, ((f"t{i}", p),)) for i, (p, e) in enumerate(numbers))
    shown = Trace("", 6, "stop", "", "", tokens=tokens)
    for by in (view.PROBABILITY, view.ENTROPY):
        markup = view.tokens(shown, by)
        for i in range(6):
            assert f'<span class="h{i}" title="“t{i}”: probability' in markup
    assert 'class="empty"' in view.tokens(None, view.ENTROPY)


def test_the_note_names_checkpoints_that_do_not_use_the_image():
    assert view.note_on_images({"a": True}) is None
    assert view.note_on_images({}) is None
    assert "not used by <b>b</b>" in view.note_on_images({"a": True, "b": False})
    assert "reads text only" in view.note_on_images({"b": False})
