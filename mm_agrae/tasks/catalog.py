"""Published data sets by name: where each is found, and how its columns are read.

    - {task: geometry3k, split: test}
    - {task: math, split: train, path: /data/math, where: {level: [4, 5]}}

Each is one entry of `CATALOG`. A data set is looked for at the option `path` (a folder or a
file), then in data/downloads/<name>/, then on the Hugging Face hub (in its local cache if there
is no network). A folder may hold JSONL files with pictures beside them, the files of the hub
(Parquet with the pictures inside), or what `datasets.save_to_disk` wrote; all give the same
examples.

`rows` are the row counts of the hub's copies. What is written about columns and splits was read
from the data cards and from programs that use them; of aime2025 and amc23 the file names and
columns are from such programs alone, and nobody has compared `expected_answer` of zwhe99/MATH with
the boxed answers row by row. A column that is named otherwise is an error that lists the columns.
"""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, Literal
from zipfile import ZipFile

from mm_agrae.errors import ConfigError, DataError, nearest
from mm_agrae.tasks.files import COLUMNS, ColumnName, FileTask
from mm_agrae.tasks.images import printable
from mm_agrae.tasks.rows import LazyRow, Row, listing, read_rows

DOWNLOADS = Path("data/downloads")


@dataclass(frozen=True)
class DataSet:
    """One entry of the catalog."""

    hub: str
    """Id of the copy on the Hugging Face hub that most programs use."""
    files: Mapping[str, tuple[str, ...]]
    """Of each split: patterns of file names, in order; the first that matches is read."""
    rows: Mapping[str, int]
    """Rows of each split on the hub."""
    licence: str
    url: str
    columns: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Where fields of `files.COLUMNS` are looked for, if not as there."""
    ask: Mapping[str, Mapping[str, tuple[str, ...]]] = field(default_factory=dict)
    """Kinds of answers that the option `ask` chooses among, and their `columns`."""
    prepare: Callable[[Row], Row] | None = None
    """Makes rows of all copies alike."""
    kind: Callable[[str], str] | None = None
    """`kind` of `rewards.accuracy.verify` for a gold answer, where the data set says more."""
    split_where: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Of a split that some copies keep inside another one: the column that marks it."""
    saved_as: Mapping[str, str] = field(default_factory=dict)
    """What the hub calls a split, where it differs."""
    folders: tuple[str, ...] = ()
    """Folders in data/downloads; not set: the task's name."""
    archive: str = ""
    """File on the hub that holds the pictures, to be unpacked beside the table."""


def _geometry3k(row: Row) -> Row:
    problem = row.get("problem")
    if not isinstance(problem, str):
        return row
    return {**row, "problem": problem.removeprefix("<image>").lstrip()}


def _math(row: Row) -> Row:
    level = re.fullmatch(r"Level ([0-9])", str(row.get("level")))
    more = {"level": int(level[1])} if level else {}
    return {"subject": row.get("type"), **row, **more}


def _gsm8k(row: Row) -> Row:
    """The answer is what follows the last ####, its thousands without commas."""
    answer = row.get("answer")
    if not isinstance(answer, str):
        return row
    return {**row, "answer": answer.rpartition("####")[2].replace(",", "").strip()}


def _integer(row: Row) -> Row:
    """Answers such as 027 or 27.0 are the integer 27."""
    found = re.fullmatch(r"\s*(-?)0*([0-9]+)(?:\.0*)?\s*", str(row.get("answer")))
    return {**row, "answer": found[1] + found[2]} if found else row


def _mathverse(row: Row) -> Row:
    """The hub's questions end in lines "Choices:", "A:40°", …; these become a list."""
    question, metadata = row.get("question"), row.get("metadata")
    more = dict(metadata) if isinstance(metadata, Mapping) else {}
    if isinstance(question, str) and "choices" not in row:
        text, found, lines = question.rpartition("Choices:\n")
        choices = re.split(r"\n(?=\(?[B-Z][:).])", lines.strip()) if found else []
        if len(choices) > 1 and re.match(r"\(?A[:).]", choices[0]):
            more |= {"question": text.rstrip("\n"), "choices": choices}
    return {**row, **more}


