"""Whole training steps (rollout, reward, update): ours against TRL's GRPOTrainer.

Both train the same model on the same images and questions with the same reward function, in
turn in one process: `Trainer.step` here, `GRPOTrainer.training_step` and the optimiser there.
Reported are

    times     median of TRL's CPU time a step / median of ours (all threads and worker processes)
    memory    peak above the two models at rest, ours / TRL's

    python scripts/benchmark_step.py                # an image of 196 tokens, 64 new tokens
    python scripts/benchmark_step.py --quickstart   # the embedded model, trained by both and graded

With --quickstart both take as many steps as the quickstart config says, under the rule `grpo`,
and are then evaluated by the same code on the same problems.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import itertools
import json
import logging
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import psutil
import torch

from mm_agrae import config as configs
from mm_agrae.config import Config
from mm_agrae.model.compat import prepare
from mm_agrae.progress import Reporter
from mm_agrae.tasks import load_all

ROOT = Path(__file__).resolve().parents[1]
WARM_START = ROOT / "data" / "warm_start" / "vl"
VOCABULARY = 4096
IMAGE_PIXELS = 392 * 392
"""196 image tokens at patch size 14 and merge size 2."""


def main() -> None:
    options = parse()
    prepare()
    work = Path(tempfile.mkdtemp(prefix="benchmark-step-"))
    try:
        report = (quickstart if options.quickstart else large)(options, work)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    out = Path(options.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1))
    print(f"written: {out}")


def large(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """A model of tens of millions of parameters with random weights, a few steps."""
    model = random_model(work / "model", options.layers, options.hidden)
    config = step_config(work / "run", model, options)
    ours, theirs = our_steps(config), trl_steps(config, work / "trl")
    for run in (theirs, ours):  # the first step of each builds caches and the optimiser's state
        run()
    rows: dict[str, list[dict[str, float]]] = {"trl": [], "ours": []}
    for _ in range(options.steps):
        for name, run in (("trl", theirs), ("ours", ours)):
            rows[name].append(measure(run))
            print(name, {key: round(value, 3) for key, value in rows[name][-1].items()}, flush=True)
    return summary(rows)


def quickstart(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """The embedded model trained to the end by both, then graded by the same evaluation."""
    from mm_agrae.trainer import Trainer

    overrides = [f"run_dir={work / 'run'}", "advantage={rule: grpo}", *options.overrides]
    config = configs.load(ROOT / "configs" / "quickstart.yaml", overrides)
    steps = config.train.steps
    assert steps is not None
    trainer = Trainer(config, Reporter(enabled=False))
    ours = our_steps(config, trainer)
    theirs = trl_steps(config, work / "trl")
    before = grade(config, str(config.model.path), work / "before")
    rows: dict[str, list[dict[str, float]]] = {"trl": [], "ours": []}
    for step in range(steps):
        for name, run in (("trl", theirs), ("ours", ours)):
            rows[name].append(measure(run, memory=False))
        if (step + 1) % 10 == 0:
            seconds = {name: sum(row["seconds"] for row in rows[name]) for name in rows}
            print(f"step {step + 1}: CPU-seconds so far {seconds}", flush=True)
    report = summary(rows)
    trainer.processing.save(str(work / "ours"))
    trainer.policy.hf.save_pretrained(work / "ours")
    trainer.processing.save(str(work / "theirs"))
    theirs.model.save_pretrained(work / "theirs")  # type: ignore[attr-defined]
    for folder in ("ours", "theirs"):
        shutil.copy(WARM_START / "generation_config.json", work / folder)
    report["pass@1"] = {
        "before": before,
        "trl": grade(config, str(work / "theirs"), work / "graded-trl"),
        "ours": grade(config, str(work / "ours"), work / "graded-ours"),
    }
    print("pass@1", report["pass@1"])
    return report


def summary(rows: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    report: dict[str, Any] = {"rows": rows}
    for key in rows["ours"][0]:
        middle = {name: statistics.median(row[key] for row in rows[name]) for name in rows}
        report[key] = middle | {"trl/ours": middle["trl"] / middle["ours"]}
        print(f"{key}: TRL {middle['trl']:.2f}, ours {middle['ours']:.2f}, "
              f"ours is {middle['ours'] / middle['trl']:.2f} of TRL's")  # fmt: skip
    return report


# ------------------------------------------------------------------------------- both sides


def random_model(folder: Path, layers: int, hidden: int) -> str:
    """The embedded model's family and processor at another size, with random weights."""
    import transformers

    torch.manual_seed(0)
    config: Any = transformers.AutoConfig.from_pretrained(WARM_START)
    text, vision = config.text_config, config.vision_config
    heads = hidden // 64
    text.update({
        "hidden_size": hidden, "intermediate_size": 4 * hidden, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": heads // 2, "vocab_size": VOCABULARY,
        "layer_types": ["full_attention"] * layers,
    })  # fmt: skip
    text.rope_parameters = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]}
    vision.update({
        "hidden_size": 320, "intermediate_size": 864, "depth": 7, "num_heads": 5,
        "out_hidden_size": hidden, "fullatt_block_indexes": [3, 6],
    })  # fmt: skip
    model = transformers.AutoModelForImageTextToText.from_config(config)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.0f} M parameters")
    shutil.copytree(WARM_START, folder, ignore=shutil.ignore_patterns("model*", "config.json"))
    model.save_pretrained(folder)
    return str(folder)


