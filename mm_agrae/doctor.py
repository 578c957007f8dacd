"""What this machine has, and whether a config can run here: packages, files, disk, GPU memory.

    mm-agrae doctor configs/paper/math_llama_3.2_3b.yaml --gpus 8 --gpu-memory 80
    mm-agrae doctor configs/paper/math_llama_3.2_3b.yaml configs/with/lora_24gb.yaml --gpu-memory 24

No weights are loaded, and nothing here raises for what is missing: it is reported, so that all of
it is seen at once. The memory estimate is `model/memory.py`'s.
"""

import importlib.util
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mm_agrae import config as configs
from mm_agrae.config import Config
from mm_agrae.config.shipped import shipped
from mm_agrae.errors import ConfigError, UserError, install
from mm_agrae.model.checking import cores, report
from mm_agrae.model.compat import prepare
from mm_agrae.model.lora import model_and_adapter
from mm_agrae.model.memory import GIB, MemoryEstimate, estimate, judge, remedies, shown
from mm_agrae.model.size import ModelSize, find_model_config, measure
from mm_agrae.progress import Reporter
from mm_agrae.run.versions import versions

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


def examine(
    config: Config,
    *,
    gpus: int | None = None,
    gpu_memory: float | None = None,
    sharded: bool | None = None,
    reporter: Reporter | None = None,
) -> int:
    """Print the whole report. Returns the number of problems that would stop a run.

    `gpus`, `gpu_memory` (GiB): the machine to plan for (default: this one). `sharded`: the model
    is spread over the GPUs by FSDP2 (default: as the launch scripts would have it).
    """
    device_bytes = int(gpu_memory * GIB) if gpu_memory is not None else None
    if device_bytes is None and torch.cuda.is_available():
        device_bytes = torch.cuda.get_device_properties(0).total_memory
    processes = gpus or max(1, torch.cuda.device_count())
    report = _Report(config, processes, device_bytes, sharded, reporter or Reporter())
    report.versions()
    size = report.model()
    rows = report.data()
    report.disk(size)
    report.plan(rows)
    if size is not None:
        report.positions(size)
        report.memory(size)
    count = report.problems
    report.reporter.say(
        f"\n{count} problem{'s' if count != 1 else ''} to fix before this run"
        if count
        else "\nnothing stands in the way of this run"
    )
    return count


