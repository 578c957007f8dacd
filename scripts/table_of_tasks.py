"""Which of the named data sets are in a folder: rows, pictures, and how long loading takes.

    python scripts/table_of_tasks.py data/downloads

Prints a table in Markdown. Seconds are for checking every row, and for going through all
examples once without decoding pictures; each data set is read a second time, so disks are warm.
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
    print(
        "| task | split | rows | rows on the hub | pictures | hub id | folder | load s | read s |"
    )
    print("|---|---|---:|---:|---:|---|---|---:|---:|")
    for name, entry in (catalog.CATALOG | medical.CATALOG).items():
        places = [place for place in entry.folders or (name,) if (folder / place).is_dir()]
        for split in entry.files:
            cells = _measure(name, split, folder / places[0]) if places else ["-"] * 4
            rows, pictures, load_s, read_s = cells
            place = f"{places[0]}/" if places else "not here"
            known = f"{entry.rows[split]:,}"
            line = [name, split, rows, known, pictures, entry.hub, place, load_s, read_s]
            print(f"| {' | '.join(line)} |")


def _measure(name: str, split: str, path: Path) -> list[str]:
    source = DataSource.model_validate({"task": name, "split": split, "path": str(path)})
    try:
        tasks.load(source)
    except UserError as error:
        print(error, file=sys.stderr)
        return ["-"] * 4
    start = time.perf_counter()
    task = tasks.load(source)
    loaded = time.perf_counter()
    pictures = sum(len(task[index].images) for index in range(len(task)))
    read = time.perf_counter()
    return [f"{len(task):,}", f"{pictures:,}", f"{loaded - start:.2f}", f"{read - loaded:.2f}"]


if __name__ == "__main__":
    main()
