"""The schema: every shipped config loads; a wrong key or value is named with what is right."""

from pathlib import Path

import pytest
import torch
import yaml

from mm_agrae import config as configs
from mm_agrae import tasks
from mm_agrae.config import Config, ModelSection
from mm_agrae.errors import ConfigError

CONFIGS = Path(__file__).parents[2] / "configs"
MINIMAL = {
    "run_dir": "runs/x",
    "model": {"path": "some/model"},
    "data": {"train": [{"task": "synthetic"}]},
    "train": {"steps": 3},
}


def parse(**sections):
    return configs.parse(MINIMAL | sections)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_config_loads(path):
    config = configs.load(path)
    for source in (*config.data.train, *config.data.evaluate):
        tasks.check(source)
    assert configs.plan(config, train_rows=1000)


def test_round_trip():
    config = parse(reward={"parts": {"accuracy": 0.9, "format": 0.1}})
    assert configs.parse(yaml.safe_load(configs.dump(config))) == config


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({"modle": {}}, "modle: unknown setting; did you mean 'model'?"),
        ({"rollout": {"temprature": 1.0}}, "rollout.temprature: unknown setting; did you mean 'temperature'?"),
        ({"update": {"loss": "gropo"}}, "update.loss: 'gropo' is not valid; did you mean 'grpo'?"),
        ({"model": {"path": "x", "lora": {"rnk": 4}}}, "did you mean 'rank'?"),
        ({"advantage": {"rule": "a-grae"}}, "did you mean 'agrae'?"),
        ({"advantage": {"rule": "grpo", "alpha": 0.5}}, "advantage.alpha has no effect"),
        ({"advantage": {"alpha": 1.5}}, "advantage.alpha"),
        ({"train": {"steps": 3, "epochs": 1}}, "give one of train.steps and train.epochs"),
        ({"train": {}}, "give one of train.steps and train.epochs"),
        ({"rollout": {"completions_per_prompt": 1}}, "a group of one"),
        ({"rollout": {"temperature": 0.0}}, "rollout.temperature is 0"),
        ({"rollout": {"prompts_per_step": 16}, "update": {"mini_batch_prompts": 6}}, "nearest that does is 4"),
        ({"update": {"learning_rate": "fast"}}, "update.learning_rate"),
        ({"reward": {"parts": {"format": 1.0}}}, "must hold accuracy"),
        (
            {"rollout": {"max_new_tokens": 10}, "reward": {"overlong": {"buffer_tokens": 20}}},
            "more than rollout.max_new_tokens",
        ),
        ({"evaluate": {"temperature": 0.0}}, "greedy samples are all the same"),
        ({"evaluate": {"every": 5}}, "data.evaluate names no data"),
        ({"model": {"dtype": "float32"}}, "model.path: required"),
    ],
)
def test_a_wrong_setting_is_named(sections, expected):
    with pytest.raises(ConfigError) as error:
        parse(**sections)
    assert expected in str(error.value)


def test_overrides(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    config = configs.load(
        path,
        [
            "train.steps=7",
            "update.learning_rate=1e-5",
            "model.lora.rank=4",
            "data.train.0.limit=5",
            "reward.parts={accuracy: 1.0}",
            "prompt.system=",
            "data.check=off",
            "update.shared_prompt=on",
        ],
    )
    assert config.train.steps == 7
    assert (config.data.check, config.update.shared_prompt) == ("off", "on")
    assert config.update.learning_rate == 1e-5
    assert config.model.lora is not None
    assert config.model.lora.rank == 4
    assert config.data.train[0].limit == 5
    for override, expected in [
        ("train.steps", "expected key=value"),
        ("run_dir.x=1", "run_dir is a single value"),
        ("data.train.3.limit=1", "not an index of a list of 1"),
        ("train.step=1", "did you mean 'steps'"),
    ]:
        with pytest.raises(ConfigError, match=expected):
            configs.load(path, [override])
    with pytest.raises(ConfigError, match=r"sinks\.0 is a single value"):
        configs.load(path, ["log.sinks=[wandb]", "log.sinks.0.x=1"])


@pytest.mark.parametrize(
    ("text", "expected"), [("a: [", "not valid YAML"), ("- 1", "expected a mapping"), ("", "expected a mapping")]
)
def test_a_file_that_is_no_config(tmp_path, text, expected):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=expected) as error:
        configs.load(path)
    assert "bad.yaml" in str(error.value)
    with pytest.raises(ConfigError, match=r"absent\.yaml: cannot be read"):
        configs.load(tmp_path / "absent.yaml")


def test_the_dtype_follows_the_machine(tmp_path, monkeypatch):
    """auto is settled when a config is read, and what the run records is what was settled."""
    path = tmp_path / "config.yaml"

    def dtype(*overrides, **options):
        path.write_text(yaml.safe_dump(MINIMAL))
        config = configs.load(path, overrides, **options)
        path.write_text(configs.dump(config))
        assert configs.load(path) == config
        return config.model.dtype

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert dtype() == dtype("model.dtype=auto") == ModelSection(path="x").dtype == "float32"
    assert dtype(for_gpus=True) == dtype("model.dtype=bfloat16") == "bfloat16"
    assert dtype("model.device=cpu", for_gpus=True) == "float32"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for supported in (True, False):  # a V100 only emulates it
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, s=supported: s)
        assert dtype() == ModelSection(path="x").dtype == ("bfloat16" if supported else "float32")
        assert dtype("model.dtype=float32") == dtype("model.device=cpu") == "float32"


