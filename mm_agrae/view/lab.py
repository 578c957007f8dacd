"""The advantage lab: what a rule makes of one group, and of a small softmax policy through it.

Every advantage here comes from `advantage.levels`. A rule sees a whole optimisation step, and ω
is the step's mean reward. So the groups of interest are put into a step whose other groups have
equal rewards within each, hence no signal, and bring ω to the requested value.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch

from mm_agrae.advantage import RULES, accepted_settings, levels
from mm_agrae.view.page import Html, el, join, number, percent, table
from mm_agrae.view.plots import Line, Points, plot

MIN_OMEGA, MAX_OMEGA = 0.02, 0.98
"""At 0 or 1 no group of the step could hold both correct and incorrect completions."""
UNSAMPLED_MASS = 0.1
"""Total probability of the outcomes that the group did not sample, in the small world."""


@dataclass(frozen=True)
class Setting:
    """`correct` of `completions` are correct (p is their ratio); ω and α as in the paper.

    Raises ValueError for values that no step can have.
    """

    rule: str = "agrae"
    completions: int = 8
    correct: int = 2
    omega: float = 0.3
    alpha: float = 1.0

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise ValueError(f"unknown rule {self.rule!r}; there are {', '.join(RULES)}")
        if not 2 <= self.completions <= 256 or not 0 <= self.correct <= self.completions:
            sizes = f"{self.correct} correct of {self.completions} completions"
            raise ValueError(f"{sizes}: not a group")
        if not MIN_OMEGA <= self.omega <= MAX_OMEGA:
            raise ValueError(f"ω is {self.omega:g}; {MIN_OMEGA} to {MAX_OMEGA} can be shown")

    @property
    def rate(self) -> float:
        return self.correct / self.completions

    @property
    def options(self) -> dict[str, Any]:
        return {"alpha": self.alpha} if self.rule.startswith("agrae") else {}


STAGES = {"base_PG": "before", "sample_PG": "sample level", "advantage_PG": "group level"}


def advantages(setting: Setting) -> tuple[dict[str, torch.Tensor], float]:
    """As `_advantages`, whatever `setting.correct` is."""
    return _advantages(replace(setting, correct=0))


@lru_cache(maxsize=256)
def _advantages(setting: Setting) -> tuple[dict[str, torch.Tensor], float]:
    """Stage -> advantages [G+1, G] of groups with 0, 1 … G correct completions (first), and ω."""
    size = setting.completions
    success_PG = (torch.arange(size) < torch.arange(size + 1)[:, None]).double()
    # The rows shown have mean 1/2; rows of one equal reward bring the mean to ω.
    rows, omega = size + 1, setting.omega
    more = max(1, math.ceil(rows * abs(0.5 - omega) / min(omega, 1 - omega) - 1e-9))
    reward = min(1.0, max(0.0, (omega * (rows + more) - 0.5 * rows) / more))
    others_PG = torch.full((more, size), reward, dtype=torch.float64)
    result = levels(
        setting.rule,
        torch.cat([success_PG, others_PG]),
        torch.cat([success_PG, torch.zeros_like(others_PG)]),
        torch.ones(rows + more, size),
        # Of no effect but under EDGE: every other completion was three times as certain.
        entropy_PG=torch.where(torch.arange(size) % 2 == 0, 0.5, 1.5).expand(rows + more, size),
        **({"width": 1} if "width" in accepted_settings(setting.rule) else {}),
        **setting.options,
    )
    return {label: getattr(result, name)[:rows] for name, label in STAGES.items()}, result.omega


def curves(setting: Setting) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Stage -> Σ|A|, and stage -> ΣA, of groups with 0, 1 … G correct completions."""
    stages, _ = advantages(setting)
    weight = {label: value.abs().sum(1).tolist() for label, value in stages.items()}
    return weight, {label: value.sum(1).tolist() for label, value in stages.items()}


