"""Which code made a run: versions of the packages that affect its numbers, and our revision."""

import functools
import importlib.metadata
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path

from mm_agrae import __version__

PACKAGES = ("torch", "torchvision", "transformers", "peft", "accelerate", "datasets", "vllm")


def versions() -> dict[str, str]:
    """Package name -> version; packages that are not installed are left out."""
    found = {"mm_agrae": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if revision := _revision():
        found["revision"] = revision
    return found


def changes(earlier: Mapping[str, str]) -> list[str]:
    """Packages whose version has changed since, such as "torch 2.12.0 -> 2.13.0"."""
    now = versions()
    names = sorted((earlier.keys() & now.keys()) - {"revision"})
    return [f"{n} {earlier[n]} -> {now[n]}" for n in names if earlier[n] != now[n]]


@functools.cache  # what runs is what was loaded
def _revision() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return found.stdout.strip()
