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

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from mm_agrae.advantage_input import AdvantageLevels, Step, checked_step, setting_problem
from mm_agrae.errors import nearest


def compute(name: str, reward_PG: Any, success_PG: Any, length_PG: Any = None, **given: Any) -> Tensor:
    """Advantages [P, G] of one optimisation step by the rule `name` of `RULES`: those of `levels`, which see."""
    return levels(name, reward_PG, success_PG, length_PG, **given).advantage_PG


def levels(
    name: str,
    reward_PG: Any,
    success_PG: Any,
    length_PG: Any = None,
    *,
    entropy_PG: Any = None,
    problem_P: Any = None,
    difficulty_P: Any = None,
    part_FPG: Any = None,
    weight_F: Any = None,
    before_PG: Any = None,
    **settings: Any,
) -> AdvantageLevels:
    """Advantages of one optimisation step before and after each level, ω and the rates.

    reward_PG     real rewards, finite
    success_PG    1 (or True) where the final answer is correct, else 0; None if the rule needs none
    length_PG     completion lengths in tokens, for `grpo_lead` and `diva_released_code`
    entropy_PG    mean entropy (nats) of the distributions each completion was sampled from, for `edge`
    problem_P     whole numbers that join the groups of one problem, for `diva`; None: each is a problem of its own
    difficulty_P  of each group, from 1 (easy) to 9, for `diva`; None: 5
    part_FPG      values of F reward parts (NaN where one does not apply), and weight_F their weights (None: 1), for
                  normalise_parts
    before_PG     where completions have been corrected since: the pair of rewards and successes as they were sampled,
                  of which ω and the rates are taken
    settings      those of the rule (`accepted_settings`); one left out has the rule's default

    Tensors, or anything `torch.as_tensor` takes. The result is float64 for float64 rewards and
    lists of Python numbers, else float32, on the device of the rewards.

    Raises ValueError, naming the first offending group by its index, for rewards that are not finite, fewer than 2
    completions, shapes that disagree, a success other than 0 or 1, a length below 1, a rate outside [0, 1], and an
    entropy or a difficulty the rule cannot use; and for no groups at all, something the rule needs and does not get,
    an unknown rule or setting (with the nearest valid name) and a setting out of range.
    """
    check_settings(name, settings)
    more = entropy_PG, problem_P, difficulty_P, part_FPG, weight_F, before_PG
    return _rule(name)(checked_step(reward_PG, success_PG, length_PG, *more), **settings)


def check_settings(name: str, settings: Mapping[str, Any]) -> None:
    """Raise ValueError for a setting that the rule `name` does not take, of the wrong type, or out of range."""
    parameters = inspect.signature(_rule(name), eval_str=True).parameters
    accepted = accepted_settings(name)
    for key, value in settings.items():
        if key not in accepted:
            known = nearest(key, accepted) if accepted else "it has none"
            raise ValueError(f"advantage rule {name!r} has no setting {key!r}; {known}")
        if expected := setting_problem(parameters[key], value):
            raise ValueError(f"advantage setting {key} must be {expected}, but it is {value!r}")


def needs(name: str, given: str, settings: Mapping[str, Any]) -> bool:
    """Whether the rule, with these settings, looks at `given`: success_PG, length_PG, entropy_PG or part_FPG.

    Raises ValueError for an unknown rule or setting.
    """
    cells, ones = [[0.0, 1.0] * 128], [[1.0] * 256]
    inputs = {"success_PG": cells, "length_PG": ones, "entropy_PG": ones, "part_FPG": [cells]}
    levels(name, cells, **inputs, **settings)  # raises for invalid settings
    try:
        levels(name, cells, **inputs | {given: None}, **settings)
    except ValueError:
        return True
    return False


def accepted_settings(name: str) -> tuple[str, ...]:
    """Names of the settings the rule takes. Raises ValueError for an unknown rule."""
    parameters = inspect.signature(_rule(name)).parameters.values()
    return tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)


# ------------------------------------------------------------------------------- the rules


def grpo(step: Step, *, normalise_parts: bool = False, eps: float = 1e-6) -> AdvantageLevels:
    """A = z (GRPO, arXiv 2402.03300). Also the advantage of DAPO (arXiv 2503.14476).

    `normalise_parts` (GDPO, arXiv 2601.05242) takes z of each reward part by itself, so that one with little spread,
    such as a format, counts by its weight; their weighted sum is divided by its standard deviation over the step.
    """
    return step.levels(_base(step, "grpo", eps, normalise_parts))


def dr_grpo(step: Step) -> AdvantageLevels:
    """A = r − mean r, without the standard deviation (Dr.GRPO, arXiv 2503.20783)."""
    return step.levels(step.centre(step.reward_PG))


