"""Each model family with random weights: both ways of the update, rollout, parts, refusals."""

import contextlib
import json
from pathlib import Path

import pytest
import torch
import transformers
from helpers import TEXT, VL, examples, sampling
from helpers import processing as known_good
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer

from mm_agrae.batching import UpdateRow, micro_batch
from mm_agrae.config import LoraSection, ModelSection, PromptSection
from mm_agrae.errors import ConfigError, ModelError
from mm_agrae.model.policy import Policy
from mm_agrae.model.processing import Processing
from mm_agrae.rollout.hf import HFEngine
from mm_agrae.rollout.vllm_common import check_adapters
from mm_agrae.types import Completion, Example

SMALL = {
    "vocab_size": 643, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 633,
    "bos_token_id": None, "eos_token_id": 635, "max_position_embeddings": 512,
    "initializer_range": 0.2,
}  # fmt: skip
VISION_IDS = {
    "vision_start_token_id": 636, "vision_end_token_id": 637, "image_token_id": 639,
    "video_token_id": 640,
}  # fmt: skip
ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}


def qwen2_vl():
    text = SMALL | {"rope_parameters": ROPE}
    vision = {
        "depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "patch_size": 14,
        "initializer_range": 0.2,
    }  # fmt: skip
    return {"text_config": text, "vision_config": vision, **VISION_IDS}


def qwen2_5_vl():
    vision = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 64,
        "num_heads": 2, "patch_size": 14, "window_size": 56, "fullatt_block_indexes": [1],
        "initializer_range": 0.2,
    }  # fmt: skip
    return qwen2_vl() | {"vision_config": vision}


def qwen3_vl():
    vision = {
        "depth": 3, "hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 64,
        "num_heads": 2, "patch_size": 16, "deepstack_visual_indexes": [0, 1],
        "num_position_embeddings": 64, "initializer_range": 0.2,
    }  # fmt: skip
    return qwen2_vl() | {"vision_config": vision}


