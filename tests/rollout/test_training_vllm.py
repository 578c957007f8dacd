"""Whole runs with the real vLLM engine: what it samples from is what is learnt from."""

import signal

import pytest
import torch
from helpers import TEXT, VL, run_config
from servers import Server

from mm_agrae.errors import EngineError
from mm_agrae.evaluation import evaluate
from mm_agrae.evaluation.checkpoints import build_engine
from mm_agrae.progress import Reporter
from mm_agrae.rewards import Rewarder
from mm_agrae.run import checkpoint
from mm_agrae.run.folder import RunFolder
from mm_agrae.tasks import load_all
from mm_agrae.trainer import Trainer

pytest.importorskip("vllm", reason="vLLM is not installed: pip install 'mm-agrae[vllm]'")
pytestmark = [pytest.mark.timeout(400), pytest.mark.xdist_group("vllm-training")]

LORA = {"lora": {"rank": 4, "parts": ["language"]}}


def config_for(tmp_path, path, engine, **sections):
    rollout = {"engine": engine, **sections.pop("rollout", {})}
    return run_config(
        tmp_path / engine,
        path,
        rollout=rollout,
        # Every completion teaches, so that two steps move the weights visibly.
        advantage={"rule": "w_reinforce"},
        evaluate={"before": False, "samples": 1},
        prompt={"max_tokens": 128},
        **sections,
    )


@pytest.mark.parametrize(
    ("path", "model"),
    [(VL, {}), (TEXT, {}), pytest.param(VL, LORA, marks=pytest.mark.slow)],
    ids=["vl", "text", "vl-lora"],
)
def test_a_run_whose_greedy_evaluation_is_that_of_its_checkpoint(tmp_path, path, model):
    fast = {"learning_rate": 3e-2 if model else 1e-2}  # so that greedy answers change
    config = config_for(tmp_path, path, "vllm", model=model, update=fast)
    trainer = Trainer(config, Reporter(enabled=False))
    trainer.train()
    run = RunFolder(config.run_dir)
    steps = list(run.read_metrics())
    assert [row["policy/lag"] for row in steps] == [0, 0]
    assert steps[0]["mismatch/probe_max"] < 1e-4
    assert all(row["mismatch/mean_abs"] < 1e-5 and row["mismatch/cut"] == 0 for row in steps)
    # The second step was sampled with the weights of the first update.
    assert steps[1]["sync/megabytes"] > 0.1
    assert steps[1]["seconds/sync"] > 0

    require_same_greedy_answers(tmp_path, trainer, path, model)


def require_same_greedy_answers(tmp_path, trainer, path, model=None):
    """The engine's evaluation after training is that of the checkpoint by the engine hf."""
    config, run = trainer.config, trainer.run
    saved = str(checkpoint.newest(trainer._checkpoints))
    reference = config_for(tmp_path, path, "hf", model=model or {})
    found = {}
    for name, source in (("trained", saved), ("untrained", path)):
        processing, _, engine = build_engine(reference, source)
        with Rewarder(config.reward, config.evaluate.max_new_tokens) as rewarder:
            problems = evaluate.run(
                engine,
                processing,
                rewarder,
                load_all(config.data.evaluate),
                range(4),
                config.evaluate,
            )
        found[name] = [problem.records[0].completion for problem in problems]
    (result,) = run.read_evaluations()
    by_vllm = [
        sample["completion"] for sample in run.read_samples(result) if sample["sample"] == -1
    ]
    assert by_vllm == found["trained"]
    assert by_vllm != found["untrained"]


def test_stale_weights_are_found_out(tmp_path, monkeypatch):
    """An engine that says it took the weights, but did not, stops the run at the next probe."""
    config = config_for(
        tmp_path,
        TEXT,
        "vllm",
        rollout={"mismatch": {"probe_every": 1, "warn_above": 0.001, "stop_above": 0.02}},
        update={"learning_rate": 0.05},
    )
    trainer = Trainer(config, Reporter(enabled=False))

    def forgetful():
        trainer.engine.version = trainer.policy.version
        return type("Sync", (), {"megabytes": 0.0})()

    monkeypatch.setattr(trainer.engine, "sync", forgetful)
    with pytest.raises(EngineError, match=r"rollout\.mismatch\.stop_above"):
        trainer.train()
    assert trainer.steps_done == 1


def test_shifted_weights_are_corrected_by_importance(tmp_path):
    """With an engine that lags, the weight of each token is π_policy / π_engine, bounded."""
    config = config_for(tmp_path, TEXT, "vllm", rollout={"mismatch": {"probe_every": 0}})
    trainer = Trainer(config, Reporter(enabled=False))
    with torch.no_grad():
        for parameter in trainer.policy.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    trainer.train()
    first = next(iter(RunFolder(config.run_dir).read_metrics()))
    assert first["mismatch/mean_abs"] > 0.01
    assert first["mismatch/kl"] > 0
    assert 0.5 < first["mismatch/weight"] < 2


def test_one_step_overlap(tmp_path):
    """By a server, sampling beside the update: one step behind, and weighed for it."""
    server = Server(tmp_path, TEXT)
    try:
        config = config_for(
            tmp_path,
            TEXT,
            "vllm_server",
            rollout={"overlap": True, "vllm": {"servers": [server.address]}},
            update={"learning_rate": 1e-2},
            train={"steps": 4},
        )
        trainer = Trainer(config, Reporter(enabled=False))
        trainer.train()
    finally:
        server.stop()
    rows = trainer.run.read_metrics()
    assert [row["policy/lag"] for row in rows] == [0, 1, 1, 1]
    assert rows[0]["mismatch/mean_abs"] < 1e-5
    # The weights that sampled were another policy's; the ratio says by how much.
    assert all(row["mismatch/mean_abs"] > 1e-3 for row in rows[1:])
    assert trainer.collector.order.position == 4 * config.rollout.prompts_per_step
    require_same_greedy_answers(tmp_path, trainer, TEXT)


def test_a_run_goes_on_when_one_of_two_servers_dies(tmp_path, caplog):
    servers = [Server(tmp_path, TEXT), Server(tmp_path, TEXT)]
    addresses = [server.address for server in servers]
    try:
        config = config_for(
            tmp_path,
            TEXT,
            "vllm_server",
            rollout={"vllm": {"servers": addresses, "request_limit_s": 60.0}},
            train={"steps": 3},
        )
        trainer = Trainer(config, Reporter(enabled=False))
        sample = trainer.engine.generate

        def dying(*arguments, **options):
            if trainer.steps_done == 1:
                servers[0].signal(signal.SIGKILL)
            return sample(*arguments, **options)

        trainer.engine.generate = dying
        trainer.train()
    finally:
        for server in servers:
            server.stop()
    assert trainer.steps_done == 3
    assert addresses[0] in caplog.text
    require_same_greedy_answers(tmp_path, trainer, TEXT)
