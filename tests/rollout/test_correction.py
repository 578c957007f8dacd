"""Guided correction: what becomes of an incorrect completion, and that nothing else changes."""

import json
import math
from dataclasses import replace

import pytest
import torch
from helpers import TEXT, VL, processing, run_config

from mm_agrae import advantage
from mm_agrae.batching import StepTable, UpdateRow, micro_batch, plan_update
from mm_agrae.errors import ConfigError
from mm_agrae.loss import sampler_weight
from mm_agrae.progress import Reporter
from mm_agrae.rewards import Rewarder
from mm_agrae.rollout.collector import Collector
from mm_agrae.run.folder import RunFolder
from mm_agrae.step import step_metrics
from mm_agrae.trainer import Trainer
from mm_agrae.view.report import write_report

CORRECT = {
    "reflect_cue": " So, ",
    "answer_cue": " so {boxed}",
    "solution_text": "<think>{solution}</think> {boxed}",
    "reflect_tokens": 12,
}
SHORT = {"prompts_per_step": 8, "completions_per_prompt": 4, "max_new_tokens": 80}
NO_EVALUATION = {"before": False, "after": False}


def made_trainer(run_dir, path=TEXT, correct=None, rollout=None, **sections):
    rollout = SHORT | (rollout or {}) | ({} if correct is None else {"correct": CORRECT | correct})
    config = run_config(run_dir, path, rollout=rollout, **{"evaluate": NO_EVALUATION} | sections)
    return Trainer(config, Reporter(enabled=False))


def groups_of(trainer):
    """The groups of the first step."""
    with Rewarder(trainer.config.reward, trainer.config.rollout.max_new_tokens) as rewarder:
        trainer.collector.rewarder = rewarder
        return trainer.collector.collect(0, last=True)


def trained(*arguments, **sections):
    trainer = made_trainer(*arguments, **sections)
    trainer.train()
    return trainer


def rows_config(tmp_path, rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"data": {"train": [{"task": "files", "path": str(path)}], "evaluate": [], "shuffle": False}}


@pytest.mark.parametrize("path", [VL, TEXT], ids=["vl", "text"])
def test_what_becomes_of_each_completion(tmp_path, path):
    plain = groups_of(made_trainer(tmp_path / "plain", path))
    trainer = made_trainer(tmp_path / "corrected", path, {})
    made, limit = processing(path), trainer.config.rollout.max_new_tokens
    branches = set()
    groups = groups_of(trainer)
    for before, after in zip(plain, groups, strict=True):
        assert {i for i, score in enumerate(before.scores) if not score.success} == after.corrections.keys()
        summary = after.summary()
        assert summary.success_before == before.summary().success == before.summary().success_before
        assert summary.rewards_before == before.summary().rewards
        for index, (old, new) in enumerate(zip(before.completions, after.completions, strict=True)):
            if index not in after.corrections:
                assert (old, before.scores[index]) == (new, after.scores[index])
                continue
            correction = after.corrections[index]
            assert (correction.score, correction.text) == (before.scores[index], old.text)
            if old.finish_reason == "length" and correction.drawn != "solution":
                continue  # no token is left
            assert correction.branch == correction.drawn
            branches.add(correction.branch)
            inserted = [math.isnan(logprob) for logprob in new.logprobs]
            kept = old.token_ids[:-1] if old.finish_reason == "stop" else old.token_ids
            kept = () if correction.branch == "solution" else kept
            assert new.token_ids[: len(kept)] == kept
            assert new.logprobs[: len(kept)] == old.logprobs[: len(kept)]
            assert inserted.index(True) == len(kept)
            end = len(inserted) - inserted[::-1].index(True)
            assert all(inserted[len(kept) : end])
            assert len(inserted) == len(new.token_ids) <= limit
            assert new.text == made.decode(new.token_ids)
            text = new.text[slice(*correction.forced)]
            if correction.branch == "reflect":
                assert (text, end - len(kept)) == (" So, ", len(made.encode(" So, ")))
                assert 1 <= len(inserted) - end <= 12
            else:
                assert end == len(inserted)
                assert after.scores[index].success
                assert new.token_ids[-1] == made.end_id
                assert new.finish_reason == "stop"
                boxed = rf"\boxed{{{after.prompt.example.answer}}}"
                ways = [f"<think>{way}</think> {boxed}" for way in after.prompt.example.meta["ways"]]
                assert text in (ways if correction.branch == "solution" else [f" so {boxed}"])
    assert branches == {"reflect", "answer", "solution"}
    # What follows a cue was sampled from the policy, given all that stands before it, images included.
    rows = [UpdateRow(p, each, 1.0) for p, group in enumerate(groups) for each in group.completions]
    batch = micro_batch([group.prompt for group in groups], rows, torch.device("cpu"))
    with torch.no_grad():
        logp_BT = trainer.policy.eval()(batch)[0]
    gap_BT = (logp_BT - batch.sampling_logp_BT)[(batch.mask_BT > 0) & ~batch.sampling_logp_BT.isnan()]
    assert gap_BT.abs().max() < 1e-4


