"""The errors a user can cause. Each message names the file, row or setting and says what to do.

Anything else that escapes is a bug of ours and keeps its traceback; the command line prints these as one line.
"""

import difflib
import re
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def nearest(word: str, choices: Iterable[str]) -> str:
    """The end of a message about a wrong name: "did you mean …?", or all that are valid."""
    names = list(choices)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else "valid: " + ", ".join(names)


def no_model(name: str) -> str | None:
    """Why `name` can be no model: it is neither on this machine nor a hub id. None if it may be one."""
    path = Path(name)
    hub_id = HUB_ID.fullmatch(name)
    if path.exists() or (hub_id and not path.parent.is_dir()):
        return None
    beside = [other.name for other in path.parent.iterdir() if other.is_dir()] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, beside, n=1, cutoff=0.7)
    remedy = f"did you mean {str(path.parent / close[0])!r}?" if close else "give one, or a hub id (owner/name)."
    downloaded = f" Of a hub id, give the folder that `hf download {name}` prints" if hub_id else ""
    return f"there is no such folder (looked in {Path.cwd()}); {remedy}{downloaded}"


def install(extra: str) -> str:
    """The command that adds what an extra needs to this environment, whether mm-agrae lies in it as a wheel or as a
    clone: both pip and uv then take it as it is. uv makes environments without a pip."""
    pip = Path(sys.prefix) / "bin" / "pip"
    if not pip.exists():
        return f"uv pip install 'mm-agrae[{extra}]' --python {sys.prefix}"
    return f"{'pip' if shutil.which('pip') == str(pip) else pip} install 'mm-agrae[{extra}]'"


class UserError(Exception):
    """Something outside the program is wrong: a setting, a file, a row, a full disk."""


class ConfigError(UserError):
    """A setting is unknown, has the wrong type, or contradicts another one."""


class DataError(UserError):
    """A row or an image of a data set cannot be used."""


class ModelError(UserError):
    """A checkpoint cannot be loaded, or its family does not fit."""


class RewardError(UserError):
    """A reward part fails on too many completions."""


class RunFolderError(UserError):
    """A run folder cannot be written or read."""


class EngineError(UserError):
    """A rollout engine cannot start, cannot take the weights, or is lost."""


class OutOfMemoryError(UserError):
    """The memory of the device or of the machine is full."""


class ProcessError(UserError):
    """Another process of the run has failed, is gone, or does not come."""


SKIP = "data.on_bad_row=skip, which a run under way accepts too"
"""The remedy for a bad row, as messages name it."""


def with_skip(error: DataError) -> DataError:
    """The error of a bad row that stops a run, with the remedy."""
    text = str(error)
    return DataError(text if "data.on_bad_row" in text else f"{text}; mend it or set {SKIP}")


def one_line(error: Exception, limit: int = 300) -> str:
    """Another library's error, short enough to be quoted in a message of ours."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else f"{text[:limit]}…"
