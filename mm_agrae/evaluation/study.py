"""A study: arms × seeds of one config, every run trained once and kept as a small file of figures.

`Study` is the file that describes one, `runs_of` its runs, `record_of` what is kept of one. A run is known by two
digests: of its resolved config with the weights it starts from, and of the code that trains. A changed config or
other code makes another run.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
from mm_agrae.run.problems import ProblemSuccess, problem_success
from mm_agrae.run.records import EvaluationResult

START = "before training"
"""The arm that holds the model all runs start from, evaluated once."""
NOT_TRAINING = re.compile(
    r"(view|adapters)/|run/claim|evaluation/(study|alignment|difficulty|prepare|paired)|(cli|doctor)\.py"
)
"""Files that no figure of a run depends on."""
CURVES = {
    "success": "success/mean",
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
    """Name -> what is laid over that for this arm. null leaves out an arm of the file below."""
    against: dict[str, str] = Field(default={})
    """Arm -> the arm that it is compared with. Not named: the first."""
    seeds: tuple[int, ...] = Field(min_length=1)
    evaluate: tuple[DataSource, ...] = ()
    """Sets that every run is evaluated on; empty: those of the config. The first is the main one."""
    ks: tuple[PositiveInt, ...] = (1, 4, 16, 64, 256)
    """k of pass@k in tables; those above the number of samples are left out."""
    main_ks: tuple[PositiveInt, ...] = (1, 16, 256)
    """Those of them on whose differences a verdict is given."""
    quick: Quick = Quick()

    @model_validator(mode="after")
    def _check(self) -> Study:
        if START in self.arms:
            raise ValueError(f"arms: {START!r} is the name of the model before training; choose another")
        for name in (*self.against, *self.against.values(), *self.quick.arms):
            if name not in self.arms:
                raise ValueError(f"arm {name!r} is not in arms; {nearest(name, self.arms)}")
        return self

    def compared_with(self, arm: str) -> str:
        return self.against.get(arm, next(iter(self.arms)))


def load(path: str | Path, *, quick: bool = False, overrides: Sequence[str] = ()) -> Study:
    """Read a study file. `overrides` are laid over every run. Raises ConfigError."""
    values = configs.read(config_file(path))
    if isinstance(values.get("arms"), dict):
        values["arms"] = {name: own for name, own in values["arms"].items() if own is not None}
    study = configs.parse_as(Study, values, str(path))
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


def runs_of(study: Study) -> list[Run]:
    """Every run, the model before training first, then seed by seed. Raises ConfigError for what cannot be run."""
    sets = {"data": {"evaluate": [source.model_dump(exclude_unset=True) for source in study.evaluate]}}
    first: list[str | Mapping[str, Any]] = [sets if study.evaluate else {}, {"evaluate": {"before": False}}]
    runs = []
    grid = [(None, START, ()), *((seed, *arm) for seed in study.seeds for arm in study.arms.items())]
    for seed, arm, own in grid:
        settings = (*study.settings, *own)
        config = configs.load(study.config, [*first, *settings, {"run_dir": "-", "train": {"seed": seed or 0}}])
        if not (config.data.evaluate and config.evaluate.after):
            raise ConfigError(f"study, arm {arm!r}: it needs data to evaluate on (evaluate), and evaluate.after=true")
        runs.append(Run(arm, seed, settings, config, _digest_of(config, trained=seed is not None)))
    return runs


def choose(runs: Sequence[Run], arms: Sequence[str] | None, seeds: Sequence[int] | None) -> list[Run]:
    """The model before training, and runs of some arms and seeds (None: all). Raises ConfigError for a wrong one."""
    for option, given, valid in (("arms", arms, {r.arm for r in runs}), ("seeds", seeds, {r.seed for r in runs})):
        for each in given or ():
            if each not in valid:
                raise ConfigError(f"--{option} {each}: not in the study; {nearest(str(each), map(str, valid))}")
    return [r for r in runs if r.seed is None or (r.arm in (arms or [r.arm]) and r.seed in (seeds or [r.seed]))]


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


def code() -> str:
    """Digest of the source files that the figures of a run depend on."""
    files = {str(path.relative_to(PACKAGE)): path for path in sorted(PACKAGE.rglob("*.py"))}
    return _digest(*(path.read_bytes() for name, path in files.items() if not NOT_TRAINING.match(name)))


def _digest(*contents: bytes) -> str:
    return hashlib.sha256(b"".join(hashlib.sha256(content).digest() for content in contents)).hexdigest()[:10]


def write_record(record: Mapping[str, Any], path: Path) -> None:
    lines = (f"{json.dumps(name)}: {to_json(value)}" for name, value in record.items())
    write_atomic(path, "{" + ",\n".join(lines) + "}\n")


def record_of(run: Run, folder: RunFolder, code: str) -> dict[str, Any]:
    """What is kept of a run: per problem how many samples were correct, curves, times, versions."""
    metrics, summary = folder.read_metrics(), folder.read_summary()
    total, *others = (
        [row.get(f"cpu_seconds/{of}", 0.0) for row in metrics] for of in ("total", "evaluate", "checkpoint")
    )
    curves = {name: [_short(row.get(key)) for row in metrics] for name, key in CURVES.items()}
    curves["cpu_seconds"] = np.round(np.cumsum(np.array(total) - np.sum(others, axis=0)), 1).tolist()
    results = [each for each in folder.read_evaluations() if run.seed is None or each.name == "after"]
    drawn = {} if run.seed is None or not folder.rollout_steps() else problem_success(folder.path)
    return {
        "arm": run.arm,
        "seed": run.seed,
        "config": run.digest,
        "code": code,
        "settings": list(run.settings),
        "alpha": _alpha(run.config),
        "seconds": _short(summary.get("seconds", {}).get("total") or sum(result.seconds for result in results)),
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


def _evaluation(folder: RunFolder, result: EvaluationResult, drawn: Mapping[str, ProblemSuccess]) -> dict[str, Any]:
    correct: dict[str, int] = {}
    greedy: dict[str, int] = {}
    for row in folder.read_samples(result):
        counts, key = greedy if row["sample"] == -1 else correct, row["example_id"]
        counts[key] = counts.get(key, 0) + bool(row["success"])
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
        known = [drawn.get(key, ProblemSuccess(key)) for key in correct]
        record["drawn"] = [each.completions.total() for each in known]
        record["solved"] = [each.correct.total() for each in known]
    return record


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")
