"""Make the two small warm-start checkpoints from scratch: data/warm_start/vl and .../text.

    python scripts/make_warm_start.py --out data/warm_start

Both are real transformers classes, initialised at random: Qwen2_5_VLForConditionalGeneration and
Qwen2ForCausalLM, with one byte-level tokenizer for both. They learn by supervision on the training
split of the synthetic task, in four stages:

    text      the language model: sums, copying, and described problems as `teacher.py` answers them
    vision    the vision tower alone, with linear heads that tell what stands in each part of the image
    join      both together: reading the image and naming the figure
    lessons   drawn and described problems, and still some reading and naming

`python scripts/measure_warm_start.py data/warm_start/vl` measures what came out.
"""

from __future__ import annotations

import argparse
import random
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import teacher
import torch
from teacher import PICTURE_PX, Turn

from mm_agrae.model import vision_tower
from mm_agrae.model.compat import prepare
from mm_agrae.progress import Reporter
from mm_agrae.tasks.synthetic import drawing
from mm_agrae.tasks.synthetic.figures import FIGURES
from mm_agrae.tasks.synthetic.problems import KINDS, Problem
from mm_agrae.tasks.synthetic.task import FAMILIES, LEVELS, SyntheticTask

prepare()

VOCABULARY = 768
SPECIAL = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
    "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
]  # fmt: skip
# Qwen2.5's own pattern: each digit is a token, words keep their leading space.
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Qwen2.5-VL's, without its default system message and with one only if there is one.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# White is 0: with the usual statistics a line drawing is mostly a large constant, and the small
# vision tower stays at chance.
MEAN, STD = 1.0, 0.4
PATCH, MERGE = 14, 2
STAGES = ("text", "vision", "join", "lessons")
CELL = PATCH * MERGE
"""Side in pixels of the part of the image that one token stands for."""
CELLS = PICTURE_PX // CELL


