"""Checkpoints in Hugging Face format, written whole or not at all, and restored exactly.

A folder holds what transformers loads by itself (weights or a LoRA adapter, config, tokenizer,
processor) and beside it

    mm_agrae.yaml     the resolved config
    training.pt       optimiser and schedule, read with weights_only
    README.md         the model card, which may be edited
    mm_agrae.json     format, step, data cursor, versions, the checksum of every other file but the card

Nothing random is stored: all randomness of a run follows from its seed and the step. A folder
counts only with a complete `mm_agrae.json`, which is written last; one whose files do not match
their checksums is passed over in favour of the one before.

Beside the folders `step_000010`, … of a run are the links `latest` and `best`, which name a
checkpoint without its step. Resuming does not rely on them: it looks through the folders.
"""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from mm_agrae import __version__
from mm_agrae import config as configs
from mm_agrae.config import Config
from mm_agrae.config.shipped import found
from mm_agrae.errors import ConfigError, RunFolderError
from mm_agrae.model.compat import readable_by_4
from mm_agrae.model.policy import Policy
from mm_agrae.model.processing import Processing
from mm_agrae.run.model_card import CARD_FILE

FORMAT = 1
"""Raised when a checkpoint can no longer be read by the code before."""

CONFIG_FILE = "mm_agrae.yaml"
STATE_FILE = "mm_agrae.json"
TRAINING_FILE = "training.pt"
LATEST, BEST, BEST_FILE = "latest", "best", "best.json"

COUNTS = ("step", "data_position", "tokens_seen", "rows_skipped", "policy_version")
"""Numbers that every checkpoint of a run records."""


class Snapshot:
    """A checkpoint in memory, as of the moment it was taken."""

    def __init__(
        self,
        policy: Policy,
        processing: Processing,
        *,
        config: Config,
        card: str,
        state: Mapping[str, Any],
        training: Mapping[str, Any],
        copied: bool = False,
    ):
        """`state` are plain values for the JSON file, `training` state dicts of tensors.

        With `copied` all tensors are copied to the CPU, so that training may go on before the
        snapshot is written; under LoRA the adapter alone.
        """
        self.model: Any = policy.model
        self.weights = _on_cpu(_own_weights(policy.model)) if copied else None
        self.state, self.training = state, _on_cpu(training) if copied else training
        # Now and not when it is written: a tokenizer is not for two threads at once.
        texts = {CONFIG_FILE: configs.dump(config), CARD_FILE: card}
        self.files = _saved_files(processing, config) | {name: text.encode() for name, text in texts.items()}

    def write(self, folder: Path) -> None:
        """Write to a temporary folder, flush to disk, then rename.

        Raises RunFolderError if it cannot be written; an earlier checkpoint is left as it was.
        """
        with written_whole(folder) as aside:
            given: dict[str, Any] = {} if self.weights is None else {"state_dict": self.weights}
            if hasattr(self.model, "peft_config"):
                given["save_embedding_layers"] = False  # nor those under an adapted head
            self.model.save_pretrained(aside, **given)
            for name, content in self.files.items():
                (aside / name).parent.mkdir(parents=True, exist_ok=True)
                (aside / name).write_bytes(content)
            readable_by_4(aside)
            torch.save(dict(self.training), aside / TRAINING_FILE)
            sums = {str(path.relative_to(aside)): _checksum(path) for path in _files(aside) if path.name != CARD_FILE}
            state = {"format": FORMAT, **self.state, "sha256": sums}
            (aside / STATE_FILE).write_text(json.dumps(state, indent=1), encoding="utf-8")


def _saved_files(processing: Processing, config: Config) -> dict[str, bytes]:
    try:
        with tempfile.TemporaryDirectory() as folder:
            processing.save(folder, config.rollout)
            paths = _files(Path(folder))
            return {str(path.relative_to(folder)): path.read_bytes() for path in paths}
    except OSError as error:
        raise RunFolderError(
            f"checkpoint: {tempfile.gettempdir()} cannot be written ({error}); free some space "
            "there or set TMPDIR. Earlier checkpoints are untouched"
        ) from error


def _on_cpu(value: Any, seen: dict[Any, torch.Tensor] | None = None) -> Any:
    """A copy of nested dicts and lists with all tensors on the CPU; tied ones stay tied."""
    seen = {} if seen is None else seen
    if isinstance(value, torch.Tensor):
        key = (value.data_ptr(), value.shape, value.stride(), value.dtype, value.device)
        if value.data_ptr() == 0 or key not in seen:
            seen[key] = value.detach().to("cpu", copy=True)
        return seen[key]
    if isinstance(value, Mapping):
        return {name: _on_cpu(item, seen) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_on_cpu(item, seen) for item in value)
    return value


def _own_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    weights = model.state_dict()
    if not hasattr(model, "peft_config"):
        return weights
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {name: tensor for name, tensor in weights.items() if name in learning}


class Writer:
    """Does one piece of writing after another; with `background`, in a thread of its own."""

    def __init__(self, background: bool = False):
        self.background = background
        # A program that ends waits for this thread: the checkpoint gets finished.
        self._thread = futures.ThreadPoolExecutor(1, "checkpoint")
        self._pending: futures.Future[None] | None = None

    def write(self, job: Callable[[], None]) -> None:
        """Do `job`, now or in the background. Raises what the one before raised there."""
        self.wait()
        if self.background:
            self._pending = self._thread.submit(job)
        else:
            job()

    def wait(self) -> None:
        """Wait until everything is written. Raises what went wrong in the background, once."""
        if self._pending is not None:
            futures.wait([self._pending])
            done, self._pending = self._pending, None
            done.result()


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


