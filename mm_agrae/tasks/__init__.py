"""Data sets and generators -> `Example`s.

In: a `data` section of the config. Out: a sequence of `Example`s, checked row by row. Begin with
`registry.py`, the list of tasks and how one is added; `files.py` reads tables, `catalog.py` lists
published data sets (`published.py` finds and reads them), `synthetic/` makes the embedded problems.
"""

from mm_agrae.tasks.registry import TASKS, Concatenation, Task, check, describe, load_all
