"""Checkpoints for the playground: loaded on first use and shared by all users."""

import contextlib
import json
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import torch

from mm_agrae import config as configs
from mm_agrae.config import ModelSection, PromptSection
from mm_agrae.errors import ModelError, UserError
from mm_agrae.model.lora import model_and_adapter
from mm_agrae.model.policy import Policy
from mm_agrae.model.processing import Processing
from mm_agrae.rollout.hf import HFEngine
from mm_agrae.run import checkpoint


@dataclass
class LoadedCheckpoint:
    """A checkpoint in memory. `lock` is held while it generates."""

    processing: Processing
    engine: HFEngine
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def context(self) -> int:
        config = self.engine.policy.hf.config.get_text_config()
        return int(getattr(config, "max_position_embeddings", 0) or 1 << 30)


class CheckpointCache:
    """Checkpoints by name; the `keep` most recently used ones stay loaded. Thread-safe.

    With `allow_paths`, other names are taken as checkpoint folders or model ids.
    """

    def __init__(
        self, paths: Mapping[str, str], *, device: str = "auto", allow_paths: bool = False, keep: int = 4
    ) -> None:
        self.paths = dict(paths)
        self.allow_paths = allow_paths
        cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
        self.device = "cuda" if cuda else "cpu"
        self._keep = keep
        self._loaded: OrderedDict[str, LoadedCheckpoint] = OrderedDict()
        self._guard = threading.Lock()
        self._loading = threading.Lock()  # transformers should not load two models at once

    def path(self, name: str) -> str:
        """Raises ModelError for a name that may not be used."""
        if name in self.paths:
            return self.paths[name]
        if not self.allow_paths:
            known = ", ".join(self.paths) or "none"
            raise ModelError(
                f"There is no checkpoint {name!r} here (known: {known}). Other paths are accepted "
                "only if the demo was started with --allow-model-paths."
            )
        return name

    def reads_images(self, name: str) -> bool:
        """Whether it is a vision-language checkpoint; only its config is read."""
        path = self.path(name)
        with self._guard:
            if name in self._loaded:
                return self._loaded[name].processing.is_multimodal
        return _has_vision(path, self._loading)

    def get(self, name: str) -> LoadedCheckpoint:
        """The checkpoint, loaded if it is not. Raises ModelError."""
        path = self.path(name)
        with self._loading:
            with self._guard:
                if name in self._loaded:
                    self._loaded.move_to_end(name)
                    return self._loaded[name]
            loaded = self._load(path)
            with self._guard:
                self._loaded[name] = loaded
                while len(self._loaded) > self._keep:
                    self._loaded.popitem(last=False)
            return loaded

    def _load(self, path: str) -> LoadedCheckpoint:
        processing = Processing(path, _prompt_settings(path))
        policy = Policy(ModelSection(path=path), processing, device=self.device)
        return LoadedCheckpoint(processing, HFEngine(policy.eval(), processing))


@lru_cache(maxsize=256)
def _has_vision(path: str, loading: threading.Lock) -> bool:
    """True if that cannot be found out: what is wrong is reported when the checkpoint is loaded."""
    with contextlib.suppress(UserError, OSError, ValueError):
        path = model_and_adapter(path)[0]
        file = Path(path) / "config.json"
        if file.is_file():
            return "vision_config" in json.loads(file.read_text(encoding="utf-8"))
        with loading:
            from transformers import AutoConfig

            return hasattr(AutoConfig.from_pretrained(path), "vision_config")
    return True


def _prompt_settings(path: str) -> PromptSection:
    """As in training, if known. The length is checked against the model's context instead."""
    config = Path(path) / checkpoint.CONFIG_FILE
    settings = configs.load(str(config), []).prompt if config.is_file() else PromptSection()
    return settings.model_copy(update={"max_tokens": 1 << 30})
