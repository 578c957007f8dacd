"""The cases, and the table of what was counted."""

import argparse
import json
import sys
import time
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bench import Bench
from meter import Counts

VERSIONS = ("torch", "transformers", "accelerate", "peft")
DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "gpu.md"
BEGIN, END = "<!-- written by: python tests/fake_cuda --write -->", "<!-- end -->"
TABLE = Path(__file__).with_name("table.json")
TOWER_HEAD = 80
"""Head size of the vision tower's attention; the text model's is 128."""

ONE = [[(0, 8)]]
"""One micro-batch: 8 completions of one prompt."""


def full_cases() -> Iterator[tuple[str, Counts]]:
    """Everything is trained, the vision tower too."""
    with Bench() as bench:
        yield "full", bench.measure_update(ONE)
        # Its picture goes through the tower once, in the first of the two.
        yield "one picture, two micro-batches", bench.measure_update([[(0, 8)], [(0, 8)]])
        first = bench.generate(1)
        yield "hf engine: prefill", first
        yield "hf engine: one decode step", bench.generate(2) - first
        bench.policy.hf.gradient_checkpointing_enable({"use_reentrant": False})  # as load_model does
        yield "full, checkpointing", bench.measure_update(ONE)


def kl_cases() -> Iterator[tuple[str, Counts]]:
    with Bench(update={"kl_coef": 0.01}) as bench:
        yield "full, KL", bench.measure_update(ONE)


LORA = {"lora": {"rank": 32, "alpha": 64}}


def lora_cases() -> Iterator[tuple[str, Counts]]:
    with Bench(gradient_checkpointing=True, **LORA) as bench:
        yield "LoRA r32, checkpointing", bench.measure_update(ONE)


def frozen_cases() -> Iterator[tuple[str, Counts]]:
    with Bench(freeze=["vision"]) as bench:
        yield "frozen tower", bench.measure_update(ONE)


def text_cases() -> Iterator[tuple[str, Counts]]:
    with Bench(multimodal=False) as bench:
        yield "text", bench.measure_update(ONE)


def liger_cases() -> Iterator[tuple[str, Counts]]:
    with Bench(liger=True) as bench:
        yield "full, liger-kernel", bench.measure_update(ONE)
    with Bench(liger=True, gradient_checkpointing=True, **LORA) as bench:
        yield "LoRA r32, checkpointing, liger-kernel", bench.measure_update(ONE)
    with Bench(liger=True, gradient_checkpointing=True, multimodal=False) as bench:
        yield "text, checkpointing, liger-kernel", bench.measure_update(ONE)


GROUPS = {
    "full": full_cases,
    "kl": kl_cases,
    "lora": lora_cases,
    "frozen": frozen_cases,
    "text": text_cases,
    "liger": liger_cases,
}
"""Cases that share a policy. The last one changes functions of transformers for the rest of the process."""


def entry(counts: Counts) -> dict[str, Any]:
    """What the table holds of a case."""
    tower = sum(n for (_, size), n in counts.attention.items() if size == TOWER_HEAD)
    reads = dict(sorted(counts.reads.items()))
    return {
        "kernels": counts.kernels,
        "ms": round(counts.seconds * 1e3, 1),
        "peak_gib": round(counts.peak / 2**30, 3),
        "tower_attention_calls": tower,
        "uploads": counts.uploads.total(),
        "host_reads": sum(reads.values()),
        "reads": reads,
    }


def markdown(cases: dict[str, dict[str, Any]]) -> str:
    head = "| case | kernels | modelled ms | peak above weights, GiB | attention calls of the tower | host reads |"
    rows = [
        f"| {name} | {each['kernels']:,} | {each['ms']:.0f} | {each['peak_gib']:.1f} "
        f"| {each['tower_attention_calls']:,} | {each['host_reads']} |"
        for name, each in cases.items()
    ]
    return "\n".join([head, "|---" + "|---:" * 5 + "|", *rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("groups", nargs="*", metavar="group", help=f"of {', '.join(GROUPS)}; all if none is named")
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.name}")
    parser.add_argument("--json", type=Path, help="write the same to this file")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    warnings.filterwarnings("error", ".*slower")  # a fast kernel was left out: its trial failed
    cases = {}
    for group in options.groups or GROUPS:
        start = time.process_time()
        for name, counts in GROUPS[group]():
            cases[name] = entry(counts)
            print(f"{name}: {time.process_time() - start:.0f} s", file=sys.stderr)
    table = {"versions": {name: version(name) for name in VERSIONS}, "cases": cases}
    for path in filter(None, (options.json, TABLE if options.write else None)):
        path.write_text(json.dumps(table, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if options.write and not options.groups:
        before, rest = DOCUMENT.read_text(encoding="utf-8").split(BEGIN)
        DOCUMENT.write_text(f"{before}{BEGIN}\n{markdown(cases)}\n{END}{rest.split(END)[1]}", encoding="utf-8")
    print(markdown(cases))
