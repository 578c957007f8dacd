"""Advantage rules: one number per completion from the rewards of its group.

Every rule is a small pure function in `RULES`; `compute` checks the input, calls one and returns
the advantages, `levels` returns the stages they went through as well.

    P   prompts (= groups) of one optimisation step, over ALL ranks and micro-batches
    G   completions per prompt

Pass the gathered [P, G] of the whole step and slice the result: A-GRAE's ω is a mean over every completion of the
step, so advantages computed rank by rank would differ. Pass it before any group is dropped.

Symbols, as in arXiv 2602.05548 ("the paper" below): r reward, s ∈ {0, 1} success, p the success
rate of a group, z = (r − mean r) / (std r + eps) with the population standard deviation (ddof 0),
ω the mean reward of the step. A group whose rewards are all equal has z = 0.

To add a rule, write a function of the form `(step, *, its settings) -> AdvantageLevels` and add
it to `RULES`; its keyword-only arguments become its settings.
"""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

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


def compute(name: str, reward_PG: Any, success_PG: Any, length_PG: Any = None, **settings: Any) -> Tensor:
    """Advantages [P, G] of one optimisation step by the rule `name` of `RULES`.

    reward_PG   real rewards, finite
    success_PG  1 (or True) where the final answer is correct, else 0; None if the rule needs none
    length_PG   completion lengths in tokens, for `grpo_lead` alone
    settings    those of the rule (`accepted_settings`); one left out has the rule's default

    Tensors, or anything `torch.as_tensor` takes. The result is float64 for float64 rewards and
    lists of Python numbers, else float32, on the device of the rewards.

    Raises ValueError, naming the first offending group by its index, for rewards that are not finite, fewer than 2
    completions, shapes that disagree, a success other than 0 or 1, a length below 1, or a rate outside [0, 1]; and for
    no groups at all, an unknown rule or setting (with the nearest valid name) and a setting out of range.
    """
    return levels(name, reward_PG, success_PG, length_PG, **settings).advantage_PG


def levels(
    name: str, reward_PG: Any, success_PG: Any, length_PG: Any = None, *, before_PG: Any = None, **settings: Any
) -> AdvantageLevels:
    """As `compute`, with the advantages before and after each level, ω and the rates.

    `before_PG`, rewards and successes as sampled, are given where completions have been corrected since: ω and the
    rates are taken of them.
    """
    check_settings(name, settings)
    return _rule(name)(_step(reward_PG, success_PG, length_PG, before_PG), **settings)


def check_settings(name: str, settings: Mapping[str, Any]) -> None:
    """Raise ValueError for a setting that the rule `name` does not take, of the wrong type, or out of range."""
    parameters = inspect.signature(_rule(name)).parameters
    accepted = accepted_settings(name)
    for key, value in settings.items():
        if key not in accepted:
            raise ValueError(f"advantage rule {name!r} has no setting {key!r}; {_nearest(key, accepted)}")
        is_valid, expected = _VALID.get(key) or _like(parameters[key].default)
        if not is_valid(value):
            raise ValueError(f"advantage setting {key} must be {expected}, but it is {value!r}")


def accepted_settings(name: str) -> tuple[str, ...]:
    """Names of the settings the rule takes. Raises ValueError for an unknown rule."""
    parameters = inspect.signature(_rule(name)).parameters.values()
    return tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)


# ------------------------------------------------------------------------------- the rules


def grpo(step: Step, *, eps: float = 1e-6) -> AdvantageLevels:
    """A = z (GRPO, arXiv 2402.03300). Also the advantage of DAPO (arXiv 2503.14476)."""
    return step.levels(step.standardise(step.reward_PG, eps))


def dr_grpo(step: Step) -> AdvantageLevels:
    """A = r − mean r, without the standard deviation (Dr.GRPO, arXiv 2503.20783)."""
    return step.levels(step.centre(step.reward_PG))


def agrae(
    step: Step,
    *,
    alpha: float = 1.0,
    sample_level: bool = True,
    group_level: bool = True,
    base: str = "grpo",
    omega_from: str = "reward",
    rate_from: str = "success",
    eps: float = 1e-6,
) -> AdvantageLevels:
    """A-GRAE (arXiv 2602.05548, Section 5), on z or, with base="dr_grpo", on r − mean r.

    Sample level, Eq. 12, where 0 < p < 1 (other groups are left as they are):

        A ← ω/2 · A/√p + (1 − ω)/2 · A/√(1 − p)

    Group level, Eq. 13:

        A ← A · min(1, ω/α)  where A > 0

    `omega_from` and `rate_from` choose whether ω and p are means of the reward or of the
    success. With rewards that mix accuracy and format the defaults keep p a success rate.

    ω is clamped to [0, 1]. A penalty (for length, say) may push the mean reward below 0, and a
    weight ω or 1 − ω below 0 would turn the direction of learning around. For rewards on a scale
    other than [0, 1], where the clamp would hold ω at an end, set omega_from="success".
    """
    z_PG = step.standardise(step.reward_PG, eps) if base == "grpo" else step.centre(step.reward_PG)
    omega = step.omega(omega_from)
    rate_P = step.rate_P(rate_from) if sample_level else step.recorded_rate_P(rate_from)
    sample_PG = z_PG
    if sample_level:
        hard_P, easy_P = _focus_factors(rate_P)
        mixed_P = (rate_P > 0) & (rate_P < 1)
        factor_P = torch.where(mixed_P, omega / 2 * hard_P + (1 - omega) / 2 * easy_P, 1.0)
        sample_PG = z_PG * factor_P[:, None]
    final_PG = sample_PG
    if group_level:
        final_PG = torch.where(sample_PG > 0, sample_PG * min(1.0, omega / alpha), sample_PG)
    return step.levels(z_PG, sample_PG, final_PG, omega=omega, rate_P=rate_P)


