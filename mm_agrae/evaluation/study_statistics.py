"""What the records of a study say: means, paired differences with intervals, and what happened in training.

Shapes: S seeds, P problems.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mm_agrae.errors import RunFolderError
from mm_agrae.evaluation.statistics import pass_at_k
from mm_agrae.evaluation.study import START, Run, Study
from mm_agrae.run.files import to_json, write_atomic

FEWEST_SEEDS = 10
"""With fewer pairs no difference is called one."""
LEVEL = 0.05
RESAMPLES = 10_000
COLLAPSE, WINDOW = 0.25, 10
"""A run has collapsed if its share of prompts without a correct completion, averaged over WINDOW steps, rises by
COLLAPSE above the lowest such average before."""

Record = Mapping[str, Any]


@dataclass
class StudyData:
    """What `study.json` says, and the records of its runs, `data/*.json` of this study and those beside it."""

    about: dict[str, Any]
    runs: dict[str, dict[int | None, Record]]
    """Arm -> seed -> record."""
    other: int = 0
    """Records in its own folder of other settings than those in study.json, which are left out."""

    @property
    def start(self) -> Record | None:
        return self.runs.get(START, {}).get(None)

    @property
    def records(self) -> list[Record]:
        return [record for runs in self.runs.values() for record in runs.values()]

    @property
    def arms(self) -> list[str]:
        """Those with records, in the order of the study."""
        return [arm for arm in self.about["arms"] if arm in self.runs]

    @property
    def labels(self) -> list[str]:
        return list(self.records[0]["evaluations"]) if self.runs else []

    def ks(self, label: str) -> list[int]:
        least = min(record["evaluations"][label]["samples"] for record in self.records)
        return [k for k in sorted(self.about["ks"]) if k <= least] or [1]

    def main_ks(self, label: str) -> list[int]:
        return [k for k in self.ks(label) if k in self.about["main_ks"]]

    def metrics(self, label: str) -> list[int | str]:
        """The k of pass@k, and "greedy"."""
        return [*self.ks(label), "greedy"]


def write_about(study: Study, runs: Sequence[Run], folder: Path) -> None:
    """Write study.json: what is needed beside the records to make the tables again."""
    about = {
        "name": folder.name,
        "title": study.title,
        "question": study.question,
        "config": study.config,
        "settings": list(study.settings),
        "arms": {arm: list(settings) for arm, settings in study.arms.items()},
        "against": {arm: study.compared_with(arm) for arm in study.arms},
        "ks": list(study.ks),
        "main_ks": list(study.main_ks),
        "evaluate": [source.model_dump(exclude_unset=True) for source in study.evaluate],
        "runs": [[run.arm, run.seed, run.digest] for run in runs],
    }
    write_atomic(folder / "study.json", to_json(about, indent=1) + "\n")


def read_study(folder: Path) -> StudyData:
    """Raises RunFolderError for a file that is damaged, or records of one study on other problems."""
    about = read_record(folder / "study.json")
    try:
        wanted = {digest for _, _, digest in about["runs"]}
    except (KeyError, ValueError):
        raise RunFolderError(f"{folder}/study.json is of another version; run the study anew (records stay)") from None
    paths = [(path.stem.split("-")[-2], path) for path in folder.parent.glob("*/data/*-*-*.json")]
    records = [read_record(path) for digest, path in paths if digest in wanted]
    records.sort(key=lambda record: record["versions"].get("created", ""))
    of_digest = {record["config"]: record for record in records}  # the latest, if several codes made it
    data = StudyData(about, {}, sum(path.parent.parent == folder and digest not in wanted for digest, path in paths))
    for arm, seed, digest in about["runs"]:
        if digest in of_digest:
            data.runs.setdefault(arm, {})[seed] = of_digest[digest] | {"arm": arm}
    for label in data.labels:
        if len({record["evaluations"][label]["problems"] for record in data.records}) > 1:
            raise RunFolderError(f"{folder}: the records hold different problems of {label}; delete those of one kind")
    return data


def read_record(path: Path) -> dict[str, Any]:
    """One of a study's JSON files. Raises RunFolderError."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise RunFolderError(f"{path}: cannot be read ({error}); delete it, and the study makes it again") from None


