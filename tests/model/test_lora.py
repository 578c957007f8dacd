"""LoRA adapters: where they are put, those trained before, and on the vocabulary head."""

import contextlib
import json

import pytest
import torch
import transformers
from families import FAMILIES, SMALL, batch_for, build, gradients, randomise_lora, require_equal, trained, write_family
from helpers import VL, policy

from mm_agrae.config import LoraSection
from mm_agrae.errors import ConfigError, ModelError
from mm_agrae.rollout.vllm_common import check_adapters


@pytest.mark.parametrize(
    ("lora", "inside", "outside"),
    [({}, "language_model", "visual"), ({"modules": ("q_proj", "v_proj")}, "_proj", "mlp")],
)
def test_lora_stands_where_it_was_asked_for(lora, inside, outside):
    names = trained(policy(VL, lora=LoraSection(rank=4, **lora)))
    assert names
    assert all("lora_" in name and inside in name and outside not in name for name in names)


@pytest.fixture
def adapter(checkpoint, tmp_path):
    """An adapter for the small Llama, with settings of PEFT's changed."""

    def make(base="llama", **changes):
        _, policy = build(checkpoint(base), lora=LoraSection(rank=4, alpha=8))
        for name, parameter in policy.model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.1)
        policy.model.save_pretrained(tmp_path / "adapter")
        file = tmp_path / "adapter" / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
        return policy, str(tmp_path / "adapter")

    return make


def test_an_adapter_goes_on_where_it_was(adapter, checkpoint):
    policy, path = adapter()
    processing, again = build(path)  # tokenizer and template come from the base model
    batch = batch_for(processing, policy)
    require_equal(gradients(again, batch), gradients(policy, batch))
    build(path, lora=LoraSection(rank=4, alpha=8))
    # The reference is the policy that training started from, not the adapter's base.
    again.eval().keep_reference()
    start = again(batch)[0].detach()
    for parameter in again.trainable_parameters():
        parameter.data.mul_(1.5)
    moved = again(batch)[0].detach()
    assert (moved - start).abs().max() > 1e-2
    assert torch.equal(again.reference_logprobs(batch), start)
    assert torch.equal(again(batch)[0], moved)
    with pytest.raises(ModelError, match=r"rank 4 and alpha 8, .* asks for 16 and 32"):
        build(path, lora=LoraSection())


LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
DEEPER = SMALL | {"num_hidden_layers": 4}
WIDER = SMALL | {"hidden_size": 96}


@pytest.mark.parametrize(
    ("family", "settings", "problem"),
    [
        ("llama", DEEPER, r"4 layers .* size 64: 14 of its weights are missing \(such as .*lora_"),
        ("llama", WIDER, "3 layers and hidden size 96: .*size mismatch"),
        ("llama", SMALL | {"num_hidden_layers": 2}, "2 layers .* not found|belong to no layer"),
        ("gemma3_text", FAMILIES["gemma3_text"], "Gemma3ForCausalLM of 4 layers"),
        ("qwen2_5_vl", FAMILIES["qwen2_5_vl"], "Qwen2_5_VLForConditionalGeneration of 3 layers"),
    ],
    ids=["deeper", "wider", "shallower", "gemma", "vision"],
)
def test_an_adapter_for_another_model(adapter, tmp_path, family, settings, problem):
    other = write_family(family, tmp_path / "other", settings)
    _, path = adapter(base_model_name_or_path=other, target_modules=LINEAR)
    with pytest.raises(ModelError, match=problem) as error:
        build(path)
    assert other in str(error.value)
    assert path in str(error.value)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"base_model_name_or_path": "/nowhere/else"}, "adapter for the base model '/nowhere/else'"),
        ({"base_model_name_or_path": None}, "names no base model"),
        ({"use_dora": True}, r"not plain LoRA \(use_dora=True\)"),
        ({"modules_to_save": ["lm_head"]}, "not plain LoRA .*modules_to_save"),
        ({"bias": "all"}, "not plain LoRA .*bias=all"),
        ({"peft_type": "IA3"}, "an adapter of kind|cannot read adapter_config"),
    ],
)
def test_adapters_that_cannot_be_used(adapter, changes, expected):
    _, path = adapter(**changes)
    with pytest.raises(ModelError, match=expected) as error:
        build(path)
    assert "adapter" in str(error.value)


