"""Where examples come from: data sets and generators -> `Example`s.

In: a `data` section of the config. Out: a sequence of `Example`s, checked row by row. Begin with
`registry.py`, the list of tasks and how one is added; `files.py` reads tables, `catalog.py` knows
published data sets, `synthetic/` makes the embedded problems.
"""

from mm_agrae.tasks.registry import TASKS, Concatenation, Task, check, describe, load, load_all

__all__ = ["TASKS", "Concatenation", "Task", "check", "describe", "load", "load_all"]
