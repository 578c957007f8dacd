"""vLLM over HTTP: any number of servers (`mm-agrae serve`), on this machine or others.

A prompt is one request with n = G, so that it is encoded once with its images. Token ids go in and come out; text is
never tokenized again. Every token comes with the tag of the weights that sampled it (`vllm_transfer`), so a server
that restarted, or got weights from another run, is noticed before its tokens are used. A lost server's requests go to
the others, and it is tried again at the next `sync`.
"""

import base64
import collections
import contextlib
import io
import logging
import time
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from typing import Any

import torch

from mm_agrae.errors import DataError, EngineError
from mm_agrae.model.lora import model_and_adapter
from mm_agrae.rollout.vllm_common import Output, Progress, Request, VllmBase, world_size
from mm_agrae.rollout.vllm_connection import (
    CHECK_LIMIT_S,
    FIRST_PAUSE_S,
    HOW_TO_START,
    Refused,
    Server,
    Servers,
    Unreachable,
    at_once,
    error_of,
    failures,
)
from mm_agrae.rollout.vllm_transfer import WeightTransfer
from mm_agrae.types import Completion, Prompt

logger = logging.getLogger(__name__)

RETRIES = 4
MOST_AT_ONCE = 256
"""Requests in flight, and so threads, whatever the settings say."""
OTHER_WEIGHTS = "it holds other weights than this run's: it restarted, or another run uses it"


class _Stopped(Exception):
    """The call to `generate` has ended by Ctrl-C or by the failure of another request."""


@dataclass
class _Call:
    """One call to `generate`: its requests in flight at each server."""

    servers: Servers
    in_flight: dict[Server, set[str]] = field(default_factory=lambda: collections.defaultdict(set))
    ended: bool = False

    @contextlib.contextmanager
    def least_busy(self, request: str) -> Iterator[Server]:
        """The live server with the fewest requests in flight, of which `request` is now one."""
        with self.servers.lock:
            if self.ended:
                raise _Stopped
            self.servers.require_one()
            server = min(self.servers.live(), key=lambda server: len(self.in_flight[server]))
            self.in_flight[server].add(request)
        try:
            yield server
        finally:
            with self.servers.lock:
                self.in_flight[server].discard(request)

    def end(self) -> None:
        """Abort requests that are still in flight; nobody waits for them any more."""
        self.ended = True
        with self.servers.lock:
            current = {server: list(ids) for server, ids in self.in_flight.items() if ids}
        for server, ids in current.items():
            body = {"request_ids": [f"generate-tokens-{request}" for request in ids]}
            with contextlib.suppress(Unreachable, EngineError):
                server.call("POST", "/abort_requests", json=body, limit=CHECK_LIMIT_S)


