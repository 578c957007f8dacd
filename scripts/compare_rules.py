#!/usr/bin/env python
"""Train one config under several advantage rules and seeds, and compare the results.

    python scripts/compare_rules.py configs/quickstart.yaml --rules grpo agrae --jobs 2 \\
        --with agrae:advantage.alpha=0.6

Each run is an ordinary `mm-agrae train` in its own folder under --out, with its output in a log beside it; finished
ones are reused and interrupted ones resumed. Leaves results.json (every figure of every run), results.md (the same as
tables, with checks of each seed) and compare.html (the runs' curves) there.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import yaml

from mm_agrae import config as configs
from mm_agrae.config import Config
from mm_agrae.errors import UserError
from mm_agrae.progress import Reporter
from mm_agrae.run.folder import RunFolder
from mm_agrae.run.records import EvaluationResult
from mm_agrae.view.page import duration
from mm_agrae.view.report import write_runs_report

RIGHT_RULE = "right rule"
"""Share of the correct completions whose reasoning names a right rule, if `reward.parts` measures it."""
TITLES = {
    "greedy": "greedy",
    "entropy": "entropy (nats)",
    "unsolved": "never solved",
    RIGHT_RULE: "right rule, of the correct",
}


@dataclass(frozen=True)
class Run:
    """One training run: its command's settings and the config they make."""

    rule: str
    seed: int
    folder: RunFolder
    settings: list[str]
    config: Config

    @property
    def name(self) -> str:
        return f"{self.rule}, seed {self.seed}"

    def finished(self) -> bool:
        """Whether the folder holds this very run, finished. SystemExit if it holds a finished one that differs."""
        if not self.folder.read_summary().get("finished"):
            return False
        held = yaml.safe_load(self.folder.read_config())
        differing = _differing(held | {"run_dir": self.config.run_dir}, configs.public(self.config))
        if differing:
            sys.exit(
                f"error: {self.folder.path} holds a finished run of other settings ({', '.join(differing)}); "
                "delete it or choose another --out"
            )
        return True


