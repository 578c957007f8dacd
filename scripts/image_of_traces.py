#!/usr/bin/env python
"""Draw problems of a run with their greedy completions before and after training: docs/trace.png.

python scripts/image_of_traces.py data/example_run docs/trace.png \\
    --examples synthetic-test-0-11 synthetic-test-0-49 synthetic-test-0-3
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from PIL import Image

from mm_agrae.errors import UserError
from mm_agrae.run.folder import RunFolder

COLOURS = {True: "#1a7f37", False: "#b3261e"}
WIDTH = 32
"""Letters of a line."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--examples", nargs="+", help="ids; by default the first of each family that was learnt")
    arguments = parser.parse_args()
    try:
        run = RunFolder(arguments.run)
        before, after = (read(run, name) for name in ("before", "after"))
        names = arguments.examples or learnt(before, after)
        if unknown := [name for name in names if name not in before or name not in after]:
            raise UserError(f"{run.path}: no problem with an image is called {unknown[0]}")
        if not names:
            raise UserError(f"{run.path}: no problem with an image was learnt")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    draw(run, [(before[name], after[name]) for name in names], arguments.out)
    print(arguments.out)
    return 0


def read(run: RunFolder, name: str) -> dict[str, dict[str, Any]]:
    """The greedy sample of each problem with an image, and `rate`: how many of its other samples are correct."""
    greedy: dict[str, dict[str, Any]] = {}
    rates: dict[str, list[bool]] = {}
    for result in run.read_evaluations():
        for sample in run.read_samples(result) if result.name == name else ():
            if sample["sample"] >= 0:
                rates.setdefault(sample["example_id"], []).append(sample["success"])
            elif sample["images"]:
                greedy[sample["example_id"]] = sample
    for key, sample in greedy.items():
        sample["rate"] = f"{sum(rates[key])} of {len(rates[key])} samples" if key in rates else "greedy"
    return greedy


def learnt(before: dict[str, dict[str, Any]], after: dict[str, dict[str, Any]]) -> list[str]:
    """Of each family the first problem that is solved after training and was not before."""
    first: dict[str, str] = {}
    for name, sample in after.items():
        if sample["success"] and not before[name]["success"]:
            first.setdefault(sample["meta"].get("family", ""), name)
    return list(first.values())


def draw(run: RunFolder, pairs: list[tuple[dict[str, Any], dict[str, Any]]], out: Path) -> None:
    figure, columns = plt.subplots(2, len(pairs), figsize=(3.5 * len(pairs), 4.2), squeeze=False)
    for (before, after), (picture, text) in zip(pairs, columns.T, strict=True):
        picture.imshow(Image.open(run.path / before["images"][0]), interpolation="lanczos")
        question = textwrap.fill(before["question"], 40)
        picture.set_title(f"{question}\n(answer: {before['answer']})", fontsize=10)
        for axes in (picture, text):
            axes.axis("off")
        for height, when, sample in ((1.0, "Before", before), (0.47, "After", after)):
            colour = COLOURS[sample["success"]]
            text.text(0, height, f"{when} training: {sample['rate']} correct", weight="bold", va="top", color=colour)
            lines = [textwrap.fill(line, WIDTH) for line in sample["completion"].split("\n")]
            text.text(0, height - 0.11, "\n".join(lines), va="top", family="monospace", fontsize=9, linespacing=1.3)
    figure.tight_layout()
    figure.savefig(out, dpi=100, bbox_inches="tight")


if __name__ == "__main__":
    sys.exit(main())