@dataclass
class _Report:
    """Prints the report, section by section, and counts the problems that would stop a run."""

    config: Config
    processes: int
    device_bytes: int | None
    sharded: bool | None
    reporter: Reporter
    problems: int = 0

    def _line(self, ok: bool, text: str) -> None:
        self.problems += not ok
        self.reporter.say(f"  {MARK[ok]}  {text}")

    def _section(self, title: str) -> None:
        self.reporter.say(f"\n{title}")

    def versions(self) -> None:
        self._section("versions")
        tested = _tested()
        for name, version in versions().items():
            expected = tested.get(name)
            as_tested = version.split("+")[0] == expected
            note = " (tested)" if as_tested else f" (tested with {expected})" if expected else ""
            self._line(True, f"{name} {version}{note}")
        needed = {"vllm": "rollout.engine is vllm"} if self.config.rollout.engine == "vllm" else {}
        needed |= dict.fromkeys(self.config.log.sinks, "log.sinks names it")
        for name, why in needed.items():
            if importlib.util.find_spec(name) is None:
                remedy = install("vllm" if name == "vllm" else "trackers")
                self._line(False, f"{name} is not installed, but {why}: {remedy}")

    def model(self) -> ModelSize | None:
        path, trust = self.config.model.path, self.config.model.trust_remote_code
        self._section(f"model {path}")
        try:
            base, _ = model_and_adapter(path)
            model_config, source = find_model_config(base, trust)
            size = measure(self.config, model_config)
        except UserError as error:
            self._line(False, str(error))
            return None
        except Exception as error:  # remote code may fail in any way
            self._line(False, f"{path}: cannot be examined: {type(error).__name__}: {error}")
            return None
        for line in _files(base, size):
            self._line(*line)
        tuning = f"LoRA of rank {size.rank}" if size.rank else "full tuning"
        tuning += f" in {self.config.model.dtype}"
        self._line(
            True,
            f"{size.parameters:,} parameters, {size.trainable:,} of them trained ({tuning}; "
            f"{size.text.num_hidden_layers} layers of {size.text.hidden_size}; from {source})",
        )
        return size

    def data(self) -> int | None:
        """Read every row of every source; returns the number of training rows, or None if one is missing."""
        self._section("data")
        data, rows, complete = self.config.data, 0, True
        for split in ("train", "evaluate"):
            for source in getattr(data, split):
                try:
                    task, lines = report(source, self.config, self.reporter)
                except Exception as error:  # a user's task may fail in any way
                    kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
                    self._line(False, f"{split} {source.label}: {kind}{error}")
                    complete &= split != "train"
                    continue
                for number, (ok, text) in enumerate(lines):
                    self._line(ok, text if number else f"{split} {text}")
                if split == "train":
                    rows += len(task)
        return rows if complete else None

    def disk(self, size: ModelSize | None) -> None:
        self._section("disk")
        folder = Path(self.config.run_dir).absolute()
        while not folder.is_dir():
            folder = folder.parent
        free = shutil.disk_usage(folder).free
        if not os.access(folder, os.W_OK):
            self._line(False, f"{folder} cannot be written to; choose another run_dir")
        if size is None:
            self._line(True, f"{free / 1e9:.0f} GB free at {folder}")
            return
        keep, each = self.config.checkpoint.keep, size.checkpoint_bytes
        # The oldest is deleted only once the new one is complete.
        self._line(
            (keep + 1) * each < free,
            f"up to {keep + 1} checkpoints of {shown(each)} (checkpoint.keep = {keep}, and the "
            f"one being written), {shown(free)} free at {folder}",
        )

    def plan(self, rows: int | None) -> None:
        self._section("plan")
        prompts = self.config.rollout.prompts_per_step
        try:
            lines = configs.plan(self.config, rows or prompts, self.processes)
        except UserError as error:
            self._line(False, str(error))
            return
        for name, value in lines:
            if rows is not None or name not in ("training rows", "steps (rollouts)"):
                unknown = rows is None and self.config.train.steps is None
                self._line(True, f"{name}: {value.split(', ')[0] if unknown else value}")
        if prompts % self.processes:
            self._line(
                True,
                f"note: {prompts} prompts do not divide evenly among {self.processes} processes; "
                "some will wait for others",
            )

    def positions(self, size: ModelSize) -> None:
        most = getattr(size.text, "max_position_embeddings", None)
        for name in ("rollout", "evaluate"):
            new_tokens = getattr(self.config, name).max_new_tokens
            length = self.config.prompt.max_tokens + new_tokens
            if most and length > most:
                self._line(
                    True,
                    f"note: prompt.max_tokens + {name}.max_new_tokens = {length}, more than the "
                    f"model's {most} positions; a completion may exceed the length it was trained "
                    "for",
                )

    def memory(self, size: ModelSize) -> None:
        sharded = self.sharded
        if sharded is None:
            sharded = parallel_strategy(self.config, self.processes) == "fsdp2"
        options: dict[str, Any] = {"processes": self.processes, "device_bytes": self.device_bytes, "sharded": sharded}
        found = estimate(self.config, size, **options)
        machine = f"{self.processes} process{'es' if self.processes > 1 else ''}"
        machine += ", model sharded by FSDP2," if sharded else ""
        if self.device_bytes is None:
            machine += " (estimate; give --gpu-memory to judge)"
        else:
            machine += f" with {shown(self.device_bytes)} (estimate)"
        self._section(f"GPU memory of each of {machine}")
        for line in _table(found):
            self.reporter.say(f"      {line}")
        if self.device_bytes is None:
            return
        verdict = judge(self.config, size, **options)
        if verdict.vllm is not None and verdict.vllm.share >= verdict.vllm.least:
            self.reporter.say(f"      vLLM's share   {verdict.vllm}")
        for reason in verdict.reasons:
            self._line(False, reason)
        if verdict.reasons:
            for remedy in remedies(self.config, size, **options):
                self._line(True, remedy)
            return
        usable = f"{shown(verdict.usable)} usable (the rest is left to CUDA, its libraries and fragments)"
        self._line(True, f"peak {shown(found.peak)} of {usable}")