def _vqa_rad(row: Row) -> Row:
    """`answer_type` where a copy has none: closed is yes or no."""
    answer = str(row.get("answer")).strip().lower()
    return {"answer_type": "closed" if answer in ("yes", "no") else "open", **row}


def _medical_kind(answer: str) -> str:
    """Yes or no by the first word, measures as numbers with units, the rest word by word."""
    if answer.strip(" .").lower() in ("yes", "no"):
        return "yes_no"
    measure = re.fullmatch(r"[0-9]+([.,][0-9]+)?\s*(%|[mc]?m|ml|g|kg)?", answer.strip(" ."))
    return "number" if measure else "text"


def _hub(split: str) -> str:
    return f"data/{split}-*.parquet"


CATALOG: dict[str, DataSet] = {
    "geometry3k": DataSet(
        hub="hiyouga/geometry3k",
        files={
            "train": ("train.jsonl", _hub("train")),
            "validation": ("val.jsonl", "validation.jsonl", _hub("validation")),
            "test": ("test.jsonl", _hub("test")),
        },
        rows={"train": 2101, "validation": 300, "test": 601},
        licence="MIT",
        url="https://github.com/lupantech/InterGPS",
        prepare=_geometry3k,
        ask={
            "value": {"answer": ("answer_value", "answer"), "choices": ()},
            "letter": {"answer": ("ground_truth", "answer")},
        },
    ),
    "math": DataSet(
        hub="zwhe99/MATH",
        files={
            "train": ("train.jsonl", _hub("train")),
            "test": ("math500.jsonl", _hub("math500")),
            "test_rest": ("test_rest.jsonl", _hub("math4500")),
        },
        rows={"train": 7500, "test": 500, "test_rest": 4500},
        licence="MIT",
        url="https://github.com/hendrycks/math",
        columns={"answer": ("expected_answer", "answer")},
        prepare=_math,
        saved_as={"test": "math500", "test_rest": "math4500"},
    ),
    "math500": DataSet(
        hub="HuggingFaceH4/MATH-500",
        files={"test": ("math500.jsonl", "test.jsonl", _hub("math500"), _hub("test"))},
        rows={"test": 500},
        licence="MIT",
        url="https://github.com/openai/prm800k",
        columns={"answer": ("expected_answer", "answer")},
        prepare=_math,
        folders=("math500", "math"),
    ),
    "gsm8k": DataSet(
        hub="openai/gsm8k",
        files={
            "train": ("train.jsonl", "main/train-*.parquet"),
            "test": ("test.jsonl", "main/test-*.parquet"),
        },
        rows={"train": 7473, "test": 1319},
        licence="MIT",
        url="https://github.com/openai/grade-school-math",
        prepare=_gsm8k,
    ),
    "aime2024": DataSet(
        hub="HuggingFaceH4/aime_2024",
        files={"test": ("test.jsonl", _hub("train"))},
        rows={"test": 30},
        licence="none stated; the problems are the MAA's",
        url="https://artofproblemsolving.com/wiki/index.php/AIME_Problems_and_Solutions",
        prepare=_integer,
        saved_as={"test": "train"},
    ),
    "aime2025": DataSet(
        hub="math-ai/aime25",
        files={"test": ("test.jsonl",)},
        rows={"test": 30},
        licence="none stated; the problems are the MAA's",
        url="https://artofproblemsolving.com/wiki/index.php/AIME_Problems_and_Solutions",
        prepare=_integer,
    ),
    "amc23": DataSet(
        hub="math-ai/amc23",
        files={"test": ("test.jsonl", "test-*.parquet", _hub("test"))},
        rows={"test": 40},
        licence="none stated; the problems are the MAA's",
        url="https://artofproblemsolving.com/wiki/index.php/AMC_12_Problems_and_Solutions",
        prepare=_integer,
    ),
    "mathvision": DataSet(
        hub="MathLLMs/MathVision",
        files={
            "test": ("test.jsonl", "test_subset.jsonl", _hub("test")),
            "testmini": ("testmini.jsonl", "test_subset.jsonl", _hub("testmini")),
        },
        rows={"test": 3040, "testmini": 304},
        licence="MIT",
        url="https://github.com/mathllm/MATH-V",
        columns={"images": ("decoded_image", "images", "image")},
        split_where={"testmini": {"testmini": True}},
    ),
    "mathverse": DataSet(
        hub="AI4Math/MathVerse",
        files={
            "testmini": ("testmini.parquet", "testmini.jsonl", "testmini_subset.jsonl"),
            "testmini_text_only": (
                "testmini_text_only.parquet",
                "testmini_text_only.jsonl",
                "testmini_subset.jsonl",
            ),
        },
        rows={"testmini": 3940, "testmini_text_only": 788},
        licence="MIT",
        url="https://github.com/ZrrSkywalker/MathVerse",
        columns={"id": ("id", "sample_index")},
        prepare=_mathverse,
        split_where={"testmini_text_only": {"problem_version": "Text Only"}},
    ),
    "vqa_rad": DataSet(
        hub="flaviagiammarino/vqa-rad",
        files={
            "train": ("train.jsonl", _hub("train")),
            "test": ("test.jsonl", _hub("test")),
        },
        rows={"train": 1793, "test": 451},
        licence="CC0 1.0",
        url="https://osf.io/89kps/",
        prepare=_vqa_rad,
        kind=_medical_kind,
    ),
}


