"""AGRAEGRPOTrainer on TRL's real trainer: the advantages it used, and the table it wrote."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from helpers import ROOT, TEXT, VL, examples

if find_spec("trl") is None:
    pytest.skip("trl is not installed (pip install mm-agrae[trl])", allow_module_level=True)

import pandas as pd
from datasets import Dataset
from trl import GRPOConfig

from mm_agrae.adapters.trl import AGRAEGRPOTrainer
from mm_agrae.advantage import compute, levels

G = 4
MIXED = {"success_from": "correct", "settings": {"alpha": 0.5}}


def correct(completions, **columns):
    """Depends on the text alone, and differs within a group."""
    return [float(len(message[0]["content"]) % 2) for message in completions]


def tidy(completions, **columns):
    return [0.1 * (len(message[0]["content"]) % 3) for message in completions]


def no_reward_for(prompts_with, only_first=False):
    """`correct` with None for the completions of some prompts, or for the first of them."""

    def partly(prompts, completions, **columns):
        values, seen = [], set()
        for prompt, value in zip(prompts, correct(completions), strict=True):
            left_out = prompts_with in prompt[0]["content"]
            if only_first:
                left_out = left_out and prompt[0]["content"] not in seen
            seen.add(prompt[0]["content"])
            values.append(None if left_out else value)
        return values

    partly.__name__ = "correct"
    return partly


class Watched(AGRAEGRPOTrainer):
    """Records what goes from one stage of TRL to the next."""

    def __init__(self, *args, **kwargs):
        self.scored, self.in_loss = [], []
        super().__init__(*args, **kwargs)

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        self.scored.append({key: output[key] for key in ("completion_ids", "advantages")})
        return output

    def _compute_loss(self, model, inputs):
        self.in_loss.append({key: inputs[key] for key in ("completion_ids", "advantages")})
        return super()._compute_loss(model, inputs)


def dataset(path, count=8):
    rows = []
    for example in examples(path, count):
        row = {"prompt": [{"role": "user", "content": example.question}]}
        rows.append(row | ({"image": example.images[0]} if example.images else {}))
    return Dataset.from_list(rows)


def build(folder, path=TEXT, rewards=(correct, tidy), arguments=None, **settings):
    args = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 2,
        "num_generations": G,
        "max_completion_length": 12,
        "max_steps": 2,
        "learning_rate": 1e-3,
        "model_init_kwargs": {"dtype": "float32"},
        "gradient_checkpointing": False,
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "logging_steps": 1,
        "log_completions": True,
        "save_strategy": "no",
        "disable_tqdm": True,
        **(arguments or {}),
    }
    args = GRPOConfig(**args)
    data = dataset(path)
    return Watched(path, list(rewards), args=args, train_dataset=data, eval_dataset=data, **settings)


def table(folder, step):
    return pd.read_parquet(Path(folder) / "completions" / f"completions_{step:05d}.parquet")


def pairs(part):
    ids = [tuple(row) for row in part["completion_ids"].tolist()]
    return zip(ids, part["advantages"].tolist(), strict=True)


def expected(logged, rule="agrae", settings=None):
    """From the rewards in TRL's table, which are those of all processes, group by group."""
    total = torch.tensor((logged["correct"] + logged["tidy"]).to_numpy()).float().view(-1, G)
    success = torch.tensor(logged["correct"].to_numpy()).view(-1, G)
    return levels(rule, total, success, torch.full_like(total, 12), **(settings or {}))


