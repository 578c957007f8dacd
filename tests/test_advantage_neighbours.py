"""Rules beside A-GRAE: golden numbers, what they amount to, and what they refuse."""

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mm_agrae.advantage import compute, levels, needs

settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

GOLDEN = json.loads((Path(__file__).parent / "golden" / "neighbours.json").read_text())


PAPER = {"low": 0.0, "high": math.inf}
"""EDGE-GRPO without bounds."""


def of_case(case, name, dtype=torch.float64, **values):
    if name == "diva_released_code":
        values["width"] = case["response_width_tokens"]
    return compute(
        name, torch.tensor(case["reward"], dtype=dtype), case["success"], case["length_tokens"],
        entropy_PG=case["entropy_nats"], problem_P=case["problem"], difficulty_P=case["difficulty"], **values,
    )  # fmt: skip


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 2e-4)])
@pytest.mark.parametrize("column", GOLDEN["rules"])
def test_golden_cases(column, dtype, tolerance):
    cases = [case for case in GOLDEN["cases"] if column in case["advantage"]]
    assert len(cases) >= 35
    rule = GOLDEN["rules"][column]
    for case in cases:
        values = {key: case["alpha"] if value is None else value for key, value in rule["settings"].items()}
        result = of_case(case, rule["name"], dtype, **(PAPER if rule["name"] == "edge" else {}) | values)
        expected = torch.tensor(case["advantage"][column], dtype=torch.float64)
        assert result.dtype == dtype
        torch.testing.assert_close(result.double(), expected, rtol=tolerance, atol=tolerance)


def test_a_golden_number_missing_for_an_entropy_of_0_is_an_error():
    refused = [case for case in GOLDEN["cases"] if "edge" not in case["advantage"]]
    assert len(refused) == 5
    for case in refused:
        assert of_case(case, "edge").isfinite().all()
        for name, values in {"edge": PAPER, "edge_released_code": {}}.items():
            with pytest.raises(ValueError, match=r"group \d+, completion \d+: an entropy of 0 .*low=0.1"):
                of_case(case, name, **values)


BITS = st.integers(0, 1)


def groups(low=2, high=8, values=BITS):
    """Rewards [P, G]."""
    return st.tuples(st.integers(2, 5), st.integers(low, high)).flatmap(
        lambda shape: st.lists(values, min_size=shape[0] * shape[1], max_size=shape[0] * shape[1]).map(
            lambda flat: torch.tensor(flat, dtype=torch.float64).reshape(shape)
        )
    )


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# --------------------------------------------------------------------------------- EDGE-GRPO


@given(groups())
def test_edge_keeps_signs_and_zeros_and_equal_entropies_change_nothing(success):
    entropy = torch.rand(success.shape, dtype=torch.float64) + 0.01
    plain = compute("grpo", success, success)
    assert torch.equal(compute("edge", success, success, entropy_PG=entropy).sign(), plain.sign())
    close(compute("edge", success, success, entropy_PG=torch.full_like(success, 0.7)), plain, 1e-12)
    close(compute("edge", success, success, entropy_PG=0 * success), plain, 1e-12)  # all are 0: none stands out


@given(groups(), st.floats(0.1, 1))
def test_edge_and_agrae_commute(success, alpha):
    entropy = torch.rand(success.shape, dtype=torch.float64) + 0.01
    relative = entropy / entropy.mean(1, keepdim=True)
    both = compute("edge", success, success, entropy_PG=entropy, base="agrae", alpha=alpha, **PAPER)
    close(both, compute("agrae", success, success, alpha=alpha) / relative, 1e-12)
    # A-GRAE's factors, of a group and a sign, on EDGE's advantage.
    factors = compute("agrae", success, success, alpha=alpha) / compute("grpo", success, success)
    edge = compute("edge", success, success, entropy_PG=entropy, **PAPER)
    close(both, torch.where(edge == 0, 0.0, edge * factors.nan_to_num()), 1e-9)


def test_edge_of_one_certain_completion_and_of_empty_ones():
    reward = [[1.0, 0.0], [1.0, 0.0]]
    a = compute("edge", reward, reward, [[3, 5], [0, 4]], entropy_PG=[[0.0, 1.0], [0.0, 1.0]])
    close(a, torch.tensor([[10.0, -0.5], [1.0, -1.0]]).double())  # P̂ 0 -> 0.1, 2; without tokens 1, and 1 alone
    with pytest.raises(ValueError, match="group 0, completion 0: an entropy of 0"):
        compute("edge", reward, reward, entropy_PG=[[0.0, 1.0], [1.0, 1.0]], **PAPER)


# --------------------------------------------------------------------------------- DIVA-GRPO

REWARDS = st.sampled_from([0.0, 0.1, 0.9, 1.0])


@given(groups(values=REWARDS))
def test_diva_with_one_row_a_problem_is_grpo_over_the_share_with_spread(reward):
    share = (reward.amax(1) > reward.amin(1)).double().mean()
    change = reward.amax(1, keepdim=True) - reward.amin(1, keepdim=True)
    expected = 2 * change * compute("grpo", reward, None) / share.clamp(min=1e-9).sqrt()
    close(compute("diva", reward, None), expected, 1e-4)
    # A problem whose other rows are in another step is the same as one without variants.
    close(compute("diva", reward, None, problem_P=torch.arange(len(reward)) + 7), expected, 1e-4)


