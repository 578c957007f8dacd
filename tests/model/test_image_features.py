"""Each distinct image through the vision tower once, with the gradient it would have had."""

from __future__ import annotations

import gc
import itertools

import pytest
import torch
from helpers import VL, batch_of, policy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mm_agrae.model.image_features import ImageFeatures
from mm_agrae.types import Example, MicroBatch, Prompt


class Tower:
    """Stands for a vision tower in arithmetic: features are pixels times a weight."""

    def __init__(self):
        self.weight = torch.nn.Parameter(torch.tensor([1.5, -0.5], dtype=torch.float64))
        self.encoded = 0

    def __call__(self, prompts):
        self.encoded += len(prompts)
        pixels = [prompt.pixel_values for prompt in prompts]
        features = iter(torch.split(torch.cat(pixels) * self.weight, 1))
        return [list(itertools.islice(features, len(each))) for each in pixels]


def prompt(pixels=None) -> Prompt:
    return Prompt(Example("0", "", ""), "", torch.tensor([1]), pixel_values=pixels)


def batch(*prompts) -> MicroBatch:
    nothing = torch.zeros(1)
    return MicroBatch(prompts, nothing, nothing, nothing, nothing, nothing)


def pixels(count: int = 1) -> torch.Tensor:
    return torch.rand(count, 2, dtype=torch.float64)


def gradient(prompts_of_batches, planned: bool) -> tuple[torch.Tensor, int]:
    tower, cached = Tower(), ImageFeatures(frozen=False)
    batches = [batch(*prompts) for prompts in prompts_of_batches]
    if planned:
        cached.plan(batches)
    for number, each in enumerate(batches, 2):
        features = cached.of(each.prompts, tower)
        if features:
            (torch.cat(features).exp().sum() ** 1.5 * number).backward()
    if planned:
        cached.plan(())  # raises if anything is left
    return tower.weight.grad, tower.encoded


def test_gradients_are_those_of_encoding_each_time():
    torch.manual_seed(0)
    a, b, both = pixels(), pixels(), pixels(2)
    layouts = [
        [[prompt(a)], [prompt(a)]],
        [[prompt(a), prompt(b)], [prompt(b)], [prompt(a), prompt(a)], [prompt()]],
        [[prompt(both), prompt()], [prompt(b), prompt(both)], [prompt(both)]],
        [[prompt(a)], [prompt(b)]],
    ]
    for layout in layouts:
        expected, each_time = gradient(layout, planned=False)
        ours, once = gradient(layout, planned=True)
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=0)
        distinct = {id(p.pixel_values) for prompts in layout for p in prompts} - {id(None)}
        assert once == len(distinct) <= each_time


def test_passes_without_gradient_leave_the_plan_alone():
    shared = pixels()
    batches = [batch(prompt(shared)), batch(prompt(shared))]
    tower, cached = Tower(), ImageFeatures(frozen=False)
    cached.plan(batches)
    with torch.no_grad():
        assert not cached.of(batches[0].prompts, tower)[0].requires_grad
    for each in batches:
        cached.of(each.prompts, tower)[0].sum().backward()
    torch.testing.assert_close(tower.weight.grad, 2 * shared[0])


def test_a_micro_batch_that_never_ran_is_noticed():
    shared = pixels()
    batches = [batch(prompt(shared)), batch(prompt(shared))]
    cached = ImageFeatures(frozen=False)
    cached.plan(batches)
    cached.of(batches[0].prompts, Tower())[0].sum().backward()
    with pytest.raises(RuntimeError, match="1 images still wait"):
        cached.plan(batches)


def test_frozen_features_live_as_long_as_their_pixels():
    tower, cached = Tower(), ImageFeatures(frozen=True)
    shared = pixels()
    first, second = prompt(shared), prompt(shared)
    for _ in range(2):
        assert len(cached.of([first, second], tower)) == 2
    assert tower.encoded == 1
    del first, second, shared
    gc.collect()
    assert len(cached._cached) == 0


class Reads(TorchDispatchMode):
    """Counts operations that read one of the given tensors."""

    def __init__(self, tensors):
        super().__init__()
        self.storages = {tensor.untyped_storage().data_ptr() for tensor in tensors}
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        read = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        self.count += any(x.untyped_storage().data_ptr() in self.storages for x in read)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("freeze", [("vision",), ()], ids=["frozen", "trained"])
@pytest.mark.parametrize("sharing", ["on", "off"])
def test_pixels_are_read_only_to_encode_them(sharing, freeze):
    """On a GPU, reading them means moving them there: hundreds of MB for each micro-batch."""
    made = policy(VL, shared_prompt=sharing, freeze=freeze)
    batch = batch_of(VL, made)
    if freeze:
        made.image_features = ImageFeatures(frozen=True)  # the rollout has filled the other one
    else:
        made.image_features.plan([batch, batch])
    reads = []
    for _ in range(2):
        with Reads([prompt.pixel_values for prompt in batch.prompts]) as found:
            made(batch)[0].sum().backward()
        reads.append(found.count)
    assert reads[0] > 0
    assert reads[1] == 0
