"""The task behind every entry of the catalog: it finds a data set, and reads any copy of it.

A data set is looked for at the option `path` (a folder or a file), then in data/downloads/<name>/, then on the Hugging
Face hub (in its local cache if there is no network). A folder may hold JSONL files with the images beside them, the
hub's files (Parquet with the images inside), or what `datasets.save_to_disk` wrote; all give the same examples.
"""

import inspect
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar
from zipfile import ZipFile

from mm_agrae.errors import ConfigError, DataError, nearest, one_line
from mm_agrae.tasks.files import COLUMNS, FileTask
from mm_agrae.tasks.rows import LazyRow, TableRow, is_saved, listing, read_rows

DOWNLOADS = Path("data/downloads")


@dataclass(frozen=True)
class CatalogEntry:
    """A published data set: where its copies are, and how their columns are read."""

    hub: str
    """Id of the copy on the Hugging Face hub that most programs use."""
    files: Mapping[str, tuple[str, ...]]
    """Patterns of file names for each split, in order; the first that matches is read."""
    rows: Mapping[str, int]
    """Rows of each split on the hub."""
    licence: str
    url: str
    columns: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Overrides of `files.COLUMNS`: the columns a field is looked for in."""
    ask: Mapping[str, Mapping[str, tuple[str, ...]]] = field(default_factory=dict)
    """Values of the option `ask`, and the `columns` of each."""
    prepare: Callable[[TableRow], TableRow] | None = None
    """Brings the rows of all copies to one form."""
    kind: Callable[[str], str] | None = None
    """Gold answer -> `kind` of `grading.accuracy.verify`; not set: left to `verify`."""
    split_where: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Column values that mark a split which some copies keep inside another one."""
    saved_as: Mapping[str, str] = field(default_factory=dict)
    """The hub's name of a split, where it differs."""
    folders: tuple[str, ...] = ()
    """Folders in data/downloads to look in; not set: the task's name."""
    archive: str = ""
    """File on the hub that holds the images, to be unpacked beside the table."""


class CatalogTask(FileTask):
    """Options:

    `path`: folder or file; not set: data/downloads, then the hub.
    `split`: one of those above; not set: the first.
    `ask`: "value" or "letter", for data sets with both: the value of the answer, or the letter of
    the choice, with the choices listed under the question.
    `where`, `columns`, `grading`, `show_choices`, `image_root`, `meta`: as for the task files.
    """

    name: ClassVar[str]
    entry: ClassVar[CatalogEntry]
    fixed: ClassVar = ("subset", "answer_after")

    def __init__(self, path: str = "", *, split: str = "", ask: str = "", **options: Any):
        self.check_options({"split": split, "ask": ask})
        self.ask = ask or next(iter(self.entry.ask), "")
        more = self.entry.ask.get(self.ask, {})
        self.candidates = {**COLUMNS, **self.entry.columns, **more}
        super().__init__(path, split=split or next(iter(self.entry.files)), **options)

    @classmethod
    def check_options(cls, options: Mapping[str, Any]) -> None:
        split, ask, splits = options.get("split"), options.get("ask"), cls.entry.files
        if split and split not in splits:
            hint = f"{nearest(str(split), splits)}; the splits are {listing(splits)}"
            raise ConfigError(f"{cls.name}: no split {split!r}; {hint}")
        if ask and ask not in cls.entry.ask:
            valid = f"valid: {listing(cls.entry.ask)}" if cls.entry.ask else "it has no such option"
            raise ConfigError(f"{cls.name}: ask: {ask!r}; {valid}")
        FileTask.check_options(options)

    def _prepare(self, row: TableRow) -> TableRow:
        return self.entry.prepare(row) if self.entry.prepare else row

    def _kind(self, answer: str) -> Mapping[str, Any]:
        return {"kind": self.entry.kind(answer)} if self.entry.kind else {}

    def _choices(self, row: TableRow, origin: str) -> tuple[list[str], list[str]]:
        choices, labels = super()._choices(row, origin)
        if self.ask == "letter" and not choices:
            problem = f"ask=letter, but it has no choices; the columns are {listing(row)}"
            raise DataError(f"{origin}: {problem}")
        return choices, labels

    def _wanted(self, row: TableRow, origin: str) -> bool:
        marks = self.entry.split_where.get(self.split, {})
        marked = all(row.get(name, value) == value for name, value in marks.items())
        return marked and super()._wanted(row, origin)

    def _read_rows(self, path: str) -> Iterator[LazyRow]:
        found = self._locate(path)
        if not is_saved(found):
            for pattern in self.entry.files[self.split]:
                if files := sorted(found.glob(pattern)):
                    return chain.from_iterable(read_rows(str(file)) for file in files)
        return read_rows(str(found), self.entry.saved_as.get(self.split, self.split))

    def _locate(self, path: str) -> Path:
        """The folder or file that holds the data set, fetched from the hub if there is none here.

        Raises DataError that says what to fetch and where to put it.
        """
        problem = f"{path}: no such file or folder (looked in {Path.cwd()})"
        folders = [DOWNLOADS / folder for folder in self.entry.folders or (self.name,)]
        for found in [Path(path)] if path else folders:
            if found.exists():
                return found
        if not path:
            try:
                return _fetch(self.entry, self.split)
            except Exception as error:  # no network, no such id, a full disk: the error's text says
                problem = (
                    f"not in {DOWNLOADS}, and fetching {self.entry.hub} from the Hugging Face hub "
                    f"failed: {one_line(error)}"
                )
        raise DataError(
            f"{self.name}: {problem}; on a machine with a network run "
            f"`{_download_command(self.name, self.entry)}`, and copy that folder to {folders[0]} "
            "here, or elsewhere and set path to it"
        )


def _download_command(name: str, entry: CatalogEntry) -> str:
    folder = DOWNLOADS / (entry.folders or (name,))[0]
    unpack = f" && unzip -q {folder}/{entry.archive} -d {folder}" if entry.archive else ""
    return f"hf download {entry.hub} --repo-type dataset --local-dir {folder}{unpack}"


def _fetch(entry: CatalogEntry, split: str) -> Path:
    from huggingface_hub import snapshot_download

    patterns = [*entry.files[split], *filter(None, [entry.archive])]
    folder = Path(snapshot_download(entry.hub, repo_type="dataset", allow_patterns=patterns))
    if entry.archive:
        _unpack(folder / entry.archive)
    return folder


def _unpack(archive: Path) -> None:
    """Unpack images.zip into a folder images beside it, unless that exists."""
    target = archive.with_suffix("")
    if target.exists():
        return
    # All processes of a run may do this at once: the folder appears whole or not at all.
    with TemporaryDirectory(dir=archive.parent) as folder:
        inside = Path(folder, "unpacked")
        with ZipFile(archive) as packed:
            packed.extractall(inside)
        try:
            os.rename(inside / target.name if (inside / target.name).is_dir() else inside, target)
        except OSError:
            if not target.exists():
                raise


def task_class(
    name: str, entry: CatalogEntry, base: type[CatalogTask] = CatalogTask, **attributes: Any
) -> type[CatalogTask]:
    """The task of an entry; its docstring is what `mm-agrae tasks` prints."""
    counts = ", ".join(f"{split} {entry.rows[split]:,}" for split in entry.files)
    text = f"{entry.hub} ({counts} rows). Licence: {entry.licence}."
    text += f"\n\n    {_download_command(name, entry)}\n\n{inspect.getdoc(base)}"
    return type(name, (base,), {"name": name, "entry": entry, "__doc__": text, **attributes})