class VllmServerEngine(VllmBase):
    def _start(self) -> None:
        """Wait until every server is ready and check that it fits the policy.

        Each server samples `batch_completions` at once, but at least one group. Raises EngineError
        if a server is not ready in time or does not fit.
        """
        # With overlap the policy may be changing while completions are sampled.
        self._may_sync_again = not self.rollout.overlap and world_size() == 1
        self._run, self._tag = uuid.uuid4().hex[:12], ""
        self.servers = Servers(self.settings.servers, self.settings.request_limit_s)
        self.transfer = WeightTransfer(self)
        at_once(self.servers.all, self._connect)

    def close(self) -> None:
        """Nothing to free: the servers are the user's, and may serve the next run."""

    def _generate(
        self, prompts: Sequence[Prompt], requests: list[Request], count: int, on_progress: Progress
    ) -> list[list[Completion]]:
        """A prompt that only a server refuses gets an empty group and a warning in the log.

        Raises DataError if all are refused, EngineError if no server is left.
        """
        if not prompts:
            return []
        self._require_current_weights(count)
        groups: list[list[Completion]] = [[] for _ in prompts]
        refused: dict[int, DataError] = {}
        call = _Call(self.servers)
        groups_at_once = len(self.servers.live()) * max(1, self.batch_completions // count)
        pool = ThreadPoolExecutor(min(groups_at_once, MOST_AT_ONCE), "vllm_server")
        waiting = {
            pool.submit(self._sample, call, prompt, *requests[index]): index for index, prompt in enumerate(prompts)
        }
        try:
            for future in as_completed(waiting):
                index = waiting[future]
                try:
                    groups[index] = self.group(future.result(), count)
                except Refused as error:
                    example = prompts[index].example
                    refused[index] = DataError(f"{example.origin or example.id}: {error}")
                on_progress(count)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            call.end()
        for index in sorted(refused):
            logger.warning("no completions: %s", refused[index])
        if refused and not any(groups):
            raise refused[min(refused)]
        return groups

    def _sample(self, call: _Call, prompt: Prompt, token_ids: list[int], arguments: dict[str, Any]) -> list[Output]:
        """One prompt's completions, from whichever server can give them. Runs in its own thread.

        Raises Refused if the prompt is to blame, EngineError if no server is left.
        """
        body: dict[str, Any] = {
            "request_id": uuid.uuid4().hex,
            "token_ids": token_ids,
            "content_parts": [{"type": "image_url", "url": _data_url(image)} for image in prompt.images],
            "sampling_params": arguments,
            "return_token_ids": True,
        }
        if self.by_adapter:
            body["model"] = self._tag
        failed = 0
        while True:
            with call.least_busy(body["request_id"]) as server:
                try:
                    return self._request(server, body, prompt)
                except Unreachable as error:
                    if error.final or not server.is_healthy():
                        self.servers.lose(server, str(error))
                        continue
                    failed += 1
                    if failed > RETRIES:
                        raise Refused(f"failed {failed} times, {error}") from None
            time.sleep(FIRST_PAUSE_S * 2 ** (failed - 1))

    def _request(self, server: Server, body: dict[str, Any], prompt: Prompt) -> list[Output]:
        """What `group` takes, checked to be of this prompt and from the expected weights."""
        response = server.call("POST", "/inference/v1/generate", json=body)
        status = response.status_code
        if status >= 500 or status == 429:
            raise Unreachable(error_of(response))
        if status == 404 and self.by_adapter:
            raise Unreachable(OTHER_WEIGHTS, final=True)
        if status in (403, 404, 405):
            raise EngineError(f"{server.address} does not take token ids; {HOW_TO_START}")
        if status != 200:
            raise Refused(f"refused by {server.address}: {error_of(response)}")
        reply = response.json()
        if reply["prompt_token_ids"] != prompt.token_ids.tolist():
            raise EngineError(
                f"{server.address} makes {len(reply['prompt_token_ids'])} tokens of a prompt of "
                f"{len(prompt)}: it resizes images again; {HOW_TO_START}"
            )
        choices = reply["choices"]
        if any(choice["finish_reason"] == "abort" for choice in choices):
            raise Unreachable("it aborted a request")
        spans = [span for choice in choices for span in choice["weight_versions"] or ()]
        if {span["version"] for span in spans} != {self._tag}:
            raise Unreachable(OTHER_WEIGHTS, final=True)
        outputs: list[Output] = []
        for choice in sorted(choices, key=lambda choice: choice["index"]):
            logprobs = [token["logprob"] for token in choice["logprobs"]["content"]]
            outputs.append((choice["token_ids"], logprobs, choice["finish_reason"]))
        return outputs

    def _sync(self) -> int:
        """Send the policy's weights to every server that answers, lost ones included.

        Raises EngineError, on all processes, if no server took them.
        """
        outcome: list[Any] = [None]
        if world_size() == 1 or torch.distributed.get_rank() == 0:
            outcome = [self._send(f"{self._run}.{self.policy.version}.{uuid.uuid4().hex[:8]}")]
        else:
            collections.deque(self.weights(), maxlen=0)  # gathering shards is collective
        if world_size() > 1:
            torch.distributed.broadcast_object_list(outcome)
        self._tag, lost, sent = outcome[0]
        for server in self.servers.all:
            server.lost = lost[server.address]
        self.servers.require_one()
        return sent

    def _send(self, tag: str) -> tuple[str, dict[str, str], int]:
        """Returns the tag, why each server is lost ("" if it has the weights), and the bytes."""
        failed = failures(self.servers.all, self._check_again)
        answering = [server for server in self.servers.all if not failed[server]]
        also_failed, sent = self.transfer.send(answering, tag, self._tag)
        failed |= also_failed
        self.servers.report(failed)
        return tag, {server.address: reason for server, reason in failed.items()}, sent

    def _require_current_weights(self, count: int) -> None:
        """Ask every server for its tag; lose those with other weights, or send them again.

        Raises EngineError if no server is left or `count` is too much for one.
        """
        if self.version < 0 and not self._may_sync_again:
            raise RuntimeError("generate() before the first sync()")

        def check_tag(server: Server) -> None:
            response = server.ok("GET", "/weight_info", limit=CHECK_LIMIT_S)
            if response.json()["weight_version"] != self._tag:
                raise Refused(OTHER_WEIGHTS)

        failed = failures(self.servers.live(), check_tag)
        self.servers.report(failed)
        restarted = self.version < 0 or OTHER_WEIGHTS in failed.values()
        if restarted and self._may_sync_again and self.version in (-1, self.policy.version):
            self.sync()
        self.servers.require_one()
        most = min(server.about["max_num_seqs"] for server in self.servers.live())
        if count > most:
            raise EngineError(
                f"a vLLM server samples at most {most} completions of a prompt, not {count}; "
                f"start it with --max-num-seqs {count}"
            )

    def _connect(self, server: Server) -> None:
        server.wait_until_ready(self.settings.start_limit_s)
        try:
            self._check_fit(server)
        except (Unreachable, Refused) as error:
            raise EngineError(f"vLLM server {server.address} cannot take weights ({error}); {HOW_TO_START}") from None

    def _check_again(self, server: Server) -> None:
        server.ok("GET", "/health", limit=CHECK_LIMIT_S)
        self._check_fit(server)

    def _check_fit(self, server: Server) -> None:
        """Raises EngineError if this server does not fit, Refused if it cannot take weights."""
        question = {"method": "mm_agrae_describe"}
        response = server.ok("POST", "/collective_rpc", json=question, limit=6 * CHECK_LIMIT_S)
        server.about = about = response.json()["results"][0]
        hf = self.policy.hf
        text = hf.config.get_text_config()
        wanted = {
            "architectures": [type(hf).__name__],
            "vocab_size": text.vocab_size,
            "hidden_size": text.hidden_size,
            "layers": text.num_hidden_layers,
            "dtype": self.dtype,
            "logprobs_mode": "processed_logprobs",
        }
        problems = [
            f"its {name.replace('_', ' ')} is {about[name]}, not {value}"
            for name, value in wanted.items()
            if about[name] != value
        ]
        if about["max_model_len"] < self.max_tokens:
            problems.append(f"it takes {about['max_model_len']} tokens, fewer than {self.max_tokens}")
        if self.by_adapter and about["lora_rank"] < self.adapter_rank:
            problems.append(f"it takes adapters up to rank {about['lora_rank']}")
        if about["lora_rank"] and not self.by_adapter:
            problems.append("its --lora-rank is for rollout.vllm.sync=adapter only")
        if problems:
            flags = f"--dtype {self.dtype} --max-model-len {self.max_tokens}"
            if self.by_adapter:
                flags += f" --lora-rank {self.adapter_rank}"
            raise EngineError(
                f"vLLM server {server.address} does not fit: {'; '.join(problems)}. Start it with "
                f"`mm-agrae serve {model_and_adapter(self.policy.settings.path)[0]} {flags}`"
            )


def _data_url(image: Any) -> str:
    """An image as PNG, which is lossless."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
