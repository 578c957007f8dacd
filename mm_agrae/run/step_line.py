"""The line that a run prints after each step, the legend that explains it, and what it prints at its end."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mm_agrae.progress import Reporter

# fmt: off
ENTRIES: dict[str, tuple[str, Callable[[Mapping[str, float]], str]]] = {
    "reward": ("mean reward", lambda v: f"{v['reward/mean']:.3f}"),
    "correct": ("share of completions whose answer is correct", lambda v: f"{v['success/mean']:6.1%}"),
    "ω": ("A-GRAE's: when low, easy groups weigh more, when high, hard ones", lambda v: f"{v['advantage/omega']:.2f}"),
    "mixed": ("share of groups with correct and incorrect answers", lambda v: f"{v['groups/mixed']:4.0%}"),
    "entropy": ("how varied completions are, in nats per token", lambda v: f"{v['policy/entropy']:.3f}"),
    "tokens": ("mean length of a completion", lambda v: f"{v['completions/mean_tokens']:.0f}"),
    "truncated": ("share cut off at rollout.max_new_tokens", lambda v: f"{v['completions/truncated']:4.0%}"),
    "|g|": ("norm of the gradient before clipping; at 0 nothing is learned", lambda v: f"{v['update/grad_norm']:.2f}"),
    "time": ("of the whole step", lambda v: f"{v['seconds/total']:.1f} s"),
    "GPU": ("where there is one: the most memory allocated on it so far",
            lambda v: f"{v['memory/peak_gpu_mb'] / 1024:.1f} GiB" if "memory/peak_gpu_mb" in v else ""),
    "reward errors": ("if any: completions that a reward part failed on",
                      lambda v: f"{v['reward/errors']:.0f}" if v["reward/errors"] else ""),
}
# fmt: on
"""What each figure means, and its text from the metrics of a step; one without text is left out."""


def step_line(values: Mapping[str, float], step: int, total_steps: int) -> str:
    """What a person wants to know of a step, from its metrics."""
    shown = ((name, text(values)) for name, (_, text) in ENTRIES.items())
    start = f"step {step:{len(str(total_steps))}}/{total_steps}"
    return "  ".join([start, *(f"{name} {text}" for name, text in shown if text)])


def legend() -> str:
    """What each figure means, one a line."""
    lines = (f"  {name:14} {meaning}" for name, (meaning, _) in ENTRIES.items())
    return "\n".join(["the line of a step (docs/warnings.md explains the warnings):", *lines])


def show_summary(reporter: Reporter, summary: Mapping[str, Any]) -> None:
    """The end of a run, from its summary: pass@k, what fell, seconds, memory."""
    table = summary["pass_at_k"]
    if not table:
        return
    ks = sorted({int(k) for values in table.values() for k in values})

    def cell(name: str, k: int) -> str:
        value = table.get(name, {}).get(k)
        return f"{value['mean']:.1%} [{value['low']:.1%}, {value['high']:.1%}]" if value else "-"

    reporter.table(
        "pass@k, 95 % interval over problems",
        ["k", *table],
        [[str(k), *(cell(name, k) for name in table)] for k in ks],
    )
    if (fallen := summary["families_fallen"]) is not None:
        changes = (
            f"{name} {100 * x:+.1f} points at pass@{k}" for name, by_k in fallen.items() for k, x in by_k.items()
        )
        reporter.say(f"fell        {', '.join(changes) or 'no family of problems'}")
    stages = "  ".join(f"{name} {value:.0f}" for name, value in summary["seconds"].items())
    reporter.say(f"seconds     {stages}")
    reporter.say(f"peak memory {summary['peak_memory_mb']:.0f} MB")