def test_a_problem_pools_what_is_there_of_it():
    """Unequal numbers of variants, the rows in any order; split over two steps the rows miss each other."""
    reward = torch.tensor([[1.0, 0, 0], [0, 0, 0], [1, 1, 0], [1, 1, 1]]).double()
    problem = torch.tensor([5, 9, 5, 5])
    whole = compute("diva", reward, None, problem_P=problem, normalise=False, rrb=False)
    pooled = reward[[0, 2, 3]]
    z = (pooled - pooled.mean()) / pooled.std(correction=0)
    close(whole[[0, 2, 3]], compute("grpo", pooled, None) + z)
    assert (whole[1] == 0).all()
    alone = compute("diva", reward[:2], None, problem_P=problem[:2], normalise=False, rrb=False)
    close(alone[0], 2 * compute("grpo", reward[:1], None)[0])


@given(groups())
def test_rrb_changes_nothing_with_0_1_rewards(success):
    problem = torch.arange(len(success)) // 2
    close(compute("grpo_rrb", success, success), compute("grpo", success, success), 1e-12)
    both = [compute("diva", success, None, problem_P=problem, rrb=on) for on in (True, False)]
    close(*both, 1e-12)


def test_equal_difficulties_weigh_nothing_and_harder_rows_gain_more_and_lose_less():
    reward = torch.tensor([[1.0, 0, 0, 1], [0, 1, 0, 1]]).double()
    settings = {"problem_P": [0, 0], "normalise": False}
    plain = compute("diva", reward, None, difficulty_P=[7, 7], **settings)
    assert torch.equal(plain, compute("diva", reward, None, k=0.9, **settings))
    local = compute("grpo", reward, None)
    weighted = compute("diva", reward, None, difficulty_P=[3, 7], **settings)
    factor = torch.where(reward > 0, 1, -1) * torch.tensor([[-2.0], [2.0]])
    close(weighted - local, (plain - local) * torch.exp(0.1 * factor))


def test_a_flat_row_of_a_mixed_problem_is_revived_and_a_flat_step_is_0():
    reward = torch.tensor([[0.0, 0, 0], [1, 1, 0]])
    assert (compute("grpo", reward, None)[0] == 0).all()
    assert (compute("diva", reward, None, problem_P=[3, 3])[0] < 0).all()
    assert (compute("diva", reward, None)[0] == 0).all()
    assert (compute("diva", torch.ones(3, 4), None, problem_P=[0, 0, 1]) == 0).all()


def test_a_penalty_below_0_counts_by_the_range_of_the_rewards():
    reward = [[1.0, -1.0]]
    assert compute("grpo_rrb", reward, None)[0, 0] == pytest.approx(1, abs=1e-5)  # Δr is at most 1
    assert compute("grpo_rrb", reward, None, reward_range=4.0)[0, 0] == pytest.approx(0.5, abs=1e-5)


# ---------------------------------------------------------------------------------- pass@k


@given(groups(values=st.floats(-2, 2)), st.data())
def test_pkpo_is_the_sum_over_subsets(reward, data):
    size = reward.shape[1]
    k = data.draw(st.integers(1, size))
    expected = torch.zeros_like(reward)
    for subset in itertools.combinations(range(size), k):
        expected[:, list(subset)] += reward[:, list(subset)].amax(1, keepdim=True) / math.comb(size, k)
    expected -= expected.mean(1, keepdim=True)
    close(compute("pkpo", reward, None, k=k), expected, 1e-9)


@given(groups(), st.data())
def test_pass_at_k_is_z_over_subsets(success, data):
    size = success.shape[1]
    k = data.draw(st.integers(1, size))
    subsets = list(itertools.combinations(range(size), k))
    solved = torch.stack([success[:, list(subset)].amax(1) for subset in subsets], 1)
    for i in range(size):
        mine = [n for n, subset in enumerate(subsets) if i in subset]
        z = (solved[:, mine].mean(1) - solved.mean(1)) / (solved.std(1, correction=0) + 1e-6)
        z = torch.where(solved.amin(1) == solved.amax(1), 0.0, z)
        close(compute("pass_at_k", success, success, k=k)[:, i], z, 1e-9)
    close(compute("pass_at_k", success, success, k=1), compute("grpo", success, success), 1e-9)


@given(groups(low=3, high=10), st.sampled_from([0.2, 0.4, 0.5, 0.8]))
def test_quantile_reinforces_one_side(success, level):
    a = compute("quantile", success, success, quantile=level)
    for row, wins in zip(a, success, strict=True):
        if 0 < wins.mean() < 1:
            hard = wins.mean() <= 1 - level + 1e-9
            assert torch.equal(row != 0, (wins == 1) if hard else (wins == 0))
            assert (row[row != 0] > 0).all() == bool(hard)
        else:
            assert (row == 0).all()


