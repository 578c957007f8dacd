"""Work that several processes, on several machines, find in one folder: each piece is done by one of them.

A claim is a file that only one process can have created, with its host and process ids in it. Its owner touches it
while it works. A claim that nobody has touched for a while, or whose processes on this host are gone, is taken over
by creating the file of the next number: of several that try, one succeeds.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path

HEARTBEAT_S = 20.0
STALE_S = 300.0
"""Without a heartbeat for so long a claim counts as abandoned."""


class Claim:
    """A piece of work that is ours until the `with` block ends. Made by `claim`.

    `on_lost` is called, on another thread, if this process was held up for so long that another one took over.
    """

    def __init__(self, path: Path, number: int) -> None:
        self.path, self.number = path, number
        self.on_lost: Callable[[], object] = lambda: None
        self._ended = threading.Event()
        self._heart = threading.Thread(target=self._beat, daemon=True)

    @property
    def file(self) -> Path:
        return self.path.with_name(f"{self.path.name}.{self.number}")

    def note(self, *processes: int) -> None:
        """Write down who works here: the claim stands as long as one of these processes, or this one, lives."""
        self.file.write_text(json.dumps({"host": _host(), "processes": [os.getpid(), *processes]}), encoding="utf-8")

    def __enter__(self) -> Claim:
        self._heart.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._heart.join()
        if _newest(self.path) == self.number:
            for number in range(1, self.number + 1):
                Claim(self.path, number).file.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._ended.wait(HEARTBEAT_S):
            if _newest(self.path) != self.number:
                self.on_lost()
                return
            with contextlib.suppress(OSError):
                os.utime(self.file)


def claim(path: Path) -> Claim | None:
    """Claim the work that `path` stands for; None if another process has it. Files `path.1`, `path.2` … appear."""
    path.parent.mkdir(parents=True, exist_ok=True)
    mine = Claim(path, _newest(path) + 1)
    if mine.number > 1 and not _abandoned(Claim(path, mine.number - 1).file):
        return None
    try:
        os.close(os.open(mine.file, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        return None
    mine.note()
    return mine


def _newest(path: Path) -> int:
    endings = (file.name.removeprefix(f"{path.name}.") for file in path.parent.glob(f"{path.name}.*"))
    return max((int(ending) for ending in endings if ending.isdecimal()), default=0)


def _abandoned(file: Path) -> bool:
    probe = file.with_name(f"{file.name}.{os.getpid()}.now")
    try:
        probe.touch()  # by the clock of the folder's machine, which may not be this one's
        silent = probe.stat().st_mtime - file.stat().st_mtime
        held = json.loads(file.read_text(encoding="utf-8") or '{"host": ""}')  # just begun
    except (OSError, ValueError):  # just ended, or being written
        return False
    finally:
        probe.unlink(missing_ok=True)
    return silent > STALE_S or (held["host"] == _host() and not any(map(_runs, held["processes"])))


def _host() -> str:
    """This machine, or this container on it: where process ids mean something."""
    with contextlib.suppress(OSError):
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    return socket.gethostname()


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except OSError as error:
        return not isinstance(error, ProcessLookupError)  # another user's runs
    return True
