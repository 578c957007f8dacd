"""Starts a vLLM server that the engine `vllm_server` can sample from and send weights to.

The server is vLLM's own (`vllm.entrypoints.openai.api_server`), as a child process. What is added
here are the flags and environment variables that training needs: token ids in and out,
log-probabilities of the distribution sampled from, the endpoints for weights, no second resizing
of pictures. `docs/vllm.md` gives the same command for starting it by hand.
"""

from __future__ import annotations

import contextlib
import importlib.util
import ipaddress
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence

import requests

from mm_agrae.errors import EngineError
from mm_agrae.model.lora import model_and_adapter
from mm_agrae.rollout.vllm import LORA_RANKS
from mm_agrae.rollout.vllm_worker import FOLDER_VARIABLE, KEY_VARIABLE

WORKER = "mm_agrae.rollout.vllm_worker"
STOP_LIMIT_S = 30.0
"""How long a server may take to end after a signal before it is killed."""


def serve(
    model: str,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    dtype: str = "auto",
    max_model_len: int | None = None,
    memory_fraction: float = 0.9,
    cache_gib: int = 1,
    tensor_parallel: int = 1,
    lora_rank: int = 0,
    nccl: bool = False,
    trust_remote_code: bool = False,
    options: Sequence[str] = (),
) -> int:
    """Start a server, say when it is ready, and stay until it ends. Returns its exit status.

    SIGINT and SIGTERM are handed on to the server. Raises EngineError if vLLM is not installed,
    the port is taken, or the server ends before it is ready.
    """
    if importlib.util.find_spec("vllm") is None:
        raise EngineError(
            "serve: vLLM is not installed in this environment; pip install 'mm-agrae[vllm]'"
        )
    _check_port(host, port)
    _warn_if_open(host)
    command = command_line(
        model,
        host=host,
        port=port,
        dtype=dtype,
        max_model_len=max_model_len,
        memory_fraction=memory_fraction,
        tensor_parallel=tensor_parallel,
        lora_rank=lora_rank,
        nccl=nccl,
        trust_remote_code=trust_remote_code,
        options=options,
    )
    print(shlex.join(command), flush=True)
    with tempfile.TemporaryDirectory(prefix="mm-agrae-weights-") as folder:
        values = environment(cache_gib, lora=lora_rank > 0) | {FOLDER_VARIABLE: folder}
        # A session of its own: Ctrl-C in the terminal reaches it once, through us.
        child = subprocess.Popen(command, env=values, start_new_session=True)
        with _handing_on_signals(child):
            address = f"http://{host}:{port}"
            if _wait_until_ready(child, address):
                print(
                    f"ready: {address} serves {model}; train with rollout.engine=vllm_server "
                    f'"rollout.vllm.servers=[{address}]"',
                    flush=True,
                )
            elif child.returncode > 0:
                raise EngineError(
                    f"serve: vLLM ended with status {child.returncode} before it was ready; its "
                    "own messages are above"
                )
            return child.wait()


def command_line(
    model: str,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    dtype: str = "auto",
    max_model_len: int | None = None,
    memory_fraction: float = 0.9,
    tensor_parallel: int = 1,
    lora_rank: int = 0,
    nccl: bool = False,
    trust_remote_code: bool = False,
    options: Sequence[str] = (),
) -> list[str]:
    """The server's command line; `options` are further flags of vLLM's, and win."""
    from transformers import AutoConfig

    model = model_and_adapter(model)[0]  # an adapter's weights come from the trainer
    command = [sys.executable, "-m", WORKER, "--model", model]
    command += ["--host", host, "--port", str(port), "--dtype", dtype]
    # Token ids in and out instead of text.
    command += ["--enable-scale-out", "--generation-config", "vllm"]
    # Log-probabilities after temperature, top-k, top-p and excluded ids.
    command += ["--logprobs-mode", "processed_logprobs"]
    command += ["--worker-extension-cls", f"{WORKER}.WorkerExtension"]
    command += ["--middleware", f"{WORKER}.Gate"]
    command += ["--disable-uvicorn-access-log"]
    command += ["--tensor-parallel-size", str(tensor_parallel)]
    if hasattr(
        AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code), "vision_config"
    ):
        # Pictures come in their final size. The cache holds on to broken requests.
        command += ["--mm-processor-kwargs", '{"do_resize": false}', "--mm-processor-cache-gb", "0"]
    if _has_gpu():
        command += ["--gpu-memory-utilization", str(memory_fraction)]
    else:
        command += ["--enforce-eager"]
    if max_model_len is not None:
        command += ["--max-model-len", str(max_model_len)]
    if lora_rank:
        fitting = [size for size in LORA_RANKS if size >= lora_rank]
        if not fitting:
            raise EngineError(f"serve: --lora-rank is at most {LORA_RANKS[-1]}, not {lora_rank}")
        command += ["--enable-lora", "--max-loras", "1", "--max-lora-rank", str(fitting[0])]
    if nccl:
        command += ["--weight-transfer-config", '{"backend": "nccl"}']
    if trust_remote_code:
        command += ["--trust-remote-code"]
    return command + list(options)


def environment(cache_gib: int = 1, *, lora: bool = False) -> dict[str, str]:
    """This process's environment with what the server needs; the key, if set, goes along."""
    needed = {"VLLM_SERVER_DEV_MODE": "1"}  # the endpoints for weights
    if lora:
        needed["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
    if not _has_gpu():
        needed |= {"VLLM_CPU_KVCACHE_SPACE": str(cache_gib), "TORCHDYNAMO_DISABLE": "1"}
    return {"VLLM_NO_USAGE_STATS": "1"} | os.environ | needed


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _check_port(host: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise EngineError(
                f"serve: cannot listen at {host}:{port} ({error.strerror}); choose another --port"
            ) from None


def _warn_if_open(host: str) -> None:
    with contextlib.suppress(ValueError):
        if ipaddress.ip_address(host).is_loopback:
            return
    if host == "localhost":
        return
    guard = "the key is asked for" if os.environ.get(KEY_VARIABLE) else f"set {KEY_VARIABLE}"
    print(
        f"warning: {host} can be reached from other machines, and whoever reaches this server can "
        f"change its weights and run its methods; {guard}, and keep it behind a firewall: "
        "the connection is not encrypted",
        file=sys.stderr,
        flush=True,
    )


@contextlib.contextmanager
def _handing_on_signals(child: subprocess.Popen[bytes]) -> Iterator[None]:
    """Hand SIGINT and SIGTERM on; whatever happens, no server is left behind."""
    before = {
        number: signal.signal(number, lambda got, frame: child.send_signal(signal.SIGTERM))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if child.poll() is None:
            child.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(STOP_LIMIT_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)  # vLLM's own children, if any outlived it


def _wait_until_ready(child: subprocess.Popen[bytes], address: str) -> bool:
    address = address.replace("//0.0.0.0:", "//127.0.0.1:")
    with requests.Session() as session:
        session.trust_env = False  # no proxy for a machine of one's own
        while child.poll() is None:
            with contextlib.suppress(requests.RequestException):
                if session.get(f"{address}/health", timeout=2).status_code == 200:
                    return True
            time.sleep(0.5)
    return False