def values_P(record: Record, label: str, k: int | str) -> np.ndarray:
    """pass@k of each problem, or with "greedy" whether it was solved greedily."""
    found = record["evaluations"][label]
    if k == "greedy":
        return np.array(found["greedy"], dtype=float)
    return pass_at_k(found["samples"], np.array(found["correct"]), int(k))


# ------------------------------------------------------------------------------- differences


@dataclass(frozen=True)
class Difference:
    """A mean difference with its 95 % interval, the two-sided p-value, seeds paired, and those with a gain.

    `adjusted` is Holm's p-value among the main differences of a study; None for one that is none of them.
    """

    mean: float
    low: float
    high: float
    p: float
    seeds: int
    ahead: int
    adjusted: float | None = None

    @property
    def verdict(self) -> str:
        """Empty if it is no main difference."""
        if self.adjusted is None:
            return ""
        return ("more" if self.mean > 0 else "less") if self.adjusted < LEVEL else "cannot tell"


def difference(gain_SP: np.ndarray, resamples: int = RESAMPLES, seed: int = 0) -> Difference:
    """Mean of gains, paired by seed and problem, with a bootstrap over seeds and problems at once.

    Both are drawn independently, as the question is how it would be with other seeds on other problems. That counts
    chance in single cells thrice, and few seeds not enough: the resamples are spread about their mean to the unbiased
    variance of a crossed design, and by what Student's t of S − 1 degrees of freedom has over the normal distribution.
    The interval is symmetric (Hall 1988): of few gains, all of one sign, no resample lies on the other side.
    Of one seed or one problem the interval is unbounded.
    """
    (seeds, problems), mean, ahead = gain_SP.shape, float(gain_SP.mean()), int((gain_SP.mean(1) > 1e-12).sum())
    if min(seeds, problems) < 2:
        return Difference(mean, -math.inf, math.inf, 1.0, seeds, ahead)
    generator = np.random.default_rng(seed)
    seeds_BS = generator.multinomial(seeds, np.full(seeds, 1 / seeds), resamples) / seeds
    problems_BP = generator.multinomial(problems, np.full(problems, 1 / problems), resamples) / problems
    off_B = ((seeds_BS @ gain_SP) * problems_BP).sum(1) - mean
    if (spread := math.sqrt((off_B**2).mean())) > 1e-12:
        off_B *= math.sqrt(_variance(gain_SP)) / spread * student_quantile(seeds - 1) / 1.959964
    half = float(np.percentile(np.abs(off_B), 95))
    beyond = int((np.abs(off_B) >= abs(mean) - 1e-12).sum())
    return Difference(mean, mean - half, mean + half, (beyond + 1) / (resamples + 1), seeds, ahead)


def _variance(gain_SP: np.ndarray) -> float:
    """Of the mean of a table whose rows and columns are both drawn at random: (MS_S + MS_P − MS_rest) / SP."""
    seeds, problems = gain_SP.shape
    mean_S, mean_P = gain_SP.mean(1), gain_SP.mean(0)
    rest_SP = gain_SP - mean_S[:, None] - mean_P + gain_SP.mean()
    rest = (rest_SP**2).sum() / ((seeds - 1) * (problems - 1))
    by_seed, by_problem = problems * mean_S.var(ddof=1), seeds * mean_P.var(ddof=1)
    return float(max(by_seed, by_problem, by_seed + by_problem - rest)) / gain_SP.size