def restore(folder: Path, policy: Policy, bad: Sequence[str] | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Put a checkpoint's weights into `policy`, which has the same architecture.

    Returns (state, training) as given to `Snapshot.take`; the tensors of `training` are a view of the file: copy what
    is kept. `bad` is what `damaged` found, if it has looked. Raises RunFolderError for a damaged checkpoint, or one
    of another format; the policy is then as it was.
    """
    state = checked_state(folder, bad)
    reading = TRAINING_FILE
    try:
        training = torch.load(folder / TRAINING_FILE, map_location="cpu", weights_only=True, mmap=True)
        if not isinstance(training, dict) or not training.keys() >= {"optimizer", "scheduler"}:
            raise ValueError("no optimiser and schedule in it")
        reading = "weights"
        policy.load_weights(folder)
    except Exception as error:  # torch, transformers, peft and safetensors raise almost anything
        reason = str(error).split("\n")[0]
        raise RunFolderError(f"checkpoint {folder}: {reading} cannot be read ({reason})") from error
    return state, training


def checked_state(folder: Path, bad: Sequence[str] | None = None) -> dict[str, Any]:
    """The JSON file of a checkpoint that is whole. Raises RunFolderError for a damaged one; `bad` as for `restore`."""
    state = _read_state(folder)
    if state is None:
        raise RunFolderError(f"checkpoint {folder}: {STATE_FILE} is missing or damaged")
    if bad := damaged(folder) if bad is None else bad:
        raise RunFolderError(f"checkpoint {folder}: {', '.join(bad)} damaged or missing")
    return state


def damaged(folder: Path) -> list[str]:
    """Files of a checkpoint that do not match their checksums; its JSON file if that is damaged.

    Raises RunFolderError for a checkpoint of another format.
    """
    state = _read_state(folder)
    if state is None:
        return [STATE_FILE]
    sums = state["sha256"].items()
    return [name for name, sum in sums if name != CARD_FILE and not _matches(folder / name, sum)]


def _matches(path: Path, expected: Any) -> bool:
    try:
        return path.is_file() and _checksum(path) == expected
    except (OSError, ValueError):  # gone, unreadable, or not a name at all
        return False


def candidates(folder: Path) -> list[Path]:
    """Complete checkpoints of a run's checkpoint folder, newest first."""
    files = folder.glob(f"step_*/{STATE_FILE}")
    return sorted((path.parent for path in files if path.is_file()), reverse=True)


def newest(folder: Path) -> Path | None:
    """The newest checkpoint of a run's checkpoint folder, if there is one."""
    return next(iter(candidates(folder)), None)


def of(model: str) -> str:
    """What the name of a model stands for: of a run folder, its newest checkpoint; else a folder or a hub id."""
    return str(newest(Path(model) / "checkpoints") or found(model))


def as_begun(config: Config) -> Config:
    """`config` with the `model.dtype` that the run it goes on with began with, unless a setting names one."""
    folder = newest(Path(config.run_dir) / "checkpoints") or Path(config.resume)
    if "dtype" in config.model.model_fields_set:
        return config
    with contextlib.suppress(ConfigError):  # there is none, or it is for the checkpointer to report
        dtype = configs.load(folder / CONFIG_FILE).model.dtype
        config = config.model_copy(update={"model": config.model.model_copy(update={"dtype": dtype})})
    return config


def point(link: Path, target: str) -> None:
    """Have the link name `target`, in one move. Does nothing where there are no links."""
    aside = link.with_name(f".{link.name}.partial")
    with contextlib.suppress(OSError):
        aside.unlink(missing_ok=True)
        aside.symlink_to(target)
        os.replace(aside, link)


def prune(folder: Path, keep: int, best: str = "") -> None:
    """Delete all but the newest `keep` checkpoints of a run and the one named `best`, and what a killed run left."""
    found = sorted(path for path in folder.glob("step_*") if path.is_dir())
    old = [path for path in found[:-keep] if path.name != best]
    for path in (*old, *folder.glob(".step_*.partial")):
        shutil.rmtree(path, ignore_errors=True)


def forget_after(folder: Path, step: int) -> None:
    """Delete the checkpoints of later steps, which another course of the run has made."""
    for path in folder.glob("step_*"):
        if path.name > name_of(step):
            shutil.rmtree(path, ignore_errors=True)


def name_of(step: int) -> str:
    return f"step_{step:06d}"


def _read_state(folder: Path) -> dict[str, Any] | None:
    try:
        state = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(state, dict):
        return None
    if (found := state.get("format", FORMAT)) != FORMAT:
        by = state["versions"].get("mm_agrae") if isinstance(state.get("versions"), dict) else None
        raise RunFolderError(
            f"checkpoint {folder} is of format {found!r} (written by mm-agrae {by or 'unknown'}), "
            f"and this version ({__version__}) reads format {FORMAT}; go on with that version, or "
            "start a new run from its weights: model.path set to it, and another run_dir"
        )
    filled: dict[str, Any] = {"seconds": {}, "versions": {}, **state}
    whole = (
        all(isinstance(filled.get(name), dict) for name in ("sha256", "seconds", "versions"))
        and all(type(filled.get(name)) is int and filled[name] >= 0 for name in COUNTS)
        and all(type(spent) in (int, float) for spent in filled["seconds"].values())
    )
    return filled if whole else None


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