def test_plan_counts():
    config = parse(
        rollout={"prompts_per_step": 12, "completions_per_prompt": 4, "max_new_tokens": 10},
        update={"mini_batch_prompts": 4, "epochs": 2, "micro_batch_completions": 5},
    )
    plan = dict(configs.plan(config, train_rows=100, processes=2))
    assert "12 prompts × 4 completions = 48 on 2 processes" in plan["per step"]
    assert plan["optimiser steps"].startswith("6 a rollout (off-policy after the first), 18")
    assert plan["micro-batches"].startswith("2 an optimiser step")  # 4·4/2 = 8 rows, 5 at most
    assert plan["tokens"] == "up to 480 sampled a step, 1,440 in all"


def test_epochs_become_steps():
    config = parse(train={"epochs": 2}, rollout={"prompts_per_step": 16})
    assert configs.total_steps(config, train_rows=100) == 12
    with pytest.raises(ConfigError, match="prompts_per_step = 16 takes 16 rows, more than"):
        configs.total_steps(config, train_rows=7)


AGRAE = {"advantage": {"rule": "agrae", "alpha": 0.5, "eps": 1e-5}, "update": {"loss": "gspo", "clip_high": 4e-4}}


def test_a_new_rule_or_loss_leaves_the_settings_of_the_former_one_behind(tmp_path):
    """Those of files below; not those that both take, those typed, and those of the same file."""
    path, over, typo = tmp_path / "config.yaml", tmp_path / "over.yaml", tmp_path / "typo.yaml"
    path.write_text(yaml.safe_dump(MINIMAL | AGRAE))
    over.write_text(yaml.safe_dump({"base": "config.yaml", "advantage": {"rule": "grpo"}, "update": {"loss": "dapo"}}))
    typo.write_text(yaml.safe_dump(MINIMAL | {"advantage": {"alhpa": 0.5}}))
    lines = [
        "left out advantage.alpha=0.5 of a config file: rule 'grpo' does not take it",
        "left out update.clip_high=0.0004 of a config file: loss 'dapo' has a default of its own",
    ]
    for file, typed in ((path, ["advantage.rule=grpo", "update.loss=dapo"]), (path, [str(over)]), (over, [])):
        said = []
        config = configs.load(file, typed, say=said.append)
        assert said == lines
        assert (config.advantage.rule, config.advantage.settings) == ("grpo", {"eps": 1e-5})
        assert (config.update.loss, config.update.clip_high) == ("dapo", None)
    said = []
    kept = configs.load(path, ["advantage.rule=agrae", "update.loss=grpo", "update.clip_high=0.3"], say=said.append)
    assert (kept.advantage.settings["alpha"], kept.update.clip_high, said) == (0.5, 0.3, [])
    for file, typed, expected in (
        (path, ["advantage.rule=grpo", "advantage.alpha=1"], "advantage.alpha has no effect"),
        (path, ["advantage.alpha=1", str(over)], "advantage.alpha has no effect"),
        (over, ["advantage.alpha=1"], "advantage.alpha has no effect"),
        (typo, ["advantage.rule=grpo"], "advantage.alhpa: unknown setting"),
    ):
        with pytest.raises(ConfigError, match=expected):
            configs.load(file, typed)


def test_a_config_by_name_and_as_a_mapping(tmp_path, monkeypatch):
    """In any folder; lists stand for tuples, and what is given is left as it was."""
    monkeypatch.chdir(tmp_path)
    values = {"base": "quickstart", "run_dir": "runs/mine", "update": {"learning_rate": "1e-3"}}
    config = Config.load(
        values, "with/dr_grpo", {"data": {"train": [{"task": "synthetic", "levels": [1]}]}}, "train.steps=3"
    )
    assert values == {"base": "quickstart", "run_dir": "runs/mine", "update": {"learning_rate": "1e-3"}}
    assert (config.run_dir, config.train.steps, config.advantage.rule) == ("runs/mine", 3, "dr_grpo")
    assert config.update.learning_rate == 1e-3
    assert Path(config.model.path, "config.json").is_file()
    assert Config(**config.model_dump(mode="json")) == config
    (tmp_path / "quickstart.yaml").write_text("run_dir: [\n")
    with pytest.raises(ConfigError, match="not valid YAML"):
        Config.load("quickstart.yaml")
    with pytest.raises(ConfigError, match=r"no config of that name.*did you mean 'quickstart'\?"):
        Config.load("quickstrat")


def test_a_users_file_comes_before_a_shipped_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart").write_text("base: quickstart_text\nrun_dir: mine\n")
    (tmp_path / "data" / "warm_start" / "text").mkdir(parents=True)
    config = Config.load("quickstart")
    assert (config.run_dir, config.model.path) == ("mine", "data/warm_start/text")
