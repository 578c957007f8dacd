import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mm_agrae.advantage import RULES, accepted_settings, compute, levels

# A busy machine is no failure.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

GOLDEN = json.loads((Path(__file__).parent / "golden" / "advantages.json").read_text())


def golden_settings(column: str, case: dict) -> tuple[str, dict]:
    rule = GOLDEN["rules"][column]
    return rule["name"], {key: case["alpha"] if value is None else value for key, value in rule["settings"].items()}


@st.composite
def groups(draw, min_prompts=1):
    """Random 0/1 successes [P, G]."""
    prompts = draw(st.integers(min_prompts, 6))
    size = draw(st.integers(2, 16))
    bits = st.lists(st.integers(0, 1), min_size=size, max_size=size)
    return torch.tensor(draw(st.lists(bits, min_size=prompts, max_size=prompts))).double()


def entropies(success):
    """Something for the rules that look at entropies."""
    return {"entropy_PG": 0.1 + torch.arange(success.numel()).reshape(success.shape) % 7 * 0.3}


# ------------------------------------------------------------------------------- golden


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-4)])
@pytest.mark.parametrize("column", GOLDEN["rules"])
def test_golden_cases(column, dtype, tolerance):
    cases = [case for case in GOLDEN["cases"] if column in case["advantage"]]
    assert len(cases) >= 17
    for case in cases:
        name, values = golden_settings(column, case)
        result = levels(
            name,
            torch.tensor(case["reward"], dtype=dtype),
            torch.tensor(case["success"]),
            torch.tensor(case["length_tokens"]),
            **values,
        )
        assert result.advantage_PG.dtype == dtype
        expected = torch.tensor(case["advantage"][column], dtype=torch.float64)
        torch.testing.assert_close(result.advantage_PG.double(), expected, rtol=tolerance, atol=tolerance * 1e-6)
        assert result.omega == pytest.approx(case["omega"], rel=1e-6)
        if name != "agrae_released_code":
            assert result.rate_P.tolist() == pytest.approx(case["success_rate"], rel=1e-6)


def test_golden_file_covers_the_published_rules():
    assert {rule["name"] for rule in GOLDEN["rules"].values()} == {
        "grpo", "dr_grpo", "agrae", "positive_dominant", "negative_dominant", "hard_focused",
        "easy_focused", "w_reinforce", "grpo_lead", "agrae_released_code",
    }  # fmt: skip


def test_dapo_is_grpo_and_psr_and_nsr_make_up_w_reinforce():
    success = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 1]])
    reward = success.double()
    assert torch.equal(compute("dapo", reward, success), compute("grpo", reward, success))
    assert compute("psr", reward, success).tolist() == success.tolist()
    assert compute("nsr", reward, success).tolist() == (success - 1).tolist()
    halves = 0.3 * compute("psr", reward, success) + compute("nsr", reward, success)
    assert torch.equal(compute("w_reinforce", reward, success, lam=0.3), halves)


# ----------------------------------------------------------------- what the paper proves


@given(groups())
def test_eq_5_grpo_weighs_right_and_wrong_alike(success):
    a = compute("grpo", success, success)
    right, wrong = (a.abs() * success).sum(1), (a.abs() * (1 - success)).sum(1)
    torch.testing.assert_close(right, wrong, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(a.sum(1), torch.zeros(len(a)).double(), rtol=0, atol=1e-9)


@given(groups())
def test_eq_10_grpo_prefers_medium_difficulty(success):
    size, p = success.shape[1], success.mean(1)
    total = compute("grpo", success, success, eps=1e-12).abs().sum(1)
    torch.testing.assert_close(total, 2 * size * (p * (1 - p)).sqrt(), rtol=1e-9, atol=1e-9)


@given(groups())
def test_eq_12_weighs_a_group_by_difficulty(success):
    """Σ|A| after the sample level: ω·G·√(1−p) + (1−ω)·G·√p, from Eq. 10 and 12."""
    result = levels("agrae", success, success, group_level=False, eps=1e-12)
    size, p, omega = success.shape[1], success.mean(1), float(success.mean())
    expected = omega * size * (1 - p).sqrt() + (1 - omega) * size * p.sqrt()
    expected[(p == 0) | (p == 1)] = 0
    torch.testing.assert_close(result.advantage_PG.abs().sum(1), expected, rtol=1e-9, atol=1e-9)


@given(groups(), st.floats(0.05, 1))
def test_agrae_sum_is_negative_while_omega_is_below_alpha(success, alpha):
    result = levels("agrae", success, success, alpha=alpha)
    mixed = (result.rate_P > 0) & (result.rate_P < 1)
    sums = result.advantage_PG.sum(1)
    assert (sums[~mixed] == 0).all()
    if result.omega < alpha * (1 - 1e-9):
        assert (sums[mixed] < 0).all()
    else:
        assert (sums.abs() < 1e-9).all()


def logit_change(policy, sampled, a, eta):
    """One step of gradient ascent on Σ_i A_i log π(b_i), by autograd on the logits."""
    logits = policy.log().requires_grad_()
    (a * torch.log_softmax(logits, 0)[sampled]).sum().backward()
    return eta * logits.grad


POLICY = torch.tensor([0.4, 0.25, 0.15, 0.1, 0.06, 0.04], dtype=torch.float64)
SAMPLED = torch.tensor([0, 1, 2, 0, 1, 2, 0, 3])
SUCCESS = torch.tensor([[1, 0, 0, 1, 0, 0, 1, 0]])
UNSAMPLED = [4, 5]


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "agrae", "negative_dominant", "nsr"])
def test_theorem_1_change_of_each_logit(name):
    a = compute(name, SUCCESS.double(), SUCCESS)[0]
    total_of_path = torch.zeros(6).double().index_add(0, SAMPLED, a)
    expected = 0.1 * (total_of_path - a.sum() * POLICY)
    torch.testing.assert_close(logit_change(POLICY, SAMPLED, a, eta=0.1), expected, rtol=1e-9, atol=1e-12)