@dataclass(frozen=True)
class Outcome:
    """One outcome of the small world: a whole completion that the policy may sample.

    `sampled` counts the group's completions that are this one, `advantage` is the sum of theirs.
    `change` is what one step of gradient ascent does to its logit, `after` its probability then.
    """

    label: str
    correct: bool
    sampled: int
    probability: float
    advantage: float
    change: float
    after: float


def world(setting: Setting, step_size: float = 1.0) -> list[Outcome]:
    """One policy-gradient step of a softmax over four outcomes, for the group of `setting`.

    All correct completions are one outcome and all incorrect ones another; one further correct and
    one further incorrect outcome were not sampled. The objective Σ A_i · log π(outcome_i) is
    differentiated by autograd; its gradient is Theorem 1 (Eq. 6) of arXiv 2602.05548.
    """
    stages, _ = advantages(setting)
    advantage_G = stages["group level"][setting.correct]
    sampled = [setting.correct, setting.completions - setting.correct, 0, 0]
    labels = ["correct A", "incorrect B", "correct C", "incorrect D"]
    unsampled = sampled.count(0)
    sampled_mass = 1 - UNSAMPLED_MASS
    probabilities = [
        sampled_mass * count / setting.completions if count else UNSAMPLED_MASS / unsampled for count in sampled
    ]
    probability = torch.tensor(probabilities, dtype=torch.float64)
    outcome_G = torch.repeat_interleave(torch.arange(4), torch.tensor(sampled))
    logits = probability.log().requires_grad_()
    objective = (advantage_G * logits.log_softmax(-1)[outcome_G]).sum()
    (gradient,) = torch.autograd.grad(objective, logits)
    change = step_size * gradient
    after = (logits + change).softmax(-1)
    total = torch.zeros(4, dtype=torch.float64).index_add(0, outcome_G, advantage_G.double())
    return [
        Outcome(label, label.startswith("correct"), *values)
        for label, *values in zip(
            labels, sampled, *(v.tolist() for v in (probability, total, change, after)), strict=True
        )
    ]


def moves(setting: Setting) -> dict[str, list[tuple[float, float]]]:
    """Kind of outcome -> (p, logit change) for every p at which a group has such an outcome."""
    kinds = ("correct, sampled", "incorrect, sampled", "not sampled")
    points: dict[str, list[tuple[float, float]]] = {kind: [] for kind in kinds}
    for correct in range(1, setting.completions):
        outcomes = world(replace(setting, correct=correct))
        for kind, outcome in zip(kinds, outcomes, strict=False):
            points[kind].append((correct / setting.completions, outcome.change))
    return points


def plots(setting: Setting) -> Html:
    """Σ|A| and ΣA against p, and the logit changes of sampled and unsampled outcomes."""
    grpo_setting = replace(setting, rule="grpo")
    titles = ("Σ|A|: how much a group weighs", "ΣA: for or against what was sampled")
    sums = zip(titles, curves(setting), curves(grpo_setting), strict=True)
    figures = [_plot(setting, title, now, grpo["group level"]) for title, now, grpo in sums]
    now, grpo = moves(setting), moves(grpo_setting)
    kinds = ((2, "correct, sampled"), (3, "incorrect, sampled"))
    sampled = [Line(kind, now[kind], color=color) for color, kind in kinds]
    unsampled = _beside_grpo(setting, now["not sampled"], grpo["not sampled"])
    figures.append(plot("Logit change of a sampled outcome", sampled, x_name="p"))
    figures.append(plot("Logit change of an unsampled outcome", unsampled, x_name="p"))
    return el("div", *figures, class_="plots")