class CatalogTask(FileTask):
    """Options:

    `path`: folder or file; not set: data/downloads, then the hub.
    `split`: one of those above; not set: the first.
    `ask`: "value" or "letter", where a data set has both: the value of the answer, or the letter
    of the choice, with the choices under the question.
    `where`, `columns`, `grading`, `show_choices`, `image_root`, `meta`: as of the task files.
    """

    name: ClassVar[str]
    entry: ClassVar[DataSet]

    def __init__(
        self,
        path: str = "",
        *,
        split: str = "",
        ask: str = "",
        where: Mapping[str, Any] | None = None,
        columns: Mapping[str, ColumnName] | None = None,
        grading: Mapping[str, Any] | None = None,
        show_choices: bool = True,
        image_root: str | None = None,
        meta: Sequence[str] = (),
        limit: int | None = None,
        on_bad_row: Literal["error", "skip"] = "error",
    ):
        self.check_options({"split": split, "ask": ask})
        self.ask = ask or next(iter(self.entry.ask), "")
        more = self.entry.ask.get(self.ask, {})
        self.candidates = {**COLUMNS, **self.entry.columns, **more}
        super().__init__(
            path,
            split=split or next(iter(self.entry.files)),
            columns=columns,
            where=where,
            grading=grading,
            show_choices=show_choices,
            image_root=image_root,
            meta=meta,
            limit=limit,
            on_bad_row=on_bad_row,
        )

    @classmethod
    def check_options(cls, options: Mapping[str, Any]) -> None:
        split = options.get("split")
        if split and split not in cls.entry.files:
            raise ConfigError(
                f"{cls.name}: no split {split!r}; {nearest(str(split), cls.entry.files)}; the "
                f"splits are {listing(cls.entry.files)}"
            )
        ask = options.get("ask")
        if ask and ask not in cls.entry.ask:
            valid = f"valid: {listing(cls.entry.ask)}" if cls.entry.ask else "it has no such option"
            raise ConfigError(f"{cls.name}: ask: {ask!r}; {valid}")
        FileTask.check_options(options)

    def _prepare(self, row: Row) -> Row:
        return self.entry.prepare(row) if self.entry.prepare else row

    def _kind(self, answer: str) -> Mapping[str, Any]:
        return {"kind": self.entry.kind(answer)} if self.entry.kind else {}

    def _choices(self, row: Row, origin: str) -> list[str]:
        choices = super()._choices(row, origin)
        if self.ask == "letter" and not choices:
            raise DataError(
                f"{origin}: ask=letter, but it has no choices; the columns are {listing(row)}"
            )
        return choices

    def _wanted(self, row: Row, origin: str) -> bool:
        marks = self.entry.split_where.get(self.split, {})
        return all(row.get(name, value) == value for name, value in marks.items()) and (
            super()._wanted(row, origin)
        )

    def _read_rows(self, path: str) -> Iterator[LazyRow]:
        folder = locate(self.name, self.entry, path, self.split)
        return split_rows(self.entry, folder, self.split)


