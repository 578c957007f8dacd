#!/usr/bin/env python
"""Train one config under several advantage rules and seeds, and compare the results.

    python scripts/compare_rules.py configs/quickstart.yaml --rules agrae grpo --seeds 0 1 2

Each run is an ordinary `mm-agrae train` in its own folder under --out; finished ones are reused and
interrupted ones resumed. Prints pass@k, greedy accuracy and entropy as mean and standard deviation
over seeds, and writes them to results.json and all runs to one page.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from mm_agrae import config as configs
from mm_agrae.progress import Reporter
from mm_agrae.run.folder import RunFolder
from mm_agrae.run.records import EvaluationResult
from mm_agrae.view.report import write_runs_report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--rules", nargs="+", default=["agrae", "grpo"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/compare"))
    arguments = parser.parse_args()

    own_rule = configs.load(arguments.config, arguments.overrides).advantage.rule
    runs: dict[str, list[RunFolder]] = {rule: [] for rule in arguments.rules}
    for seed in arguments.seeds:
        for rule in arguments.rules:
            folder = arguments.out / f"{rule}-seed{seed}"
            settings = [f"run_dir={folder}", f"train.seed={seed}"]
            if rule != own_rule:  # the config's settings are those of its own rule
                settings.append(f"advantage={{rule: {rule}}}")
            command = [sys.executable, "-m", "mm_agrae.cli", "train", arguments.config]
            subprocess.run([*command, *settings, *arguments.overrides], check=True)
            runs[rule].append(RunFolder(folder))
    report(arguments.out, runs)


def report(out: Path, runs: dict[str, list[RunFolder]]) -> None:
    results: dict[str, dict[str, list[float]]] = {}
    for rule, folders in runs.items():
        evaluations = [{r.name: r for r in folder.read_evaluations()} for folder in folders]
        # What a run starts from is the same for every rule and seed.
        results.setdefault("before training", figures([evaluations[0]["before"]]))
        results[rule] = figures([found["after"] for found in evaluations])
    names = list(next(iter(results.values())))
    Reporter().table(
        f"after training, mean ± standard deviation over {len(next(iter(runs.values())))} seeds",
        ["rule", *names],
        [[rule, *(cell(values[name]) for name in names)] for rule, values in results.items()],
    )
    (out / "results.json").write_text(json.dumps(results, indent=1))
    print(write_runs_report([folder.path for part in runs.values() for folder in part],
                         out / "compare.html"))  # fmt: skip


def figures(results: list[EvaluationResult]) -> dict[str, list[float]]:
    """Figure -> its value for each seed."""
    values = {f"pass@{k}": [r.pass_at_k[k].mean for r in results] for k in results[0].pass_at_k}
    values["greedy"] = [r.greedy.mean for r in results if r.greedy is not None]
    values["entropy"] = [r.entropy for r in results if r.entropy is not None]
    values["unsolved"] = [r.unsolved for r in results]
    return values


def cell(values: list[float]) -> str:
    if not values:
        return "-"
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"


if __name__ == "__main__":
    main()
