"""Examples -> prompts -> token log-probabilities.

In: an `Example` (`processing.py`), a `MicroBatch` (`policy.py`). Out: a `Prompt`; log-probability and entropy of each
completion token. Begin with `policy.py`, whose model `loading.py` and `lora.py` load; `shared_prompt.py` is how a
group's prompt goes through the model once, `vocab_head.py` how logits are never held whole. `size.py` and `memory.py`
say beforehand how large a model is and what a run takes.
"""
