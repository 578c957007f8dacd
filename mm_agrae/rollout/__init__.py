"""Rollout engines: prompts -> completions. One line in ENGINES adds one."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from mm_agrae.config import SamplingSection
from mm_agrae.types import Completion, Prompt

ENGINES: dict[str, str] = {
    "hf": "mm_agrae.rollout.hf:HFEngine",
}


class Engine(Protocol):
    """What the trainer and the evaluation ask of an engine."""

    exact: bool
    """Whether sampling log-probs equal those of the policy's own forward."""

    def generate(
        self,
        prompts: Sequence[Prompt],
        count: int,
        sampling: SamplingSection,
        seeds: Sequence[int],
        on_progress: Callable[[int], None] | None = None,
    ) -> list[list[Completion]]:
        """`count` completions of each prompt, in prompt order.

        The samples of a prompt depend on its seed alone, not on its neighbours. Ids that stand
        for images, videos or padding are never sampled. `on_progress` is told how many
        completions have been finished since the last call.
        """
        ...


def make_engine(name: str, *args: Any, **options: Any) -> Engine:
    """The engine called `name`. Raises ConfigError for an unknown one."""
    from mm_agrae.config import nearest
    from mm_agrae.errors import ConfigError

    if name not in ENGINES:
        raise ConfigError(f"rollout.engine is {name!r}; {nearest(name, ENGINES)}")
    module, _, attribute = ENGINES[name].partition(":")
    return getattr(importlib.import_module(module), attribute)(*args, **options)


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from a path of names and numbers, the same on every machine."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