@given(groups())
def test_maxrl_divides_by_the_rate(success):
    a = compute("maxrl", success, success)
    p = success.mean(1, keepdim=True)
    close(a, torch.where(p > 0, (success - p) / p.clamp(min=0.01), 0.0), 1e-9)


def test_max_minus_second():
    a = compute("max_minus_second", [[0.2, 0.9, 0.5], [1.0, 0.0, 1.0], [0.0, 1.0, 0.0]], None)
    close(a, torch.tensor([[0, 0.4, 0], [0, 0, 0], [0, 1, 0]], dtype=torch.float64), 1e-12)


# ------------------------------------------------------------------------------------- GDPO


def test_gdpo_standardises_each_part_by_itself():
    accuracy = torch.tensor([[1.0, 0, 0, 0], [1, 1, 1, 1]]).double()
    form = torch.tensor([[0.0, 1, 1, 0], [math.nan, 1, 0, 1]]).double()
    reward = 0.9 * accuracy + 0.1 * form.nan_to_num()
    given = {"part_FPG": [accuracy, form], "weight_F": [0.9, 0.1], "normalise_parts": True}
    a = compute("grpo", reward, accuracy, **given)
    rest = torch.tensor([1.0, 0, 1]).double()
    z = torch.stack([
        0.9 * compute("grpo", accuracy[:1], None)[0] + 0.1 * compute("grpo", form[:1], None)[0],
        0.1 * torch.cat([torch.zeros(1).double(), compute("grpo", rest[None], None)[0]]),
    ])  # fmt: skip
    close(a, z / z.square().mean().sqrt())
    # A-GRAE's factors on top of it: p and ω are those of the whole reward.
    both, plain = (levels("agrae", reward, accuracy, **x) for x in (given, {}))
    assert (both.omega, both.rate_P.tolist()) == (plain.omega, plain.rate_P.tolist())
    close(both.base_PG, a, 1e-12)


# --------------------------------------------------------------------------------- bad input

OK = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]])


@pytest.mark.parametrize(
    ("message", "name", "values"),
    [
        (r"needs entropy_PG", "edge", {}),
        (r"needs entropy_PG", "edge_released_code", {}),
        (r"group 1, completion 0: an entropy must be finite", "edge", {"entropy_PG": [[1, 1, 1], [math.nan, 1, 1]]}),
        (r"group 0, completion 2: an entropy .* not negative", "edge", {"entropy_PG": [[1, 1, -1], [1, 1, 1]]}),
        (r"group 0, completion 1: an entropy of 0", "edge_released_code", {"entropy_PG": [[1.0, 0, 1], [1, 1, 1]]}),
        (r"group 1: a difficulty must be in \[1, 9\], but it is 9.5", "diva", {"difficulty_P": [5, 9.5]}),
        (r"group 0: a difficulty .* 0", "diva", {"difficulty_P": [0, 5]}),
        (r"group 0: a difficulty .* nan", "diva_released_code", {"difficulty_P": [math.nan, 5]}),
        (r"difficulty_P has shape \[3\], but there are 2 groups", "diva", {"difficulty_P": [5, 5, 5]}),
        (r"problem_P has shape \[1\], but there are 2 groups", "diva", {"problem_P": [5]}),
        (r"width is 4, but a completion has 7 tokens", "diva_released_code", {"width": 4}),
        (r"k must be from 1 to the 3 completions of a group, not 4", "pkpo", {"k": 4}),
        (r"k must be from 1 to the 3", "pass_at_k", {"k": 0}),
        (r"low must be a number in \[0, 1\]", "edge", {"low": 2.0}),
        (r"high must be a number of at least 1", "edge", {"high": 0.5}),
        (r"base must be 'grpo' or 'dr_grpo' or 'agrae'", "edge", {"base": "dapo"}),
        (r"weight_on must be 'global' or 'both'", "diva", {"weight_on": "local"}),
        (r"needs part_FPG", "grpo", {"normalise_parts": True}),
        (r"part_FPG has shape \[1, 2, 2\]", "grpo", {"normalise_parts": True, "part_FPG": [[[1, 0], [1, 0]]]}),
        (r"leave one of them out", "agrae", {"normalise_parts": True, "base": "dr_grpo", "part_FPG": [OK]}),
    ],
)
def test_bad_input_is_named(message, name, values):
    with pytest.raises(ValueError, match=message):
        compute(name, OK, OK, torch.full((2, 3), 7), **values)


def test_maxrl_refuses_a_negative_mean():
    with pytest.raises(ValueError, match="group 1: the mean reward divides here"):
        compute("maxrl", [[1.0, 0.0], [0.0, -1.0]], None)


def test_needs():
    assert needs("edge", "entropy_PG", {})
    assert not needs("agrae", "entropy_PG", {})
    assert needs("edge", "success_PG", {"base": "agrae"})
    assert not needs("edge", "success_PG", {})
    assert needs("grpo", "part_FPG", {"normalise_parts": True})
    with pytest.raises(ValueError, match="k must be a whole number"):
        needs("pkpo", "success_PG", {"k": 1.5})
