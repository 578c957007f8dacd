"""What an advantage rule is given: the checked numbers of a step, and the statistics that rules are made of.

`checked_step` makes a `Step` of what the caller has; a rule calls the methods of `Step` and ends with `Step.levels`.
`setting_problem` checks one setting of a rule. Shapes and symbols are those of `advantage.py`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

import torch
from torch import Tensor


@dataclass(frozen=True)
class AdvantageLevels:
    """Advantages before and after each level, in the dtype and on the device of the rewards.

    base_PG       before any level (z, or what stands in its place)
    sample_PG     after the sample level, which rescales groups by difficulty
    advantage_PG  after the group level, which rescales correct or incorrect completions: the result
    omega         ω as the rule uses it, in [0, 1]
    rate_P        p as the rule uses it; NaN if no success was given

    A rule without a level repeats the value before it.
    """

    base_PG: Tensor
    sample_PG: Tensor
    advantage_PG: Tensor
    omega: float
    rate_P: Tensor


@dataclass(frozen=True)
class Step:
    """The checked input of a rule. What only some rules need is checked when they ask for it."""

    reward_PG: Tensor
    success_PG: Tensor | None
    length_PG: Tensor | None
    entropy_PG: Tensor | None
    problem_P: Tensor  # numbered from 0
    difficulty_P: Tensor
    part_FPG: Tensor | None
    weight_F: Tensor | None
    dtype: torch.dtype  # of the result
    rounding: float  # relative difference up to which two rewards count as equal
    before: Step | None = None  # rewards and successes as sampled, where completions have been corrected since

    def z(self, eps: float, ddof: int = 0) -> Tensor:
        """z of the reward."""
        return self.standardise(self.reward_PG, eps, ddof=ddof)

    def centre(self, value_PG: Tensor) -> Tensor:
        """value − group mean; 0 where the group has no spread."""
        centred_PG = value_PG - value_PG.mean(dim=1, keepdim=True)
        return centred_PG.masked_fill(self.flat_P1(value_PG, value_PG), 0.0)

    def standardise(self, value_PG: Tensor, eps: float, where: Tensor | None = None, ddof: int = 0) -> Tensor:
        """(value − mean) / (std + eps) within each group; 0 where the group has no spread.

        With `where`, mean and std are those of the marked completions, and the others become 0.
        """
        if where is None:
            where = torch.ones_like(value_PG, dtype=torch.bool)
        count_P1 = where.sum(dim=1, keepdim=True)
        mean_P1 = (value_PG * where).sum(dim=1, keepdim=True) / count_P1.clamp(min=1)
        centred_PG = (value_PG - mean_P1) * where
        variance_P1 = centred_PG.square().sum(dim=1, keepdim=True) / (count_P1 - ddof).clamp(min=1)
        flat_P1 = self.flat_P1(value_PG.masked_fill(~where, math.inf), value_PG.masked_fill(~where, -math.inf))
        return (centred_PG / (variance_P1.sqrt() + eps)).masked_fill(flat_P1, 0.0)

    def z_of_problem(self, eps: float, ddof: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """z of the reward over all completions of the problem's rows, and their lowest and highest reward [P]."""
        size, low_P, high_P = self.reward_PG.shape[1], self.reward_PG.amin(1), self.reward_PG.amax(1)
        count_P = self.sum_of_problem(torch.full_like(low_P, size))
        centred_PG = self.reward_PG - (self.sum_of_problem(self.reward_PG.sum(1)) / count_P)[:, None]
        variance_P = self.sum_of_problem(centred_PG.square().sum(1)) / (count_P - ddof)
        low_P, high_P = (
            torch.empty_like(low_P).scatter_reduce(0, self.problem_P, x, how, include_self=False)[self.problem_P]
            for x, how in ((low_P, "amin"), (high_P, "amax"))
        )
        flat_P1 = self.flat_P1(low_P[:, None], high_P[:, None])
        return (centred_PG / (variance_P.sqrt() + eps)[:, None]).masked_fill(flat_P1, 0.0), low_P, high_P

    def sum_of_problem(self, value_P: Tensor) -> Tensor:
        """The sum [P] of the values of all rows of the problem."""
        return torch.zeros_like(value_P).index_add(0, self.problem_P, value_P)[self.problem_P]

    def z_of_parts(self, eps: float) -> Tensor:
        """GDPO (arXiv 2601.05242): z of each reward part by itself, weighted, added, and standardised over the step.

        A part that does not apply to a completion (NaN) adds 0 there.
        """
        if self.part_FPG is None:
            raise ValueError("normalise_parts needs part_FPG, the values of the reward's parts")
        weight_F = torch.ones_like(self.part_FPG[:, 0, 0]) if self.weight_F is None else self.weight_F
        parts = zip(self.part_FPG, weight_F, strict=True)
        sum_PG = sum((w * self.standardise(x.nan_to_num(), eps, ~x.isnan()) for x, w in parts), self.reward_PG * 0)
        return self.standardise_step(sum_PG, eps)

    @staticmethod
    def standardise_step(z_PG: Tensor, eps: float) -> Tensor:
        """Over all completions of the step. The mean of z is 0: subtracting its rounding would shift flat groups."""
        return z_PG / (z_PG.square().mean().sqrt() + eps)

    def flat_P1(self, for_lowest_PG: Tensor, for_highest_PG: Tensor) -> Tensor:
        """Which groups have no spread but rounding.

        The mean of equal floats need not equal them, and 0.9 + 0.1 is not the same float by every path: divided by a
        std near 0 such noise would pass for signal. Hence a test on the range, not on the std.
        """
        low_P1 = for_lowest_PG.amin(dim=1, keepdim=True)
        high_P1 = for_highest_PG.amax(dim=1, keepdim=True)
        return high_P1 - low_P1 <= self.rounding * torch.maximum(low_P1.abs(), high_P1.abs())

    def correct_PG(self) -> Tensor:
        """1.0 for a correct completion, 0.0 for an incorrect one."""
        if self.success_PG is None:
            raise ValueError("this advantage rule needs success_PG")
        bad_PG = (self.success_PG != 0) & (self.success_PG != 1)
        _refuse(bad_PG, self.success_PG, "a success must be 0 or 1")
        return self.success_PG

    def positive_length_PG(self) -> Tensor:
        if self.length_PG is None:
            raise ValueError("this advantage rule needs length_PG, the lengths in tokens")
        bad_PG = ~torch.isfinite(self.length_PG) | (self.length_PG <= 0)
        _refuse(bad_PG, self.length_PG, "a length must be a positive number of tokens")
        return self.length_PG

    def positive_entropy_PG(self, or_zero: bool = True) -> Tensor:
        if self.entropy_PG is None:
            raise ValueError("this advantage rule needs entropy_PG, the mean entropy of each completion in nats")
        bad_PG = ~torch.isfinite(self.entropy_PG) | (self.entropy_PG < 0)
        _refuse(bad_PG, self.entropy_PG, "an entropy must be finite and not negative")
        if not or_zero:
            rule = "an entropy of 0 gives an infinite advantage; use the rule 'edge' with low above 0, such as low=0.1"
            _refuse(self.entropy_PG == 0, self.entropy_PG, rule)
        return self.entropy_PG

    def relative_entropy_PG(self, low: float, high: float) -> Tensor:
        """Entropy over the group's mean, in [low, high]; 1 where all are 0 and for completions without tokens."""
        entropy_PG = self.positive_entropy_PG()
        counted_PG = torch.ones_like(entropy_PG) if self.length_PG is None else (self.length_PG > 0).to(entropy_PG)
        count_P1 = counted_PG.sum(1, keepdim=True).clamp(min=1)
        mean_P1 = (entropy_PG * counted_PG).sum(1, keepdim=True) / count_P1
        known_PG = (mean_P1 > 0) & (counted_PG > 0)
        relative_PG = torch.where(known_PG, entropy_PG / mean_P1, 1.0).clamp(low, high)
        _refuse(relative_PG == 0, relative_PG, "an entropy of 0 gives an infinite advantage; set low, such as low=0.1")
        return relative_PG

    def known_difficulty_P(self) -> Tensor:
        bad_P = ~((self.difficulty_P >= 1) & (self.difficulty_P <= 9))
        _refuse(bad_P, self.difficulty_P, "a difficulty must be in [1, 9]")
        return self.difficulty_P

    def harder_P1(self) -> Tensor:
        """By how much a group is more difficult than its problem's groups are on average."""
        mean_P = self.sum_of_problem(self.known_difficulty_P()) / self.sum_of_problem(
            torch.ones_like(self.difficulty_P)
        )
        return (self.difficulty_P - mean_P)[:, None]

    def reward_range_P1(self, whole: float) -> Tensor:
        """Highest − lowest reward of the group, over `whole`; at most 1."""
        range_P1 = self.reward_PG.amax(1, keepdim=True) - self.reward_PG.amin(1, keepdim=True)
        return (range_P1 / whole).clamp(max=1)

    def completions(self, at_least: int) -> int:
        """G. Raises ValueError for a setting k, `at_least`, that is not a number of completions."""
        size = self.reward_PG.shape[1]
        if not 1 <= at_least <= size:
            raise ValueError(
                f"advantage setting k must be from 1 to the {size} completions of a group, not {at_least}"
            )
        return size

    def omega(self, source: str) -> float:
        """ω, Eq. 11, clamped to [0, 1]; as p, of the completions as they were sampled."""
        step = self.before or self
        value_PG = step.reward_PG if source == "reward" else step.correct_PG()
        return min(1.0, max(0.0, float(value_PG.mean())))

    def rate_P(self, source: str) -> Tensor:
        """p of each group, the mean of its successes or rewards."""
        step = self.before or self
        rate_P = (step.reward_PG if source == "reward" else step.correct_PG()).mean(dim=1)
        # Rounding may put the mean of rewards of 1 just above 1.
        bad_P = (rate_P < -1e-6) | (rate_P > 1 + 1e-6)
        _refuse(bad_P, rate_P, "the mean reward stands for a rate here and must be in [0, 1]")
        return rate_P.clamp(0, 1)

    def positive_mean_P(self) -> Tensor:
        mean_P = self.reward_PG.mean(dim=1)
        _refuse(mean_P < 0, mean_P, "the mean reward divides here and must not be negative; leave penalties out")
        return mean_P

    def recorded_rate_P(self, source: str = "success") -> Tensor:
        """p for the record, where the rule does not use it and so does not check it."""
        step = self.before or self
        value_PG = step.reward_PG if source == "reward" else step.success_PG
        if value_PG is None:
            return self.reward_PG.new_full((len(self.reward_PG),), math.nan)
        return value_PG.mean(dim=1)

    def levels(
        self,
        base_PG: Tensor,
        sample_PG: Tensor | None = None,
        final_PG: Tensor | None = None,
        *,
        omega: float | None = None,
        rate_P: Tensor | None = None,
    ) -> AdvantageLevels:
        sample_PG = base_PG if sample_PG is None else sample_PG
        final_PG = sample_PG if final_PG is None else final_PG
        rate_P = self.recorded_rate_P() if rate_P is None else rate_P
        return AdvantageLevels(
            base_PG=base_PG.to(self.dtype),
            sample_PG=sample_PG.to(self.dtype),
            advantage_PG=final_PG.to(self.dtype),
            omega=self.omega("reward") if omega is None else omega,
            rate_P=rate_P.to(self.dtype),
        )


