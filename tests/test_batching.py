"""How micro-batches are cut."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from mm_agrae.batching import split_by_tokens


@given(
    groups=st.lists(
        st.tuples(st.integers(1, 50), st.lists(st.integers(0, 40), min_size=1, max_size=6)), min_size=1, max_size=6
    ),
    budget=st.integers(1, 200),
)
def test_split_by_tokens(groups, budget):
    prompts = [prompt for prompt, _ in groups]
    index = [i for i, (_, lengths) in enumerate(groups) for _ in lengths]
    lengths = list(itertools.chain.from_iterable(lengths for _, lengths in groups))
    calls = split_by_tokens(prompts, index, lengths, budget)
    assert [row for call in calls for row in call] == list(range(len(lengths)))
    for call in calls:
        tokens = sum(lengths[row] for row in call)
        tokens += sum(prompts[i] for i in {index[row] for row in call})
        assert tokens <= budget or len(call) == 1 or all(lengths[row] == 0 for row in call[1:])
    for i, (prompt, own) in enumerate(groups):
        if prompt + sum(own) <= budget:
            assert sum(any(index[row] == i for row in call) for call in calls) == 1
