"""The loop on the embedded checkpoints: what a run leaves behind, and that it is exact."""

import json
import os
from dataclasses import replace

import pytest
import torch
from helpers import TEXT, VL, processing, prompts, run_config, sampling

from mm_agrae.errors import DataError, ModelError, RunFolderError
from mm_agrae.progress import Reporter
from mm_agrae.run.folder import RunFolder
from mm_agrae.run.records import PartMeans
from mm_agrae.tasks.order import DataOrder
from mm_agrae.trainer import Trainer

BOTH = pytest.mark.parametrize("path", [VL, TEXT], ids=["vl", "text"])
LORA = {"lora": {"rank": 4, "alpha": 8}}


def train(run_dir, path=VL, **sections):
    trainer = Trainer(run_config(run_dir, path, **sections), Reporter(enabled=False))
    summary = trainer.train()
    return trainer, summary


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.policy.model.named_parameters()}


def difference(a, b):
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


@BOTH
def test_a_run_leaves_everything_behind(tmp_path, path):
    trainer, summary = train(tmp_path / "run", path, checkpoint={"every": 1, "keep": 1})
    run = RunFolder(tmp_path / "run")
    rows = run.read_metrics()
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        assert 0 <= row["success/mean"] <= 1
        assert row["groups/all_correct"] + row["groups/all_incorrect"] + row["groups/mixed"] == pytest.approx(1)
        assert row["completions/correct"] == row["success/mean"] * 16
        assert row["policy/entropy"] > 0
        assert row["advantage/omega"] == pytest.approx(row["reward/mean"])
        assert {
            "reward/accuracy",
            "policy/clip_low",
            "update/grad_norm",
            "seconds/rollout",
            "seconds/update",
            "tokens/completion",
            "completions/truncated",
        } <= row.keys()
    assert run.rollout_steps() == [1, 2]
    records = run.read_rollouts(1)
    assert len(records) == 16
    for record in records:
        assert record["completion"]
        assert record["answer"]
        assert bool(record["images"]) == (path == VL)
        for image in record["images"]:
            assert (tmp_path / "run" / image).is_file()
        assert record["advantage_before"] is not None
    assert {result.name for result in run.read_evaluations()} == {"before", "after"}
    assert run.read_summary()["pass_at_k"]["after"]["2"].keys() == {"mean", "low", "high"}
    assert summary["tokens"] == sum(row["tokens/completion"] for row in rows)
    assert [p.name for p in (tmp_path / "run" / "checkpoints").glob("step_*")] == ["step_000002"]
    assert trainer.policy.version == 2


def test_parts_that_do_not_apply_are_left_out_of_every_mean(tmp_path):
    own = tmp_path / "own.py"
    own.write_text("def even(example, completion): return None if len(completion.text) % 2 else 0.5\n"
                   "def never(example, completion): return None\n")  # fmt: skip
    reward = {"parts": {"accuracy": 1.0, "rule": 0, f"{own}:even": 0.5, f"{own}:never": 1.0}}
    train(tmp_path / "run", TEXT, reward=reward, rollout={"max_new_tokens": 64}, evaluate={"max_new_tokens": 64})
    run = RunFolder(tmp_path / "run")
    rows, records = run.read_metrics(), run.read_rollouts(1)
    odd = [len(record["completion"]) % 2 for record in records]
    assert 0 < sum(odd) < len(odd)
    for record, left_out in zip(records, odd, strict=True):
        assert record["parts"].keys() == {"accuracy", "rule"} | (set() if left_out else {f"{own}:even"})
        assert record["reward"] == record["parts"]["accuracy"] + (0 if left_out else 0.25)
    assert rows[0][f"reward/{own}:even"] == 0.5
    assert f"reward/{own}:never" not in rows[0]
    named = [record["parts"]["rule"] for record in records]
    assert rows[0]["reward/rule"] == sum(named) / len(named)
    assert sum(named) > 0
    for result in run.read_evaluations():
        assert result.parts.keys() == {"accuracy", "rule", f"{own}:even"}
        assert result.parts["accuracy"] == PartMeans(result.pass_at_k[1].mean, 1.0)
        assert 0 < result.parts["rule"].mean < 1


