"""The errors a user can cause. Each message names the file, row or setting and says what to do.

Anything else that escapes is a bug of ours and keeps its traceback; the command line
prints these as one line.
"""


class UserError(Exception):
    """Something outside the program is wrong: a setting, a file, a row, a full disk."""


class ConfigError(UserError):
    """A setting is unknown, has the wrong type, or contradicts another one."""


class DataError(UserError):
    """A row or an image of a data set cannot be used."""


class ModelError(UserError):
    """A checkpoint cannot be loaded, or its family does not fit."""


class RunFolderError(UserError):
    """A run folder cannot be written or read."""


class EngineError(UserError):
    """A rollout engine cannot start, cannot take the weights, or is lost."""


class ProcessError(UserError):
    """Another process of the run has failed, is gone, or does not come."""
