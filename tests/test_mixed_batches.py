"""Rows with one image, several and none in one step: however the step is cut, one gradient."""

import json
from functools import lru_cache

import pytest
import torch
from helpers import TEXT, VL, examples, run_config

from mm_agrae.tasks.images import encode_png, open_image
from mm_agrae.trainer import Trainer

REWARD = """
def evenness(example, completion):
    return sum(token % 2 for token in completion.token_ids) / len(completion.token_ids)
"""


class Recording(Trainer):
    """Keeps what reached the optimiser in the first step."""

    kept: dict[str, torch.Tensor] | None = None

    def __init__(self, *arguments):
        super().__init__(*arguments)
        take = self.updater.optimiser_step

        def recording():
            if self.kept is None:
                parameters = self.policy.model.named_parameters()
                self.kept = {n: p.grad.clone() for n, p in parameters if p.grad is not None}
            return take()

        self.updater.optimiser_step = recording


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A JSONL file of 6 rows, and the file of a reward that differs within every group."""
    folder = tmp_path_factory.mktemp("mixed")
    pictured, plain = examples(VL, 6), examples(TEXT, 2)
    for index, example in enumerate(pictured):
        (folder / f"{index}.png").write_bytes(encode_png(open_image(example.images[0])))
    rows = [
        {"question": pictured[0].question, "answer": "1", "images": ["0.png"]},
        {"question": plain[0].question, "answer": "2", "images": []},
        {"question": "<image> or <image>: which?", "answer": "3", "images": ["1.png", "2.png"]},
        {"question": pictured[3].question, "answer": "4", "images": ["3.png"]},
        {"question": plain[1].question, "answer": "5"},
        {"question": "Here <image><image>, there <image>.", "answer": "6",
         "images": ["4.png", "5.png", "0.png"]},
    ]  # fmt: skip
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "reward.py").write_text(REWARD)
    return folder


CUTS = {
    "one call": {"micro_batch_completions": 18},
    "groups cut": {"micro_batch_completions": 4},
    "one by one": {"micro_batch_completions": 1},
    "by tokens": {"micro_batch_tokens": 220},
}
MODELS = {
    "full": {},
    "frozen vision": {"freeze": ["vision"]},
    "lora": {"lora": {"rank": 4, "parts": ["language", "vision", "merger"]}},
}


@pytest.fixture(scope="module")
def first_gradient(data):
    """Gradient of the first step: which model, how cut, prompts shared or repeated."""

    @lru_cache
    def take(model, cut, sharing):
        config = run_config(
            data / f"{model} {cut} {sharing}",
            VL,
            data={"train": [{"task": "files", "path": str(data / "rows.jsonl")}], "evaluate": []},
            rollout={"prompts_per_step": 6, "completions_per_prompt": 3},
            reward={"parts": {"accuracy": 0.0, f"{data / 'reward.py'}:evenness": 1.0}},
            update=CUTS[cut] | {"shared_prompt": sharing},
            model=MODELS[model],
            advantage={"rule": "grpo"},
            evaluate={"before": False, "after": False},
            train={"steps": 1},
        )
        trainer = Recording(config)
        trainer.train()
        pictures = {len(row["images"]) for row in trainer.run.read_rollouts(1)}
        assert pictures == {0, 1, 2, 3}
        return trainer.kept

    return take


@pytest.mark.parametrize(
    ("model", "cut", "sharing"),
    [
        ("full", "one call", "on"),
        ("full", "groups cut", "off"),
        ("full", "one by one", "on"),
        ("full", "by tokens", "on"),
        ("frozen vision", "groups cut", "on"),
        ("lora", "by tokens", "on"),
    ],
)
def test_the_cut_does_not_change_the_gradient(first_gradient, model, cut, sharing):
    expected = first_gradient(model, "one call", "off")
    found = first_gradient(model, cut, sharing)
    assert found.keys() == expected.keys()
    largest = max(grad.abs().max() for grad in expected.values())
    assert largest > 1e-3
    assert max((found[n] - expected[n]).abs().max() for n in expected) <= 1e-5 * max(1, largest)
    pictures = any(grad.abs().max() > 0 for name, grad in found.items() if "visual" in name)
    assert pictures == (model != "frozen vision")
