"""Tasks and rewards in the user's own modules, named in the config."""

import os
import subprocess
import sys
from pathlib import Path

from helpers import TEXT, run_config

from mm_agrae import config as configs

TASK = """
from mm_agrae.types import Example

class Doubles:
    def __init__(self, count: int = 4):
        self.count = count
    def __len__(self):
        return self.count
    def __getitem__(self, i):
        return Example(str(i), f"twice {i}?", str(2 * i))
"""
REWARDS = """
def brevity(example, completion):
    open("graded.txt", "w").close()
    return 1.0 if len(completion.token_ids) < 200 else 0.0
"""


def test_modules_in_the_working_directory(tmp_path):
    """The console script, unlike `python -m`, does not put this directory into sys.path."""
    source = {"task": "my_task:Doubles", "count": 3}
    parts = {"accuracy": 0.9, "my_rewards:brevity": 0.1}
    data = {"train": [source], "evaluate": []}
    config = run_config("run", TEXT, data=data, reward={"parts": parts})
    (tmp_path / "c.yaml").write_text(configs.dump(config))
    (tmp_path / "my_task.py").write_text(TASK)
    (tmp_path / "my_rewards.py").write_text(REWARDS)
    command = [str(Path(sys.executable).with_name("mm-agrae")), "sample", "c.yaml"]
    result = subprocess.run(
        [*command, "-n", "1", "--completions", "1", "--out", "x.html"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "twice 0?" in (tmp_path / "x.html").read_text(encoding="utf-8")
    assert (tmp_path / "graded.txt").exists()
