"""ASGI middleware of a vLLM server: checks the key, and receives files of weights.

vLLM's own `--api-key` leaves the endpoints open that change weights; this key covers all of them.
"""

import asyncio
import hmac
import json
import os
import re
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

KEY_VARIABLE = "MM_AGRAE_VLLM_KEY"
"""Environment variable with the servers' key. Never an argument: other users can see those."""

FOLDER_VARIABLE = "MM_AGRAE_VLLM_FOLDER"
"""Environment variable with the folder that weights are stored in; `mm-agrae serve` sets it."""

FILES = "/mm_agrae/files/"
FILE_PATH = re.compile(re.escape(FILES) + r"([0-9a-z-]{1,64})(?:/([A-Za-z0-9_-][A-Za-z0-9_.-]*))?")

Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class Gate:
    """Requires the key, if one is set, on every path but /health, and stores files of weights.

    PUT /mm_agrae/files/FOLDER/NAME stores the body and replies with the folder's path on this
    machine. DELETE /mm_agrae/files/FOLDER removes the folder.
    """

    def __init__(self, app: Callable[[Message, Receive, Send], Awaitable[None]]):
        self.app = app
        self.key = os.environ.get(KEY_VARIABLE, "")
        self.root = Path(os.environ[FOLDER_VARIABLE])

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        path = scope["path"]
        if self.key and path != "/health" and not self._has_key(scope):
            return await _reply(scope, send, 401, {"error": f"the key of {KEY_VARIABLE} is needed"})
        if not path.startswith(FILES):
            return await self.app(scope, receive, send)
        match = FILE_PATH.fullmatch(path)
        method = scope.get("method")
        if match and match[2] and method == "PUT":
            return await self._store(self.root / match[1], match[2], scope, receive, send)
        if match and not match[2] and method == "DELETE":
            shutil.rmtree(self.root / match[1], ignore_errors=True)
            return await _reply(scope, send, 200, {})
        return await _reply(scope, send, 400, {"error": f"{method} {path} is not supported"})

    def _has_key(self, scope: Message) -> bool:
        given = dict(scope["headers"]).get(b"authorization", b"")
        return hmac.compare_digest(given, f"Bearer {self.key}".encode())

    async def _store(self, folder: Path, name: str, scope: Message, receive: Receive, send: Send) -> None:
        # A trainer that died leaves its folder behind. Only one is ever needed.
        for other in folder.parent.iterdir():
            if other != folder:
                shutil.rmtree(other, ignore_errors=True)
        folder.mkdir(exist_ok=True)
        incomplete = folder / f"{name}.part"
        try:
            with incomplete.open("wb") as file:
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return
                    await asyncio.to_thread(file.write, message.get("body", b""))
                    if not message.get("more_body"):
                        break
            incomplete.rename(folder / name)
        except OSError as error:
            return await _reply(scope, send, 507, {"error": f"cannot store weights: {error}"})
        finally:
            incomplete.unlink(missing_ok=True)
        await _reply(scope, send, 200, {"folder": str(folder)})


async def _reply(scope: Message, send: Send, status: int, content: Message) -> None:
    if scope["type"] == "websocket":
        return await send({"type": "websocket.close"})
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps(content).encode()})