# Short windows, so that prompts do not fit into them.
SLIDING = {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_hidden_layers": 4}
FAMILIES = {
    "qwen2_5_vl": qwen2_5_vl(),
    "qwen2_vl": qwen2_vl(),
    "qwen3_vl": qwen3_vl(),
    "llama": SMALL,
    "qwen2": SMALL | {"tie_word_embeddings": True},
    "qwen3": SMALL,
    "gemma3_text": SMALL | SLIDING | {"sliding_window": 8, "tie_word_embeddings": True},
    "qwen3_moe": SMALL | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
}
VISION = ("qwen2_5_vl", "qwen2_vl", "qwen3_vl")
EVERY = pytest.mark.parametrize("family", FAMILIES)


def write_family(family, folder, settings):
    """A checkpoint with random weights and the warm start's tokenizer; its path."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **settings)
    loader = (
        transformers.AutoModelForImageTextToText
        if hasattr(config, "vision_config")
        else transformers.AutoModelForCausalLM
    )
    model = loader.from_config(config, dtype=torch.float32)
    model.generation_config.eos_token_id = 635
    model.save_pretrained(folder)
    if hasattr(config, "vision_config"):
        warm = transformers.AutoProcessor.from_pretrained(VL)
        pictures, videos = warm.image_processor, warm.video_processor
        pictures.patch_size = videos.patch_size = config.vision_config.patch_size
        if family == "qwen3_vl":
            side = 16 * 2
            pictures.size = {"shortest_edge": side**2, "longest_edge": 16 * side**2}
            videos = transformers.Qwen3VLVideoProcessor(patch_size=16)
            warm = transformers.Qwen3VLProcessor(
                image_processor=pictures,
                tokenizer=warm.tokenizer,
                video_processor=videos,
                chat_template=warm.chat_template,
            )
        warm.save_pretrained(folder)
    else:
        AutoTokenizer.from_pretrained(TEXT).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    made = {}

    def get(family):
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            made[family] = write_family(family, folder, FAMILIES[family])
        return made[family]

    return get


def build(path, shared_prompt="auto", **settings):
    processing = Processing(path, PromptSection())
    policy = Policy(ModelSection(path=path, **settings), processing, shared_prompt=shared_prompt)
    return processing, policy


def prompts_for(processing, count=2):
    """For a vision model pictures first, and one row of text only."""
    kind = VL if processing.is_multimodal else TEXT
    made = [processing.prompt(example) for example in examples(kind, count)]
    return [*made, processing.prompt(Example("t", "What is 2+2?", "4"))]


def batch_for(processing, policy):
    prompts = prompts_for(processing)
    random = torch.Generator().manual_seed(3)
    rows = []
    for index in range(len(prompts)):
        for length in (5, 9, 2):
            ids = torch.randint(0, 600, (length,), generator=random).tolist()
            completion = Completion(tuple(ids), (0.0,) * length, "", "length", 0)
            rows.append(UpdateRow(index, completion, float(torch.randn((), generator=random))))
    return micro_batch(prompts, rows, policy.device)


def randomise_lora(policy):
    torch.manual_seed(1)
    for name, parameter in policy.model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.1)


def gradients(policy, batch):
    policy.train()
    policy.zero_grad()
    logp_BT, _ = policy(batch)
    (logp_BT * batch.advantage_B[:, None]).sum().div(batch.mask_BT.sum()).backward()
    return logp_BT.detach(), {
        name: p.grad for name, p in policy.model.named_parameters() if p.grad is not None
    }


def require_equal(one, two):
    (logp_1, grads_1), (logp_2, grads_2) = one, two
    assert (logp_1 - logp_2).abs().max() <= 1e-5 * logp_2.abs().max()
    assert grads_1.keys() == grads_2.keys()
    largest = max(grad.abs().max() for grad in grads_2.values())
    assert largest > 0
    assert max((grads_1[n] - grads_2[n]).abs().max() for n in grads_1) <= 1e-5 * largest


@EVERY
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_shared_prompts_equal_repeated_ones(checkpoint, family, lora):
    section = LoraSection(rank=4) if lora else None
    processing, shared = build(checkpoint(family), "on", lora=section)
    _, repeated = build(checkpoint(family), "off", lora=section)
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
    require_equal(gradients(eager, batch), gradients(sdpa, batch))
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


def trained(policy):
    return {name for name, p in policy.model.named_parameters() if p.requires_grad}


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


# ------------------------------------------------------------------------------ what does not fit


CLIP_VISION = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
    "image_size": 28, "patch_size": 14,
}  # fmt: skip
T5 = {"vocab_size": 643, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 2}
MAMBA = {"vocab_size": 643, "hidden_size": 32, "state_size": 4, "num_hidden_layers": 1}
TEXT_IN_LLAVA = SMALL | {"model_type": "llama", "num_hidden_layers": 1}
TEXT_IN_GEMMA = SMALL | SLIDING | {"sliding_window": 8}
HYBRID = {
    "layer_types": ["linear_attention", "full_attention"], "num_hidden_layers": 2,
    "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}  # fmt: skip
MISFITS = {
    "t5": (T5, "T5ForConditionalGeneration", "t5 is an encoder-decoder"),
    "mamba": (MAMBA, "MambaForCausalLM", "MambaModel takes no .*past_key_values"),
    "clip": (
        {"vision_config": CLIP_VISION, "text_config": {"num_hidden_layers": 1}},
        "CLIPModel",
        "its model cannot be loaded: Unrecognized configuration class",
    ),
    "llava": (
        {
            "vision_config": CLIP_VISION | {"model_type": "clip_vision_model"},
            "text_config": TEXT_IN_LLAVA,
            "image_token_index": 639,
        },
        "LlavaForConditionalGeneration",
        "does not number image tokens as Qwen's models do",
    ),
    "gemma3": (
        {
            "vision_config": CLIP_VISION,
            "text_config": TEXT_IN_GEMMA,
            "mm_tokens_per_image": 1,
            "image_token_index": 639,
        },
        "Gemma3ForConditionalGeneration",
        "does not number image tokens as Qwen's models do",
    ),
    "gemma2": (
        SMALL | {"num_hidden_layers": 2},
        "Gemma2ForCausalLM",
        "no plain linear vocabulary head .final_logit_softcapping",
    ),
    "qwen3_5_text": (SMALL | HYBRID, "Qwen3_5ForCausalLM", "layers of kind linear_attention"),
}


@pytest.mark.parametrize("family", MISFITS)
def test_a_family_that_does_not_fit_says_why(family, tmp_path):
    settings, name, expected = MISFITS[family]
    model = getattr(transformers, name)(AutoConfig.for_model(family, **settings))
    model.save_pretrained(tmp_path)
    # Mamba's classes refuse sdpa before anything of ours can be asked.
    attention = "eager" if family == "mamba" else "sdpa"
    section = ModelSection(path=str(tmp_path), attn_implementation=attention)
    with pytest.raises(ModelError, match=expected) as error:
        Policy(section, known_good(TEXT))
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_processor_that_is_not_like_qwens_says_why(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(TEXT)
    processor = transformers.LlavaProcessor(
        image_processor=transformers.CLIPImageProcessor(),
        tokenizer=tokenizer,
        patch_size=14,
        chat_template=tokenizer.chat_template,
    )
    processor.save_pretrained(tmp_path)
    AutoConfig.for_model("llava", **MISFITS["llava"][0]).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="LlavaProcessor of family llava does not cut images"):
        Processing(str(tmp_path), PromptSection())


def test_weights_that_are_not_there(checkpoint, tmp_path):
    write_family("llama", tmp_path, SMALL)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lack 1 weights .* model\.layers\.1\.mlp\.up_proj"):
        build(str(tmp_path))


# ----------------------------------------------------------------------------- adapters and runs


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
        ("qwen2_5_vl", qwen2_5_vl(), "Qwen2_5_VLForConditionalGeneration of 3 layers"),
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
        (
            {"base_model_name_or_path": "/nowhere/else"},
            "adapter for the base model '/nowhere/else'",
        ),
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
            logits_NV = repeated.logits(hidden_NH)
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


def test_a_run_folder_names_its_checkpoints(tmp_path):
    for step in (5, 10):
        (tmp_path / "checkpoints" / f"step_{step:06d}").mkdir(parents=True)
    for load in (build, lambda path: Policy(ModelSection(path=path), known_good(TEXT))):
        with pytest.raises(ModelError, match=r"is a run folder; .*step_000010"):
            load(str(tmp_path))