@BOTH
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_transformers_loads_the_checkpoint_by_itself(tmp_path, path, lora):
    trainer, _ = train(tmp_path / "run", path, model=LORA if lora else {}, evaluate={"before": False, "after": False})
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

    folder = str(trainer.newest_checkpoint())
    loader = AutoModelForImageTextToText if path == VL else AutoModelForCausalLM
    model = loader.from_pretrained(folder)
    if path == VL:
        AutoProcessor.from_pretrained(folder)
    prompt = prompts(path, 1)[0]
    inputs = {"input_ids": prompt.token_ids[None]}
    if path == VL:
        inputs |= {
            "pixel_values": prompt.pixel_values,
            "image_grid_thw": prompt.image_grid_thw,
            "mm_token_type_ids": prompt.mm_token_type_ids[None],
        }
    generated = model.generate(
        **inputs, do_sample=False, max_new_tokens=16, suppress_tokens=list(processing(path).forbidden_ids)
    )
    greedy = sampling(temperature=0.0, max_new_tokens=16)
    ours = trainer.engine.generate([prompt], 1, greedy, [0])[0][0]
    assert generated[0, len(prompt) :].tolist() == list(ours.token_ids)
    assert "run_dir" in (trainer.newest_checkpoint() / "mm_agrae.yaml").read_text()
    assert json.loads((trainer.newest_checkpoint() / "mm_agrae.json").read_text())["step"] == 2


@BOTH
def test_the_same_seed_gives_the_same_run(tmp_path, path):
    first, _ = train(tmp_path / "a", path)
    second, _ = train(tmp_path / "b", path)
    assert difference(weights(first), weights(second)) == 0
    other, _ = train(tmp_path / "c", path, train={"seed": 1})
    assert difference(weights(first), weights(other)) > 0


@pytest.mark.parametrize("loss", ["grpo", "dapo", "dr_grpo", "gspo", "cispo"])
def test_micro_batches_do_not_change_the_gradient(tmp_path, loss):
    """One step of plain SGD would show any difference; Adam with eps large is as good."""
    gradients = []
    for size in (16, 3, 1):
        config = run_config(tmp_path / str(size), update={"micro_batch_completions": size, "loss": loss})
        trainer = Trainer(config, Reporter(enabled=False))
        gradients.append(step_gradients(trainer))
    scale = max(g.abs().max().item() for g in gradients[0].values())
    assert scale > 0
    for other in gradients[1:]:
        assert difference(gradients[0], other) < 1e-5 * scale


def step_gradients(trainer):
    """Gradients of the first optimiser step, before clipping and the update."""
    captured = {}

    def capture():
        captured.update({n: p.grad.clone() for n, p in trainer.policy.model.named_parameters() if p.grad is not None})
        return 0.0

    trainer.updater.optimiser_step = capture
    from mm_agrae.rewards import Rewarder

    with Rewarder(trainer.config.reward, trainer.config.rollout.max_new_tokens) as rewarder:
        trainer.collector.rewarder = rewarder
        trainer.step()
    return captured


@pytest.mark.parametrize("loss", ["grpo", "dapo", "dr_grpo"])
def test_truncated_completions_left_out_as_trl_masks_them(tmp_path, loss):
    """TRL sets their mask to 0: no loss from them, and no token of theirs in a denominator. KL and entropy go too."""
    update = {"loss": loss, "entropy_coef": 0.01, "kl_coef": 0.05, "mini_batch_prompts": 2}
    ours = Trainer(run_config(tmp_path / "a", TEXT, update=update | {"mask_truncated": True}), Reporter(False))
    theirs = Trainer(run_config(tmp_path / "b", TEXT, update=update), Reporter(False))
    run, eos, cut_off = theirs.updater.run, torch.tensor(sorted(processing(TEXT).eos_ids)), []

    def masked(plan, note):
        for index, mini in enumerate(plan):
            for batch in mini.batches:
                last_B = batch.token_BT[torch.arange(len(batch.length_B)), batch.length_B - 1]
                batch.mask_BT[~torch.isin(last_B, eos)] = 0
                cut_off.extend((~torch.isin(last_B, eos)).tolist())
            tokens = int(sum(batch.mask_BT.sum() for batch in mini.batches))
            plan[index] = replace(mini, denominator=replace(mini.denominator, tokens=tokens))
        return run(plan, note)

    theirs.updater.run = masked
    a, b = step_gradients(ours), step_gradients(theirs)
    assert 0 < sum(cut_off) < len(cut_off) == 16
    scale = max(g.abs().max().item() for g in b.values())
    assert scale > 0
    assert difference(a, b) < 1e-5 * scale