def test_theorem_1_an_unsampled_path_moves_only_if_the_sum_is_not_zero():
    def change(name):
        a = compute(name, SUCCESS.double(), SUCCESS)[0]
        return float(a.sum()), logit_change(POLICY, SAMPLED, a, eta=0.1)[UNSAMPLED]

    for symmetric in ("grpo", "dr_grpo"):
        total, moved = change(symmetric)
        assert abs(total) < 1e-9
        assert moved.abs().max() < 1e-9
    for negative in ("agrae", "negative_dominant", "nsr"):
        total, moved = change(negative)
        assert total < 0
        assert (moved > 1e-3).all()
    total, moved = change("positive_dominant")
    assert total > 0
    assert (moved < -1e-3).all()


# --------------------------------------------------------------------------- invariances


@pytest.mark.parametrize("name", RULES)
@settings(max_examples=20)
@given(data=st.data())
def test_order_of_groups_and_completions_does_not_matter(name, data):
    success = data.draw(groups(min_prompts=2))
    prompts, size = success.shape
    reward = 0.9 * success + 0.1 * torch.arange(size).remainder(2)
    length = 1 + torch.arange(prompts * size).reshape(prompts, size) * 7 % 23
    rows = torch.tensor(data.draw(st.permutations(range(prompts))))
    columns = torch.tensor(data.draw(st.permutations(range(size))))

    def shuffled(x):
        return x[rows][:, columns]

    entropy = entropies(success)["entropy_PG"]
    expected = shuffled(compute(name, reward, success, length, entropy_PG=entropy))
    actual = compute(name, *map(shuffled, (reward, success, length)), entropy_PG=shuffled(entropy))
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def test_ranks_agree_only_on_the_gathered_step():
    """ω is global: the same groups get other advantages if each rank looks at its own alone."""
    success = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [0, 0, 0, 1], [0, 0, 1, 0]])
    reward = success.double()
    gathered = compute("agrae", reward, success)
    by_rank = torch.cat([compute("agrae", reward[rows], success[rows]) for rows in ([0, 1], [2, 3])])
    assert (gathered - by_rank).abs().max() > 0.05
    grpo = torch.cat([compute("grpo", reward[rows], success[rows]) for rows in ([0, 1], [2, 3])])
    torch.testing.assert_close(compute("grpo", reward, success), grpo)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [0.1, 0.3, 1.0, -0.7, 1e-3, 1e4])
