"""One strict schema for every run, vision-language or text, laptop or cluster.

A run is one YAML file; `key=value` overrides with dotted keys change single settings, and further
files are laid over it:

    mm-agrae train configs/quickstart.yaml train.steps=10 configs/with/grpo.yaml
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, ValidationInfo, model_validator

from mm_agrae.config.objective import check_loss, check_rule, try_rule
from mm_agrae.config.rollout import RolloutSection, SamplingSection
from mm_agrae.config.section import Fraction, NonNegative, OnOrOff, PositiveInt, Section
from mm_agrae.config.shipped import found
from mm_agrae.errors import nearest


class LoraSection(Section):
    """LoRA by peft. `parts` chooses which parts of the model get adapters."""

    rank: PositiveInt = 16
    alpha: PositiveInt = 32
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    parts: tuple[Literal["language", "vision", "merger", "head"], ...] = ("language",)
    """Which parts of the model: language layers, vision tower, the merger between them, or the vocabulary head."""
    modules: tuple[str, ...] = ()
    """Names of linear layers inside those parts, such as q_proj. Empty: every linear layer."""


class ModelSection(Section):
    path: Annotated[str, AfterValidator(found)]
    """A Hugging Face model id or a local folder, vision-language or text-only. One that comes with
    mm-agrae, such as data/warm_start/vl, is found from any working directory."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic. What learns is kept in float32 all the same; what is frozen under LoRA is not.
    auto: bfloat16 on a GPU that computes in it, else float32. Never "auto" once it has been read."""
    attn_implementation: str = "sdpa"
    gradient_checkpointing: bool = False
    freeze: tuple[Literal["language", "vision", "merger", "embeddings"], ...] = ()
    """Parts that do not learn. Under LoRA everything but the adapters is frozen already."""
    lora: LoraSection | None = None
    trust_remote_code: bool = False
    device: Literal["auto", "cpu", "cuda"] = "auto"

    @model_validator(mode="after")
    def _settle_dtype(self, info: ValidationInfo) -> ModelSection:
        """The one place where auto becomes a dtype: this machine's, or that that of GPUs to plan for."""
        if self.dtype == "auto":
            import torch

            planned = bool(info.context and info.context["for_gpus"])
            here = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
            self.__dict__["dtype"] = "bfloat16" if self.device != "cpu" and (planned or here) else "float32"
            self.model_fields_set.discard("dtype")  # nobody asked for it: see run.checkpoint.as_begun
        return self


class DataSource(Section):
    """One set of examples. Further keys are the task's own options (see `mm-agrae tasks`)."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)
    task: str
    name: str = ""
    """Label in logs and reports; the task's name if empty."""
    limit: PositiveInt | None = None
    """Use only this many examples, from the front."""
    samples: PositiveInt | None = None
    """Completions per problem in evaluation; not set: evaluate.samples."""

    @property
    def label(self) -> str:
        return self.name or self.task

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class DataSection(Section):
    train: tuple[DataSource, ...]
    """Several sources are concatenated, then shuffled."""
    evaluate: tuple[DataSource, ...] = ()
    shuffle: bool = True
    difficulty_from: str = ""
    """A run whose rollouts say how hard each problem is: D = 1 + 8·(1 − pass rate). Or a table as `mm-agrae difficulty
    --rollouts` writes it. A problem that is not in it has D = 5."""
    easy_to_hard: bool = False
    """Visit the problems of each epoch by rising D; `shuffle` then decides among equal ones."""
    on_bad_row: Literal["error", "skip"] = "error"
    """What a row that cannot be used does: stop the run, or be counted and left out."""
    prefetch_threads: Annotated[int, Field(ge=0)] = 2
    """Threads that decode, resize and tokenise the next step's prompts (held in main memory till then) during the
    present one, and store its images. 0: every step prepares its own."""
    check: Annotated[Literal["off", "sample", "all"], OnOrOff] = "sample"
    """Before training: grade the gold answers of some rows against themselves (sample), or read every row, image and
    prompt length in parallel processes (all), as `mm-agrae doctor` does. A bad row then ends the run at its start."""

    @model_validator(mode="after")
    def _check(self) -> DataSection:
        if self.easy_to_hard and not self.difficulty_from:
            raise ValueError("data.easy_to_hard needs data.difficulty_from, a run that says what is easy")
        return self


class PromptSection(Section):
    system: str = ""
    """System prompt of rows that have none of their own; empty for none."""
    instruction: str = ""
    """Appended to the question, after a line break."""
    max_tokens: PositiveInt = 1024
    """A prompt longer than this, its image tokens included, is a bad row."""
    min_pixels: PositiveInt | None = None
    """Images below this area are enlarged. Not set: the checkpoint's own."""
    max_pixels: PositiveInt | None = None
    """Images above this area are made smaller. Not set: the checkpoint's own."""
    chat_template: str = ""
    """A Jinja file, for base models without a chat template. Empty: the checkpoint's own."""


class OverlongPenalty(Section):
    """DAPO's soft penalty: 0 up to `buffer_tokens` before the limit, then down to `-penalty`."""

    buffer_tokens: PositiveInt
    penalty: NonNegative = 1.0


