"""Which of the named data sets are in a folder: rows, images, and how long loading takes.

    python scripts/table_of_tasks.py data/downloads

Prints a Markdown table. Seconds are for checking every row, and for iterating over all examples
without decoding images; each data set is read twice, so the disk cache is warm.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from mm_agrae import tasks
from mm_agrae.config import DataSource
from mm_agrae.errors import UserError
from mm_agrae.tasks import catalog, medical


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="holds a folder for each data set")
    folder = parser.parse_args().folder
    print("| task | split | rows | rows on the hub | images | hub id | folder | load s | read s |")
    print("|---|---|---:|---:|---:|---|---|---:|---:|")
    for name, entry in (catalog.CATALOG | medical.CATALOG).items():
        folders = [each for each in entry.folders or (name,) if (folder / each).is_dir()]
        for split in entry.files:
            cells = _measure(name, split, folder / folders[0]) if folders else ["-"] * 4
            rows, images, load_s, read_s = cells
            found = f"{folders[0]}/" if folders else "not here"
            known = f"{entry.rows[split]:,}"
            line = [name, split, rows, known, images, entry.hub, found, load_s, read_s]
            print(f"| {' | '.join(line)} |")


def _measure(name: str, split: str, path: Path) -> list[str]:
    source = DataSource.model_validate({"task": name, "split": split, "path": str(path)})
    try:
        tasks.load_all([source])
    except UserError as error:
        print(error, file=sys.stderr)
        return ["-"] * 4
    start = time.perf_counter()
    task = tasks.load_all([source])
    loaded = time.perf_counter()
    images = sum(len(task[index].images) for index in range(len(task)))
    read = time.perf_counter()
    return [f"{len(task):,}", f"{images:,}", f"{loaded - start:.2f}", f"{read - loaded:.2f}"]


if __name__ == "__main__":
    main()
