"""A short form of `scripts/fuzz.py`, and what it has found before."""

import json
import sys

import pytest
import torch
from helpers import ROOT
from safetensors.torch import load, save

from mm_agrae import config as configs
from mm_agrae.errors import ConfigError, RunFolderError
from mm_agrae.run import checkpoint

sys.path.append(str(ROOT / "scripts"))
import fuzz


@pytest.mark.parametrize(("target", "cases"), [("config", 200), ("files", 200), ("answers", 300), ("checkpoint", 50)])
def test_nothing_but_our_own_errors_comes_out(target, cases):
    tally = fuzz.fuzz(target, cases)
    assert tally.faults == {}
    assert tally.cases == cases
    assert tally.refused < cases


def test_a_fault_and_a_case_that_hangs_would_be_found(monkeypatch):
    def check(case):
        if case[0] == fuzz.GOOD_CONFIG:
            while True:
                pass
        raise KeyError("lost")

    monkeypatch.setattr(fuzz, "LIMIT_S", 0.05)
    monkeypatch.setitem(fuzz.TARGETS, "config", (fuzz.TARGETS["config"][0], check))
    faults = fuzz.fuzz("config", 10).faults
    assert sorted(fault.split()[0] for fault in faults) == ["KeyError", "TooLong"]


# ------------------------------------------------------------------------- found before

YAML = {
    "a 13th month": "2020-13-45",
    "too many digits": "9" * 5000,
    "an integer that is none": "!!int x",
    "a date that is none": "!!timestamp x",
    "nested in itself": "&a [*a]",
    "aliases that double": f"[&a 1,{fuzz._DOUBLED}]",
    "a thousand brackets": "[" * 1000,
    "nested deep": "[" * 60 + "]" * 60,
}


@pytest.mark.parametrize("text", YAML.values(), ids=YAML)
def test_yaml_that_is_no_config(text, tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(f"run_dir: {text}")
    with pytest.raises(ConfigError, match="not valid YAML"):
        configs.load(path)
    path.write_bytes(fuzz.GOOD_CONFIG)
    with pytest.raises(ConfigError, match="not valid YAML"):
        configs.load(path, [f"run_dir={text}"])


@pytest.mark.parametrize("name", ["\\0", "\\ud800", "x" * 5000])
def test_names_that_no_file_has(name, tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(f'base: "{name}.yaml"')
    with pytest.raises(ConfigError, match="cannot be read"):
        configs.load(path)
    path.write_bytes(fuzz.GOOD_CONFIG)
    with pytest.raises(ConfigError, match="cannot be read"):
        configs.load(path, [json.loads(f'"{name}"'.replace("\\0", "\\u0000")) + ".yaml"])


def test_a_digit_that_is_no_number(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_bytes(fuzz.GOOD_CONFIG)
    with pytest.raises(ConfigError, match="'²' is not an index"):
        configs.load(path, ["data.train.².limit=1"])


def test_an_anchor_is_fine(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_bytes(fuzz.GOOD_CONFIG + b"\nevaluate: &a {samples: 4, greedy: true}\n")
    assert configs.load(path).evaluate.samples == 4


@pytest.fixture
def whole(tmp_path):
    """A checkpoint and a policy that it fits."""
    folder, policy = fuzz._whole_checkpoint()
    yield folder, policy
    fuzz.shutil.rmtree(fuzz.workshop())
    fuzz.workshop.cache_clear()
    fuzz._whole_checkpoint.cache_clear()


def with_right_sum(folder, name, content):
    """Another content of a file, with a checksum that says it is right."""
    (folder / name).write_bytes(content)
    state = json.loads((folder / checkpoint.STATE_FILE).read_text())
    state["sha256"][name] = checkpoint._checksum(folder / name)
    (folder / checkpoint.STATE_FILE).write_text(json.dumps(state))


def without_a_tensor(file):
    tensors = load(file)
    tensors.pop("model.norm.weight")
    return save(tensors, {"format": "pt"})


WEIGHTS = {
    "empty": lambda file: b"",
    "no safetensors": lambda file: b"\xff" * 100,
    "no tensors": lambda file: save({}, {"format": "pt"}),
    "one tensor less": without_a_tensor,
    "other shapes": lambda file: save({k: t[:-1] for k, t in load(file).items()}, {"format": "pt"}),
}


@pytest.mark.parametrize("change", WEIGHTS.values(), ids=WEIGHTS)
def test_weights_that_cannot_be_read(change, whole):
    folder, policy = whole
    name = "model.safetensors"
    with_right_sum(folder, name, change((folder / name).read_bytes()))
    before = {key: value.clone() for key, value in policy.model.state_dict().items()}
    with pytest.raises(RunFolderError, match="step_000001: weights cannot be read"):
        checkpoint.restore(folder, policy)
    after = policy.model.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())


def test_the_size_of_a_model_is_not_taken_from_a_damaged_checkpoint(whole):
    """An empty config stands for a model of 7 billion parameters, which no machine here holds."""
    folder, policy = whole
    with_right_sum(folder, "config.json", b"{}")
    checkpoint.restore(folder, policy)


@pytest.mark.parametrize(("key", "value"), [("seconds", [1]), ("seconds", {"a": "b"}),
                                            ("versions", None), ("seconds", None)])  # fmt: skip
def test_a_record_whose_parts_are_of_other_kinds(key, value, whole):
    folder, policy = whole
    state = json.loads((folder / checkpoint.STATE_FILE).read_text()) | {key: value}
    (folder / checkpoint.STATE_FILE).write_text(json.dumps(state))
    with pytest.raises(RunFolderError, match="json is missing or damaged"):
        checkpoint.restore(folder, policy)
