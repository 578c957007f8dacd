"""verl's plug-in: the function by itself, and inside the real verl where that is installed.

`./scripts/test.sh --all` makes an environment with verl and runs this file there; without verl the
second half is skipped.
"""

import json
import math
import subprocess
import sys
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from mm_agrae.adapters import verl as adapter
from mm_agrae.adapters.verl import ESTIMATORS, token_advantages
from mm_agrae.advantage import RULES, compute

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "advantages.json").read_text())
CASES = GOLDEN["cases"]
NAMES = {rule: name for name, (rule, fixed) in ESTIMATORS.items() if not fixed}


def batch(case, seed=0, dtype=torch.float32):
    """A golden case as verl's driver holds it: rows in random order, ragged responses.

    Every third token of a response is a tool's (mask 0), and so is the one that holds the reward.
    Returns token_level_rewards [B, T], response_mask [B, T], uid and each row's index in [P, G].
    """
    prompts, size = len(case["reward"]), len(case["reward"][0])
    reward = torch.tensor(case["reward"], dtype=dtype).flatten()
    length = torch.tensor(case["length_tokens"]).flatten()
    width = int(length.max()) * 2 + 2
    rewards, mask = torch.zeros(prompts * size, width, dtype=dtype), []
    for row, tokens in enumerate(length.tolist()):
        turns = [int(position % 3 < 2) for position in range(width)]
        end = next(t for t in range(width) if sum(turns[:t]) == tokens)
        mask.append([*turns[:end], *[0] * (width - end)])
        rewards[row, end] = reward[row]
    order = torch.randperm(prompts * size, generator=torch.Generator().manual_seed(seed))
    uid = [f"prompt-{int(row) // size}" for row in order]
    return rewards[order], torch.tensor(mask)[order], uid, order


def settings_of(column, case):
    rule = GOLDEN["rules"][column]
    values = {k: case["alpha"] if v is None else v for k, v in rule["settings"].items()}
    if values.get("base") == "dr_grpo":
        return "agrae_dr_grpo", {k: v for k, v in values.items() if k != "base"}
    return NAMES[rule["name"]], values


def check(advantage_BT, mask_BT, order, expected_PG, tolerance=1e-6):
    """Each row holds its completion's advantage where the mask is 1, and 0 elsewhere."""
    expected_B = torch.as_tensor(expected_PG, dtype=torch.float64).flatten()[order]
    torch.testing.assert_close(advantage_BT.double(), expected_B[:, None] * mask_BT, rtol=tolerance, atol=1e-9)


# ---------------------------------------------------------------------- without verl


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-4)])
@pytest.mark.parametrize("column", GOLDEN["rules"])
def test_golden_cases_with_shuffled_rows(column, dtype, tolerance):
    cases = [case for case in CASES if column in case["advantage"]]
    assert len(cases) >= 17
    for seed, case in enumerate(cases):
        rewards, mask, uid, order = batch(case, seed, dtype)
        estimator, values = settings_of(column, case)
        result = token_advantages(estimator, rewards, mask, uid, {"mm_agrae": values})
        assert result.dtype == dtype
        check(result, mask, order, case["advantage"][column], tolerance)


def test_every_rule_has_a_name_that_verl_does_not_reserve():
    assert {rule for rule, _ in ESTIMATORS.values()} == set(RULES) - {"edge", "edge_released_code"}
    assert not {"grpo", "gae"} & set(ESTIMATORS)
    assert NAMES["grpo"] == "mm_grpo"


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_masks_and_rewards_of_any_type(dtype):
    rewards, mask, uid, order = batch(CASES[1])
    expected = compute("agrae", CASES[1]["reward"], CASES[1]["success"])
    check(token_advantages("agrae", rewards, mask.to(dtype), uid), mask, order, expected)
    low = token_advantages("agrae", rewards.bfloat16(), mask, uid)
    check(low, mask, order, expected, tolerance=0.01)


def test_success_is_a_reward_of_at_least_the_threshold():
    reward = torch.tensor([0.9, 0.3, 0.0, 0.0])
    mask = torch.ones(4, 1)
    nine = {"mm_agrae": {"success_threshold": 0.9}}
    for config, correct in [({}, [1, 0, 0, 0]), (nine, [1, 0, 0, 0]),
                          ({"mm_agrae": {"success_threshold": 0.3}}, [1, 1, 0, 0])]:  # fmt: skip
        result = token_advantages("agrae", reward[:, None], mask, ["a"] * 4, config)
        torch.testing.assert_close(result[:, 0], compute("agrae", reward[None], [correct])[0])


