"""Whole runs with vLLM in the training process: what samples is what learns.

Runs with servers are in `test_rollout_vllm_server`, which has them.
"""

import pytest
import torch
from helpers import TEXT, VL
from training import require_same_greedy_evaluation, small_trainer

from mm_agrae.errors import EngineError
from mm_agrae.rollout import Sync

pytest.importorskip("vllm", reason="vLLM is not installed: pip install 'mm-agrae[vllm]'")
pytestmark = [pytest.mark.timeout(400), pytest.mark.xdist_group("vllm-training")]

LORA = {"lora": {"rank": 4, "parts": ["language"]}}


@pytest.mark.parametrize(
    ("path", "model"),
    [(VL, {}), (TEXT, {}), pytest.param(VL, LORA, marks=pytest.mark.slow)],
    ids=["vl", "text", "vl-lora"],
)
def test_a_run_whose_greedy_evaluation_is_that_of_its_checkpoint(tmp_path, path, model):
    fast = {"learning_rate": 3e-2 if model else 1e-2}  # so that greedy completions change
    trainer = small_trainer(tmp_path, path, "vllm", model=model, update=fast)
    trainer.train()
    steps = trainer.run.read_metrics()
    assert [row["policy/lag"] for row in steps] == [0, 0]
    assert steps[0]["mismatch/probe_max"] < 1e-4
    assert all(row["mismatch/mean_abs"] < 1e-5 and row["mismatch/cut"] == 0 for row in steps)
    # The second step was sampled with the weights of the first update.
    assert steps[1]["sync/megabytes"] > 0.1
    assert steps[1]["seconds/sync"] > 0
    require_same_greedy_evaluation(tmp_path, trainer)


def test_other_weights_are_corrected_for_and_found_out(tmp_path, monkeypatch):
    """The engine's weights differ: each token is weighted by π_policy / π_engine, bounded. It
    then claims to take new ones, but does not: the next check stops the run."""
    trainer = small_trainer(
        tmp_path, TEXT, "vllm",
        rollout={"mismatch": {"probe_every": 1, "warn_above": 0.001, "stop_above": 0.03}},
        update={"learning_rate": 0.05},
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in trainer.policy.parameters():
            parameter += 0.005 * torch.randn_like(parameter)

    def forgetful():
        trainer.engine.version = trainer.policy.version
        return Sync()

    monkeypatch.setattr(trainer.engine, "sync", forgetful)
    with pytest.raises(EngineError, match=r"rollout\.mismatch\.stop_above"):
        trainer.train()
    assert trainer.steps_done == 1
    first = trainer.run.read_metrics()[0]
    assert first["mismatch/mean_abs"] > 0.001
    assert first["mismatch/kl"] > 0
    assert 0.5 < first["mismatch/weight"] < 2
