"""The settings of the rollout: sampling, engines, guided correction, variants."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from mm_agrae.config.section import URL_SECRET, Fraction, NonNegative, OnOrOff, PositiveInt, Section


class CorrectSection(Section):
    """What becomes of an incorrect completion before advantages are computed, by the probability of each branch.

    In the texts {answer} is the gold answer, {boxed} that in a box, {solution} the row's own solution.
    """

    reflect: NonNegative = 0.5
    """The cue is appended, and the policy goes on writing."""
    answer: NonNegative = 0.25
    """The gold answer is appended."""
    solution: NonNegative = 0.25
    """The row's own solution takes the completion's place; without one the answer is appended."""
    reflect_tokens: PositiveInt = 256
    """The most that the policy writes after the cue, within rollout.max_new_tokens for the whole."""
    train_on: Literal["all", "added"] = "all"
    """added: of a corrected completion only what the policy wrote after the cue is learnt, so nothing of an answer or
    a solution. Their rewards count all the same."""
    reflect_cue: str = "\n\nWait, something is wrong here. Let me check it again.\n\n"
    answer_cue: str = "\n\nThe correct answer is {boxed}."
    """Also ends a solution whose answer is not in a box. An open thinking section is closed before it."""
    solution_text: str = "{solution}"

    @model_validator(mode="after")
    def _check(self) -> CorrectSection:
        total = self.reflect + self.answer + self.solution
        if not 0 < total <= 1 + 1e-9:
            raise ValueError(
                f"rollout.correct: reflect, answer and solution add up to {total:g}; as probabilities they need more "
                "than 0 and at most 1. rollout.correct=null turns correction off"
            )
        for name, needed in {
            "reflect_cue": r"\S",
            "answer_cue": "{answer}|{boxed}",
            "solution_text": "{solution}",
        }.items():
            if not re.search(needed, getattr(self, name)):
                what = "words" if needed == r"\S" else needed.replace("|", " or ")
                raise ValueError(f"rollout.correct.{name} lacks {what}")
        return self


class VariantsSection(Section):
    """Variants of each problem, easier or harder, that are sampled in the same step (DIVA-GRPO)."""

    count: Annotated[int, Field(ge=0, le=16)] = 1
    """Variants of a problem beside itself: a step holds rollout.prompts_per_step / (1 + count) problems."""
    operators: tuple[str, ...] = ()
    """How variants may be made, each where it keeps the answer; `mm-agrae variants` lists them. Empty: all."""
    prepared: str = ""
    """A file of other wordings and steps of solutions, as `mm-agrae variants --prepare` writes it."""
    eta: NonNegative = 4.0
    """How far a step moves the difficulty D of a problem: by eta times (½ − share of correct completions)."""


class SamplingSection(Section):
    temperature: Annotated[float, Field(ge=0)] = 1.0
    """0 is greedy."""
    top_p: Fraction = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    """0 keeps every token."""
    max_new_tokens: PositiveInt = 512


class DynamicSampling(Section):
    """DAPO: groups whose advantages are all 0 are resampled, in at most `max_draws` rounds."""

    max_draws: PositiveInt = 3


class VllmSection(Section):
    """For the engines vllm (inside the training process) and vllm_server (over HTTP)."""

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: model.dtype."""
    sync: Literal["merged", "adapter"] = "merged"
    """What reaches the engine after an optimiser step: all weights, LoRA merged into them, or
    the LoRA adapter alone."""
    max_model_len: PositiveInt | None = None
    """Tokens of prompt and completion together; not set: prompt.max_tokens + max_new_tokens."""
    memory_fraction: Fraction = 0.4
    """Share of a GPU's memory for weights and KV cache. On a CPU see cache_gib."""
    cache_gib: PositiveInt = 1
    """KV cache on a CPU, in GiB."""
    max_num_seqs: PositiveInt | None = None
    """Completions sampled at once; not set: vLLM's own default, 1,024 on an H100 and 256 on smaller GPUs."""
    tensor_parallel: PositiveInt = 1
    sleep: bool = True
    """Free the GPU's memory for the update between rollouts (engine vllm)."""
    enforce_eager: bool = False
    servers: tuple[str, ...] = ()
    """Addresses for vllm_server, such as http://127.0.0.1:8000, started by `mm-agrae serve`."""
    start_limit_s: Annotated[float, Field(gt=0)] = 600.0
    """How long to wait for an engine to get ready."""
    request_limit_s: Annotated[float, Field(gt=0)] = 600.0
    """How long one prompt's completions may take before its server counts as lost."""
    options: dict[str, Any] = Field(default={})
    """Further arguments of vLLM's engine, as they are (engine vllm)."""

    @model_validator(mode="after")
    def _check(self) -> VllmSection:
        if any(URL_SECRET.search(server) for server in self.servers):
            raise ValueError(
                "rollout.vllm.servers: an address holds a password, which would be logged; leave "
                "it out and set MM_AGRAE_VLLM_KEY, which `mm-agrae serve` reads as well"
            )
        return self