def test_adapters_take_their_input_as_it_comes(checkpoint):
    """PEFT would cast it to float32 and autocast cast it back: a copy more, and the same numbers."""
    processing, policy = build(checkpoint("qwen2_5_vl"), "on", lora=LoraSection(rank=4), dtype="bfloat16")
    randomise_lora(policy)
    batch = batch_for(processing, policy)
    logp_BT, grads = gradients(policy, batch)
    layers = [module for module in policy.model.modules() if hasattr(module, "lora_A")]
    assert layers
    assert not any(layer.cast_input_dtype_enabled for layer in layers)
    for layer in layers:
        layer.cast_input_dtype_enabled = True
    cast_BT, cast_grads = gradients(policy, batch)
    assert torch.equal(logp_BT, cast_BT)
    assert all(torch.equal(grads[name], cast_grads[name]) for name in cast_grads)


HEAD = LoraSection(rank=4, parts=("language", "head"))


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llama", "qwen2", "gemma3_text"])
def test_lora_on_the_vocabulary_head(checkpoint, family):
    """Of its own, or (Qwen2, Gemma) tied to the embeddings, which stay as they are."""
    processing, policy = build(checkpoint(family), "on", lora=HEAD)
    _, repeated = build(checkpoint(family), "off", lora=HEAD)
    for each in (policy, repeated):
        randomise_lora(each)
    batch = batch_for(processing, policy)
    found = gradients(policy, batch)
    assert sum("lm_head" in name for name in found[1]) == 2
    require_equal(found, gradients(repeated, batch))
    # By logits as PEFT computes them, and with the adapter set aside.
    repeated.eval()
    for logp_BT, aside in (
        (policy.eval()(batch)[0], contextlib.nullcontext()),
        (policy.reference_logprobs(batch), repeated.model.disable_adapter()),
    ):
        with torch.no_grad(), aside:
            hidden_NH, row_N, column_N = repeated._repeated(batch)
            logits_NV = repeated.hf.get_output_embeddings()(hidden_NH).float() + repeated.bias_V
            assert (repeated.logits(hidden_NH) - logits_NV).abs().max() < 1e-5 * logits_NV.abs().max()
        target_N1 = batch.token_BT[row_N, column_N][:, None]
        expected_N = torch.log_softmax(logits_NV, -1).gather(1, target_N1)[:, 0]
        assert (logp_BT[row_N, column_N] - expected_N).abs().max() < 1e-4


def test_vllm_has_one_weight_for_a_tied_head(checkpoint):
    _, tied = build(checkpoint("qwen2"), lora=HEAD)
    _, own = build(checkpoint("llama"), lora=HEAD)
    with pytest.raises(ConfigError, match="vLLM holds one weight for both"):
        check_adapters(tied, "merged")
    check_adapters(own, "merged")
    with pytest.raises(ConfigError, match="adapts head too; use sync=merged"):
        check_adapters(own, "adapter")


def test_an_adapter_of_pefts_own_on_the_vocabulary_head(checkpoint, tmp_path):
    from peft import LoraConfig, get_peft_model

    hf = transformers.AutoModelForCausalLM.from_pretrained(checkpoint("llama"))
    config = LoraConfig(r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    made = get_peft_model(hf, config)
    made.save_pretrained(tmp_path)
    processing, policy = build(str(tmp_path))
    batch = batch_for(processing, policy)
    ids = torch.cat([batch.prompts[-1].token_ids, torch.arange(5)])[None]
    expected = made.eval()(ids).logits
    policy.eval()
    with torch.no_grad():
        torch.testing.assert_close(policy.hf(ids).logits, expected)