def agrae(
    step: Step,
    *,
    alpha: float = 1.0,
    sample_level: bool = True,
    group_level: bool = True,
    base: Literal["grpo", "dr_grpo"] = "grpo",
    omega_from: Literal["reward", "success"] = "reward",
    rate_from: Literal["success", "reward"] = "success",
    normalise_parts: bool = False,
    eps: float = 1e-6,
) -> AdvantageLevels:
    """A-GRAE (arXiv 2602.05548, Section 5), on z or, with base="dr_grpo", on r − mean r.

    Sample level, Eq. 12, where 0 < p < 1 (other groups are left as they are):

        A ← ω/2 · A/√p + (1 − ω)/2 · A/√(1 − p)

    Group level, Eq. 13:

        A ← A · min(1, ω/α)  where A > 0

    `omega_from` and `rate_from` choose whether ω and p are means of the reward or of the
    success. With rewards that mix accuracy and format the defaults keep p a success rate.
    `normalise_parts` is that of `grpo`.

    ω is clamped to [0, 1]. A penalty (for length, say) may push the mean reward below 0, and a
    weight ω or 1 − ω below 0 would turn the direction of learning around. For rewards on a scale
    other than [0, 1], where the clamp would hold ω at an end, set omega_from="success".
    """
    z_PG = _base(step, base, eps, normalise_parts)
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
    z_PG = step.z(eps)
    return step.levels(z_PG, z_PG, torch.where(z_PG > 0, z_PG * beta, z_PG))


def negative_dominant(step: Step, *, beta: float = 10.0, eps: float = 1e-6) -> AdvantageLevels:
    """A = z/β where z > 0, else z (the paper's Control Experiment I)."""
    z_PG = step.z(eps)
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
    z_PG = step.z(eps, ddof=1)
    omega, rate_P = step.omega("reward"), step.rate_P("reward")
    root_P = rate_P.sqrt()
    factor_P = omega / 2 / (root_P + eps) + (1 - omega) / 2 / (1 - root_P + eps)
    sample_PG = z_PG * factor_P[:, None]
    final_PG = torch.where(sample_PG > 0, sample_PG * min(1.0, omega / alpha), sample_PG)
    return step.levels(z_PG, sample_PG, final_PG, omega=omega, rate_P=rate_P)


_Base = Literal["grpo", "dr_grpo", "agrae"]


def edge(
    step: Step, *, base: _Base = "grpo", low: float = 0.1, high: float = 10.0, alpha: float = 1.0, eps: float = 1e-6
) -> AdvantageLevels:
    """A ← A/P̂, entropy-driven advantage (EDGE-GRPO, arXiv 2507.21848, Eq. 6 and 7) on the advantage of `base`.

    P̂ is a completion's mean entropy over the mean of its group's: the more certain it was, the more it learns, whether
    right or wrong. P̂ is held in [low, high], a line commented out in the authors' code. low=0, high=inf is the paper
    to the letter: an entropy of 0 is then an error, and one near 0 gives a huge A. A-GRAE's factors, of a group and a
    sign, and P̂'s, of a completion, commute. `alpha` is A-GRAE's.
    """
    relative_PG = step.relative_entropy_PG(low, high)
    found = _levels_of_base(step, base, alpha, eps)
    return replace(found, advantage_PG=(found.advantage_PG / relative_PG).to(step.dtype))


def edge_released_code(step: Step, *, eps: float = 1e-4) -> AdvantageLevels:
    """A = z · mean P / P as EDGE-GRPO's authors released it: z with ddof 1, the mean entropy over the whole step.

    Their step holds one group. Their code also sends a gradient through P, which an advantage does not.
    """
    entropy_PG = step.positive_entropy_PG(or_zero=False)
    z_PG = step.z(eps, ddof=1)
    return step.levels(z_PG, z_PG * entropy_PG.mean() / entropy_PG)


def diva(
    step: Step,
    *,
    k: float = 0.1,
    normalise: bool = True,
    rrb: bool = True,
    weight_on: Literal["global", "both"] = "global",
    reward_range: float = 1.0,
    eps: float = 1e-6,
) -> AdvantageLevels:
    """A = A_L + A_G: z within the group plus z over all variants of its problem (DIVA-GRPO, arXiv 2603.01106).

    `normalise` divides A_L and A_G by their standard deviation over the step. A_G (`weight_on`: or both) is multiplied
    by exp(k·(D − mean D of the problem)·sign A), D the difficulty: harder variants gain more and lose less. `rrb`
    multiplies both by Δr, the range of rewards, of the group or the problem, over `reward_range`, at most 1.
    """
    local_PG = step.z(eps)
    global_PG, low_P, high_P = step.z_of_problem(eps)
    if normalise:
        local_PG, global_PG = (step.standardise_step(z_PG, eps) for z_PG in (local_PG, global_PG))
    harder_P1 = step.harder_P1()
    global_PG = global_PG * torch.exp(k * harder_P1 * global_PG.sign())
    if weight_on == "both":
        local_PG = local_PG * torch.exp(k * harder_P1 * local_PG.sign())
    if rrb:
        local_PG = local_PG * step.reward_range_P1(reward_range)
        global_PG = global_PG * ((high_P - low_P) / reward_range).clamp(max=1)[:, None]
    return step.levels(step.z(eps), local_PG + global_PG)