def positive_dominant(step: Step, *, beta: float = 10.0, eps: float = 1e-6) -> AdvantageLevels:
    """A = β·z where z > 0, else z (the paper's Control Experiment I)."""
    z_PG = step.standardise(step.reward_PG, eps)
    return step.levels(z_PG, z_PG, torch.where(z_PG > 0, z_PG * beta, z_PG))


def negative_dominant(step: Step, *, beta: float = 10.0, eps: float = 1e-6) -> AdvantageLevels:
    """A = z/β where z > 0, else z (the paper's Control Experiment I)."""
    z_PG = step.standardise(step.reward_PG, eps)
    return step.levels(z_PG, z_PG, torch.where(z_PG > 0, z_PG / beta, z_PG))


def hard_focused(step: Step, *, gamma: float = 0.5, eps: float = 1e-6) -> AdvantageLevels:
    """A = γ·z/√p where 0 < p < 1, else z (the paper's Control Experiment II)."""
    return _focused(step, gamma, eps, lambda p: _focus_factors(p)[0])


def easy_focused(step: Step, *, gamma: float = 0.5, eps: float = 1e-6) -> AdvantageLevels:
    """A = γ·z/√(1 − p) where 0 < p < 1, else z (the paper's Control Experiment II)."""
    return _focused(step, gamma, eps, lambda p: _focus_factors(p)[1])


def w_reinforce(step: Step, *, lam: float = 0.1) -> AdvantageLevels:
    """A = +λ if correct, −1 if incorrect (W-REINFORCE, arXiv 2506.01347). No baseline."""
    correct_PG = step.correct_PG()
    return step.levels(lam * correct_PG - (1 - correct_PG))


def psr(step: Step) -> AdvantageLevels:
    """A = +1 if correct, else 0: positive sample reinforcement (arXiv 2506.01347)."""
    return step.levels(step.correct_PG())


def nsr(step: Step) -> AdvantageLevels:
    """A = −1 if incorrect, else 0: negative sample reinforcement (arXiv 2506.01347)."""
    return step.levels(step.correct_PG() - 1)


LEAD_LENGTH = 0.05
LEAD_LOW, LEAD_HIGH, LEAD_SLOPE, LEAD_MIDDLE = 0.4, 1.5, 10.0, 0.75


def grpo_lead(step: Step, *, eps: float = 1e-6) -> AdvantageLevels:
    """GRPO-LEAD (arXiv 2504.09696): rewards brevity and weighs groups by difficulty.

    Its own reward replaces r: exp(−0.05·l) for a correct completion, where l is its length standardised over the
    correct completions of the group, and −1 for an incorrect one. With z of that reward,

        A = z·w(p) where z > 0, else z·w(1 − p),
        w(x) = 0.4 + (1.5 − 0.4) / (1 + exp(10·(x − 0.75))).
    """
    correct_PG, rate_P = step.correct_PG() > 0, step.rate_P("success")
    length_PG = step.standardise(step.positive_length_PG(), eps, where=correct_PG)
    reward_PG = torch.where(correct_PG, torch.exp(-LEAD_LENGTH * length_PG), -1.0)
    z_PG = step.standardise(reward_PG, eps)

    def weight(x: Tensor) -> Tensor:
        logistic = torch.sigmoid(-LEAD_SLOPE * (x - LEAD_MIDDLE))
        return (LEAD_LOW + (LEAD_HIGH - LEAD_LOW) * logistic)[:, None]

    weight_PG = torch.where(z_PG > 0, weight(rate_P), weight(1 - rate_P))
    return step.levels(z_PG, z_PG * weight_PG)


