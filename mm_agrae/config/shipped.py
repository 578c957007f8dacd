"""Files that come with the package: configs, small checkpoints, an example run, shapes of published models.

In a clone they lie beside the package; the build maps them into it (pyproject.toml), so that a wheel has them too.
"""

import os.path
from pathlib import Path

from mm_agrae.errors import ConfigError, nearest

PACKAGE = Path(__file__).resolve().parents[1]
SUFFIXES = (".yaml", ".yml")


def shipped(name: str) -> Path:
    """Where "configs/…" or "data/…" of the repository lies, in a clone and in an installed wheel; it may not exist."""
    inside = PACKAGE / "shipped"
    return (inside if inside.is_dir() else PACKAGE.parent) / name


def found(path: str) -> str:
    """`path` if something is there, else the shipped file or folder of that name, if any: so `data/warm_start/vl` and
    `configs/quickstart.yaml` mean the same in every working directory."""
    if path.startswith(("data/", "configs/")) and not os.path.exists(path) and shipped(path).exists():
        return str(shipped(path))
    return path


def config_names() -> list[str]:
    """Names of the shipped configs, such as quickstart: complete ones, then those to be laid over others (with/…)."""
    folder = shipped("configs")
    names = (str(path.relative_to(folder).with_suffix("")) for path in folder.rglob("*.yaml"))
    return sorted(name for name in names if not name.startswith(("accelerate/", "studies/")))


def config_file(name: str | Path) -> Path:
    """The file of a config given by path or by shipped name. Raises ConfigError if there is neither."""
    path = Path(found(str(name)))
    if os.path.isfile(path):  # False, too, for a name that no file can have
        return path
    if str(name) in config_names():
        return shipped(f"configs/{name}.yaml")
    if path.suffix in SUFFIXES or os.path.exists(path):
        return path  # which says for itself what is wrong with it
    raise ConfigError(
        f"config {name}: there is no such file, and no config of that name comes with mm-agrae "
        f"(`mm-agrae configs` lists them); {nearest(str(name), config_names())}"
    )
