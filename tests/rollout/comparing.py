"""Prompts and comparisons that the tests of several engines share."""

import torch
from helpers import engine, prompts, sampling
from PIL import Image

from mm_agrae.rollout.mismatch import measure
from mm_agrae.types import Example

EXACT = 1e-4
"""Nats; float32 on both sides."""


def mixed_prompts(made, few):
    """Images of several sizes, two in one row, none in another: all in one batch."""
    pattern = Image.radial_gradient("L").convert("RGB")
    wide, small, large = (pattern.resize(size) for size in ((196, 56), (56, 84), (476, 476)))
    rows = [
        ("How large?", (large,)),
        ("What?", (wide,)),
        ("And <image> or <image>, which?", (small, wide)),
        ("1+1?", ()),
    ]
    drawn = [made.prompt(Example(f"row {i}", q, "1", images)) for i, (q, images) in enumerate(rows)]
    return prompts(made.path, few) + drawn


def tokens(groups):
    return [[completion.token_ids for completion in group] for group in groups]


def flat(groups):
    return [completion for group in groups for completion in group]


def require_same_samples(groups, others):
    """Tokens are the same but for near-ties, where batches of other shapes may choose otherwise."""
    pairs = list(zip(flat(groups), flat(others), strict=True))
    assert sum(a.token_ids != b.token_ids for a, b in pairs) <= 0.1 * len(pairs)


def require_same_greedy(groups, others):
    """The same tokens and log-probabilities, up to a token that is as probable as the other's."""
    for one, other in zip(flat(groups), flat(others), strict=True):
        for a, b in zip(
            zip(one.token_ids, one.logprobs, strict=True),
            zip(other.token_ids, other.logprobs, strict=True),
            strict=False,
        ):
            assert abs(a[1] - b[1]) < EXACT
            if a[0] != b[0]:
                break
        else:
            assert (one.token_ids, one.finish_reason, one.text) == (
                other.token_ids, other.finish_reason, other.text,
            )  # fmt: skip


def require_same_policy(policy, tested, batch):
    """The engine samples from the policy's distribution; returns its greedy tokens."""
    seeds = range(len(batch))
    greedy = tested.generate(batch, 2, sampling(temperature=0.0), seeds)
    assert all(first == second for first, second in greedy)
    expected = engine(policy).generate(batch, 1, sampling(temperature=0.0), seeds)
    require_same_greedy([group[:1] for group in greedy], expected)
    groups = tested.generate(batch, 3, sampling(), seeds)
    assert [len(group) for group in groups] == [3] * len(batch)
    assert measure(policy, batch, groups).highest < EXACT
    assert {completion.policy_version for completion in flat(groups)} == {policy.version}
    return tokens(greedy)


def require_whole(groups, made, limit, version=0):
    """Completions end with an end token or at the limit, and nowhere else."""
    for each in flat(groups):
        ended = each.token_ids[-1] in made.eos_ids
        assert each.finish_reason == ("stop" if ended else "length")
        assert ended or len(each.token_ids) == limit
        assert not set(each.token_ids[:-1]) & set(made.eos_ids)
        assert each.text == made.decode(each.token_ids)
        assert each.policy_version == version


@torch.no_grad()
def disturb(parameters, size=0.02):
    """Add noise, the same at every call."""
    generator = torch.Generator().manual_seed(7)
    for parameter in parameters:
        parameter.add_(torch.randn(parameter.shape, generator=generator) * size)


def favour_forbidden(policy, made):
    """Make ids that must not be sampled by far the most probable ones."""
    with torch.no_grad():
        policy.hf.get_output_embeddings().weight[list(made.forbidden_ids)] *= 50