def student_quantile(freedom: int) -> float:
    """The 97.5 % quantile of Student's t (Cornish and Fisher's series; exact for one and two degrees of freedom)."""
    if freedom < 3:
        return {1: 12.7062, 2: 4.30265}[freedom]
    z = 1.959964
    terms = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + sum(term / freedom**power for power, term in enumerate(terms, 1))


def holm(ps: Sequence[float]) -> list[float]:
    """p-values adjusted for their number (Holm 1979), in the order given."""
    adjusted, highest = [0.0] * len(ps), 0.0
    for rank, index in enumerate(sorted(range(len(ps)), key=lambda index: ps[index])):
        highest = max(highest, min(1.0, (len(ps) - rank) * ps[index]))
        adjusted[index] = highest
    return adjusted


def differences(data: StudyData) -> dict[tuple[str, str, int | str], Difference]:
    """(arm, label, k or "greedy") -> its difference from the arm it is compared with, over the seeds both have.

    Main differences are those of `main_ks` with FEWEST_SEEDS or more; their p-values are adjusted together.
    """
    found: dict[tuple[str, str, int | str], Difference] = {}
    main = list[tuple[str, str, int | str]]()
    for arm in data.arms:
        own, other = data.runs[arm], data.runs.get(data.about["against"][arm], {})
        seeds = sorted(seed for seed in own.keys() & other.keys() if seed is not None)
        if arm == data.about["against"][arm] or not seeds:
            continue
        for label, k in ((of, k) for of in data.labels for k in data.metrics(of)):
            gains = [values_P(own[seed], label, k) - values_P(other[seed], label, k) for seed in seeds]
            if np.isfinite(gains).all():  # else there was no greedy decoding
                found[arm, label, k] = difference(np.array(gains))
                main += [(arm, label, k)] * (k in data.main_ks(label) and len(seeds) >= FEWEST_SEEDS)
    for key, p in zip(main, holm([found[key].p for key in main]), strict=True):
        found[key] = replace(found[key], adjusted=p)
    return found


# ------------------------------------------------------------------------------- what happened in training


def share_below_alpha(record: Record) -> float | None:
    """Share of the steps in which A-GRAE's group level acted, ω < α; None for a rule without that level."""
    if record["alpha"] is None or "omega" not in record["curves"]:
        return None
    return float((np.array(record["curves"]["omega"], dtype=float) < record["alpha"]).mean())


def collapse(record: Record) -> int | None:
    """The step, from 1 on, at which prompts without any correct completion had risen by COLLAPSE; None: never."""
    unsolved = np.array(record["curves"].get("unsolved", ()), dtype=float)
    if len(unsolved) < WINDOW:
        return None
    means = np.convolve(unsolved, np.full(WINDOW, 1 / WINDOW), "valid")
    risen = np.flatnonzero(means - np.minimum.accumulate(means) > COLLAPSE)
    return int(risen[0]) + WINDOW if len(risen) else None


def never_sampled(record: Record, start: Record | None, label: str) -> tuple[int, float, float] | None:
    """How likely answers are that a run never saw: problems it drew and never solved, and the probability of a correct
    answer to them before and after training. None if the set holds no problems that the run drew.

    Those probabilities are shares of all samples of an evaluation on training problems, so they need many samples.
    """
    found = record["evaluations"][label]
    if start is None or "drawn" not in found:
        return None
    never_P = (np.array(found["drawn"]) > 0) & (np.array(found["solved"]) == 0)
    if not never_P.any():
        return 0, math.nan, math.nan
    before, after = (values_P(each, label, 1)[never_P].mean() for each in (start, record))
    return int(never_P.sum()), float(before), float(after)


def success_at(record: Record, cpu_seconds: float) -> float:
    """Share of correct training completions, over the WINDOW steps that end by so many CPU-seconds of training."""
    until = np.searchsorted(record["curves"]["cpu_seconds"], cpu_seconds, "right")
    return float(np.mean(record["curves"]["success"][max(0, until - WINDOW) : max(1, until)]))
