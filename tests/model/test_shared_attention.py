"""Attention over shared prompts: the forms agree, and a faulty kernel is not used."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers import VL, batch_of, policy
from hypothesis import given, settings
from hypothesis import strategies as st

from mm_agrae.errors import ModelError
from mm_agrae.model import shared_attention
from mm_agrae.model.packed_layout import GroupSpans, PackedLayout
from mm_agrae.model.shared_attention import CpuKernel, VarlenKernel, _MergedAttention, attention, masked_attention

LAYOUTS = st.lists(st.tuples(st.integers(1, 9), st.lists(st.integers(1, 20), max_size=5)), min_size=1, max_size=3)


def make_layout(groups) -> PackedLayout:
    made, end = [], 0
    for prompt, lengths in groups:
        start, end = end, end + prompt
        ranges = []
        for length in lengths:
            ranges.append((end, end + length))
            end += length
        made.append(GroupSpans((start, start + prompt), tuple(ranges)))
    return PackedLayout(made)


class FlashInPlainTorch:
    """The two operators that `VarlenKernel` calls, as their documentation has them."""

    @staticmethod
    def parts(cum_q, cum_k, is_causal):
        for (q0, q1), (k0, k1) in zip(
            itertools.pairwise(cum_q.tolist()), itertools.pairwise(cum_k.tolist()), strict=True
        ):
            hidden = torch.ones(q1 - q0, k1 - k0, dtype=torch.bool).triu(1 + (k1 - k0) - (q1 - q0))
            yield slice(q0, q1), slice(k0, k1), hidden if is_causal else hidden & False

    @classmethod
    def _flash_attention_forward(cls, q, k, v, cum_q, cum_k, max_q, max_k, dropout, is_causal, debug, *, scale):
        assert cum_q.dtype == cum_k.dtype == torch.int32
        assert max_q == int(cum_q.diff().max())
        assert max_k == int(cum_k.diff().max())
        assert len(q) == int(cum_q[-1])
        assert len(k) == len(v) == int(cum_k[-1])
        out_SHD, lse_HS = torch.empty_like(q), q.new_empty(q.shape[1], len(q))
        repeats = q.shape[1] // k.shape[1]
        for rows, keys, hidden in cls.parts(cum_q, cum_k, is_causal):
            k_all, v_all = (x[keys].repeat_interleave(repeats, 1) for x in (k, v))
            score = torch.einsum("qhd,khd->hqk", q[rows], k_all) * scale
            score = score.masked_fill(hidden, float("-inf"))
            lse_HS[:, rows] = score.logsumexp(-1)
            out_SHD[rows] = torch.einsum("hqk,khd->qhd", score.softmax(-1), v_all)
        return out_SHD, lse_HS, None, None, None

    @classmethod
    def _flash_attention_backward(
        cls, grad, q, k, v, out, lse_HS, cum_q, cum_k, max_q, max_k, dropout, is_causal,
        rng_state, unused, *, scale,
    ):  # fmt: skip
        grads = [torch.zeros_like(x) for x in (q, k, v)]
        repeats = q.shape[1] // k.shape[1]
        for rows, keys, hidden in cls.parts(cum_q, cum_k, is_causal):
            k_all, v_all = (x[keys].repeat_interleave(repeats, 1) for x in (k, v))
            score = torch.einsum("qhd,khd->hqk", q[rows], k_all) * scale
            share = (score - lse_HS[:, rows, None]).exp().masked_fill(hidden, 0)
            inner = torch.einsum("qhd,khd->hqk", grad[rows], v_all)
            delta = (grad[rows] * out[rows]).sum(-1).T[..., None]
            change = share * (inner - delta) * scale
            fold = lambda x: x.unflatten(1, (-1, repeats)).sum(2)  # noqa: E731
            grads[0][rows] = torch.einsum("hqk,khd->qhd", change, k_all)
            grads[1][keys] = fold(torch.einsum("hqk,qhd->khd", change, q[rows]))
            grads[2][keys] = fold(torch.einsum("hqk,qhd->khd", share, grad[rows]))
        return tuple(grads)


@pytest.fixture(scope="module", autouse=True)
def _plain_flash():
    real = shared_attention._aten
    shared_attention._aten = FlashInPlainTorch
    yield
    shared_attention._aten = real


@settings(max_examples=40, deadline=None, derandomize=True)
@given(groups=LAYOUTS, grouped=st.booleans())
def test_all_forms_agree_with_gradients(groups, grouped):
    layout = make_layout(groups)
    end = layout.length
    torch.manual_seed(end)
    heads = (4, 2, 2) if grouped else (4, 4, 4)
    inputs = [torch.randn(1, h, end, 8, dtype=torch.float64, requires_grad=True) for h in heads]
    direction = torch.randn(1, end, 4, 8, dtype=torch.float64)
    results = []
    for function in (
        lambda: masked_attention(*inputs, layout, 0.3),
        lambda: _MergedAttention.apply(*inputs, CpuKernel(layout, 0.3)),
        lambda: _MergedAttention.apply(*inputs, VarlenKernel(layout, 0.3)),
    ):
        out = function()
        results.append((out, *torch.autograd.grad((out * direction).sum(), inputs)))
    for expected, *found in zip(*results, strict=True):
        for each in found:
            torch.testing.assert_close(each, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kernel", [CpuKernel, VarlenKernel])
def test_gradcheck(kernel):
    layout = PackedLayout([GroupSpans((0, 3), ((3, 5), (5, 9), (9, 10))), GroupSpans((10, 11), ((11, 13),))])
    torch.manual_seed(0)
    inputs = [torch.randn(1, h, 13, 4, dtype=torch.float64, requires_grad=True) for h in (4, 2, 2)]
    assert torch.autograd.gradcheck(lambda *tensors: _MergedAttention.apply(*tensors, kernel(layout, 0.5)), inputs)


def fault(device="cpu") -> str:
    shared_attention._varlen_fault.cache_clear()
    return shared_attention._varlen_fault(torch.device(device), torch.bfloat16, 4, 2, 8)


def test_a_kernel_that_works_is_taken():
    assert fault() == ""


@pytest.mark.parametrize("what", ["forward", "backward", "missing"])
def test_a_faulty_kernel_is_found_out(what, monkeypatch):
    class Faulty(FlashInPlainTorch):
        if what == "forward":

            @classmethod
            def _flash_attention_forward(cls, *tensors, **options):
                out, lse, *rest = super()._flash_attention_forward(*tensors, **options)
                return out, lse + 0.3, *rest

        if what == "backward":

            @classmethod
            def _flash_attention_backward(cls, *tensors, **options):
                grad_q, grad_k, grad_v = super()._flash_attention_backward(*tensors, **options)
                return grad_q, grad_k * 0.9, grad_v

    # PyTorch's own operators have no kernel for a CPU.
    monkeypatch.setattr(shared_attention, "_aten", torch.ops.aten if what == "missing" else Faulty)
    with pytest.warns(UserWarning, match="masked attention takes its place"):
        assert fault()


def test_a_window_that_cuts_nothing_is_none():
    layout = make_layout([(3, [4, 2])])
    q, k, v = torch.randn(3, 1, 2, layout.length, 8).unbind()
    whole = attention(q, k, v, layout, scale=0.3)
    assert torch.equal(attention(q, k, v, layout, scale=0.3, window=7), whole)
    cut = attention(q, k, v, layout, scale=0.3, window=2)
    assert not torch.allclose(cut, whole)
    with pytest.raises(ModelError, match="one row of 9 tokens"):
        attention(q[:, :, 1:], k, v, layout, scale=0.3)


def test_kernels_are_tried_outside_checkpointed_layers(monkeypatch):
    """Inside one, the trial's saved tensors would count as the layer's, and its backward pass would fail."""
    monkeypatch.setattr(shared_attention, "VarlenKernel", CpuKernel)
    tried = []

    def kernel(query, key):
        tried.append(shared_attention._varlen_fault(query.device, query.dtype, query.shape[1], key.shape[1], 16))
        return CpuKernel

    monkeypatch.setattr(shared_attention, "_kernel", kernel)
    shared_attention._varlen_fault.cache_clear()
    made = policy(VL, dtype="bfloat16", gradient_checkpointing=True, shared_prompt="on")
    assert tried, "the kernel of bfloat16 is tried when the policy is made"
    assert set(tried) == {""}
    assert shared_attention._varlen_fault.cache_info().misses == 2  # in float32, and under autocast
    shared_attention._varlen_fault.cache_clear()
    made.train()
    made(batch_of(VL, made))[0].sum().backward()
    assert shared_attention._varlen_fault.cache_info().misses == 1