@pytest.mark.parametrize(
    ("path", "arguments"),
    [
        (TEXT, {}),
        (TEXT, {"loss_type": "dr_grpo", "num_iterations": 2, "steps_per_generation": 4,
                "max_steps": 4}),
        (VL, {}),
    ],
    ids=["text", "several updates per generation", "images"],
)  # fmt: skip
def test_a_run_uses_and_logs_our_advantages(path, arguments, tmp_path):
    # So warm that hardly two completions are the same.
    trainer = build(tmp_path, path, arguments=arguments | {"temperature": 3.0}, **MIXED)
    trainer.train()
    generations = trainer.args.max_steps * 2 // (trainer.args.steps_per_generation * trainer.num_iterations)
    assert len(trainer.scored) == generations
    for number, scored in enumerate(trainer.scored, 1):
        logged = table(tmp_path, number * trainer.args.max_steps // generations)
        assert logged["correct"].nunique() == 2
        wanted = expected(logged, settings=MIXED["settings"])
        torch.testing.assert_close(scored["advantages"], wanted.advantage_PG.flatten())
        assert logged["advantage"].tolist() == pytest.approx(scored["advantages"].tolist())
        assert trainer.state.log_history[(number - 1) * (trainer.args.max_steps // generations)][
            "agrae/omega"
        ] == pytest.approx(wanted.omega)
    # TRL shuffles the completions before it cuts them into micro-batches.
    rows = [row for scored in trainer.scored for row in pairs(scored)]
    times = Counter(ids for ids, _ in rows)
    known = {ids: advantage for ids, advantage in rows if times[ids] == 1}
    assert len(known) > 8
    in_loss = [row for part in trainer.in_loss for row in pairs(part)]
    assert len(in_loss) == trainer.args.max_steps * 2 * 8
    assert {ids: advantage for ids, advantage in in_loss if ids in known} == known


def rewards(trainer, *columns):
    """What TRL would have gathered: one column for each reward function."""
    trainer.model.train()
    reward_BF = torch.tensor(columns, dtype=torch.float32).T
    lengths = torch.arange(1, len(reward_BF) + 1)
    return trainer._advantages(reward_BF, lengths).view(-1, G)


CORRECT = [1.0, 0, 0, 1, 0, 0, 0, 1]
TIDY = [0.1, 0.2, 0, 0, 0.1, 0, 0.2, 0]


@pytest.mark.parametrize("rule", ["grpo", "dr_grpo", "agrae", "w_reinforce", "grpo_lead", "nsr"])
def test_rules_get_reward_success_and_length(rule, tmp_path):
    needed = rule not in ("grpo", "dr_grpo")  # the others need to know what success is
    trainer = build(tmp_path, rule=rule, success_from="correct" if needed else None)
    total = (torch.tensor(CORRECT) + torch.tensor(TIDY)).view(-1, G)
    success, length = torch.tensor(CORRECT).view(-1, G), torch.arange(1, 9).view(-1, G)
    torch.testing.assert_close(rewards(trainer, CORRECT, TIDY), compute(rule, total, success, length))


def test_reward_weights_are_trls_and_the_only_function_tells_success(tmp_path):
    trainer = build(tmp_path, rewards=[correct], arguments={"reward_weights": [0.5]})
    total, success = 0.5 * torch.tensor(CORRECT).view(-1, G), torch.tensor(CORRECT).view(-1, G)
    torch.testing.assert_close(rewards(trainer, CORRECT), compute("agrae", total, success))
    trainer = build(tmp_path, rewards=[tidy], success_threshold=0.2)
    success = (torch.tensor(TIDY) > 0.15).view(-1, G)
    torch.testing.assert_close(rewards(trainer, TIDY), compute("agrae", torch.tensor(TIDY).view(-1, G), success))


NONE = float("nan")  # as TRL keeps it


def test_a_prompt_without_rewards_is_left_out(tmp_path):
    """Its advantages are 0, and ω is that of the others."""
    trainer = build(tmp_path, **MIXED)
    alone = rewards(trainer, CORRECT[:4], TIDY[:4])[0]
    for second in ([NONE] * 4, [NONE, 1, 1, 1]):
        tidy_too = [NONE if value != value else 0.1 for value in second]
        both = rewards(trainer, CORRECT[:4] + second, TIDY[:4] + tidy_too)
        torch.testing.assert_close(both, torch.stack([alone, torch.zeros(4)]))
    assert trainer._metrics["train"]["agrae/unscored_prompts"] == [0, 1, 1]
    assert rewards(trainer, [NONE] * 4, [NONE] * 4).tolist() == [[0, 0, 0, 0]]
    # One of several rewards may be missing, but not the one that tells success.
    no_tidy = rewards(trainer, CORRECT[:4], [NONE] * 4)
    settings = {"alpha": 0.5}
    wanted = compute("agrae", [CORRECT[:4]], [CORRECT[:4]], **settings)
    torch.testing.assert_close(no_tidy, wanted.float())
    assert rewards(trainer, [NONE] * 4, TIDY[:4]).tolist() == [[0, 0, 0, 0]]


def test_success_may_come_from_several_functions(tmp_path):
    """Tasks of different kinds in one data set, each with a reward function of its own."""
    trainer = build(tmp_path, success_from=["correct", "tidy"])
    first, second = [*CORRECT[:4], *[NONE] * 4], [*[NONE] * 4, 1, 0, 0, 0]
    total = torch.tensor([CORRECT[:4], [1.0, 0, 0, 0]])
    torch.testing.assert_close(rewards(trainer, first, second), compute("agrae", total, total))


def test_reward_functions_that_return_none_in_a_run(tmp_path):
    question = dataset(TEXT)[0]["prompt"][0]["content"]
    partly = no_reward_for(question, only_first=True)
    trainer = build(
        tmp_path, rewards=[partly], arguments={"max_steps": 1, "generation_batch_size": 32,
                                               "gradient_accumulation_steps": 4},
    )  # fmt: skip
    trainer.train()
    logged = table(tmp_path, 1)
    of_it = [prompt[0]["content"] == question for prompt in logged["prompt"]]
    assert sum(of_it) == G
    assert logged["correct"][of_it].isna().sum() == 1
    assert (logged["advantage"][of_it] == 0).all()
    others = torch.tensor(logged["correct"][[not it for it in of_it]].to_numpy()).view(-1, G)
    wanted = compute("agrae", others, others).flatten()
    got = logged["advantage"][[not it for it in of_it]].tolist()
    assert got == pytest.approx(wanted.tolist(), rel=1e-5)
    assert len(trainer.scored[0]["advantages"]) == 32


@pytest.mark.parametrize("group", [2, 1])
def test_evaluation(group, tmp_path):
    arguments = {"num_generations_eval": group, "per_device_eval_batch_size": 8}
    trainer = build(tmp_path, arguments=arguments, **MIXED)
    metrics = trainer.evaluate()
    assert ("eval_agrae/omega" in metrics) == (group > 1)
    assert len(trainer.scored) == group
    logged = table(tmp_path, 0)
    total = torch.tensor((logged["correct"] + logged["tidy"]).to_numpy()).float().view(-1, 8)
    success = torch.tensor(logged["correct"].to_numpy()).view(-1, 8)
    for part, scored in enumerate(trainer.scored):
        shape = (-1, group)
        wanted = torch.zeros(8)
        if group > 1:
            wanted = compute("agrae", total[part].view(shape), success[part].view(shape), alpha=0.5)
        torch.testing.assert_close(scored["advantages"], wanted.flatten())
        assert logged["advantage"][8 * part : 8 * part + 8].tolist() == pytest.approx(wanted.flatten().tolist())


REFUSED = {
    "rule": ({"rule": "agrea"}, "did you mean 'agrae'"),
    "setting": ({"settings": {"alfa": 1}}, "did you mean 'alpha'"),
    "range": ({"settings": {"alpha": 2}}, "alpha must be"),
    "no success": ({}, "success_from=.*correct, tidy"),
    "wrong name": ({"success_from": "accuracy"}, "'accuracy' is not the name.*correct, tidy"),
    "scale": (MIXED | {"arguments": {"scale_rewards": "none"}}, "scale_rewards='none'.*dr_grpo"),
    "batch": (MIXED | {"arguments": {"scale_rewards": "batch"}}, "scale_rewards='batch'"),
    "objectives": (MIXED | {"arguments": {"multi_objective_aggregation": "normalize_then_sum"}}, "normalize_then_sum"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_contradictions_are_refused_before_anything_runs(name, tmp_path):
    settings, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        build(tmp_path, **settings)


def test_warnings(tmp_path, caplog):
    trainer = build(tmp_path, arguments={"generation_batch_size": 8}, **MIXED)
    assert "ω is the mean reward of one part" in caplog.text
    for _ in range(2):
        rewards(trainer, [2 * value - 1 for value in CORRECT], [0.0] * 8)
    assert caplog.text.count("rewards of this step are in [-1, 1]") == 1


TWO_PROCESSES = """
import json, sys
from pathlib import Path
import conftest
from adapters.test_adapter_trl import MIXED, build

folder = Path(sys.argv[1])
arguments = {"per_device_train_batch_size": 3, "max_steps": 1}
trainer = build(folder, arguments=arguments, **MIXED)
trainer.train()
used = trainer.scored[0]["advantages"].tolist()
(folder / f"{trainer.accelerator.process_index}.json").write_text(json.dumps(used))
"""


@pytest.mark.slow
def test_two_processes_share_the_groups(tmp_path):
    """12 completions in groups of 4 on two processes: the second group lies on both."""
    script = tmp_path / "run.py"
    script.write_text(TWO_PROCESSES)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    done = subprocess.run(
        [sys.executable, *launch, str(script), str(tmp_path)],
        capture_output=True, text=True, timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    used = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert [len(part) for part in used] == [6, 6]
    logged = table(tmp_path, 1)
    wanted = expected(logged, settings=MIXED["settings"]).advantage_PG.flatten().tolist()
    assert used[0] + used[1] == pytest.approx(wanted, rel=1e-5)
    assert logged["advantage"].tolist() == pytest.approx(wanted, rel=1e-5)


def test_the_example_of_the_page_runs(tmp_path, monkeypatch):
    page = (ROOT / "docs" / "adapters.md").read_text()
    code = page.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(ROOT)
    names = {}
    exec(code.replace("runs/trl", str(tmp_path)), names)
    assert names["trainer"].state.log_history[0]["agrae/omega"] >= 0
    assert len(table(tmp_path, 3)) == 16
