"""Which code made a run: versions of the packages that decide its numbers, and our revision."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
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
    revision = _revision()
    if revision:
        found["revision"] = revision
    return found


def _revision() -> str:
    try:
        result = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return result.stdout.strip() if result.returncode == 0 else ""
