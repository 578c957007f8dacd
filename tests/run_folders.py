"""Run folders for tests that show them, written by the package's own writers."""

from pathlib import Path

import numpy as np
from PIL import Image

from mm_agrae.evaluation.statistics import summarise
from mm_agrae.run.folder import RunFolder
from mm_agrae.run.records import RolloutRecord, SampleRecord

HOSTILE = (
    "<script>window.broken=1</script><img src=x onerror='window.broken=2'>"
    "</pre></details><style>*{display:none}</style>${window.broken=3}{{broken}}&lt;b&gt;"
)
CONFIG = "model: {path: m}\ntrain: {steps: 40}\nadvantage: {rule: agrae}\n"


def noise_image(seed: int, size: int = 24) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def metrics(step: int) -> dict[str, float]:
    return {
        "step": step,
        "reward/mean": 0.01 * step,
        "reward/accuracy": 0.02 * step,
        "success/mean": 0.015 * step,
        "advantage/omega": 0.012 * step,
        "policy/entropy": 1 / step,
        "groups/all_incorrect": 0.5,
        "groups/mixed": 0.25 + 0.001 * step,
        "groups/all_correct": 0.25 - 0.001 * step,
        "completions/mean_tokens": 20.0 + step,
        "completions/correct": 3.0 * step,
        "completions/truncated": 0.0,
        "update/grad_norm": 1.0 + step,
    }


def rollouts(
    run: RunFolder, step: int, groups: int = 4, size: int = 4, *, text: str = "so it is", image: bool = True, **special
) -> list[RolloutRecord]:
    """Group p has p correct completions of `size`, modulo size + 1.

    special: name of a field -> {(prompt, completion): value}.
    """
    shown = (run.store_image(noise_image(step)),) if image else ()
    records = []
    for prompt in range(groups):
        for index in range(size):
            correct = index < prompt % (size + 1)
            values = {
                "step": step,
                "prompt_index": prompt,
                "completion_index": index,
                "example_id": f"example {prompt}",
                "question": f"<image> Question {prompt}?",
                "prompt_text": "prompt",
                "answer": f"gold {prompt}",
                "completion": f"<think>{text} {step}.{prompt}.{index}</think> \\boxed{{{index}}}",
                "tokens": 9,
                "finish_reason": "stop",
                "reward": float(correct),
                "success": correct,
                "images": shown,
                "parts": {"accuracy": float(correct), "format": 1.0},
                "error": "",
                "advantage_before": 1.5 if correct else -0.5,
                "advantage_sample_level": 1.25 if correct else -0.75,
                "advantage": (0.75 if correct else -0.25) * (prompt % 5),
                "entropy": 0.25,
            }
            for name, cells in special.items():
                values[name] = cells.get((prompt, index), values.get(name))
            values = {name: value for name, value in values.items() if value is not None}
            records.append(RolloutRecord(**values))
    return records


def train(run: RunFolder, steps, **settings) -> None:
    """Log these steps and keep their rollouts."""
    for step in steps:
        run.append_metrics(metrics(step))
        run.write_rollouts(step, rollouts(run, step, **settings))


def make_run(path: Path, steps=(), **settings) -> RunFolder:
    run = RunFolder(path).create(CONFIG, {"torch": "2"})
    train(run, steps, **settings)
    return run


def evaluate(
    run: RunFolder,
    name: str,
    solved,
    samples: int = 4,
    label: str = "test",
    text: str = "so",
    full: bool = False,
    meta=None,
    parts=None,
) -> None:
    """`solved`: for each problem, how many of its samples are correct.

    full: with greedy completions, entropies and two levels of problems. meta: of each problem.
    parts: name of a reward part -> its value for each problem.
    """
    correct = np.arange(samples)[None] < np.array(solved)[:, None]
    length = np.full(correct.shape, 12)
    greedy, entropy = (correct[:, 0], length / 30) if full else (None, None)
    meta = meta or [{"level": i % 2} if full else {} for i in range(len(solved))]
    parts = {part: np.array(values, dtype=float) for part, values in (parts or {}).items()}
    tables = {part: np.broadcast_to(values[:, None], correct.shape) for part, values in parts.items()}
    result = summarise(name, label, correct, greedy, length, ~correct, entropy, meta, 3.0, 99, 50, parts=tables)
    image = run.store_image(noise_image(1))
    run.write_evaluation(
        result,
        [
            SampleRecord(
                *(f"problem {i}", j, f"<image> Question {i}?", f"gold {i}"),
                f"<think>{text} of {name}</think> {i}/{j}",
                *(bool(correct[i, j]), 12, "stop", (image,)),
                meta=meta[i],
                parts={part: float(values[i]) for part, values in parts.items() if np.isfinite(values[i])},
            )
            for i in range(len(solved))
            for j in range(samples)
        ],
    )
