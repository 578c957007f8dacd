"""Real vLLM servers on this machine's CPU."""

import json
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

from mm_agrae.rollout.vllm_worker import KEY_VARIABLE

MAX_TOKENS = 256
PROGRAM = (
    "import sys, json; from mm_agrae.rollout.serve import serve; "
    "sys.exit(serve(**json.loads(sys.argv[1])))"
)


SOCKETS = tempfile.gettempdir()


class Server:
    """A server started as `mm-agrae serve` does, in processes of its own."""

    def __init__(
        self, folder: Path, model: str, port: int | None = None, key: str = "", **settings
    ):
        self.port = port or free_port()
        self.address = f"http://127.0.0.1:{self.port}"
        self.log = folder / f"{self.port}-{time.monotonic_ns()}.log"
        arguments = {"model": model, "port": self.port, "dtype": "float32"} | settings
        arguments.setdefault("max_model_len", MAX_TOKENS)
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", PROGRAM, json.dumps(arguments)],
                env=os.environ
                | {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
                # Sockets are files, and their paths must be short.
                | {KEY_VARIABLE: key, "TMPDIR": str(folder), "VLLM_RPC_BASE_PATH": SOCKETS},
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

    def requests_served(self) -> float:
        text = requests.get(f"{self.address}/metrics", timeout=10).text
        return sum(map(float, re.findall(r"^vllm:request_success_total\{.*\} (\S+)$", text, re.M)))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
