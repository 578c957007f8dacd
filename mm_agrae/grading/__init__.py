"""Two texts -> a verdict: is the final answer of a completion correct?

In: the gold answer and a completion. Out: True or False. Begin with `accuracy.py`. Nothing else of
the package is imported, so this folder can be used alone:

    from mm_agrae.grading import verify
    verify("1/2", "the answer is 0.5")
"""

from mm_agrae.grading.accuracy import verify