class RewardSection(Section):
    parts: dict[str, float] = Field(default={"accuracy": 1.0}, min_length=1)
    """Weight of each part: accuracy, format, rule, or your own as "module:function". One of weight 0 is a metric:
    measured and shown, without a say in the reward."""
    success: str = "accuracy"
    """The part that alone decides whether a completion is solved, whatever its weight."""
    success_at: float = 1.0
    """Its least value for a solved one, such as 0.5 for the overlap of two boxes."""
    max_failed: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """A part that fails on more than this share of a step's completions ends the run."""
    time_limit_s: Annotated[float, Field(gt=0)] = 1.0
    """Per answer, of computing; waiting, as for a server, may take five times as long. A part that takes longer is
    stopped and counted, and scores 0."""
    workers: PositiveInt = 1
    memory_limit_mb: PositiveInt = 2048
    answer_after_thinking: bool = True
    """Only a final answer outside the thinking part counts."""
    overlong: OverlongPenalty | None = None

    @model_validator(mode="after")
    def _check(self) -> RewardSection:
        if self.success not in self.parts:
            raise ValueError(
                f"reward.parts must hold {self.success}, which decides success; give it weight 0 if only another part "
                "should be rewarded, or name the part that decides by reward.success"
            )
        return self


class AdvantageSection(Section):
    """Further keys are the rule's own settings (see `mm-agrae rules`): the keyword arguments of its function in
    `advantage.py`, whose names and types are checked. One left out, or null, has the rule's default."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)
    rule: str = "agrae"
    entropy_from: Literal["exact", "sampled"] | None = None
    """Entropy of a completion, for the rules that use it. exact (the default): by a forward pass before the update.
    sampled: the mean of −log p of its tokens, which costs nothing and is noisy for short completions."""

    @property
    def settings(self) -> dict[str, Any]:
        extra = self.model_extra or {}
        return {name: value for name, value in extra.items() if value is not None}

    @model_validator(mode="after")
    def _check(self) -> AdvantageSection:
        check_rule(self)
        return self


class UpdateSection(Section):
    loss: str = "grpo"
    """One of `LOSSES` in `loss.py`."""
    mini_batch_prompts: PositiveInt | None = None
    """Prompts per optimiser step; not set: all of the rollout's (on-policy)."""
    epochs: PositiveInt = 1
    """Passes over each rollout."""
    micro_batch_completions: PositiveInt = 16
    """Completions in one forward and backward pass on one device: bounds memory, not results."""
    micro_batch_tokens: PositiveInt | None = None
    """The same bound in tokens of prompts and completions; if set, it is used instead."""
    shared_prompt: Annotated[Literal["auto", "on", "off"], OnOrOff] = "auto"
    """Send each prompt and its images through the model once a group instead of once a
    completion. auto: where the model can."""
    clip_low: NonNegative | None = None
    clip_high: NonNegative | None = None
    """Distance of the clip from 1. Not set: the loss's own."""
    kl_coef: NonNegative = 0.0
    """Weight of the k3 estimate of KL to the starting policy; 0 loads no reference."""
    unbiased_kl: bool = False
    """Multiply k3 by the ratio of new to old policy, so that its gradient is that of the KL
    divergence: TRL's default, not GRPO's."""
    loss_options: dict[str, float] = Field(default={})
    """Options of the loss's own, such as tau_positive of sapo; see `loss.py`."""
    top_entropy: Fraction = 1.0
    """Only this share of a micro-batch's tokens, those of the highest entropy, carry the policy loss."""
    entropy_coef: NonNegative = 0.0
    entropy_target: Annotated[float, Field(gt=0)] | None = None
    """Steer the coefficient: after each rollout it rises by `entropy_step` if the policy's mean entropy (nats) was at
    most this, else it falls, between 0 and 1. The bonus is off while the entropy is above."""
    entropy_step: NonNegative = 0.005
    mask_truncated: bool = False
    """Leave completions cut off at the token limit out of the loss. Their rewards count in their group's mean."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-6
    weight_decay: NonNegative = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    max_bad_gradients: Annotated[int, Field(ge=0)] = 3
    """An optimiser step whose gradient is not finite is left out; more than so many in a row end the run."""

    @model_validator(mode="after")
    def _check(self) -> UpdateSection:
        check_loss(self)
        return self

    @property
    def entropy_bonus(self) -> bool:
        return self.entropy_coef > 0 or self.entropy_target is not None


class TrainSection(Section):
    steps: PositiveInt | None = None
    """Rollouts. Give this or `epochs`."""
    epochs: PositiveInt | None = None
    """Passes over the training data."""
    seed: int = 0
    deterministic: bool = False
    """Use torch's deterministic algorithms alone, which are slower: on a GPU, attention's backward pass and others sum
    in any order. An operation without one ends the run, naming it."""
    timeout_minutes: Annotated[float, Field(gt=0)] = 30.0
    """With several processes: how long one waits for another before the run ends, naming it."""
    check_memory: bool = True
    """On a GPU: refuse at the start what would not fit by doctor's estimate."""

    @model_validator(mode="after")
    def _check(self) -> TrainSection:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give one of train.steps and train.epochs")
        return self


