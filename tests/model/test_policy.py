"""Log-probabilities against plain transformers, the reference policy, precision."""

import pytest
import torch
from helpers import TEXT, VL, batch_of, policy, processing

from mm_agrae.config import LoraSection
from mm_agrae.model.policy import SMALL, one_thread_if_small

BOTH = pytest.mark.parametrize("path", [VL, TEXT], ids=["vl", "text"])


@BOTH
@pytest.mark.parametrize("sharing", ["off", "on"])
def test_logprobs_equal_transformers_own_forward(path, sharing):
    """One row at a time, no padding, the model's own positions and logits."""
    made = policy(path, shared_prompt=sharing)
    micro = batch_of(path, made)
    logp_BT, entropy_BT = made(micro)
    for b, index in enumerate(micro.prompt_index_B.tolist()):
        prompt, length = micro.prompts[index], int(micro.mask_BT[b].sum())
        ids = torch.cat([prompt.token_ids, micro.token_BT[b, :length]])[None]
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if prompt.pixel_values is not None:
            kinds = torch.nn.functional.pad(prompt.mm_token_type_ids, (0, length))
            inputs |= {
                "pixel_values": prompt.pixel_values,
                "image_grid_thw": prompt.image_grid_thw,
                "mm_token_type_ids": kinds[None],
            }
        logits = made.hf(**inputs).logits[0, len(prompt) - 1 : -1].double()
        logits[:, list(processing(path).forbidden_ids)] = -torch.inf
        logp = torch.log_softmax(logits, -1)
        expected = logp.gather(-1, micro.token_BT[b, :length, None]).squeeze(-1)
        assert torch.allclose(logp_BT[b, :length].double(), expected, atol=2e-5)
        entropy = -(logp.exp() * logp.clamp(min=-1e9)).sum(-1)
        assert torch.allclose(entropy_BT[b, :length].double(), entropy, atol=2e-5)


def test_the_reference_is_where_lora_started():
    made = policy(TEXT, lora=LoraSection(rank=4))
    micro = batch_of(TEXT, made)
    start = made(micro)[0].detach()
    with torch.no_grad():
        for name, parameter in made.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    assert (made(micro)[0] - start).abs().max() > 1e-3
    assert torch.allclose(made.reference_logprobs(micro), start, atol=1e-6)


def test_the_reference_of_a_full_model():
    made = policy(TEXT)
    micro = batch_of(TEXT, made)
    with pytest.raises(RuntimeError, match="keep_reference"):
        made.reference_logprobs(micro)
    made.keep_reference()
    start = made(micro)[0].detach()
    with torch.no_grad():
        next(made.trainable_parameters()).add_(0.1)
    assert (made(micro)[0] - start).abs().max() > 1e-3
    assert torch.allclose(made.reference_logprobs(micro), start, atol=1e-6)
    assert not any("reference" in name for name in made.state_dict())


def test_bfloat16_keeps_float32_weights_when_they_learn():
    made = policy(TEXT, dtype="bfloat16")
    assert {p.dtype for p in made.parameters()} == {torch.float32}
    adapted = policy(TEXT, dtype="bfloat16", lora=LoraSection(rank=4))
    kinds = {p.requires_grad: p.dtype for p in adapted.parameters()}
    assert kinds == {True: torch.float32, False: torch.bfloat16}
    exact = policy(TEXT)
    micro = batch_of(TEXT, exact)
    with torch.no_grad():
        reference = exact(micro)[0]
        for rounded in (made, adapted):
            logp_BT = rounded(micro)[0]
            assert logp_BT.dtype == torch.float32
            assert 0 < (logp_BT - reference).abs().max() < 0.5


def test_a_small_model_on_a_cpu_takes_one_thread_unless_told_otherwise(monkeypatch):
    before, cpu = torch.get_num_threads(), torch.device("cpu")
    try:
        for given, parameters, device, expected in (
            (None, SMALL, cpu, 2),
            (None, SMALL - 1, torch.device("cuda"), 2),
            ("2", SMALL - 1, cpu, 2),
            (None, SMALL - 1, cpu, 1),
        ):
            monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
            if given:
                monkeypatch.setenv("OMP_NUM_THREADS", given)
            torch.set_num_threads(2)
            one_thread_if_small(parameters, device)
            assert torch.get_num_threads() == expected
        torch.set_num_threads(2)
        policy(TEXT)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
