"""Example -> Prompt: placeholders match features, positions of pictures, refusals by row."""

import pytest
import torch
from helpers import TEXT, VL, examples, processing
from PIL import Image

from mm_agrae.config import PromptSection
from mm_agrae.errors import DataError, ModelError
from mm_agrae.processing import Processing
from mm_agrae.types import Example


def picture(width=112, height=112):
    return Image.new("RGB", (width, height), "white")


def test_one_placeholder_for_each_feature():
    made = processing(VL)
    for size in [(112, 112), (224, 84), (57, 300)]:
        prompt = made.prompt(Example("a", "What is it?", "1", images=(picture(*size),)))
        merge = made.processor.image_processor.merge_size**2
        features = int(prompt.image_grid_thw.prod(-1).sum()) // merge
        assert int((prompt.token_ids == made.image_token_id).sum()) == features
        assert int(prompt.mm_token_type_ids.sum()) == features
        assert prompt.pixel_values.shape[0] == features * merge


def test_pictures_stand_where_the_markers_are():
    made = processing(VL)
    example = Example("a", "first <image> second <image> third", "1", (picture(), picture(56, 56)))
    text = made.prompt(example).text
    order = [
        text.index("first"),
        text.index("<|image_pad|>"),
        text.index("second"),
        text.rindex("<|image_pad|>"),
        text.index("third"),
    ]
    assert order == sorted(order)
    assert "<image>" not in text
    assert len(made.prompt(example).image_grid_thw) == 2


def test_pixel_budget():
    wide = Example("a", "?", "1", images=(picture(800, 600),))
    small = Processing(VL, PromptSection(max_pixels=112 * 112, max_tokens=4096)).prompt(wide)
    large = Processing(VL, PromptSection(max_pixels=448 * 448, max_tokens=4096)).prompt(wide)
    assert len(small) < len(large)
    assert small.images[0].width * small.images[0].height <= 112 * 112


def test_system_prompt_and_instruction():
    made = Processing(TEXT, PromptSection(system="Be brief.", instruction="Box the answer."))
    text = made.prompt(Example("a", "1+1?", "2")).text
    assert text.index("Be brief.") < text.index("1+1?\nBox the answer.")


def test_decoding_gives_the_text_back():
    made = processing(TEXT)
    for text in ["<think>70+40=110</think>\n\\boxed{110}", "Größe ≥ 3 ∠ABC 漢字 🙂"]:
        assert made.decode(made.tokenizer(text)["input_ids"]) == text


def test_special_ids():
    for path in (VL, TEXT):
        made = processing(path)
        ids = made.tokenizer.convert_tokens_to_ids(["<|image_pad|>", "<|video_pad|>"])
        assert set(ids) <= set(made.forbidden_ids)
        assert not set(made.forbidden_ids) & set(made.eos_ids)


@pytest.mark.parametrize(
    ("path", "example", "expected"),
    [
        (
            TEXT,
            Example("a", "?", "1", (picture(),), origin="d.jsonl row 3"),
            "d.jsonl row 3: has an image, but the model",
        ),
        (VL, Example("a", "<image> <image>", "1", (picture(),), origin="r7"), "r7: 2 <image> mark"),
        (VL, Example("a", "x <|image_pad|>", "1", (picture(),), origin="r8"), "control token"),
        (TEXT, Example("a", "x" * 5000, "1", origin="r9"), "more than prompt.max_tokens = 1024"),
        (VL, Example("a", "?", "1", (b"not an image",), origin="r10"), "r10"),
        (VL, Example("a", "?", "1", (picture(4000, 12),), origin="r11"), "r11"),
    ],
)
def test_refusals_name_the_row(path, example, expected):
    with pytest.raises(DataError) as error:
        processing(path).prompt(example)
    assert expected in str(error.value)


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(ModelError, match=r"model\.path"):
        Processing(str(tmp_path), PromptSection())


def test_the_same_example_gives_the_same_tensors():
    example = examples(VL, 1)[0]
    first, second = processing(VL).prompt(example), processing(VL).prompt(example)
    assert torch.equal(first.token_ids, second.token_ids)
    assert torch.equal(first.pixel_values, second.pixel_values)
