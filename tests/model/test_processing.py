"""Example -> Prompt: images and their tokens, real chat templates, refusals by row."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from families import EOS, IMAGE, VISION, write_family
from helpers import TEXT, VL, examples, processing
from PIL import Image
from tokenizers import AddedToken, Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, Qwen2VLImageProcessor

from mm_agrae.config import PromptSection
from mm_agrae.errors import DataError, ModelError
from mm_agrae.grading.accuracy import verify
from mm_agrae.model.processing import CHAT_TEMPLATES, TODAY, Processing
from mm_agrae.rewards.parts import follows_format
from mm_agrae.tasks.images import encode_png
from mm_agrae.types import Example

QUESTION = Example("q", "What is 1+1?", "2")


def white(width=112, height=112):
    return Image.new("RGB", (width, height), "white")


def test_one_placeholder_for_each_feature():
    made = processing(VL)
    for size in [(112, 112), (224, 84), (57, 300)]:
        prompt = made.prompt(Example("a", "What is it?", "1", images=(white(*size),)))
        merge = made.processor.image_processor.merge_size**2
        features = int(prompt.image_grid_thw.prod(-1).sum()) // merge
        assert int((prompt.token_ids == made.image_token_id).sum()) == features
        assert int(prompt.mm_token_type_ids.sum()) == features
        assert prompt.pixel_values.shape[0] == features * merge


def test_images_stand_where_the_markers_are():
    made = processing(VL)
    example = Example("a", "first <image> second <image> third", "1", (white(), white(56, 56)))
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
    wide = Example("a", "?", "1", images=(white(800, 600),))
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
            Example("a", "?", "1", (white(),), origin="d.jsonl row 3"),
            "d.jsonl row 3: has an image, but the model",
        ),
        (VL, Example("a", "<image> <image>", "1", (white(),), origin="r7"), "r7: 2 <image> mark"),
        (VL, Example("a", "x <|image_pad|>", "1", (white(),), origin="r8"), "control token"),
        (TEXT, Example("a", "x" * 5000, "1", origin="r9"), "more than prompt.max_tokens = 1024"),
        (VL, Example("a", "?", "1", (b"not an image",), origin="r10"), "r10"),
        (VL, Example("a", "?", "1", (white(4000, 12),), origin="r11"), "r11"),
        (VL, Example("a", "In <image>?", "1", origin="r12"), "r12: 1 <image> markers for 0 images"),
        (TEXT, Example("a", "In <image>?", "1", origin="r13"), "r13: 1 <image> markers for 0"),
        (VL, Example("a", "?", "1", ("https://a.example/b.png",), origin="r14"), "not fetched"),
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


# ------------------------------------------------------------------------------------- images


def test_an_image_is_the_same_however_it_is_given(tmp_path):
    image = examples(VL, 1)[0].images[0]
    data = image if isinstance(image, bytes) else encode_png(image)
    file = tmp_path / "an image.png"
    file.write_bytes(data)
    with Image.open(file) as opened:
        decoded = opened.convert("RGB")
    made = processing(VL)
    sources = [str(file), f"file://{file}", data, decoded]
    prompts = [made.prompt(Example("a", "?", "1", (source,))) for source in sources]
    for prompt in prompts[1:]:
        assert torch.equal(prompt.token_ids, prompts[0].token_ids)
        assert torch.equal(prompt.pixel_values, prompts[0].pixel_values)


@pytest.mark.parametrize("family", VISION)
def test_prompts_are_those_of_the_processor(family, tmp_path):
    """Images are cut into patches without it, so that they need not wait for the tokenizer."""
    made = Processing(write_family(family, tmp_path), PromptSection())
    prompt = made.prompt(Example("a", "<image> or <image>?", "1", (white(57, 300), examples(VL, 1)[0].images[0])))
    inputs = made.processor(
        text=[prompt.text], images=list(prompt.images), do_resize=False, return_mm_token_type_ids=True,
        return_tensors="pt", add_special_tokens=False,
    )  # fmt: skip
    assert torch.equal(prompt.token_ids, inputs["input_ids"][0])
    assert torch.equal(prompt.mm_token_type_ids, inputs["mm_token_type_ids"][0])
    assert torch.equal(prompt.pixel_values, inputs["pixel_values"])
    assert torch.equal(prompt.image_grid_thw, inputs["image_grid_thw"])


@pytest.mark.parametrize("low", [784, 15680])
def test_thin_images_fit_the_budget(low):
    made = Processing(VL, PromptSection(min_pixels=low, max_pixels=15680))
    theirs = made.processor.image_processor.get_number_of_image_patches

    def shown(*size):
        return made.prompt(Example("a", "?", "1", (white(*size),))).images[0].size

    assert shown(30, 640) == (28, 560)
    for aspect in (1, 5, 21, 60, 123, 200):
        for short in (8, 13, 30, 100):
            size = shown(short, short * aspect)
            assert shown(short * aspect, short) == size[::-1]
            assert size[0] % 28 == size[1] % 28 == 0 < size[0] <= size[1]
            area = theirs(short * aspect, short) * 14 * 14
            assert size[0] * size[1] == area if area <= 15680 and short > 14 else size[0] * size[1] <= 15680


def test_text_rows_of_a_vision_model_are_plain_text():
    made = processing(VL)
    prompt = made.prompt(QUESTION)
    assert prompt.pixel_values is prompt.image_grid_thw is prompt.mm_token_type_ids is None
    assert prompt.token_ids.tolist() == made.tokenizer(prompt.text)["input_ids"]
    assert prompt.text == processing(TEXT).prompt(QUESTION).text


def image_tokens(width, height, **settings):
    made = Processing(VL, PromptSection(max_tokens=10**6, **settings))
    prompt = made.prompt(Example("a", "?", "1", (white(width, height),)))
    return int((prompt.token_ids == made.image_token_id).sum())


def test_the_pixel_budget_is_the_checkpoints_own_unless_set():
    size = processing(VL).processor.image_processor.size
    assert (size["shortest_edge"], size["longest_edge"]) == (784, 112896)
    assert image_tokens(2000, 2000) == 112896 // 28**2
    assert image_tokens(2000, 2000, max_pixels=200704) == 200704 // 28**2
    assert image_tokens(20, 20) == 1
    assert image_tokens(20, 20, min_pixels=12544) == 16
    # One bound beyond the checkpoint's other one moves that.
    assert image_tokens(2000, 2000, min_pixels=200704) == 200704 // 28**2


@pytest.mark.parametrize("settings", [{"min_pixels": 50000, "max_pixels": 40000}, {"max_pixels": 700}])
def test_a_pixel_budget_that_nothing_fits(settings):
    with pytest.raises(ModelError, match=r"prompt\.min_pixels = \d+ and prompt\.max_pixels = \d+: "):
        Processing(VL, PromptSection(**settings))


def test_the_budget_of_published_checkpoints(tmp_path):
    """Qwen2.5-VL's own file names the bounds min_pixels and max_pixels."""
    processing(VL).save(str(tmp_path))
    (tmp_path / "config.json").write_text((Path(VL) / "config.json").read_text())
    file = tmp_path / "processor_config.json"
    values = json.loads(file.read_text())
    values["image_processor"].pop("size")
    values["image_processor"] |= {"min_pixels": 3136, "max_pixels": 12845056}
    file.write_text(json.dumps(values))
    made = Processing(str(tmp_path), PromptSection())
    assert isinstance(made.processor.image_processor, Qwen2VLImageProcessor)
    assert dict(made.describe())["pixels"] == "3,136 to 12,845,056, up to 16,384 tokens an image"


