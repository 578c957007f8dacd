"""Names in a config that refer to code: the user's tasks, rewards and engines.

A name is "package.module:Name" or "path/to/file.py:Name". Both are found from the working
directory, whether the program was started as `mm-agrae` or as `python -m mm_agrae.cli`.
"""

import importlib
import importlib.util
import inspect
import re
import sys
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from mm_agrae.errors import ConfigError, nearest

UNSET = inspect.Parameter.empty
"""The default of a required parameter, and the annotation of one that has none."""


def is_import_name(name: str) -> bool:
    """Whether a name has the form "module:Name" or "file.py:Name"."""
    return re.fullmatch(r".+:\w+", name) is not None


def load_object(name: str) -> Any:
    """Import "package.module:Name" or "path/to/file.py:Name".

    Raises ConfigError if there is no such file, module or name; other errors of the import pass through.
    """
    where, _, attribute = name.rpartition(":")
    if where.endswith(".py"):
        path = Path(where).expanduser().resolve()
        if not path.is_file():
            raise ConfigError(f"there is no file {path}")
        module = _file_module(path)
    else:
        if "" not in sys.path and str(Path.cwd()) not in sys.path:
            sys.path.append(str(Path.cwd()))
        try:
            module = importlib.import_module(where)
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"cannot import {where}: there is no module {error.name!r}; modules are searched "
                f"for in the environment and in {Path.cwd()}"
            ) from None
    found = getattr(module, attribute, None)
    if not callable(found):
        names = [key for key, value in vars(module).items() if callable(value) and key[0] != "_"]
        raise ConfigError(f"{where} has no function or class {attribute!r}; it has {', '.join(names) or 'none'}")
    return found


def _file_module(path: Path) -> ModuleType:
    """The module of a file, executed once. Modules beside it can be imported from it."""
    name = f"{path.stem}_{zlib.crc32(str(path).encode()):08x}"
    if name in sys.modules:
        return sys.modules[name]
    specification = importlib.util.spec_from_file_location(name, path)
    assert specification
    assert specification.loader
    module = importlib.util.module_from_spec(specification)
    sys.modules[name] = module
    sys.path.append(str(path.parent))
    try:
        specification.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def check_arguments(function: Callable[..., Any], arguments: Mapping[str, Any], filled_in: Sequence[str] = ()) -> None:
    """Check keyword arguments against the signature of a function or a constructor.

    `filled_in` are parameters that the caller sets. Raises ConfigError for an unknown name, a
    missing one, and a value of the wrong type.
    """
    from pydantic import ConfigDict, TypeAdapter, ValidationError

    parameters = signature(function, resolve=True)
    names = [name for name in parameters if name not in filled_in]
    for name in arguments:
        if name not in names:
            raise ConfigError(f"no option {name!r}; {nearest(name, names)}")
    for name in names:
        if parameters[name].default is UNSET and name not in arguments:
            raise ConfigError(f"needs the option {name!r}")
    for name, value in arguments.items():
        hint = parameters[name].annotation
        if hint is UNSET:
            continue
        try:
            TypeAdapter(hint, config=ConfigDict(strict=True)).validate_python(value)
        except ValidationError as error:
            first = error.errors()[0]
            known = value if isinstance(value, dict) else ()
            key = ".".join([name, *(str(part) for part in first["loc"] if part in known)])
            problem = first["msg"][:1].lower() + first["msg"][1:]
            raise ConfigError(f"{key}: {problem} (got {first['input']!r})") from None


def signature(function: Callable[..., Any], resolve: bool = False) -> Mapping[str, inspect.Parameter]:
    """Parameters of a function or a constructor, by name.

    `**options` of a constructor stand for the parameters of its base class. `resolve`: annotations
    as types instead of text.
    """
    parameters = dict(inspect.signature(function, eval_str=resolve).parameters)
    if parameters.pop("options", None) and inspect.isclass(function):
        inherited = signature(function.__bases__[0], resolve)
        parameters |= {name: inherited[name] for name in inherited if name not in parameters}
    return parameters
