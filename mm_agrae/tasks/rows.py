"""Rows of tables in any format, each with a name for error messages."""

import ast
import csv
import json
import re
import reprlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from mm_agrae.errors import DataError, one_line
from mm_agrae.tasks.images import printable

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")

TableRow = Mapping[str, Any]
"""Column name -> value."""
MISSING: Any = object()


class LazyRow(NamedTuple):
    """A row that is parsed when it is read."""

    origin: str
    """File and row, for messages."""
    folder: Path
    """What the paths of its images are relative to."""
    read: Callable[[], TableRow]
    """Parses the row. Raises DataError naming it."""


def read_rows(path: str, split: str = "", subset: str = "") -> Iterator[LazyRow]:
    """The rows of a file, a folder or a hub data set, in order.

    Nothing is parsed before a row is read, except that JSON lists and Parquet files are held in
    memory. Raises DataError naming the file.
    """
    local = Path(path)
    if local.is_file():
        yield from _file_rows(local)
    elif is_saved(local):
        from datasets import load_from_disk

        try:
            data = load_from_disk(path)
        except Exception as error:  # Arrow and JSON errors of many kinds
            raise DataError(f"{path}: cannot be read as a saved data set ({error})") from None
        yield from _dataset_rows(data, path, local, split)
    elif local.is_dir():
        for file in _choose_files(local, split, subset):
            yield from _file_rows(file)
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", path) and not (local.parent.exists() or local.suffix in SUFFIXES):
        yield from _hub_rows(path, split, subset)
    else:
        raise DataError(
            f"{path}: no such file or folder (looked in {Path.cwd()}); put the data there or set "
            "the source's path, for instance data.train.0.path=/where/it/is/train.jsonl"
        )


def is_saved(folder: Path) -> bool:
    """Whether `datasets.save_to_disk` has written the folder."""
    return any((folder / f"dataset_{what}.json").is_file() for what in ("info", "dict"))


def _choose_files(folder: Path, split: str, subset: str) -> list[Path]:
    """The data files of a split, by name: train.jsonl, train-00000-of-00002.parquet, …; without a split one file, or
    parts of one, whose names differ in numbers alone."""
    files = sorted(file for file in folder.rglob("*") if file.suffix in SUFFIXES and file.is_file())
    names = {file: file.relative_to(folder) for file in files}
    files = [f for f in files if not any(part.startswith(".") for part in names[f].parts)]
    if subset:
        files = [file for file in files if subset in names[file].parts[:-1]]
    exact = [file for file in files if split in (file.stem, *names[file].parts[:-1])]
    shards = [file for file in files if re.match(rf"{re.escape(split)}[-_.]", file.stem)]
    chosen = (exact or shards) if split else files
    parts = {re.sub(r"(?<![A-Za-z])[0-9]+", "#", str(names[file])) for file in chosen}
    if not chosen or (len(parts) > 1 and not split):
        raise DataError(
            f"{folder}: {'choose one file by' if chosen else 'nothing for'} split={split!r}"
            f"{f' and subset={subset!r}' if subset else ''}; the data files "
            f"are {listing(names.values())}"
        )
    return chosen


def _file_rows(path: Path) -> Iterator[LazyRow]:
    try:
        if path.suffix == ".parquet":
            yield from _parquet_rows(path)
        elif path.suffix in (".csv", ".tsv"):
            yield from _csv_rows(path)
        elif path.suffix == ".json" and _first_byte(path) == b"[":
            yield from _json_rows(path)
        elif path.suffix in SUFFIXES:
            with path.open("rb") as file:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        origin = f"{path}, line {number}"
                        yield LazyRow(origin, path.parent, partial(_parse_line, line, origin))
        else:
            raise DataError(f"{path}: not a data file ({', '.join(SUFFIXES)})")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None


def _first_byte(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]


def _json(data: bytes, origin: str) -> Any:
    try:
        return json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{origin}: not JSON ({error})") from None


def _parse_line(line: bytes, origin: str) -> TableRow:
    return _mapping(_json(line, origin), origin)


def _mapping(row: Any, origin: str) -> TableRow:
    if not isinstance(row, dict):
        raise DataError(f"{origin}: expected a JSON object, got {show(row)}")
    try:
        # JSON can spell half a surrogate pair, which no file and no tokenizer accepts.
        json.dumps(row, ensure_ascii=False).encode()
    except (UnicodeEncodeError, RecursionError) as error:
        raise DataError(f"{origin}: not valid Unicode, or nested too deep ({error})") from None
    return row