def test_with_everything_cut_off_and_left_out_nothing_changes(tmp_path):
    update = {"mask_truncated": True, "kl_coef": 0.1, "loss": "dapo"}
    trainer = Trainer(
        run_config(tmp_path / "run", TEXT, rollout={"max_new_tokens": 2}, update=update), Reporter(False)
    )
    assert all(not gradient.any() for gradient in step_gradients(trainer).values())


def test_skipping_groups_without_signal_keeps_the_gradient(tmp_path):
    """An entropy coefficient too small to matter keeps every row in the update."""
    skipping = Trainer(run_config(tmp_path / "a"), Reporter(enabled=False))
    keeping = Trainer(run_config(tmp_path / "b", update={"entropy_coef": 1e-30}), Reporter(enabled=False))
    a, b = step_gradients(skipping), step_gradients(keeping)
    scale = max(g.abs().max().item() for g in a.values())
    assert difference(a, b) < 1e-5 * scale


def test_a_step_without_any_signal(tmp_path):
    """All rewards equal: gradient 0, no NaN, and the run goes on."""
    trainer, _ = train(tmp_path / "run", reward={"parts": {"accuracy": 0.0}})
    rows = RunFolder(tmp_path / "run").read_metrics()
    assert [row["groups/no_signal"] for row in rows] == [1.0, 1.0]
    assert [row["update/grad_norm"] for row in rows] == [0.0, 0.0]
    assert trainer.policy.version == 2


@pytest.mark.parametrize(
    "sections",
    [
        {"update": {"mini_batch_prompts": 2, "epochs": 2, "micro_batch_completions": 3}},
        {"update": {"kl_coef": 0.05}},
        {"update": {"kl_coef": 0.05}, "model": LORA},
        {"update": {"entropy_coef": 0.01, "schedule": "cosine", "warmup_steps": 1}},
        {"model": {"dtype": "bfloat16"}},
        {"model": {**LORA, "dtype": "bfloat16", "gradient_checkpointing": True}},
        {"model": {"freeze": ["vision"]}},
        {"rollout": {"dynamic_sampling": {"max_draws": 2}}},
        {"reward": {"parts": {"accuracy": 0.9, "format": 0.1}, "overlong": {"buffer_tokens": 8}}},
        {"advantage": {"rule": "agrae", "base": "dr_grpo"}, "update": {"loss": "dr_grpo"}},
        {"log": {"sinks": ["tensorboard"]}},
    ],
    ids=[
        "mini-batches",
        "kl",
        "kl-lora",
        "entropy",
        "bf16",
        "lora-bf16",
        "frozen-vision",
        "dynamic-sampling",
        "format-overlong",
        "dr_grpo",
        "tensorboard",
    ],
)
def test_settings_run(tmp_path, sections):
    trainer, _ = train(tmp_path / "run", evaluate={"before": False, "after": False}, **sections)
    rows = RunFolder(tmp_path / "run").read_metrics()
    assert len(rows) == 2
    assert all(value is not None for row in rows for value in row.values())
    if "kl_coef" in sections.get("update", {}):
        assert rows[0]["policy/kl_reference"] == pytest.approx(0, abs=1e-6)
        assert rows[1]["policy/kl_reference"] > 0
    if "mini_batch_prompts" in sections.get("update", {}):
        assert trainer.policy.version == 8
        assert rows[0]["policy/ratio_max"] > 1
    else:
        assert rows[0]["policy/ratio_max"] == pytest.approx(1, abs=1e-6)
    if "freeze" in sections.get("model", {}):
        from transformers import AutoModelForImageTextToText

        start = AutoModelForImageTextToText.from_pretrained(VL, dtype=torch.float32)
        for name, parameter in start.model.visual.named_parameters():
            assert torch.equal(parameter, trainer.policy.backbone.visual.get_parameter(name))


