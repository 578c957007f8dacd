"""The groups of a step: what is resampled, and that preparing prompts ahead changes nothing."""

import itertools
import json
import threading

import pytest
import torch
from helpers import TEXT, VL, run_config
from PIL import Image

from mm_agrae.errors import DataError
from mm_agrae.progress import Reporter
from mm_agrae.rollout.collector import Collector
from mm_agrae.run.folder import RunFolder
from mm_agrae.tasks.order import DataOrder
from mm_agrae.trainer import Trainer

NO_EVALUATION = {"before": False, "after": False}


def trained(config) -> Trainer:
    trainer = Trainer(config, Reporter(enabled=False))
    trainer.train()
    return trainer


def groups_of(records) -> dict[int, list[dict]]:
    groups: dict[int, list[dict]] = {}
    for record in records:
        groups.setdefault(record["prompt_index"], []).append(record)
    return groups


@pytest.mark.parametrize(("rule", "without"), [("nsr", {"correct"}), ("psr", {"incorrect"})])
def test_dynamic_sampling_replaces_groups_without_an_advantage(tmp_path, rule, without):
    """Not those with equal rewards: under nsr a group that is all incorrect has a gradient."""
    config = run_config(
        tmp_path / "run", TEXT, advantage={"rule": rule}, evaluate=NO_EVALUATION,
        train={"steps": 1},
        rollout={"prompts_per_step": 12, "completions_per_prompt": 2,
                 "dynamic_sampling": {"max_draws": 2}},
    )  # fmt: skip
    trained(config)
    groups = groups_of(RunFolder(config.run_dir).read_rollouts(1)).values()
    first_round = [group for group in groups if group[0]["resample_round"] == 0]
    kinds = set()
    for group in first_round:
        assert any(record["advantage"] for record in group)
        success = {record["success"] for record in group}
        kinds.add("mixed" if len(success) == 2 else "correct" if success == {True} else "incorrect")
    assert {"correct", "incorrect"} - without <= kinds
    assert not kinds & without
    assert len(first_round) < len(groups)


@pytest.mark.parametrize("path", [VL, TEXT])
def test_prefetched_prompts_change_nothing(tmp_path, monkeypatch, path):
    """With bad rows, an epoch that ends within a step, and a row that comes twice in one step."""
    rows = [{"question": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(5)]
    rows.insert(3, {"question": "x" * 9000, "answer": "1"})
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = [{"task": "files", "path": str(file)}]
    if path == VL:
        sources.append({"task": "synthetic", "split": "train", "limit": 3})
    sections = {
        "data": {"train": sources, "evaluate": [], "on_bad_row": "skip"},
        "evaluate": NO_EVALUATION,
        "train": {"steps": 4},
        "rollout": {"prompts_per_step": 7, "completions_per_prompt": 2, "max_new_tokens": 8},
        "advantage": {"rule": "w_reinforce"},
    }
    threads: list[list[str]] = []
    one_prompt = Collector._prompt

    def noting(self, row):
        threads[-1].append(threading.current_thread().name)
        return one_prompt(self, row)

    monkeypatch.setattr(Collector, "_prompt", noting)
    found = []
    for name, count in (("prefetched", 3), ("in_turn", 0)):
        sections["data"]["prefetch_threads"] = count
        threads.append([])
        trainer = trained(run_config(tmp_path / name, path, **sections))
        run = RunFolder(tmp_path / name)
        records = [run.read_rollouts(step) for step in range(1, 5)]
        skipped = [row["data/rows_skipped"] for row in run.read_metrics()]
        found.append((records, skipped, trainer.collector.data_state))
        found[-1] += (trainer.policy.model.state_dict(),)
    assert found[0][:3] == found[1][:3]
    weights = (state.values() for *_, state in found)
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
    assert len({name for name in threads[0] if name.startswith("prompts")}) > 1
    assert not any(name.startswith("prompts") for name in threads[1])
    stored = [sorted((tmp_path / name).glob("images/*")) for name in ("prefetched", "in_turn")]
    assert [path.name for path in stored[0]] == [path.name for path in stored[1]]
    assert not any(thread.name.startswith("prompts") for thread in threading.enumerate())


def test_a_bad_image_ends_the_run_where_it_is_needed(tmp_path):
    """Not at the step during which it is prefetched; with the same message."""
    Image.new("RGB", (60, 60), "white").save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes((tmp_path / "good.png").read_bytes()[:60])
    images = ["good.png"] * 4 + ["bad.png", "good.png"]
    rows = [{"question": "1+1?", "answer": "2", "images": [image]} for image in images]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = []
    for count in (0, 2):
        data = {"train": [{"task": "files", "path": str(file)}], "evaluate": [], "shuffle": False, "check": "off"}
        config = run_config(
            tmp_path / f"run{count}", VL, evaluate=NO_EVALUATION, train={"steps": 3},
            data=data | {"prefetch_threads": count},
            rollout={"prompts_per_step": 2, "completions_per_prompt": 2, "max_new_tokens": 4},
        )  # fmt: skip
        trainer = Trainer(config, Reporter(enabled=False))
        with pytest.raises(DataError, match=r"rows\.jsonl.*5.*bad\.png.*truncated") as error:
            trainer.train()
        found.append((str(error.value), trainer.steps_done))
    assert found[0] == found[1]
    assert found[0][1] == 2


def test_data_order_visits_every_row_once_an_epoch():
    order = DataOrder(10, seed=3, shuffle=True)
    ahead = order.peek(30)
    epochs = [[order.next() for _ in range(10)] for _ in range(3)]
    assert list(itertools.chain(*epochs)) == ahead
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    later = DataOrder(10, seed=3, shuffle=True)
    later.position = 14
    assert later.next() == epochs[1][4]
    assert DataOrder(3, 0, shuffle=False).next() == 0