def test_what_does_not_fit_is_left_and_counted(tmp_path):
    rollout = {"max_new_tokens": 34}
    plain = groups_of(made_trainer(tmp_path / "plain", rollout=rollout))
    groups = groups_of(made_trainer(tmp_path / "run", correct={"reflect_tokens": 999}, rollout=rollout))
    cut = skipped = 0
    for before, after in zip(plain, groups, strict=True):
        for index, correction in after.corrections.items():
            old, new = before.completions[index], after.completions[index]
            cut_off = old.finish_reason == "length" and correction.drawn != "solution"
            if not correction.branch:
                assert (new, after.scores[index]) == (old, before.scores[index])
            assert not (cut_off and correction.branch)  # no token is left for it
            assert len(new.token_ids) <= 34
            cut += correction.branch == "reflect" and new.finish_reason == "length"
            skipped += not correction.branch
    assert cut
    assert skipped == sum(group.summary().corrected["skipped"] for group in groups) > 0


def test_solutions_of_rows(tmp_path):
    """A column `solution`; one that is only the answer is none. A box and the thinking's end are added."""
    solutions = ["Add: 900 + 8 = 908.", "<think>Add: 900 + 8 = 908.", r"It is \boxed{908}.", "908", None]
    rows = [{"question": "What is 900 + 8?", "answer": "908", "solution": text} for text in solutions]
    rows.append({"question": "What is 900 + 8?", "answer": "908", "solution": "Add. <|im_end|>"})
    correct = {"reflect": 0, "answer": 0, "solution": 1.0, "solution_text": "{solution}"}
    rollout = {"prompts_per_step": len(rows)}
    groups = groups_of(made_trainer(tmp_path / "run", TEXT, correct, rollout, **rows_config(tmp_path, rows)))
    added = r" so \boxed{908}"
    texts = [solutions[0] + added, f"{solutions[1]}\n</think>{added}", solutions[2], added, added]
    for text, group in zip(texts, groups, strict=False):
        fitting = {i: each for i, each in group.corrections.items() if each.branch or text != added}
        assert fitting
        for index, correction in fitting.items():
            assert (correction.drawn, correction.branch) == ("solution", "answer" if text == added else "solution")
            assert group.completions[index].text[slice(*correction.forced)].removeprefix("\n</think>") == text
        assert group.summary().corrected["no_solution"] == len(fitting) * (text == added)
    # A text with a control token cannot stand in a completion.
    assert {correction.branch for correction in groups[5].corrections.values()} == {""}


def test_an_answer_that_the_checker_refuses_is_not_inserted(tmp_path):
    grader = tmp_path / "grader.py"
    grader.write_text("def never(example, text, **settings): return 0.0\n")
    rows = rows_config(tmp_path, [{"question": "1 + 1?", "answer": "2"}])
    rows["data"]["check"] = "off"
    rows["data"]["train"][0]["grading"] = {"grader": f"{grader}:never"}
    correct = {"reflect": 0, "answer": 1.0, "solution": 0}
    groups = groups_of(made_trainer(tmp_path / "run", TEXT, correct, **rows))
    assert all(len(group.corrections) == 4 for group in groups)
    assert not any(math.isnan(x) for group in groups for each in group.completions for x in each.logprobs)