@pytest.mark.parametrize("size", [2, 3, 7, 16])
def test_equal_rewards_give_exactly_zero(dtype, value, size):
    reward = torch.full((2, size), value, dtype=dtype)
    for name in ("grpo", "dr_grpo", "agrae", "positive_dominant", "easy_focused"):
        assert (compute(name, reward, torch.ones(2, size)) == 0).all()
    reward = reward.clamp(0, 1)
    assert (compute("agrae_released_code", reward, torch.ones(2, size)) == 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rewards_equal_but_for_rounding_give_exactly_zero(dtype):
    """0.9·accuracy + 0.1·format is not the same float in every order of operations."""
    value = torch.tensor(0.9, dtype=dtype)
    reward = torch.stack([value, torch.nextafter(value, 2 * value)]).repeat(1, 4)
    assert reward.unique().numel() == 2
    for name in ("grpo", "dr_grpo", "agrae"):
        assert (compute(name, reward, torch.ones_like(reward)) == 0).all()


def test_a_small_but_real_spread_is_not_taken_for_rounding():
    reward = torch.tensor([[1.0, 1.0, 1.0, 0.999]])
    assert compute("grpo", reward, None)[0].tolist() == pytest.approx([0.577, 0.577, 0.577, -1.732], abs=5e-3)


# --------------------------------------------------------------------- input and settings


def test_types_of_input():
    nested = [[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]]
    from_list = compute("agrae", nested, [[True, False, True], [False, False, True]])
    assert from_list.dtype == torch.float64
    single = torch.tensor(nested)
    for reward in (single, single.bfloat16(), single.half(), single.int(), single.bool()):
        for success in (single.int(), single.bool(), single, single.double()):
            a = compute("agrae", reward, success)
            assert a.dtype == torch.float32
            torch.testing.assert_close(a, from_list.float())
    array = single.double().numpy()
    torch.testing.assert_close(compute("agrae", array, array), from_list)


def test_input_is_left_alone_and_carries_no_gradient():
    reward = torch.rand(3, 4, requires_grad=True)
    before = reward.detach().clone()
    a = compute("agrae", reward, (reward > 0.5).int())
    assert not a.requires_grad
    assert torch.equal(reward, before)


def test_levels_show_each_stage():
    success = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0]])
    reward = success.double()
    whole = levels("agrae", reward, success, alpha=0.5)
    assert whole.omega == 0.375
    assert whole.rate_P.tolist() == [0.25, 0.5]
    torch.testing.assert_close(whole.base_PG, compute("grpo", reward, success))
    factor = 0.375 / 2 / math.sqrt(0.25) + 0.625 / 2 / math.sqrt(0.75)
    torch.testing.assert_close(whole.sample_PG[0], whole.base_PG[0] * factor)
    expected = torch.where(success > 0, whole.sample_PG * 0.75, whole.sample_PG)
    torch.testing.assert_close(whole.advantage_PG, expected)

    no_sample = levels("agrae", reward, success, alpha=0.5, sample_level=False)
    assert torch.equal(no_sample.sample_PG, no_sample.base_PG)
    assert not torch.equal(no_sample.advantage_PG, no_sample.sample_PG)
    neither = levels("agrae", reward, success, sample_level=False, group_level=False)
    assert torch.equal(neither.advantage_PG, compute("grpo", reward, success))
    dr_grpo = levels("agrae", reward, success, base="dr_grpo")
    assert torch.equal(dr_grpo.base_PG, compute("dr_grpo", reward, success))


def test_omega_and_rate_can_come_from_reward_or_success():
    success = torch.tensor([[1, 0, 0, 0], [1, 1, 1, 0]])
    reward = 0.9 * success.double() + 0.1 * torch.tensor([1, 1, 0, 0])
    default = levels("agrae", reward, success)
    assert default.omega == pytest.approx(0.5)
    assert default.rate_P.tolist() == [0.25, 0.75]
    other = levels("agrae", reward, success, omega_from="success", rate_from="reward")
    assert other.omega == 0.5
    assert other.rate_P.tolist() == pytest.approx([0.275, 0.725])
    shifted = levels("agrae", reward - 0.05, success)
    assert shifted.omega == pytest.approx(0.45)


def test_omega_is_clamped_so_that_no_sign_turns():
    success = torch.tensor([[1, 0, 0, 0], [1, 1, 1, 0]])
    for reward in (success - 2.0, 10.0 * success):
        result = levels("agrae", reward, success)
        assert 0 <= result.omega <= 1
        assert torch.equal(result.sample_PG.sign(), result.base_PG.sign())
        assert (result.advantage_PG[success == 0] < 0).all()


def test_released_code_differs_from_the_paper_in_the_easy_factor():
    success = torch.tensor([[1, 1, 1, 1, 1, 1, 1, 0]])
    p, omega = 7 / 8, 7 / 8
    paper = levels("agrae", success.double(), success)
    code = levels("agrae_released_code", success.double(), success)

    def easy_factor(result):
        ratio = float((result.sample_PG / result.base_PG)[0, 0])
        return (ratio - omega / 2 / math.sqrt(p)) * 2 / (1 - omega)

    assert easy_factor(paper) == pytest.approx(2.83, abs=0.005)
    assert easy_factor(code) == pytest.approx(15.5, abs=0.05)
    # Bessel's correction in z.
    assert float(code.base_PG[0, 0] / paper.base_PG[0, 0]) == pytest.approx(math.sqrt(7 / 8), 1e-4)


