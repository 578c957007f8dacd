"""The two small checkpoints in data/: complete, loadable by transformers alone, and seeing."""

from __future__ import annotations

import importlib
import random
import subprocess
import sys
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, VL, equations_hold
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from mm_agrae import config as configs
from mm_agrae.evaluation.evaluate import build_engine
from mm_agrae.grading.accuracy import verify
from mm_agrae.tasks.synthetic.problems import split_of
from mm_agrae.tasks.synthetic.task import SyntheticTask

FOLDER = Path(VL).parent


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(ROOT / "scripts"))
    return importlib.import_module("make_warm_start")


@pytest.fixture(scope="module")
def teacher(script):
    return importlib.import_module("teacher")


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
    rows = [([(task[k].question, [("", 1.0)])], task[k].images[0]) for k in range(3)]
    mine = script.batch(rows, tokenizer)
    for k in range(3):
        content = [{"type": "image"}, {"type": "text", "text": task[k].question}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        theirs = processor(text=[text], images=[task[k].images[0]], return_tensors="pt", return_mm_token_type_ids=True)
        prompt = theirs["input_ids"].shape[1]
        for name in ("input_ids", "mm_token_type_ids"):
            assert torch.equal(mine[name][k, :prompt].long(), theirs[name][0].long()), name
        assert mine["weights"][k].sum() == 1  # the end of the empty reply
        assert mine["weights"][k, prompt] == 1
        assert torch.equal(mine["image_grid_thw"][k], theirs["image_grid_thw"][0])
        each = len(theirs["pixel_values"])
        assert torch.allclose(mine["pixel_values"][k * each : (k + 1) * each], theirs["pixel_values"], atol=1e-5)


def test_every_mistake_is_a_true_calculation_with_another_answer(teacher) -> None:
    task = SyntheticTask(size=3000, seed=11)
    without = 0
    for index in range(len(task)):
        problem, _ = task.problem(index)
        wrong = teacher.mistakes(problem)
        without += not wrong
        for way, answer in wrong:
            assert answer != problem.answer
            assert way not in problem.ways
            equations_hold(way)
    assert without < 0.005 * len(task)  # such as all shapes red


def test_the_teacher_uses_the_correct_rule_as_often_as_it_should(teacher) -> None:
    rng = random.Random(0)
    task = SyntheticTask(size=6000, seed=12)
    taught: dict[str, list[bool]] = defaultdict(list)
    for index in range(len(task)):
        problem, _ = task.problem(index)
        reply = teacher.teach(problem, rng)
        taught[teacher.kind_of(problem)].append(any(f"<think>{way}<" in reply for way in problem.ways))
    assert set(teacher.RARE) < set(taught)
    for kind, correct in taught.items():
        expected = teacher.skill(kind)
        error = (expected * (1 - expected) / len(correct)) ** 0.5
        assert abs(np.mean(correct) - expected) < 4.5 * error, kind


def test_relabelled_figures_show_numbers_of_the_training_split(teacher) -> None:
    task = SyntheticTask(size=10**9, seed=13, families=["geometry"])
    rng = random.Random(0)
    for index in range(600):
        _, problem, _, drawn = teacher.sight_lesson(task, index, rng, relabel=1.0)
        shown = teacher.reading(problem).split(", ")
        assert sorted(shown) == sorted(text for text, _ in drawn["labels"] if text != "x")
        assert split_of("geometry", map(int, shown)) == "train"


def test_the_heads_are_told_what_was_drawn(script, teacher) -> None:
    """The label in each cell, found by its place in the image."""
    _, drawn = script.numbers_sheet(random.Random(3))
    truth = script.truth_of(None, drawn)
    told = []
    for front, last in zip(truth["front"], truth["last"], strict=True):
        if front == 1:
            told.append("x")
        elif front > 1:
            told.append(str(10 * (front - 2) + last))
    assert told
    assert not Counter(told) - Counter(text for text, _ in drawn["labels"])
    task = SyntheticTask(size=50, families=["counting"])
    for index in range(50):
        problem, rng = task.problem(index)
        _, drawn = problem.draw(rng, 112)
        shapes = [int(v) for v in script.truth_of(problem, drawn)["shape"] if v]
        assert [sum((v - 1) % 3 == k for v in shapes) for k in range(3)] == list(problem.numbers)


@pytest.fixture(scope="module")
def sighted():
    """The processing and the engine that a run would use."""
    processing, _, engine = build_engine(configs.load(str(ROOT / "configs" / "quickstart.yaml")), str(FOLDER / "vl"))
    return processing, engine


def ask(sighted, examples, count, temperature) -> list[list[str]]:
    processing, engine = sighted
    sampling = configs.SamplingSection(temperature=temperature, max_new_tokens=64)
    groups = engine.generate([processing.prompt(e) for e in examples], count, sampling, range(len(examples)))
    return [[completion.text for completion in group] for group in groups]


@pytest.mark.parametrize("question", ["NAME_IT", "READ_IT"])
def test_the_warm_start_sees(sighted, teacher, question) -> None:
    """Held-out images; the figures measured by scripts/measure_warm_start.py are higher, these are floors."""
    task = SyntheticTask("test", size=80, seed=21, families=["geometry"] if question == "NAME_IT" else None)
    problems = [task.problem(index)[0] for index in range(len(task))]
    truths = [(teacher.naming if question == "NAME_IT" else teacher.reading)(problem) for problem in problems]
    examples = [replace(task[k], question=getattr(teacher, question)) for k in range(len(task))]
    blank = [replace(e, images=(Image.new("RGB", e.images[0].size, "white"),)) for e in examples]

    def share(examples) -> float:
        said = ask(sighted, examples, 1, 0.0)
        return float(np.mean([texts[0] == truth for texts, truth in zip(said, truths, strict=True)]))

    assert share(examples) > 0.85
    assert share(blank) < 0.2


@pytest.mark.parametrize("modality", ["image", "text"])
def test_a_warm_start_keeps_the_format_and_leaves_room_to_learn(sighted, modality) -> None:
    """Solves some problems and not others, whether they are drawn or told."""
    task = SyntheticTask("test", modality, size=48, seed=22)
    examples = [task[index] for index in range(len(task))]
    replies = ask(sighted, examples, 4, 1.0)
    correct = [
        verify(example.answer, text, **example.grading)
        for example, texts in zip(examples, replies, strict=True)
        for text in texts
    ]
    formed = [text.startswith("<think>") and "</think> \\boxed{" in text for texts in replies for text in texts]
    assert np.mean(formed) > 0.95
    assert 0.15 < np.mean(correct) < 0.6


def test_sight_and_policy_are_measured(tmp_path) -> None:
    command = [sys.executable, "scripts/measure_warm_start.py", VL, "--pictures", "24", "--problems", "6"]
    run = subprocess.run([*command, "--samples", "16"], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    for line in ("names the figure", "reads all of counting", "pass@16", "have two valid rules"):
        assert line in run.stdout
    assert "pass@256" not in run.stdout


def test_every_stage_of_making_a_warm_start_runs(tmp_path) -> None:
    stages = [f"--{stage}-steps=2" for stage in ("text", "vision", "join", "lesson")]
    command = [sys.executable, "scripts/make_warm_start.py", "--out", str(tmp_path), "--batch", "4", *stages]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"text", "vl"}
    made = AutoModelForImageTextToText.from_pretrained(tmp_path / "vl")
    assert sum(p.numel() for p in made.parameters()) < 6e6
