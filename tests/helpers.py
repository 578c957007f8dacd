"""What several tests need: the embedded checkpoints and small configs on them."""

import operator
import os
import re
import resource
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import psutil
import torch

from mm_agrae import config as configs
from mm_agrae.batching import UpdateRow, micro_batch
from mm_agrae.config import ModelSection, PromptSection, SamplingSection
from mm_agrae.model.policy import Policy
from mm_agrae.model.processing import Processing
from mm_agrae.rollout.hf import HFEngine
from mm_agrae.tasks.synthetic.task import SyntheticTask
from mm_agrae.types import MicroBatch

ROOT = Path(__file__).parent.parent
WARM_START = Path(os.environ.get("MM_AGRAE_WARM_START", ROOT / "data" / "warm_start"))
VL, TEXT = str(WARM_START / "vl"), str(WARM_START / "text")
REAL_DATA = Path(os.environ.get("MM_AGRAE_DATA", ROOT.parent / "shared" / "data"))

MODALITY = {VL: "image", TEXT: "text"}


def assert_equal_up_to_rounding(ours: torch.Tensor, theirs: torch.Tensor, terms: int) -> None:
    """The same tensor, computed with its sums in another order.

    `terms` are the lengths of all sums that an element depends on one after another. Each addition
    rounds by at most eps/2 of the sum so far; its size is taken to be that of the tensor's largest
    element, as an element near 0 may be what large terms leave when they cancel.
    """
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    largest = theirs.detach().abs().max().item()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=terms * torch.finfo(theirs.dtype).eps * largest)


def sampling(**settings) -> SamplingSection:
    return SamplingSection(**({"max_new_tokens": 24} | settings))


@lru_cache
def processing(path: str, **settings) -> Processing:
    return Processing(path, PromptSection(**settings))


def policy(path: str, **settings) -> Policy:
    torch.manual_seed(0)
    options = {name: settings.pop(name) for name in ("temperature", "shared_prompt") if name in settings}
    return Policy(ModelSection(path=path, **settings), processing(path), **options)


def engine(made: Policy, **settings) -> HFEngine:
    return HFEngine(made, processing(made.settings.path), **settings)


def examples(path: str, count: int, split: str = "train") -> list:
    task = SyntheticTask(split=split, modality=MODALITY[path])
    return [task[index] for index in range(count)]


def prompts(path: str, count: int) -> list:
    return [processing(path).prompt(example) for example in examples(path, count)]


def batch_of(path: str, made: Policy, count: int = 3, group: int = 2) -> MicroBatch:
    """Completions sampled from the policy itself, with advantage 1."""
    batch = prompts(path, count)
    groups = engine(made).generate(batch, group, sampling(), range(count))
    rows = [UpdateRow(p, c, 1.0) for p, completions in enumerate(groups) for c in completions]
    return micro_batch(batch, rows, made.device)


def run_config(run_dir, path: str = VL, **sections):
    """A run of two small steps, changed by `sections`."""
    source = {"task": "synthetic", "modality": MODALITY.get(path, "text")}
    values = {
        "run_dir": str(run_dir),
        "model": {"path": path, "device": "cpu"},
        "data": {
            "train": [source | {"split": "train"}],
            "evaluate": [source | {"split": "test", "name": "test", "limit": 4}],
        },
        "train": {"steps": 2, "seed": 0},
        "rollout": {"prompts_per_step": 4, "completions_per_prompt": 4, "max_new_tokens": 24},
        "update": {"learning_rate": 1e-3},
        "evaluate": {"samples": 2, "max_new_tokens": 24, "bootstrap": 50},
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    return configs.parse(values)


@contextmanager
def small_files(limit):
    """A real failure in the middle of writing: no file may grow beyond `limit` bytes."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def child_processes() -> set[int]:
    """Child processes that run, apart from multiprocessing's resource tracker."""
    found = [child for child in psutil.Process().children(recursive=True) if child.is_running()]
    return {child.pid for child in found if "resource_tracker" not in " ".join(child.cmdline())}


OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}


def equations_hold(way: str) -> None:
    """Every a+b=c in a derivation, worked out again."""
    for left, right in re.findall(r"([\d+*/-]+)=(\d+)", way):
        first, *rest = re.split(r"([+*/-])", left)
        value = float(first)
        for sign, term in zip(rest[::2], map(float, rest[1::2]), strict=True):
            value = OPERATORS[sign](value, term)
        assert value == float(right), way