def agrae_released_code(step: Step, *, alpha: float = 1.0, eps: float = 1e-6) -> AdvantageLevels:
    """What the function released by A-GRAE's authors computes when its branch is entered.

    With m the mean reward of a group, and the sample standard deviation (ddof 1) in z,

        A ← ω · z/2 / (√m + eps) + (1 − ω) · z/2 / (1 − √m + eps),   then as Eq. 13.

    It differs from `agrae` in 1 − √m for √(1 − m) (at 7/8, 15.5 against 2.83 for the inverse), in m for the success
    rate, in ddof, and in rescaling groups that are all correct or all incorrect too. Their code gives NaN or reversed
    signs for m outside [0, 1]; here that is an error. They edit α by hand in the source.
    """
    z_PG = step.standardise(step.reward_PG, eps, ddof=1)
    omega, rate_P = step.omega("reward"), step.rate_P("reward")
    root_P = rate_P.sqrt()
    factor_P = omega / 2 / (root_P + eps) + (1 - omega) / 2 / (1 - root_P + eps)
    sample_PG = z_PG * factor_P[:, None]
    final_PG = torch.where(sample_PG > 0, sample_PG * min(1.0, omega / alpha), sample_PG)
    return step.levels(z_PG, sample_PG, final_PG, omega=omega, rate_P=rate_P)


Rule = Callable[..., AdvantageLevels]

RULES: dict[str, Rule] = {
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "dapo": grpo,
    "agrae": agrae,
    "positive_dominant": positive_dominant,
    "negative_dominant": negative_dominant,
    "hard_focused": hard_focused,
    "easy_focused": easy_focused,
    "w_reinforce": w_reinforce,
    "psr": psr,
    "nsr": nsr,
    "grpo_lead": grpo_lead,
    "agrae_released_code": agrae_released_code,
}


# ------------------------------------------------------------------- what the rules share


def _focus_factors(rate_P: Tensor) -> tuple[Tensor, Tensor]:
    """1/√p (large for hard groups) and 1/√(1 − p) (large for easy ones)."""
    return rate_P.rsqrt(), (1 - rate_P).rsqrt()


def _focused(step: Step, gamma: float, eps: float, factor: Callable[[Tensor], Tensor]) -> AdvantageLevels:
    z_PG = step.standardise(step.reward_PG, eps)
    rate_P = step.rate_P("success")
    mixed_P = (rate_P > 0) & (rate_P < 1)
    factor_P = torch.where(mixed_P, gamma * factor(rate_P), 1.0)
    return step.levels(z_PG, z_PG * factor_P[:, None])


@dataclass(frozen=True)
class Step:
    """The checked input of a rule. What only some rules need is checked when they ask for it."""

    reward_PG: Tensor
    success_PG: Tensor | None
    length_PG: Tensor | None
    dtype: torch.dtype  # of the result
    rounding: float  # relative difference up to which two rewards count as equal
    before: Step | None = None  # rewards and successes as sampled, where completions have been corrected since

    def centre(self, value_PG: Tensor) -> Tensor:
        """value − group mean; 0 where the group has no spread."""
        centred_PG = value_PG - value_PG.mean(dim=1, keepdim=True)
        return centred_PG.masked_fill(self._flat_P1(value_PG, value_PG), 0.0)

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
        flat_P1 = self._flat_P1(value_PG.masked_fill(~where, math.inf), value_PG.masked_fill(~where, -math.inf))
        return (centred_PG / (variance_P1.sqrt() + eps)).masked_fill(flat_P1, 0.0)

    def _flat_P1(self, for_lowest_PG: Tensor, for_highest_PG: Tensor) -> Tensor:
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


# ---------------------------------------------------------------------- checking the input


def _step(reward: Any, success: Any, length: Any, before: Any = None) -> Step:
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

    return Step(
        reward_PG,
        like_reward("success_PG", success),
        like_reward("length_PG", length),
        dtype=dtype,
        rounding=8 * torch.finfo(dtype).eps,
        before=None if before is None else _step(like_reward("before_PG", before[0]), before[1], None),
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
    "sample_level": (lambda v: isinstance(v, bool), "true or false"),
    "group_level": (lambda v: isinstance(v, bool), "true or false"),
    "base": (lambda v: v in ("grpo", "dr_grpo"), "'grpo' or 'dr_grpo'"),
    "omega_from": (lambda v: v in ("reward", "success"), "'reward' or 'success'"),
    "rate_from": (lambda v: v in ("success", "reward"), "'success' or 'reward'"),
}


def _like(default: Any) -> tuple[Callable[[Any], bool], str]:
    """What a setting without an entry in `_VALID` must be: of the kind of its default."""
    if isinstance(default, bool):
        return lambda v: isinstance(v, bool), "true or false"
    if isinstance(default, int):
        return lambda v: isinstance(v, int) and not isinstance(v, bool), "a whole number"
    if isinstance(default, float):
        return _number, "a number"
    if isinstance(default, str):
        return lambda v: isinstance(v, str), "text"
    return lambda v: True, ""


def _rule(name: str) -> Rule:
    if name not in RULES:
        raise ValueError(f"unknown advantage rule {name!r}; {_nearest(name, tuple(RULES))}")
    return RULES[name]


def _nearest(word: str, names: tuple[str, ...]) -> str:
    close = difflib.get_close_matches(str(word), names, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"valid: {', '.join(names)}" if names else "it has none"
