"""Fused operators and the vision tower's larger ones: the numbers of the model's own."""

import copy
import itertools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from families import (
    FAMILIES,
    ROPE,
    SMALL,
    batch_for,
    build,
    gradients,
    make_model,
    randomise_lora,
    require_equal,
    write_family,
)
from helpers import VL, batch_of, policy
from transformers import AttentionInterface

from mm_agrae.config import LoraSection
from mm_agrae.model import fused, trial, vision_tower
from mm_agrae.model import shared_prompt as sharing
from mm_agrae.model.activations import SWIGLU, recompute_elementwise

CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llama", "qwen3"])
def test_norm_is_the_models_own(family):
    norms = [m for m in make_model(family).modules() if hasattr(m, "variance_epsilon")]
    assert len(norms) > 4
    for norm in norms:
        torch.nn.init.normal_(norm.weight)
        ours, theirs = (torch.randn(3, 5, len(norm.weight), generator=seeded()).requires_grad_() for _ in range(2))
        out, expected = fused.norm(norm, ours), norm(theirs)
        torch.testing.assert_close(out, expected)
        pairs = gradient_of(out, ours, norm.weight), gradient_of(expected, theirs, norm.weight)
        for tensors in zip(*pairs, strict=True):
            torch.testing.assert_close(*tensors)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(fused.norm(norm, ours), out.bfloat16())


def gradient_of(out, *tensors):
    return torch.autograd.grad((out * torch.arange(out.numel()).view(out.shape).cos()).sum(), tensors)


def seeded():
    return torch.Generator().manual_seed(3)


def test_a_trial_finds_what_differs():
    cpu, shapes = torch.device("cpu"), [(4, 8), (4, 8)]

    def plain(a, b):
        return F.silu(a) * b

    for dtype in (torch.float32, torch.bfloat16):
        assert trial.fault(plain, plain, shapes, cpu, dtype) == ""
        assert "differs" in trial.fault(lambda a, b: F.gelu(a) * b, plain, shapes, cpu, dtype)
        assert "differs" in trial.fault(lambda a, b: plain(a, b.detach()) + b * 0, plain, shapes, cpu, dtype)
        assert "differs" in trial.fault(lambda a, b: plain(a, b) * float("nan"), plain, shapes, cpu, dtype)
        assert "differs" in trial.fault(lambda a, b: plain(a, SpoiltGradient.apply(b)), plain, shapes, cpu, dtype)
        assert "RuntimeError" in trial.fault(lambda a, b: a @ b, plain, shapes, cpu, dtype)


class SpoiltGradient(torch.autograd.Function):
    """The input itself; its gradient is not a number."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * float("nan")


@pytest.mark.parametrize("function", fused.ROTARY)
def test_rotary_takes_the_fused_form_on_cuda_alone(function, monkeypatch):
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as file

    plain, calls = getattr(file, function), []
    either = fused._on_cuda(lambda *tensors: calls.append(tensors), plain)
    _, shape = fused.ROTARY[function]
    cos = torch.randn(1, 8, 16) if len(shape) == 4 else torch.randn(8, 16)
    tensors = torch.randn(shape), torch.randn(shape), cos, cos
    assert all(torch.equal(a, b) for a, b in zip(either(*tensors), plain(*tensors), strict=True))
    assert not calls
    monkeypatch.setattr(torch.Tensor, "is_cuda", True, raising=False)
    monkeypatch.setattr(fused, "liger", lambda: None)
    rounded = [x.bfloat16() for x in tensors[:2]]
    assert [x.dtype for x in either(*rounded, *tensors[2:])] == [torch.bfloat16] * 2  # as wide as cos without it
    monkeypatch.setattr(fused, "liger", lambda: True)
    either(*tensors)
    assert len(calls) == 1


class LigerSiLUMulFunction(torch.autograd.Function):
    """As liger-kernel's: silu(gate) · up, whose backward pass overwrites its inputs."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        with torch.enable_grad():
            a, b = gate.detach().clone().requires_grad_(), up.detach().clone().requires_grad_()
            found = torch.autograd.grad(F.silu(a) * b, (a, b), grad)
        return gate.detach().copy_(found[0]), up.detach().copy_(found[1])