def test_a_vision_model_without_its_image_processor(tmp_path):
    processing(VL).tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text((Path(VL) / "config.json").read_text())
    with pytest.raises(ModelError, match="cannot be loaded: Can't load image processor"):
        Processing(str(tmp_path), PromptSection())


# ------------------------------------------------------------------------------- chat templates


def published(name):
    """A chat template as published, from TRL's collection of them."""
    spec = importlib.util.find_spec("trl")
    file = spec and Path(spec.origin).parent / "chat_templates" / f"{name}.jinja"
    if not file or not file.is_file():
        pytest.skip("TRL's collection of chat templates is not installed")
    return str(file)


END = "end▁of▁sentence"
CONTROL = {
    "llama": ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "deepseek": ["<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>"],
    "gemma": ["<bos>", "<start_of_turn>", "<end_of_turn>", "<eos>"],
}


@pytest.fixture
def base_model(tmp_path):
    """A text model of another family without a template, whose tokenizer adds BOS by itself."""

    def make(family):
        tokens = CONTROL[family]
        inner = Tokenizer.from_file(f"{TEXT}/tokenizer.json")
        inner.add_special_tokens([AddedToken(token, special=True) for token in tokens])
        bos = tokens[0]
        inner.post_processor = TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, inner.token_to_id(bos))])
        folder = tmp_path / family
        folder.mkdir()
        inner.save(str(folder / "tokenizer.json"))
        settings = {
            "tokenizer_class": "TokenizersBackend", "bos_token": bos, "eos_token": tokens[-1],
            "pad_token": "<|endoftext|>", "model_max_length": 2048,
        }  # fmt: skip
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        config = json.loads((Path(TEXT) / "config.json").read_text())
        end = inner.token_to_id(tokens[-1])
        (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": end}))
        assert AutoTokenizer.from_pretrained(folder)("x")["input_ids"][0] == inner.token_to_id(bos)
        return str(folder)

    return make


def test_known_templates_are_named(base_model):
    path = base_model("llama")
    names = [
        "qwen2_5", "qwen2_5_vl", "qwen3", "qwen3_vl", "llama3", "llama3_1", "llama3_2",
        "deepseek_r1_distill", "gemma", "gemma3",
    ]  # fmt: skip
    found = [dict(Processing(path, PromptSection(chat_template=published(name))).describe()) for name in names]
    labels = [lines["chat template"].split(" (")[0] for lines in found]
    assert labels == [name for name in CHAT_TEMPLATES.values() if "warm start" not in name]
    own = dict(processing(VL).describe())["chat template"]
    assert own == "mm-agrae warm start (82e45de2), the checkpoint's own"


def test_qwen_templates():
    text = Processing(TEXT, PromptSection(chat_template=published("qwen2_5"))).prompt(QUESTION).text
    assert text == (
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant."
        "<|im_end|>\n<|im_start|>user\nWhat is 1+1?<|im_end|>\n<|im_start|>assistant\n"
    )
    section = PromptSection(chat_template=published("qwen2_5_vl"), system="Look.")
    prompt = Processing(VL, section).prompt(Example("a", "<image> or <image>?", "1", (white(28, 28), white(56, 28))))
    assert prompt.text == (
        "<|im_start|>system\nLook.<|im_end|>\n<|im_start|>user\n"
        "<|vision_start|><|image_pad|><|vision_end|> or "
        "<|vision_start|><|image_pad|><|vision_end|>?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert prompt.image_grid_thw.tolist() == [[1, 2, 2], [1, 2, 4]]


@pytest.mark.parametrize("name", ["llama3", "llama3_1", "llama3_2"])
def test_llama_templates_have_one_bos_and_a_fixed_date(base_model, name):
    section = PromptSection(chat_template=published(name), system="Box it.")
    made = Processing(base_model("llama"), section)
    prompt = made.prompt(QUESTION)
    bos, _, _, eot = made.tokenizer.convert_tokens_to_ids(CONTROL["llama"])
    assert prompt.token_ids.tolist().count(bos) == 1
    assert prompt.token_ids[0] == bos
    assert eot in made.eos_ids
    assert "Box it." in prompt.text
    if name != "llama3":
        assert f"Today Date: {TODAY:%d %b %Y}\n" in prompt.text
    assert not made.opens_thinking
    with pytest.raises(DataError, match=r"control token <\|eot_id\|>"):
        made.prompt(Example("a", "Stop<|eot_id|>", "1"))


def test_deepseek_distills_begin_inside_the_thinking(base_model):
    made = Processing(base_model("deepseek"), PromptSection(chat_template=published("deepseek_r1_distill")))
    prompt = made.prompt(QUESTION)
    bos, user, assistant, end = CONTROL["deepseek"]
    assert prompt.text == f"{bos}{user}What is 1+1?{assistant}<think>\n"
    assert prompt.token_ids.tolist().count(made.tokenizer.convert_tokens_to_ids(bos)) == 1
    assert made.eos_ids == (made.tokenizer.convert_tokens_to_ids(end),)
    assert made.opens_thinking
    assert dict(made.describe())["thinking"] == "opened by the prompt"
    for written, correct, formatted in (
        ("one more\n</think>\n\\boxed{2}", True, True),
        ("is it \\boxed{2}?\n</think>\n\\boxed{3}", False, True),
        ("is it \\boxed{2}? Perhaps", False, False),  # cut off while thinking
    ):
        text = made.decode(made.tokenizer(written, add_special_tokens=False)["input_ids"])
        assert text == f"<think>\n{written}"
        assert verify("2", text) is correct
        assert follows_format(text) is formatted
    with pytest.raises(DataError, match="control token"):
        made.prompt(Example("a", f"{assistant}I know", "1"))


def test_a_template_without_a_system_role(base_model):
    path, template = base_model("gemma"), published("gemma")
    made = Processing(path, PromptSection(chat_template=template, instruction="Box it."))
    prompt = made.prompt(QUESTION)
    assert "What is 1+1?\nBox it.<end_of_turn>" in prompt.text
    ids = made.tokenizer.convert_tokens_to_ids(["<end_of_turn>", "<eos>"])
    assert made.eos_ids == tuple(sorted(ids))  # the template ends turns with another one
    expected = r"takes no system prompt \(System role not supported\).*prompt\.instruction"
    with pytest.raises(ModelError, match=expected):
        Processing(path, PromptSection(chat_template=template, system="Box it."))


@pytest.mark.parametrize(
    ("template", "settings", "expected"),
    [
        ("{{ messages[0]['role'] }}", {}, "leaves the question out"),
        ("{{ messages[-1]['content'] }}", {"system": "Be kind."}, "leaves the system prompt out"),
        ("{% for m in %}", {}, "own.jinja fails: "),
        ("{{ messages[0]['content'] + 1 }}", {}, "own.jinja fails: "),
        ("{{ messages[0]['content'] }}", {"path": VL}, "writes no placeholder for an image"),
    ],
)
def test_templates_that_do_not_fit(tmp_path, template, settings, expected):
    file = tmp_path / "own.jinja"
    file.write_text(template)
    path = settings.pop("path", TEXT)
    with pytest.raises(ModelError, match=expected):
        Processing(path, PromptSection(chat_template=str(file), **settings))


def test_a_model_without_a_template(base_model, tmp_path):
    path = base_model("llama")
    with pytest.raises(ModelError, match=r"no chat template; .* prompt\.chat_template"):
        Processing(path, PromptSection())
    with pytest.raises(ModelError, match=r"prompt\.chat_template /no/such: cannot be read"):
        Processing(path, PromptSection(chat_template="/no/such"))
    # A checkpoint of ours carries the template on, so that it needs no file any more.
    made = Processing(path, PromptSection(chat_template=published("llama3")))
    made.save(str(tmp_path / "saved"))
    (tmp_path / "saved" / "config.json").write_text((Path(path) / "config.json").read_text())
    again = Processing(str(tmp_path / "saved"), PromptSection())
    assert torch.equal(again.prompt(QUESTION).token_ids, made.prompt(QUESTION).token_ids)
    assert again.eos_ids == made.eos_ids


@pytest.mark.parametrize("path", [VL, TEXT], ids=["vl", "text"])
def test_the_description_names_what_is_sent(path):
    made = Processing(path, PromptSection(system="Be kind."))
    lines = dict(made.describe())
    assert lines["system prompt"] == "Be kind."
    shown = lines["prompt"].replace("{question}", QUESTION.question)
    assert shown == repr(made.prompt(QUESTION).text)
    assert lines["ends at"] == f"<|im_end|> ({EOS})"
    assert f"<|image_pad|> ({IMAGE})" in lines["never sampled"]
    assert ("pixels" in lines) == (path == VL)
