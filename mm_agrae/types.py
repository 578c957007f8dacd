"""The nouns of the pipeline, one dataclass per stage.

    Example -> Prompt -> Completion -> Score -> Group -> (advantages) -> MicroBatch -> update

Shapes are written as suffixes of tensor names, with one legend for the whole package:

    P   prompts (= groups) of one training step, over all ranks
    G   completions per prompt
    B   rows of a micro-batch (one row per completion)
    T   completion tokens, right-padded to the longest of the batch
    S   tokens of a whole sequence, prompt and completion
    V   vocabulary
    N   images

so `reward_PG` holds one reward per completion and `logp_BT` one log-probability (nats) per completion token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

    ImageSource = str | bytes | Image  # a path, the encoded bytes, or a decoded image
else:
    ImageSource = object


@dataclass(frozen=True)
class Example:
    """One row of a task: a question, its gold answer, and how to grade it.

    `<image>` markers in `question` say where the images go; without markers they come first. `grading` are keyword
    arguments of `grading.accuracy.verify` (for instance `{"kind": "choice", "choices": ["12", "15"]}`). `origin` names
    the file and row for error messages. `meta` is copied into the rollout records. `columns` are those of the row but
    for its images, for rewards. `system` is the row's own system turn (empty: `prompt.system`), `history` the turns
    before the question, as ("user" or "assistant", text); their markers stand for the first of the images.
    `image_sizes` and `shown_sizes`, width and height in pixels of each image as stored and as the model sees it, are
    there once the prompt has been made. `difficulty` is DIVA's D, from 1 (easy) to 9, by `data.difficulty_from`.
    """

    id: str
    question: str
    answer: str
    images: tuple[ImageSource, ...] = ()
    grading: Mapping[str, Any] = field(default_factory=dict)
    origin: str = ""
    meta: Mapping[str, Any] = field(default_factory=dict)
    columns: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    system: str = ""
    history: tuple[tuple[str, str], ...] = ()
    image_sizes: tuple[tuple[int, int], ...] = field(default=(), compare=False)
    shown_sizes: tuple[tuple[int, int], ...] = field(default=(), compare=False)
    difficulty: float = 5.0


@dataclass(frozen=True, eq=False)
class Prompt:
    """An Example made ready for the model, processed exactly once.

    `token_ids` [S] are unpadded, with every image placeholder expanded to the number of tokens the vision tower yields
    for it. `pixel_values` and `image_grid_thw` are as the processor returns them (None for a text prompt); the same
    tensors serve rollout and update. `images` are the decoded RGB images after resizing, kept for the rollout record.
    """

    example: Example
    text: str
    token_ids: torch.Tensor
    mm_token_type_ids: torch.Tensor | None = None
    pixel_values: torch.Tensor | None = None
    image_grid_thw: torch.Tensor | None = None
    images: tuple[Image, ...] = ()

    def __len__(self) -> int:
        return int(self.token_ids.numel())


@dataclass(frozen=True)
class Completion:
    """What the policy generated for one prompt.

    `token_ids` include the end-of-sequence token when there is one. `logprobs` are the sampling log-probabilities in
    nats, one per token, of the distribution sampled from (temperature applied). `finish_reason` is "stop" or "length".
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    finish_reason: str
    policy_version: int


@dataclass(frozen=True)
class Score:
    """The verdict on one completion.

    `reward` is the weighted sum of `parts`, which holds those that apply; `success` says whether the final answer is
    correct. `error` names the part that failed or timed out ("" if none), which counts 0.
    """

    reward: float
    success: bool
    parts: Mapping[str, float]
    error: str = ""


@dataclass(frozen=True)
class GroupSummary:
    """What every rank needs to know of a group to compute advantages and plan the update.

    Numbers alone, small enough to be gathered from all ranks. `entropies` are estimates (nats): the mean of −log p of
    the sampled tokens, 0 without tokens. Groups of one `problem` are variants of it; `difficulty` is 1 (easy) to 9.
    """

    position: int
    rewards: list[float]
    success: list[bool]
    lengths: list[int]
    prompt_length: int
    parts: list[dict[str, float]]
    entropies: list[float]
    problem: int
    difficulty: float
    errors: int
    truncated: list[bool]


@dataclass
class Group:
    """A prompt with its G completions and their scores.

    `position` is the group's place in the step, counted over all ranks: rank r of N holds the
    positions p with p mod N = r. `resample_round` counts rounds of dynamic sampling, from 0.
    """

    position: int
    prompt: Prompt
    completions: list[Completion]
    scores: list[Score]
    resample_round: int = 0

    def summary(self) -> GroupSummary:
        difficulty = self.prompt.example.meta.get("difficulty")
        return GroupSummary(
            position=self.position,
            rewards=[score.reward for score in self.scores],
            success=[score.success for score in self.scores],
            lengths=[len(completion.token_ids) for completion in self.completions],
            prompt_length=len(self.prompt),
            parts=[dict(score.parts) for score in self.scores],
            entropies=[-sum(c.logprobs) / max(1, len(c.logprobs)) for c in self.completions],
            problem=self.position,
            difficulty=float(difficulty) if isinstance(difficulty, int | float) else 5.0,
            errors=sum(bool(score.error) for score in self.scores),
            truncated=[c.finish_reason == "length" for c in self.completions],
        )


@dataclass
class MicroBatch:
    """The completions of one forward and backward pass, right-padded to T tokens.

    Row b is a completion of `prompts[prompt_index_B[b]]`; rows of one prompt are adjacent.
    `mask_BT` is 1 on completion tokens, the end-of-sequence token included, and 0 on padding.

    For example, two completions of the first prompt (token ids 11 12 2 and 2, where 2 ends a
    sequence) and one of the second, cut off at the token limit (13 14):

        prompt_index_B    [0, 0, 1]
        token_BT          [[11, 12, 2], [2, 0, 0], [13, 14, 0]]
        mask_BT           [[ 1,  1, 1], [1, 0, 0], [ 1,  1, 0]]
        advantage_B       [0.7, -0.7, -1.0]

    `sampling_logp_BT` are the log-probabilities (nats) that the rollout engine sampled with,
    `old_logp_BT` the policy's before this rollout's updates (None: on-policy, the present ones)
    and `ref_logp_BT` the reference policy's (None: no KL penalty). `prompt_index_B` and `length_B`,
    the completions' lengths, are in main memory: they lay out the work, and reading them from a GPU
    would make the CPU wait for it.
    """

    prompts: Sequence[Prompt]
    prompt_index_B: torch.Tensor
    token_BT: torch.Tensor
    mask_BT: torch.Tensor
    advantage_B: torch.Tensor
    sampling_logp_BT: torch.Tensor
    old_logp_BT: torch.Tensor | None = None
    ref_logp_BT: torch.Tensor | None = None
    length_B: torch.Tensor = field(default=None)  # type: ignore[assignment]  # None: counted in the mask

    def __post_init__(self) -> None:
        if self.length_B is None:
            self.length_B = self.mask_BT.sum(-1).long().cpu()
