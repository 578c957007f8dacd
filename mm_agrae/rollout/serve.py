"""`mm-agrae serve`: starts a vLLM server for the engine `vllm_server`.

The server is vLLM's own (`vllm.entrypoints.openai.api_server`), as a child process. Added here are
the flags and environment variables that training needs: token ids in and out, log-probabilities
of the distribution sampled from, the endpoints for weights, no second resizing of images.
"""

import argparse
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
import threading
from collections.abc import Iterator, Sequence

import torch

from mm_agrae.errors import EngineError, install
from mm_agrae.model.lora import model_and_adapter
from mm_agrae.rollout.vllm_common import max_lora_rank
from mm_agrae.rollout.vllm_connection import CHECK_LIMIT_S, Server
from mm_agrae.rollout.vllm_gate import FOLDER_VARIABLE, KEY_VARIABLE

STOP_LIMIT_S = 30.0
"""How long a server may take to end after a signal before it is killed."""


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Options of `mm-agrae serve`; flags that are not ours are collected in `rest` for vLLM."""
    parser = argparse.ArgumentParser(
        prog="mm-agrae serve",
        description="Start a vLLM server that takes its weights from training, until it ends.",
        epilog="All other flags are passed on to vLLM.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("model", help="the run's model.path: a model id or a folder")
    add("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    add("--port", type=int, default=8000, help="(%(default)s)")
    add(
        "--dtype",
        choices=["auto", "float32", "bfloat16"],
        default="auto",
        help="the run's rollout.vllm.dtype, or model.dtype where that is auto (auto: the checkpoint's)",
    )
    add("--max-model-len", type=int, help="tokens of prompt and completion (the model's)")
    add("--memory-fraction", type=float, default=0.9, help="share of the GPU (%(default)s)")
    add("--cache-gib", type=int, default=1, help="KV cache on a CPU (%(default)s)")
    add("--tensor-parallel", type=int, default=1, help="GPUs of the server (%(default)s)")
    add("--lora-rank", type=int, default=0, help="for rollout.vllm.sync=adapter: at least its rank")
    add("--nccl", action="store_true", help="take weights by NCCL")
    add("--trust-remote-code", action="store_true", help="run code from the model's repository")
    options, rest = parser.parse_known_args(argv)
    options.rest = [item for item in rest if item != "--"]
    return options


def serve(argv: Sequence[str]) -> int:
    """Start a server, say when it is ready, and stay until it ends. Returns its exit status.

    SIGINT and SIGTERM are passed on to the server. Raises EngineError if vLLM is not installed,
    the port is taken, or the server ends before it is ready.
    """
    options = parse(argv)
    if importlib.util.find_spec("vllm") is None:
        raise EngineError(f"serve: vLLM is not installed in this environment; {install('vllm')}")
    _check_port(options.host, options.port)
    _warn_if_open(options.host)
    command = command_line(options)
    print(shlex.join(command), flush=True)
    with tempfile.TemporaryDirectory(prefix="mm-agrae-weights-") as folder:
        variables = environment(options) | {FOLDER_VARIABLE: folder}
        # In its own session, so that Ctrl-C in the terminal reaches it once, through us.
        child = subprocess.Popen(command, env=variables, start_new_session=True)
        with _passing_on_signals(child):
            address = f"http://{options.host}:{options.port}"
            if _wait_until_ready(child, address):
                print(
                    f"ready: {address} serves {options.model}; train with "
                    f'rollout.engine=vllm_server "rollout.vllm.servers=[{address}]"',
                    flush=True,
                )
            elif child.returncode > 0:
                raise EngineError(
                    f"serve: vLLM ended with status {child.returncode} before it was ready; its own messages are above"
                )
            return child.wait()


def command_line(options: argparse.Namespace) -> list[str]:
    """The server's command line; flags in `options.rest` come last and so take precedence."""
    from transformers import AutoConfig

    worker = f"{__package__}.vllm_worker"
    model = model_and_adapter(options.model)[0]  # an adapter's weights come from the trainer
    command = [sys.executable, "-m", worker, "--model", model]
    command += ["--host", options.host, "--port", str(options.port), "--dtype", options.dtype]
    # Token ids in and out instead of text; no sampling defaults from the checkpoint.
    command += ["--enable-scale-out", "--generation-config", "vllm"]
    # Log-probabilities after temperature, top-k, top-p and forbidden ids.
    command += ["--logprobs-mode", "processed_logprobs"]
    command += ["--worker-extension-cls", f"{worker}.WorkerExtension"]
    command += ["--middleware", f"{__package__}.vllm_gate.Gate"]
    command += ["--disable-uvicorn-access-log"]
    command += ["--tensor-parallel-size", str(options.tensor_parallel)]
    config = AutoConfig.from_pretrained(model, trust_remote_code=options.trust_remote_code)
    if hasattr(config, "vision_config"):
        # Images arrive in their final size. The cache would keep those of failed requests.
        command += ["--mm-processor-kwargs", '{"do_resize": false}', "--mm-processor-cache-gb", "0"]
    if torch.cuda.is_available():
        command += ["--gpu-memory-utilization", str(options.memory_fraction)]
    else:
        command += ["--enforce-eager"]
    if options.max_model_len is not None:
        command += ["--max-model-len", str(options.max_model_len)]
    if options.lora_rank:
        rank = max_lora_rank(options.lora_rank)
        command += ["--enable-lora", "--max-loras", "1", "--max-lora-rank", str(rank)]
    if options.nccl:
        command += ["--weight-transfer-config", '{"backend": "nccl"}']
    if options.trust_remote_code:
        command += ["--trust-remote-code"]
    return command + options.rest


def environment(options: argparse.Namespace) -> dict[str, str]:
    """This process's environment, the key included if set, with what the server needs."""
    needed = {"VLLM_SERVER_DEV_MODE": "1"}  # enables the endpoints for weights
    if options.lora_rank:
        needed["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
    if not torch.cuda.is_available():
        needed |= {"VLLM_CPU_KVCACHE_SPACE": str(options.cache_gib), "TORCHDYNAMO_DISABLE": "1"}
    return {"VLLM_NO_USAGE_STATS": "1"} | os.environ | needed


def _check_port(host: str, port: int) -> None:
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
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
    guard = "the key is required" if os.environ.get(KEY_VARIABLE) else f"set {KEY_VARIABLE}"
    print(
        f"warning: {host} can be reached from other machines, and whoever reaches this server can "
        f"change its weights and call its methods; {guard}, and keep it behind a firewall: "
        "the connection is not encrypted",
        file=sys.stderr,
        flush=True,
    )


@contextlib.contextmanager
def _passing_on_signals(child: subprocess.Popen[bytes]) -> Iterator[None]:
    """Pass SIGINT and SIGTERM on; however the block ends, no server is left behind."""

    def stop(number: int, frame: object) -> None:
        child.send_signal(signal.SIGTERM)
        # A server that is still starting may ignore the signal.
        timer = threading.Timer(STOP_LIMIT_S, child.kill)
        timer.daemon = True
        timer.start()

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
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
            os.killpg(child.pid, signal.SIGKILL)  # vLLM's own children, if any are left


def _wait_until_ready(child: subprocess.Popen[bytes], address: str) -> bool:
    server = Server(address.replace("//0.0.0.0:", "//127.0.0.1:"), CHECK_LIMIT_S)
    while child.poll() is None:
        if server.is_healthy():
            return True
    return False