def passes(samples: int) -> list[int]:
    """The k of pass@k with so many samples: 1, 2, 4, 8 … and `samples` itself."""
    return sorted({1 << power for power in range(samples.bit_length())} | {samples})


class EvaluateSection(SamplingSection):
    samples: PositiveInt = 16
    """Completions per problem, for pass@k with k up to this many."""
    greedy: bool = True
    """Also decode once greedily."""
    before: bool = True
    after: bool = True
    every: Annotated[int, Field(ge=0)] = 0
    """Evaluate every N steps; 0: never in between."""
    bootstrap: PositiveInt = 2000
    """Resamples of the problems for the 95 % intervals."""
    batch_completions: PositiveInt = 256
    seed: int = 1234

    def for_source(self, source: DataSource) -> EvaluateSection:
        """These settings with the number of samples that `source` asks for."""
        return self.model_copy(update={"samples": source.samples or self.samples})


class CheckpointSection(Section):
    every: Annotated[int, Field(ge=0)] = 0
    """Save every N steps; 0: only at the end."""
    keep: PositiveInt = 2
    """Only the newest so many are kept."""
    best: str = ""
    """Also keep the checkpoint whose evaluation has the highest such value, as label/metric:
    test/pass@1, test/pass@8 or test/greedy. It is saved if it is not due. Empty: none."""
    background: bool = False
    """Write while training goes on, from a copy in the CPU's memory. At most one is being
    written; the next save, the end of the run and a signal to stop wait for it."""


class LogSection(Section):
    sinks: tuple[Literal["tensorboard", "trackio", "wandb"], ...] = ()
    """Trackers beside the run folder's own metrics.jsonl, which is always written."""
    project: str = "mm-agrae"
    rollouts: bool = True
    """Keep every completion of every step in the run folder."""


class Config(Section):
    """A whole run. See `configs/` for examples of each kind."""

    @classmethod
    def load(cls, source: str | Path | Mapping[str, Any], *overrides: str | Mapping[str, Any]) -> Config:
        """A config by path, by shipped name or as a mapping, with what is laid over it: see `reading.load`."""
        from mm_agrae.config.reading import load

        return load(source, overrides)

    run_dir: str
    resume: str = "auto"
    """auto: go on with the run in run_dir if there is one. never: refuse a folder that holds a
    run. Or the path of a checkpoint to go on from."""
    model: ModelSection
    data: DataSection
    train: TrainSection
    prompt: PromptSection = PromptSection()
    rollout: RolloutSection = RolloutSection()
    reward: RewardSection = RewardSection()
    # Made when needed: checking these two imports torch, which the reward workers do without.
    advantage: AdvantageSection = Field(default_factory=AdvantageSection)
    update: UpdateSection = Field(default_factory=UpdateSection)
    evaluate: EvaluateSection = EvaluateSection()
    checkpoint: CheckpointSection = CheckpointSection()
    log: LogSection = LogSection()

    @model_validator(mode="after")
    def _check(self) -> Config:
        prompts = self.rollout.prompts_per_step
        mini = self.update.mini_batch_prompts
        if mini is not None and (mini > prompts or prompts % mini):
            divisors = [d for d in range(1, prompts + 1) if prompts % d == 0]
            nearest = min(divisors, key=lambda d: abs(d - mini))
            raise ValueError(
                f"update.mini_batch_prompts is {mini}, which does not divide "
                f"rollout.prompts_per_step = {prompts}; the nearest that does is {nearest}"
            )
        try_rule(self)
        buffer = self.reward.overlong.buffer_tokens if self.reward.overlong else 0
        if buffer > self.rollout.max_new_tokens:
            raise ValueError(
                f"reward.overlong.buffer_tokens is {buffer}, more than "
                f"rollout.max_new_tokens = {self.rollout.max_new_tokens}"
            )
        most = max([self.evaluate.samples, *(s.samples or 1 for s in self.data.evaluate)])
        if self.evaluate.temperature == 0 and most > 1:
            raise ValueError(
                f"evaluate.temperature is 0 but evaluate.samples is {most}: greedy samples are all "
                "the same; set samples=1"
            )
        if self.evaluate.every and not self.data.evaluate:
            raise ValueError("evaluate.every is set but data.evaluate names no data")
        if self.checkpoint.best:
            self._check_best()
        return self

    def _check_best(self) -> None:
        best, settings = self.checkpoint.best, self.evaluate
        values = {
            f"{source.label}/pass@{k}"
            for source in self.data.evaluate
            for k in passes(settings.for_source(source).samples)
        }
        if settings.greedy:
            values |= {f"{source.label}/greedy" for source in self.data.evaluate}
        if best not in values:
            raise ValueError(
                f"checkpoint.best is {best!r}, which no evaluation measures; "
                + nearest(best, sorted(values) or ["nothing: data.evaluate is empty"])
            )
        if not settings.every:
            raise ValueError("checkpoint.best is set, but evaluate.every is 0; set it to N steps")