def test_the_product_of_a_fused_mlp_is_recomputed_not_kept():
    torch.manual_seed(0)
    weights = [torch.randn(256, 256, requires_grad=True) for _ in range(3)]
    x = torch.randn(256, 256)

    def run(product):
        out = product(x @ weights[0], x @ weights[1]) @ weights[2]
        assert product is not LigerSiLUMulFunction.apply or out.grad_fn.next_functions[0][0].name() == SWIGLU
        return torch.autograd.grad(out.square().sum(), weights), out

    with recompute_elementwise():
        found, out = run(LigerSiLUMulFunction.apply)
    expected, _ = run(lambda gate, up: F.silu(gate) * up)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)
    assert out.grad_fn is not None


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_patches_are_embedded_by_a_linear_layer(family, checkpoint):
    _, made = build(checkpoint(family))
    embed = made.hf.model.visual.patch_embed
    assert "forward" in embed.__dict__
    pixels = torch.randn(6, embed.proj.weight[0].numel())
    torch.testing.assert_close(embed(pixels), type(embed).forward(embed, pixels), **CLOSE)
    pixels.requires_grad_()
    for tensors in zip(
        gradient_of(embed(pixels), pixels, embed.proj.weight),
        gradient_of(type(embed).forward(embed, pixels), pixels, embed.proj.weight),
        strict=True,
    ):
        torch.testing.assert_close(*tensors, **CLOSE)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_the_vision_tower_calls_attention_once_a_block(family, checkpoint, monkeypatch):
    calls = []

    def varlen(q, k, v, *, bounds, longest, scale):
        assert bounds.dtype == torch.int32
        assert longest == int(bounds.diff().max())
        calls.append(len(bounds))
        span = torch.repeat_interleave(torch.arange(len(bounds) - 1), bounds.diff())
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=span[:, None] == span, scale=scale)
        return out[0].transpose(0, 1)

    processing, made = build(checkpoint(family), "on")
    batch = batch_for(processing, made)
    expected = gradients(made, batch)
    monkeypatch.setattr(vision_tower, "_varlen", varlen)
    AttentionInterface.register(vision_tower.ATTENTION, vision_tower.attention)
    made.hf.set_attn_implementation({"vision_config": vision_tower.ATTENTION})
    found = gradients(made, batch)
    assert len(calls) == len(made.hf.model.visual.blocks)
    require_equal(found, expected)
    made.load_weights(Path(checkpoint(family)))  # transformers would look for such an attention on the hub
    assert made.hf.config.vision_config._attn_implementation == vision_tower.ATTENTION
    assert "flash" not in made.hf.config.to_json_string()


def test_what_a_trial_of_the_towers_attention_compares_with():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 20, 2, 8)
    bounds = [0, 5, 8, 20]
    out = vision_tower._one_by_one(q, k, v, bounds=bounds, scale=0.3)
    for start, end in itertools.pairwise(bounds):
        score = torch.einsum("qhd,khd->hqk", q[start:end], k[start:end]) * 0.3
        torch.testing.assert_close(out[start:end], torch.einsum("hqk,khd->qhd", score.softmax(-1), v[start:end]))


def test_nothing_is_replaced_on_a_cpu_but_the_patch_embedding():
    made = policy(VL, shared_prompt="on")
    replaced = [name for name, module in made.hf.named_modules() if "forward" in module.__dict__]
    last = len(made.hf.model.language_model.layers) - 1
    assert replaced == ["model.visual.patch_embed", f"model.language_model.layers.{last}.mlp"]
    assert made.hf.config.vision_config._attn_implementation == "sdpa"
    assert batch_of(VL, made) is not None


@pytest.mark.parametrize("lora", [None, LoraSection(rank=4, alpha=8, modules=(), parts=("language", "vision"))])
def test_a_fused_model_with_padded_mlps_has_the_plain_ones_gradients(lora, tmp_path):
    settings = FAMILIES["qwen2_5_vl"] | {
        "vision_config": FAMILIES["qwen2_5_vl"]["vision_config"] | {"intermediate_size": 44},
        "text_config": SMALL | {"intermediate_size": 126, "rope_parameters": ROPE},
    }
    processing, made = build(write_family("qwen2_5_vl", tmp_path, settings), "on", lora=lora)
    randomise_lora(made)
    batch = batch_for(processing, made)
    expected = gradients(made, batch)
    sharing.uninstall(made.hf)
    for module in made.hf.modules():
        if hasattr(module, "variance_epsilon"):
            fused._replace(module, fused.norm, made.device, made.dtype)
        elif dict(module.named_children()).keys() == fused.MLP_PARTS:
            fused._replace(module, fused.swiglu, made.device, made.dtype)
    methods = [module.forward for module in made.hf.modules()]
    assert sum(getattr(each, "__func__", None) is fused.swiglu for each in methods) == 5
    sharing.install(made.hf)
    require_equal(gradients(made, batch), expected)
    require_equal(gradients(copy.deepcopy(made), batch), expected)
    sharing.uninstall(made.hf)
    assert [module.forward for module in made.hf.modules()] == methods
