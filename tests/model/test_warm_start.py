"""The two small checkpoints in data/: complete, loadable by transformers alone, and seeing."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from mm_agrae.grading.accuracy import verify
from mm_agrae.tasks.synthetic.task import SyntheticTask

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "data" / "warm_start"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("make", ROOT / "scripts" / "make_warm_start.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER / "vl")


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(FOLDER / "vl")


@pytest.fixture(scope="module")
def seeing():
    return AutoModelForImageTextToText.from_pretrained(FOLDER / "vl").eval()


def test_both_are_small_and_share_a_tokenizer(tokenizer) -> None:
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 12e6
    assert AutoTokenizer.from_pretrained(FOLDER / "text").get_vocab() == tokenizer.get_vocab()


def test_models_are_stock_classes_in_float32(seeing, tokenizer) -> None:
    text = AutoModelForCausalLM.from_pretrained(FOLDER / "text")
    assert type(text).__name__ == "Qwen2ForCausalLM"
    assert type(seeing).__name__ == "Qwen2_5_VLForConditionalGeneration"
    for model in (text, seeing):
        config = model.config.get_text_config()
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        assert config.hidden_size // config.num_attention_heads == 32
        assert config.vocab_size == len(tokenizer)
        assert model.generation_config.eos_token_id == tokenizer.eos_token_id
        assert model.generation_config.pad_token_id == tokenizer.pad_token_id
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_any_text_is_encoded_without_loss(tokenizer) -> None:
    @settings(max_examples=300, deadline=None)
    @given(st.text())
    def check(text: str) -> None:
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text

    check()


def test_digits_and_tags_are_single_tokens(tokenizer) -> None:
    assert tokenizer.tokenize("180-75") == ["1", "8", "0", "-", "7", "5"]
    reply = "<think>180-75=105.</think> \\boxed{105}"
    ids = tokenizer(reply + "<|im_end|>").input_ids
    assert tokenizer.tokenize(reply)[0] == "<think>"
    assert tokenizer.decode(ids, skip_special_tokens=True) == reply
    assert ids[-1] == tokenizer.eos_token_id


def test_the_chat_template_has_a_system_message_only_if_given(processor, tokenizer) -> None:
    content = [{"type": "image"}, {"type": "text", "text": "Find x."}]
    asked = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Find x.<|im_end|>\n"
    messages = [{"role": "user", "content": content}]
    render = processor.apply_chat_template
    assert render(messages, add_generation_prompt=True) == asked + "<|im_start|>assistant\n"
    told = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Find x."}]
    assert tokenizer.apply_chat_template(told, tokenize=False) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nFind x.<|im_end|>\n"
    )


def test_the_script_feeds_what_the_processor_yields(script, processor, tokenizer) -> None:
    task = SyntheticTask(size=3)
    rows = [([(task[k].question, [])], task[k].images[0]) for k in range(3)]
    mine = script.batch(rows, tokenizer, left=True)
    texts = [
        processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": task[k].question}]}],
            add_generation_prompt=True,
        )
        for k in range(3)
    ]
    theirs = processor(
        text=texts,
        images=[task[k].images[0] for k in range(3)],
        padding=True,
        return_tensors="pt",
        return_mm_token_type_ids=True,
    )
    for name in ("input_ids", "attention_mask", "image_grid_thw", "mm_token_type_ids"):
        assert torch.equal(mine[name].long(), theirs[name].long()), name
    assert torch.allclose(mine["pixel_values"], theirs["pixel_values"], atol=1e-5)


@pytest.mark.slow
def test_a_warm_start_keeps_the_format_and_leaves_room_to_learn(script, seeing, tokenizer) -> None:
    """Solves some problems and not others, and few without the image."""
    torch.manual_seed(0)
    task = SyntheticTask("test", size=48, levels=[1, 2])
    examples = [task[index] for index in range(len(task))]
    images = [example.images[0] for example in examples]
    blank = [Image.new("RGB", image.size, "white") for image in images]

    def solve(images: list) -> tuple[float, float]:
        rows = list(zip([e.question for e in examples], images, strict=True))
        replies = script.sample(seeing, tokenizer, rows, 4, 1.0)
        correct = [
            verify(example.answer, text, **example.grading)
            for example, texts in zip(examples, replies, strict=True)
            for text in texts
        ]
        formatted = [bool(script.final_answer(text)) for texts in replies for text in texts]
        return float(np.mean(correct)), float(np.mean(formatted))

    correct, formatted = solve(images)
    assert formatted > 0.9
    assert 0.2 < correct < 0.7
    assert solve(blank)[0] < 0.5 * correct


def test_text_prompts_go_through_the_vision_language_model(script, seeing, tokenizer) -> None:
    torch.manual_seed(0)
    task = SyntheticTask("test", modality="text", size=24, levels=[1])
    rows = [(task[index].question, None) for index in range(24)]
    replies = script.sample(seeing, tokenizer, rows, 2, 1.0)
    correct = [verify(task[k].answer, t, **task[k].grading) for k in range(24) for t in replies[k]]
    assert np.mean(correct) > 0.2