def locate(name: str, entry: DataSet, path: str, split: str) -> Path:
    """The folder or file that holds a data set, fetched from the hub if it is nowhere here.

    Raises DataError that says what to fetch and where to put it.
    """
    if path:
        if Path(path).exists():
            return Path(path)
        raise DataError(
            f"{name}: {path}: no such file or folder (looked in {Path.cwd()}); "
            f"{_recipe(name, entry)}"
        )
    for folder in entry.folders or (name,):
        if (DOWNLOADS / folder).is_dir():
            return DOWNLOADS / folder
    return _fetch(name, entry, split)


def _recipe(name: str, entry: DataSet) -> str:
    folder = DOWNLOADS / (entry.folders or (name,))[0]
    unpack = f" && unzip -q {folder}/{entry.archive} -d {folder}" if entry.archive else ""
    return (
        f"on a machine with a network run `hf download {entry.hub} --repo-type dataset "
        f"--local-dir {folder}{unpack}`, and copy that folder to {folder} here, or to another "
        "place and set path to it"
    )


def _fetch(name: str, entry: DataSet, split: str) -> Path:
    from huggingface_hub import snapshot_download

    patterns = [*entry.files[split], *([entry.archive] if entry.archive else [])]
    try:
        folder = Path(snapshot_download(entry.hub, repo_type="dataset", allow_patterns=patterns))
        if entry.archive:
            _unpack(folder / entry.archive)
    except Exception as error:  # no network, no such id, a full disk: the text says
        reason = printable(" ".join(str(error).split()), 300)
        raise DataError(
            f"{name}: not in {DOWNLOADS}, and fetching {entry.hub} from the Hugging Face hub "
            f"failed: {reason}; {_recipe(name, entry)}"
        ) from None
    return folder


def _unpack(archive: Path) -> None:
    """Unpack images.zip into a folder images beside it, unless that is there."""
    target = archive.with_suffix("")
    if target.exists():
        return
    # The processes of a run may all come here at once: the folder appears whole or not at all.
    with TemporaryDirectory(dir=archive.parent) as folder:
        inside = Path(folder, "unpacked")
        with ZipFile(archive) as packed:
            packed.extractall(inside)
        try:
            os.rename(inside / target.name if (inside / target.name).is_dir() else inside, target)
        except OSError:
            if not target.exists():
                raise


def split_rows(entry: DataSet, folder: Path, split: str) -> Iterator[LazyRow]:
    """The rows of one split of a data set in a folder (or the rows of a file)."""
    saved = any((folder / f"dataset_{what}.json").is_file() for what in ("info", "dict"))
    if not saved:
        for pattern in entry.files[split]:
            if folder.is_dir() and (files := sorted(folder.glob(pattern))):
                for file in files:
                    yield from read_rows(str(file))
                return
    yield from read_rows(str(folder), entry.saved_as.get(split, split))


def describe(entry: DataSet, task: type[CatalogTask]) -> str:
    """What `mm-agrae tasks` says about an entry."""
    counts = ", ".join(f"{split} {entry.rows[split]:,}" for split in entry.files)
    licence = f"Licence: {entry.licence}."
    return f"{entry.hub} ({counts} rows). {licence}\n\n{inspect.getdoc(task)}"


def _task_class(name: str, entry: DataSet) -> type[CatalogTask]:
    values = {"name": name, "entry": entry, "__doc__": describe(entry, CatalogTask)}
    return type(name, (CatalogTask,), values)


globals().update({name: _task_class(name, entry) for name, entry in CATALOG.items()})
