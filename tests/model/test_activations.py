"""Recomputing elementwise results instead of keeping them."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn

from mm_agrae.model import activations
from mm_agrae.model.activations import recompute_elementwise


@pytest.fixture(autouse=True)
def _any_size(monkeypatch):
    monkeypatch.setattr(activations, "FEWEST", 0)


class Layer(nn.Module):
    """A norm and a gated MLP, as in Llama and Qwen."""

    def __init__(self, size: int = 8):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(size) + 0.5)
        self.gate, self.up = nn.Linear(size, 24), nn.Linear(size, 24)
        self.down = nn.Linear(24, size)
        self.act = nn.SiLU()

    def forward(self, x):
        h = self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))
        return x + self.down(self.act(self.gate(h)) * self.up(h))


def make():
    torch.manual_seed(0)
    return nn.Sequential(Layer(), Layer()), torch.randn(1, 5, 8, requires_grad=True)


def run(model, x, retain: bool = False):
    with recompute_elementwise():
        out = model(x)
    loss = out.square().sum()
    loss.backward(retain_graph=retain)
    return loss


def grads(model, x):
    return [x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]


@pytest.mark.parametrize("frozen", ["", "weight", "gate", "up", "down"])
def test_gradients_are_equal_bit_for_bit(frozen):
    results = []
    for plain in (True, False):
        model, x = make()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not frozen or frozen not in name)
        if plain:
            model(x).square().sum().backward()
        else:
            run(model, x)
        results.append(grads(model, x))
    for expected, ours in zip(*results, strict=True):
        assert torch.equal(expected, ours)


def kept_bytes(model, x, pack):
    sizes = {}

    def count(tensor):
        kept = pack(tensor)
        if isinstance(kept, torch.Tensor):
            sizes[kept.untyped_storage().data_ptr()] = kept.untyped_storage().nbytes()
            alive.append(kept)
        return kept

    alive = []
    with torch.autograd.graph.saved_tensors_hooks(count, activations._unpack):
        out = model(x)
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    del out
    return sum(size for place, size in sizes.items() if place not in parameters)


def test_about_half_is_kept():
    model, x = make()
    plain = kept_bytes(model, x, lambda tensor: tensor)
    ours = kept_bytes(model, x, activations._pack)
    assert ours < 0.6 * plain


def test_a_frozen_norm_does_not_keep_its_result():
    """As under LoRA, where the layers after it learn and its weight does not."""
    model, x = make()
    learning = kept_bytes(model, x, activations._pack)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.split(".")[1] != "weight")
    assert kept_bytes(model, x, activations._pack) <= learning


def test_a_second_backward_works():
    model, x = make()
    loss = run(model, x, retain=True)
    first = [grad.clone() for grad in grads(model, x)]
    loss.backward()
    for once, twice in zip(first, grads(model, x), strict=True):
        torch.testing.assert_close(twice, 2 * once)


def test_nothing_stays_when_the_result_is_dropped():
    """Also without a backward pass, and without waiting for the garbage collector."""
    model, x = make()
    gc.disable()
    try:
        with recompute_elementwise():
            out = model(x)
        # Per layer two products of the norm, silu, and the product with it.
        assert len(activations._recipes) == 8
        del out
        assert not activations._recipes
    finally:
        gc.enable()