def released_function(scores, index, alpha, epsilon=1e-6):
    """The authors' arithmetic, read in their repository, one trajectory at a time."""
    groups = {}
    for score, group in zip(scores, index, strict=True):
        groups.setdefault(group, []).append(score)
    mean = {g: torch.tensor(s).double().mean() for g, s in groups.items()}
    std = {g: torch.tensor(s).double().std() for g, s in groups.items()}
    overall = torch.stack(list(mean.values())).mean()
    result = []
    for score, group in zip(scores, index, strict=True):
        z = (score - mean[group]) / (std[group] + epsilon)
        hard = 0.5 * z / (mean[group].sqrt() + epsilon)
        easy = 0.5 * z / (1 - mean[group].sqrt() + epsilon)
        a = (1 - overall) * easy + overall * hard
        result.append(float(a * min(1, overall / alpha) if a > 0 else a))
    return result


@given(groups(), st.sampled_from([0.25, 0.5, 1.0]))
def test_released_code_rule_is_the_authors_arithmetic(success, alpha):
    prompts, size = success.shape
    index = [prompt for prompt in range(prompts) for _ in range(size)]
    expected = released_function(success.flatten().tolist(), index, alpha)
    actual = compute("agrae_released_code", success, success, alpha=alpha)
    assert actual.flatten().tolist() == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("grpo", ("normalise_parts", "eps")),
        ("dr_grpo", ()),
        ("psr", ()),
        ("w_reinforce", ("lam",)),
        ("hard_focused", ("gamma", "eps")),
        ("positive_dominant", ("beta", "eps")),
        (
            "agrae",
            (
                "alpha", "sample_level", "group_level", "base", "omega_from", "rate_from", "normalise_parts", "eps",
            ),
        ),
    ],
)  # fmt: skip
def test_accepted_settings(name, expected):
    assert accepted_settings(name) == expected


def test_every_setting_of_every_rule_is_checked():
    for name in RULES:
        for setting in accepted_settings(name):
            with pytest.raises(ValueError, match=rf"advantage setting {setting} must be"):
                compute(name, torch.eye(3), torch.eye(3), torch.ones(3, 3), **{setting: "no"})


SUCCESS_3X4 = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]])


def changed(value, group=1, completion=2):
    tensor = SUCCESS_3X4.double()
    tensor[group, completion] = value
    return tensor


