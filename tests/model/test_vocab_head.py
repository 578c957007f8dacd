"""The fused vocabulary head against log_softmax on full logits."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mm_agrae.model.vocab_head import head_logprobs, token_logprobs

CASES = [
    # positions, hidden, vocabulary, temperature, bias, chunk bytes (0: default)
    (1, 8, 30, 1.0, False, 0),
    (37, 16, 1500, 0.7, True, 4),
    (37, 16, 1500, 1.3, False, 4),
    (300, 32, 1025, 1.0, True, 1 << 20),
    (0, 8, 30, 1.0, True, 0),
]


def reference(hidden, weight, target, bias, temperature):
    logits = hidden @ weight.T
    if bias is not None:
        logits = logits + bias
    logp = torch.log_softmax(logits / temperature, dim=-1)
    entropy = -(logp.exp() * logp).sum(-1)
    return logp.gather(-1, target[:, None]).squeeze(-1), entropy


def make(positions, size, vocabulary, bias, dtype=torch.float64):
    torch.manual_seed(positions + vocabulary)
    hidden = torch.randn(positions, size, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocabulary, size, dtype=dtype, requires_grad=True)
    target = torch.randint(vocabulary, (positions,))
    offset = torch.randn(vocabulary, dtype=dtype, requires_grad=True) if bias else None
    return hidden, weight, target, offset


@pytest.mark.parametrize(("n", "h", "v", "temperature", "bias", "chunk"), CASES)
@pytest.mark.parametrize("entropy_grad", [False, True])
def test_values_and_gradients_equal_log_softmax(n, h, v, temperature, bias, chunk, entropy_grad):
    hidden, weight, target, offset = make(n, h, v, bias)
    inputs = [hidden, weight] + ([offset] if bias else [])
    direction = torch.randn(2, n, dtype=torch.float64)

    def run(function, **more):
        logp, entropy = function(hidden, weight, target, **more)
        loss = (logp * direction[0]).sum()
        if entropy_grad:
            loss = loss + (entropy * direction[1]).sum()
        return logp, entropy, torch.autograd.grad(loss, inputs)

    ours = run(
        token_logprobs, bias_V=offset, temperature=temperature, entropy_grad=entropy_grad,
        chunk_bytes=chunk or None,
    )  # fmt: skip
    theirs = run(reference, bias=offset, temperature=temperature)
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-11, atol=1e-11)
    for mine, other in zip(ours[2], theirs[2], strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-10)


def test_gradcheck():
    hidden, weight, target, offset = make(5, 3, 520, True)

    def both(*inputs):
        h, w, b = inputs
        return token_logprobs(h, w, target, bias_V=b, temperature=0.8, entropy_grad=True, chunk_bytes=4)

    assert torch.autograd.gradcheck(both, (hidden, weight[:520], offset), fast_mode=True)


def test_float32_to_1e6():
    hidden, weight, target, _ = make(64, 32, 2000, False, torch.float32)
    logp, entropy = token_logprobs(hidden, weight, target, chunk_bytes=4)
    exact = reference(hidden.double(), weight.double(), target, None, 1.0)
    assert logp.dtype == torch.float32
    torch.testing.assert_close(logp.double(), exact[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(entropy.double(), exact[1], rtol=1e-5, atol=1e-5)


def test_huge_logits_stay_finite():
    hidden = torch.tensor([[1e4], [-1e4]], requires_grad=True)
    weight = torch.linspace(-1, 1, 1025)[:, None].requires_grad_()
    logp, entropy = token_logprobs(hidden, weight, torch.tensor([1024, 1024]), chunk_bytes=4)
    logp.sum().backward()
    assert logp[0].item() == pytest.approx(0, abs=1e-5)
    assert logp[1].item() == pytest.approx(-2e4)
    assert torch.isfinite(entropy).all()
    assert torch.isfinite(weight.grad).all()


def test_an_excluded_id_has_no_probability():
    hidden, weight, target, _ = make(20, 8, 50, False)
    target = target.clamp(min=1)
    bias = torch.zeros(50, dtype=torch.float64)
    bias[0] = -1e4
    logp, entropy = token_logprobs(hidden, weight, target, bias_V=bias)
    exact = reference(hidden, weight[1:], target - 1, None, 1.0)
    torch.testing.assert_close(logp, exact[0])
    torch.testing.assert_close(entropy, exact[1])
    logp.sum().backward()
    assert weight.grad[0].abs().max() == 0
    assert weight.grad[1:].abs().max() > 0


def test_frozen_head_gets_no_gradient_and_entropy_is_a_constant_by_default():
    hidden, weight, target, _ = make(9, 8, 50, False)
    weight = weight.detach()
    logp, entropy = token_logprobs(hidden, weight, target)
    assert not entropy.requires_grad
    logp.sum().backward()
    expected = torch.autograd.grad(reference(hidden, weight, target, None, 1.0)[0].sum(), hidden)[0]
    torch.testing.assert_close(hidden.grad, expected)
    assert weight.grad is None


def test_tied_weight_collects_both_gradients():
    torch.manual_seed(0)
    embedding = nn.Embedding(40, 8, dtype=torch.float64)
    head = nn.Linear(8, 40, bias=False, dtype=torch.float64)
    head.weight = embedding.weight
    ids = torch.randint(40, (12,))
    head_logprobs(head, embedding(ids[:-1]), ids[1:])[0].sum().backward()
    ours, embedding.weight.grad = embedding.weight.grad, None
    reference(embedding(ids[:-1]), embedding.weight, ids[1:], None, 1.0)[0].sum().backward()
    torch.testing.assert_close(ours, embedding.weight.grad)


def test_own_bias_of_the_head_counts():
    hidden, _, target, offset = make(9, 8, 50, True)
    head = nn.Linear(8, 50, dtype=torch.float64)
    logp, _ = head_logprobs(head, hidden, target, bias_V=offset.detach())
    exact = reference(hidden, head.weight, target, head.bias + offset.detach(), 1.0)[0]
    torch.testing.assert_close(logp, exact)
    logp.sum().backward()
    ours, head.bias.grad = head.bias.grad, None
    exact.sum().backward()
    torch.testing.assert_close(ours, head.bias.grad)


@pytest.mark.parametrize("entropy_grad", [False, True])
def test_lora_on_the_head_is_exact(entropy_grad):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.lm_head = nn.Linear(8, 50, bias=False, dtype=torch.float64)

    model = peft.get_peft_model(Model(), peft.LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False))
    head = model.base_model.model.lm_head.double()
    hidden, _, target, _ = make(9, 8, 50, False)
    inputs = [hidden, *(p for p in head.parameters() if p.requires_grad)]
    assert len(inputs) == 3
    logp, entropy = head_logprobs(head, hidden, target, temperature=0.9, entropy_grad=entropy_grad, chunk_bytes=800)
    exact = reference(hidden, head.get_delta_weight("default") + head.weight, target, None, 0.9)
    torch.testing.assert_close(logp, exact[0])
    torch.testing.assert_close(entropy, exact[1])

    def total(logp, entropy):
        return logp.square().sum() + (entropy.square().sum() if entropy_grad else 0)

    ours = torch.autograd.grad(total(logp, entropy), inputs)
    direct = torch.log_softmax(head(hidden) / 0.9, -1)
    theirs = torch.autograd.grad(
        total(direct.gather(-1, target[:, None])[:, 0], -(direct.exp() * direct).sum(-1)), inputs
    )
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other)


def test_bfloat16_rounds_the_inputs_only():
    hidden, weight, target, _ = make(50, 64, 600, False, torch.bfloat16)
    logp, _ = token_logprobs(hidden, weight, target)
    exact = reference(hidden.float(), weight.float(), target, None, 1.0)[0]
    assert logp.dtype == torch.float32
    torch.testing.assert_close(logp, exact, rtol=1e-5, atol=1e-5)
    logp.sum().backward()
    h, w = hidden.detach().float().requires_grad_(), weight.detach().float().requires_grad_()
    reference(h, w, target, None, 1.0)[0].sum().backward()
    assert hidden.grad.dtype == weight.grad.dtype == torch.bfloat16
    torch.testing.assert_close(hidden.grad.float(), h.grad, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(weight.grad.float(), w.grad, rtol=2e-2, atol=2e-2)


def test_autocast_uses_its_precision_and_float32_sums():
    hidden, weight, target, _ = make(50, 64, 600, False, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        logp, _ = token_logprobs(hidden, weight, target)
    rounded = reference(hidden.bfloat16().float(), weight.bfloat16().float(), target, None, 1.0)[0]
    torch.testing.assert_close(logp, rounded, rtol=1e-5, atol=1e-5)
    logp.sum().backward()
    assert hidden.grad.dtype == weight.grad.dtype == torch.float32


def test_a_sharded_weight_is_gathered_and_gets_its_gradient():
    import torch.distributed as dist
    from torch.distributed.tensor import Shard, distribute_tensor

    hidden, weight, target, _ = make(9, 8, 50, False)
    expected = torch.autograd.grad(reference(hidden, weight, target, None, 1.0)[0].sum(), weight)[0]
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = dist.init_device_mesh("cpu", (1,))
        sharded = distribute_tensor(weight.detach(), mesh, [Shard(0)]).requires_grad_()
        token_logprobs(hidden, sharded, target)[0].sum().backward()
        torch.testing.assert_close(sharded.grad.full_tensor(), expected)
    finally:
        dist.destroy_process_group()


def test_no_tensor_of_tokens_by_vocabulary():
    """The largest tensor either pass makes is the weight's gradient or a block of logits."""
    from torch.utils._python_dispatch import TorchDispatchMode

    sizes = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for item in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(item, torch.Tensor):
                    sizes.append(item.numel())
            return result

    hidden, weight, target, _ = make(400, 8, 10_000, False, torch.float32)
    with Record():
        token_logprobs(hidden, weight, target, chunk_bytes=1 << 20)[0].sum().backward()
    assert max(sizes) <= (1 << 20) // 4 < 400 * 10_000 // 10


def test_bad_shapes_are_named():
    hidden, weight, target, _ = make(4, 8, 30, False)
    with pytest.raises(ValueError, match=r"expected \[N, H\]"):
        token_logprobs(hidden, weight[:, :5], target)
    with pytest.raises(ValueError, match="4 hidden states"):
        token_logprobs(hidden, weight, target[:3])
    with pytest.raises(ValueError, match="outside the vocabulary of 30"):
        token_logprobs(hidden, weight, torch.full((4,), 30))
    with pytest.raises(ValueError, match="temperature is 0"):
        token_logprobs(hidden, weight, target, temperature=0)
