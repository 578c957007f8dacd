"""Real vLLM servers on this machine's CPU."""

import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import requests

from mm_agrae.rollout.vllm_gate import KEY_VARIABLE

MAX_TOKENS = 256
KEY = "a-secret"
SOCKETS = tempfile.gettempdir()


class Server:
    """A server started by `mm-agrae serve`, in processes of its own, behind KEY."""

    def __init__(self, folder: Path, model: str, *flags: str, port: int | None = None):
        self.folder = folder
        self.port = port or free_port()
        self.address = f"http://127.0.0.1:{self.port}"
        self.log = folder / f"{self.port}-{time.monotonic_ns()}.log"
        command = [sys.executable, "-m", "mm_agrae.cli", "serve", model, "--port", str(self.port)]
        command += ["--dtype", "float32", "--max-model-len", str(MAX_TOKENS), *flags]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command,
                env=os.environ
                | {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
                # Sockets are files, and their paths must be short.
                | {KEY_VARIABLE: KEY, "TMPDIR": str(folder), "VLLM_RPC_BASE_PATH": SOCKETS},
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def signal(self, number: int) -> None:
        """To vLLM's own processes, past the one that started them."""
        for child in psutil.Process(self.process.pid).children():
            os.killpg(child.pid, number)

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait(60)

    def request(self, method: str, path: str, key: str = KEY, **arguments) -> requests.Response:
        headers = {"Authorization": f"Bearer {key}"}
        return requests.request(method, self.address + path, headers=headers, timeout=10, **arguments)

    def requests_served(self) -> float:
        text = self.request("GET", "/metrics").text
        return sum(map(float, re.findall(r"^vllm:request_success_total\{.*\} (\S+)$", text, re.M)))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
