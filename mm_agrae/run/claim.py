"""Work that several processes, on several machines, find in one folder: each piece is done by one of them."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mm_agrae.errors import RunFolderError


@contextmanager
def claim(path: Path) -> Iterator[int | None]:
    """Lock the file that stands for a piece of work: yields its descriptor, or None if another process has it.

    The system takes the lock back when the last process that holds the descriptor ends, in whatever way; a child that
    inherits it (`pass_fds`) keeps the work claimed. The file stays: who deleted it could delete another one's lock.
    Raises RunFolderError where the file system has no locks.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, free = os.open(path, os.O_CREAT | os.O_RDWR), False
    try:
        try:
            with suppress(BlockingIOError):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                free = True
        except OSError as error:
            raise RunFolderError(
                f"{path}: cannot be locked ({error.strerror}), so that two processes might do the same; "
                "choose a folder on a file system that has locks"
            ) from None
        yield descriptor if free else None
    finally:
        os.close(descriptor)
