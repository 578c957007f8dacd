"""Data files for the tests of tasks."""

import io
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
from PIL import Image

from mm_agrae import tasks
from mm_agrae.config import DataSource
from mm_agrae.tasks.images import open_image

GOOD = {"problem": "1 + 1?", "answer": "2"}


def png(colour="red", size=(16, 16)):
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        for row in rows:
            file.write(row if isinstance(row, bytes) else json.dumps(row).encode())
            file.write(b"\n")
    return str(path)


def parquet(path, columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return str(path)


def png_of(value):
    """A small image that differs from those of other values."""
    return png((value % 256, value // 256 % 256, 90))


def jsonl(folder, name, rows):
    """Our form: rows in a file, their images (here bytes) beside it."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    with (folder / name).open("w") as file:
        for number, row in enumerate(rows):
            stored = []
            for index, image in enumerate(row.get("images", ())):
                path = f"images/{Path(name).stem}-{number}-{index}.png"
                (folder / path).write_bytes(image)
                stored.append(path)
            file.write(json.dumps({**row, **({"images": stored} if "images" in row else {})}) + "\n")
    return folder


def hub_parquet(folder, name, rows):
    """The hub's form: Parquet, images as `datasets` stores them."""
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / name)
    return folder


def embedded(value):
    return {"bytes": png_of(value), "path": f"{value}.png"}


def load(task, path, **options):
    return tasks.load_all([DataSource(task=task, path=str(path), **options)])


def contents(task):
    """All that is asked and graded; the images as pixels."""
    return [
        (
            example.question,
            example.answer,
            dict(example.grading),
            [open_image(image).tobytes() for image in example.images],
        )
        for example in task
    ]


def hub_cache(folder, hub):
    """A cache of huggingface_hub that holds one version of a data set; the folder to fill."""
    repository = folder / f"datasets--{hub.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("a" * 40)
    return repository / "snapshots" / ("a" * 40)
