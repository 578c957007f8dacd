"""Carry out the runs of a study: several at a time, each once, though several machines share the folders."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mm_agrae import config as configs
from mm_agrae.errors import UserError
from mm_agrae.evaluation.study import Run, record_path, write_record
from mm_agrae.run.claim import Claim, claim
from mm_agrae.run.files import write_atomic
from mm_agrae.run.folder import RunFolder

LINES_OF_A_FAILURE = 15


class Runner:
    """Trains what has no record in `data` yet. Run folders, logs and claims are in `work`.

    A run that fails does not stop the others, and is tried again by the next call. `describe` makes the line of a
    run from its record's path.
    """

    def __init__(
        self,
        runs: Sequence[Run],
        data: Path,
        work: Path,
        *,
        describe: Callable[[Path], str],
        any_code: bool = False,
        keep: bool = False,
        say: Callable[[str], object] = lambda text: print(text, flush=True),
    ) -> None:
        self.runs, self.data, self.work = runs, data, work
        self.describe, self.any_code, self.keep, self.say = describe, any_code, keep, say
        self.failed: list[Run] = []
        self.elsewhere: list[Run] = []
        self._done = 0
        self._stopping = threading.Event()
        self._processes: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()

    def run(self, jobs: int) -> None:
        """Returns when every run is recorded, has failed, or is under way elsewhere.

        On SIGINT or SIGTERM the runs under way are asked to end after their step; they go on with the next call.
        """
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.default_int_handler)
        missing = []
        for run in self.runs:
            if path := record_path(run, self.data, any_code=self.any_code):
                self._line(run, f"{self.describe(path)} (recorded)")
            else:
                missing.append(run)
        with ThreadPoolExecutor(jobs) as pool:
            futures = [pool.submit(self._carry_out, run) for run in missing]
            try:
                for future in futures:
                    future.result()
            finally:  # an interrupt, or a full disk
                self._stopping.set()
                with self._lock:
                    for process in self._processes:
                        process.terminate()
                pool.shutdown(cancel_futures=True)

    def _line(self, run: Run, text: str) -> None:
        with self._lock:
            self._done += 1
            self.say(f"{self._done}/{len(self.runs)}  {run.title}: {text}")

    def _carry_out(self, run: Run) -> None:
        if self._stopping.is_set():
            return
        held = claim(self.work / f"{run.name}.claim")
        if held is None:
            self.elsewhere.append(run)
            self._line(run, "under way elsewhere")
            return
        with held:
            # Another process may have ended it between the look at its record and the claim.
            path = record_path(run, self.data, any_code=self.any_code) or self._train(run, held)
        if path:
            self._line(run, self.describe(path))

    def _train(self, run: Run, held: Claim) -> Path | None:
        """Run the command of a run, and keep its figures; None if it did not finish."""
        folder, log = RunFolder(self.work / run.name), self.work / f"{run.name}.log"
        file = self.work / f"{run.name}.yaml"
        write_atomic(file, configs.dump(run.config))
        command = ["train", str(file)]
        if run.seed is None:
            command = ["eval", run.config.model.path, "--config", str(file), "--out", str(folder.path)]
        environment = {"OMP_NUM_THREADS": "1"} | os.environ
        with log.open("ab") as output, self._lock:
            if self._stopping.is_set():
                return None
            # In a session of its own, so that an interrupt in a terminal reaches it once: through us.
            process = subprocess.Popen(
                [sys.executable, "-m", "mm_agrae.cli", *command],
                stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True,
            )  # fmt: skip
            self._processes.add(process)
        held.note(process.pid)
        held.on_lost = process.terminate
        status = process.wait()
        with self._lock:
            self._processes.discard(process)
        try:
            finished = status == 0 if run.seed is None else bool(folder.read_summary().get("finished"))
            if finished:
                path = write_record(run, folder, self.data)
                if not self.keep:
                    shutil.rmtree(folder.path / "checkpoints", ignore_errors=True)
                return path
            problem = f"it ended with status {status}"
        except UserError as error:
            problem = str(error)
        if not self._stopping.is_set():
            tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LINES_OF_A_FAILURE:]
            self.failed.append(run)
            self._line(run, "\n  ".join([f"failed: {problem}; the end of {log}:", *tail]))
        return None
