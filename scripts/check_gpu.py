"""What only a GPU can show, in one command: correctness, speed and memory on the card at hand.

    python scripts/check_gpu.py --out runs/check_gpu --budget 480
    python scripts/check_gpu.py --out runs/check_tiny --budget 240 --tiny

Each part (see `PARTS` in gpu_parts.py) runs in a process of its own with a limit, and all together never take longer
than the budget in seconds: a part that fails or hangs costs no other. `gpu.json` in the output folder is rewritten
after each part, with all that a part had measured when it ended, in whatever way; `parts.log` is what the parts
printed. Exit status 1 if a part failed, or none ran. `--tiny` runs the same code in small shapes on a CPU, without
what only CUDA can do.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mm_agrae.errors import one_line
from mm_agrae.run.versions import versions


@dataclass(frozen=True)
class Part:
    seconds: float
    """Its share of the budget, in proportion to the others'."""
    least: float
    """With less it is not begun."""
    shown: tuple[str, ...]
    """Figures for the table at the end."""


PARTS = {
    "env": Part(60, 25, ("copy GB/s", "bf16 product TFLOP/s")),
    "attention": Part(50, 25, ("out error", "1024x256 G=8 ours ms", "1024x256 G=8 repeated ms")),
    "models": Part(150, 45, ("image log-prob error", "text log-prob error", "resumed weights differ")),
    "update": Part(200, 70, ("full ms", "full MFU", "full peak / doctor", "LoRA + checkpointing ms")),
    "head": Part(45, 25, ("N=2048 log-prob error", "LoRA gradient error")),
    "nccl": Part(45, 25, ("full FSDP2 gradient differs", "LoRA FSDP2 gradient differs")),
    "rollout": Part(70, 40, ("full tokens/s", "LoRA tokens/s", "full mean log-prob difference")),
    "trl": Part(50, 30, ("trl_s", "ours_s", "times", "memory")),
}
"""The most valuable first: under a short budget the last ones are left out."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu.json and parts.log")
    parser.add_argument("--budget", type=float, default=600, help="seconds that all parts together may take")
    parser.add_argument("--tiny", action="store_true", help="small shapes, on a CPU")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=[*PARTS], metavar="PART", help=" ".join(PARTS))
    options = parser.parse_args()
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "parts.log").write_text("")
    except OSError as error:
        parser.error(f"--out {options.out}: {error.strerror}")
    deadline = time.monotonic() + options.budget
    report: dict[str, Any] = {"date": f"{datetime.datetime.now():%Y-%m-%d %H:%M}", "card": card()}
    report |= {"versions": versions(), "tiny": options.tiny, "budget": options.budget, "parts": {}}
    names = [name for name in PARTS if name in options.only]
    for index, name in enumerate(names):
        remaining = deadline - time.monotonic()
        share = PARTS[name].seconds / sum(PARTS[each].seconds for each in names[index:])
        if remaining < PARTS[name].least:
            found: dict[str, Any] = {"status": "skipped", "seconds": 0.0, "skipped": ["budget"]}
        else:
            found = run(name, options, max(PARTS[name].least, remaining * share))
        report["parts"][name] = found
        written = options.out / "gpu.json.new"
        written.write_text(json.dumps(report, indent=1))
        written.replace(options.out / "gpu.json")
        print(f"{name} {found['status']} {found['seconds']} s", flush=True)
    print(f"\n{report['card']}; " + ", ".join(" ".join(each) for each in report["versions"].items()))
    for name, found in report["parts"].items():
        print(row(name, found))
    states = {found["status"] for found in report["parts"].values()}
    return int("failed" in states or "ok" not in states)


def run(name: str, options: argparse.Namespace, limit: float) -> dict[str, Any]:
    """One part in a process of its own, ended at its limit in seconds."""
    command = [sys.executable, "-u", str(Path(__file__).with_name("gpu_parts.py")), name]
    began = time.monotonic()
    with (options.out / "parts.log").open("a+b") as log:
        log.write(f"\n===== {name}, at most {limit:.0f} s\n".encode())
        log.flush()
        start = log.tell()
        process = subprocess.Popen(
            command + ["tiny"] * options.tiny, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        status = None
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                status = process.wait(limit)
        finally:
            with contextlib.suppress(ProcessLookupError):  # and what it has started itself
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        log.seek(start)
        lines = log.read().decode(errors="replace").splitlines()
    found: dict[str, Any] = {"figures": {}, "errors": [], "skipped": []}
    for line in lines:
        if line.startswith("@figure "):
            found["figures"] |= json.loads(line.removeprefix("@figure "))
        elif line.startswith(("@errors ", "@skipped ")):
            kind, _, value = line[1:].partition(" ")
            found[kind].append(json.loads(value))
    if status is None:
        found["errors"].append(f"stopped after {limit:.0f} s; its last lines: {' | '.join(lines[-5:])}")
    elif status and not found["errors"]:
        found["errors"] += lines[-15:] or [f"exit status {status}"]
    state = "failed" if found["errors"] else "ok" if found["figures"] else "skipped"
    return {"status": state, "seconds": round(time.monotonic() - began, 1), **found}


def row(name: str, found: dict[str, Any]) -> str:
    known = found.get("figures", {})
    shown = [f"{key} {known[key]:.4g}" for key in PARTS[name].shown if key in known]
    shown += [f"skipped: {reason}" for reason in found["skipped"]]
    shown += [one_line(error)[:200] for error in found.get("errors", [])[:3]]
    return f"{name:10} {found['status']:8} {found['seconds']:6.1f} s  {'; '.join(shown)}"


def card() -> str:
    """The GPU's name, memory and driver, found without taking any of its memory."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "no GPU"


if __name__ == "__main__":
    sys.exit(main())
