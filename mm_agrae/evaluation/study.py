"""A study: arms × seeds of one config, every run trained once and kept as a small file of figures.

`Study` is the file that describes one, `runs_of` its runs, `record_of` what is kept of one. Which run it was is told
by two digests: `config` of the resolved config and the weights it starts from, `code` of the code that trains. A run
whose record is there is not done again; a changed config or other code makes another run.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field, model_validator

from mm_agrae import config as configs
from mm_agrae.config import Config, DataSource
from mm_agrae.config.section import PositiveInt, Section
from mm_agrae.config.shipped import PACKAGE, config_file
from mm_agrae.errors import ConfigError, nearest
from mm_agrae.run.files import to_json, write_atomic
from mm_agrae.run.folder import RunFolder
from mm_agrae.run.problems import problem_success
from mm_agrae.run.records import EvaluationResult

START = "before training"
"""The arm that holds the model all runs start from, evaluated once."""
NOT_TRAINING = re.compile(r"(view|adapters)/|evaluation/(study|alignment|difficulty|prepare|paired)|(cli|doctor)\.py")
"""Files that no figure of a run depends on."""
CURVES = {
    "success": "success/mean",
    "reward": "reward/mean",
    "omega": "advantage/omega",
    "entropy": "policy/entropy",
    "unsolved": "groups/all_incorrect",
}
"""Name in a record -> the metric kept of every step. `cpu_seconds`, added up, stands beside them."""


class Quick(Section):
    """What --quick makes of a study."""

    arms: tuple[str, ...] = ()
    """Empty: all."""
    seeds: tuple[int, ...] = ()
    settings: tuple[str, ...] = ()


class Study(Section):
    """A study file. `base` names another study file that it is laid over, as in configs."""

    title: str
    question: str = ""
    """What it is to answer, in a sentence or two for the page."""
    config: str
    """The config of every run: a path, or the name of a shipped one."""
    settings: tuple[str, ...] = ()
    """Laid over it, as on the command line: key=value, files, or names of shipped ones."""
    arms: dict[str, tuple[str, ...]] = Field(min_length=1)
    """Name -> what is laid over that for this arm."""
    vary: dict[str, tuple[Any, ...]] = {}
    """Setting -> values: every arm is run with each, as arms of their own."""
    against: dict[str, str] = {}
    """Arm -> the arm that it is compared with. Not named: the first."""
    seeds: tuple[int, ...] = Field(min_length=1)
    evaluate: tuple[DataSource, ...] = ()
    """Sets that every run is evaluated on; empty: those of the config. The first is the main one."""
    ks: tuple[PositiveInt, ...] = (1, 4, 16, 64, 256)
    """k of pass@k in tables; those above the number of samples are left out. Least and greatest count as main ones."""
    quick: Quick = Quick()

    @model_validator(mode="after")
    def _check(self) -> Study:
        if START in self.arms:
            raise ValueError(f"arms: {START!r} is the name of the model before training; choose another")
        for name in (*self.against, *self.against.values(), *self.quick.arms):
            if name not in self.arms:
                raise ValueError(f"arm {name!r} is not in arms; {nearest(name, self.arms)}")
        return self

    def all_arms(self) -> dict[str, tuple[str, ...]]:
        """Name -> settings, with those that `vary` makes."""
        grid = [[f"{key}={value}" for value in values] for key, values in self.vary.items()]
        return {
            ", ".join([arm, *(each.rpartition(".")[2] for each in cell)]): (*settings, *cell)
            for arm, settings in self.arms.items()
            for cell in itertools.product(*grid)
        }

    def compared_with(self, arm: str) -> str:
        own, comma, rest = arm.partition(", ")
        return f"{self.against.get(own, next(iter(self.arms)))}{comma}{rest}"


def load(path: str | Path, *, quick: bool = False, overrides: Sequence[str] = ()) -> Study:
    """Read a study file. `overrides` are laid over every run. Raises ConfigError."""
    study = configs.parse_as(Study, configs.read(config_file(path)), str(path))
    if quick:
        arms = {name: study.arms[name] for name in study.quick.arms or study.arms}
        against = {arm: other for arm, other in study.against.items() if {arm, other} <= arms.keys()}
        few = {"arms": arms, "against": against, "seeds": study.quick.seeds or study.seeds}
        study = study.model_copy(update={**few, "settings": (*study.settings, *study.quick.settings)})
    return study.model_copy(update={"settings": (*study.settings, *overrides)})


@dataclass(frozen=True)
class Run:
    """One run of a study. `seed` is None for the model before training."""

    arm: str
    seed: int | None
    settings: tuple[str, ...]
    config: Config
    digest: str

    @property
    def name(self) -> str:
        """Distinct among all runs of a study, and fit for a file."""
        seed = "" if self.seed is None else f"-seed{self.seed}"
        return f"{re.sub('[^a-z0-9.=]+', '_', self.arm.lower())}{seed}-{self.digest}"

    @property
    def title(self) -> str:
        return self.arm if self.seed is None else f"{self.arm}, seed {self.seed}"


def runs_of(study: Study, work: Path) -> list[Run]:
    """Every run, the model before training first, then seed by seed. Raises ConfigError for what cannot be run."""
    arms = study.all_arms()
    runs = []
    for seed, (arm, settings) in itertools.product((None, *study.seeds), ((START, ()), *arms.items())):
        if (seed is None) != (arm == START):
            continue
        layers: list[str | Mapping[str, Any]] = [{"evaluate": {"before": False}}, *study.settings, *settings]
        if study.evaluate:
            layers.insert(0, {"data": {"evaluate": [source.model_dump(exclude_unset=True) for source in study.evaluate]}})
        layers.append({"run_dir": "-", "train": {"seed": seed or 0}})
        config = configs.load(study.config, layers)
        if not config.data.evaluate or not config.evaluate.after:
            raise ConfigError(f"study, arm {arm!r}: it needs evaluate, or data.evaluate in its config, and evaluate.after")
        run = Run(arm, seed, (*study.settings, *settings), config, _digest_of(config, trained=seed is not None))
        runs.append(replace(run, config=config.model_copy(update={"run_dir": str(work / run.name)})))
    return runs


def choose(runs: Sequence[Run], arms: Sequence[str] | None, seeds: Sequence[int] | None) -> list[Run]:
    """The model before training and the runs of some arms and seeds (None: all). Raises ConfigError for a wrong name."""
    for option, given, valid in (("arms", arms, {r.arm for r in runs}), ("seeds", seeds, {r.seed for r in runs})):
        if unknown := [each for each in given or () if each not in valid]:
            raise ConfigError(f"--{option} {unknown[0]}: not in the study; {nearest(str(unknown[0]), map(str, valid))}")
    trained = (run for run in runs if run.seed is not None)
    wanted = [r for r in trained if (not arms or r.arm in arms) and (not seeds or r.seed in seeds)]
    return [*(run for run in runs if run.seed is None), *wanted]


def _digest_of(config: Config, trained: bool) -> str:
    """Of the settings that a run's figures depend on, and of the weights it starts from."""
    values = configs.public(config)
    if not trained:
        values = {name: values[name] for name in ("model", "data", "prompt", "reward", "evaluate")}
        values["data"] = values["data"]["evaluate"]
    values |= {"run_dir": "", "model": {**values["model"], "path": _weights(config.model.path)}}
    return _digest(to_json(values).encode())


