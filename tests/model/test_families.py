"""Every family through the policy: shared and repeated prompts, rollout, dtypes, modules."""

import json
from pathlib import Path

import pytest
import torch
from families import FAMILIES, VISION, batch_for, build, gradients, prompts_for, randomise_lora, require_equal, trained
from helpers import sampling
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from mm_agrae.config import LoraSection
from mm_agrae.errors import ModelError
from mm_agrae.rollout.hf import HFEngine
from mm_agrae.run.export import export

EVERY = pytest.mark.parametrize("family", FAMILIES)


@EVERY
def test_shared_prompts_equal_repeated_ones(checkpoint, family):
    """With LoRA; full models are compared in test_shared_prompt."""
    processing, shared = build(checkpoint(family), "on", lora=LoraSection(rank=4))
    _, repeated = build(checkpoint(family), "off", lora=LoraSection(rank=4))
    assert shared.repeats_because == ""
    for policy in (shared, repeated):
        randomise_lora(policy)
    batch = batch_for(processing, shared)
    shared.check_sharing(batch)
    require_equal(gradients(shared, batch), gradients(repeated, batch))


@EVERY
def test_rollout_logprobs_are_those_of_a_plain_forward(checkpoint, family):
    processing, policy = build(checkpoint(family))
    prompts = prompts_for(processing)
    engine = HFEngine(policy, processing)
    groups = engine.generate(prompts, 2, sampling(max_new_tokens=12), range(len(prompts)))
    policy.eval()
    for prompt, group in zip(prompts, groups, strict=True):
        for completion in group:
            length = len(completion.token_ids)
            ids = torch.cat([prompt.token_ids, torch.tensor(completion.token_ids)])[None]
            inputs = {"input_ids": ids}
            if prompt.pixel_values is not None:
                kinds = torch.nn.functional.pad(prompt.mm_token_type_ids, (0, length))
                inputs |= {
                    "pixel_values": prompt.pixel_values,
                    "image_grid_thw": prompt.image_grid_thw,
                    "mm_token_type_ids": kinds[None],
                }
            with torch.no_grad():
                logits = policy.hf(**inputs).logits[0, len(prompt) - 1 : -1].double()
            logits[:, list(processing.forbidden_ids)] = -torch.inf
            expected = torch.log_softmax(logits, -1).gather(1, ids[0, len(prompt) :, None])[:, 0]
            assert (torch.tensor(completion.logprobs) - expected).abs().max() < 1e-4
            assert not set(completion.token_ids) & set(processing.forbidden_ids)


@EVERY
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_gradient_checkpointing_changes_nothing(checkpoint, family, lora):
    section = LoraSection(rank=4) if lora else None
    path = checkpoint(family)  # before the seed: the first use of a family draws its weights
    torch.manual_seed(0)
    processing, plain = build(path, lora=section)
    torch.manual_seed(0)
    _, saving = build(path, lora=section, gradient_checkpointing=True)
    batch = batch_for(processing, plain)
    require_equal(gradients(saving, batch), gradients(plain, batch))


@EVERY
def test_eager_attention_repeats_prompts_and_says_so(checkpoint, family):
    processing, eager = build(checkpoint(family), attn_implementation="eager")
    assert eager.repeats_because == "model.attn_implementation is eager; it takes sdpa"
    _, sdpa = build(checkpoint(family))
    batch = batch_for(processing, sdpa)
    # Two implementations of attention, and of its softmax: they round differently.
    require_equal(gradients(eager, batch), gradients(sdpa, batch), rtol=1e-4)
    with pytest.raises(ModelError, match="eager"):
        build(checkpoint(family), "on", attn_implementation="eager")


@EVERY
def test_bfloat16_and_weights_by_stored_name(checkpoint, family):
    processing, policy = build(checkpoint(family), dtype="bfloat16", lora=LoraSection(rank=4))
    _, exact = build(checkpoint(family))
    batch = batch_for(processing, policy)
    with torch.no_grad():
        difference = (policy(batch)[0] - exact(batch)[0])[batch.mask_BT.bool()].abs().mean()
    assert 0 < difference < 0.2
    stored = load_file(Path(checkpoint(family)) / "model.safetensors")
    ours = dict(policy.full_weights())
    assert ours.keys() == stored.keys()
    assert all(torch.equal(ours[name], stored[name].bfloat16()) for name in stored)


@pytest.mark.parametrize("family", VISION)
def test_parts_of_a_vision_model(checkpoint, family):
    path = checkpoint(family)
    seen = {}
    for part in ("language", "vision", "merger"):
        names = trained(build(path, lora=LoraSection(rank=2, parts=(part,)))[1])
        seen[part] = {name.split(".lora_")[0].removeprefix("base_model.model.") for name in names}
    assert all("language_model" in name for name in seen["language"])
    assert all("visual" in name and "merger" not in name for name in seen["vision"])
    assert all("visual" in name and "merger" in name for name in seen["merger"])
    hf = build(path)[1].hf
    linear = {name for name, m in hf.named_modules() if isinstance(m, torch.nn.Linear)}
    assert set().union(*seen.values()) == linear - {"lm_head"}
    frozen = trained(build(path, freeze=("vision",))[1])
    assert frozen == {name for name in trained(build(path)[1]) if "visual" not in name}


@pytest.mark.parametrize("family", VISION)
def test_frozen_vision_computes_the_same(checkpoint, family):
    processing, frozen = build(checkpoint(family), freeze=("vision",))
    _, whole = build(checkpoint(family))
    batch = batch_for(processing, frozen)
    (logp, grads), (expected, all_grads) = gradients(frozen, batch), gradients(whole, batch)
    require_equal((logp, grads), (expected, {name: all_grads[name] for name in grads}))


@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3_text", "qwen3_moe"])
def test_exports_name_things_as_transformers_4_does(family, checkpoint, tmp_path):
    export(Path(checkpoint(family)), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    text = config.get("text_config", config)
    assert text["rope_theta"] == (1e6 if family == "gemma3_text" else 1e4)
    tokenizer = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert "extra_special_tokens" not in tokenizer
    assert tokenizer["tokenizer_class"] in ("PreTrainedTokenizerFast", "Qwen2Tokenizer")
    if family == "qwen2_5_vl":
        assert text["rope_scaling"]["mrope_section"] == [2, 3, 3]
        size = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())["size"]
        assert size == {"shortest_edge": 784, "longest_edge": 112896}
    if family == "gemma3_text":
        assert (text["rope_local_base_freq"], text["rope_scaling"]) == (1e4, None)
    if family == "qwen3_moe":
        assert text["num_experts"] == 4
    loader = AutoModelForImageTextToText if family in VISION else AutoModelForCausalLM
    fresh, report = loader.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"] | report["unexpected_keys"]
    before, after = loader.from_pretrained(checkpoint(family)).state_dict(), fresh.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
