"""What runs inside a vLLM server: taking over weights, and the door to it.

`mm-agrae serve` loads both classes by name. `WorkerExtension` is mixed into vLLM's worker, its
methods are called through /collective_rpc. `Gate` is ASGI middleware in the HTTP process: it asks
every request for the key, if there is one, and takes files of weights. Weights travel as
safetensors; nothing here is ever unpickled. Run as a program, this module is vLLM's own server.
"""

from __future__ import annotations

import asyncio
import atexit
import hmac
import importlib
import json
import os
import re
import runpy
import shutil
import sys
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm_agrae import __version__
from mm_agrae.model.compat import prepare

if TYPE_CHECKING:
    import torch

KEY_VARIABLE = "MM_AGRAE_VLLM_KEY"
"""Environment variable with the key of servers; never an argument, which other users can see."""

FOLDER_VARIABLE = "MM_AGRAE_VLLM_FOLDER"
"""Environment variable with the folder that files of weights go to; not set: a temporary one."""

FILES = "/mm_agrae/files/"
FILE_PATH = re.compile(re.escape(FILES) + r"([0-9a-z-]{1,64})(?:/([A-Za-z0-9_-][A-Za-z0-9_.-]*))?")


class WorkerExtension:
    """Methods that vLLM's worker gains; the names start so that they clash with none of its own."""

    vllm_config: Any
    model_runner: Any

    def mm_agrae_describe(self) -> dict[str, Any]:
        """What a trainer checks before it samples anything. Mends the worker on the way."""
        mend_seeds(self.model_runner)
        model = self.vllm_config.model_config
        text = model.hf_config.get_text_config()
        return {
            "mm_agrae": __version__,
            "architectures": list(model.architectures),
            "vocab_size": text.vocab_size,
            "hidden_size": text.hidden_size,
            "layers": text.num_hidden_layers,
            "dtype": str(model.dtype).removeprefix("torch."),
            "max_model_len": model.max_model_len,
            "max_num_seqs": self.vllm_config.scheduler_config.max_num_seqs,
            "logprobs_mode": model.logprobs_mode,
            "world_size": self.vllm_config.parallel_config.world_size,
            "lora_rank": getattr(self.vllm_config.lora_config, "max_lora_rank", 0),
            "weight_transfer": getattr(self.vllm_config.weight_transfer_config, "backend", None),
        }

    def mm_agrae_load(self, folder: str) -> dict[str, Any]:
        """Take over all weights from the safetensors files that `Gate` put into `folder`."""
        from mm_agrae.rollout.vllm_common import load_weights_in_worker

        files = sorted(Path(folder).glob("*.safetensors"))
        if not files:
            raise FileNotFoundError(f"{folder} holds no safetensors files")
        load_weights_in_worker(self, _tensors(files))
        return {"files": len(files)}


def _tensors(files: list[Path]) -> Iterator[tuple[str, torch.Tensor]]:
    from safetensors import safe_open

    for file in files:
        with safe_open(file, framework="pt", device="cpu") as opened:
            for name in opened.keys():  # noqa: SIM118 - it is no mapping
                yield name, opened.get_tensor(name)


Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class Gate:
    """ASGI middleware: the key on every path but /health, and files of weights.

    PUT /mm_agrae/files/FOLDER/NAME stores the body and replies with the folder's path on this
    machine. DELETE /mm_agrae/files/FOLDER removes the folder. vLLM's own key leaves the endpoints
    open that change weights.
    """

    def __init__(self, app: Callable[[Message, Receive, Send], Awaitable[None]]):
        self.app = app
        self.key = os.environ.get(KEY_VARIABLE, "")
        self._root: Path | None = None

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        path = scope["path"]
        if self.key and path != "/health" and not self._has_key(scope):
            return await _reply(scope, send, 401, {"error": f"the key of {KEY_VARIABLE} is needed"})
        if not path.startswith(FILES):
            return await self.app(scope, receive, send)
        place = FILE_PATH.fullmatch(path)
        method = scope.get("method")
        if place and place[2] and method == "PUT":
            return await self._store(self._folder(place[1]), place[2], scope, receive, send)
        if place and not place[2] and method == "DELETE":
            shutil.rmtree(self._folder(place[1]), ignore_errors=True)
            return await _reply(scope, send, 200, {})
        return await _reply(scope, send, 400, {"error": f"{method} {path} is not understood"})

    def _has_key(self, scope: Message) -> bool:
        given = dict(scope["headers"]).get(b"authorization", b"")
        return hmac.compare_digest(given, f"Bearer {self.key}".encode())

    def _folder(self, name: str) -> Path:
        if self._root is None:
            given = os.environ.get(FOLDER_VARIABLE)
            self._root = Path(given or tempfile.mkdtemp(prefix="mm-agrae-weights-"))
            if not given:
                atexit.register(shutil.rmtree, self._root, ignore_errors=True)
        return self._root / name

    async def _store(
        self, folder: Path, name: str, scope: Message, receive: Receive, send: Send
    ) -> None:
        # A trainer that died left its folder behind; one at a time is all that is needed.
        for other in folder.parent.iterdir():
            if other != folder:
                shutil.rmtree(other, ignore_errors=True)
        folder.mkdir(exist_ok=True)
        unfinished = folder / f"{name}.part"
        try:
            with unfinished.open("wb") as file:
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return
                    await asyncio.to_thread(file.write, message.get("body", b""))
                    if not message.get("more_body"):
                        break
            unfinished.rename(folder / name)
        except OSError as error:
            return await _reply(scope, send, 507, {"error": f"cannot store weights: {error}"})
        finally:
            unfinished.unlink(missing_ok=True)
        await _reply(scope, send, 200, {"folder": str(folder)})


async def _reply(scope: Message, send: Send, status: int, content: Message) -> None:
    if scope["type"] == "websocket":
        return await send({"type": "websocket.close"})
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps(content).encode()})


def mend_seeds(runner: Any) -> None:
    """Let a CPU's `runner` survive seeded requests whose prompts are read in several parts.

    vLLM turns such a request's generator back by one draw after each part, which generators on
    CPUs cannot do: the engine ends. A prompt still being read has drawn nothing that counts, so
    its generator starts anew instead, and its samples are those of a prompt read at once.
    """
    if runner.device.type != "cpu" or getattr(runner, "mm_agrae_mended", False):
        return
    original = runner._bookkeeping_sync

    def bookkeeping(*arguments: Any, **named: Any) -> Any:
        batch = runner.input_batch
        unread = runner.discard_request_mask.np[: batch.num_reqs].nonzero()[0].tolist()
        held = {row: batch.generators.pop(row) for row in unread if row in batch.generators}
        for generator in held.values():
            generator.manual_seed(generator.initial_seed())
        try:
            return original(*arguments, **named)
        finally:
            batch.generators.update(held)

    runner._bookkeeping_sync = bookkeeping
    runner.mm_agrae_mended = True


def mend_install() -> None:
    """`compat.prepare` for vLLM's processes, and for the one in which it looks at model classes."""
    prepare()
    registry: Any = importlib.import_module("vllm.model_executor.models.registry")
    program = f"import {__package__}.vllm_worker as worker; worker.mend_install(); "
    program += f"import runpy; runpy.run_module({registry.__name__!r}, run_name='__main__')"
    registry._SUBPROCESS_COMMAND = [sys.executable, "-c", program]


if __name__ in ("__main__", "__mp_main__"):
    mend_install()  # also in the processes that the server spawns: they import this module first
if __name__ == "__main__":
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__")