@pytest.mark.parametrize(
    ("message", "name", "arguments", "values"),
    [
        (r"group 1, completion 2: a reward must be finite", "grpo", (changed(math.nan),), {}),
        (r"group 0, completion 3: .* finite", "nsr", (changed(math.inf, 0, 3),), {}),
        (r"group 2, completion 0: .* finite.*-inf", "agrae", (changed(-math.inf, 2, 0),), {}),
        (r"group 0 has 1 completion: ", "grpo", (torch.ones(3, 1), torch.ones(3, 1)), {}),
        (r"group 0 has 0 completions: ", "grpo", (torch.ones(3, 0), torch.ones(3, 0)), {}),
        (r"group 1, completion 2: a success .* 0.5", "agrae", (changed(0), changed(0.5)), {}),
        (r"group 1, completion 2: a success", "psr", (changed(0), changed(2)), {}),
        (r"group 1, completion 2: a success", "hard_focused", (changed(0), changed(-1)), {}),
        (r"group 1, completion 2: a success", "grpo_lead", (changed(0), changed(math.nan)), {}),
        (r"needs success_PG", "agrae", (changed(0), None), {}),
        (r"group 0: success_PG has shape \[3, 3\]", "agrae", (changed(0), torch.ones(3, 3)), {}),
        (r"group 2: success_PG has shape \[2, 4\]", "grpo", (changed(0), torch.ones(2, 4)), {}),
        (r"group 3: success_PG has shape \[4, 4\]", "grpo", (changed(0), torch.ones(4, 4)), {}),
        (r"group 0: success_PG has shape \[12\]", "grpo", (changed(0), torch.ones(12)), {}),
        (r"group 2: length_PG has", "grpo_lead", (changed(0), changed(0), torch.ones(2, 4)), {}),
        (r"needs length_PG", "grpo_lead", (changed(0), changed(0)), {}),
        (r"group 0, completion 1: a length", "grpo_lead", (changed(0), changed(0), changed(0)), {}),
        (r"group 1 of reward_PG has 1 comp", "grpo", ([[1.0, 0.0], [1.0]], [[1, 0], [1, 0]]), {}),
        (r"group 1 of success_PG has 3", "grpo", ([[1.0, 0.0]] * 2, [[1, 0], [1, 0, 1]]), {}),
        (r"must be \[P, G\]; its shape is \[4\]", "grpo", (torch.ones(4), torch.ones(4)), {}),
        (r"must be \[P, G\]", "grpo", (torch.ones(1, 2, 3), None), {}),
        (r"no groups", "grpo", (torch.ones(0, 4), torch.ones(0, 4)), {}),
        (r"no groups", "grpo", ([], []), {}),
        (r"group 1: the mean reward .* 1.5", "agrae", (changed(4),), {"rate_from": "reward"}),
        (r"group 1: the mean reward .* -1", "agrae_released_code", (changed(-6),), {}),
        (r"alpha must be a number in \(0, 1\]", "agrae", (changed(0),), {"alpha": 0}),
        (r"alpha must be", "agrae", (changed(0),), {"alpha": 1.5}),
        (r"alpha must be", "agrae", (changed(0),), {"alpha": math.nan}),
        (r"alpha must be", "agrae_released_code", (changed(0),), {"alpha": -1}),
        (r"beta must be a positive", "positive_dominant", (changed(0),), {"beta": 0}),
        (r"gamma must be a positive", "hard_focused", (changed(0),), {"gamma": -0.5}),
        (r"lam must be a number of at least 0", "w_reinforce", (changed(0),), {"lam": -0.1}),
        (r"eps must be a positive", "grpo", (changed(0),), {"eps": 0}),
        (r"base must be 'grpo' or 'dr_grpo'", "agrae", (changed(0),), {"base": "dapo"}),
        (r"sample_level must be true or false", "agrae", (changed(0),), {"sample_level": 1}),
        (r"no setting 'aplha'; did you mean 'alpha'", "agrae", (changed(0),), {"aplha": 1}),
        (r"no setting 'alpha'; valid: normalise_parts, eps", "grpo", (changed(0),), {"alpha": 1}),
        (r"no setting 'alpha'; it has none", "dr_grpo", (changed(0),), {"alpha": 1}),
        (r"unknown advantage rule 'agrea'; did you mean 'agrae'", "agrea", (changed(0),), {}),
        (r"unknown advantage rule 'xyz'; valid: grpo, dr_grpo", "xyz", (changed(0),), {}),
    ],
)
def test_bad_input_is_named(message, name, arguments, values):
    if len(arguments) == 1:
        arguments = (*arguments, SUCCESS_3X4)
    with pytest.raises(ValueError, match=message):
        compute(name, *arguments, **values)


def test_success_is_not_needed_where_it_has_no_part():
    reward = torch.rand(3, 4)
    for name in ("grpo", "dr_grpo", "dapo", "positive_dominant", "agrae_released_code"):
        result = levels(name, reward, None)
        assert torch.isfinite(result.advantage_PG).all()
    assert levels("grpo", reward, None).rate_P.isnan().all()
    compute("agrae", reward, None, rate_from="reward")
    compute("agrae", reward, None, sample_level=False)


@settings(max_examples=20)
@given(data=st.data())
@pytest.mark.parametrize("name", RULES)
def test_any_finite_reward_gives_finite_advantages(name, data):
    success = data.draw(groups())
    low, high = (0, 1) if name in ("agrae_released_code", "maxrl") else (-1e6, 1e6)
    noise = data.draw(st.lists(st.floats(low, high, width=32), min_size=success.numel()))
    reward = torch.tensor(noise[: success.numel()]).reshape(success.shape)
    length = torch.ones_like(success)
    assert torch.isfinite(compute(name, reward, success, length, **entropies(success))).all()


# ------------------------------------------------------------------------------ the module


def test_rules_loop_over_neither_groups_nor_completions():
    """1,024 prompts × 64: as many tensor operations as for 2 × 2."""

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            Count.calls += 1
            return function(*args, **(kwargs or {}))

    def operations(name, prompts, size):
        success = torch.arange(prompts * size).reshape(prompts, size) % 2
        Count.calls = 0
        with Count():
            compute(name, success.double(), success, success + 1, **entropies(success))
        return Count.calls

    for name in RULES:
        assert operations(name, 1024, 64) == operations(name, 2, 2) > 0


def test_module_loads_torch_alone():
    code = (
        "import sys, mm_agrae.advantage; "
        "print([m for m in ('transformers', 'vllm', 'gradio', 'datasets') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