def step_config(run_dir: Path, model: str, options: argparse.Namespace) -> Config:
    source = {"task": "synthetic", "split": "train"}
    return configs.parse({
        "run_dir": str(run_dir),
        "model": {"path": model, "device": "cpu"},
        "data": {"train": [source]},
        "prompt": {"system": SYSTEM, "min_pixels": IMAGE_PIXELS, "max_pixels": IMAGE_PIXELS},
        "train": {"steps": 10_000},
        "rollout": {
            "prompts_per_step": options.prompts,
            "completions_per_prompt": options.group,
            "max_new_tokens": options.new_tokens,
        },
        # A rule and weights under which no group of these random completions is left out.
        "advantage": {"rule": "grpo"},
        "reward": {"parts": {"accuracy": 0.0, f"{Path(__file__).resolve()}:some_reward": 1.0}},
        "update": {"learning_rate": 1e-6, "micro_batch_completions": 1024},
        "log": {"rollouts": False},
    })  # fmt: skip


SYSTEM = "Think step by step about the image, then give the final answer in \\boxed{}."


def some_reward(example: Any, completion: Any) -> float:
    """Differs among the completions of a group, as it does where there is something to learn."""
    return (sum(map(ord, completion.text)) % 7) / 7


def our_steps(config: Config, trainer: Any = None) -> Callable[[], None]:
    from mm_agrae.rewards import Rewarder
    from mm_agrae.trainer import Trainer

    trainer = trainer or Trainer(config, Reporter(enabled=False))
    trainer.run.create(configs.dump(config), {}, resume=True)
    trainer.collector.rewarder = Rewarder(config.reward, config.rollout.max_new_tokens)

    def step() -> None:
        trainer.step()

    return step


