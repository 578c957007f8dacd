"""Config files and overrides -> a `Config`, and back to YAML.

Unknown keys, wrong types and settings that contradict each other raise `ConfigError`, which names
the key and the nearest valid one. Nothing else is loaded before a config is known to be whole.
"""

import copy
import functools
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from mm_agrae.config.schema import AdvantageSection, Config, UpdateSection
from mm_agrae.config.section import SECRET_NAME, URL_SECRET, number
from mm_agrae.config.shipped import SUFFIXES, config_file, config_names
from mm_agrae.errors import ConfigError, nearest

Kind = TypeVar("Kind", bound=BaseModel)
MAX_VALUES, MAX_DEPTH = 100_000, 50
"""Of a config file: far above what anybody writes."""


CHOICES: dict[str, tuple[str, type[BaseModel]]] = {
    "advantage": ("rule", AdvantageSection),
    "update": ("loss", UpdateSection),
}
"""Section -> the setting in it that decides what some others of the section mean."""


def load(
    source: str | Path | Mapping[str, Any],
    overrides: Sequence[str | Mapping[str, Any]] = (),
    *,
    for_gpus: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> Config:
    """Read a config and apply overrides: `key=value`, or further files or mappings laid over it.

    A file is named by its path, or by its name among those that come with mm-agrae (quickstart, with/grpo). It may
    build on another one: `base: other.yaml`, relative to itself, or `base: quickstart`. Sections are merged key by
    key, anything else is replaced, by what comes later. Where it names another rule or loss, settings of the former
    one in files below are left out; `say` gets a line on each. `for_gpus`: `model.dtype: auto` is that of GPUs,
    whatever this machine has. Raises ConfigError naming the file and the key.
    """
    layers, names = list[dict[str, Any] | str](), config_names()
    for given in (source, *overrides):
        if isinstance(given, Mapping):
            layers += _with_base(copy.deepcopy(dict(given)), Path("config"))
        elif given is source or ("=" not in (text := str(given)) and (Path(text).suffix in SUFFIXES or text in names)):
            layers += _read(config_file(given))
        else:
            layers.append(text)
    typed: dict[str, Any] = {}
    for layer in layers:
        if isinstance(layer, str) and layer.startswith(tuple(f"{section}." for section in CHOICES)):
            apply_override(typed, layer)
    values: dict[str, Any] = {}
    for layer in layers:
        above: dict[str, Any] = {}
        if isinstance(layer, str):
            apply_override(above, layer)
        else:
            above = layer
        for section, name, reason in _outdated(values, above, typed):
            say(f"left out {section}.{name}={values[section][name]} of a config file: {reason}")
            values = values | {section: {key: value for key, value in values[section].items() if key != name}}
        if isinstance(layer, str):
            apply_override(values, layer)
        else:
            values = _merge(values, above)
    return parse(values, "config" if isinstance(source, Mapping) else str(source), for_gpus)


def _outdated(
    below: Mapping[str, Any], above: Mapping[str, Any], typed: Mapping[str, Any]
) -> Iterator[tuple[str, str, str]]:
    """Settings in `below` of a rule or a loss that `above` replaces, as (section, name, why they go).

    What `above` or the command line (`typed`) sets stays, and is an error where it has no effect.
    """
    from mm_agrae.advantage import RULES, accepted_settings

    for section, (choice, kind) in CHOICES.items():
        old, new = below.get(section), above.get(section)
        if not (isinstance(old, dict) and isinstance(new, dict) and isinstance(new.get(choice), str)):
            continue
        former, chosen = old.get(choice, kind.model_fields[choice].default), new[choice]
        if choice == "loss":
            own, why = {"clip_low", "clip_high"} if former != chosen else set(), "has a default of its own"
        elif isinstance(former, str) and {former, chosen} <= RULES.keys():
            own, why = {*accepted_settings(former)} - {*accepted_settings(chosen)}, "does not take it"
        else:
            continue
        for name in sorted((own & old.keys()) - new.keys() - typed.get(section, {}).keys()):
            if old[name] is not None:
                yield section, name, f"{choice} {chosen!r} {why}"


def _read(path: Path, built_on_it: tuple[Path, ...] = ()) -> list[dict[str, Any]]:
    """The plain values of a config file, after those of its `base`."""
    named_by = f" (base of {built_on_it[-1]})" if built_on_it else ""
    try:
        if path.resolve() in [other.resolve() for other in built_on_it]:
            circle = " -> ".join(str(other) for other in (*built_on_it, path))
            raise ConfigError(f"config {path}: base goes in a circle: {circle}")
        values = _from_yaml(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RuntimeError) as error:
        not_text = "not UTF-8 text" if isinstance(error, UnicodeDecodeError) else "no file name"
        reason = getattr(error, "strerror", None) or not_text
        raise ConfigError(f"config {path}{named_by}: cannot be read ({reason})") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"config {path}: not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"config {path}: expected a mapping of settings at the top level")
    return _with_base(values, path, built_on_it)


def _with_base(values: dict[str, Any], path: Path, built_on_it: tuple[Path, ...] = ()) -> list[dict[str, Any]]:
    """`values`, read from `path`, after those of the file they build on."""
    base = values.pop("base", None)
    if base is None:
        return [values]
    if not isinstance(base, str):
        raise ConfigError(f"config {path}: base must be the path of one file (got {base!r})")
    by_name = base in config_names() and not (path.parent / base).is_file()
    return [*_read(config_file(base) if by_name else path.parent / base, (*built_on_it, path)), values]


def _from_yaml(text: str) -> Any:
    """`yaml.safe_load` that raises YAMLError and nothing else."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise
    except Exception as error:  # a 13th month, 5,000 digits, 1,000 brackets: of many kinds
        raise yaml.YAMLError(f"{error or type(error).__name__}") from None
    # An alias may stand for what holds it, or lists of aliases double at every line.
    inside, count = [(value, 0)], 0
    while inside:
        node, depth = inside.pop()
        count += 1
        if count > MAX_VALUES or depth > MAX_DEPTH:
            raise yaml.YAMLError(f"more than {MAX_VALUES:,} values, or more than {MAX_DEPTH} deep")
        children = [*node, *node.values()] if isinstance(node, dict) else node
        if isinstance(children, list | tuple | set):
            inside += [(child, depth + 1) for child in children]
    return value


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """`above` laid over `below`; mappings are merged, anything else is replaced."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        both = isinstance(old, dict) and isinstance(value, dict)
        merged[key] = _merge(old, value) if both else value  # type: ignore[arg-type]
    return merged


def read(path: Path) -> dict[str, Any]:
    """The plain values of a YAML file laid over those of its `base`. Raises ConfigError."""
    return functools.reduce(_merge, _read(path))


def parse(values: dict[str, Any], source: str = "config", for_gpus: bool = False) -> Config:
    """Validate plain values, as read from YAML. Raises ConfigError."""
    return parse_as(Config, values, source, {"for_gpus": for_gpus})


def parse_as(kind: type[Kind], values: dict[str, Any], source: str, context: dict[str, Any] | None = None) -> Kind:
    """`parse` for another kind of file than a config."""
    try:
        return kind.model_validate(values, context=context)
    except ValidationError as error:
        lines = [_explain(kind, item) for item in error.errors()]
        raise ConfigError(f"{source}:\n  " + "\n  ".join(lines)) from None


def dump(config: Config) -> str:
    """The resolved config as YAML; `load` gives it back, with *** for each secret."""
    return yaml.safe_dump(public(config), sort_keys=False, allow_unicode=True)


def public(config: Config) -> dict[str, Any]:
    """Plain values that may be written and logged: passwords in URLs, and what is named like a
    secret (a task's or an engine's own option), are replaced by ***."""
    return _hide(config.model_dump(mode="json"))


def _hide(value: Any, name: str = "") -> Any:
    if isinstance(value, dict):
        return {key: _hide(item, str(key)) for key, item in value.items()}
    if isinstance(value, list):
        return [_hide(item, name) for item in value]
    if isinstance(value, str) and value:
        return "***" if SECRET_NAME.fullmatch(name) else URL_SECRET.sub(r"\1***@", value)
    return value


def apply_override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r}: expected key=value, such as train.steps=10, or a YAML file")
    try:
        value = number(_from_yaml(text)) if text else ""
    except yaml.YAMLError:
        raise ConfigError(f"override {override!r}: {text!r} is not valid YAML") from None
    *parents, last = key.split(".")
    node: Any = values
    for depth, name in enumerate(parents, 1):
        part = _part(node, name, key)
        if isinstance(node, dict) and node.get(part) is None:
            node[part] = {}
        node = node[part]
        if not isinstance(node, dict | list):
            where = ".".join(parents[:depth])
            raise ConfigError(f"override {override!r}: {where} is a single value, not a section")
    node[_part(node, last, key)] = value


