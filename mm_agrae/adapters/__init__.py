"""The advantage rules in other trainers.

In: the rewards of a step, as TRL (`trl.py`) or verl (`verl.py`) hold them. Out: advantages. Begin with `trl.py`. Those
trainers pass on nothing but rewards, so success is a reward above a threshold (`success_of`).
"""

from typing import Any

from torch import Tensor

SUCCESS_THRESHOLD = 0.5
"""Splits 0/1 rewards, 0.9·accuracy + 0.1·format, and rewards of −1 and 1."""

SLACK = 0.25
"""How far rewards may lie outside [0, 1] without a warning: a small bonus or penalty."""


def success_of(reward: Tensor, threshold: float) -> Tensor:
    """1 where the reward is at least the threshold, else 0, in the shape of the rewards.

    A float32 reward of 0.9 is below the Python number 0.9: such rounding does not count.
    """
    return (reward.double() >= threshold - 1e-6 * max(1.0, abs(threshold))).to(reward.dtype)


def scale_warning(rule: str, settings: dict[str, Any], reward: Tensor) -> str | None:
    """A warning about rewards whose mean cannot serve as ω, or None."""
    if "agrae" not in (rule, settings.get("base")) or settings.get("omega_from", "reward") != "reward":
        return None
    low, high = float(reward.min()), float(reward.max())
    if low >= -SLACK and high <= 1 + SLACK:
        return None
    return (
        f"rewards of this step are in [{low:g}, {high:g}], but A-GRAE takes their mean for ω, a "
        "rate, and clamps it to [0, 1]; for rewards on another scale set omega_from=success"
    )
