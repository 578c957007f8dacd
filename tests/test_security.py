"""Other people's files run no code here, and what is secret is not written down."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from helpers import TEXT, policy, processing, run_config
from safetensors.torch import load_file

from mm_agrae import config as configs
from mm_agrae.config import LoraSection, ModelSection
from mm_agrae.errors import ConfigError, ModelError
from mm_agrae.model.policy import Policy
from mm_agrae.model.processing import Processing
from mm_agrae.progress import Reporter
from mm_agrae.trainer import Trainer


class Dangerous:
    """Unpickling it makes a folder."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def load(path):
    return Policy(ModelSection(path=str(path)), processing(TEXT))


def test_weights_in_a_pickle_are_not_loaded(tmp_path):
    model, harm = tmp_path / "model", tmp_path / "harm"
    shutil.copytree(TEXT, model)
    weights = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    torch.save(weights | {"x": Dangerous(harm)}, model / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"no model\.safetensors.*are not loaded"):
        load(model)
    assert not harm.exists()


def test_an_adapter_in_a_pickle_is_not_loaded(tmp_path):
    adapter, harm = tmp_path / "adapter", tmp_path / "harm"
    policy(TEXT, lora=LoraSection(rank=2)).model.save_pretrained(adapter)
    load(adapter)
    weights = load_file(adapter / "adapter_model.safetensors")
    (adapter / "adapter_model.safetensors").unlink()
    torch.save(weights | {"x": Dangerous(harm)}, adapter / "adapter_model.bin")
    with pytest.raises(ModelError, match=r"no adapter_model\.safetensors.*are not loaded"):
        load(adapter)
    assert not harm.exists()


def test_code_in_a_checkpoint_does_not_run_unless_trusted(tmp_path):
    model, harm = tmp_path / "model", tmp_path / "harm"
    shutil.copytree(TEXT, model)
    (model / "own.py").write_text(
        f"import os\nos.mkdir({str(harm)!r})\n"
        "from transformers import Qwen2Config\n"
        "class OwnConfig(Qwen2Config):\n    model_type = 'own'\n"
    )
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}}
    (model / "config.json").write_text(json.dumps(config))
    for loading in (load, lambda path: Processing(str(path), configs.PromptSection())):
        with pytest.raises(ModelError, match=r"set model\.trust_remote_code=true"):
            loading(model)
        assert not harm.exists()


def test_secrets_are_not_written(tmp_path, monkeypatch):
    """Neither those of the environment nor those in settings of tasks and engines."""
    for name in ("HF_TOKEN", "WANDB_API_KEY", "MM_AGRAE_VLLM_KEY"):
        monkeypatch.setenv(name, "hunter2")
    options = {"hf_token": "hunter2", "hub": "https://me:hunter2@example.invalid/x", "seed": 3}
    sections = {
        "train": {"steps": 1},
        "rollout": {"vllm": {"options": options}},
        "evaluate": {"before": False, "after": False},
        "log": {"sinks": ["tensorboard"]},
    }
    config = run_config(tmp_path / "run", TEXT, **sections)
    Trainer(config, Reporter(enabled=False)).train()
    for path in (tmp_path / "run").rglob("*"):
        if path.is_file():
            assert b"hunter2" not in path.read_bytes(), path
    text = (tmp_path / "run" / "config.yaml").read_text()
    assert "https://***@example.invalid/x" in text
    assert "max_new_tokens: 24" in text
    # A secret that is hidden, or another one, does not make it another run.
    assert Trainer(config, Reporter(enabled=False)).steps_done == 1


def test_a_password_in_a_server_address_is_refused():
    address = "http://me:hunter2@127.0.0.1:8000"
    with pytest.raises(ConfigError, match="MM_AGRAE_VLLM_KEY") as caught:
        run_config("run", TEXT, rollout={"engine": "vllm_server", "vllm": {"servers": (address,)}})
    assert "hunter2" not in str(caught.value)
