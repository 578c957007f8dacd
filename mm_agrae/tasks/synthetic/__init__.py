"""The embedded task: geometry figures, shapes to count and bar charts, made offline.

In: split, level, modality and an index. Out: an `Example` with an exact answer, and a drawing to
scale. Begin with `task.py`; `problems.py` makes a problem, `figures.py` lists the kinds of geometry
figures, `diagrams.py` constructs them, `drawing.py` draws.
"""
