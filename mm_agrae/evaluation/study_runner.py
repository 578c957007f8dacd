"""Carry out the runs of a study: several at a time, each once, though several machines share its folder."""

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
from mm_agrae.errors import RunFolderError
from mm_agrae.evaluation.study import Run, code, record_of, write_record
from mm_agrae.run.claim import claim
from mm_agrae.run.files import write_atomic
from mm_agrae.run.folder import RunFolder

LINES_OF_A_FAILURE = 15


class Runner:
    """Does what has no record in `folder`/data yet. Run folders, logs and claims are in `folder`/runs.

    A run that fails does not stop the others, and is tried again by the next call. `describe` makes the line of a
    run from its record's path. Of a recorded run the checkpoints are deleted; its metrics and rollouts stay.
    """

    def __init__(
        self, runs: Sequence[Run], folder: Path, *, describe: Callable[[Path], str], any_code: bool = False
    ) -> None:
        self.runs, self.data, self.work = runs, folder / "data", folder / "runs"
        self.describe, self.any_code, self.code = describe, any_code, code()
        self.failed: list[Run] = []
        self._said = 0
        self._stopping = threading.Event()
        self._processes: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()

    def run(self, jobs: int) -> None:
        """Returns when every run is recorded, has failed, or is under way elsewhere.

        On SIGINT or SIGTERM the runs under way end after their step; they go on with the next call.
        """
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        with ThreadPoolExecutor(jobs) as pool:
            futures = [pool.submit(self._carry_out, run) for run in self.runs]
            try:
                for future in futures:
                    future.result()
            finally:  # an interrupt, or a full disk
                pool.shutdown(wait=False, cancel_futures=True)
                with self._lock:
                    self._stopping.set()
                    for process in self._processes:
                        process.terminate()

    def _record(self, run: Run) -> Path | None:
        """That of the run, made by this study or by one beside it."""
        code = "*" if self.any_code else self.code
        return max(self.data.parent.parent.glob(f"*/data/*-{run.digest}-{code}.json"), default=None)

    def _carry_out(self, run: Run) -> None:
        if path := self._record(run):
            return self._say(run, f"{self.describe(path)} (recorded)")
        with claim(self.work / f"{run.name}-{self.code}.lock") as held:
            if held is None:
                return self._say(run, "under way elsewhere")
            path = self._record(run) or self._do(run, held)  # it may have been done before the claim
        if path:
            self._say(run, self.describe(path))

    def _say(self, run: Run, text: str) -> None:
        with self._lock:
            self._said += 1
            print(f"{self._said}/{len(self.runs)}  {run.title}: {text}", flush=True)

    def _do(self, run: Run, held: int) -> Path | None:
        """Run the command of a run, and keep its figures; None if it did not finish."""
        stem = f"{run.name}-{self.code}"
        folder, log, file = (self.work / f"{stem}{ending}" for ending in ("", ".log", ".yaml"))
        write_atomic(file, configs.dump(run.config.model_copy(update={"run_dir": str(folder)})))
        command = ["train", str(file)]
        if run.seed is None:
            command = ["eval", run.config.model.path, "--config", str(file), "--out", str(folder)]
        with log.open("ab") as output, self._lock:
            if self._stopping.is_set():
                return None
            # In a session of its own: an interrupt in the terminal must reach it once, through us.
            process = subprocess.Popen(
                [sys.executable, "-m", "mm_agrae.cli", *command],
                stdout=output, stderr=subprocess.STDOUT, start_new_session=True, pass_fds=[held],
                env={"OMP_NUM_THREADS": "1"} | os.environ,
            )  # fmt: skip
            self._processes.add(process)
        status = process.wait()
        with self._lock:
            self._processes.discard(process)
        reason = f"status {status}"
        try:
            if status == 0 if run.seed is None else RunFolder(folder).read_summary().get("finished"):
                if code() == self.code:
                    write_record(record_of(run, RunFolder(folder), self.code), self.data / f"{stem}.json")
                    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
                    return self.data / f"{stem}.json"
                reason = "the code was changed meanwhile, so that nobody knows what it ran by; start the study anew"
        except RunFolderError as error:
            reason = str(error)
        if not self._stopping.is_set():
            self.failed.append(run)
            tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LINES_OF_A_FAILURE:]
            self._say(run, "\n  ".join([f"failed: {reason}; the end of {log}:", *tail]))
        return None
