"""How long a training step waits for its images, with and without prefetching: real pictures, several a prompt.

    python scripts/benchmark_images.py geometry3k/train.jsonl
    python scripts/benchmark_images.py mathvision/test_subset.jsonl --images 8 --max-pixels 401408

The file's pictures, in turn, are put into prompts of `--images` each, and the trainer takes `--steps` steps over them
for each number of threads. `prompts` is what a step waits for decoding, resizing and tokenising, `log` what it waits
for records and stored images, in seconds (the median of all steps but the first, which is also shown).
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import statistics
import sys
import tempfile
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mm_agrae import config as configs
from mm_agrae.progress import Reporter
from mm_agrae.tasks.files import FileTask
from mm_agrae.trainer import Trainer

WARM_START = Path(__file__).resolve().parents[1] / "data" / "warm_start" / "vl"


def main() -> None:
    options = parse()
    pictures = [image for example in FileTask(str(options.data)) for image in example.images]
    pictures = list(dict.fromkeys(pictures))
    if not pictures:
        sys.exit(f"{options.data}: no row has an image")
    bars = Reporter()
    waits: dict[int, list[tuple[float, ...]]] = {}
    runs = [count for _ in range(options.rounds) for count in options.threads]
    with tempfile.TemporaryDirectory() as work, bars.bars(), bars.bar("runs", len(runs)) as advance:
        rows = Path(work, "rows.jsonl")
        supply = itertools.cycle(pictures)
        prompts = (list(itertools.islice(supply, options.images)) for _ in range(options.prompts * options.steps))
        rows.write_text(
            "".join(json.dumps({"question": "How many?", "answer": "1", "images": each}) + "\n" for each in prompts)
        )
        for index, count in enumerate(runs):
            waits.setdefault(count, []).extend(steps(rows, Path(work, f"run{index}"), count, options))
            advance(1)
    print(f"{options.prompts} prompts a step, {options.images} of {len(pictures):,} pictures each")
    print("| threads | first step: prompts | prompts | log | whole step |")
    print("|---|---|---|---|---|")
    for count, found in waits.items():
        first = statistics.median(prompts for prompts, *_ in found[:: options.steps])
        rest = [each for index, each in enumerate(found) if index % options.steps]
        cells = " | ".join(f"{value:.2f}" for value in (first, *map(statistics.median, zip(*rest, strict=True))))
        print(f"| {count} | {cells} |")


def steps(rows: Path, run_dir: Path, threads: int, options: argparse.Namespace) -> list[tuple[float, ...]]:
    """(waiting for prompts, waiting for the log, all) in seconds, of each step of a run."""
    model = {"path": str(options.model)} | ({"device": "cpu"} if options.model == WARM_START else {})
    config = configs.parse(
        {
            "run_dir": str(run_dir),
            "model": model,
            "data": {
                "train": [{"task": "files", "path": str(rows), "image_root": "/"}],
                "shuffle": False, "check": "off", "prefetch_threads": threads,
            },
            "prompt": {"max_tokens": 1 << 20, "max_pixels": options.max_pixels},
            "train": {"steps": options.steps},
            "rollout": {
                "prompts_per_step": options.prompts, "completions_per_prompt": options.completions,
                "max_new_tokens": options.new_tokens, "mismatch": {"probe_every": 0},
            },
            "evaluate": {"before": False, "after": False},
            "advantage": {"rule": "nsr"},  # all wrong here, and yet there is an update
        }
    )  # fmt: skip
    trainer = Trainer(config, Reporter(enabled=False))
    trainer.train()
    names = ("seconds/prompts", "seconds/log", "seconds/total")
    return [tuple(row[name] for name in names) for row in trainer.run.read_metrics()]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])

    def numbers(text: str) -> list[int]:
        return [int(each) for each in text.split(",")]

    parser.add_argument("data", type=Path, help="rows with images, in any format that the task files reads")
    parser.add_argument("--model", type=Path, default=WARM_START)
    parser.add_argument("--images", type=int, default=8, help="pictures a prompt")
    parser.add_argument("--prompts", type=int, default=8, help="prompts a step")
    parser.add_argument("--completions", type=int, default=4)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--max-pixels", type=int, default=112_896)
    parser.add_argument("--threads", type=numbers, default="0,2")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    main()