def test_dynamic_sampling_replaces_groups_without_signal(tmp_path):
    sections = {"evaluate": {"before": False, "after": False}, "train": {"steps": 3}}
    train(tmp_path / "a", rollout={"dynamic_sampling": {"max_draws": 4}}, **sections)
    train(tmp_path / "b", **sections)
    drawn, plain = (RunFolder(tmp_path / name) for name in "ab")
    draws = {r["resample_round"] for step in (1, 2, 3) for r in drawn.read_rollouts(step)}
    assert max(draws) > 0
    mixed = [sum(row["groups/mixed"] for row in run.read_metrics()) for run in (drawn, plain)]
    assert mixed[0] > mixed[1]


def write_rows(path, rows):
    path.write_text("\n".join(json.dumps(row) if isinstance(row, dict) else row for row in rows))
    return str(path)


def test_a_bad_row_stops_the_run_or_is_skipped(tmp_path):
    good = [{"id": i, "problem": f"{i}+1?", "answer": str(i + 1)} for i in range(6)]
    long = {"id": 9, "problem": "x" * 9000, "answer": "1"}
    source = {"task": "files", "path": write_rows(tmp_path / "d.jsonl", [*good, long])}
    data = {"train": [source], "evaluate": [], "on_bad_row": "error"}
    sections = {"evaluate": {"before": False, "after": False}, "train": {"steps": 4}}
    with pytest.raises(DataError, match=r"d\.jsonl.*7.*more than prompt\.max_tokens"):
        train(tmp_path / "a", TEXT, data=data, **sections)
    steps = len(RunFolder(tmp_path / "a").read_metrics())
    assert (tmp_path / "a" / "checkpoints").exists() == (steps > 0)
    train(tmp_path / "b", TEXT, data=data | {"on_bad_row": "skip"}, **sections)
    assert RunFolder(tmp_path / "b").read_metrics()[-1]["data/rows_skipped"] >= 1


def test_only_bad_rows_is_an_error(tmp_path):
    rows = [{"id": i, "problem": "x" * 9000, "answer": "1"} for i in range(3)]
    source = {"task": "files", "path": write_rows(tmp_path / "d.jsonl", rows)}
    data = {"train": [source], "evaluate": [], "on_bad_row": "skip"}
    with pytest.raises(DataError, match="no usable row"):
        train(tmp_path / "run", TEXT, data=data, evaluate={"before": False, "after": False})


def test_a_reward_function_that_raises_is_counted_and_named(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def reward(example, completion):\n"
        "    if sum(completion.token_ids) % 2:\n"
        "        raise ValueError('odd')\n"
        "    return 1.0\n"
    )
    part = f"{tmp_path / 'mine.py'}:reward"
    reward = {"parts": {"accuracy": 1.0, part: 0.5}, "max_failed": 0.99}
    train(tmp_path / "run", reward=reward, evaluate={"before": False, "after": False})
    run = RunFolder(tmp_path / "run")
    records = [r for step in (1, 2) for r in run.read_rollouts(step)]
    raised = [r for r in records if r["error"]]
    assert 0 < len(raised) < len(records)
    assert all("ValueError" in r["error"] and "reward" in r["error"] for r in raised)
    assert all(r["success"] == (r["parts"]["accuracy"] == 1) for r in raised)
    assert sum(row["reward/errors"] for row in run.read_metrics()) == len(raised)


def test_a_run_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunFolderError, match="file"):
        train(tmp_path / "file" / "run")