# ---------------------------------------------------------------------- checking input and settings


def checked_step(
    reward: Any,
    success: Any,
    length: Any = None,
    entropy: Any = None,
    problem: Any = None,
    difficulty: Any = None,
    parts: Any = None,
    weights: Any = None,
    before: Any = None,
) -> Step:
    """A `Step` of the arguments of `advantage.levels`. Raises ValueError as told there."""
    reward_PG = _tensor("reward_PG", reward)
    dtype = torch.float64 if reward_PG.dtype == torch.float64 else torch.float32
    # Worked out in float64: a z near 0 is a difference of nearly equal numbers, which in float32
    # keeps only 3 digits. [P, G] is small. (Apple's GPUs know no float64.)
    reward_PG = reward_PG.to(torch.float32 if reward_PG.device.type == "mps" else torch.float64)
    if reward_PG.dim() and len(reward_PG) == 0:
        raise ValueError("reward_PG holds no groups")
    if reward_PG.dim() != 2:
        raise ValueError(f"reward_PG must be [P, G]; its shape is {list(reward_PG.shape)}")
    prompts, completions = reward_PG.shape
    if completions < 2:
        raise ValueError(
            f"group 0 has {completions} completion{'s' * (completions != 1)}: an advantage is "
            "relative to the group, so at least 2 are needed"
        )
    _refuse(~torch.isfinite(reward_PG), reward_PG, "a reward must be finite")

    def like_reward(name: str, values: Any) -> Tensor | None:
        if values is None:
            return None
        value_PG = _tensor(name, values)
        if value_PG.shape != reward_PG.shape:
            same_size = value_PG.dim() == 2 and value_PG.shape[1] == completions
            raise ValueError(
                f"group {min(len(value_PG), prompts) if same_size else 0}: {name} has shape "
                f"{list(value_PG.shape)}, but reward_PG has {list(reward_PG.shape)}"
            )
        return value_PG.to(reward_PG)

    def one_a_row(name: str, values: Any, default: Tensor) -> Tensor:
        value_P = default if values is None else _tensor(name, values).to(reward_PG.device)
        if value_P.shape != (prompts,):
            raise ValueError(f"{name} has shape {list(value_P.shape)}, but there are {prompts} groups")
        return value_P

    problem_P = one_a_row("problem_P", problem, torch.arange(prompts, device=reward_PG.device))
    part_FPG = None if parts is None else torch.stack([_tensor("part_FPG", x).to(reward_PG) for x in parts])
    if part_FPG is not None and part_FPG.shape[1:] != reward_PG.shape:
        raise ValueError(f"part_FPG has shape {list(part_FPG.shape)}, but reward_PG has {list(reward_PG.shape)}")
    return Step(
        reward_PG,
        like_reward("success_PG", success),
        like_reward("length_PG", length),
        like_reward("entropy_PG", entropy),
        problem_P=torch.unique(problem_P, return_inverse=True)[1],
        difficulty_P=one_a_row("difficulty_P", difficulty, torch.full_like(reward_PG[:, 0], 5.0)).to(reward_PG),
        part_FPG=part_FPG,
        weight_F=None if weights is None else _tensor("weight_F", weights).to(reward_PG),
        dtype=dtype,
        rounding=8 * torch.finfo(dtype).eps,
        before=None if before is None else checked_step(like_reward("before_PG", before[0]), before[1]),
    )


