"""Checkpoints -> pass@k with intervals, and comparisons.

In: an engine and a task. Out: `EvaluationResult`s and every sample. Begin with `evaluate.py`;
`comparison.py` holds two evaluations against each other, problem by problem.
"""