def _plot(setting: Setting, title: str, now: dict[str, list[float]], grpo: list[float]) -> Html:
    """A sum over a group, by the rule and by GRPO; the sample level alone only if it differs."""
    rate = [correct / setting.completions for correct in range(setting.completions + 1)]
    points, before, sample = (
        list(zip(rate, now[label], strict=True)) for label in ("group level", "before", "sample level")
    )
    lines = _beside_grpo(setting, points, list(zip(rate, grpo, strict=True)))
    if all(max(abs(a - b) for (_, a), (_, b) in zip(sample, other, strict=True)) > 1e-9 for other in (before, points)):
        lines.insert(0, Line(f"{setting.rule}, sample level alone", sample, color=2))
    note = f"at p = {setting.rate:.3g}: {_signed(points[setting.correct][1]).lstrip('+')}"
    return plot(title, lines, note=note, x_name="p")


def _beside_grpo(setting: Setting, points: Points, grpo: Points) -> list[Line]:
    lines = [Line(setting.rule, points, color=0)]
    return lines if setting.rule == "grpo" else [*lines, Line("grpo", grpo, color=1, dash="dashed")]


def world_table(setting: Setting) -> Html:
    rows = [
        (
            outcome.label,
            outcome.sampled,
            percent(outcome.probability),
            _signed(outcome.advantage),
            el("b", change, class_={"+": "up", "−": "down"}.get(change[0])),
            percent(outcome.after),
        )
        for outcome in world(setting)
        for change in [_signed(outcome.change)]
    ]
    header = ("outcome", "sampled", "π before", "ΣA of its samples", "logit change", "π after")
    return table(header, rows)


def _signed(value: float) -> str:
    """−0 and rounding noise are 0."""
    if abs(value) < 5e-7:
        return "0"
    return f"{'+' if value > 0 else '−'}{number(abs(value))}"


def explanation(setting: Setting) -> Html:
    """What the figures show, in words, with the numbers of the setting."""
    weight, balance = (sums["group level"] for sums in curves(setting))
    _, omega = advantages(setting)
    heaviest = max(range(len(weight)), key=weight.__getitem__) / setting.completions
    spread = max(weight) - min(weight) > 1e-9
    said = [
        el(
            "p",
            "A group of ",
            el("b", f"{setting.completions} completions, {setting.correct} correct"),
            f": p = {setting.rate:.3g}. The step's mean reward is ω = {omega:.3g}.",
            f" α = {setting.alpha:g}." if setting.options else " This rule has no α.",
        ),
        el(
            "p",
            el("b", "Weight. "),
            f"Under this rule groups with p = {heaviest:.3g} weigh most."
            if spread
            else "Under this rule every group weighs the same.",
            " GRPO's weight is 2G·√(p(1−p)): groups of medium difficulty always dominate, and "
            "hard and easy ones count the same. A-GRAE moves the weight from easy groups (ω "
            "small) to hard ones (ω large).",
        ),
        el("p", el("b", "Balance. "), _balance(balance[setting.correct])),
    ]
    if "edge" in setting.rule:
        said.append(el("p", "Every other completion is three times as certain here (0.5 and 1.5 nats a token)."))
    if setting.correct in (0, setting.completions):
        said.append(el("p", "All completions are equal here, so most rules learn nothing from the group."))
    return join(said)


def _balance(balance: float) -> str:
    if abs(balance) < 5e-7:
        return (
            "ΣA = 0: correct completions gain what incorrect ones lose, and an outcome that was "
            "not sampled does not move (Theorem 1). The policy cannot learn to try something new."
        )
    if balance < 0:
        return (
            f"ΣA = {_signed(balance)}: what was sampled loses more than it gains, so every outcome "
            "that was not sampled rises in proportion to its probability: the policy explores."
        )
    return (
        f"ΣA = {_signed(balance)}: what was sampled gains more than it loses, so every outcome "
        "that was not sampled sinks: the policy narrows."
    )


def rules() -> Sequence[str]:
    """Names of the rules, A-GRAE and GRPO first, without the alias dapo."""
    return ["agrae", "grpo", *(n for n in RULES if n not in ("agrae", "grpo", "dapo"))]