def diva_released_code(step: Step, *, width: int = 4096, eps: float = 1e-6) -> AdvantageLevels:
    """What the function released by DIVA-GRPO's authors computes, whose responses are padded to `width` tokens.

    It differs from `diva` in ddof 1; in standardising over the padded tokens of the step, the padding counted as 0, so
    that long completions weigh more and A grows with `width`; and in Δr, which is 0.1 if all rewards of the group or
    problem are below 0.15, else 1.
    """
    length_PG = step.positive_length_PG()
    if (longest := int(length_PG.max())) > width:
        raise ValueError(f"width is {width}, but a completion has {longest} tokens; set it to their limit")
    cells = step.reward_PG.numel() * width
    global_PG, _, high_P = step.z_of_problem(eps, ddof=1)
    local_PG, final_PG = step.z(eps, ddof=1), torch.zeros_like(global_PG)
    for z_PG, best_P, k in ((local_PG, step.reward_PG.amax(1), 0.0), (global_PG, high_P, 0.1)):
        mean = (z_PG * length_PG).sum() / cells
        variance = ((z_PG.square() * length_PG).sum() - cells * mean**2) / (cells - 1)
        padded_PG = torch.where(variance > 0, (z_PG - mean) / variance.sqrt(), 0.0)
        weight_PG = torch.exp(k * step.harder_P1() * padded_PG.sign())
        final_PG = final_PG + padded_PG * weight_PG * torch.where(best_P < 0.15, 0.1, 1.0)[:, None]
    return step.levels(local_PG, final_PG)


def grpo_rrb(
    step: Step, *, base: _Base = "grpo", reward_range: float = 1.0, alpha: float = 1.0, eps: float = 1e-6
) -> AdvantageLevels:
    """A ← A·Δr, Δr the group's range of rewards over `reward_range`, at most 1 (the RRB of arXiv 2603.01106 alone).

    With 0/1 rewards nothing changes; groups that differ in format alone weigh less. `alpha` is A-GRAE's.
    """
    found = _levels_of_base(step, base, alpha, eps)
    return replace(found, advantage_PG=(found.advantage_PG * step.reward_range_P1(reward_range)).to(step.dtype))


def maxrl(step: Step) -> AdvantageLevels:
    """A = (r − mean r) / mean r, 0 where the mean is 0 (MaxRL, arXiv 2602.02710): a harmonic mix of pass@k gradients.

    For rewards whose mean is not negative: dividing by it would turn the direction of learning around.
    """
    mean_P1 = step.positive_mean_P()[:, None]
    return step.levels((step.centre(step.reward_PG) / mean_P1).masked_fill(mean_P1 == 0, 0.0))


def pkpo(step: Step, *, k: int = 2) -> AdvantageLevels:
    """A = s − mean s, s the completion's share in the best of k (PKPO, arXiv 2505.15201).

    s_i = Σ over the subsets of k completions that hold i of their largest reward / C(G, k): an unbiased estimate of
    the gradient of E[max of k], which for 0/1 rewards is pass@k. By rank j = 1 … G of rewards in ascending order,

        s_j · C(G, k) = C(j − 1, k − 1)·r_j + Σ_{i > j} C(i − 2, k − 2)·r_i.
    """
    size = step.completions(at_least=k)
    sorted_PG, order_PG = step.reward_PG.sort(dim=1)
    own = [math.comb(j, k - 1) / math.comb(size, k) for j in range(size)]
    above = [math.comb(j - 1, k - 2) / math.comb(size, k) if j and k > 1 else 0.0 for j in range(size)]
    own_G, above_G = (sorted_PG.new_tensor(weights) for weights in (own, above))
    weighted_PG = sorted_PG * above_G
    larger_PG = weighted_PG.flip(1).cumsum(1).flip(1) - weighted_PG
    share_PG = torch.empty_like(sorted_PG).scatter(1, order_PG, sorted_PG * own_G + larger_PG)
    flat_P1 = step.flat_P1(step.reward_PG, step.reward_PG)
    return step.levels((share_PG - share_PG.mean(1, keepdim=True)).masked_fill(flat_P1, 0.0))


