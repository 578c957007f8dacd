"""Cut a finished run down to a small one: data/example_run, which the demo opens.

    mm-agrae train configs/quickstart.yaml
    python scripts/make_example_run.py runs/quickstart data/example_run

It keeps the config, the metrics of every step, every evaluation with all its samples (compressed),
the completions of some steps at even distances, including the last, and their images. Nothing is
changed except that numbers in metrics.jsonl are rounded to six digits.
"""

from __future__ import annotations

import argparse
import gzip
import re
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from mm_agrae.errors import RunFolderError, UserError
from mm_agrae.run.files import write_atomic, write_jsonl
from mm_agrae.run.folder import RunFolder


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument("out", type=Path, help="the small run folder; replaced if it exists")
    parser.add_argument("--steps", type=int, default=10, help="keep completions of at most this many steps")
    parser.add_argument("--limit-kb", type=int, default=1000, help="keep fewer steps beyond this")
    arguments = parser.parse_args()
    try:
        make(arguments.run, arguments.out, arguments.steps, 1000 * arguments.limit_kb)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def make(run_dir: Path, out: Path, count: int, limit: int) -> None:
    """Write the small run, at most `limit` bytes. Raises RunFolderError if that is impossible."""
    run = RunFolder(run_dir)
    run.read_config()  # raises if there is no run
    if out.exists() and not (out / "config.yaml").is_file():
        raise RunFolderError(f"{out} exists and is not a run folder; it is left alone")
    with tempfile.TemporaryDirectory(dir=out.absolute().parent) as folder:
        small = Path(folder) / "run"
        for kept in range(count, 0, -1):
            steps = spread(run.rollout_steps(), kept)
            cut_down(run, small, steps)
            size = sum(path.stat().st_size for path in small.rglob("*") if path.is_file())
            if size <= limit:
                break
            shutil.rmtree(small)
        else:
            raise RunFolderError(
                f"{run_dir}: even one step of it takes more than {limit:,} bytes; train with fewer "
                "prompts_per_step, or evaluate fewer problems or samples"
            )
        shutil.rmtree(out, ignore_errors=True)
        small.rename(out)
    print(f"{out}: {size:,} bytes, completions of steps {', '.join(map(str, steps))}")


def cut_down(run: RunFolder, small: Path, steps: Sequence[int]) -> None:
    for folder in ("rollouts", "images"):
        (small / folder).mkdir(parents=True)
    # The original folder means nothing to others.
    config = re.sub(r"(?m)^run_dir: .*", "run_dir: runs/example", run.read_config())
    write_atomic(small / "config.yaml", config)
    for name in ("versions.json", "summary.json"):
        if (run.path / name).is_file():
            shutil.copyfile(run.path / name, small / name)
    rows = ({name: short(value) for name, value in row.items()} for row in run.read_metrics())
    write_jsonl(small / "metrics.jsonl", rows)
    images: set[str] = set()
    for step in steps:
        name = f"rollouts/step_{step:06d}.parquet"
        shutil.copyfile(run.path / name, small / name)
        for row in run.read_rollouts(step, columns=["images"]):
            images.update(row["images"])
    for result in run.read_evaluations():
        samples = run.samples_path(result)
        if samples is not None and samples.is_file():
            images.update(path for row in run.read_samples(result) for path in row["images"])
            keep_evaluation(samples, small / "evaluations" / samples.parent.name)
    for relative in sorted(images):
        path = run.image_path(relative)
        if path is not None:
            with Image.open(path) as image:
                image.save(small / relative, optimize=True)


def keep_evaluation(samples: Path, folder: Path) -> None:
    folder.mkdir(parents=True)
    shutil.copyfile(samples.parent / "result.json", folder / "result.json")
    content = samples.read_bytes()
    if samples.suffix == ".gz":
        content = gzip.decompress(content)
    # Without a timestamp, so that the same run gives the same file.
    write_atomic(folder / "samples.jsonl.gz", gzip.compress(content, 9, mtime=0))


def spread(steps: list[int], count: int) -> list[int]:
    """At most `count` of the steps at even distances, including the last."""
    stride = -(-len(steps) // count) or 1
    return sorted(steps[::-1][::stride])


def short(value: object) -> object:
    return float(f"{value:.6g}") if isinstance(value, float) else value


if __name__ == "__main__":
    sys.exit(main())