class MismatchSection(Section):
    """What is done about an engine whose log-probabilities differ from the trained model's."""

    correction: Annotated[Literal["auto", "off", "token", "sequence"], OnOrOff] = "auto"
    """Truncated importance sampling by π_old / π_engine, of each token or of whole completions.
    auto: token for every engine but hf, whose numbers are the model's own."""
    limit: Annotated[float, Field(ge=1)] = 2.0
    """Weights are cut to this."""
    beyond: Literal["truncate", "mask"] = "truncate"
    """mask: what is beyond the limit, or below its inverse, is left out."""
    probe_every: Annotated[int, Field(ge=0)] = 50
    """Compare log-probabilities at the start and every N steps; 0: never."""
    probe_prompts: PositiveInt = 4
    warn_above: Annotated[float, Field(gt=0)] = 0.05
    """Mean difference (nats a token) above which the probe warns; bfloat16 gives about 0.01."""
    stop_above: Annotated[float, Field(gt=0)] = 0.5
    """Mean difference above which the run stops: the engine holds other weights or sees other images."""


class RolloutSection(SamplingSection):
    engine: str = "hf"
    """hf: the trained model itself. vllm: vLLM in this process. vllm_server: vLLM over HTTP. Or a
    class of yours, as "module:Class" or "path/to/file.py:Class"."""
    vllm: VllmSection = VllmSection()
    mismatch: MismatchSection = MismatchSection()
    overlap: bool = False
    """Sample the next step's completions while the update runs (vllm_server): they are one
    version behind, which the same importance weights correct."""
    prompts_per_step: Annotated[int, Field(ge=1)] = 16
    """Prompts of one rollout, over all processes; with variants, of all problems and their variants."""
    completions_per_prompt: int = 8
    """The group size G; advantages are relative to the group, so at least 2."""
    batch_completions: PositiveInt = 128
    """Completions generated at once on one device: bounds memory, not results."""
    dynamic_sampling: DynamicSampling | None = None
    correct: CorrectSection | None = None
    """Guided correction of incorrect completions, in training alone; {} for its defaults. See docs/correction.md."""
    variants: VariantsSection | None = None
    """Variants of each problem in the same step, for rule diva; {} for its defaults. See docs/variants.md."""

    @property
    def problems_per_step(self) -> int:
        return self.prompts_per_step // (1 + (self.variants.count if self.variants else 0))

    @model_validator(mode="after")
    def _check(self) -> RolloutSection:
        if self.engine == "vllm_server" and not self.vllm.servers:
            raise ValueError(
                "rollout.vllm.servers names no server; start one with `mm-agrae serve` and give "
                "its address, such as rollout.vllm.servers=[http://127.0.0.1:8000]"
            )
        if self.overlap and self.engine != "vllm_server":
            raise ValueError(
                f"rollout.overlap needs rollout.engine=vllm_server, not {self.engine}: only a "
                "server can sample while this process updates"
            )
        if self.overlap and self.dynamic_sampling is not None:
            raise ValueError(
                "rollout.overlap and rollout.dynamic_sampling exclude each other: which groups to "
                "resample is known only after the next ones have been started"
            )
        if self.overlap and self.correct is not None:
            raise ValueError(
                "rollout.overlap and rollout.correct exclude each other: the policy would go on writing with newer "
                "weights than a completion was begun with"
            )
        if self.overlap and self.variants is not None:
            raise ValueError(
                "rollout.overlap and rollout.variants exclude each other: which variants a problem gets follows from "
                "the step before, which is not scored yet"
            )
        if self.variants and self.prompts_per_step % (size := 1 + self.variants.count):
            raise ValueError(
                f"rollout.prompts_per_step is {self.prompts_per_step}, no multiple of {size}, so that a problem with "
                f"its variants would be split over steps; use {self.prompts_per_step // size * size or size}"
            )
        if self.completions_per_prompt < 2:
            raise ValueError(
                f"rollout.completions_per_prompt is {self.completions_per_prompt}: a group of one "
                "has no relative advantage; use 2 or more (8 is usual)"
            )
        if self.temperature == 0:
            raise ValueError(
                "rollout.temperature is 0: greedy completions of a group are all the same and carry no signal; use 1.0"
            )
        return self