def _json_rows(path: Path) -> Iterator[LazyRow]:
    for number, row in enumerate(_json(path.read_bytes(), str(path))):
        origin = f"{path}, row {number}"
        yield LazyRow(origin, path.parent, partial(_mapping, row, origin))


def _csv_rows(path: Path) -> Iterator[LazyRow]:
    def checked(row: dict[Any, Any], origin: str) -> TableRow:
        if None in row or None in row.values():
            fewer = "fewer" if None in row.values() else "more"
            raise DataError(f"{origin}: {fewer} fields than the header has names")
        return _mapping(row, origin)

    # Bytes that are not UTF-8 become surrogates, so that `_mapping` refuses their row alone.
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ",")
        try:
            for row in reader:
                origin = f"{path}, line {reader.line_num}"
                yield LazyRow(origin, path.parent, partial(checked, row, origin))
        except csv.Error as error:
            raise DataError(f"{path}, line {reader.line_num}: not CSV ({error})") from None


def _parquet_rows(path: Path) -> Iterator[LazyRow]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: cannot be read as Parquet ({error})") from None
    yield from _arrow_rows(lambda i: table.slice(i, 1), table.num_rows, str(path), path.parent)


def _arrow_rows(table_of: Callable[[int], Any], count: int, name: str, folder: Path) -> Iterator[LazyRow]:
    def read(index: int) -> TableRow:
        try:
            return table_of(index).to_pylist()[0]
        except ValueError as error:  # text that is not UTF-8, dates that Python cannot hold
            raise DataError(f"{name}, row {index}: cannot be read ({error})") from None

    for index in range(count):
        yield LazyRow(f"{name}, row {index}", folder, partial(read, index))


def _dataset_rows(data: Any, name: str, folder: Path, split: str) -> Iterator[LazyRow]:
    from datasets import Dataset

    if not isinstance(data, Dataset):
        chosen = next(iter(data)) if not split and len(data) == 1 else split
        if chosen not in data:
            raise DataError(f"{name}: set split to one of {', '.join(data)} (got {split!r})")
        name, data = f"{name} [{chosen}]", data[chosen]
    rows = data.with_format("arrow")  # as stored: images stay encoded
    yield from _arrow_rows(rows.__getitem__, len(rows), name, folder)


def _hub_rows(name: str, split: str, subset: str) -> Iterator[LazyRow]:
    import datasets

    try:
        data = datasets.load_dataset(name, subset or None)
    except Exception as error:  # no network, no such id, a subset to choose: the error's text says
        folder = f"data/downloads/{name.split('/')[1]}"
        raise DataError(
            f"{name}: no such file or folder, and fetching it from the Hugging Face hub failed: "
            f"{one_line(error)}. On a machine with a network run `hf download {name} --repo-type "
            f"dataset --local-dir {folder}`, copy that folder here and set path={folder}"
        ) from None
    yield from _dataset_rows(data, name, Path(datasets.config.HF_CACHE_HOME), split)


def lookup(row: TableRow, name: str, default: Any = MISSING) -> Any:
    """The value of a column, or of what `outer.inner` names within it; `default` if there is none."""
    if name in row or "." not in name:
        return row.get(name, default)
    value: Any = row
    for part in name.split("."):
        value = literal(value) if isinstance(value, str) else value
        if isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        elif isinstance(value, Mapping) and part in value:
            value = value[part]
        else:
            return default
    return value


def first_of(row: TableRow, names: Iterable[str]) -> Any:
    """The first of these values that is there and not None; else None."""
    return next((row[name] for name in names if row.get(name) is not None), None)


def literal(text: str) -> Any:
    """The list or mapping that a text spells in JSON or Python; None if it spells neither."""
    if text.lstrip()[:1] not in ("[", "{"):
        return None
    for read in (json.loads, ast.literal_eval):
        try:
            with warnings.catch_warnings():  # of odd escapes
                warnings.simplefilter("ignore")
                return read(text.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
            continue
    return None


def listing(names: Iterable[object]) -> str:
    return printable(", ".join(map(str, names)) or "none", 500)


def show(value: Any) -> str:
    return f"{type(value).__name__} {reprlib.repr(value)}"
