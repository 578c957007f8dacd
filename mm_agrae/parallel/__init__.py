"""One process among several: starting, exchanging, sharding, and naming who is missing.

In: what accelerate's launcher says. Out: `Processes`, through which the trainer talks to the
others. Begin with `processes.py`; with one process every method there is trivial.
"""