def make_tokenizer(seed: int) -> Any:
    """Byte-level BPE: any text in any language is encoded without loss."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    rng = random.Random(seed)
    corpus = [teacher.NAME_IT, teacher.READ_IT, teacher.CALCULATE, teacher.REPEAT, teacher.ORDER] * 200
    for modality in ("image", "text"):
        task = SyntheticTask(modality=modality, size=4000, seed=seed)
        for index in range(len(task)):
            problem, _ = task.problem(index)
            corpus += [problem.question, problem.described, teacher.teach(problem, rng), teacher.reading(problem)]
    corpus += [figure.replace("_", " ") for figure in FIGURES] * 20
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    thinking = ["<think>", "</think>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIAL) - len(thinking),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    stripped = (text.replace("<think>", "").replace("</think>", "") for text in corpus)
    tokenizer.train_from_iterator(["system user assistant"] * 50 + list(stripped), trainer)
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    tokenizer.add_tokens([AddedToken(text, special=False) for text in thinking])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=SPECIAL[3:],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
        padding_side="left",
    )


def make_processor(tokenizer: Any) -> Any:
    from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    common = {
        "patch_size": PATCH,
        "merge_size": MERGE,
        "temporal_patch_size": 2,
        "image_mean": [MEAN] * 3,
        "image_std": [STD] * 3,
    }
    edges = {"shortest_edge": (PATCH * MERGE) ** 2, "longest_edge": 336**2}
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=edges, **common),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(size=edges, **common),
        chat_template=CHAT_TEMPLATE,
    )


def make_model(kind: str, tokenizer: Any, args: argparse.Namespace) -> Any:
    """A fresh model; heads are 32 wide, the least that vLLM supports."""
    from transformers import (
        GenerationConfig,
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2Config,
        Qwen2ForCausalLM,
    )

    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in SPECIAL}
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": args.width,
        "intermediate_size": 3 * args.width,
        "num_hidden_layers": args.layers,
        "num_attention_heads": args.width // 32,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
        "use_sliding_window": False,
    }
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    torch.manual_seed(args.seed)
    if kind == "text":
        model: Any = Qwen2ForCausalLM(Qwen2Config(**text, rope_parameters=rope))
    else:
        model = Qwen2_5_VLForConditionalGeneration(
            Qwen2_5_VLConfig(  # type: ignore[call-arg]
                text_config={**text, "rope_parameters": {**rope, "mrope_section": [4, 6, 6]}},
                vision_config={
                    "depth": args.vision_layers,
                    "hidden_size": args.vision_width,
                    "intermediate_size": 3 * args.vision_width,
                    "num_heads": args.vision_width // 32,
                    "out_hidden_size": args.width,
                    "patch_size": PATCH,
                    "spatial_merge_size": MERGE,
                    "temporal_patch_size": 2,
                    "window_size": 8 * PATCH,
                    "fullatt_block_indexes": list(range(args.vision_layers)),
                    "tokens_per_second": 2,
                },
                image_token_id=ids["<|image_pad|>"],
                video_token_id=ids["<|video_pad|>"],
                vision_start_token_id=ids["<|vision_start|>"],
                vision_end_token_id=ids["<|vision_end|>"],
                vision_token_id=ids["<|vision_pad|>"],
                tie_word_embeddings=True,
                eos_token_id=text["eos_token_id"],
                pad_token_id=text["pad_token_id"],
                bos_token_id=None,
            )
        )
        torch.manual_seed(args.seed)  # whatever the size of the vocabulary
        for layer in model.model.visual.modules():
            # By fan-in: transformers' 0.02 is far too small at this width. An image is mostly white, which is 0, and
            # its three channels are nearly alike, so the first layer's inputs are fewer than its weights.
            if isinstance(layer, torch.nn.Linear):
                torch.nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
            elif isinstance(layer, torch.nn.Conv3d):
                torch.nn.init.normal_(layer.weight, std=(layer.weight[0].numel() / 6) ** -0.5)
    model.generation_config = GenerationConfig(
        eos_token_id=text["eos_token_id"], pad_token_id=text["pad_token_id"], do_sample=True
    )
    return model


def pixels(images: Sequence[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """What the image processor returns for images of one size, many times faster."""
    array: Any = np.stack([np.asarray(image, dtype=np.float32) for image in images])
    count, height, width, _ = array.shape
    rows, columns, block = height // PATCH, width // PATCH, MERGE
    array = (array / 255 - MEAN) / STD
    array = array.transpose(0, 3, 1, 2).reshape(count, 3, rows // block, block, PATCH, columns // block, block, PATCH)
    array = array.transpose(0, 2, 5, 3, 6, 1, 4, 7)[..., None, :, :].repeat(2, axis=-3)
    patches = torch.from_numpy(array.reshape(count * rows * columns, -1))
    return patches, torch.tensor([[1, rows, columns]] * count)


def batch(rows: Sequence[tuple[Sequence[Turn], Any]], tokenizer: Any) -> dict[str, torch.Tensor]:
    """Model inputs of (turns, image) rows; `weights` on the replies alone."""
    image_id = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    lines = []
    for turns, image in rows:
        seen = ""
        if image is not None:
            tokens = (image.width // PATCH // MERGE) * (image.height // PATCH // MERGE)
            seen = f"<|vision_start|>{'<|image_pad|>' * tokens}<|vision_end|>"
        pieces: list[tuple[str, float]] = []
        for question, reply in turns:
            asked = f"<|im_start|>user\n{seen}{question}<|im_end|>\n<|im_start|>assistant\n"
            pieces += [(asked, 0.0), *reply, ("<|im_end|>", reply[-1][1]), ("\n", 0.0)]
            seen = ""
        ids, weights = [], []
        for text, weight in pieces:
            more = tokenizer(text).input_ids
            ids += more
            weights += [weight] * len(more)
        lines.append((ids, weights))
    longest = max(len(ids) for ids, _ in lines)
    tokens_BS = torch.full((len(lines), longest), tokenizer.pad_token_id)
    mask_BS, weight_BS = torch.zeros_like(tokens_BS), torch.zeros(tokens_BS.shape)
    for row, (ids, weights) in enumerate(lines):
        tokens_BS[row, : len(ids)] = torch.tensor(ids)
        weight_BS[row, : len(ids)] = torch.tensor(weights)
        mask_BS[row, : len(ids)] = 1
    inputs = {"input_ids": tokens_BS, "attention_mask": mask_BS, "weights": weight_BS}
    images = [image for _, image in rows if image is not None]
    if images:
        inputs["pixel_values"], inputs["image_grid_thw"] = pixels(images)
        inputs["mm_token_type_ids"] = (tokens_BS == image_id).int()
    return inputs


class Heads(torch.nn.Module):
    """Linear heads that tell from the image tokens what was drawn; they are dropped once the model sees.

    Learnt directly, this takes a fraction of the samples that it takes through the language model. Of each cell: the
    label whose middle lies there (its last digit, and what stands before it), the marks, the shape. Of the whole
    image: the figure and the heights of the bars.
    """

    MARKS = ("given", "asked", "right", "tick", "arrow", "corner")

    def __init__(self, width: int):
        super().__init__()
        linear = torch.nn.Linear
        self.name = linear(width, len(FIGURES))
        self.front = linear(width, 21)  # no label, "x", or 2 + the digits before the last
        self.last = linear(width, 10)
        self.marks = linear(width, len(self.MARKS))
        self.shape = linear(width, 1 + 2 * len(KINDS))
        self.bars = linear(CELLS**2 * width, 4 * 10)

    def forward(self, features: torch.Tensor, truths: Sequence[dict[str, Any]]) -> torch.Tensor:
        """The loss: `features` [images, cells, width], and for each image its truth, as `truth_of` gives it."""
        loss = features.new_zeros(())
        for key, weight in {"name": 1.0, "front": 3.0, "last": 1.0, "marks": 5.0, "shape": 1.0, "bars": 1.0}.items():
            rows = [row for row, truth in enumerate(truths) if key in truth]
            if not rows:
                continue
            head, seen = getattr(self, key), features[rows]
            truth = torch.as_tensor(np.stack([truths[row][key] for row in rows]), device=features.device)
            if key == "marks":
                loss = loss + weight * torch.nn.functional.binary_cross_entropy_with_logits(head(seen), truth)
                continue
            if key == "name":
                guess = head(seen.mean(1))
            elif key == "bars":
                guess = head(seen.flatten(1)).view(-1, 10)
            else:
                guess = head(seen).flatten(0, 1)
            truth = truth.flatten()
            if key == "front":  # most cells hold no label
                heavy = torch.where(truth > 0, 3.0, 1.0) * (truth >= 0)
                each = torch.nn.functional.cross_entropy(guess, truth, ignore_index=-100, reduction="none")
                loss = loss + weight * (each * heavy).sum() / heavy.sum()
            elif (truth >= 0).any():
                loss = loss + weight * torch.nn.functional.cross_entropy(guess, truth, ignore_index=-100)
        return loss


def truth_of(problem: Problem | None, drawn: dict[str, Any]) -> dict[str, Any]:
    """What the heads should tell of an image (of a sheet of numbers, if there is no problem)."""
    if problem is not None and problem.family == "charts":
        heights = np.zeros(4, np.int64)
        heights[: len(problem.numbers)] = problem.numbers
        return {"bars": heights}
    if problem is not None and problem.family == "counting":
        shapes = np.zeros(CELLS**2, np.int64)
        for shape in drawn["shapes"]:
            red = shape["colour"] == "red"
            shapes[cell((shape["x"], shape["y"]))] = 1 + KINDS.index(shape["kind"]) + red * len(KINDS)
        return {"shape": shapes}
    front, last = np.zeros(CELLS**2, np.int64), np.full(CELLS**2, -100)
    for text, (x0, y0, x1, y1) in drawn["labels"]:
        at = cell(((x0 + x1) / 2, (y0 + y1) / 2))
        if front[at]:  # two labels: neither is asked for
            front[at] = last[at] = -100
        else:
            front[at] = 1 if text == "x" else 2 + int(text) // 10
            last[at] = -100 if text == "x" else int(text) % 10
    if problem is None:
        return {"front": front, "last": last}
    marks = np.zeros((CELLS**2, len(Heads.MARKS)), np.float32)
    points = drawn["points"]

    def mark(name: str, point: drawing.XY) -> None:
        marks[cell(point), Heads.MARKS.index(name)] = 1

    for vertex, _, _, text in drawn["angles"]:
        mark("asked" if text == "x" else "given", points[vertex])
    for vertex, _, _ in drawn["right"]:
        mark("right", points[vertex])
    for p, q, share in [*((p, q, 0.5) for p, q in drawn["ticks"]), *drawn["arrows"]]:
        at = tuple(a + share * (b - a) for a, b in zip(points[p], points[q], strict=True))
        mark("tick" if (p, q) in drawn["ticks"] else "arrow", at)
    for segment in drawn["segments"]:
        for end in segment:
            mark("corner", points[end])
    return {"name": np.array(list(FIGURES).index(problem.figure)), "front": front, "last": last, "marks": marks}


def cell(point: drawing.XY) -> int:
    column, row = (min(CELLS - 1, max(0, int(value // CELL))) for value in point)
    return row * CELLS + column


def numbers_sheet(rng: random.Random) -> tuple[Any, dict[str, Any]]:
    """An image full of labels, for learning digits: itself and what was drawn."""
    labels: list[tuple[str, drawing.Box]] = []
    for top in range(rng.choice((6, 13)), PICTURE_PX - 9, 14):
        left = 7 * rng.randint(0, 3)
        while True:
            number = rng.choice(teacher.ANGLES) if rng.random() < 0.5 else rng.randint(0, 180)
            text = "x" if rng.random() < 0.1 else str(number)
            right = left + 7 * len(text)
            if right > PICTURE_PX:
                break
            labels.append((text, (left, top, right, top + 9)))
            left = right + 7 * rng.randint(1, 4)
    return drawing.draw_labels(labels, PICTURE_PX), {"labels": labels}


def schedule(step: int, steps: int) -> float:
    """Factor of the learning rate: short warm-up, constant, then decay to 3 %."""
    fade = max(0.0, (step - 0.4 * steps) / (0.6 * steps))
    return min(1.0, (step + 1) / 40) * (1 - 0.97 * fade)


def optimise(
    parts: Sequence[tuple[torch.nn.Module, float]],
    loss_at: Callable[[int], torch.Tensor],
    steps: int,
    title: str,
    on_step: Callable[[int], None] = lambda step: None,
) -> None:
    """Train the modules in `parts`, each with its learning rate; `loss_at(step)` is one step's loss.

    The matrices of linear layers by Muon, the rest by AdamW: after as many steps the loss on text is little more than
    half of what AdamW alone reaches.
    """
    matrices: list[dict[str, Any]] = []
    rest: list[dict[str, Any]] = []
    taken: set[int] = set()
    for module, rate in parts:  # a parameter belongs to the first module that has it
        linear = {id(layer.weight) for layer in module.modules() if isinstance(layer, torch.nn.Linear)}
        embeddings = {id(layer.weight) for layer in module.modules() if isinstance(layer, torch.nn.Embedding)}
        own = [p for p in module.parameters() if id(p) not in taken]
        taken |= {id(p) for p in own}
        for groups, chosen in (
            (matrices, [p for p in own if id(p) in linear - embeddings]),  # an embedding may be tied to the last layer
            (rest, [p for p in own if id(p) not in linear - embeddings]),
        ):
            groups.append({"params": chosen, "rate": rate})
    optimizers = [
        torch.optim.Muon(matrices, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, weight_decay=0.0, betas=(0.9, 0.98)),
    ]
    every = [p for group in matrices + rest for p in group["params"]]
    reporter, running, started = Reporter(), 0.0, time.time()
    with reporter.bars(), reporter.bar(title, steps) as advance:
        for step in range(steps):
            loss = loss_at(step)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(every, 1.0)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group["rate"] * schedule(step, steps)
                optimizer.step()
                optimizer.zero_grad()
            running = loss.item() if step == 0 else 0.98 * running + 0.02 * loss.item()
            advance(1)
            if step % 100 == 99 or step + 1 == steps:
                reporter.say(f"{title}: step {step + 1} of {steps}, loss {running:.3f}, {time.time() - started:.0f} s")
            on_step(step + 1)


class Batches:
    """Batches of rows of similar length, which need little padding; `make(index)` gives one row."""

    def __init__(self, make: Callable[[int], Any], size: int, rng: random.Random):
        self.make, self.size, self.rng = make, size, rng
        self.index, self.waiting = 0, []  # type: ignore[var-annotated]

    def next(self) -> list[Any]:
        if not self.waiting:
            rows = [self.make(self.index + k) for k in range(8 * self.size)]
            self.index += len(rows)
            rows.sort(key=lambda row: len(str(row[0])))
            self.waiting = [rows[k : k + self.size] for k in range(0, len(rows), self.size)]
            self.rng.shuffle(self.waiting)
        return self.waiting.pop()


def reply_loss(model: Any, tokenizer: Any, rows: Sequence[tuple[Sequence[Turn], Any]]) -> torch.Tensor:
    """Cross-entropy of the replies, by their weights."""
    inputs = {name: value.to(model.device) for name, value in batch(rows, tokenizer).items()}
    weight_BS = inputs.pop("weights")[:, 1:]
    said = weight_BS > 0
    hidden_BSH = model.model(**inputs, use_cache=False).last_hidden_state[:, :-1]
    losses = torch.nn.functional.cross_entropy(
        model.lm_head(hidden_BSH[said]).float(), inputs["input_ids"][:, 1:][said], reduction="none"
    )
    return (losses * weight_BS[said]).sum() / weight_BS.sum()


def all_tasks(seed: int) -> teacher.Tasks:
    return {
        (family, level): SyntheticTask(size=10**9, seed=seed, families=[family], levels=[level])
        for family in FAMILIES
        for level in LEVELS
    }


def train_text(model: Any, tokenizer: Any, args: argparse.Namespace) -> None:
    tasks, rng = all_tasks(args.seed + 1), random.Random(args.seed)
    batches = Batches(lambda index: (teacher.text_lesson(tasks, index, rng), None), args.batch, rng)
    optimise([(model, args.lr)], lambda step: reply_loss(model, tokenizer, batches.next()), args.text_steps, "text")


def train_vision(tower: Any, heads: Heads, args: argparse.Namespace) -> None:
    tasks, rng = all_tasks(args.seed + 2), random.Random(args.seed + 2)
    counts = {"geometry": args.batch, "counting": args.batch // 4, "charts": args.batch // 4}

    def loss_at(step: int) -> torch.Tensor:
        found = [
            teacher.sight_lesson(tasks[name, rng.choice(list(LEVELS))], step * count + k, rng)[1:]
            for name, count in counts.items()
            for k in range(count)
        ]
        found += [(None, *numbers_sheet(rng)) for _ in range(args.batch // 2)]
        patches, grid = pixels([image for _, image, _ in found])
        device = heads.name.weight.device
        features = tower(patches.to(device), grid_thw=grid.to(device)).pooler_output
        truths = [truth_of(problem, drawn) for problem, _, drawn in found]
        return heads(features.view(len(found), CELLS**2, -1), truths)

    optimise([(tower, args.lr), (heads, args.lr)], loss_at, args.vision_steps, "vision")


def train_join(
    model: Any, tokenizer: Any, heads: Heads, args: argparse.Namespace, on_step: Callable[[int], None]
) -> None:
    """Reading and naming through the language model; the heads keep helping, and text keeps from forgetting it."""
    tasks, rng = all_tasks(args.seed + 3), random.Random(args.seed + 3)

    def lesson(index: int) -> tuple[Any, ...]:
        if rng.random() < 0.3:
            return teacher.text_lesson(tasks, index, rng), None, None, {}
        return teacher.sight_lesson(teacher.any_task(tasks, rng), index, rng)

    batches = Batches(lesson, args.batch, rng)
    seen: list[torch.Tensor] = []
    hook = model.model.visual.register_forward_hook(lambda *called: seen.append(called[-1].pooler_output))

    def loss_at(step: int) -> torch.Tensor:
        rows = batches.next()
        loss = reply_loss(model, tokenizer, [(turns, image) for turns, _, image, _ in rows])
        truths = [truth_of(problem, drawn) for _, problem, _, drawn in rows if problem is not None]
        if not truths:
            return loss
        return loss + 0.3 * heads(seen.pop().view(len(truths), CELLS**2, -1), truths)

    rates = [(model.model.visual, args.lr / 2), (heads, args.lr / 2), (model, args.lr)]
    optimise(rates, loss_at, args.join_steps, "join", on_step)
    hook.remove()


def train_lessons(model: Any, tokenizer: Any, args: argparse.Namespace, on_step: Callable[[int], None]) -> None:
    tasks, rng = all_tasks(args.seed + 4), random.Random(args.seed + 4)

    def lesson(index: int) -> tuple[list[Turn], Any]:
        kind = rng.random()
        if kind < 0.2:
            return teacher.text_lesson(tasks, index, rng), None
        if kind < 0.5:
            turns, _, image, _ = teacher.sight_lesson(teacher.any_task(tasks, rng), index, rng)
            return turns, image
        return teacher.image_lesson(teacher.any_task(tasks, rng), index, rng)

    batches = Batches(lesson, args.batch, rng)
    rates = [(model.model.visual, args.lr / 4), (model, args.lr / 2)]
    optimise(rates, lambda step: reply_loss(model, tokenizer, batches.next()), args.lesson_steps, "lessons", on_step)


def save(model: Any, processor: Any, folder: Path) -> None:
    """Save in half precision to keep it small; the config says float32, as which it is loaded."""
    from safetensors.torch import load_file, save_file

    fresh = folder.with_name(folder.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    model.save_pretrained(fresh)
    processor.save_pretrained(fresh)
    weights = fresh / "model.safetensors"
    halved = {name: tensor.half() for name, tensor in load_file(weights).items()}
    save_file(halved, weights, metadata={"format": "pt"})
    shutil.rmtree(folder, ignore_errors=True)
    fresh.rename(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("data/warm_start"))
    parser.add_argument(
        "--stages", nargs="+", choices=STAGES, default=STAGES, help="each needs those before it in --out"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="threads of the CPU")
    parser.add_argument("--text-steps", type=int, default=3500)
    parser.add_argument("--vision-steps", type=int, default=1000)
    parser.add_argument("--join-steps", type=int, default=2500)
    parser.add_argument("--lesson-steps", type=int, default=3000)
    parser.add_argument("--save-every", type=int, default=500)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vision-width", type=int, default=128)
    parser.add_argument("--vision-layers", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(args.seed)
    processor = make_processor(tokenizer)
    text, vl = (make_model(kind, tokenizer, args).to(args.device) for kind in ("text", "vl"))
    vision_tower.install(vl, torch.float32, torch.device(args.device))
    tower, heads = vl.model.visual, Heads(args.width).to(args.device)
    for name, module in (("text", text), ("vl", vl), ("vision tower", tower)):
        print(f"{name}: {sum(p.numel() for p in module.parameters()) / 1e6:.2f} M parameters")

    def save_vl(step: int, steps: int) -> None:
        if step % args.save_every == 0 or step == steps:
            save(vl, processor, args.out / "vl")

    between = args.out / "between.pt"
    """The vision tower and the heads, from one stage to the next."""
    if "text" in args.stages:
        train_text(text, tokenizer, args)
        save(text, tokenizer, args.out / "text")
    if "vision" in args.stages:
        train_vision(tower, heads, args)
        torch.save((tower.state_dict(), heads.state_dict()), between)
    if "join" in args.stages:
        # As larger models are made: a language model, a vision tower, then both together.
        text = type(text).from_pretrained(args.out / "text")
        vl.model.language_model.load_state_dict(text.model.state_dict())
        for module, state in zip((tower, heads), torch.load(between), strict=True):
            module.load_state_dict(state)
        train_join(vl, tokenizer, heads, args, lambda step: save_vl(step, args.join_steps))
        between.unlink()
    elif "lessons" in args.stages:
        vl.load_state_dict(type(vl).from_pretrained(args.out / "vl").state_dict())
    if "lessons" in args.stages:
        train_lessons(vl, tokenizer, args, lambda step: save_vl(step, args.lesson_steps))


if __name__ == "__main__":
    main()
