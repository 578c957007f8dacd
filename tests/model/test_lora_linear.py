"""LoRA layers as one operation: PEFT's numbers, and PEFT itself where they do not fit."""

import copy

import pytest
import torch
from families import gradients, randomise_lora, require_equal
from helpers import VL, batch_of, policy
from torch import nn

from mm_agrae.config import LoraSection
from mm_agrae.errors import ModelError
from mm_agrae.model import lora_linear
from mm_agrae.model.lora import load_lora

INPUTS = {
    "one row": torch.randn(12),
    "rows": torch.randn(12, 7).T,
    "transposed": torch.randn(5, 2, 12).transpose(0, 1),
    "every second": torch.randn(2, 5, 24)[..., ::2],
    "none": torch.randn(2, 0, 12),
}


def adapted(*, bias=True, installed=True, dtype=torch.float32, **settings):
    """Two linear layers with an adapter each; the same weights in every call."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["first", "second"], **settings)
    model = get_peft_model(Chain(bias).to(dtype), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.3)
    if installed:
        lora_linear.install(model)
    return model


class Chain(nn.Module):
    def __init__(self, bias=True):
        super().__init__()
        self.first, self.second = nn.Linear(12, 20, bias=bias), nn.Linear(20, 8, bias=bias)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def outcome(model, x, dtype=None):
    """Output and all gradients, by name."""
    model.zero_grad()
    x = x.detach().requires_grad_()
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        out = model(x)
    (out.float() * torch.arange(out.numel()).view(out.shape).cos()).sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"output": out.detach(), "input": x.grad} | grads


def require_same(ours, theirs, **allowed):
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        torch.testing.assert_close(ours[name], expected, msg=lambda text, name=name: f"{name}: {text}", **allowed)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("x", INPUTS.values(), ids=INPUTS)
def test_one_operation_is_what_peft_computes(x, bias):
    require_same(outcome(adapted(bias=bias), x), outcome(adapted(bias=bias, installed=False), x))


@pytest.mark.parametrize("frozen", [torch.float32, torch.bfloat16])
def test_in_16_bits_it_rounds_no_more_than_peft(frozen):
    x = torch.randn(64, 12, generator=torch.Generator().manual_seed(2))
    exact = outcome(adapted(dtype=frozen).float(), x)
    errors = []
    for installed in (True, False):
        found = outcome(adapted(dtype=frozen, installed=installed), x, torch.bfloat16)
        assert found["output"].dtype == torch.bfloat16
        errors.append(sum(float((found[name] - exact[name]).norm() / exact[name].norm()) for name in exact))
    assert 0 < errors[0] < 1.5 * errors[1]


@pytest.mark.parametrize(
    "settings",
    [{"use_rslora": True}, {"use_dora": True}, {"lora_bias": True}, {"lora_dropout": 0.5}],
    ids=lambda settings: next(iter(settings)),
)
def test_what_is_not_plain_goes_through_peft(settings):
    x, models = torch.randn(7, 12), [adapted(installed=installed, **settings) for installed in (True, False)]
    for training in (True, False):
        found = []
        for model in models:
            torch.manual_seed(3)
            found.append(outcome(model.train(training), x))
        require_same(*found)


def test_adapters_are_merged_switched_off_and_joined_as_in_peft():
    from peft import LoraConfig

    x, ours, theirs = torch.randn(7, 12), adapted(), adapted(installed=False)
    before = outcome(theirs, x)["output"]
    with ours.disable_adapter(), theirs.disable_adapter():
        assert torch.equal(ours(x), theirs(x))
        assert not torch.allclose(ours(x), before)
    ours.merge_adapter()
    torch.testing.assert_close(ours(x), before)
    ours.unmerge_adapter()
    for model in (ours, theirs):
        model.add_adapter("more", LoraConfig(r=3, lora_alpha=5, target_modules=["first"]))
        for name, parameter in model.named_parameters():
            if "more" in name:
                parameter.data.copy_(torch.linspace(-1, 1, parameter.numel()).view(parameter.shape))
    for names in ("more", ["default", "more"], "default"):
        for model in (ours, theirs):
            model.base_model.set_adapter(names)
        require_same(outcome(ours, x), outcome(theirs, x))
    torch.testing.assert_close(adapted().merge_and_unload()(x), before)


def test_a_copy_computes_with_its_own_weights():
    x, model = torch.randn(7, 12), adapted()
    before, twin = model(x), copy.deepcopy(model)
    for parameter in twin.parameters():
        parameter.data.zero_()
    assert twin(x).abs().max() == 0
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_adapters_on_tower_and_merger_have_pefts_gradients(checkpointing):
    lora = LoraSection(rank=4, alpha=8, modules=(), parts=("language", "vision", "merger", "head"))
    made = policy(VL, shared_prompt="on", lora=lora, gradient_checkpointing=checkpointing)
    randomise_lora(made)
    batch = batch_of(VL, made)
    found = gradients(made, batch)
    replaced = [module for module in made.modules() if hasattr(module, "lora_A") and "forward" in module.__dict__]
    assert len(replaced) > 20
    for module in replaced:
        del module.forward
    require_equal(found, gradients(made, batch))


@pytest.mark.filterwarnings("ignore:aLoRA is currently only")
def test_an_adapter_of_another_variant_is_refused(tmp_path):
    adapted(alora_invocation_tokens=[1]).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"alora_invocation_tokens=\[1\]\); merge it into its base"):
        load_lora(Chain(), str(tmp_path), None)
