"""Atomic writes, JSON of any value, and operating system errors with advice.

A file is written beside its final path, synced and renamed; a line that could not be appended
whole is removed again. So a full disk or a killed run never costs what was there before.

Texts come from models and may hold anything. Surrogates without a partner, which UTF-8 cannot
hold, are stored as U+FFFD; everything else round-trips.
"""

import errno
import gzip
import io
import json
import math
import os
import shutil
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from mm_agrae.errors import RunFolderError


def clean_text(value: Any) -> str:
    """Text that UTF-8 can hold: surrogate pairs joined, lone surrogates as U+FFFD."""
    text = "" if value is None else str(value)
    try:
        text.encode()
    except UnicodeEncodeError:
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON of any value: numbers that are not finite become null, unknown objects their text."""
    return json.dumps(_plain(value), ensure_ascii=False, allow_nan=False, indent=indent)


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {clean_text(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):  # numpy and torch
        return _plain(value.tolist())
    return clean_text(value)


def write_atomic(path: Path, content: str | bytes, run: Path | None = None) -> None:
    """Write a whole file or leave what was there.

    Raises RunFolderError that names the run folder `run`; not given: the file's own folder.
    """
    folder = run or path.parent
    with explained(folder, f"writing {path.relative_to(folder)}"), _replacement(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def write_jsonl(path: Path, rows: Iterable[Any]) -> None:
    """Write dataclasses or mappings as JSON lines, atomically. Raises RunFolderError."""
    with explained(path.parent, f"writing {path.name}"), _replacement(path) as file:
        for row in rows:
            values = row if isinstance(row, Mapping) else asdict(row)
            file.write((to_json(values) + "\n").encode())


def append_line(path: Path, line: str) -> None:
    """Add a whole line or nothing, removing one that a killed process left unfinished.

    Raises OSError.
    """
    with path.open("a+b", buffering=0) as file:
        end = _drop_unfinished_line(file)
        unwritten = memoryview((line + "\n").encode())
        try:
            while unwritten:  # an unbuffered write may be partial, as on a nearly full disk
                unwritten = unwritten[file.write(unwritten) :]
        except OSError:
            with suppress(OSError):
                file.truncate(end)
            raise


def _drop_unfinished_line(file: IO[bytes]) -> int:
    """Truncate a file to its last newline; return its length."""
    end = file.seek(0, os.SEEK_END)
    file.seek(max(0, end - 1))
    if end and file.read(1) != b"\n":  # an empty file may be a device without an end
        file.seek(0)
        end = file.read().rfind(b"\n") + 1
        file.truncate(end)
    return end


def open_lines(path: Path) -> io.BufferedIOBase:
    """A file of lines, gzipped or not."""
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")


@contextmanager
def _replacement(path: Path) -> Iterator[IO[bytes]]:
    """A file that replaces `path` only once it is complete and on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.part")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


@contextmanager
def explained(folder: Path, action: str) -> Iterator[None]:
    """Turn an OSError into a RunFolderError that names the folder and says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            advice = "disk or quota is full: free some space and resume; what was written is intact"
            with suppress(OSError):
                advice += f" ({shutil.disk_usage(folder).free >> 20} MB free)"
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            advice = "it is read-only here: choose another run_dir or change its permissions"
        elif error.errno in (errno.ENOTDIR, errno.EEXIST, errno.EISDIR):
            advice = "a file stands in the way: choose another run_dir or move that file"
        else:
            advice = "choose another run_dir or fix the cause"
        problem = f"{action} failed ({error.strerror or error})"
        raise RunFolderError(f"run folder {folder}: {problem}; {advice}") from error