def parallel_strategy(config: Config, gpus: int) -> str:
    """The file of configs/accelerate that the launch scripts take for so many GPUs, unless PARALLEL names another."""
    # In full tuning 16 bytes a parameter would have to fit every GPU; adapters are small, frozen weights faster whole.
    if gpus < 2:
        return "one"
    adapted = config.model.lora is not None or model_and_adapter(config.model.path)[1] is not None
    return "multi_gpu" if adapted else "fsdp2"


def launch_plan(config: Config, environment: Mapping[str, str]) -> tuple[str, ...]:
    """How scripts/launch.sh starts a run here, if PROCESSES, PARALLEL and OMP_NUM_THREADS do not say otherwise.

    Processes, GPUs, the file of configs/accelerate, threads of a process, and "vllm" where it is wanted and missing.
    """
    gpus = torch.cuda.device_count()
    wanted = environment.get("PROCESSES") or str(max(1, gpus))
    processes = int(wanted) if wanted.isdecimal() else 0
    if processes == 0:
        raise ConfigError(f"PROCESSES={wanted}: expected a number from 1 on")
    chosen = environment.get("PARALLEL") or (parallel_strategy(config, processes) if gpus else "multi_gpu")
    # On a CPU more threads than cores in all slow every process down; beside a GPU cores would be idle.
    threads = str(min(8, max(1, cores() // processes)) if gpus else 1)
    engine = config.rollout.engine.removesuffix("_server")
    missing = engine == "vllm" and importlib.util.find_spec("vllm") is None
    threads = environment.get("OMP_NUM_THREADS") or threads
    return str(processes), str(gpus), chosen if processes > 1 else "one", threads, "vllm" if missing else ""


def _tested() -> dict[str, str]:
    """The versions that were tested, from constraints.txt; none in an installed package."""
    file = shipped("constraints.txt")
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    pairs = (line.split(";")[0].split("==") for line in lines if "==" in line and not line.startswith("#"))
    return {name.strip(): version.strip() for name, version in pairs}


def _files(path: str, size: ModelSize) -> Iterator[tuple[bool, str]]:
    """Whether weights, tokenizer and chat template are on this machine."""
    folder = Path(path)
    if not folder.is_dir():
        try:
            from huggingface_hub import snapshot_download

            folder = Path(snapshot_download(path, local_files_only=True))
        except Exception:
            text = (
                "not on this machine. With a network it is downloaded at the start of the run "
                f"(about {2 * size.parameters / 1e9:.0f} GB); or: hf download {path}, or a local "
                "folder in model.path"
            )
            yield False, text
            return
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        named = set(json.loads(index.read_text(encoding="utf-8")).get("weight_map", {}).values())
        missing = sorted(name for name in named if not (folder / name).is_file())
        lacks = f"{folder}: {', '.join(missing)} missing; download it again"
        yield not missing, lacks if missing else f"{len(named)} weight files"
    else:
        weights = [*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")]
        yield bool(weights), "weights" if weights else f"{folder}: no *.safetensors file"
    names = ("tokenizer.json", "vocab.json", "tokenizer.model")
    tokenizer = any((folder / name).is_file() for name in names)
    yield tokenizer, "tokenizer" if tokenizer else f"{folder}: no tokenizer.json"


def _table(found: MemoryEstimate) -> list[str]:
    """The estimate as text, largest entries first."""
    lines = []
    for title, values in {"throughout": found.always, **found.phases}.items():
        listed = sorted(values.items(), key=lambda item: -item[1])
        inside = ", ".join(f"{name} {shown(count)}" for name, count in listed if count)
        lines.append(f"{title:15} {shown(sum(values.values())):>9}  {inside}".rstrip())
    lines.append(f"{'peak':15} {shown(found.peak):>9}")
    return lines
