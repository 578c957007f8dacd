"""vLLM over HTTP: any number of servers, on this machine or others.

    rollout:
      engine: vllm_server
      vllm: {servers: [http://127.0.0.1:8000, http://127.0.0.1:8001]}

`mm-agrae serve` starts a server. A prompt is one request with n = G, so that prompt and pictures
are encoded once. Token ids go in and come out; text is never tokenized again. Weights go to the
servers as safetensors, or by NCCL where they were started for it, under a tag of run and version
that a server reports with every token: one that restarted, or was given weights by somebody else,
is noticed before its tokens are used. A server that is lost hands its requests to the others and
is tried again at the next `sync`.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import logging
import os
import threading
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import requests
import torch

from mm_agrae.config import RolloutSection, SamplingSection
from mm_agrae.errors import DataError, EngineError
from mm_agrae.model import weights
from mm_agrae.model.lora import model_and_adapter
from mm_agrae.model.policy import Policy
from mm_agrae.model.processing import Processing
from mm_agrae.rollout import Sync
from mm_agrae.rollout import vllm_common as common
from mm_agrae.rollout.vllm_worker import FILES, KEY_VARIABLE
from mm_agrae.types import Completion, Prompt

logger = logging.getLogger(__name__)

CHECK_LIMIT_S = 10.0
"""How long a server may take to accept a connection, or over a question that needs no work."""
RETRIES = 4
FIRST_PAUSE_S = 0.25
"""Before the first retry; twice as long before each further one."""
SHARD_BYTES = 512 * 2**20
"""Weights are sent in files of about this size, so that no process holds the model twice."""
MOST_AT_ONCE = 256
"""Requests in flight, and so threads, whatever the settings say."""
START = "start it with `mm-agrae serve`"
OTHER_WEIGHTS = "it holds other weights than this run's: it restarted, or another run uses it"


class _Unreachable(Exception):
    """No reply, or one that says to try again. `final`: not worth trying on this server."""

    def __init__(self, reason: str, final: bool = False):
        super().__init__(reason)
        self.final = final


class _Refused(Exception):
    """The server understood a request and will not serve it, now or later."""


class _Stopped(Exception):
    """The call to `generate` has ended by Ctrl-C or by another request's failure."""


@dataclass(eq=False)
class _Server:
    address: str
    lost: str = ""
    """Why it gets no requests; empty while it does."""
    about: dict[str, Any] = field(default_factory=dict)
    """What its workers say of themselves, see `vllm_worker.WorkerExtension`."""


@dataclass
class _Call:
    """One call to `generate`."""

    in_flight: dict[_Server, set[str]] = field(default_factory=lambda: defaultdict(set))
    ended: bool = False