def main() -> None:
    arguments = parse()
    out: Path = arguments.out
    try:
        runs = plan(arguments)
        train(arguments.config, runs, arguments.jobs)
        found = results(arguments, runs)
        print(write_runs_report([run.folder.path for run in runs], out / "compare.html"))
    except UserError as error:
        sys.exit(f"error: {error}")
    (out / "results.json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (out / "results.md").write_text(text(found), encoding="utf-8")
    header, rows = summary_table(found)
    Reporter().table(f"after training, mean ± standard deviation over {len(arguments.seeds)} seeds", header, rows)
    print(out / "results.json", out / "results.md", sep="\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for every run")
    parser.add_argument("--rules", nargs="+", default=["grpo", "agrae"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--with", nargs="+", default=[], dest="own", metavar="RULE:key=value", help="for one rule")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; of several each has one thread")
    parser.add_argument("--out", type=Path, default=Path("runs/compare"))
    arguments = parser.parse_intermixed_args()
    for each in arguments.own:
        rule, _, setting = each.partition(":")
        if rule not in arguments.rules or "=" not in setting:
            parser.error(f"--with {each}: write RULE:key=value with a rule of --rules ({', '.join(arguments.rules)})")
    if arguments.jobs < 1:
        parser.error(f"--jobs is {arguments.jobs}; it must be 1 or more")
    return arguments


def plan(arguments: argparse.Namespace) -> list[Run]:
    """Every run, seed by seed. Raises ConfigError for settings that cannot be, before anything is trained."""
    own_rule = configs.load(arguments.config, arguments.overrides).advantage.rule
    runs = []
    for seed in dict.fromkeys(arguments.seeds):
        for rule in dict.fromkeys(arguments.rules):
            folder = arguments.out / f"{rule}-seed{seed}"
            settings = [f"run_dir={folder}", f"train.seed={seed}"]
            if rule != own_rule:  # the config's settings are those of its own rule
                settings.append(f"advantage={{rule: {rule}}}")
            settings += arguments.overrides
            settings += [each.partition(":")[2] for each in arguments.own if each.partition(":")[0] == rule]
            config = configs.load(arguments.config, settings)
            if not (config.data.evaluate and config.evaluate.before and config.evaluate.after):
                sys.exit("error: comparing needs data.evaluate, evaluate.before=true and evaluate.after=true")
            runs.append(Run(rule, seed, RunFolder(folder), settings, config))
    return runs


def train(config: str, runs: Sequence[Run], jobs: int) -> None:
    """Carry out what is not finished, `jobs` runs at a time; a line for each run that is. SystemExit if one fails."""
    finished = [run for run in runs if run.finished()]
    for number, run in enumerate(finished, 1):
        print(f"{number}/{len(runs)}  {run.name}: {_line(run)} (reused)", flush=True)
    environment = os.environ | ({"OMP_NUM_THREADS": "1"} if jobs > 1 else {})

    def carry_out(run: Run) -> Run:
        command = [sys.executable, "-m", "mm_agrae.cli", "train", config, *run.settings]
        log = _log(run)
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w", encoding="utf-8") as output:
            done = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        if done.returncode or not run.folder.read_summary().get("finished"):
            tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
            raise RuntimeError(f"{tail}\nerror: {run.name} did not finish; its output is in {log}")
        return run

    pool = ThreadPoolExecutor(jobs)
    try:
        futures = [pool.submit(carry_out, run) for run in runs if run not in finished]
        for number, future in enumerate(as_completed(futures), len(finished) + 1):
            run = future.result()
            print(f"{number}/{len(runs)}  {run.name}: {_line(run)}", flush=True)
    except RuntimeError as error:
        sys.exit(str(error))
    finally:
        pool.shutdown(cancel_futures=True)  # those under way end first; the same command goes on from there


def _log(run: Run) -> Path:
    return run.folder.path.with_name(f"{run.folder.path.name}.log")


def _line(run: Run) -> str:
    before, after = ends(run)
    changes = [
        f"pass@{k} {_percent(before.pass_at_k[k].mean)} → {_percent(after.pass_at_k[k].mean)} %" for k in _ks(after)
    ]
    return f"{', '.join(changes)}, {duration(run.folder.read_summary()['seconds']['total'])}"


def _differing(one: Any, other: Any, where: str = "") -> list[str]:
    """The keys under which two plain configs differ."""
    if not (isinstance(one, dict) and isinstance(other, dict)):
        return [] if one == other else [where]
    keys = dict.fromkeys([*one, *other])
    return [found for key in keys for found in _differing(one.get(key), other.get(key), f"{where}.{key}".lstrip("."))]


def ends(run: Run) -> tuple[EvaluationResult, EvaluationResult]:
    """The evaluations of the first evaluation set before and after training."""
    label = run.config.data.evaluate[0].label
    found = {result.name: result for result in run.folder.read_evaluations() if result.label == label}
    return found["before"], found["after"]


def _ks(result: EvaluationResult) -> list[int]:
    return sorted({min(result.pass_at_k), max(result.pass_at_k)})


def results(arguments: argparse.Namespace, runs: Sequence[Run]) -> dict[str, Any]:
    """What results.json holds."""
    after = ends(runs[0])[1]
    versions: dict[str, list[str]] = {}
    rules: dict[str, Any] = {run.rule: {"settings": [], "median_seed": None, "seeds": {}} for run in runs}
    for run in runs:
        for name, version in run.folder.read_versions().items():
            if name != "created" and version not in versions.setdefault(name, []):
                versions[name].append(version)
        rules[run.rule]["settings"] = [each for each in arguments.own if each.startswith(f"{run.rule}:")]
        rules[run.rule]["seeds"][str(run.seed)] = record(run)
    for found in rules.values():
        by_pass = sorted(found["seeds"], key=lambda seed: found["seeds"][seed]["after"]["pass@1"])
        found["median_seed"] = int(by_pass[(len(by_pass) - 1) // 2])
    return {
        "config": arguments.config,
        "overrides": arguments.overrides,
        "jobs": arguments.jobs,
        "data": after.label,
        "problems": after.problems,
        "samples": after.samples,
        "versions": versions,
        "rules": rules,
    }


def record(run: Run) -> dict[str, Any]:
    """The figures and checks of one run."""
    before, after = ends(run)
    summary = run.folder.read_summary()
    families = {
        family: {
            "problems": group.problems,
            "before": _passes(before.groups["family"][family].pass_at_k),
            "after": _passes(group.pass_at_k),
        }
        for family, group in after.groups.get("family", {}).items()
    }
    greedy = after.greedy.mean if after.greedy else None
    return {
        "before": figures(before),
        "after": figures(after),
        "families": families,
        "checks": {
            "changes": {f"pass@{k}": _rounded(after.pass_at_k[k].mean - before.pass_at_k[k].mean) for k in _ks(after)},
            "families_fallen": {
                family: {f"pass@{k}": _rounded(change) for k, change in changes.items()}
                for family, changes in after.falls(before, "family").items()
            },
            "greedy_at_least_pass@1": None if greedy is None else greedy >= after.pass_at_k[1].mean,
        },
        "seconds": round(summary["seconds"]["total"], 1),
        "peak_memory_mb": round(summary["peak_memory_mb"], 1),
        "created": run.folder.read_versions().get("created"),
    }


def figures(result: EvaluationResult) -> dict[str, float]:
    """Figure -> value; what was not measured is left out."""
    values: dict[str, float | None] = {
        **_passes(result.pass_at_k),
        "greedy": result.greedy.mean if result.greedy else None,
        "entropy": result.entropy,
        "unsolved": result.unsolved,
        RIGHT_RULE: result.parts["rule"].correct if "rule" in result.parts else None,
    }
    return {name: _rounded(value) for name, value in values.items() if value is not None}


def _passes(table: Any) -> dict[str, float]:
    return {f"pass@{k}": _rounded(interval.mean) for k, interval in table.items()}


def _rounded(value: float) -> float:
    return round(float(value), 6)


def summary_table(found: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Means and standard deviations over the seeds, a row for each rule."""
    seeds = {rule: list(each["seeds"].values()) for rule, each in found["rules"].items()}
    starts = [run["before"] for runs in seeds.values() for run in runs]
    starts = starts if any(start != starts[0] for start in starts) else starts[:1]  # as a rule they are all the same
    rows = {"before training": starts} | {rule: [run["after"] for run in runs] for rule, runs in seeds.items()}
    names = [name for name in starts[0] if name.startswith("pass@")]
    names += [name for name in TITLES if any(name in values for each in rows.values() for values in each)]
    return ["rule", *(TITLES.get(name, name) for name in names)], [
        [rule, *(cell((v[name] for v in values if name in v), name) for name in names)]
        for rule, values in rows.items()
    ]


def cell(values: Iterable[float], name: str) -> str:
    """Mean ± standard deviation, in per cent but for the entropy."""
    found = list(values)
    show: Callable[[float], str] = "{:.3f}".format if name == "entropy" else _percent
    if not found:
        return "–"
    return show(mean(found)) + (f" ± {show(stdev(found))}" if len(found) > 1 else "")


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _points(values: Iterable[float]) -> str:
    found = list(values)
    return f"{100 * mean(found):+.1f}" + (f" ± {_percent(stdev(found))}" if len(found) > 1 else "")


def text(found: dict[str, Any]) -> str:
    """What results.md holds."""
    rules: dict[str, Any] = found["rules"]
    runs = [(rule, seed, run) for rule, each in rules.items() for seed, run in each["seeds"].items()]
    made = sorted(str(run["created"])[:10] for _, _, run in runs)
    versions = ", ".join(f"{name} {' and '.join(each)}" for name, each in found["versions"].items())
    own = [each for rule in rules.values() for each in rule["settings"]]
    facts = [
        f"config: `{' '.join([found['config'], *found['overrides']])}`" + (f", with `{' '.join(own)}`" if own else ""),
        f"data: {found['problems']} problems of {found['data']}, {found['samples']} samples of each",
        f"runs: {' to '.join(dict.fromkeys((made[0], made[-1])))}, {found['jobs']} at a time",
        f"versions: {versions}",
    ]
    parts = [
        f"# {' and '.join(rules)} compared",
        "\n".join(f"- {fact}" for fact in facts),
        f"## After training, mean ± standard deviation over {len(runs) // len(rules)} seeds (%)",
        markdown(*summary_table(found)),
        "\n".join(f"- {verdict(rule, each)}" for rule, each in rules.items()),
    ]
    if any(run["families"] for _, _, run in runs):
        parts += ["## By family (%; changes in points)", markdown(*family_table(rules))]
    parts += ["## Each seed (%)", markdown(*seed_table(found, runs))]
    parts += ["## Checks of each seed (points)", markdown(*check_table(runs))]
    parts += ["A family fell where its pass@k fell by one problem's worth or more."]
    return "\n\n".join(parts) + "\n"


def verdict(rule: str, found: dict[str, Any]) -> str:
    """In how many seeds each check holds."""
    checks = [run["checks"] for run in found["seeds"].values()]
    first, *rest = checks[0]["changes"]
    told = [f"{first} rose in {sum(c['changes'][first] > 0 for c in checks)} of {len(checks)} seeds"]
    told += [f"{k} fell in {sum(c['changes'][k] < 0 for c in checks)}" for k in rest]
    told.append(f"a family fell in {sum(bool(c['families_fallen']) for c in checks)}")
    if any(c["greedy_at_least_pass@1"] is not None for c in checks):
        told.append(f"greedy is at least pass@1 in {sum(bool(c['greedy_at_least_pass@1']) for c in checks)}")
    return f"{rule}: {', '.join(told)}; the median seed by pass@1 is {found['median_seed']}."


Table = tuple[list[str], list[list[str]]]


def family_table(rules: dict[str, Any]) -> Table:
    rows = []
    for rule, found in rules.items():
        runs = list(found["seeds"].values())
        for family, first in runs[0]["families"].items():
            row = [rule, family, str(first["problems"])]
            for k in first["after"]:
                before = [run["families"][family]["before"][k] for run in runs]
                after = [run["families"][family]["after"][k] for run in runs]
                row += [
                    _percent(mean(before)),
                    cell(after, k),
                    _points(b - a for a, b in zip(before, after, strict=True)),
                ]
                row.append(str(sum(k in run["checks"]["families_fallen"].get(family, ()) for run in runs)))
            rows.append(row)
    ks = next(iter(runs[0]["families"].values()))["after"]
    columns = [f"{k}{what}" for k in ks for what in (" before", " after", " change", ": seeds in which it fell")]
    return ["rule", "family", "problems", *columns], rows


def seed_table(found: dict[str, Any], runs: Sequence[tuple[str, str, dict[str, Any]]]) -> Table:
    names = list(dict.fromkeys(name for _, _, run in runs for name in run["after"]))
    rows = []
    for rule, seed, run in runs:
        median = " (median)" if int(seed) == found["rules"][rule]["median_seed"] else ""
        values = [cell([run["after"][name]] if name in run["after"] else [], name) for name in names]
        rows.append([rule, seed + median, *values, f"{run['seconds'] / 60:.1f}", f"{run['peak_memory_mb']:,.0f}"])
    return ["rule", "seed", *(TITLES.get(name, name) for name in names), "minutes", "peak memory (MB)"], rows


def check_table(runs: Sequence[tuple[str, str, dict[str, Any]]]) -> Table:
    rows = []
    for rule, seed, run in runs:
        checks = run["checks"]
        fallen = [
            f"{family} {100 * change:+.1f} at {k}"
            for family, changes in checks["families_fallen"].items()
            for k, change in changes.items()
        ]
        greedy = {True: "yes", False: "no", None: "–"}[checks["greedy_at_least_pass@1"]]
        changes = [f"{100 * change:+.1f}" for change in checks["changes"].values()]
        rows.append([rule, seed, *changes, ", ".join(fallen) or "none", greedy])
    changed = [f"{k}, change" for k in runs[0][2]["checks"]["changes"]]
    return ["rule", "seed", *changed, "families that fell", "greedy ≥ pass@1"], rows


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
