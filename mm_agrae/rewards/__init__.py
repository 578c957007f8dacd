"""Completions -> scores.

In: `Example`s and `Completion`s. Out: a `Score` each, the weighted sum of the reward parts. Begin
with `rewarder.py`; `PARTS` there is where a reward is added.
"""

from mm_agrae.rewards.rewarder import PARTS, Rewarder

__all__ = ["PARTS", "Rewarder"]
