"""Writes the table of docs/recipes.md: each recipe on each machine, whether it fits, and how long a step may take.

    python scripts/recipe_table.py

Memory is doctor's estimate, for the parallel mode that the launch scripts choose. Seconds come from a roofline and
assumed efficiencies, the constants below; no run stands behind them. They order recipes and find the slow stage, and
may be wrong by a factor of two.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mm_agrae import config as configs
from mm_agrae.config import Config
from mm_agrae.doctor import parallel_strategy
from mm_agrae.model.memory import Verdict, judge
from mm_agrae.model.size import ModelSize, find_model_config, measure

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs" / "recipes.md"
BEGIN, END = "<!-- scripts/recipe_table.py writes this table -->\n", "<!-- end of the table -->"
PAPER = sorted((ROOT / "configs" / "paper").glob("*.yaml"))

LENGTH = 0.5
"""Mean length of prompts and completions, as a share of their limits."""
MFU = 0.2
"""Share of the GPU's peak that an update reaches (counted on a fake device: 0.22 for 3B with checkpointing)."""
PREFILL, BANDWIDTH = 0.4, 0.6
"""Shares of peak arithmetic and of memory bandwidth that vLLM reaches on prompts, and while decoding."""
STEP_S = 0.004
"""Of a decoding step of vLLM beside the arithmetic: scheduling, sampling."""
HF_LAYER_S = 0.041 / 36
"""Of a decoding step of the engine hf for each layer: Python and launches."""
SYNC = 5e9
"""Bytes a second from the trained weights into vLLM."""


@dataclass(frozen=True)
class Machine:
    name: str
    gpus: int
    gib: float
    """Memory of each GPU, as torch reports it."""
    flops: float
    """Dense bfloat16, a second."""
    bytes_s: float


H100 = {"gib": 79.2, "flops": 990e12, "bytes_s": 3.35e12}
EIGHT, ONE = Machine("8 × 80 GB", 8, **H100), Machine("1 × 80 GB", 1, **H100)
# Memory: the least among cards sold as 24 GB (L4, A10G with ECC); speed: an RTX 4090's.
SMALL = Machine("1 × 24 GB", 1, gib=22.0, flops=165e12, bytes_s=1.01e12)
RUNS = (
    (EIGHT, ()), (ONE, ()), (ONE, ("lora_80gb.yaml",)), (SMALL, ("lora_24gb.yaml",)),
    (SMALL, ("lora_24gb.yaml", "rollout.engine=hf")),
)  # fmt: skip


def seconds(config: Config, size: ModelSize, verdict: Verdict, machine: Machine) -> dict[str, float]:
    """Of one step, by stage. Text and vision parameters count alike, once for each token and patch."""
    rollout, text = config.rollout, size.text
    completions = rollout.prompts_per_step * rollout.completions_per_prompt / machine.gpus
    prompt, new = LENGTH * config.prompt.max_tokens, LENGTH * rollout.max_new_tokens
    prompts = completions / rollout.completions_per_prompt
    work = 2 * size.parameters  # FLOP a token, forward
    stages = {"sync": 0.0}
    if verdict.vllm is None:
        batches = max(1.0, completions / rollout.batch_completions)
        stages["sampling"] = batches * rollout.max_new_tokens * HF_LAYER_S * text.num_hidden_layers
    else:
        cache = verdict.vllm.sequence * LENGTH
        default = 1024 if machine.gib >= 70 else 256
        at_once = min(completions, verdict.vllm.sequences / LENGTH, rollout.vllm.max_num_seqs or default)
        read = verdict.vllm.weights + at_once * cache
        step = STEP_S + max(read / machine.bytes_s / BANDWIDTH, work * at_once / machine.flops / PREFILL)
        alone = STEP_S + verdict.vllm.weights / machine.bytes_s / BANDWIDTH
        decode = max(completions / at_once * new * step, rollout.max_new_tokens * alone)
        stages["sampling"] = work * prompts * prompt / machine.flops / PREFILL + decode
        stages["sync"] = verdict.vllm.weights / SYNC
    passes = (2 if size.rank else 3) + config.model.gradient_checkpointing
    tokens = prompts * prompt + completions * new
    stages["update"] = passes * work * tokens / machine.flops / MFU
    return stages


def gib(parts: dict[str, int]) -> str:
    return f"{sum(parts.values()) / 2**30:.1f}"


def rows() -> list[list[str]]:
    """Recipe, machine, fits, GiB throughout, in rollout and update, at the peak, usable; seconds by stage."""
    made, sizes = [], {}
    for path in PAPER:
        for machine, overrides in RUNS:
            files = [str(ROOT / "configs" / "with" / name) if name.endswith(".yaml") else name for name in overrides]
            config = configs.load(path, files, for_gpus=True)
            key = (config.model.path, config.model.lora)
            if key not in sizes:
                sizes[key] = measure(config, find_model_config(config.model.path)[0])
            strategy = parallel_strategy(config, machine.gpus)
            verdict = judge(
                config, sizes[key], processes=machine.gpus, device_bytes=int(machine.gib * 2**30),
                sharded=strategy == "fsdp2",
            )  # fmt: skip
            found = verdict.estimate
            kind = " ".join(overrides).replace(".yaml", "") or "full"
            row = [path.stem, kind, machine.name, strategy, "no" if verdict.reasons else "yes"]
            row += [gib(found.always), gib(found.rollout), gib(found.update)]
            row.append(f"{found.peak / 2**30:.1f} of {verdict.usable / 2**30:.1f}")
            if verdict.reasons:
                made.append([*row, "–", "–", "–"])
                continue
            stages = seconds(config, sizes[key], verdict, machine)
            made.append([*row, *(f"{stages[name]:,.0f}" for name in ("sampling", "update", "sync"))])
    return made


def table() -> str:
    head = ["recipe", "tuning", "GPUs", "launched as", "fits", "GiB throughout", "in the rollout", "in the update",
            "peak", "seconds sampling", "update", "sync"]  # fmt: skip
    lines = [head, ["---"] * len(head), *rows()]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    before, rest = DOCUMENT.read_text(encoding="utf-8").split(BEGIN)
    DOCUMENT.write_text(before + BEGIN + table() + END + rest.split(END)[1], encoding="utf-8")