def trl_steps(config: Config, folder: Path) -> Callable[[], None]:
    """TRL's trainer on the same rows; a call takes one step."""
    import transformers
    from datasets import Dataset, Features, Image, List, Value
    from trl import GRPOConfig, GRPOTrainer

    from mm_agrae.config.plugins import load_object
    from mm_agrae.rewards import PARTS
    from mm_agrae.types import Completion

    processor: Any = transformers.AutoProcessor.from_pretrained(config.model.path)
    if config.prompt.min_pixels:
        size = {"shortest_edge": config.prompt.min_pixels, "longest_edge": config.prompt.max_pixels}
        processor.image_processor.size = size
    task = load_all(config.data.train)
    rollout = config.rollout
    count = min(len(task), rollout.prompts_per_step * (config.train.steps or 1), 512)
    examples = [task[index] for index in range(count)]
    rows = []
    for index, example in enumerate(examples):
        question = example.question
        if config.prompt.instruction:
            question = f"{question}\n{config.prompt.instruction}"
        messages = [{"role": "user", "content": question}]
        if config.prompt.system:
            messages.insert(0, {"role": "system", "content": config.prompt.system})
        rows.append({"prompt": messages, "images": list(example.images), "index": index})
    features = Features({
        "prompt": [{"role": Value("string"), "content": Value("string")}],
        "images": List(Image()),
        "index": Value("int64"),
    })  # fmt: skip
    parts = [(weight, PARTS.get(name) or load_object(name)) for name, weight in config.reward.parts.items() if weight]

    def reward(completions: list[Any], index: list[int], **_: Any) -> list[float]:
        values = []
        for completion, row in zip(completions, index, strict=True):
            made = Completion((), (), completion[0]["content"], "stop", 0)
            values.append(sum(weight * part(examples[row], made) for weight, part in parts))
        return values

    update = config.update
    completions = rollout.prompts_per_step * rollout.completions_per_prompt
    arguments = GRPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=completions,
        num_generations=rollout.completions_per_prompt,
        max_completion_length=rollout.max_new_tokens,
        temperature=rollout.temperature,
        loss_type="grpo",
        beta=update.kl_coef,
        learning_rate=update.learning_rate,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=update.warmup_steps,
        max_grad_norm=update.max_grad_norm,
        max_steps=config.train.steps or 1,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        disable_tqdm=True,
        seed=config.train.seed,
    )
    model: Any = transformers.AutoModelForImageTextToText.from_pretrained(config.model.path, dtype=torch.float32)
    trainer: Any = GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=arguments,
        train_dataset=Dataset.from_list(rows, features=features),
        processing_class=processor,
    )
    trainer.create_optimizer_and_scheduler(arguments.max_steps)
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    batches = itertools.chain.from_iterable(trainer.get_train_dataloader() for _ in itertools.count())

    compute_loss = trainer._compute_loss

    def check_and_compute(model: Any, inputs: dict[str, Any]) -> Any:
        """Both sides must see the same prompts and images."""
        from mm_agrae.model.processing import Processing

        processing = Processing(config.model.path, config.prompt)
        shown = {tuple(processing.prompt(example).token_ids.tolist()) for example in examples}
        pairs = zip(inputs["prompt_ids"], inputs["prompt_mask"], strict=True)
        if strange := [ids for ids, mask in pairs if tuple(ids[mask.bool()].tolist()) not in shown]:
            raise RuntimeError(f"TRL's prompt of {len(strange[0])} tokens is none of ours")
        print(f"prompts of {int(inputs['prompt_mask'].sum(-1).float().mean())} tokens on both sides")
        trainer._compute_loss = compute_loss
        return compute_loss(model, inputs)

    trainer._compute_loss = check_and_compute

    def step() -> None:
        loss_inputs = next(batches)
        trainer.training_step(trainer.model, loss_inputs, completions)
        torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), arguments.max_grad_norm)
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
        trainer.model.zero_grad()
        trainer.state.global_step += 1

    step.model = trainer.model  # type: ignore[attr-defined]
    return step


def grade(config: Config, model: str, out: Path) -> float:
    """pass@1 on the config's first evaluation set."""
    from mm_agrae.evaluation.evaluate import evaluate_checkpoints
    from mm_agrae.run.folder import RunFolder

    evaluate_checkpoints([model], [model], config, out)
    return RunFolder(out).read_evaluations()[0].pass_at_k[1].mean


# ------------------------------------------------------------------------------ measurement


def measure(run: Callable[[], None], memory: bool = True) -> dict[str, float]:
    """CPU seconds of all threads and worker processes, wall seconds, and peak memory in MB."""
    gc.collect()
    if memory:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    wall, cpu = time.perf_counter(), cpu_seconds()
    run()
    row = {"seconds": cpu_seconds() - cpu, "wall": time.perf_counter() - wall}
    if memory:
        row["memory"] = (resident("VmHWM") - before) / 1024
    return row


def cpu_seconds() -> float:
    here = psutil.Process()
    times = [here.cpu_times(), *(child.cpu_times() for child in here.children(recursive=True))]
    return sum(each.user + each.system for each in times)


def resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1])
    raise RuntimeError(f"no {field} in /proc/self/status: peak memory is read on Linux only")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quickstart", action="store_true")
    parser.add_argument("--steps", type=int, default=3, help="measured steps of each")
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--out", default="runs/benchmark_step.json")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="with --quickstart")
    return parser.parse_args()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    main()
