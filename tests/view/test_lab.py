"""The advantage lab's numbers against the paper's formulas, written out here."""

import math
import re
from dataclasses import replace

import pytest

from mm_agrae.advantage import RULES
from mm_agrae.view.lab import (
    MAX_OMEGA,
    MIN_OMEGA,
    Setting,
    advantages,
    curves,
    explanation,
    moves,
    plots,
    rules,
    world,
    world_table,
)

SIZES = pytest.mark.parametrize("size", [2, 5, 8, 32])
OMEGAS = pytest.mark.parametrize("omega", [MIN_OMEGA, 0.3, 0.5, 0.74, MAX_OMEGA])


@SIZES
@OMEGAS
def test_grpo_weighs_groups_by_equation_10(size, omega):
    weight, balance = curves(Setting("grpo", size, 0, omega))
    expected = [2 * size * math.sqrt(n / size * (1 - n / size)) for n in range(size + 1)]
    assert weight["group level"] == pytest.approx(expected, abs=1e-4)
    assert balance["group level"] == pytest.approx([0.0] * (size + 1), abs=1e-9)


@SIZES
@OMEGAS
@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_agrae_weighs_and_balances_groups_by_equations_12_and_13(size, omega, alpha):
    setting = Setting("agrae", size, 0, omega, alpha)
    weight, balance = curves(setting)
    assert advantages(setting)[1] == pytest.approx(omega, abs=1e-9)
    inner = slice(1, size)
    rate = [correct / size for correct in range(1, size)]
    half = [size * (omega * math.sqrt(1 - p) + (1 - omega) * math.sqrt(p)) / 2 for p in rate]
    assert weight["sample level"][inner] == pytest.approx([2 * h for h in half], rel=1e-4)
    held = min(1.0, omega / alpha)
    expected = [h * (1 + held) for h in half]
    assert weight["group level"][inner] == pytest.approx(expected, rel=1e-4)
    expected = [h * (held - 1) for h in half]
    assert balance["group level"][inner] == pytest.approx(expected, rel=1e-4, abs=1e-9)
    for end in (0, size):  # no spread, no signal
        assert weight["group level"][end] == 0


@pytest.mark.parametrize("rule", [rule for rule in rules() if rule != "grpo_lead"])
@pytest.mark.parametrize("correct", range(9))
def test_the_small_world_moves_by_equation_6(rule, correct):
    setting = Setting(rule, 8, correct, 0.3)
    outcomes = world(setting)
    total = sum(o.advantage for o in outcomes)
    for o in outcomes:
        assert o.change == pytest.approx(o.advantage - total * o.probability, abs=1e-9)
    assert sum(o.probability for o in outcomes) == pytest.approx(1)
    assert sum(o.after for o in outcomes) == pytest.approx(1)
    assert [o.sampled for o in outcomes] == [correct, 8 - correct, 0, 0]
    weight = [o.probability * math.exp(o.change) for o in outcomes]
    assert [o.after for o in outcomes] == pytest.approx([w / sum(weight) for w in weight])


def test_only_a_negative_balance_lifts_what_was_not_sampled():
    unsampled = moves(Setting("grpo", 8, 2, 0.3))["not sampled"]
    assert [change for _, change in unsampled] == pytest.approx([0.0] * 7, abs=1e-9)
    assert all(change > 0 for _, change in moves(Setting("agrae", 8, 2, 0.3))["not sampled"])
    grown = moves(Setting("agrae", 8, 2, 0.6, alpha=0.5))["not sampled"]
    assert [change for _, change in grown] == pytest.approx([0.0] * 7, abs=1e-9)
    assert all(change < 0 for _, change in moves(Setting("psr", 8, 2, 0.3))["not sampled"])


def test_agrae_shifts_the_weight_from_easy_to_hard():
    def heaviest(omega):
        weight = curves(Setting("agrae", 8, 0, omega))[0]["group level"]
        return weight.index(max(weight))

    assert heaviest(0.1) == 7
    assert heaviest(0.9) == 1


@pytest.mark.parametrize("rule", rules())
@pytest.mark.parametrize("size", [2, 32])
@pytest.mark.parametrize("omega", [MIN_OMEGA, 0.5, MAX_OMEGA])
def test_every_rule_can_be_shown_at_the_ends_of_the_sliders(rule, size, omega):
    for correct in (0, 1, size):
        setting = Setting(rule, size, correct, omega)
        stages, used = advantages(setting)
        assert used == pytest.approx(omega, abs=1e-9)
        assert all(value.shape == (size + 1, size) for value in stages.values())
        text = plots(setting) + world_table(setting) + explanation(setting)
        assert text.count("<svg") == 4
        assert not re.search(r"\b(nan|inf)\b", text, re.IGNORECASE)


def test_every_rule_is_offered_once():
    assert set(rules()) == set(RULES) - {"dapo"}
    assert len(rules()) == len(set(rules()))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"rule": "agra"}, "agra"),
        ({"completions": 1}, "1 completions"),
        ({"correct": 9}, "9 correct"),
        ({"omega": 0.0}, "ω is 0"),
    ],
)
def test_an_impossible_setting_is_refused(change, named):
    with pytest.raises(ValueError, match=named):
        replace(Setting(), **change)


def test_the_words_say_what_the_numbers_are():
    assert "the policy explores" in explanation(Setting("agrae", 8, 2, 0.3))
    assert "does not move" in explanation(Setting("grpo", 8, 2, 0.3))
    assert "the policy narrows" in explanation(Setting("psr", 8, 2, 0.3))
    assert "p = 0.875 weigh most" in explanation(Setting("agrae", 8, 2, 0.3))
    assert "This rule has no α" in explanation(Setting("grpo"))
    assert "All completions are equal" in explanation(Setting("grpo", 8, 8))