def _part(node: dict[str, Any] | list[Any], name: str, key: str) -> Any:
    """What a name in an override's key stands for: a key of a mapping, or an index of a list."""
    if isinstance(node, dict):
        return name
    if not name.isdecimal() or int(name) >= len(node):
        raise ConfigError(f"override {key}: {name!r} is not an index of a list of {len(node)} (counted from 0)")
    return int(name)


def _explain(kind: type[BaseModel], item: Any) -> str:
    location = [part for part in item["loc"] if not str(part).startswith("function-")]
    key = ".".join(str(part) for part in location)
    if item["type"] == "extra_forbidden":
        section: Any = kind
        for part in location[:-1]:
            section = _section_type(section, part)
        fields = section.model_fields if section is not None else {}
        return f"{key}: unknown setting; {nearest(str(location[-1]), fields)}"
    if item["type"] == "missing":
        return f"{key}: required, but not set"
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "value_error":
        names_it = (key and message.startswith(key)) or "." in message.split(" ")[0]
        return message if names_it or not key else f"{key}: {message}"
    message = message[:1].lower() + message[1:]
    if item["type"] == "literal_error" and isinstance(item["input"], str):
        expected = item["ctx"]["expected"].replace("' or '", "', '").replace("'", "")
        message = f"{item['input']!r} is not valid; {nearest(item['input'], expected.split(', '))}"
        return f"{key}: {message} (one of {expected})"
    return f"{key}: {message} (got {item['input']!r})"


def _section_type(section: Any, part: Any) -> Any:
    """The model class that the field `part` of `section` holds, through Optional and tuple."""
    if section is None or isinstance(part, int):
        return section
    field = getattr(section, "model_fields", {}).get(part)
    stack = [field.annotation] if field else []
    while stack:
        kind = stack.pop()
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
        stack.extend(typing.get_args(kind))
    return None