def _tensor(name: str, values: Any) -> Tensor:
    if isinstance(values, Tensor):
        return values.detach()
    if isinstance(values, list | tuple):
        sizes = [len(row) if hasattr(row, "__len__") else -1 for row in values]
        for group, size in enumerate(sizes):
            if size != sizes[0]:
                raise ValueError(
                    f"group {group} of {name} has {size} completions, group 0 has {sizes[0]}; "
                    "all groups of a step must be of one size"
                )
        return torch.as_tensor(values, dtype=torch.float64)
    return torch.as_tensor(values)


def _refuse(bad: Tensor, value: Tensor, rule: str) -> None:
    """Raise ValueError naming the first group, and completion if any, that `bad` marks."""
    if bad.any():
        group, *completion = bad.nonzero()[0].tolist()
        where = f"group {group}" + "".join(f", completion {i}" for i in completion)
        raise ValueError(f"{where}: {rule}, but it is {value[(group, *completion)].item()!r}")


def _positive(value: Any) -> bool:
    return _number(value) and value > 0


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


_VALID: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "alpha": (lambda v: _positive(v) and v <= 1, "a number in (0, 1]"),
    "beta": (_positive, "a positive number"),
    "gamma": (_positive, "a positive number"),
    "lam": (lambda v: _number(v) and v >= 0, "a number of at least 0"),
    "eps": (_positive, "a positive number"),
    "low": (lambda v: _number(v) and 0 <= v <= 1, "a number in [0, 1]"),
    "high": (lambda v: v == math.inf or (_number(v) and v >= 1), "a number of at least 1"),
    "reward_range": (_positive, "a positive number"),
    "width": (lambda v: _positive(v) and isinstance(v, int), "a positive whole number"),
    "quantile": (lambda v: _positive(v) and v < 1, "a number in (0, 1)"),
}


def setting_problem(parameter: inspect.Parameter, value: Any) -> str | None:
    """What the setting must be, if `value` is not: by its name, by the choices of its Literal, or like its default."""
    default, choices = parameter.default, get_args(parameter.annotation)
    if parameter.name in _VALID:
        is_valid, expected = _VALID[parameter.name]
    elif get_origin(parameter.annotation) is Literal:
        is_valid, expected = (lambda v: v in choices), " or ".join(map(repr, choices))
    elif isinstance(default, bool):
        is_valid, expected = (lambda v: isinstance(v, bool)), "true or false"
    elif isinstance(default, int):
        is_valid, expected = (lambda v: isinstance(v, int) and not isinstance(v, bool)), "a whole number"
    elif isinstance(default, float):
        is_valid, expected = _number, "a number"
    elif isinstance(default, str):
        is_valid, expected = (lambda v: isinstance(v, str)), "text"
    else:
        return None
    return None if is_valid(value) else expected
