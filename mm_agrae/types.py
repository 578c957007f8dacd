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

import math
from collections import Counter
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
    there once the prompt has been made. `difficulty` is DIVA's D, 1 (easy) to 9. `variant` names what has made this
    of the problem `id` (`tasks/variants.py`); it is empty for the problem as it is.
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
    variant: str = ""


@dataclass(frozen=True, eq=False)
class Prompt:
    """An Example made ready for the model, processed exactly once.

    `token_ids` [S] are unpadded, with every image placeholder expanded to the number of tokens the vision tower yields
    for it. `pixel_values` and `image_grid_thw` are as the processor returns them (None for a text prompt); the same
    tensors serve rollout and update. `images` are the decoded RGB images after resizing, kept for the rollout record.
    `room` is set where a completion is to be continued: at most so many more tokens are of use.
    """

    example: Example
    text: str
    token_ids: torch.Tensor
    mm_token_type_ids: torch.Tensor | None = None
    pixel_values: torch.Tensor | None = None
    image_grid_thw: torch.Tensor | None = None
    images: tuple[Image, ...] = ()
    room: int | None = None

    def __len__(self) -> int:
        return int(self.token_ids.numel())


@dataclass(frozen=True)
class Completion:
    """What the policy generated for one prompt.

    `token_ids` include the end-of-sequence token when there is one. `logprobs` are the sampling log-probabilities in
    nats, one per token, of the distribution sampled from (temperature applied); NaN marks a token that guided
    correction has put there. `finish_reason` is "stop" or "length". Tokens before `learns_from` are not in the loss.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    finish_reason: str
    policy_version: int
    learns_from: int = 0

    @property
    def sampled_logprobs(self) -> list[float]:
        return [logprob for logprob in self.logprobs if not math.isnan(logprob)]


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
class Correction:
    """What guided correction did with an incorrect completion; see `rollout/correction.py`.

    `drawn` is the branch that was drawn, `branch` the one taken: another for want of a solution, and empty where the
    completion was left as it is. `score` and `text` are those of the completion as it was sampled, `forced` the first
    character of the new text that was not sampled, and the one after the last.
    """

    drawn: str
    branch: str
    score: Score
    text: str
    forced: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class GroupSummary:
    """What every rank needs to know of a group to compute advantages and plan the update.

    Numbers alone, small enough to be gathered from all ranks. Rewards, success and parts `before` are those of the
    completions as sampled, before guided correction. `learning` counts the tokens in the loss, `sampled` those that
    the policy wrote. `entropies` are estimates (nats): the mean of −log p of the sampled tokens; of completions
    without any, the mean of the group's others, or 0. Groups of one `problem` are it and its variants; `difficulty`
    is 1 (easy) to 9. `corrected` counts completions by branch, and those that became correct ("right"), were left as
    they are ("skipped") or had no reference solution ("no_solution"); None without that stage.
    """

    position: int
    rewards: list[float]
    success: list[bool]
    rewards_before: list[float]
    success_before: list[bool]
    lengths: list[int]
    learning: list[int]
    prompt_length: int
    parts: list[dict[str, float]]
    parts_before: list[dict[str, float]]
    entropies: list[float]
    sampled: list[int]
    problem: int
    difficulty: float
    is_variant: bool
    errors: int
    truncated: list[bool]
    corrected: Counter[str] | None


@dataclass
class Group:
    """A prompt with its G completions and their scores.

    `position` is the group's place in the step, counted over all ranks: rank r of N holds the
    positions p with p mod N = r. `resample_round` counts rounds of dynamic sampling, from 0. `corrections`, by the
    index of the completion, are there after guided correction; completions and scores are then the corrected ones.
    `problem` is the position of the first group of the same problem; not set: every group is one of its own.
    """

    position: int
    prompt: Prompt
    completions: list[Completion]
    scores: list[Score]
    resample_round: int = 0
    corrections: dict[int, Correction] | None = None
    problem: int | None = None

    def summary(self) -> GroupSummary:
        made = self.corrections or {}
        before = [made[index].score if index in made else score for index, score in enumerate(self.scores)]
        counts = Counter(each.branch or "skipped" for each in made.values())
        counts["right"] = sum(self.scores[index].success for index in made)
        counts["no_solution"] = sum(each.drawn == "solution" and each.branch == "answer" for each in made.values())
        logprobs = [completion.sampled_logprobs for completion in self.completions]
        means = [-sum(own) / len(own) for own in logprobs if own]
        usual = sum(means) / max(1, len(means))
        return GroupSummary(
            position=self.position,
            rewards=[score.reward for score in self.scores],
            success=[score.success for score in self.scores],
            rewards_before=[score.reward for score in before],
            success_before=[score.success for score in before],
            lengths=[len(completion.token_ids) for completion in self.completions],
            learning=[len(each.token_ids) - each.learns_from for each in self.completions],
            prompt_length=len(self.prompt),
            parts=[dict(score.parts) for score in self.scores],
            parts_before=[dict(score.parts) for score in before],
            entropies=[-sum(own) / len(own) if own else usual for own in logprobs],
            sampled=[*map(len, logprobs)],
            problem=self.position if self.problem is None else self.problem,
            difficulty=self.prompt.example.difficulty,
            is_variant=bool(self.prompt.example.variant),
            errors=sum(bool(score.error) for score in self.scores),
            truncated=[c.finish_reason == "length" for c in self.completions],
            corrected=None if self.corrections is None else counts,
        )


@dataclass
class MicroBatch:
    """The completions of one forward and backward pass, right-padded to T tokens.

    Row b is a completion of `prompts[prompt_index_B[b]]`; rows of one prompt are adjacent.
    `mask_BT` is 1 on completion tokens, the end-of-sequence token included, and 0 on padding and on those that are
    left out of the loss.

    For example, two completions of the first prompt (token ids 11 12 2 and 2, where 2 ends a
    sequence) and one of the second, cut off at the token limit (13 14):

        prompt_index_B    [0, 0, 1]
        token_BT          [[11, 12, 2], [2, 0, 0], [13, 14, 0]]
        mask_BT           [[ 1,  1, 1], [1, 0, 0], [ 1,  1, 0]]
        advantage_B       [0.7, -0.7, -1.0]

    `sampling_logp_BT` are the log-probabilities (nats) that the rollout engine sampled with (NaN: not sampled),
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
