#!/usr/bin/env python
"""Draw one problem of a run with its greedy completions before and after training (README).

python scripts/image_of_traces.py runs/quickstart docs/trace.png
"""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from PIL import Image

from mm_agrae.run.folder import RunFolder

COLOURS = {True: "#1a7f37", False: "#b3261e"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--example", help="id of the problem; by default the first one that was learnt")
    arguments = parser.parse_args()
    run = RunFolder(arguments.run)
    greedy = {
        result.name: {
            sample["example_id"]: sample
            for sample in run.read_samples(result)
            if sample["sample"] < 0 and sample["images"]
        }
        for result in run.read_evaluations()
        if result.name in ("before", "after")
    }
    learnt = [
        name for name, sample in greedy["after"].items() if sample["success"] and not greedy["before"][name]["success"]
    ]
    name = arguments.example or learnt[0]
    draw(run, greedy["before"][name], greedy["after"][name], arguments.out)
    print(arguments.out)


def draw(run: RunFolder, before: dict, after: dict, out: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.2), width_ratios=[1, 2.4])
    left.imshow(Image.open(run.path / before["images"][0]))
    question = "\n".join(textwrap.wrap(before["question"], 42))
    left.set_title(f"{question}\n(gold answer: {before['answer']})", fontsize=9)
    for axes in (left, right):
        axes.axis("off")
    for height, title, sample in ((0.98, "before", before), (0.45, "after", after)):
        verdict = "correct" if sample["success"] else "incorrect"
        text = "\n".join(line for part in sample["completion"].split("\n") for line in textwrap.wrap(part, 78) or [""])
        right.text(0, height, f"{title} training: {verdict}", weight="bold", va="top",
                   color=COLOURS[sample["success"]], fontsize=10)  # fmt: skip
        right.text(0, height - 0.1, text, va="top", family="monospace", fontsize=9)
    figure.tight_layout()
    figure.savefig(out, dpi=110, bbox_inches="tight")


if __name__ == "__main__":
    main()
