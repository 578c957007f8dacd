"""What the trainer hands a rule: entropies, problems, difficulties and reward parts; and the steered entropy bonus."""

import pytest
import torch
from helpers import TEXT, run_config

from mm_agrae import config as configs
from mm_agrae.advantage import compute
from mm_agrae.batching import StepTable, UpdateRow, micro_batch
from mm_agrae.errors import ConfigError
from mm_agrae.progress import Reporter
from mm_agrae.rewards import Rewarder
from mm_agrae.run.folder import RunFolder
from mm_agrae.trainer import Trainer

NO_EVALUATION = {"before": False, "after": False}
EDGE = {"rule": "edge"}


def prepared(tmp_path, **sections) -> Trainer:
    # Hot enough that groups have both correct and incorrect completions.
    rollout = {"prompts_per_step": 8, "temperature": 1.6}
    config = run_config(tmp_path / "run", TEXT, evaluate=NO_EVALUATION, rollout=rollout, **sections)
    return Trainer(config, Reporter(enabled=False))


def test_sampled_entropies_reach_the_rule(tmp_path):
    trainer = prepared(tmp_path, advantage={**EDGE, "entropy_from": "sampled"}, train={"steps": 1})
    trainer.train()
    records = RunFolder(tmp_path / "run").read_rollouts(1)
    table = {name: torch.tensor([r[name] for r in records]).double().view(8, 4) for name in ("reward", "entropy")}
    actual = torch.tensor([r["advantage"] for r in records]).double().view(8, 4)
    assert actual.any()
    expected = compute("edge", table["reward"], None, entropy_PG=table["entropy"])
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-9)


def test_exact_entropies_are_those_of_each_completion_by_itself(tmp_path):
    """However the pass is cut into mini- and micro-batches."""
    update = {"mini_batch_prompts": 2, "micro_batch_completions": 3}
    trainer = prepared(tmp_path, advantage=EDGE, update=update)
    assert configs.uses_entropy(trainer.config)
    with Rewarder(trainer.config.reward, trainer.config.rollout.max_new_tokens) as rewarder:
        trainer.collector.rewarder = rewarder
        groups = trainer.collector.collect(0, last=True)
    trainer.collector.close()
    table = StepTable.of(group.summary() for group in groups)
    exact_PG = trainer.updater.exact_entropy(groups, table).entropy_PG
    for p, group in enumerate(groups):
        for g, completion in enumerate(group.completions):
            batch = micro_batch([group.prompt], [UpdateRow(0, completion, 1.0)], trainer.processes.device)
            with torch.no_grad():
                entropy_BT = trainer.policy(batch)[1]
            assert float(exact_PG[p, g]) == pytest.approx(float(entropy_BT.mean()), rel=1e-4)
    assert not torch.allclose(exact_PG, table.entropy_PG, rtol=1e-2)


@pytest.mark.parametrize(
    "sections",
    [
        {"advantage": EDGE},
        {"advantage": {"rule": "diva"}, "update": {"loss": "sapo", "loss_options": {"tau_negative": 1.2}}},
        {
            "advantage": {"rule": "grpo", "normalise_parts": True},
            "reward": {"parts": {"accuracy": 0.9, "format": 0.1}},
        },
        {"advantage": {"rule": "pkpo", "k": 3}, "update": {"loss": "clip_cov", "top_entropy": 0.3}},
    ],
    ids=["edge", "diva", "gdpo", "pkpo"],
)
def test_a_step_of(tmp_path, sections):
    trainer = prepared(tmp_path, train={"steps": 1}, **sections)
    trainer.train()
    (row,) = RunFolder(tmp_path / "run").read_metrics()
    assert 0 < row["update/grad_norm"] < 1e4
    records = RunFolder(tmp_path / "run").read_rollouts(1)
    assert any(record["advantage"] for record in records)


def test_the_entropy_coefficient_is_steered(tmp_path):
    trainer = prepared(tmp_path, update={"entropy_target": 100.0, "entropy_step": 0.25, "entropy_coef": 0.5})
    trainer.train()
    rows = RunFolder(tmp_path / "run").read_metrics()
    assert [row["update/entropy_coef"] for row in rows] == [0.5, 0.75]
    assert trainer._state()["entropy_control"] == [1.0, rows[-1]["update/entropy"]]


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"advantage": {"rule": "pkpo", "k": 5}}, r"advantage.k must be from 1 to the 4 completions"),
        ({"advantage": {"rule": "grpo", "entropy_from": "sampled"}}, r"entropy_from has no effect under rule 'grpo'"),
        ({"advantage": {"rule": "diva_released_code", "width": 9}}, r"width is 9, but a completion has 24 tokens"),
        ({"update": {"loss": "sapo", "clip_high": 0.2}}, r"update: loss 'sapo' has no clip"),
        ({"update": {"loss": "kl_cov", "loss_options": {"tau": 1.0}}}, r"no option 'tau'; it has share, coef"),
    ],
)
def test_a_config_that_the_rule_or_loss_cannot_use(tmp_path, sections, message):
    with pytest.raises(ConfigError, match=message):
        run_config(tmp_path, TEXT, **sections)


def test_settings_that_follow_from_the_config(tmp_path):
    reward = {"parts": {"accuracy": 0.9, "format": 0.3}, "overlong": {"buffer_tokens": 4, "penalty": 0.5}}
    config = run_config(tmp_path, TEXT, advantage={"rule": "diva"}, reward=reward)
    assert configs.rule_settings(config) == {"reward_range": pytest.approx(1.7)}
    given = run_config(tmp_path, TEXT, advantage={"rule": "diva", "reward_range": 2.0}, reward=reward)
    assert configs.rule_settings(given) == {"reward_range": 2.0}
    released = run_config(tmp_path, TEXT, advantage={"rule": "diva_released_code"})
    assert configs.rule_settings(released) == {"width": 24}