@pytest.mark.parametrize(
    ("model", "update", "expected"),
    [
        ({}, {}, 2),  # once in the rollout, once in the update
        ({}, {"micro_batch_completions": 2}, 2),
        ({"freeze": ["vision"]}, {"kl_coef": 0.1, "mini_batch_prompts": 2, "epochs": 2}, 1),
        (LORA, {"kl_coef": 0.1, "micro_batch_completions": 2}, 1),
    ],
    ids=["trained", "trained-cut", "frozen", "lora"],
)
def test_images_encoded_in_a_step(tmp_path, model, update, expected):
    """An image goes through the vision tower once for all G completions and all passes."""
    # A rule that leaves no group out, so that every image is needed in the update.
    config = run_config(tmp_path / "run", model=model, update=update, advantage={"rule": "w_reinforce"})
    trainer = Trainer(config, Reporter(enabled=False))
    # The checks at the start of a run encode a few images more.
    trainer.updater._sharing_checked = trainer.collector._mismatch_checked = True
    encoded = []
    trainer.policy.backbone.visual.register_forward_hook(
        lambda module, arguments, options, output: encoded.append(len(options["grid_thw"])), with_kwargs=True
    )
    step_gradients(trainer)
    assert sum(encoded) == expected * config.rollout.prompts_per_step


def test_a_shared_prompt_that_computes_something_else_is_found_out(tmp_path, monkeypatch):
    from mm_agrae.model import shared_prompt

    config = run_config(tmp_path / "run", TEXT, advantage={"rule": "w_reinforce"}, evaluate={"before": False})
    trainer = Trainer(config, Reporter(enabled=False))
    right = shared_prompt.hidden_states
    monkeypatch.setattr(shared_prompt, "hidden_states", lambda *a, **k: right(*a, **k) * 1.02)
    with pytest.raises(ModelError, match=r"update\.shared_prompt=off"):
        trainer.train()


def test_a_gradient_that_is_not_finite_is_left_out(tmp_path):
    config = run_config(
        tmp_path / "run", train={"steps": 9}, update={"max_bad_gradients": 2},
        evaluate={"before": False, "after": False},
    )  # fmt: skip
    trainer = Trainer(config, Reporter(enabled=False))
    start = weights(trainer)
    embeddings = trainer.policy.hf.get_input_embeddings()
    embeddings.weight.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(ModelError, match="not finite 3 times in a row"):
        trainer.train()
    assert difference(start, weights(trainer)) == 0
    rows = RunFolder(tmp_path / "run").read_metrics()
    assert [row["update/bad_gradients"] for row in rows] == [1.0, 2.0]
    assert trainer.newest_checkpoint().name == "step_000002"


def test_data_order_visits_every_row_once_an_epoch():
    order = DataOrder(10, seed=3, shuffle=True)
    epochs = [[order.next() for _ in range(10)] for _ in range(3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    later = DataOrder(10, seed=3, shuffle=True)
    later.position = 14
    assert later.next() == epochs[1][4]
    assert [DataOrder(3, 0, shuffle=False).next() for _ in range(1)] == [0]


@pytest.mark.parametrize("on_bad_row", ["skip", "error"])
def test_a_row_that_the_engine_refuses(tmp_path, on_bad_row):
    """No completions, as from a server: another row takes its place, or the run ends."""
    config = run_config(tmp_path / "run", TEXT, data={"on_bad_row": on_bad_row}, evaluate={"before": False})
    trainer = Trainer(config, Reporter(enabled=False))
    trainer.collector._mismatch_checked = True
    sample, refused = trainer.engine.generate, []

    def refusing(prompts, *arguments, **options):
        groups = sample(prompts, *arguments, **options)
        if len(refused) < 2 and len(groups) > len(refused):
            refused.append(prompts[0].example.id)
            groups[0] = []
        return groups

    trainer.engine.generate = refusing
    if on_bad_row == "error":
        with pytest.raises(DataError, match="the rollout server refused this row"):
            trainer.train()
        return
    summary = trainer.train()
    assert len(refused) == 2
    assert summary["rows_skipped"] == 2
    rows = RunFolder(config.run_dir).read_rollouts(1)
    assert len(rows) == 16
    assert not set(refused) & {row["example_id"] for row in rows if row["step"] == 1}


def test_deterministic_algorithms_alone_if_asked_for(tmp_path, monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    any_order = torch.zeros(1), torch.tensor([0, 0]), torch.ones(2)
    try:
        train(tmp_path / "run", TEXT, train={"steps": 1, "deterministic": True})
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        with pytest.raises(RuntimeError, match="does not have a deterministic implementation"):
            any_order[0].put_(*any_order[1:])
    finally:
        torch.use_deterministic_algorithms(False)
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
    any_order[0].put_(*any_order[1:])
