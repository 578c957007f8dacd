#!/usr/bin/env python
"""Kill runs at random moments, resume them by the same command, and compare with whole ones.

    python scripts/kill_and_resume.py --runs 50

Small runs of the embedded checkpoints: images and text, all weights and LoRA with dropout,
checkpoints every step or every second step, written at once or in the background. Each is killed by
SIGKILL once or twice, in a stage that the run's number decides (sampling, rewards, update, saving,
evaluation, writing the records, starting) and at a random moment of it, and then resumed. At the
end its weights, optimiser and schedule, metrics (except times and memory), every completion with
its reward and advantages, and the evaluations must equal the uninterrupted run's bit for bit.

What is killed is `mm-agrae train CONFIG`. Most runs are forks of a process that has imported the
package, which saves the import time; every `--fresh`-th is a new interpreter. The stage is read
from outside, from a few shared bytes that the run's stopwatch writes to, and read again after the
kill: the second reading is the one in the table. Status 1 if a run differs or does not finish.
"""

import argparse
import contextlib
import json
import mmap
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
STAGES = ("rollout", "update", "checkpoint", "reward", "writing", "evaluate", "log", "starting")
"""The stopwatch's names; `writing` is a checkpoint being written in the background."""
STEPS = 5
LIMIT_S = 600.0
LORA = {"lora": {"rank": 4, "alpha": 8, "dropout": 0.1}}
CELLS: dict[str, tuple[str, dict[str, Any]]] = {
    f"{path}-{kind}": (path, model) for path in ("vl", "text") for kind, model in (("full", {}), ("lora", LORA))
}


class StageFile:
    """A few bytes that a run writes its stage to, and that outlive it."""

    def __init__(self, path: Path):
        if not path.exists():
            path.write_bytes(bytes(128))
        with path.open("r+b") as file:
            self._bytes = mmap.mmap(file.fileno(), 128)

    def write(self, half: int, text: str) -> None:
        self._bytes[64 * half : 64 * half + 64] = text.encode().ljust(64)

    def read(self, half: int) -> str:
        return self._bytes[64 * half : 64 * half + 64].strip(b" \0").decode()


def publish(path: Path) -> None:
    """In the run's process: have the stopwatch and the checkpoint's writer report their stage."""
    from mm_agrae.run import checkpoint, metrics

    file, counts = StageFile(path), Counter[str]()
    file.write(0, "starting 1")
    file.write(1, "")
    timed, write = metrics.Stopwatch.__call__, checkpoint.Snapshot.write

    @contextlib.contextmanager
    def timed_and_published(self: Any, stage: str) -> Iterator[None]:
        outer = file.read(0)
        counts[stage] += 1
        file.write(0, f"{stage} {counts[stage]}")
        try:
            with timed(self, stage):
                yield
        finally:
            file.write(0, "between 1" if outer.startswith("starting") else outer)

    def write_and_publish(self: Any, folder: Path) -> None:
        counts["writing"] += 1
        file.write(1, f"writing {counts['writing']}")
        try:
            write(self, folder)
        finally:
            file.write(1, "")

    metrics.Stopwatch.__call__ = timed_and_published  # type: ignore[method-assign]
    checkpoint.Snapshot.write = write_and_publish  # type: ignore[method-assign]


def train(config: Path, stage_file: Path) -> int:
    from mm_agrae import cli

    publish(stage_file)
    return cli.main(["train", str(config)])


class Run:
    """A run's process, a fork of this one or a new interpreter."""

    def __init__(self, folder: Path, *, fresh: bool):
        self.folder = folder
        self.stage_path = folder / "stage"
        self.stage_path.unlink(missing_ok=True)
        self.stage_file = StageFile(self.stage_path)
        self.stage_file.write(0, "starting 1")
        config, log = folder / "config.yaml", folder / "log.txt"
        self.started = time.monotonic()
        if fresh:
            code = "import sys, pathlib as p, kill_and_resume as k; "
            code += "sys.exit(k.train(p.Path(sys.argv[1]), p.Path(sys.argv[2])))"
            with log.open("ab") as file:
                self.process = subprocess.Popen(
                    [sys.executable, "-c", code, str(config), str(self.stage_path)],
                    stdout=file,
                    stderr=file,
                    env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "scripts"), *sys.path])},
                )
            self.pid = self.process.pid
            return
        self.pid = os.fork()
        if self.pid == 0:
            with contextlib.suppress(BaseException):
                output = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
                os.dup2(output, 1)
                os.dup2(output, 2)
                status = 1
                try:
                    status = train(config, self.stage_path)
                finally:
                    sys.stdout.flush()
                    sys.stderr.flush()
                    end_process(status)
            os._exit(1)

    def ended(self) -> int | None:
        """The exit status (negative: the signal) if it has ended."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() - self.started > LIMIT_S:
            os.kill(self.pid, signal.SIGKILL)
            raise TimeoutError(f"{self.folder}: no end after {LIMIT_S:g} s; see log.txt")
        return None

    def finish(self) -> int:
        while (status := self.ended()) is None:
            time.sleep(0.005)
        return status

    def kill_in(self, stage: str, count: int, delay: float) -> str | None:
        """SIGKILL `delay` seconds into the count-th such stage; the stage that was hit, or
        None if the run ended before."""
        half = 1 if stage == "writing" else 0
        while not self._reached(stage, count, half):
            if (status := self.ended()) is not None:
                if status != 0:
                    raise RuntimeError(f"{self.folder}: ended with status {status}; see log.txt")
                return None
            time.sleep(0.0002)
        time.sleep(delay)
        os.kill(self.pid, signal.SIGKILL)
        if self.finish() == 0:
            return None
        return self.stage_file.read(1).split(" ")[0] or self.stage_file.read(0).split(" ")[0]

    def _reached(self, stage: str, count: int, half: int) -> bool:
        name, _, number = self.stage_file.read(half).partition(" ")
        return name == stage and number.isdigit() and int(number) >= count


def end_process(status: int) -> None:
    """End a fork: wait for its threads, but skip its parent's exit handlers."""
    import threading

    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join(10)
    os._exit(status)


