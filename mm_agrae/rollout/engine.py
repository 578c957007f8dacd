"""The protocol of rollout engines, and the list of them. One line in `ENGINES` adds one."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from mm_agrae.config import RolloutSection, SamplingSection
from mm_agrae.config.plugins import is_import_name, load_object
from mm_agrae.errors import ConfigError, nearest
from mm_agrae.model.policy import Policy
from mm_agrae.model.processing import Processing
from mm_agrae.types import Completion, Prompt

ENGINES: dict[str, str] = {
    "hf": "mm_agrae.rollout.hf:HFEngine",
    "vllm": "mm_agrae.rollout.vllm:VllmEngine",
    "vllm_server": "mm_agrae.rollout.vllm_server:VllmServerEngine",
}


@dataclass(frozen=True)
class Sync:
    """One hand-over of weights to an engine: how much, and how long it took."""

    megabytes: float = 0.0
    seconds: float = 0.0


class Engine(Protocol):
    """What the trainer and the evaluation ask of an engine."""

    exact: bool
    """Whether sampling log-probs equal those of the policy's own forward."""

    version: int
    """The policy version whose weights the engine holds; completions carry it."""

    def sync(self) -> Sync:
        """Take over the policy's present weights and version. A collective call: every process
        makes it. Raises EngineError if the engine is left with other weights."""
        ...

    def close(self) -> None:
        """Give back memory and processes."""
        ...

    def generate(
        self,
        prompts: Sequence[Prompt],
        count: int,
        sampling: SamplingSection,
        seeds: Sequence[int],
        on_progress: Callable[[int], None] | None = None,
    ) -> list[list[Completion]]:
        """`count` completions of each prompt, in prompt order; none of one that a server refused.

        The samples of a prompt depend on its seed alone, not on its neighbours. Ids that stand
        for images, videos or padding are never sampled. `on_progress` is told how many
        completions have been finished since the last call. Raises EngineError.
        """
        ...


def engine_class(name: str) -> Callable[..., Engine]:
    """The class of an engine of `ENGINES`, or of one's own. Raises ConfigError."""
    if name not in ENGINES and not is_import_name(name):
        raise ConfigError(f"rollout.engine: no engine {name!r}; {nearest(name, ENGINES)}")
    try:
        return load_object(ENGINES.get(name, name))
    except ConfigError as error:
        raise ConfigError(f"rollout.engine: {error}") from None


def make_engine(
    rollout: RolloutSection,
    policy: Policy,
    processing: Processing,
    *,
    batch_completions: int,
    max_tokens: int,
) -> Engine:
    """The engine that `rollout.engine` names, its constructor called with the same arguments.

    `batch_completions` bounds how many completions are made at once, `max_tokens` the length of
    prompt and completion together. Raises EngineError if it cannot start.
    """
    return engine_class(rollout.engine)(
        policy, processing, rollout, batch_completions=batch_completions, max_tokens=max_tokens
    )


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from a path of names and numbers, the same on every machine."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