def pass_at_k(step: Step, *, k: int = 2, eps: float = 1e-6) -> AdvantageLevels:
    """z of pass@k as the reward, over all subsets of k completions (Pass@k Training, arXiv 2508.10751).

    With w incorrect of G, R = 1 − C(w, k)/C(G, k) and σ = √(R(1 − R)):

        A = (1 − R)/σ if correct, (1 − R − C(w − 1, k − 1)/C(G − 1, k − 1))/σ if incorrect; 0 where σ = 0.

    k = 1 is `grpo` of the success.
    """
    size, correct_PG = step.completions(at_least=k), step.correct_PG()
    none_w = [math.comb(w, k) / math.comb(size, k) for w in range(size + 1)]
    others_w = [math.comb(max(w - 1, 0), k - 1) / math.comb(size - 1, k - 1) for w in range(size + 1)]
    wrong_P = (1 - correct_PG).sum(1).long()
    fail_P1, others_P1 = (correct_PG.new_tensor(x)[wrong_P][:, None] for x in (none_w, others_w))
    sigma_P1 = (fail_P1 * (1 - fail_P1)).sqrt()
    value_PG = (fail_P1 - others_P1 * (1 - correct_PG)) / (sigma_P1 + eps)
    return step.levels(value_PG.masked_fill(sigma_P1 == 0, 0.0))


def quantile(step: Step, *, quantile: float = 0.4, eps: float = 1e-6) -> AdvantageLevels:
    """A = (r − Q) / (std r + eps), Q the `quantile` of the group's rewards (QAE, arXiv 2509.22611).

    Q is the least reward that a share of at least `quantile` does not exceed. With 0/1 rewards and K = `quantile`:
    only correct completions have an advantage where p ≤ 1 − K, only incorrect ones where p > 1 − K.
    """
    size = step.reward_PG.shape[1]
    rank = max(1, math.ceil(quantile * size - 1e-9))
    baseline_P1 = step.reward_PG.sort(dim=1).values[:, rank - 1 : rank]
    std_P1 = step.reward_PG.std(1, correction=0, keepdim=True)
    flat_P1 = step.flat_P1(step.reward_PG, step.reward_PG)
    return step.levels(((step.reward_PG - baseline_P1) / (std_P1 + eps)).masked_fill(flat_P1, 0.0))


def max_minus_second(step: Step) -> AdvantageLevels:
    """A = the lead over the second-best reward for the group's best completion, else 0 (arXiv 2503.19595)."""
    best = step.reward_PG.topk(2, dim=1)
    lead_P1 = best.values[:, :1] - best.values[:, 1:]
    lead_P1 = lead_P1.masked_fill(step.flat_P1(best.values, best.values), 0.0)
    return step.levels(torch.zeros_like(step.reward_PG).scatter(1, best.indices[:, :1], lead_P1))


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
    "edge": edge,
    "edge_released_code": edge_released_code,
    "diva": diva,
    "diva_released_code": diva_released_code,
    "grpo_rrb": grpo_rrb,
    "maxrl": maxrl,
    "pkpo": pkpo,
    "pass_at_k": pass_at_k,
    "quantile": quantile,
    "max_minus_second": max_minus_second,
}


# ------------------------------------------------------------------- what the rules share


def _base(step: Step, base: str, eps: float, normalise_parts: bool = False) -> Tensor:
    """What the levels of A-GRAE begin with: z, z by parts, or r − mean r."""
    if normalise_parts and base == "dr_grpo":
        raise ValueError(
            "normalise_parts standardises each part, which base='dr_grpo' does not; leave one of them out"
        )
    if normalise_parts:
        return step.z_of_parts(eps)
    return step.z(eps) if base == "grpo" else step.centre(step.reward_PG)


def _levels_of_base(step: Step, base: str, alpha: float, eps: float) -> AdvantageLevels:
    return agrae(step, alpha=alpha, eps=eps) if base == "agrae" else step.levels(_base(step, base, eps))


def _focus_factors(rate_P: Tensor) -> tuple[Tensor, Tensor]:
    """1/√p (large for hard groups) and 1/√(1 − p) (large for easy ones)."""
    return rate_P.rsqrt(), (1 - rate_P).rsqrt()


def _focused(step: Step, gamma: float, eps: float, factor: Callable[[Tensor], Tensor]) -> AdvantageLevels:
    z_PG = step.z(eps)
    rate_P = step.rate_P("success")
    mixed_P = (rate_P > 0) & (rate_P < 1)
    factor_P = torch.where(mixed_P, gamma * factor(rate_P), 1.0)
    return step.levels(z_PG, z_PG * factor_P[:, None])


def _rule(name: str) -> Rule:
    if name not in RULES:
        raise ValueError(f"unknown advantage rule {name!r}; {nearest(str(name), RULES)}")
    return RULES[name]
