"""The replay of a step: its weights are those of the loss, and what was not sampled is marked."""

import pytest
import torch
from run_folders import HOSTILE, rollouts

from mm_agrae.batching import StepTable, plan_update
from mm_agrae.config import Config, reading
from mm_agrae.loss import policy_loss
from mm_agrae.run.folder import RunFolder
from mm_agrae.step import rollout_records, step_metrics
from mm_agrae.types import Completion, Correction, Example, Group, Prompt, Score
from mm_agrae.view.page import number
from mm_agrae.view.replay import StepReplay
from mm_agrae.view.runs import RunReader

PATTERNS = ((1, 0, 0, 0), (1, 1, 1, 0), (0, 0, 0, 0), (1, 1, 0, 0))


def group(position):
    prompt = Prompt(Example(f"example {position}", "?", "1"), "?", torch.tensor([1, 2]))
    lengths = [3 + position, 5, 2, 8]  # the last is cut off
    completions = [
        Completion((5,) * n, (-0.5,) * n, "text", "length" if n == 8 else "stop", 0) for n in lengths
    ]  # fmt: skip
    scores = [Score(float(right), bool(right), {"accuracy": float(right)}) for right in PATTERNS[position]]
    return Group(position, prompt, completions, scores)


@pytest.mark.parametrize("mini", [None, 2])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("loss", ["grpo", "dapo", "dr_grpo"])
def test_weights_are_what_the_loss_gives_its_tokens(tmp_path, loss, masked, mini):
    update = {"loss": loss, "mask_truncated": masked, "mini_batch_prompts": mini}
    rollout = {"prompts_per_step": 4, "completions_per_prompt": 4, "max_new_tokens": 8}
    changes = {"update": update, "rollout": rollout, "advantage": {"rule": "agrae", "alpha": 0.5}}
    config = Config.load({"base": "quickstart"} | changes)
    groups = [group(position) for position in range(4)]
    table = StepTable.of(each.summary() for each in groups)
    levels = table.advantages(config)
    run = RunFolder(tmp_path).create(reading.dump(config), {})
    run.append_metrics({"step": 3} | step_metrics(table, levels))
    run.write_rollouts(3, rollout_records(3, groups, levels, lambda image: ""))
    expected = []
    plan = plan_update(groups, table, levels.advantage_PG, config, rank=0, world=1, device=torch.device("cpu"))
    for part in plan:
        for batch in part.batches:
            logp_BT = torch.zeros(batch.token_BT.shape, requires_grad=True)
            policy_loss(
                loss, logp_BT=logp_BT, advantage_B=batch.advantage_B, mask_BT=batch.mask_BT,
                denominator=part.denominator,
            ).loss.backward()  # fmt: skip
            expected += (-logp_BT.grad[:, 0]).tolist()
    reader = RunReader(tmp_path)
    reader.refresh()
    replay = StepReplay.of(reader, 3)
    rows = run.read_rollouts(3)
    weights = [weight for row in rows if (weight := replay.weight(row))]  # those of advantage 0 are not in the plan
    assert weights == pytest.approx([weight for weight in expected if weight], rel=1e-6)
    assert len(weights) == (9 if masked else 12)
    figure = replay.figure(rows[:4])
    assert f"rule agrae, α = 0.5 · ω = {number(levels.omega)}, the mean reward of step 3 · p = 1/4" in figure
    assert all(f"{row['advantage_sample_level'] + 0.0:+.2f}" in figure for row in rows[:4])
    assert f"{weights[0]:+.1e}" in figure
    assert "p = 1/4" in replay.figure(rows[:4], most=2)  # of the whole group, however many are drawn


def test_corrected_completions_and_variants_are_marked(tmp_path):
    config = "rollout: {correct: {train_on: TRAIN_ON}}\nupdate: {loss: LOSS}\n"
    made = vars(Correction("reflect", "reflect", Score(0.0, False, {}), "was", (2, 6))) | {"score": {"reward": 0.0}}
    # Which tokens of a corrected completion were learnt is not recorded, nor then how many of the whole step.
    for train_on, loss, weight, unknown in (
        ("all", "grpo", "+4.2e-02", 0),
        ("added", "grpo", "–", 1),
        ("added", "dapo", "–", 2),
    ):
        text = config.replace("TRAIN_ON", train_on).replace("LOSS", loss)
        run = RunFolder(tmp_path / f"{train_on} {loss}").create(text, {})
        run.write_rollouts(1, rollouts(run, 1, groups=2, size=2, correction={(1, 0): made}, advantage={(1, 0): 1.5}))
        reader = RunReader(run.path)
        rows = [row | {"variant": HOSTILE} for row in reader.rows(1, reader.groups(1)[1:])[0]]
        figure = StepReplay.of(reader, 1).figure(rows)
        assert figure.count('class="hatch"') == 1
        assert figure.count("</tspan> ↻</text>") == 1
        assert "↻: by guided correction (1 reflect); hatched: not sampled, but inserted by it." in figure
        assert f">{weight}</text>" in figure
        assert figure.count(">–</text>") == unknown
        assert "variant of a problem: &lt;script&gt;" in figure
        assert "<script>" not in figure
