"""Checkpoints in Hugging Face format, written whole or not at all, and taken up again exactly.

A folder holds what transformers loads by itself (weights or a LoRA adapter, config, tokenizer,
processor) and beside it

    mm_agrae.yaml     the resolved config
    training.pt       optimiser and schedule, read with weights_only
    mm_agrae.json     step, position in the data, versions, and the checksum of every other file

Nothing random is stored: all randomness of a run follows from its seed and the step. A folder
counts only with a complete `mm_agrae.json`, which is written last; one whose files do not match
their checksums is passed over in favour of the one before.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from mm_agrae.errors import RunFolderError
from mm_agrae.policy import Policy
from mm_agrae.processing import Processing

CONFIG_FILE = "mm_agrae.yaml"
STATE_FILE = "mm_agrae.json"
TRAINING_FILE = "training.pt"


def save(
    folder: Path,
    policy: Policy,
    processing: Processing,
    *,
    config_yaml: str,
    state: Mapping[str, Any],
    training: Mapping[str, Any],
) -> None:
    """Write a checkpoint aside, flush it to disk, then rename it into place.

    `state` are plain values for the JSON file, `training` state dicts of tensors. Raises
    RunFolderError if it cannot be written; an earlier checkpoint is left as it was.
    """
    with written_whole(folder) as aside:
        policy.model.save_pretrained(aside)
        processing.save(str(aside))
        (aside / CONFIG_FILE).write_text(config_yaml, encoding="utf-8")
        torch.save(dict(training), aside / TRAINING_FILE)
        sums = {str(path.relative_to(aside)): _checksum(path) for path in _files(aside)}
        (aside / STATE_FILE).write_text(
            json.dumps({**state, "sha256": sums}, indent=1), encoding="utf-8"
        )


@contextlib.contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """A folder to write into, which takes the place of `folder` once all of it is on disk.

    Raises RunFolderError if that fails; what stood at `folder` is then left as it was.
    """
    aside = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        yield aside
        for path in (*_files(aside), aside):
            _flush(path)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(aside, folder)
        _flush(folder.parent)
    except BaseException as error:
        shutil.rmtree(aside, ignore_errors=True)
        # torch and safetensors report a full disk by errors of their own.
        if not isinstance(error, OSError | RuntimeError | SafetensorError):
            raise
        raise RunFolderError(
            f"checkpoint {folder}: cannot be written ({error}); free some space or choose another "
            "folder. Earlier checkpoints are untouched"
        ) from error


def restore(folder: Path, policy: Policy) -> tuple[dict[str, Any], dict[str, Any]]:
    """Put a checkpoint's weights into `policy`, which has the same architecture.

    Returns (state, training) as given to `save`. Raises RunFolderError for a damaged one.
    """
    state = checked_state(folder)
    policy.load_weights(folder)
    training = torch.load(folder / TRAINING_FILE, map_location="cpu", weights_only=True)
    return state, training


def checked_state(folder: Path) -> dict[str, Any]:
    """The JSON file of a checkpoint that is whole. Raises RunFolderError for a damaged one."""
    state = _read_state(folder)
    if state is None:
        raise RunFolderError(f"checkpoint {folder}: {STATE_FILE} is missing or damaged")
    if bad := damaged(folder):
        raise RunFolderError(f"checkpoint {folder}: {', '.join(bad)} damaged or missing")
    return state


def damaged(folder: Path) -> list[str]:
    """Files of a checkpoint that do not match their checksums; all if it has none."""
    state = _read_state(folder)
    if state is None:
        return [STATE_FILE]
    bad = []
    for name, expected in state["sha256"].items():
        path = folder / name
        if not path.is_file() or _checksum(path) != expected:
            bad.append(name)
    return bad


def candidates(folder: Path) -> list[Path]:
    """Complete checkpoints of a run's checkpoint folder, newest first."""
    found = sorted(folder.glob("step_*"), reverse=True)
    return [path for path in found if (path / STATE_FILE).is_file()]


def newest(folder: Path) -> Path | None:
    """The newest checkpoint of a run's checkpoint folder, if there is one."""
    return next(iter(candidates(folder)), None)


def prune(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints of a run, and what a killed run left."""
    found = sorted(path for path in folder.glob("step_*") if path.is_dir())
    for path in (*found[:-keep], *folder.glob(".step_*.partial")):
        shutil.rmtree(path, ignore_errors=True)


def _read_state(folder: Path) -> dict[str, Any] | None:
    try:
        state = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
        return state if isinstance(state.get("sha256"), dict) else None
    except (OSError, ValueError, AttributeError):
        return None


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _checksum(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