def test_a_completion_whose_reward_failed_is_not_corrected(tmp_path):
    broken = tmp_path / "broken.py"
    broken.write_text(
        "def fails(example, completion):\n    if len(completion.token_ids) % 2: raise ValueError\n    return 0.0\n"
    )
    reward = {"parts": {f"{broken}:fails": 1.0}, "success": f"{broken}:fails", "max_failed": 0.99}
    groups = groups_of(made_trainer(tmp_path / "run", TEXT, {}, reward=reward))
    failed = {
        (g.position, i) for g in groups for i, score in enumerate(g.scores) if score.error and i not in g.corrections
    }
    assert failed
    for group in groups:
        assert not any(correction.score.error for correction in group.corrections.values())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reflect": 0.9}, r"add up to 1\.4"),
        ({"reflect": 0, "answer": 0, "solution": 0}, "add up to 0"),
        ({"reflect_cue": " "}, "reflect_cue lacks words"),
        ({"answer_cue": "So"}, r"answer_cue lacks \{answer\} or \{boxed\}"),
        ({"solution_text": "See"}, r"solution_text lacks \{solution\}"),
        ({"reflect_tokens": 0}, "reflect_tokens"),
        ({"train_on": "some"}, "train_on"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        run_config("run", rollout={"correct": CORRECT | settings})


def test_overlap_and_control_tokens_are_refused(tmp_path):
    servers = {"engine": "vllm_server", "vllm": {"servers": ["http://127.0.0.1:1"]}, "overlap": True}
    with pytest.raises(ConfigError, match=r"rollout\.overlap and rollout\.correct exclude each other"):
        run_config("run", rollout=servers | {"correct": {}})
    with pytest.raises(ConfigError, match=r"reflect_cue holds a control token"):
        made_trainer(tmp_path / "run", correct={"reflect_cue": "No.<|im_end|>"})


def test_rates_are_those_of_the_completions_as_sampled():
    reward, success = [[1.0, 1.0, 0.0, 0.0], [1.0, 1.0, 1.0, 0.0]], [[1, 1, 0, 0], [1, 1, 1, 0]]
    before = ([[1.0, 0.0, 0.0, 0.0], [0.0] * 4], [[1, 0, 0, 0], [0] * 4])
    found = advantage.levels("agrae", reward, success, before_PG=before)
    omega, p = 1 / 8, 1 / 4
    assert found.omega == omega
    assert found.rate_P.tolist() == [p, 0.0]
    z = 0.5 / (0.5 + 1e-6)
    hard = z * (omega / 2 / p**0.5 + (1 - omega) / 2 / (1 - p) ** 0.5)
    # The second group had no correct one: no difficulty to weigh by, but a spread to learn from.
    assert found.sample_PG[0].tolist() == pytest.approx([hard, hard, -hard, -hard])
    assert found.sample_PG[1].tolist() == found.base_PG[1].tolist()
    assert found.base_PG[1].abs().min() > 0
    assert found.advantage_PG[0].tolist() == pytest.approx([hard * omega] * 2 + [-hard] * 2)
    # Rules that take the success for the reward take that of the completion at hand.
    assert advantage.levels("psr", reward, success, before_PG=before).advantage_PG.tolist() == success
    with pytest.raises(ValueError, match="before_PG has shape"):
        advantage.levels("grpo", reward, success, before_PG=([[1.0, 0.0]], None))


@pytest.mark.parametrize("train_on", ["all", "added"])
def test_what_is_learnt(tmp_path, train_on):
    trainer = made_trainer(tmp_path / "run", correct={"train_on": train_on})
    groups = groups_of(trainer)
    table = StepTable.of([group.summary() for group in groups])
    levels = table.advantages(trainer.config)
    config, device = trainer.config, torch.device("cpu")
    (mini,) = plan_update(groups, table, levels.advantage_PG, config, rank=0, world=1, device=device)
    learnt = {"": 0, "reflect": 0, "answer": 0, "solution": 0}
    for group in groups:
        for index, completion in enumerate(group.completions):
            branch = group.corrections[index].branch if index in group.corrections else ""
            tokens = len(completion.token_ids)
            if branch and train_on == "added":
                tokens -= max(i for i, logprob in enumerate(completion.logprobs) if math.isnan(logprob)) + 1
            learnt[branch] += tokens * bool(levels.advantage_PG[group.position, index])
            assert table.learning_PG[group.position, index] == tokens
    assert sum(batch.mask_BT.sum().item() for batch in mini.batches) == sum(learnt.values())
    assert mini.denominator.tokens == table.learning_PG.sum()
    assert mini.denominator.completions == 32
    assert bool(learnt["answer"]) == bool(learnt["solution"]) == (train_on == "all")
    assert learnt["reflect"]
    assert all((batch.mask_BT.sum(-1) > 0).all() for batch in mini.batches)
    # Both ways of the update leave the same tokens out.
    trainer.policy.check_sharing(mini.batches[0])


def test_entropies_of_corrected_completions(tmp_path):
    """Sampled ones are of the sampled tokens, exact ones of all, whether they are in the loss or not."""
    update = {"mask_truncated": True, "micro_batch_completions": 3}
    correct = {"train_on": "added", "reflect": 0.3, "answer": 0.3, "solution": 0.4}
    trainer = made_trainer(tmp_path / "run", TEXT, correct, advantage={"rule": "edge"}, update=update)
    groups = groups_of(trainer)
    table = StepTable.of([group.summary() for group in groups])
    levels = table.advantages(trainer.config)
    exact_PG = trainer.updater.exact_entropy(groups, table).entropy_PG
    seen, every = set(), []
    for group in groups:
        means = []
        for index, completion in enumerate(group.completions):
            seen |= {completion.finish_reason, group.corrections[index].branch if index in group.corrections else ""}
            row = UpdateRow(0, replace(completion, learns_from=0), 1.0)
            with torch.no_grad():
                whole = trainer.policy(micro_batch([group.prompt], [row], torch.device("cpu")))[1].mean()
            assert float(exact_PG[group.position, index]) == pytest.approx(float(whole), rel=1e-4)
            if sampled := completion.sampled_logprobs:
                means.append(-sum(sampled) / len(sampled))
                assert float(table.entropy_PG[group.position, index]) == pytest.approx(means[-1])
                every += sampled
        relative_G = (levels.sample_PG / levels.advantage_PG)[group.position]
        for index, completion in enumerate(group.completions):
            if not completion.sampled_logprobs:
                assert float(table.entropy_PG[group.position, index]) == pytest.approx(sum(means) / max(1, len(means)))
                assert levels.sample_PG[group.position, index] == 0 or float(relative_G[index]) == pytest.approx(1)
    assert seen == {"stop", "length", "", "reflect", "answer", "solution"}
    assert step_metrics(table, levels)["policy/entropy"] == pytest.approx(-sum(every) / len(every))


def test_parts_of_rewards_are_those_after_the_correction(tmp_path):
    reward = {"parts": {"accuracy": 0.9, "format": 0.1}}
    gdpo = {"rule": "grpo", "normalise_parts": True}
    trainer = made_trainer(tmp_path / "run", TEXT, {}, advantage=gdpo, reward=reward)
    groups = groups_of(trainer)
    table = StepTable.of([group.summary() for group in groups])
    assert any(summary.parts != summary.parts_before for summary in table.groups)
    given = {"part_FPG": [[[s.parts[name] for s in group.scores] for group in groups] for name in reward["parts"]]}
    given |= {"weight_F": [0.9, 0.1], "normalise_parts": True}
    expected = advantage.compute("grpo", table.reward_PG, None, **given)
    torch.testing.assert_close(table.advantages(trainer.config).advantage_PG, expected)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_inserted_tokens_have_weight_1(level):
    sampling = torch.tensor([[-1.0, math.nan, -2.0], [math.nan, math.nan, 0.0]])
    old, mask = torch.tensor([[-0.9, -5.0, -2.3], [-3.0, -4.0, 0.0]]), torch.tensor([[1.0, 1, 1], [1, 1, 0]])
    found = sampler_weight(old, sampling, mask, level=level)
    ratio = [math.exp(0.1), 1.0, math.exp(-0.3)] if level == "token" else [math.exp(-0.2)] * 3
    assert found.weight_BT[0].tolist() == pytest.approx(ratio)
    assert found.weight_BT[1, :2].tolist() == [1.0, 1.0]
    assert found.sums["mismatch_abs"].item() == pytest.approx(0.4)
    assert all(value.isfinite() for value in found.sums.values())


def test_a_run_records_what_was_corrected(tmp_path):
    """With everything that could trip over a log-probability that is not there."""
    evaluate = {"before": True, "after": False, "samples": 2, "max_new_tokens": 64}
    sections = {
        "evaluate": evaluate,
        "advantage": {"rule": "edge", "base": "agrae"},
        "reward": {"parts": {"accuracy": 0.9, "format": 0.1}},
        "rollout": {"mismatch": {"correction": "token"}},
        "update": {"mini_batch_prompts": 4, "kl_coef": 0.01, "entropy_coef": 0.001, "learning_rate": 1e-4},
    }
    trainer = trained(tmp_path / "run", TEXT, {}, **sections)
    run = RunFolder(tmp_path / "run")
    for row in run.read_metrics():
        records = run.read_rollouts(row["step"])
        assert all(value is not None and math.isfinite(value) for value in row.values())
        assert row["success/mean"] == pytest.approx(sum(r["success_before"] for r in records) / 32)
        assert row["advantage/omega"] == pytest.approx(row["reward/mean"])
        assert row["correction/reward"] == pytest.approx(sum(r["reward"] for r in records) / 32)
        assert row["correction/reward"] > row["reward/mean"]
        assert row["mismatch/weight"] == pytest.approx(1, abs=1e-3)
        for branch in ("reflect", "answer", "solution"):
            assert row[f"correction/{branch}"] == sum(r["correction"].get("branch") == branch for r in records) / 32
        right = sum(r["success"] and not r["success_before"] for r in records)
        assert row["correction/right"] == right / 32 > 0
    assert trainer.policy.version == 4
    (result,) = run.read_evaluations()
    assert not any(" So, " in sample["completion"] for sample in run.read_samples(result))
    page = write_report(tmp_path / "run").read_text()
    assert "corrected: answer" in page
    assert '<mark title="not sampled">' in page


def test_off_by_default(tmp_path):
    trainer = trained(tmp_path / "run", train={"steps": 1})
    assert trainer.collector._corrector is None
    assert not any(name.startswith("correction/") for name in trainer.run.read_metrics()[0])


class Killed(BaseException):
    @classmethod
    def during(cls, *arguments):
        raise cls


def records(run_dir):
    run = RunFolder(run_dir)
    return [run.read_rollouts(step) for step in run.rollout_steps()]


@pytest.mark.parametrize("train_on", ["all", "added"])
def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path, train_on):
    sections = {"train": {"steps": 3}, "checkpoint": {"every": 1, "keep": 3}}
    whole = trained(tmp_path / "whole", TEXT, {"train_on": train_on}, **sections)
    cut = made_trainer(tmp_path / "cut", TEXT, {"train_on": train_on}, **sections)
    update = cut.updater.run
    cut.updater.run = lambda *arguments: Killed.during() if cut.steps_done == 1 else update(*arguments)
    with pytest.raises(Killed):
        cut.train()
    resumed = made_trainer(tmp_path / "cut", TEXT, {"train_on": train_on}, **sections)
    assert resumed.steps_done == 1
    resumed.collector.collect = counted(resumed.collector.collect)
    resumed.train()
    assert resumed.collector.collect.steps == [2]  # those of step 1 are in the cache
    pairs = zip(whole.policy.model.parameters(), resumed.policy.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert records(tmp_path / "whole") == records(tmp_path / "cut")
    assert any(row["correction"].get("branch") for step in records(tmp_path / "cut") for row in step)


def counted(collect):
    def counting(step, last):
        counting.steps.append(step)
        return collect(step, last)

    counting.steps = []
    return counting


def test_dynamic_sampling_judges_what_was_sampled(tmp_path, monkeypatch):
    """A group that only correction gives a spread is drawn again all the same."""
    judged = []
    judge = Collector._without_advantage

    def noting(self, groups):
        groups = list(groups)
        judged.extend(group.corrections for group in groups)
        return judge(self, groups)

    monkeypatch.setattr(Collector, "_without_advantage", noting)
    trainer = made_trainer(tmp_path / "run", TEXT, {}, {"dynamic_sampling": {"max_draws": 2}})
    groups = groups_of(trainer)
    assert judged
    assert set(judged) == {None}
    assert all(group.corrections is not None for group in groups)
    assert max(group.resample_round for group in groups) > 0
