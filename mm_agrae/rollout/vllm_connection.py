"""Connections to vLLM servers: single HTTP requests, and which servers are still in use."""

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import requests

from mm_agrae.errors import EngineError
from mm_agrae.rollout.vllm_gate import KEY_VARIABLE

logger = logging.getLogger(__name__)

CHECK_LIMIT_S = 10.0
"""How long a server may take to accept a connection, or to answer a question without work."""
FIRST_PAUSE_S = 0.25
"""Before the first retry; doubled before each further one."""
HOW_TO_START = "start it with `mm-agrae serve`"


class Unreachable(Exception):
    """No reply, or one that says to try again. `final`: pointless to try this server again."""

    def __init__(self, reason: str, final: bool = False):
        super().__init__(reason)
        self.final = final


class Refused(Exception):
    """The server understood a request and will not serve it, now or later."""


@dataclass(eq=False)
class Server:
    address: str
    request_limit_s: float
    key: str = field(default_factory=lambda: os.environ.get(KEY_VARIABLE, ""), repr=False)
    lost: str = ""
    """Why it gets no requests; empty while it does."""
    about: dict[str, Any] = field(default_factory=dict)
    """What its workers report of themselves, see `vllm_worker.WorkerExtension`."""

    def call(self, method: str, path: str, *, limit: float | None = None, **arguments: Any) -> requests.Response:
        """One HTTP request, to be answered within `limit` seconds (request_limit_s if None).

        Raises Unreachable if no reply comes, EngineError if the key is wrong.
        """
        limit = limit or self.request_limit_s
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        try:
            # A new connection each time: a pooled one may be closed just as it is reused.
            with requests.Session() as session:
                # Proxies and certificates from the environment are for https only.
                session.trust_env = self.address.startswith("https://")
                response = session.request(
                    method,
                    self.address + path,
                    headers=headers,
                    timeout=(min(CHECK_LIMIT_S, limit), limit),
                    **arguments,
                )
        except requests.Timeout:
            raise Unreachable(f"{method} {path}: no answer in {limit:g} s", final=True) from None
        except requests.RequestException as error:
            raise Unreachable(f"{method} {path}: {type(error).__name__}") from None
        if response.status_code == 401:
            raise EngineError(
                f"vLLM server {self.address} asks for a key; set {KEY_VARIABLE} to the one that it was started with"
            )
        return response

    def ok(self, method: str, path: str, **arguments: Any) -> requests.Response:
        """As `call`; any status but 200 raises Refused."""
        response = self.call(method, path, **arguments)
        if response.status_code != 200:
            raise Refused(f"{method} {path}: {error_of(response)}")
        return response

    def is_healthy(self) -> bool:
        for pause in (0.0, FIRST_PAUSE_S, 2 * FIRST_PAUSE_S):
            time.sleep(pause)
            with contextlib.suppress(Unreachable, Refused):
                self.ok("GET", "/health", limit=CHECK_LIMIT_S)
                return True
        return False

    def wait_until_ready(self, limit_s: float) -> None:
        """Raises EngineError if the server is not ready within `limit_s` seconds."""
        until = time.monotonic() + limit_s
        while True:
            limit = min(CHECK_LIMIT_S, max(1.0, until - time.monotonic()))
            try:
                self.ok("GET", "/health", limit=limit)
                return
            except (Unreachable, Refused) as error:
                if time.monotonic() > until:
                    raise EngineError(
                        f"no vLLM server is ready at {self.address} after {limit_s:g} s "
                        f"(rollout.vllm.start_limit_s): {error}; {HOW_TO_START}, look at its "
                        "output, or remove the address from rollout.vllm.servers"
                    ) from None
            time.sleep(FIRST_PAUSE_S)


class Servers:
    """All servers of an engine, of which some may be lost."""

    def __init__(self, addresses: Iterable[str], request_limit_s: float):
        """Raises EngineError for an address that is none."""
        addresses = [address.rstrip("/") for address in addresses]
        for address in addresses:
            if not address.startswith(("http://", "https://")):
                raise EngineError(f"rollout.vllm.servers: {address!r} is not an address such as http://127.0.0.1:8000")
        self.all = [Server(address, request_limit_s) for address in dict.fromkeys(addresses)]
        self.lock = threading.Lock()

    def live(self) -> list[Server]:
        return [server for server in self.all if not server.lost]

    def require_one(self) -> None:
        """Raises EngineError if every server is lost."""
        if not self.live():
            lost = "; ".join(f"{server.address}: {server.lost}" for server in self.all)
            raise EngineError(
                f"no vLLM server is left ({lost}). Start them again with `mm-agrae serve` and "
                "resume the run from its last checkpoint"
            )

    def lose(self, server: Server, reason: str) -> None:
        """Send no more requests to a server; one warning per loss."""
        with self.lock:
            first, server.lost = not server.lost, reason
        if first:
            left = f"{len(self.live())} of {len(self.all)} are left"
            what = "vLLM server %s is lost: %s. %s; it is tried again when the weights next change"
            logger.warning(what, server.address, reason, left)

    def report(self, failed: dict[Server, str]) -> None:
        """`lose` servers with a reason to; say which of those without one had been lost."""
        for server, reason in failed.items():
            if reason:
                self.lose(server, reason)
            elif server.lost:
                logger.warning("vLLM server %s is back and has the weights", server.address)


def at_once(servers: Iterable[Server], function: Callable[[Server], Any]) -> dict[Server, Any]:
    """function(server) for each, in threads. Raises what the first of them raised."""
    servers = list(servers)
    with ThreadPoolExecutor(max(1, len(servers))) as pool:
        return dict(zip(servers, pool.map(function, servers), strict=True))


def failures(servers: Iterable[Server], action: Callable[[Server], object]) -> dict[Server, str]:
    """Apply `action` to several servers at once; returns why it failed, or "", for each."""

    def attempt(server: Server) -> str:
        try:
            action(server)
        except (Unreachable, Refused, EngineError) as error:
            return str(error)
        return ""

    return at_once(servers, attempt)


def error_of(response: requests.Response) -> str:
    """Status and message of an error reply, on one line."""
    try:
        error = response.json()["error"]
        message = error["message"] if isinstance(error, dict) else str(error)
    except (ValueError, KeyError, TypeError):
        message = response.text
    return f"{response.status_code} {' '.join(message.split())[:500]}".strip()
