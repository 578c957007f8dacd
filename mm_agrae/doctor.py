"""What this machine has, and whether a config can run here: packages, files, disk, GPU memory.

    mm-agrae doctor configs/paper/math_llama_3.2_3b.yaml --gpus 8 --gpu-memory 80
    mm-agrae doctor configs/paper/math_qwen2.5_math_7b.yaml --gpus 8 --gpu-memory 80 --fsdp2

No weights are loaded, and nothing here raises for what is missing: it is reported, so that all of
it is seen at once. The memory estimate is `model/memory.py`'s.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from mm_agrae import config as configs
from mm_agrae import tasks
from mm_agrae.config import Config
from mm_agrae.errors import UserError
from mm_agrae.model.compat import prepare
from mm_agrae.model.lora import model_and_adapter
from mm_agrae.model.memory import MemoryEstimate, estimate, suggest, usable_bytes
from mm_agrae.model.size import ModelSize, find_model_config, measure
from mm_agrae.progress import Reporter
from mm_agrae.run.versions import versions

ROOT = Path(__file__).resolve().parent.parent
GIB = 2**30
MARK = {True: "ok", False: "!!"}
OPTIONAL = {
    "vllm": "rollouts by vLLM",
    "gradio": "the demo",
    "trl": "the comparison with TRL",
    "tensorboard": "the tensorboard sink",
    "trackio": "the trackio sink",
    "wandb": "the wandb sink",
}


def show_machine() -> None:
    """Print versions, devices, and which optional packages are installed."""
    for name, version in versions().items():
        print(f"{name:14} {version}")
    prepare()
    print(f"{'CPU cores':14} {os.cpu_count()} ({torch.get_num_threads()} threads for torch)")
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        print(f"{f'GPU {index}':14} {properties.name}, {properties.total_memory / GIB:.0f} GiB")
    print(f"{'free disk':14} {shutil.disk_usage('.').free / GIB:.0f} GiB")
    for name, purpose in OPTIONAL.items():
        state = "installed" if importlib.util.find_spec(name) else "not installed"
        print(f"{name:14} {state} ({purpose})")


@dataclass
class Findings:
    """Prints the report line by line and counts the problems that would stop a run."""

    reporter: Reporter
    problems: int = 0

    def line(self, ok: bool, text: str) -> None:
        self.problems += not ok
        self.reporter.say(f"  {MARK[ok]}  {text}")

    def section(self, title: str) -> None:
        self.reporter.say(f"\n{title}")


def examine(
    config: Config,
    *,
    gpus: int | None = None,
    gpu_memory: float | None = None,
    sharded: bool = False,
    reporter: Reporter | None = None,
) -> int:
    """Print the whole report. Returns the number of problems that would stop a run.

    `gpus`, `gpu_memory` (GiB): the machine to plan for (default: this one). `sharded`: the model
    is spread over the GPUs by FSDP2.
    """
    findings = Findings(reporter or Reporter())
    processes = gpus or max(1, torch.cuda.device_count())
    if gpu_memory is not None:
        device_bytes: int | None = int(gpu_memory * GIB)
    elif torch.cuda.is_available():
        device_bytes = torch.cuda.get_device_properties(0).total_memory
    else:
        device_bytes = None
    _versions(config, findings)
    size = _model(config, findings)
    rows = _data(config, findings)
    _disk(config, size, findings)
    _plan(config, rows, processes, findings)
    if size is not None:
        _positions(config, size, findings)
        _memory(config, size, processes, device_bytes, sharded, findings)
    count = findings.problems
    findings.reporter.say(
        f"\n{count} problem{'s' if count != 1 else ''} to fix before this run"
        if count
        else "\nnothing stands in the way of this run"
    )
    return count


def _versions(config: Config, findings: Findings) -> None:
    findings.section("versions")
    tested = _tested()
    for name, version in versions().items():
        expected = tested.get(name)
        if expected is None or version.split("+")[0] == expected:
            note = "" if expected is None else " (tested)"
        else:
            note = f" (tested with {expected})"
        findings.line(True, f"{name} {version}{note}")
    needed = {"vllm": "rollout.engine is vllm"} if config.rollout.engine == "vllm" else {}
    needed |= dict.fromkeys(config.log.sinks, "log.sinks names it")
    for name, why in needed.items():
        if importlib.util.find_spec(name) is None:
            extra = "vllm" if name == "vllm" else "trackers"
            findings.line(
                False, f"{name} is not installed, but {why}: pip install 'mm-agrae[{extra}]'"
            )


def _tested() -> dict[str, str]:
    """The versions that were tested, from constraints.txt; none in an installed package."""
    file = ROOT / "constraints.txt"
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    pairs = (line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    return {name.strip(): version.strip() for name, version in pairs}


def _model(config: Config, findings: Findings) -> ModelSize | None:
    findings.section(f"model {config.model.path}")
    path = config.model.path
    try:
        base, _ = model_and_adapter(path)
        model_config, source = find_model_config(base, config.model.trust_remote_code)
        size = measure(config, model_config)
    except UserError as error:
        findings.line(False, str(error))
        return None
    except Exception as error:  # remote code may fail in any way
        findings.line(False, f"{path}: cannot be examined: {type(error).__name__}: {error}")
        return None
    for line in _files(base, size):
        findings.line(*line)
    text = size.text
    tuning = f"LoRA of rank {size.rank}" if size.rank else "full tuning"
    findings.line(
        True,
        f"{size.parameters:,} parameters, {size.trainable:,} of them trained ({tuning}; "
        f"{text.num_hidden_layers} layers of {text.hidden_size}; from {source})",
    )
    return size


def _files(path: str, size: ModelSize) -> Iterator[tuple[bool, str]]:
    """Whether weights, tokenizer and chat template are on this machine."""
    folder = Path(path)
    if not folder.is_dir():
        try:
            from huggingface_hub import snapshot_download

            folder = Path(snapshot_download(path, local_files_only=True))
        except Exception:
            gigabytes = 2 * size.parameters / 1e9
            yield (
                False,
                f"not on this machine. With a network it is downloaded at the start of the run "
                f"(about {gigabytes:.0f} GB); or: hf download {path}, or a local folder in "
                "model.path",
            )
            return
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        named = set(json.loads(index.read_text(encoding="utf-8")).get("weight_map", {}).values())
        missing = sorted(name for name in named if not (folder / name).is_file())
        yield (
            not missing,
            (
                f"{folder}: {', '.join(missing)} missing; download it again"
                if missing
                else f"{len(named)} weight files"
            ),
        )
    else:
        weights = [*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")]
        yield bool(weights), "weights" if weights else f"{folder}: no *.safetensors file"
    tokenizer = any((folder / n).is_file() for n in ("tokenizer.json", "vocab.json"))
    tokenizer |= (folder / "tokenizer.model").is_file()
    yield tokenizer, "tokenizer" if tokenizer else f"{folder}: no tokenizer.json"


def _data(config: Config, findings: Findings) -> int | None:
    """Load every source; returns the number of training rows, or None if a source is missing."""
    findings.section("data")
    rows: int | None = 0
    for split in ("train", "evaluate"):
        for source in getattr(config.data, split):
            try:
                task = tasks.load(source, on_bad_row=config.data.on_bad_row)
            except Exception as error:  # a user's task may fail in any way
                kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
                findings.line(False, f"{split} {source.label}: {kind}{error}")
                rows = None if split == "train" else rows
                continue
            skipped = f", {len(task.skipped)} left out" if task.skipped else ""
            findings.line(len(task) > 0, f"{split} {source.label}: {len(task):,} rows{skipped}")
            if split == "train" and rows is not None:
                rows += len(task)
    return rows


def _disk(config: Config, size: ModelSize | None, findings: Findings) -> None:
    findings.section("disk")
    folder = Path(config.run_dir).absolute()
    while not folder.is_dir():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if not os.access(folder, os.W_OK):
        findings.line(False, f"{folder} cannot be written to; choose another run_dir")
    if size is None:
        findings.line(True, f"{free / 1e9:.0f} GB free at {folder}")
        return
    # The oldest is deleted only once the new one is complete.
    count = config.checkpoint.keep + 1
    findings.line(
        count * size.checkpoint_bytes < free,
        f"up to {count} checkpoints of {_bytes(size.checkpoint_bytes)} (checkpoint.keep = "
        f"{config.checkpoint.keep}, and the one being written), {_bytes(free)} free at {folder}",
    )


def _plan(config: Config, rows: int | None, processes: int, findings: Findings) -> None:
    findings.section("plan")
    counts_rows = ("training rows", "steps (rollouts)")
    try:
        lines = configs.plan(config, rows or config.rollout.prompts_per_step, processes)
    except UserError as error:
        findings.line(False, str(error))
        return
    for name, value in lines:
        if rows is not None or name not in counts_rows:
            unknown = rows is None and config.train.steps is None
            findings.line(True, f"{name}: {value.split(', ')[0] if unknown else value}")
    if config.rollout.prompts_per_step % processes:
        findings.line(
            True,
            f"note: {config.rollout.prompts_per_step} prompts do not divide evenly among "
            f"{processes} processes; some will wait for others",
        )


def _positions(config: Config, size: ModelSize, findings: Findings) -> None:
    most = getattr(size.text, "max_position_embeddings", None)
    if not most:
        return
    for name, section in (("rollout", config.rollout), ("evaluate", config.evaluate)):
        length = config.prompt.max_tokens + section.max_new_tokens
        if length > most:
            findings.line(
                True,
                f"note: prompt.max_tokens + {name}.max_new_tokens = {length}, more than the "
                f"model's {most} positions; a completion may exceed the length it was trained for",
            )


def _memory(
    config: Config,
    size: ModelSize,
    processes: int,
    device_bytes: int | None,
    sharded: bool,
    findings: Findings,
) -> None:
    def result(sharded: bool) -> MemoryEstimate:
        return estimate(
            config, size, processes=processes, device_bytes=device_bytes, sharded=sharded
        )

    machine = f"{processes} process{'es' if processes > 1 else ''}"
    machine += ", model sharded by FSDP2," if sharded else ""
    found = result(sharded)
    if device_bytes is None:
        findings.section(f"GPU memory of each of {machine} (estimate; give --gpu-memory to judge)")
    else:
        findings.section(f"GPU memory of each of {machine} with {_bytes(device_bytes)} (estimate)")
    for line in _table(found):
        findings.reporter.say(f"      {line}")
    if device_bytes is None:
        return
    limit = usable_bytes(device_bytes)
    findings.line(
        found.peak <= limit,
        f"peak {_bytes(found.peak)} of {_bytes(limit)} usable (6 % are left to the driver)",
    )
    if found.peak <= limit:
        return
    if processes > 1 and not sharded and (peak := result(True).peak) <= limit:
        findings.line(
            True,
            f"would fit ({_bytes(peak)}) with the model sharded over the GPUs: "
            "PARALLEL=fsdp2 (configs/accelerate/fsdp2.yaml)",
        )
    advice = suggest(config, size, processes=processes, device_bytes=device_bytes, sharded=sharded)
    if advice is None:
        findings.line(True, "no setting makes it fit: a smaller model or a larger GPU is needed")
        return
    changes, after = advice
    findings.line(True, f"would fit ({_bytes(after.peak)}) with: {_shell(changes)}")


def _table(found: MemoryEstimate) -> list[str]:
    """The estimate as text, largest entries first."""
    lines = []
    for title, values in {"throughout": found.always, **found.phases}.items():
        listed = sorted(values.items(), key=lambda item: -item[1])
        inside = ", ".join(f"{name} {_bytes(count)}" for name, count in listed if count)
        lines.append(f"{title:15} {_bytes(sum(values.values())):>9}  {inside}".rstrip())
    lines.append(f"{'peak':15} {_bytes(found.peak):>9}")
    return lines


def _shell(changes: Sequence[str]) -> str:
    """The changes as one types them in a shell."""
    return " ".join(f"'{change}'" if set(change) & set(" {[") else change for change in changes)


def _bytes(count: int) -> str:
    return f"{count / GIB:.1f} GiB" if count >= GIB / 10 else f"{count / 2**20:.1f} MiB"
