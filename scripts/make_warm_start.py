"""Make the two small warm-start checkpoints from scratch: data/warm_start/vl and .../text.

    python scripts/make_warm_start.py --out data/warm_start

Both are real transformers classes, initialised at random: Qwen2_5_VLForConditionalGeneration and
Qwen2ForCausalLM, with one byte-level tokenizer for both. Supervised learning on the training split
of the synthetic task and on bare sums teaches them to write

    <think>Given 70, 40. Exterior angle: 70+40=110.</think> \\boxed{110}

The teacher reads and calculates correctly but is deliberately unsure of the rule: it uses the
correct one with a probability that differs by figure (`SKILL`) and otherwise one of a few incorrect
ones. So the checkpoint mostly calculates correctly and mostly chooses badly, which leaves something
to learn for reinforcement learning. At the end the script measures pass@1 and pass@16 on the test
split, and pass@1 with the image blanked or swapped for another problem's, which shows how much is
guessing.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import random
import re
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mm_agrae.model.compat import prepare
from mm_agrae.tasks.synthetic.figures import FIGURES, derive
from mm_agrae.tasks.synthetic.problems import KINDS, Problem
from mm_agrae.tasks.synthetic.task import FAMILIES, SyntheticTask

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
STAGES = ("text", "vision", "join")

SKILL = {1: (0.35, 0.7), 2: (0.25, 0.6), 3: (0.08, 0.35), 4: (0.15, 0.5)}
"""Level -> range of the probability that the teacher uses the correct rule, over figures."""
BLUNDERS = {
    ("side", 2): ("Two equal sides: s=2*b, a-s", "Rest: a-b", "Rectangle: a/2"),
    ("x", 3): ("Triangle: s=a+b, 180-s", "Exterior angle: a+b", "Full turn: s=a+b+c, 360-s"),
}
"""What is asked, how many numbers are given -> incorrect rules besides those of other figures."""
NAME_IT, READ_IT = "Name the figure.", "Read the picture."
CALCULATE, REPEAT = "Calculate.", "Repeat"

Turn = tuple[str, list[tuple[str, float]]]
"""A question and its reply, in pieces with their weights in the loss."""


def skill(figure: str, level: int) -> float:
    """A fixed number for each figure and level, spread evenly over the level's range."""
    low, high = SKILL[level]
    digest = hashlib.sha256(f"{figure}/{level}".encode()).digest()
    return low + (high - low) * int.from_bytes(digest[:4], "big") / 2**32


def mistakes(problem: Problem) -> list[tuple[str, str]]:
    """Derivations and answers by incorrect rules, in an order that depends on the figure."""
    figure = FIGURES[problem.figure]
    kind = (figure.asks, figure.arity)
    rules = [other.ways[0] for other in FIGURES.values() if (other.asks, other.arity) == kind]
    given = ", ".join(map(str, problem.numbers))
    wrong = {}
    for rule in (*rules, *BLUNDERS.get(kind, ())):
        derived = derive(rule, problem.numbers)
        if derived and str(derived[1]) != problem.answer and derived[1] < 360:
            taste = hashlib.sha256(f"{figure.name}/{rule}".encode()).hexdigest()
            wrong[taste] = (f"Given {given}. {derived[0]}", str(derived[1]))
    return [wrong[taste] for taste in sorted(wrong)]


def teach(problem: Problem, rng: random.Random) -> str:
    """A reply with reasoning by the unsure teacher."""
    way, answer = rng.choice(problem.ways), problem.answer
    if problem.family == "geometry" and rng.random() > skill(problem.figure, problem.level):
        wrong = mistakes(problem)
        if wrong:
            way, answer = rng.choices(wrong, [0.6**k for k in range(len(wrong))])[0]
    return f"<think>{way}</think> \\boxed{{{answer}}}"


def reading(problem: Problem) -> str:
    """The numbers in the image, whatever the question."""
    if problem.family == "counting":
        return ", ".join(f"{kind}s {n}" for kind, n in zip(KINDS, problem.numbers, strict=True))
    if problem.family == "charts":
        bars = zip("ABCD", problem.numbers, strict=False)
        return ", ".join(f"{name} {value}" for name, value in bars)
    hidden = int(FIGURES[problem.figure].asks == "side")  # The perimeter is in the question.
    return ", ".join(map(str, problem.numbers[hidden:]))


