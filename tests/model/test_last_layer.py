"""The last layer's MLP runs on tokens that predict one, and only in a packed row."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from helpers import assert_equal_up_to_rounding
from torch.utils.checkpoint import checkpoint
from transformers import Qwen2Config, Qwen2ForCausalLM

from mm_agrae.model import last_layer
from mm_agrae.model.shared_prompt import hidden_states, install, pack, uninstall
from mm_agrae.types import Example, MicroBatch, Prompt


def build() -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, attn_implementation="sdpa",
    )  # fmt: skip
    return Qwen2ForCausalLM(config)


def batch() -> MicroBatch:
    mask_BT = torch.tensor([[1, 1, 1], [1, 0, 0]])
    token_BT = torch.tensor([[3, 4, 5], [6, 0, 0]])
    prompt = Prompt(Example("0", "", ""), "", torch.arange(10, 20))
    nothing = torch.zeros(2)
    return MicroBatch([prompt], torch.tensor([0, 0]), token_BT, mask_BT, nothing, mask_BT * 0.0)


def rows_seen(model) -> list[list[int]]:
    """Tokens that each layer's MLP works on, filled by later forwards."""
    seen: list[list[int]] = [[] for _ in model.model.layers]
    for layer, counts in zip(model.model.layers, seen, strict=True):
        layer.mlp.gate_proj.register_forward_hook(
            lambda module, inputs, output, counts=counts: counts.append(inputs[0].shape[1])
        )
    return seen


def test_only_tokens_that_predict_pass_the_last_mlp():
    model = build()
    install(model)
    seen = rows_seen(model)
    packed = pack(model.base_model, batch())
    hidden_states(model.base_model, packed)
    # 10 prompt tokens and 2 of the completions; the prompt's last and those 2 predict.
    assert seen == [[12], [3]]
    assert packed.layout.predicting.tolist() == [9, 10, 11]
    model(torch.arange(7)[None])
    assert seen == [[12, 7], [3, 7]]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_hidden_states_and_gradients_stay_what_they_were(checkpointing, monkeypatch):
    results = []
    for least in (0.05, 2.0):
        monkeypatch.setattr(last_layer, "LEAST_SAVED", least)
        model = build().train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        install(model)
        hidden_NH = hidden_states(model.base_model, pack(model.base_model, batch()))
        hidden_NH.square().sum().backward()
        named = model.named_parameters()
        results.append([hidden_NH, *(p.grad for _, p in named if p.grad is not None)])
    assert len(results[0]) == len(results[1])
    # A layer sums over the hidden size, a head, the row, and the intermediate size.
    layer = 3 * 16 + 8 + 12 + 24
    for ours, whole in zip(*results, strict=True):
        assert_equal_up_to_rounding(ours, whole, terms=2 * 2 * layer)  # forward, backward


def test_a_recomputed_layer_picks_the_same_tokens_between_plain_forwards():
    model = build()
    install(model)
    seen = rows_seen(model)
    packed = pack(model.base_model, batch())
    row_NH = checkpoint(lambda: hidden_states(model.base_model, packed), use_reentrant=False)
    model(torch.arange(7)[None])
    row_NH.sum().backward()
    assert seen[1] == [3, 7, 3]


def test_a_copy_has_a_forward_of_its_own_and_uninstall_leaves_nothing():
    model = build()
    install(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.layers[-1].mlp.down_proj.weight.zero_()
    packed = pack(model.base_model, batch())
    ours = hidden_states(model.base_model, packed)
    assert not torch.allclose(ours, hidden_states(other.base_model, packed))
    mlp, attention = model.model.layers[-1].mlp, model.model.layers[-1].self_attn
    hooked = attention.forward = functools.partial(type(attention).forward, attention)  # as accelerate's hooks do
    uninstall(model)
    assert attention.forward is hooked
    assert "forward" not in mlp.__dict__
    assert "_counting" not in {**mlp.__dict__, **attention.__dict__}
