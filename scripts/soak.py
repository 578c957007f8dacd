#!/usr/bin/env python
"""Train small steps for an hour and watch for leaks of memory, file handles and threads.

    python scripts/soak.py --minutes 60

A real run in this process: images, rollouts, rewards in worker processes, checkpoints written in
the background every few steps, occasional evaluations, all records kept. After each step it records
the process's own memory (resident and not backed by a file, which is what a leak fills), all
resident memory, the proportional memory of the process and its workers (PSS), open file handles and
threads. A leak shows in the lowest values, so each window of some steps counts by its minimum.
Written are OUT.json, OUT.png, and a line per quantity: its growth per hour, a straight line fitted
after the warm-up, with a 95 % interval by a bootstrap of blocks of residuals (neighbouring windows
are correlated). Status 1 if the process's own memory grows by more than --limit MB per hour, that
is if the whole interval lies above, or if handles or threads grow.

Resident memory falls by itself when other programs need memory: the system then drops pages of
files, such as those of libraries.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from array import array
from pathlib import Path

import numpy as np
import psutil

from mm_agrae import config as configs
from mm_agrae.progress import Reporter
from mm_agrae.trainer import Trainer

ROOT = Path(__file__).parent.parent
COLUMNS = ("seconds", "own_mb", "rss_mb", "pss_mb", "handles", "threads", "processes")
WINDOWS = 100


class Watched(Trainer):
    """A trainer that records its memory after each step, and ends when time is up."""

    # Eight bytes a number, so that the records themselves hardly grow.
    samples: array[float]
    end: float

    def step(self) -> dict[str, float]:
        values = super().step()
        self.samples.extend(self._sample())
        if time.monotonic() > self.end:
            self.stop.requested = True
        if self.steps_done % 500 == 0:
            seconds, *rest = self.samples[-len(COLUMNS) :]
            print(f"step {self.steps_done} {seconds:.0f} s", *(f"{value:.1f}" for value in rest))
            sys.stdout.flush()
        return values

    def _sample(self) -> tuple[float, ...]:
        own = psutil.Process()
        pss, handles, threads, processes = 0, 0, 0, 0
        for process in [own, *own.children(recursive=True)]:
            try:
                pss += process.memory_full_info().pss
                handles += process.num_fds()
                threads += process.num_threads()
                processes += 1
            except psutil.Error:  # a worker that is just exiting
                continue
        memory, megabyte = own.memory_full_info(), 2**20
        return (
            time.monotonic(), (memory.rss - memory.shared + memory.swap) / megabyte,
            memory.rss / megabyte, pss / megabyte, handles, threads, processes,
        )  # fmt: skip


def run_config(run_dir: Path, model: Path) -> configs.Config:
    modality = "image" if model.name == "vl" else "text"
    source = {"task": "synthetic", "modality": modality}
    values = {
        "run_dir": str(run_dir),
        "model": {"path": str(model), "device": "cpu"},
        "data": {
            "train": [source | {"split": "train"}],
            "evaluate": [source | {"split": "test", "name": "test", "limit": 4}],
        },
        "train": {"steps": 1_000_000},
        "rollout": {"prompts_per_step": 2, "completions_per_prompt": 4, "max_new_tokens": 16},
        "update": {"learning_rate": 1e-6},
        "evaluate": {
            "samples": 2, "max_new_tokens": 16, "bootstrap": 50, "every": 50,
            "before": False, "after": False,
        },
        "checkpoint": {"every": 10, "keep": 2, "best": "test/pass@1", "background": True},
    }  # fmt: skip
    return configs.parse(values)


def slope(x: np.ndarray, y: np.ndarray, blocks: int = 20, resamples: int = 2000) -> list[float]:
    """Slope of the line through (x, y) and its 95 % interval by a moving-block bootstrap."""
    fit = np.polyfit(x, y, 1)
    line = np.polyval(fit, x)
    residuals = y - line
    length = max(1, len(x) // blocks)
    random = np.random.default_rng(0)
    slopes = []
    for _ in range(resamples):
        starts = random.integers(0, len(x) - length + 1, -(-len(x) // length))
        drawn = np.concatenate([residuals[start : start + length] for start in starts])[: len(x)]
        slopes.append(np.polyfit(x, line + drawn, 1)[0])
    return [float(fit[0]), *map(float, np.percentile(slopes, [2.5, 97.5]))]


def summarise(samples: np.ndarray, warm_up: float) -> dict[str, dict[str, float]]:
    """By quantity, of the windows' lowest values: growth an hour with its interval, the median of
    the first and of the last tenth; and the highest of all values."""
    kept = samples[samples[:, 0] >= warm_up * samples[-1, 0]]
    windows = np.array_split(kept, min(WINDOWS, len(kept)))
    hours = np.array([window[:, 0].mean() for window in windows]) / 3600
    found = {}
    for column, name in enumerate(COLUMNS[1:], 1):
        values = np.array([window[:, column].min() for window in windows])
        growth, low, high = slope(hours, values)
        tenth = max(1, len(values) // 10)
        found[name] = {
            "an_hour": growth, "low": low, "high": high,
            "first": float(np.median(values[:tenth])), "last": float(np.median(values[-tenth:])),
            "highest": float(kept[:, column].max()),
        }  # fmt: skip
    return found


def plot(samples: np.ndarray, found: dict[str, dict[str, float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(10, 6), sharex=True)
    shown = {"own_mb": "own memory, MB", "pss_mb": "PSS with workers, MB",
             "handles": "open file handles", "threads": "threads"}  # fmt: skip
    for axis, (name, title) in zip(axes.flat, shown.items(), strict=True):
        axis.plot(samples[:, 0] / 60, samples[:, COLUMNS.index(name)], linewidth=0.7)
        growth = found[name]
        interval = f"{growth['an_hour']:+.2f} [{growth['low']:.2f}, {growth['high']:.2f}] an hour"
        axis.set_title(f"{title}: {interval}", fontsize=9)
        axis.set_xlabel("minutes")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--out", type=Path, default=Path("runs/soak"), help="without suffix")
    parser.add_argument("--model", type=Path, default=ROOT / "data" / "warm_start" / "vl")
    parser.add_argument("--warm-up", type=float, default=0.15, help="share of the time left out")
    parser.add_argument("--limit", type=float, default=2.0, help="tolerated growth, MB per hour")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config = run_config(Path(folder) / "run", arguments.model)
        trainer = Watched(config, Reporter(enabled=False))
        trainer.samples = array("d")
        trainer.end = time.monotonic() + 60 * arguments.minutes
        trainer.train()
    samples = np.array(trainer.samples).reshape(-1, len(COLUMNS))
    if len(samples) < 10:
        parser.error(f"only {len(samples)} steps in {arguments.minutes:g} minutes; use --minutes")
    samples[:, 0] -= samples[0, 0]
    found = summarise(samples, arguments.warm_up)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    result = {
        "minutes": float(samples[-1, 0] / 60),
        "steps": len(samples),
        "warm_up": arguments.warm_up,
        "growth": found,
        "columns": COLUMNS,
        "samples": samples[:: max(1, len(samples) // 2000)].round(3).tolist(),
    }
    arguments.out.with_suffix(".json").write_text(json.dumps(result, indent=1))
    plot(samples, found, arguments.out.with_suffix(".png"))
    print(f"{len(samples)} steps in {result['minutes']:.1f} minutes")
    for name, growth in found.items():
        print(
            f"{name:10} {growth['an_hour']:+8.3f} an hour [{growth['low']:+.3f}, "
            f"{growth['high']:+.3f}]  first tenth {growth['first']:.1f}, last {growth['last']:.1f}"
        )
    grows = found["own_mb"]["low"] > arguments.limit
    grows |= any(found[name]["last"] > found[name]["first"] for name in ("handles", "threads"))
    return int(grows)


if __name__ == "__main__":
    sys.exit(main())