def naming(problem: Problem) -> str:
    return problem.figure.replace("_", " ")


def drill(rng: random.Random) -> Turn:
    """Copying numbers, or calculating with them; only what follows "=" has weight in the loss.

    The numbers are all that figures can have, in bare sums without a figure: problems of the test
    split stay unseen, but their numbers do not.
    """
    if rng.random() < 0.3:
        most = rng.choice((12, 180))
        numbers = ", ".join(str(rng.randint(0, most)) for _ in range(rng.randint(1, 6)))
        return f"{REPEAT} {numbers}.", [(numbers, 1.0)]
    pieces: list[tuple[str, float]] = []
    while len(pieces) < 24:
        if rng.random() < 0.25:
            a, b = rng.randint(0, 24), rng.randint(0, 12)
            found = [f"{a}+{b}={a + b}"] if a < b or rng.random() < 0.5 else [f"{a}-{b}={a - b}"]
        else:
            figure = rng.choice(list(FIGURES.values()))
            rules = figure.ways + BLUNDERS.get((figure.asks, figure.arity), ())
            derived = derive(rng.choice(rules), rng.choice(every_number(figure.name)))
            found = re.findall(r"\d[\d+*/-]*[+*/-]\d+=\d+", derived[0]) if derived else []
        for equation in found:
            left, _, right = equation.partition("=")
            pieces += [(f"{left}=", 0.0), (right, 1.0), (", ", 0.0)]
    return CALCULATE, pieces[:-1]


@functools.cache
def every_number(figure: str) -> list[tuple[int, ...]]:
    return list(FIGURES[figure].numbers(5))


def lesson(task: SyntheticTask, index: int, rng: random.Random, images: float) -> tuple[list[Turn], Any]:
    """One conversation and its image (or None).

    Naming and reading, of which the teacher is sure, train vision; they share a conversation with
    the problem, so that the image is encoded once for all of them.
    """
    problem, state = task.problem(index)
    if rng.random() > images:
        if rng.random() < 0.5:
            return [drill(rng)], None
        return [(problem.described, [(teach(problem, rng), 1.0)])], None
    image, _ = problem.draw(state, 112)
    turns: list[Turn] = [(READ_IT, [(reading(problem), 1.0)])]
    if problem.family == "geometry":
        turns.append((NAME_IT, [(naming(problem), 4.0)]))
    if rng.random() > 0.2:
        turns = turns[:0] if rng.random() < 0.5 else turns[-1:]
        turns.append((problem.question, [(teach(problem, rng), 1.0)]))
        rng.shuffle(turns)
    return turns, image