class VllmServerEngine:
    exact = False

    def __init__(
        self,
        policy: Policy,
        processing: Processing,
        rollout: RolloutSection,
        *,
        batch_completions: int,
        max_tokens: int,
    ):
        """Wait until every server is ready and fits the policy. Raises EngineError.

        ConfigError for `sync=adapter` with a policy whose LoRA vLLM does not take alone.
        Each server samples `batch_completions` at once, or as many as make up one group.
        """
        self.policy = policy
        self.processing = processing
        self.settings = rollout.vllm
        self.batch_completions = batch_completions
        self.max_tokens = self.settings.max_model_len or max_tokens
        self.version = -1
        """Before the first `sync` no server holds the policy's weights."""
        dtype = self.settings.dtype
        self.dtype: str = policy.settings.dtype if dtype == "auto" else dtype
        # With overlap the weights may be changing while completions are sampled.
        self._may_sync_again = not rollout.overlap and not _distributed()
        self._by_adapter = self.settings.sync == "adapter"
        common.check_adapters(policy, self.settings.sync)
        self._key = os.environ.get(KEY_VARIABLE, "")
        self._run, self._tag = uuid.uuid4().hex[:12], ""
        self._senders: dict[_Server, Any] = {}
        self._lock = threading.Lock()
        vocabulary = len(policy.bias_V)
        self._forbidden = [index for index in processing.forbidden_ids if index < vocabulary]
        self._stop_ids = [index for index in processing.eos_ids if index < vocabulary]
        addresses = [address.rstrip("/") for address in self.settings.servers]
        for address in addresses:
            if not address.startswith(("http://", "https://")):
                raise EngineError(
                    f"rollout.vllm.servers: {address!r} is no address such as http://127.0.0.1:8000"
                )
        self._servers = [_Server(address) for address in dict.fromkeys(addresses)]
        until = time.monotonic() + self.settings.start_limit_s
        _at_once(self._servers, lambda server: self._wait_until_ready(server, until))

    def close(self) -> None:
        """Nothing to give back: the servers are the user's, and may serve the next run."""

    # ------------------------------------------------------------------ sampling

    def usable(
        self, prompts: Sequence[Prompt], max_new_tokens: int
    ) -> tuple[list[int], dict[int, DataError]]:
        """Indices of the prompts that `generate` takes, and the errors of the others by index."""
        return common.usable(prompts, self.max_tokens, self.processing, max_new_tokens)

    def generate(
        self,
        prompts: Sequence[Prompt],
        count: int,
        sampling: SamplingSection,
        seeds: Sequence[int],
        on_progress: Callable[[int], None] | None = None,
    ) -> list[list[Completion]]:
        """See `rollout.Engine.generate`. Progress is told by the group.

        Raises DataError, before anything is sampled, for a prompt that vLLM must not see: `usable`
        finds those. A prompt that a server refuses all the same gets an empty list and a warning
        in the log; DataError if all are refused. EngineError if no server is left.
        """
        if len(seeds) != len(prompts):
            raise ValueError(f"{len(seeds)} seeds for {len(prompts)} prompts")
        if not prompts:
            return []
        for prompt in prompts:
            common.check(prompt, self.max_tokens, self.processing, sampling.max_new_tokens)
        self._require_current_weights(count)
        version = self.version
        groups: list[list[Completion]] = [[] for _ in prompts]
        at_once = len(self._live()) * max(1, self.batch_completions // count)
        call = _Call()
        pool = ThreadPoolExecutor(min(at_once, MOST_AT_ONCE), "vllm_server")
        waiting = {
            pool.submit(self._sample, call, prompt, count, sampling, seed): index
            for index, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))
        }
        refused: dict[int, DataError] = {}
        try:
            for future in as_completed(waiting):
                index = waiting[future]
                try:
                    groups[index] = self._group(future.result(), count, version)
                except _Refused as error:
                    example = prompts[index].example
                    refused[index] = DataError(f"{example.origin or example.id}: {error}")
                if on_progress:
                    on_progress(count)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            self._abandon(call)
        for index in sorted(refused):
            logger.warning("no completions: %s", refused[index])
        if refused and not any(groups):
            raise refused[min(refused)]
        return groups

    def _group(self, choices: list[dict[str, Any]], count: int, version: int) -> list[Completion]:
        group = [
            common.completion(
                choice["token_ids"],
                [token["logprob"] for token in choice["logprobs"]["content"]],
                choice["finish_reason"],
                self.processing,
                version,
            )
            for choice in sorted(choices, key=lambda choice: choice["index"])
        ]
        return group * (count // len(group))  # a greedy completion is made once

    def _sample(
        self, call: _Call, prompt: Prompt, count: int, sampling: SamplingSection, seed: int
    ) -> list[dict[str, Any]]:
        """One prompt's completions, by whichever server can give them. Runs in its own thread.

        Raises _Refused if the row is to blame, and EngineError if no server is left.
        """
        made = self.processing
        body: dict[str, Any] = {
            "request_id": uuid.uuid4().hex,
            "token_ids": common.collapse_image_tokens(prompt, made),
            "content_parts": [
                {"type": "image_url", "url": _data_url(image)} for image in prompt.images
            ],
            "sampling_params": common.sampling_arguments(
                sampling, count, seed, self._forbidden, self._stop_ids
            ),
            "return_token_ids": True,
        }
        if self._by_adapter:
            body["model"] = self._tag
        failures = 0
        while True:
            with self._least_busy(call, body["request_id"]) as server:
                try:
                    return self._ask(server, body, prompt)
                except _Unreachable as error:
                    if error.final or not self._is_healthy(server):
                        self._lose(server, str(error))
                        continue
                    failures += 1
                    if failures > RETRIES:
                        raise _Refused(f"failed {failures} times, {error}") from None
            time.sleep(FIRST_PAUSE_S * 2 ** (failures - 1))

    def _ask(self, server: _Server, body: dict[str, Any], prompt: Prompt) -> list[dict[str, Any]]:
        """The choices of a reply that is what was asked for, from the weights wanted."""
        response = self._call(server, "POST", "/inference/v1/generate", json=body)
        status = response.status_code
        if status >= 500 or status == 429:
            raise _Unreachable(_said(response))
        if status == 404 and self._by_adapter:
            raise _Unreachable(OTHER_WEIGHTS, final=True)
        if status in (403, 404, 405):
            raise EngineError(f"{server.address} does not take token ids; {START}")
        if status != 200:
            raise _Refused(f"refused by {server.address}: {_said(response)}")
        reply = response.json()
        if reply["prompt_token_ids"] != prompt.token_ids.tolist():
            raise EngineError(
                f"{server.address} makes {len(reply['prompt_token_ids'])} tokens of a prompt of "
                f"{len(prompt)}: it resizes pictures again; {START}"
            )
        choices = reply["choices"]
        if any(choice["finish_reason"] == "abort" for choice in choices):
            raise _Unreachable("it gave up a request")
        spans = [span for choice in choices for span in choice["weight_versions"] or ()]
        if {span["version"] for span in spans} != {self._tag}:
            raise _Unreachable(OTHER_WEIGHTS, final=True)
        return choices

    def _abandon(self, call: _Call) -> None:
        """End what is still being sampled, if anything: nobody waits for it any more."""
        call.ended = True
        with self._lock:
            present = {server: list(ids) for server, ids in call.in_flight.items() if ids}
        for server, ids in present.items():
            body = {"request_ids": [f"generate-tokens-{request}" for request in ids]}
            with contextlib.suppress(_Unreachable, EngineError):
                self._call(server, "POST", "/abort_requests", json=body, limit=CHECK_LIMIT_S)

    # ------------------------------------------------------------------ weights

    def sync(self) -> Sync:
        """Send the policy's weights to every server that answers, lost ones included.

        Raises EngineError, on all processes, if no server took them.
        """
        started = time.perf_counter()
        outcome: list[Any] = [None]
        if _rank() == 0:
            outcome = [self._send(f"{self._run}.{self.policy.version}.{uuid.uuid4().hex[:8]}")]
        else:
            for _ in self._weights():
                pass  # gathering shards needs every process
        if _distributed():
            torch.distributed.broadcast_object_list(outcome)
        self._tag, lost, sent = outcome[0]
        for server in self._servers:
            server.lost = lost[server.address]
        self._require_a_server()
        self.version = self.policy.version
        return Sync(sent / 1e6, time.perf_counter() - started)

    def _weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        if self._by_adapter:
            return weights.adapter_weights(self.policy)
        return self.policy.full_weights()

    def _send(self, tag: str) -> tuple[str, dict[str, str], int]:
        """Returns the tag, why each server is lost ("" if it took the weights), and the bytes."""
        reason = self._each(self._servers, self._check_again)
        taking = [server for server in self._servers if not reason[server]]
        folders: dict[_Server, str] = {}
        sent = 0
        by_nccl = self.policy.device.type == "cuda" and not self._by_adapter
        if by_nccl and taking and all(s.about["weight_transfer"] == "nccl" for s in taking):
            whole = [(name, self._cast(tensor)) for name, tensor in self._weights()]
            sent = sum(tensor.nbytes for _, tensor in whole)
            for server in taking:  # each has a group of its own with this process
                reason |= self._each([server], lambda server: self._broadcast(server, whole, tag))
        else:
            name_of_folder = uuid.uuid4().hex
            for name, data in self._files():
                sent += len(data)
                path = f"{FILES}{name_of_folder}/{name}"

                def put(server: _Server, path: str = path, data: bytes = data) -> None:
                    response = self._ok(server, "PUT", path, data=data)
                    folders[server] = response.json()["folder"]

                reason |= self._each([s for s in taking if not reason[s]], put)

            def load(server: _Server) -> None:
                folder = folders[server]
                if self._by_adapter:  # its files stay until the next ones come
                    self._take_over(server, tag, lambda: self._load_adapter(server, folder, tag))
                    return
                try:
                    self._take_over(server, tag, lambda: self._load(server, folder))
                finally:
                    self._ok(server, "DELETE", f"{FILES}{name_of_folder}")

            reason |= self._each([s for s in taking if not reason[s]], load)
        for server in self._servers:
            if reason[server]:
                self._lose(server, reason[server])
            elif server.lost:
                logger.warning("vLLM server %s is back and has the weights", server.address)
        return tag, {server.address: reason[server] for server in self._servers}, sent

    def _take_over(self, server: _Server, tag: str, load: Callable[[], None]) -> None:
        """Let a server load weights between two requests, forget the old ones' work, and tag it."""
        self._ok(server, "POST", "/pause?mode=wait")
        try:
            load()
            # Both hold what the former weights made of prompts and of pictures.
            if not self._ok(server, "POST", "/reset_prefix_cache").json()["success"]:
                raise EngineError("it kept prompts in its cache that older weights have read")
            self._ok(server, "POST", "/reset_encoder_cache")
            self._ok(server, "POST", "/update_weight_version", json={"new_version": tag})
        finally:
            self._ok(server, "POST", "/resume")

    def _load(self, server: _Server, folder: str) -> None:
        call = {"method": "mm_agrae_load", "args": [folder]}
        self._ok(server, "POST", "/collective_rpc", json=call)

    def _load_adapter(self, server: _Server, folder: str, tag: str) -> None:
        # A name each: one loaded in place would be read again from its files for every batch.
        adapter = {"lora_name": tag, "lora_path": folder}
        self._ok(server, "POST", "/v1/load_lora_adapter", json=adapter)
        with contextlib.suppress(_Refused):  # it may have restarted
            self._ok(server, "POST", "/v1/unload_lora_adapter", json={"lora_name": self._tag})

    def _files(self) -> Iterator[tuple[str, bytes]]:
        """What is sent, as (name, content), in files of about SHARD_BYTES."""
        from safetensors.torch import save

        if self._by_adapter:
            # Copies: tensors that share memory cannot be stored together.
            adapter = {name: tensor.cpu().clone() for name, tensor in self._weights()}
            yield "adapter_model.safetensors", save(adapter)
            yield "adapter_config.json", json.dumps(weights.adapter_config(self.policy)).encode()
            return
        held: dict[str, torch.Tensor] = {}
        size = number = 0
        for name, tensor in self._weights():
            held[name] = self._cast(tensor).cpu().clone(memory_format=torch.contiguous_format)
            size += held[name].nbytes
            if size >= SHARD_BYTES:
                yield f"{number:05}.safetensors", save(held)
                held, size, number = {}, 0, number + 1
        if held:
            yield f"{number:05}.safetensors", save(held)

    def _cast(self, tensor: torch.Tensor) -> torch.Tensor:
        """In the servers' arithmetic: half the bytes to send where that is bfloat16."""
        dtype = getattr(torch, self.dtype)
        return tensor.detach().to(dtype) if tensor.is_floating_point() else tensor.detach()

    def _broadcast(self, server: _Server, whole: list[tuple[str, torch.Tensor]], tag: str) -> None:
        """Send weights from GPU to GPU by vLLM's own transfer engine."""
        from mm_agrae.rollout.vllm_nccl import NcclSender

        if server.lost:
            self._senders.pop(server, None)  # of the process that it was before
        if server not in self._senders:
            post = partial(self._ok, server, "POST")
            self._senders[server] = NcclSender(post, server.address, server.about["world_size"])
        self._take_over(server, tag, lambda: self._senders[server].send(whole))

    # ------------------------------------------------------------------ servers

    def _wait_until_ready(self, server: _Server, until: float) -> None:
        while True:
            try:
                limit = min(CHECK_LIMIT_S, max(1.0, until - time.monotonic()))
                self._ok(server, "GET", "/health", limit=limit)
                break
            except (_Unreachable, _Refused) as error:
                if time.monotonic() > until:
                    raise EngineError(
                        f"no vLLM server is ready at {server.address} after "
                        f"{self.settings.start_limit_s:g} s (rollout.vllm.start_limit_s): {error}; "
                        f"{START}, look at what it prints, or take the address out of "
                        "rollout.vllm.servers"
                    ) from None
            time.sleep(FIRST_PAUSE_S)
        try:
            self._check_fit(server)
        except (_Unreachable, _Refused) as error:
            raise EngineError(f"vLLM server {server.address}: {error}") from None

    def _check_again(self, server: _Server) -> None:
        self._ok(server, "GET", "/health", limit=CHECK_LIMIT_S)
        self._check_fit(server)

    def _check_fit(self, server: _Server) -> None:
        """Raises EngineError if a server is not one that this policy can be sampled from."""
        ask = {"method": "mm_agrae_describe"}
        limit = 6 * CHECK_LIMIT_S
        response = self._call(server, "POST", "/collective_rpc", json=ask, limit=limit)
        if response.status_code != 200:
            raise EngineError(
                f"vLLM server {server.address} cannot take weights (POST /collective_rpc: "
                f"{_said(response)}); {START}"
            )
        server.about = about = response.json()["results"][0]
        hf = self.policy.hf
        text = hf.config.get_text_config()
        wrong = [
            f"its {name.replace('_', ' ')} is {about[name]}, not {wanted}"
            for name, wanted in {
                "architectures": [type(hf).__name__],
                "vocab_size": text.vocab_size,
                "hidden_size": text.hidden_size,
                "layers": text.num_hidden_layers,
                "dtype": self.dtype,
                "logprobs_mode": "processed_logprobs",
            }.items()
            if about[name] != wanted
        ]
        if about["max_model_len"] < self.max_tokens:
            wrong.append(f"it takes {about['max_model_len']} tokens, fewer than {self.max_tokens}")
        if self._by_adapter and about["lora_rank"] < self._rank_of_adapter():
            wrong.append(f"it takes adapters up to rank {about['lora_rank']}")
        if about["lora_rank"] and not self._by_adapter:
            wrong.append("it was started with --lora-rank, for rollout.vllm.sync=adapter alone")
        if wrong:
            flags = f"--dtype {self.dtype} --max-model-len {self.max_tokens}"
            if self._by_adapter:
                flags += f" --lora-rank {self._rank_of_adapter()}"
            raise EngineError(
                f"vLLM server {server.address} does not fit: {'; '.join(wrong)}. Start it with "
                f"`mm-agrae serve {model_and_adapter(self.policy.settings.path)[0]} {flags}`"
            )

    def _rank_of_adapter(self) -> int:
        return max(config.r for config in self.policy.model.peft_config.values())

    def _require_current_weights(self, count: int) -> None:
        """Ask every server for its tag; put aside, or give the weights again to, those with
        others. Raises EngineError if no server is left or `count` is too much for one."""
        if self.version < 0 and not self._may_sync_again:
            raise RuntimeError("generate() before the first sync()")

        def check(server: _Server) -> None:
            response = self._ok(server, "GET", "/weight_info", limit=CHECK_LIMIT_S)
            if response.json()["weight_version"] != self._tag:
                raise _Refused(OTHER_WEIGHTS)

        reason = self._each(self._live(), check)
        for server, why in reason.items():
            if why:
                self._lose(server, why)
        restarted = self.version < 0 or OTHER_WEIGHTS in reason.values()
        if restarted and self._may_sync_again and self.version in (-1, self.policy.version):
            self.sync()
        self._require_a_server()
        most = min(server.about["max_num_seqs"] for server in self._live())
        if count > most:
            raise EngineError(
                f"a vLLM server samples at most {most} completions of a prompt, not {count}; "
                f"start it with --max-num-seqs {count}"
            )

    def _live(self) -> list[_Server]:
        return [server for server in self._servers if not server.lost]

    def _require_a_server(self) -> None:
        if not self._live():
            lost = "; ".join(f"{server.address}: {server.lost}" for server in self._servers)
            raise EngineError(
                f"no vLLM server is left ({lost}). Start them again with `mm-agrae serve`; the "
                "run goes on from its last checkpoint"
            )

    def _lose(self, server: _Server, reason: str) -> None:
        with self._lock:
            first, server.lost = not server.lost, reason
        if first:
            logger.warning(
                "vLLM server %s is lost: %s. %d of %d are left; it is tried again when the weights "
                "next change",
                server.address,
                reason,
                len(self._live()),
                len(self._servers),
            )

    @contextlib.contextmanager
    def _least_busy(self, call: _Call, request: str) -> Iterator[_Server]:
        """The server with the fewest requests in flight, while `request` is one of them."""
        with self._lock:
            if call.ended:
                raise _Stopped
            self._require_a_server()
            server = min(self._live(), key=lambda server: len(call.in_flight[server]))
            call.in_flight[server].add(request)
        try:
            yield server
        finally:
            with self._lock:
                call.in_flight[server].discard(request)

    def _is_healthy(self, server: _Server) -> bool:
        for pause in (0.0, FIRST_PAUSE_S, 2 * FIRST_PAUSE_S):
            time.sleep(pause)
            with contextlib.suppress(_Unreachable, _Refused):
                self._ok(server, "GET", "/health", limit=CHECK_LIMIT_S)
                return True
        return False

    def _each(
        self, servers: Iterable[_Server], action: Callable[[_Server], object]
    ) -> dict[_Server, str]:
        """Do something to several servers at once; why it failed, or "", for each."""

        def attempt(server: _Server) -> str:
            try:
                action(server)
            except (_Unreachable, _Refused, EngineError) as error:
                return str(error)
            return ""

        return _at_once(servers, attempt)

    def _ok(self, server: _Server, method: str, path: str, **arguments: Any) -> requests.Response:
        """As `_call`; any status but 200 raises _Refused."""
        response = self._call(server, method, path, **arguments)
        if response.status_code != 200:
            raise _Refused(f"{method} {path}: {_said(response)}")
        return response

    def _call(
        self,
        server: _Server,
        method: str,
        path: str,
        *,
        limit: float | None = None,
        **arguments: Any,
    ) -> requests.Response:
        """One HTTP request, within request_limit_s if no `limit` is given (seconds).

        Raises _Unreachable if no reply comes, EngineError if the key is wrong.
        """
        limit = limit or self.settings.request_limit_s
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        try:
            # A connection each: a kept one may be closed just as it is used again.
            with requests.Session() as session:
                # Proxies are not for machines of one's own; certificates are for https.
                session.trust_env = server.address.startswith("https://")
                response = session.request(
                    method,
                    server.address + path,
                    headers=headers,
                    timeout=(min(CHECK_LIMIT_S, limit), limit),
                    **arguments,
                )
        except requests.Timeout:
            raise _Unreachable(f"{method} {path}: no answer in {limit:g} s", final=True) from None
        except requests.RequestException as error:
            reason = f"{method} {path}: {type(error).__name__}"
            raise _Unreachable(reason) from None
        if response.status_code == 401:
            raise EngineError(
                f"vLLM server {server.address} asks for a key; set {KEY_VARIABLE} to the one that "
                "it was started with"
            )
        return response


def _at_once(servers: Iterable[_Server], function: Callable[[_Server], Any]) -> dict[_Server, Any]:
    """function(server) for each, in threads. Raises what the first of them raised."""
    servers = list(servers)
    with ThreadPoolExecutor(max(1, len(servers))) as pool:
        return dict(zip(servers, pool.map(function, servers), strict=True))


def _said(response: requests.Response) -> str:
    """Status and message of an unwelcome reply, on one line."""
    try:
        error = response.json()["error"]
        message = error["message"] if isinstance(error, dict) else str(error)
    except (ValueError, KeyError, TypeError):
        message = response.text
    return f"{response.status_code} {' '.join(message.split())[:500]}".strip()


def _data_url(image: Any) -> str:
    """A picture as PNG, which keeps every pixel as it is."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _rank() -> int:
    return torch.distributed.get_rank() if _distributed() else 0
