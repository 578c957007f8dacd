"""Checkpoints that cannot be loaded or trained, each with a message that says why."""

import pytest
import transformers
from families import IMAGE, SLIDING, SMALL, VOCABULARY, build, write_family
from helpers import TEXT
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer

from mm_agrae.config import LoraSection, ModelSection, PromptSection
from mm_agrae.errors import ModelError
from mm_agrae.model.loading import load_model
from mm_agrae.model.processing import Processing

CLIP_VISION = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
    "image_size": 28, "patch_size": 14,
}  # fmt: skip
T5 = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 2}
MAMBA = {"vocab_size": VOCABULARY, "hidden_size": 32, "state_size": 4, "num_hidden_layers": 1}
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
            "image_token_index": IMAGE,
        },
        "LlavaForConditionalGeneration",
        "does not number image tokens as Qwen's models do",
    ),
    "gemma3": (
        {
            "vision_config": CLIP_VISION,
            "text_config": TEXT_IN_GEMMA,
            "mm_tokens_per_image": 1,
            "image_token_index": IMAGE,
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
        load_model(section)
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


def test_a_run_folder_names_its_checkpoints(tmp_path):
    for step in (5, 10):
        (tmp_path / "checkpoints" / f"step_{step:06d}").mkdir(parents=True)
    for load in (build, lambda path: load_model(ModelSection(path=path))):
        with pytest.raises(ModelError, match=r"is a run folder; .*step_000010"):
            load(str(tmp_path))


@pytest.mark.parametrize(
    ("path", "settings", "expected"),
    [
        (TEXT, {"freeze": ("vision",)}, "has no module 'vision'"),
        (TEXT, {"freeze": ("language", "embeddings")}, "nothing to train"),
        (TEXT, {"lora": LoraSection(modules=("query",))}, "no linear layer named query"),
        ("no/such/model", {}, "cannot be loaded"),
    ],
)
def test_refusals(path, settings, expected):
    with pytest.raises(ModelError, match=expected):
        load_model(ModelSection(path=path, **settings))
