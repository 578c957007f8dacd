"""Checkpoints -> pass@k with intervals, and comparisons.

In: an engine and a task. Out: `EvaluationResult`s and every sample, in a run folder. Begin with `evaluate.py`;
`statistics.py` computes the intervals, and `paired.py` compares two evaluations problem by problem.
"""
