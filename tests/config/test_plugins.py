"""Tasks and rewards in the user's own files, named in the config."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import TEXT, run_config

from mm_agrae import config as configs

TASK = """
from mm_agrae.types import Example
import my_helper

class Doubles:
    def __init__(self, count: int = 4):
        self.count = count
    def __len__(self):
        return self.count
    def __getitem__(self, i):
        return Example(str(i), f"{my_helper.TWICE} {i}?", str(2 * i))
"""
REWARDS = """
def brevity(example, completion):
    open("graded.txt", "w").close()
    return 1.0 if len(completion.token_ids) < 200 else 0.0
"""


COMMAND = str(Path(sys.executable).with_name("mm-agrae"))
"""The console script: unlike `python -m`, it does not put the working directory into sys.path."""


def run(folder, *arguments):
    config = run_config("run", TEXT, data={"train": [{"task": "set below"}], "evaluate": []})
    (folder / "c.yaml").write_text(configs.dump(config))
    (folder / "my_task.py").write_text(TASK)
    (folder / "my_rewards.py").write_text(REWARDS)
    (folder / "my_helper.py").write_text("TWICE = 'twice'")
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    result = subprocess.run(arguments, capture_output=True, text=True, cwd=folder, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.parametrize("name", ["my_task.py:Doubles", "my_task:Doubles"])
def test_a_task_in_the_working_directory(tmp_path, name):
    options = ["--plan", f"data.train.0.task={name}", "data.train.0.count=3"]
    assert re.search(
        r"training rows\s+│\s+3 \(", run(tmp_path, COMMAND, "train", "c.yaml", *options)
    )


def test_a_reward_in_the_working_directory(tmp_path):
    options = ["data.train.0.task=my_task:Doubles", "-n", "1", "--completions", "1"]
    options += ["reward.parts={accuracy: 0.9, 'my_rewards:brevity': 0.1}", "--out", "x.html"]
    run(tmp_path, COMMAND, "sample", "c.yaml", *options)
    assert "twice 0?" in (tmp_path / "x.html").read_text(encoding="utf-8")
    assert (tmp_path / "graded.txt").exists()
