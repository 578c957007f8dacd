"""Completions -> scores.

In: `Example`s and `Completion`s. Out: a `Score` each, the weighted sum of the reward parts. Begin
with `parts.py`, where a reward is added; `rewarder.py` scores a batch in worker processes.
"""

from mm_agrae.rewards.parts import PARTS
from mm_agrae.rewards.rewarder import Rewarder