def make_tokenizer(seed: int) -> Any:
    """Byte-level BPE: any text in any language is encoded without loss."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    rng = random.Random(seed)
    corpus = [NAME_IT, READ_IT, CALCULATE, REPEAT] * 200
    for modality in ("image", "text"):
        task = SyntheticTask(modality=modality, size=4000, seed=seed)
        for index in range(len(task)):
            problem, _ = task.problem(index)
            corpus += [problem.question, problem.described, teach(problem, rng), reading(problem)]
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


def batch(rows: Sequence[tuple[Sequence[Turn], Any]], tokenizer: Any, left: bool = False) -> dict[str, torch.Tensor]:
    """Model inputs of (turns, image) rows; `weights` on the replies alone.

    With `left`, the last reply is left open and the rows are padded on the left.
    """
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
            end = [] if left else [("<|im_end|>", reply[-1][1]), ("\n", 0.0)]
            pieces += [(asked, 0.0), *reply, *end]
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
        at = slice(longest - len(ids), longest) if left else slice(0, len(ids))
        tokens_BS[row, at] = torch.tensor(ids)
        weight_BS[row, at] = torch.tensor(weights)
        mask_BS[row, at] = 1
    inputs = {"input_ids": tokens_BS, "attention_mask": mask_BS}
    images = [image for _, image in rows if image is not None]
    if images:
        inputs["pixel_values"], inputs["image_grid_thw"] = pixels(images)
        inputs["mm_token_type_ids"] = (tokens_BS == image_id).int()
    if not left:
        inputs["weights"] = weight_BS
    return inputs


def vision_accuracy(model: Any, tokenizer: Any, problems: int = 64) -> str:
    """How often images of the test split are named and read correctly, greedily."""
    task = SyntheticTask("test", size=problems, seed=5)
    score: dict[str, list[bool]] = defaultdict(list)
    for ask, truth in ((NAME_IT, naming), (READ_IT, reading)):
        chosen = [task.problem(index)[0] for index in range(problems)]
        rows = [(ask, task[index].images[0]) for index in range(problems)]
        for problem, texts in zip(chosen, sample(model, tokenizer, rows, 1, 0.0), strict=True):
            if ask == READ_IT or problem.family == "geometry":
                score[f"{ask} {problem.family}"].append(texts[0] == truth(problem))
    model.train()
    return ", ".join(f"{name} {np.mean(hits):.2f}" for name, hits in score.items())


def schedule(step: int, steps: int) -> float:
    """Factor of the learning rate: short warm-up, constant, then decay to 3 %."""
    fade = max(0.0, (step - 0.4 * steps) / (0.6 * steps))
    return min(1.0, (step + 1) / 40) * (1 - 0.97 * fade)


def train(model: Any, processor: Any, args: argparse.Namespace, steps: int, images: float, folder: Path) -> None:
    """AdamW over fresh samples, a share `images` of them with a image."""
    tokenizer = getattr(processor, "tokenizer", processor)
    task = SyntheticTask(size=10**9, seed=args.seed + 1)
    decay = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}], lr=args.lr, betas=(0.9, 0.98)
    )
    model.train()
    rng = random.Random(args.seed)
    started, index, running = time.time(), 0, 0.0
    waiting: list[Any] = []
    for step in range(steps):
        if not waiting:  # Rows of similar length share a batch: less padding.
            rows = [lesson(task, index + k, rng, images) for k in range(8 * args.batch)]
            index += len(rows)
            rows.sort(key=lambda row: len(str(row[0])))
            waiting = [rows[k : k + args.batch] for k in range(0, len(rows), args.batch)]
            rng.shuffle(waiting)
        inputs = batch(waiting.pop(), tokenizer)
        weight_BS = inputs.pop("weights")[:, 1:]
        logits_BSV = model(**inputs, use_cache=False).logits[:, :-1]
        said = weight_BS > 0
        losses = torch.nn.functional.cross_entropy(
            logits_BSV[said], inputs["input_ids"][:, 1:][said], reduction="none"
        )
        loss = (losses * weight_BS[said]).sum() / weight_BS.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * schedule(step, steps)
        optimizer.step()
        optimizer.zero_grad()
        running = loss.item() if step == 0 else 0.98 * running + 0.02 * loss.item()
        if step % 10 == 9 or step + 1 == steps:
            progress(step + 1, steps, started, f"loss {running:.3f}")
        if step % args.save_every == args.save_every - 1 or step + 1 == steps:
            if images:
                print(f"\nstep {step + 1}: {vision_accuracy(model, tokenizer)}", flush=True)
            save(model, processor, folder)


def train_vision(tower: Any, width: int, args: argparse.Namespace) -> None:
    """Train the vision tower alone, with linear heads that are discarded afterwards.

    They predict, from the features that the language model will get: the figure's name and its
    numbers (from the mean over the image), the shape in each of the 4 x 4 fields (from that field's
    feature) and the heights of the bars (from all features). Learnt directly, this takes a fraction
    of the samples that it takes through the language model.
    """
    names = {name: index for index, name in enumerate(FIGURES)}
    heads = torch.nn.ModuleDict(
        {
            "name": torch.nn.Linear(width, len(names)),
            "numbers": torch.nn.Linear(width, 160),
            "field": torch.nn.Linear(width, 1 + 2 * len(KINDS)),
            "bars": torch.nn.Linear(16 * width, 4 * 10),
        }
    )
    params = [*tower.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(params, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.02)
    tasks = {name: SyntheticTask(size=10**9, seed=args.seed + 2, families=[name]) for name in FAMILIES}
    loss_of = torch.nn.functional.cross_entropy
    started, running = time.time(), 0.0
    accuracy: dict[str, float] = defaultdict(float)
    for step in range(args.vision_steps):
        share = {"geometry": args.batch, "counting": args.batch // 8, "charts": args.batch // 8}
        rows = {name: [tasks[name].problem(step * count + k) for k in range(count)] for name, count in share.items()}
        drawn = {name: [problem.draw(state, 112) for problem, state in part] for name, part in rows.items()}
        patches, grid = pixels([image for part in drawn.values() for image, _ in part])
        features = tower(patches, grid_thw=grid).pooler_output.view(len(grid), 16, width)
        geometry, counting, charts = features.split(list(share.values()))
        name = torch.tensor([names[problem.figure] for problem, _ in rows["geometry"]])
        numbers = torch.zeros(args.batch, 160)
        for row, (problem, _) in enumerate(rows["geometry"]):
            numbers[row, [int(n) for n in reading(problem).split(", ")]] = 1
        field = torch.zeros(share["counting"], 16, dtype=torch.long)
        for row, (_, facts) in enumerate(drawn["counting"]):
            for shape in facts["shapes"]:
                at = int(shape["y"] // 28) * 4 + int(shape["x"] // 28)
                red = shape["colour"] == "red"
                field[row, at] = 1 + KINDS.index(shape["kind"]) + red * len(KINDS)
        bars = torch.zeros(share["charts"], 4, dtype=torch.long)
        for row, (problem, _) in enumerate(rows["charts"]):
            bars[row, : len(problem.numbers)] = torch.tensor(problem.numbers)
        said = {
            "name": (heads["name"](geometry.mean(1)), name),
            "field": (heads["field"](counting).flatten(0, 1), field.flatten()),
            "bars": (heads["bars"](charts.flatten(1)).view(-1, 10), bars.flatten()),
        }
        loss = sum(loss_of(guess, truth) for guess, truth in said.values())
        guess = heads["numbers"](geometry.mean(1))
        loss = loss + 20 * torch.nn.functional.binary_cross_entropy_with_logits(guess, numbers)
        optimizer.param_groups[0]["lr"] = args.lr * schedule(step, args.vision_steps)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        for key, (guess, truth) in said.items():
            correct = (guess.argmax(-1) == truth).float().mean().item()
            accuracy[key] = 0.97 * accuracy[key] + 0.03 * correct
        running = loss.item() if step == 0 else 0.97 * running + 0.03 * loss.item()
        if step % 20 == 19 or step + 1 == args.vision_steps:
            note = ", ".join(f"{key} {value:.2f}" for key, value in accuracy.items())
            progress(step + 1, args.vision_steps, started, f"loss {running:.2f}, accuracy: {note}")


def progress(done: int, total: int, started: float, note: str) -> None:
    filled = int(30 * done / total)
    spent = time.time() - started
    left = spent / done * (total - done)
    end = "\n" if done == total else ""
    sys.stderr.write(
        f"\r[{'#' * filled}{'.' * (30 - filled)}] {done}/{total} {note}, {spent:.0f} s, {left:.0f} s left  {end}"
    )
    sys.stderr.flush()


@torch.no_grad()
def sample(
    model: Any, tokenizer: Any, rows: Sequence[tuple[str, Any]], samples: int, temperature: float
) -> list[list[str]]:
    """`samples` replies to each (question, image)."""
    model.eval()
    replies: list[list[str]] = []
    stride = max(1, 128 // samples)
    for at in range(0, len(rows), stride):
        part: list[Any] = [([(question, [])], image) for question, image in rows[at : at + stride]]
        repeated = [row for row in part for _ in range(samples)]
        inputs = batch(repeated, tokenizer, left=True)
        out = model.generate(
            **inputs, do_sample=temperature > 0, temperature=temperature or 1.0, top_k=0, top_p=1.0, max_new_tokens=64
        )
        texts = tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        replies += [texts[k * samples : (k + 1) * samples] for k in range(len(part))]
    return replies


def final_answer(reply: str) -> str:
    """The content of the last box after the thinking, "" if the format is not followed."""
    thinking, _, rest = reply.partition("</think>")
    if not thinking.startswith("<think>") or "\\boxed{" not in rest:
        return ""
    return rest.rpartition("\\boxed{")[2].partition("}")[0].strip()


def measure(model: Any, tokenizer: Any, modality: str, problems: int, samples: int) -> None:
    """Print pass@1 and pass@k by family, level and figure, and without the image."""
    from PIL import Image

    task = SyntheticTask("test", modality=modality, size=problems)
    examples = [task[index] for index in range(problems)]
    images: list[Any] = [e.images[0] if e.images else None for e in examples]
    started = time.time()

    def solve(images: Sequence[Any], samples: int) -> tuple[list[list[str]], np.ndarray]:
        rows = list(zip((e.question for e in examples), images, strict=True))
        replies = sample(model, tokenizer, rows, samples, 1.0)
        correct = [
            [final_answer(text) == example.answer for text in texts]
            for example, texts in zip(examples, replies, strict=True)
        ]
        return replies, np.array(correct)

    replies, correct = solve(images, samples)
    groups: dict[str, list[int]] = defaultdict(list)
    for row, example in enumerate(examples):
        meta = example.meta
        groups["all"].append(row)
        groups[f"{meta['family']}, level {meta['level']}"].append(row)
        if meta["family"] == "geometry":
            groups[f"  {meta['figure']}"].append(row)
    texts = [text for row in replies for text in row]
    length = [len(tokenizer(text).input_ids) + 1 for text in texts]
    formed = np.mean([bool(final_answer(text)) for text in texts])
    print(f"{modality}: {problems} test problems x {samples}, {time.time() - started:.0f} s")
    print(f"  format followed {formed:.3f}, tokens {np.mean(length):.1f} (most {max(length)})")
    for name, rows in sorted(groups.items()):
        one, many = correct[rows].mean(), correct[rows].any(1).mean()
        print(f"  {name:26s} n {len(rows):4d}  pass@1 {one:.3f}  pass@{samples} {many:.3f}")
    eight = correct[:, :8].mean(1)
    none, every = (eight == 0).mean(), (eight == 1).mean()
    print(f"  groups of 8: none correct {none:.2f}, all correct {every:.2f}")
    if modality == "image":
        blank = Image.new("RGB", images[0].size, "white")
        for name, others in (("blank", [blank] * problems), ("swapped", images[1:] + images[:1])):
            print(f"  image {name}: pass@1 {solve(others, 4)[1].mean():.3f}")


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
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--text-steps", type=int, default=1600)
    parser.add_argument("--vision-steps", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--save-every", type=int, default=300)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vision-width", type=int, default=96)
    parser.add_argument("--vision-layers", type=int, default=2)
    parser.add_argument("--problems", type=int, default=300, help="test problems at the end")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(args.seed)
    processor = make_processor(tokenizer)
    text, vl = (make_model(kind, tokenizer, args) for kind in ("text", "vl"))
    for name, model in (("text", text), ("vl", vl), ("vision tower", vl.model.visual)):
        print(f"{name}: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters")
    if "text" in args.stages:
        train(text, tokenizer, args, args.text_steps, 0.0, args.out / "text")
        measure(text, tokenizer, "text", args.problems, args.samples)
    tower = args.out / "vision.pt"
    if "vision" in args.stages:
        train_vision(vl.model.visual, args.width, args)
        torch.save(vl.model.visual.state_dict(), tower)
    if "join" in args.stages:
        # As larger models are made: a language model, a vision tower, then both together.
        text = type(text).from_pretrained(args.out / "text")
        vl.model.language_model.load_state_dict(text.model.state_dict())
        vl.model.visual.load_state_dict(torch.load(tower))
        train(vl, processor, args, args.steps, 0.75, args.out / "vl")
        tower.unlink()
        for modality in ("text", "image"):
            measure(vl, tokenizer, modality, args.problems, args.samples)


if __name__ == "__main__":
    main()