def test_a_response_without_tokens_has_no_advantage_but_counts():
    rewards, mask = torch.tensor([[1.0, 0], [0, 0], [0, 0]]), torch.tensor([[1, 1], [1, 0], [0, 0]])
    result = token_advantages("agrae", rewards, mask, ["a"] * 3)
    expected = compute("agrae", [[1.0, 0, 0]], [[1, 0, 0]])[0]
    assert result[2].tolist() == [0, 0]
    assert result[:2, 0].tolist() == pytest.approx(expected[:2].tolist())


ROWS = torch.tensor([[1.0], [0.0], [1.0], [0.0]])
BAD = {
    "uneven": (ROWS, ["a", "a", "a", "b"], {}, r"uid 'b' has 1 completion, .* have 3"),
    "odd one": (
        torch.ones(7, 1), [*"aabbccc"], {}, r"uid 'c' has 3 completions, other prompts have 2",
    ),
    "single": (ROWS, [*"abcd"], {}, r"has 1 completion.*uid 'a'"),
    "no uid": (ROWS, None, {}, "no uid"),
    "too few uids": (ROWS, [*"ab"], {}, "2 uids were given for 4 rows"),
    "nan": (ROWS * math.nan, [*"xxyy"], {}, r"must be finite.*uid 'x'"),
    "setting": (ROWS, [*"aabb"], {"mm_agrae": {"alhpa": 1}}, r"algorithm.mm_agrae.alhpa.*alpha"),
    "other rule's": (ROWS, [*"aabb"], {"mm_agrae": {"beta": 1}}, r"'agrae' has no such setting"),
    "range": (ROWS, [*"aabb"], {"mm_agrae": {"alpha": 2}}, r"alpha must be a number in \(0, 1\]"),
    "threshold": (ROWS, [*"aabb"], {"mm_agrae": {"success_threshold": "x"}}, "must be a number"),
    "no section": (ROWS, [*"aabb"], {"mm_agrae": 0.5}, "must be a section"),
    "not by std": (ROWS, [*"aabb"], {"norm_adv_by_std_in_grpo": False}, "agrae_dr_grpo"),
    "kl": (ROWS, [*"aabb"], {"use_kl_in_reward": True}, "success_threshold=0.5"),
    "empty": (ROWS[:0], [], {}, "holds no rows"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_unusable_batches_and_settings_are_refused_by_name(name):
    rewards, uid, config, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        token_advantages("agrae", rewards, torch.ones_like(rewards), uid, config)


def test_masks_of_another_shape_are_refused():
    with pytest.raises(ValueError, match="response_mask has shape"):
        token_advantages("agrae", ROWS, torch.ones(4, 2), [*"aabb"])


def test_settings_that_do_not_concern_the_estimator_are_accepted():
    free = {"norm_adv_by_std_in_grpo": False, "use_kl_in_reward": True}
    token_advantages("dr_grpo", ROWS, torch.ones(4, 1), [*"aabb"], free)
    kl = {"use_kl_in_reward": True, "mm_agrae": {"success_threshold": 0.5, "alpha": None}}
    token_advantages("agrae", ROWS, torch.ones(4, 1), [*"aabb"], kl)
    token_advantages("mm_grpo", ROWS, torch.ones(4, 1), [*"aabb"], {"use_kl_in_reward": True})


def test_one_warning_about_rewards_of_minus_one_and_one(caplog, monkeypatch):
    monkeypatch.setattr(adapter, "_warned", [])
    for _ in range(2):
        token_advantages("agrae", 2 * ROWS - 1, torch.ones(4, 1), [*"aabb"])
    assert [record.message for record in caplog.records] == [
        "rewards of this step are in [-1, 1], but A-GRAE takes their mean for ω, a rate, and "
        "clamps it to [0, 1]; for rewards on another scale set omega_from=success "
        "(+algorithm.mm_agrae.omega_from=success)"
    ]


def test_the_setting_in_a_name_cannot_be_changed():
    config = {"mm_agrae": {"base": "grpo"}}
    with pytest.raises(ValueError, match="'agrae_dr_grpo' has no such setting"):
        token_advantages("agrae_dr_grpo", ROWS, torch.ones(4, 1), [*"aabb"], config)


# ------------------------------------------------------------------------- inside verl

needs_verl = pytest.mark.skipif(
    find_spec("verl") is None, reason="verl is not installed here; run ./scripts/test.sh --all"
)


def algorithm(*overrides):
    """verl's own config with overrides as they are typed on its command line."""
    import verl
    from hydra import compose, initialize_config_dir

    folder = Path(verl.__file__).parent / "trainer" / "config"
    with initialize_config_dir(str(folder), version_base=None):
        return compose("ppo_trainer", overrides=list(overrides)).algorithm


def data_proto(case, seed=0):
    import numpy as np
    from verl import DataProto

    rewards, mask, uid, order = batch(case, seed)
    images = np.array([{"pixel_values": torch.zeros(4, 3)} for _ in uid], dtype=object)
    data = DataProto.from_dict(
        tensors={"token_level_rewards": rewards, "response_mask": mask},
        non_tensors={"uid": np.array(uid, dtype=object), "multi_modal_inputs": images},
    )
    return data, order


def advantages(data, *overrides):
    """By verl's own `compute_advantage`, called as its trainer calls it."""
    from verl.trainer.ppo.ray_trainer import compute_advantage

    config = algorithm(*overrides)
    return compute_advantage(
        data,
        adv_estimator=config.adv_estimator,
        gamma=config.gamma,
        lam=config.lam,
        num_repeat=8,
        norm_adv_by_std_in_grpo=config.norm_adv_by_std_in_grpo,
        config=config,
    )


@needs_verl
def test_verl_finds_the_plug_in_by_its_entry_point():
    (found,) = [e for e in entry_points(group="verl.plugins") if e.name == "mm-agrae"]
    assert found.value == "mm_agrae.adapters.verl"
    script = "from verl.trainer.ppo.core_algos import *; import sys; print(get_adv_estimator_fn"
    done = subprocess.run(
        [sys.executable, "-c", f"{script}('agrae'), 'trl' in sys.modules)"], capture_output=True, text=True
    )
    assert "estimate" in done.stdout, done.stderr
    assert "False" in done.stdout


@needs_verl
@pytest.mark.parametrize("column", GOLDEN["rules"])
def test_compute_advantage_gives_our_numbers(column):
    case = next(case for case in CASES if column in case["advantage"] and case["alpha"] == 0.5)
    estimator, values = settings_of(column, case)
    overrides = [f"+algorithm.mm_agrae.{key}={value}" for key, value in values.items()]
    data, order = data_proto(case)
    result = advantages(data, f"algorithm.adv_estimator={estimator}", *overrides)
    mask = result.batch["response_mask"]
    check(result.batch["advantages"], mask, order, case["advantage"][column], 1e-4)
    assert torch.equal(result.batch["returns"], result.batch["advantages"])


@needs_verl
def test_reordering_the_batch_as_verl_balances_it_changes_nothing():
    first, _ = data_proto(CASES[3])
    second, _ = data_proto(CASES[3])
    order = torch.randperm(len(second), generator=torch.Generator().manual_seed(9))
    second.reorder(order)
    by_row = [advantages(data, "algorithm.adv_estimator=agrae").batch["advantages"] for data in (first, second)]
    torch.testing.assert_close(by_row[0][order], by_row[1], rtol=1e-6, atol=1e-9)


@needs_verl
def test_beside_verls_own_grpo():
    """verl divides by the sample standard deviation, and subtracts only the mean if set to."""
    case = CASES[0]
    size = len(case["reward"][0])

    def result(*overrides):
        return advantages(data_proto(case)[0], *overrides).batch["advantages"]

    theirs = result("algorithm.adv_estimator=grpo")
    ours = result("algorithm.adv_estimator=mm_grpo")
    torch.testing.assert_close(ours * math.sqrt((size - 1) / size), theirs, rtol=1e-4, atol=1e-6)
    centred = "algorithm.norm_adv_by_std_in_grpo=False"
    torch.testing.assert_close(
        result("algorithm.adv_estimator=dr_grpo", centred), result("algorithm.adv_estimator=grpo", centred)
    )


@needs_verl
def test_errors_reach_the_user_through_verl():
    data, _ = data_proto(CASES[0])
    with pytest.raises(ValueError, match="has no such setting"):
        advantages(data, "algorithm.adv_estimator=agrae", "+algorithm.mm_agrae.alfa=1")
    with pytest.raises(ValueError, match="uid 'prompt-"):
        advantages(data[:-1], "algorithm.adv_estimator=agrae")


@needs_verl
def test_a_name_that_is_taken_stays_with_its_owner(caplog):
    script = (
        "import os; os.environ['VERL_USE_EXTERNAL_PLUGINS'] = 'none'\n"
        "from verl.trainer.ppo import core_algos\n"
        "core_algos.register_adv_est('dapo')(print)\n"
        "import mm_agrae.adapters.verl\n"
        "names = core_algos.ADV_ESTIMATOR_REGISTRY\n"
        "assert names['dapo'] is print and 'mm_dapo' in names and 'agrae' in names\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "ours is mm_dapo" in done.stderr
