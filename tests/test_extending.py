"""A rule, a loss, a reward, an engine or a task is added in one place, and no other test breaks.

The additions are made in a copy of the package; training runs in a process of its own, by the
`mm-agrae` command, in a folder with the user's files.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from helpers import ROOT, TEXT

from mm_agrae.run.folder import RunFolder

RULE = '''

def clipped(step: Step, *, most: float = 1.0, both: bool = False) -> AdvantageLevels:
    """A = min(r − mean r, most), from below as well if `both` is set."""
    value_PG = step.centre(step.reward_PG)
    return step.levels(value_PG.clamp(-most if both else None, most))


RULES["clipped"] = clipped
'''
LOSS = """

# A plain policy gradient: no lower or upper bound.
LOSSES["unclipped"] = Loss(1e9, 1e9, _token_log_ratio, _clipped, _mean_of_tokens)
"""
REWARD = '''

def _brevity(example: Example, completion: Completion) -> float:
    """1 for completions of fewer than 12 tokens."""
    return 1.0 if len(completion.token_ids) < 12 else 0.0


PARTS["brevity"] = _brevity
'''
ENGINE = '''
from mm_agrae.rollout.hf import HFEngine


class Noisy(HFEngine):
    """Says how many prompts it was given."""

    def generate(self, prompts, *arguments, **options):
        print(f"noisy: {len(prompts)} prompts")
        return super().generate(prompts, *arguments, **options)
'''
TASK = '''
from mm_agrae.types import Example


class Sums:
    """Sums of two numbers up to `largest`."""

    def __init__(self, largest: int = 9):
        self.largest = largest

    def __len__(self):
        return self.largest**2

    def __getitem__(self, index):
        if not 0 <= index < len(self):
            raise IndexError(index)
        a, b = divmod(index, self.largest)
        return Example(f"{a}+{b}", f"What is {a} + {b}?", str(a + b))
'''
# Which file of the package each addition touches, and the tests that look at what is listed there.
ADDITIONS = {"advantage.py": RULE, "loss.py": LOSS, "rewards/parts.py": REWARD}
NEIGHBOURS = ["tests/test_advantage.py", "tests/test_loss.py", "tests/config", "tests/tasks/test_registry.py"]


@pytest.fixture(scope="module")
def extended(tmp_path_factory) -> Path:
    """A folder with a copy of the package that has all additions, and the user's files."""
    folder = tmp_path_factory.mktemp("extended")
    shutil.copytree(ROOT / "mm_agrae", folder / "mm_agrae")
    for file, addition in ADDITIONS.items():
        with (folder / "mm_agrae" / file).open("a", encoding="utf-8") as source:
            source.write(addition)
    (folder / "user").mkdir()
    (folder / "user" / "engine.py").write_text(ENGINE)
    (folder / "user" / "sums.py").write_text(TASK)
    config = {
        "run_dir": "run",
        "model": {"path": TEXT, "device": "cpu"},
        "data": {"train": [{"task": "sums.py:Sums", "largest": 3}]},
        "train": {"steps": 2},
        "rollout": {
            "engine": "engine.py:Noisy", "prompts_per_step": 2, "completions_per_prompt": 4,
            "max_new_tokens": 16,
        },
        "reward": {"parts": {"accuracy": 0.5, "brevity": 0.5}},
        "advantage": {"rule": "clipped", "most": 0.25},
        "update": {"loss": "unclipped"},
        "evaluate": {"before": False, "after": False},
    }  # fmt: skip
    (folder / "user" / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def run(extended: Path, *command: str, cwd: Path | None = None) -> subprocess.CompletedProcess:
    return subprocess.run(
        command,
        cwd=cwd or extended / "user",
        env=os.environ | {"PYTHONPATH": str(extended), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_what_was_added_trains_by_the_console_command(extended):
    command = str(Path(sys.executable).with_name("mm-agrae"))
    done = run(extended, command, "train", "config.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("noisy: 2 prompts") == 3  # the mismatch check at the start is one
    rows = RunFolder(extended / "user" / "run").read_rollouts(1)
    assert {row["example_id"] for row in rows} <= {f"{a}+{b}" for a in range(3) for b in range(3)}
    assert {row["parts"]["brevity"] for row in rows} <= {0.0, 1.0}
    assert any(row["parts"]["brevity"] == float(row["tokens"] < 12) for row in rows)
    assert all(row["parts"]["brevity"] == float(row["tokens"] < 12) for row in rows)
    assert max(row["advantage"] for row in rows) <= 0.25


MISTAKES = {
    "advantage.most=high": "advantage.most must be a number, but it is 'high'",
    "advantage.both=1": "advantage.both must be true or false",
    "advantage.mots=1.0": "advantage.mots: unknown setting; did you mean 'most'?",
    "update.loss=unclip": "did you mean 'unclipped'?",
    "data.train.0.largest=many": "largest: input should be a valid integer",
    "data.train.0.task=sums.py:Sum": "sums.py has no function or class 'Sum'; it has",
    "rollout.engine=engine.py:Quiet": "engine.py has no function or class 'Quiet'",
    "rollout.engine=hff": "rollout.engine: no engine 'hff'; did you mean 'hf'?",
}
TRY_ALL = """
import sys
from mm_agrae.cli import main
for override in sys.argv[1:]:
    assert main(["train", "config.yaml", override]) == 2, override
"""


def test_settings_of_what_was_added_are_checked(extended):
    done = run(extended, sys.executable, "-c", TRY_ALL, *MISTAKES)
    assert done.returncode == 0, done.stdout + done.stderr
    errors = done.stderr.split("error: ")[1:]
    for (override, message), error in zip(MISTAKES.items(), errors, strict=True):
        assert message in error, override


def test_no_other_test_breaks(extended):
    shutil.copytree(ROOT / "tests", extended / "tests", dirs_exist_ok=True)
    for name in ("configs", "data", "docs", "scripts"):
        if not (extended / name).exists():
            (extended / name).symlink_to(ROOT / name)
    shutil.copy(ROOT / "pyproject.toml", extended)
    done = run(
        extended, sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider",
        *NEIGHBOURS, cwd=extended,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
