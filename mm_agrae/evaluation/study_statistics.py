"""What the records of a study say: means, paired differences with intervals, and what happened in training.

Shapes: S seeds, P problems.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
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
    """A study's records as they lie in its folder: `study.json`, and `data/*.json`."""

    about: dict[str, Any]
    runs: dict[str, dict[int | None, Record]]
    """Arm -> seed -> record."""
    codes: set[str] = field(default_factory=set)
    other: int = 0
    """Records of other settings than those in study.json, which are left out."""

    @property
    def start(self) -> Record | None:
        return self.runs.get(START, {}).get(None)

    @property
    def arms(self) -> list[str]:
        """Those with records, in the order of the study."""
        return [arm for arm in self.about["arms"] if self.runs.get(arm)]

    @property
    def labels(self) -> list[str]:
        return list(next((r["evaluations"] for runs in self.runs.values() for r in runs.values()), {}))

    def ks(self, label: str) -> list[int]:
        samples = (r["evaluations"][label]["samples"] for runs in self.runs.values() for r in runs.values())
        least = min(samples, default=0)
        return [k for k in sorted(self.about["ks"]) if k <= least]

    def missing(self) -> list[str]:
        """Runs of the study without a record."""
        held = {record["config"] for runs in self.runs.values() for record in runs.values()}
        return [title for title, digest in self.about["runs"].items() if digest not in held]


def write_about(study: Study, name: str, runs: Sequence[Run], folder: Path) -> None:
    """Write study.json: what is needed beside the records to make the tables again."""
    about = {
        "name": name,
        "title": study.title,
        "question": study.question,
        "config": study.config,
        "settings": list(study.settings),
        "arms": {arm: list(settings) for arm, settings in study.all_arms().items()},
        "against": {arm: study.compared_with(arm) for arm in study.all_arms()},
        "ks": list(study.ks),
        "evaluate": [source.model_dump(exclude_unset=True) for source in study.evaluate],
        "runs": {run.title: run.digest for run in runs},
    }
    write_atomic(folder / "study.json", to_json(about, indent=1) + "\n")


def read_study(folder: Path) -> StudyData:
    """Raises RunFolderError for a file that is damaged, or records of one study on other problems."""
    about = read_record(folder / "study.json")
    data = StudyData(about, {})
    wanted = set(about["runs"].values())
    for record in sorted(map(read_record, (folder / "data").glob("*.json")), key=lambda r: r["versions"].get("created", "")):
        if record["config"] not in wanted:
            data.other += 1
            continue
        data.codes.add(record["code"])
        data.runs.setdefault(record["arm"], {})[record["seed"]] = record  # the latest, if several codes made it
    for label in data.labels:
        records = [record for runs in data.runs.values() for record in runs.values()]
        if len({record["evaluations"][label]["problems"] for record in records}) > 1:
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

    `adjusted` is Holm's p-value among all main differences of a study; None for one that is none of them.
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
        if self.adjusted is None:
            return ""
        if self.seeds < FEWEST_SEEDS:
            return "too few seeds"
        return ("more" if self.mean > 0 else "less") if self.adjusted < LEVEL else "cannot tell"


def difference(gain_SP: np.ndarray, resamples: int = RESAMPLES, seed: int = 0) -> Difference:
    """Mean of gains, paired by seed and problem, with a bootstrap over seeds and problems at once.

    Seeds and problems are drawn independently, as the question is how it would be with other seeds on other problems.
    Few seeds make a bootstrap too narrow by √((S−1)/S) and by what Student's t has over the normal distribution; the
    resamples are spread about their mean by both (Hesterberg 2014, "expanded"). Of one seed the interval is
    unbounded.
    """
    seeds, problems = gain_SP.shape
    mean = float(gain_SP.mean())
    ahead = int((gain_SP.mean(1) > 1e-12).sum())
    if seeds < 2:
        return Difference(mean, -math.inf, math.inf, 1.0, seeds, ahead)
    generator = np.random.default_rng(seed)
    seeds_BS = generator.multinomial(seeds, np.full(seeds, 1 / seeds), resamples) / seeds
    problems_BP = generator.multinomial(problems, np.full(problems, 1 / problems), resamples) / problems
    means_B = ((seeds_BS @ gain_SP) * problems_BP).sum(1)
    means_B = mean + (means_B - mean) * math.sqrt(seeds / (seeds - 1)) * student_quantile(seeds - 1) / 1.959964
    low, high = np.percentile(means_B, [2.5, 97.5])
    tail = min((means_B <= 0).sum(), (means_B >= 0).sum())
    return Difference(mean, float(low), float(high), min(1.0, 2 * (tail + 1) / (resamples + 1)), seeds, ahead)


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

    The least and the greatest k of every set are the main differences; their p-values are adjusted together.
    """
    found: dict[tuple[str, str, int | str], Difference] = {}
    main = []
    for arm in data.arms:
        own, other = data.runs[arm], data.runs.get(data.about["against"][arm], {})
        seeds = sorted(seed for seed in own.keys() & other.keys() if seed is not None)
        if arm == data.about["against"][arm] or not seeds:
            continue
        for label in data.labels:
            ks = data.ks(label)
            greedy = [] if own[seeds[0]]["evaluations"][label]["greedy"] is None else ["greedy"]
            for k in (*ks, *greedy):
                gains = [values_P(own[seed], label, k) - values_P(other[seed], label, k) for seed in seeds]
                found[arm, label, k] = difference(np.array(gains))
                if k in (ks[0], ks[-1]):
                    main.append((arm, label, k))
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


def mean_and_spread(values: Iterable[float | None]) -> tuple[float, float | None] | None:
    """Mean and standard deviation (ddof 1; None of one value) of what is known; None if nothing is."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    if not known:
        return None
    return float(np.mean(known)), float(np.std(known, ddof=1)) if len(known) > 1 else None