def in_fork(function: Callable[[Path], Any], run_dir: Path) -> Any:
    """The JSON value of a function called in a fork, so that no thread starts in this process."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            with os.fdopen(writer, "w") as file:
                json.dump(function(run_dir), file)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(writer)
    with os.fdopen(reader) as file:
        text = file.read()
    if os.waitpid(pid, 0)[1] != 0:
        raise RuntimeError("a comparison failed")
    return json.loads(text)


def values(run_dir: Path, path: str, model: dict, every: int, background: bool) -> dict[str, Any]:
    source = {"task": "synthetic", "modality": "image" if path == "vl" else "text"}
    return {
        "run_dir": str(run_dir),
        "model": {"path": str(ROOT / "data" / "warm_start" / path), "device": "cpu", **model},
        "data": {
            "train": [source | {"split": "train"}],
            "evaluate": [source | {"split": "test", "name": "test", "limit": 2}],
        },
        "train": {"steps": STEPS},
        "rollout": {"prompts_per_step": 4, "completions_per_prompt": 4, "max_new_tokens": 24},
        "update": {
            "learning_rate": 1e-3, "schedule": "cosine", "mini_batch_prompts": 2,
        },
        "evaluate": {
            "samples": 2, "max_new_tokens": 24, "bootstrap": 50, "every": 2, "before": False,
        },
        "checkpoint": {
            "every": every, "keep": 2, "background": background, "best": "test/pass@1",
        },
    }  # fmt: skip


def fingerprint(run_dir: Path) -> dict[str, Any]:
    """Digests of everything in a finished run that must not depend on interruptions."""
    import hashlib

    import torch

    from mm_agrae.run import checkpoint
    from mm_agrae.run.files import to_json
    from mm_agrae.run.folder import RunFolder

    def digest(value: Any) -> str:
        return hashlib.sha256(value if isinstance(value, bytes) else repr(value).encode()).hexdigest()

    def plain(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.dtype, tuple(value.shape), digest(value.contiguous().numpy().tobytes())
        if isinstance(value, dict):
            return {str(name): plain(item) for name, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, list | tuple) else value

    folder = checkpoint.newest(run_dir / "checkpoints")
    assert folder is not None
    assert checkpoint.damaged(folder) == []
    state = checkpoint.checked_state(folder)
    training = torch.load(folder / checkpoint.TRAINING_FILE, weights_only=True)
    run = RunFolder(run_dir)
    untimed = ("seconds/", "cpu_seconds/", "memory/", "mismatch/probe")
    rows = [{name: value for name, value in row.items() if not name.startswith(untimed)} for row in run.read_metrics()]
    results = [json.loads(result.to_json()) | {"seconds": 0} for result in run.read_evaluations()]
    weights = {n: s for n, s in state["sha256"].items() if n.endswith(".safetensors")}
    assert weights
    return {
        "weights": digest(sorted(weights.items())),
        "optimiser": digest(plain(training)),
        "state": digest([state[name] for name in checkpoint.COUNTS]),
        "metrics": digest([to_json(row) for row in rows]),
        "rollouts": digest([run.read_rollouts(step) for step in run.rollout_steps()]),
        "evaluations": digest(results),
        "best": digest((run_dir / "checkpoints" / checkpoint.BEST_FILE).read_bytes()),
        "steps": [row["step"] for row in rows],
        "left_over": sorted(p.name for p in run_dir.rglob(".*partial*")),
    }


def durations(run_dir: Path) -> dict[str, float]:
    """Seconds of one visit to each stage, from a finished run."""
    from mm_agrae.run.folder import RunFolder

    rows = RunFolder(run_dir).read_metrics()
    mean = {stage: sum(row.get(f"seconds/{stage}", 0.0) for row in rows) / len(rows) for stage in STAGES}
    return mean | {"evaluate": 0.3, "writing": mean["checkpoint"], "starting": 2.0}


def one(number: int, cell: str, stage: str, folder: Path, seconds: dict[str, float], fresh: bool) -> dict[str, Any]:
    """Kill and resume one run: its settings, the stages it was killed in, and its exit status."""
    rng = random.Random(number)
    background = stage == "writing" or (stage != "checkpoint" and rng.random() < 0.5)
    every = rng.choice((1, 2))
    write_config(folder, values(folder / "run", *CELLS[cell], every, background))
    hits = []
    for target in [stage, *rng.choices(STAGES, k=rng.random() < 0.4)]:
        most = STEPS - 1
        if target in ("checkpoint", "writing"):
            most = max(1, STEPS // every - 1)
        elif target in ("evaluate", "starting"):
            most = 1
        hit = Run(folder, fresh=fresh).kill_in(target, rng.randint(1, most), rng.random() * seconds[target])
        if hit is None:
            break  # it had finished; the same command again must change nothing
        hits.append(hit)
    return {
        "number": number, "cell": cell, "every": every,
        "background": background, "fresh": fresh, "killed_in": hits,
        "status": Run(folder, fresh=fresh).finish(),
    }  # fmt: skip


def write_config(folder: Path, made: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(json.dumps(made))  # JSON is YAML


def kill_and_resume(runs: int, cells: Sequence[str], fresh_every: int, folder: Path) -> list[dict[str, Any]]:
    """The outcome of each run; `differs` names what is unequal to the uninterrupted run."""
    whole, seconds = {}, {}
    for cell in cells:
        cell_dir = folder / cell
        write_config(cell_dir, values(cell_dir / "run", *CELLS[cell], 1, False))
        if Run(cell_dir, fresh=False).finish() != 0:
            raise RuntimeError(f"the uninterrupted run failed:\n{(cell_dir / 'log.txt').read_text()}")
        whole[cell] = in_fork(fingerprint, cell_dir / "run")
        seconds[cell] = in_fork(durations, cell_dir / "run")
    found = []
    for number in range(runs):
        cell = cells[number % len(cells)]
        stage = STAGES[number // len(cells) % len(STAGES)]
        run_dir = folder / f"run_{number:03d}"
        fresh = fresh_every > 0 and number % fresh_every == fresh_every - 1
        result = one(number, cell, stage, run_dir, seconds[cell], fresh)
        differs = ["did not end by itself"]
        if result["status"] == 0:
            mine = in_fork(fingerprint, run_dir / "run")
            differs = [name for name in whole[cell] if mine[name] != whole[cell][name]]
        result["differs"] = differs
        result["reused"] = "from the cache" in (run_dir / "log.txt").read_text()
        found.append(result)
        print(
            f"{number + 1:3}/{runs} {cell:9} every {result['every']} "
            f"{'background' if result['background'] else 'at once':10} "
            f"{'fresh' if result['fresh'] else 'fork':5} killed in "
            f"{', '.join(result['killed_in']) or 'nothing':24} "
            + ("equal" if not differs else f"DIFFERS: {', '.join(differs)}"),
            flush=True,
        )
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--fresh", type=int, default=5, help="every n-th run is a new interpreter, not a fork")
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=list(CELLS))
    parser.add_argument("--out", type=Path, default=Path("runs/kill_and_resume.json"))
    parser.add_argument("--keep", type=Path, help="a folder for the runs (default: deleted)")
    arguments = parser.parse_args()
    if arguments.out.is_dir():
        parser.error(f"--out {arguments.out} is a folder; name a file")
    preload()
    started = time.monotonic()
    with contextlib.ExitStack() as stack:
        folder = arguments.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        found = kill_and_resume(arguments.runs, arguments.cells, arguments.fresh, folder)
    table = by_stage(found)
    print(f"\n{'killed in':12} {'kills':>5} {'runs':>5} {'equal':>6}")
    for stage, row in table.items():
        print(f"{stage:12} {row['kills']:5} {row['runs']:5} {row['equal']:6}")
    equal = sum(not result["differs"] for result in found)
    kills = sum(len(result["killed_in"]) for result in found)
    taken = sum(result["reused"] for result in found)
    print(f"{equal} of {len(found)} runs equal after {kills} kills; {taken} reused cached rollouts")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    summary = {
        "runs": len(found), "equal": equal, "kills": kills, "reused_rollouts": taken,
        "seconds": round(time.monotonic() - started, 1), "by_stage": table, "each": found,
    }  # fmt: skip
    arguments.out.write_text(json.dumps(summary, indent=1))
    return int(equal < len(found))


def by_stage(found: list[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """Kills in each stage, how many runs had one there, and how many of those were equal."""
    table: dict[str, dict[str, int]] = {}
    for result in found:
        for stage, kills in Counter(result["killed_in"]).items():
            row = table.setdefault(stage, {"kills": 0, "runs": 0, "equal": 0})
            row["kills"] += kills
            row["runs"] += 1
            row["equal"] += not result["differs"]
    return dict(sorted(table.items(), key=lambda item: -item[1]["kills"]))


def preload() -> None:
    """Import what a run imports, for its forks; nothing here starts a thread."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import torch

    from mm_agrae.model.compat import prepare

    torch.set_num_threads(1)
    prepare()
    import peft  # noqa: F401
    from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor, Qwen2ForCausalLM  # noqa: F401


if __name__ == "__main__":
    sys.exit(main())
