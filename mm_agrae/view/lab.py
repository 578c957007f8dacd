"""The advantage lab: what a rule does to one group, and through it to a small softmax policy.

Every advantage here comes from `advantage.levels`. A rule sees a whole optimisation step, and ω
is the mean reward of it; so the groups of interest are put into a step whose other groups, each
of equal rewards and hence without signal, bring ω to the value asked for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch

from mm_agrae.advantage import RULES, accepted_settings, levels
from mm_agrae.view.page import Html, Line, el, join, number, percent, plot, table

MIN_OMEGA, MAX_OMEGA = 0.02, 0.98
"""At 0 or 1 no group of the step could hold both right and wrong completions."""
NOT_DRAWN = 0.1
"""Probability of all paths together that the group did not draw, in the small world."""


@dataclass(frozen=True)
class Setting:
    """`right` of `completions` are right (p = right / completions); ω and α as in the paper.

    Raises ValueError for what no step can have.
    """

    rule: str = "agrae"
    completions: int = 8
    right: int = 2
    omega: float = 0.3
    alpha: float = 1.0

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise ValueError(f"unknown rule {self.rule!r}; there are {', '.join(RULES)}")
        if not 2 <= self.completions <= 256 or not 0 <= self.right <= self.completions:
            raise ValueError(f"{self.right} right of {self.completions} completions: not a group")
        if not MIN_OMEGA <= self.omega <= MAX_OMEGA:
            raise ValueError(f"ω is {self.omega:g}; {MIN_OMEGA} to {MAX_OMEGA} can be shown")

    @property
    def rate(self) -> float:
        return self.right / self.completions

    @property
    def options(self) -> dict[str, Any]:
        return {"alpha": self.alpha} if "alpha" in accepted_settings(self.rule) else {}


@dataclass(frozen=True)
class Curves:
    """Sums over a group against its success rate p, for groups of 0 to G right completions.

    `weight` is Σ|A|, `balance` ΣA; of each the value before any level, after the sample level
    and after the group level. `omega` is ω as the rule used it.
    """

    rate: list[float]
    weight: dict[str, list[float]]
    balance: dict[str, list[float]]
    omega: float


STAGES = {"base_PG": "before", "sample_PG": "sample level", "advantage_PG": "group level"}


def advantages(setting: Setting) -> tuple[dict[str, torch.Tensor], float]:
    """As `_advantages`; the number of right ones does not matter."""
    return _advantages(replace(setting, right=0))


@lru_cache(maxsize=256)
def _advantages(setting: Setting) -> tuple[dict[str, torch.Tensor], float]:
    """Stage -> advantages [G+1, G] of groups with 0, 1 … G right ones (first), and ω."""
    size = setting.completions
    success_PG = (torch.arange(size) < torch.arange(size + 1)[:, None]).double()
    # The rows shown have mean 1/2; equal rewards c in n more rows bring the mean to ω.
    rows, omega = size + 1, setting.omega
    more = max(1, math.ceil(rows * abs(0.5 - omega) / min(omega, 1 - omega) - 1e-9))
    reward = min(1.0, max(0.0, (omega * (rows + more) - 0.5 * rows) / more))
    others_PG = torch.full((more, size), reward, dtype=torch.float64)
    result = levels(
        setting.rule,
        torch.cat([success_PG, others_PG]),
        torch.cat([success_PG, torch.zeros_like(others_PG)]),
        torch.ones(rows + more, size),
        **setting.options,
    )
    return {label: getattr(result, name)[:rows] for name, label in STAGES.items()}, result.omega


def curves(setting: Setting) -> Curves:
    stages, omega = advantages(setting)
    size = setting.completions
    return Curves(
        rate=[right / size for right in range(size + 1)],
        weight={label: value.abs().sum(1).tolist() for label, value in stages.items()},
        balance={label: value.sum(1).tolist() for label, value in stages.items()},
        omega=omega,
    )


@dataclass(frozen=True)
class Path:
    """One path of the small world: a whole answer that the policy may draw.

    `drawn` counts the group's completions that took it, `advantage` is the sum of theirs.
    `change` is what one step of gradient ascent does to its logit, `after` its probability then.
    """

    label: str
    right: bool
    drawn: int
    probability: float
    advantage: float
    change: float
    after: float


def world(setting: Setting, step_size: float = 1.0) -> list[Path]:
    """One policy-gradient step of a softmax over four paths, for the group of `setting`.

    All right completions took one path and all wrong ones another; a right and a wrong path are
    possible but were not drawn. The objective is Σ A_i · log π(path_i), differentiated by
    autograd; its gradient is Theorem 1 (Eq. 6) of arXiv 2602.05548.
    """
    stages, _ = advantages(setting)
    advantage_G = stages["group level"][setting.right]
    drawn = [setting.right, setting.completions - setting.right, 0, 0]
    labels = ["right A", "wrong B", "right C", "wrong D"]
    missed = [index for index, count in enumerate(drawn) if count == 0]
    probability = torch.tensor(
        [
            (1 - NOT_DRAWN) * count / setting.completions if count else NOT_DRAWN / len(missed)
            for count in drawn
        ],
        dtype=torch.float64,
    )
    path_G = torch.repeat_interleave(torch.arange(4), torch.tensor(drawn))
    logits = probability.log().requires_grad_()
    objective = (advantage_G * logits.log_softmax(-1)[path_G]).sum()
    (gradient,) = torch.autograd.grad(objective, logits)
    change = step_size * gradient
    after = (logits + change).softmax(-1)
    total = torch.zeros(4, dtype=torch.float64).index_add(0, path_G, advantage_G.double())
    return [
        Path(label, label.startswith("right"), *values)
        for label, *values in zip(
            labels, drawn, *(v.tolist() for v in (probability, total, change, after)), strict=True
        )
    ]


def moves(setting: Setting) -> dict[str, list[tuple[float, float]]]:
    """Kind of path -> (p, logit change) for every p at which the group holds such a path."""
    kinds = ("right, drawn", "wrong, drawn", "not drawn")
    points: dict[str, list[tuple[float, float]]] = {kind: [] for kind in kinds}
    for right in range(1, setting.completions):
        group = Setting(setting.rule, setting.completions, right, setting.omega, setting.alpha)
        paths = world(group)
        for kind, path in zip(kinds, paths, strict=False):
            points[kind].append((right / setting.completions, path.change))
    return points


# -- on the screen


def plots(setting: Setting) -> Html:
    """Σ|A| and ΣA against p, and the logit change of paths that were drawn or not."""
    now, grpo = curves(setting), curves(replace(setting, rule="grpo"))
    return el(
        "div",
        _plot(setting, "Σ|A|: how much a group weighs", now.weight, grpo.weight),
        _plot(setting, "ΣA: for or against what was drawn", now.balance, grpo.balance),
        *_moves_plots(setting),
        class_="plots",
    )


def _plot(
    setting: Setting, title: str, now: dict[str, list[float]], grpo: dict[str, list[float]]
) -> Html:
    rate = [right / setting.completions for right in range(setting.completions + 1)]
    stages = [
        label for label in STAGES.values() if label == "group level" or _has_level(now, label)
    ]
    lines = [
        Line(
            setting.rule if label == "group level" else f"{setting.rule}, {label} alone",
            list(zip(rate, now[label], strict=True)),
            color=0 if label == "group level" else 2,
        )
        for label in stages
    ]
    if setting.rule != "grpo":
        points = list(zip(rate, grpo["group level"], strict=True))
        lines.append(Line("grpo", points, color=1, dashed=True))
    value = now["group level"][setting.right]
    note = f"at p = {setting.rate:.3g}: {_signed(value).lstrip('+')}"
    return plot(title, lines, note=note, x_name="p")


def _has_level(now: dict[str, list[float]], label: str) -> bool:
    """Whether the sample level differs from both what is before and after it."""
    return label == "sample level" and all(
        max(abs(a - b) for a, b in zip(now[label], now[other], strict=True)) > 1e-9
        for other in ("before", "group level")
    )


def _moves_plots(setting: Setting) -> tuple[Html, Html]:
    """Of what was drawn and, on a scale of its own, of what was not."""
    now, grpo = moves(setting), moves(replace(setting, rule="grpo"))
    kinds = [kind for kind in now if kind != "not drawn"]
    drawn = [Line(kind, now[kind], color=color) for color, kind in zip((2, 3), kinds, strict=True)]
    still = [Line(setting.rule, now["not drawn"], color=0)]
    if setting.rule != "grpo":
        still.append(Line("grpo", grpo["not drawn"], color=1, dashed=True))
    return (
        plot("Logit change of a drawn path", drawn, x_name="p"),
        plot("Logit change of a path not drawn", still, x_name="p"),
    )


def world_table(setting: Setting) -> Html:
    rows = [
        (
            path.label,
            path.drawn,
            percent(path.probability),
            _signed(path.advantage),
            el("b", _signed(path.change), class_=_direction(path.change)),
            percent(path.after),
        )
        for path in world(setting)
    ]
    header = ("path", "drawn", "π before", "ΣA of its draws", "logit change", "π after")
    return table(header, rows)


def _direction(change: float) -> str | None:
    return None if abs(change) < 5e-7 else ("right" if change > 0 else "wrong")


def _signed(value: float) -> str:
    """−0 and rounding noise are 0."""
    if abs(value) < 5e-7:
        return "0"
    return f"{'+' if value > 0 else '−'}{number(abs(value))}"


def explanation(setting: Setting) -> Html:
    """What the figures show, in words and with the numbers of the setting."""
    now = curves(setting)
    weight, balance = now.weight["group level"], now.balance["group level"][setting.right]
    heaviest = max(range(len(weight)), key=weight.__getitem__) / setting.completions
    spread = max(weight) - min(weight) > 1e-9
    said = [
        el(
            "p",
            "A group of ",
            el("b", f"{setting.completions} completions, {setting.right} right"),
            f": p = {setting.rate:.3g}. Step's mean reward ω = {now.omega:.3g}.",
            f" α = {setting.alpha:g}." if setting.options else " This rule has no α.",
        ),
        el(
            "p",
            el("b", "Weight. "),
            f"By this rule groups with p = {heaviest:.3g} weigh most."
            if spread
            else "By this rule every group weighs the same.",
            " GRPO's weight is 2G·√(p(1−p)): groups of middle difficulty rule at all times, "
            "and hard and easy ones count alike. A-GRAE moves the weight from easy groups (ω "
            "small) to hard ones (ω large).",
        ),
        el("p", el("b", "Balance. "), _balance(balance)),
    ]
    if setting.right in (0, setting.completions):
        said.append(el("p", "All completions are equal here, so most rules learn nothing from it."))
    return join(said)


def _balance(balance: float) -> str:
    if abs(balance) < 5e-7:
        return (
            "ΣA = 0: what right completions gain, wrong ones lose, and a path that was not drawn "
            "does not move (Theorem 1). The policy can't learn to try something new."
        )
    if balance < 0:
        return (
            f"ΣA = {_signed(balance)}: more is taken from what was drawn than given to it, so "
            "every path that was not drawn rises in proportion to its probability: the policy "
            "explores."
        )
    return (
        f"ΣA = {_signed(balance)}: more is given to what was drawn than taken from it, so every "
        "path that was not drawn sinks: the policy narrows."
    )


def rules() -> Sequence[str]:
    """Names of the rules, A-GRAE and GRPO first; the second name of a rule is left out."""
    return ["agrae", "grpo", *(n for n in RULES if n not in ("agrae", "grpo", "dapo"))]
