"""Checkpoints in Hugging Face format, written whole or not at all.

A folder holds what transformers loads by itself (weights or a LoRA adapter, config, tokenizer,
processor) and beside it `mm_agrae.yaml`, the resolved config, and `mm_agrae.json`: step,
versions and position in the data.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from mm_agrae.errors import RunFolderError
from mm_agrae.policy import Policy
from mm_agrae.processing import Processing

CONFIG_FILE = "mm_agrae.yaml"
STATE_FILE = "mm_agrae.json"


def save(
    folder: Path,
    policy: Policy,
    processing: Processing,
    *,
    config_yaml: str,
    state: dict[str, Any],
) -> None:
    """Write a checkpoint aside, flush it to disk, then rename it into place.

    Raises RunFolderError if it cannot be written; an earlier checkpoint is left as it was.
    """
    aside = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        policy.model.save_pretrained(aside)
        processing.save(str(aside))
        (aside / CONFIG_FILE).write_text(config_yaml, encoding="utf-8")
        (aside / STATE_FILE).write_text(json.dumps(state, indent=1), encoding="utf-8")
        for file in aside.iterdir():
            _flush(file)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(aside, folder)
        _flush(folder.parent)
    except (OSError, RuntimeError) as error:
        # safetensors reports a full disk as a RuntimeError subclass of its own.
        shutil.rmtree(aside, ignore_errors=True)
        raise RunFolderError(
            f"checkpoint {folder}: cannot be written ({error}); free some space or choose another "
            "run_dir. Earlier checkpoints are untouched"
        ) from error


def prune(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints of a run."""
    found = sorted(path for path in folder.glob("step_*") if path.is_dir())
    for path in found[:-keep]:
        shutil.rmtree(path, ignore_errors=True)


def newest(folder: Path) -> Path | None:
    """The newest checkpoint of a run's checkpoint folder, if there is one."""
    found = sorted(path for path in folder.glob("step_*") if (path / STATE_FILE).is_file())
    return found[-1] if found else None


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