@cache
def _weights(path: str) -> str:
    files = sorted(Path(path).glob("*.safetensors"))
    return _digest(*(file.read_bytes() for file in files)) if files else path


@cache
def code() -> str:
    """Digest of the source files that the figures of a run depend on."""
    files = {str(path.relative_to(PACKAGE)): path for path in sorted(PACKAGE.rglob("*.py"))}
    return _digest(*(path.read_bytes() for name, path in files.items() if not NOT_TRAINING.match(name)))


def _digest(*contents: bytes) -> str:
    return hashlib.sha256(b"".join(hashlib.sha256(content).digest() for content in contents)).hexdigest()[:10]


def record_path(run: Run, data: Path, *, any_code: bool = False) -> Path | None:
    """The record of a run, if there is one; `any_code`: also one that other code has made."""
    found = sorted(data.glob(f"{run.name}-{'*' if any_code else code()}.json"))
    return found[-1] if found else None


def write_record(run: Run, folder: RunFolder, data: Path) -> Path:
    """Keep the figures of a finished run."""
    path = data / f"{run.name}-{code()}.json"
    # One line for each list of figures: small, and a change can be read.
    text = json.dumps(record_of(run, folder), ensure_ascii=False, indent=1)
    text = re.sub(r"\[[^\[\]{}]*\]", lambda found: " ".join(found[0].split()), text)
    write_atomic(path, text + "\n")
    return path


