"""What a run leaves behind: folder, records, metrics, checkpoints, exports.

In: the results of a step. Out: plain files that are enough to resume, report and show the run.
Begin with `folder.py`, which lists them; `records.py` says what is in them.
"""
