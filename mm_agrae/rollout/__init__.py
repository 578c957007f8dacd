"""Prompts -> completions.

In: `Prompt`s and sampling settings. Out: `Completion`s with the log-probability of each token.
Begin with `engine.py`, the protocol and the list of engines; `hf.py` is the reference engine,
`collector.py` gathers the groups of a training step.
"""

from mm_agrae.rollout.engine import ENGINES, Engine, Sync, derive_seed, engine_class