def record_of(run: Run, folder: RunFolder) -> dict[str, Any]:
    """What is kept of a run: per problem how many samples were correct, curves, times, versions."""
    metrics, summary = folder.read_metrics(), folder.read_summary()
    seconds = [
        row.get("cpu_seconds/total", 0) - row.get("cpu_seconds/evaluate", 0) - row.get("cpu_seconds/checkpoint", 0)
        for row in metrics
    ]
    curves = {name: [_short(row.get(key)) for row in metrics] for name, key in CURVES.items()}
    curves["cpu_seconds"] = [round(float(total), 1) for total in np.cumsum(seconds)]
    results = [each for each in folder.read_evaluations() if run.seed is None or each.name == "after"]
    drawn = {} if run.seed is None or not folder.rollout_steps() else problem_success(folder.path)
    return {
        "arm": run.arm,
        "seed": run.seed,
        "config": run.digest,
        "code": code(),
        "settings": list(run.settings),
        "alpha": _alpha(run.config),
        "seconds": _short(summary.get("seconds", {}).get("total") or sum(result.seconds for result in results)),
        "peak_memory_mb": _short(summary.get("peak_memory_mb")),
        "warnings": summary.get("warnings", {}),
        "versions": folder.read_versions(),
        "evaluations": {result.label: _evaluation(folder, result, drawn) for result in results},
        "curves": {name: values for name, values in curves.items() if any(value is not None for value in values)},
    }


def _alpha(config: Config) -> float | None:
    """The ω below which A-GRAE's group level acts; None without that level."""
    rule, settings = config.advantage.rule, config.advantage.settings
    agrae = rule in ("agrae", "agrae_released_code") or settings.get("base") == "agrae"
    return settings.get("alpha", 1.0) if agrae and settings.get("group_level", True) else None


def _evaluation(folder: RunFolder, result: EvaluationResult, drawn: Mapping[str, Any]) -> dict[str, Any]:
    correct: dict[str, int] = {}
    greedy: dict[str, int] = {}
    for row in folder.read_samples(result):
        counts = greedy if row["sample"] == -1 else correct
        counts[row["example_id"]] = counts.get(row["example_id"], 0) + bool(row["success"])
    record = {
        "samples": result.samples,
        "problems": _digest(*(key.encode() for key in correct)),
        "correct": list(correct.values()),
        "greedy": [greedy[key] for key in correct] if greedy else None,
        "entropy": _short(result.entropy),
        "mean_tokens": _short(result.mean_tokens),
        "truncated": _short(result.truncated),
        "parts": {name: _short(part.correct) for name, part in result.parts.items() if name != "accuracy"},
        "families": {
            name: [group.problems, *(_short(each.mean) for each in group.pass_at_k.values())]
            for name, group in result.groups.get("family", {}).items()
        },
    }
    if drawn.keys() & correct.keys():  # problems of the training set: how often a run sampled and solved them
        none = [0, 0]
        counts_of = {key: [found.completions.total(), found.correct.total()] for key, found in drawn.items()}
        record["drawn"], record["solved"] = (list(each) for each in zip(*(counts_of.get(key, none) for key in correct)))
    return record


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")
