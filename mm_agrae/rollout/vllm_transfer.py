"""Weights to vLLM servers: as safetensors files over HTTP, or by NCCL.

Every transfer has a tag of run and version, which the server reports with each token it samples.
"""

import contextlib
import json
import socket
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import torch

from mm_agrae.errors import EngineError
from mm_agrae.model.weights import adapter_config
from mm_agrae.rollout.vllm_common import VllmBase
from mm_agrae.rollout.vllm_connection import Refused, Server, failures
from mm_agrae.rollout.vllm_gate import FILES

SHARD_BYTES = 512 * 2**20
"""Approximate size of a file, so that no process holds the model twice."""


Weights = list[tuple[str, torch.Tensor]]


class WeightTransfer:
    """Sends the weights of one engine's policy to its servers."""

    def __init__(self, engine: VllmBase):
        self._engine = engine
        self._senders: dict[Server, Any] = {}

    def send(self, servers: list[Server], tag: str, previous_tag: str) -> tuple[dict[Server, str], int]:
        """Returns why each server failed ("" if it has the weights), and the bytes sent to one.

        Collective if the policy is sharded, which the other processes join by consuming
        `VllmBase.weights`. `previous_tag` is that of the transfer before.
        """
        by_nccl = self._engine.policy.device.type == "cuda" and not self._engine.by_adapter
        if by_nccl and servers and all(s.about["weight_transfer"] == "nccl" for s in servers):
            return self._send_by_nccl(servers, tag)
        failed = dict.fromkeys(servers, "")
        folders: dict[Server, str] = {}
        url = f"{FILES}{uuid.uuid4().hex}"
        sent = 0

        def put(name: str, data: bytes, server: Server) -> None:
            folders[server] = server.ok("PUT", f"{url}/{name}", data=data).json()["folder"]

        def load(server: Server) -> None:
            if self._engine.by_adapter:  # vLLM may read its files again: they stay until the next
                with _replacing_weights(server, tag):
                    _load_adapter(server, folders[server], tag, previous_tag)
                return
            call = {"method": "mm_agrae_load", "args": [folders[server]]}
            try:
                with _replacing_weights(server, tag):
                    server.ok("POST", "/collective_rpc", json=call)
            finally:
                server.ok("DELETE", url)

        def remaining() -> list[Server]:
            return [server for server in servers if not failed[server]]

        for name, data in self.files():
            sent += len(data)
            failed |= failures(remaining(), partial(put, name, data))
        return failed | failures(remaining(), load), sent

    def files(self) -> Iterator[tuple[str, bytes]]:
        """What is sent, as (name, content), in files of about SHARD_BYTES."""
        from safetensors.torch import save

        if self._engine.by_adapter:
            # Copies, because safetensors refuses tensors that share memory.
            adapter = {name: tensor.cpu().clone() for name, tensor in self._engine.weights()}
            yield "adapter_model.safetensors", save(adapter)
            yield "adapter_config.json", json.dumps(adapter_config(self._engine.policy)).encode()
            return
        held: dict[str, torch.Tensor] = {}
        size = number = 0
        for name, tensor in self._engine.weights():
            held[name] = self._cast(tensor).cpu().clone(memory_format=torch.contiguous_format)
            size += held[name].nbytes
            if size >= SHARD_BYTES:
                yield f"{number:05}.safetensors", save(held)
                held, size, number = {}, 0, number + 1
        if held:
            yield f"{number:05}.safetensors", save(held)

    def _cast(self, tensor: torch.Tensor) -> torch.Tensor:
        """To the servers' dtype: half the bytes to send where that is bfloat16."""
        dtype = getattr(torch, self._engine.dtype)
        return tensor.detach().to(dtype) if tensor.is_floating_point() else tensor.detach()

    def _send_by_nccl(self, servers: Iterable[Server], tag: str) -> tuple[dict[Server, str], int]:
        """From GPU to GPU, by vLLM's own transfer engine."""
        whole = [(name, self._cast(tensor)) for name, tensor in self._engine.weights()]

        def send(server: Server) -> None:
            if server.lost:
                self._senders.pop(server, None)  # it belongs to a process that has ended
            if server not in self._senders:
                self._senders[server] = NcclSender(server)
            with _replacing_weights(server, tag):
                self._senders[server].send(whole)

        failed: dict[Server, str] = {}
        for server in servers:  # one after another: each has its own group with this process
            failed |= failures([server], send)
        return failed, sum(tensor.nbytes for _, tensor in whole)


@contextlib.contextmanager
def _replacing_weights(server: Server, tag: str) -> Iterator[None]:
    """Load weights between two requests, drop what was computed with the old ones, set the tag."""
    server.ok("POST", "/pause?mode=wait")
    try:
        yield
        # Both hold what the previous weights made of prompts and images.
        if not server.ok("POST", "/reset_prefix_cache").json()["success"]:
            raise EngineError("it did not drop prompts that older weights have read")
        server.ok("POST", "/reset_encoder_cache")
        server.ok("POST", "/update_weight_version", json={"new_version": tag})
    finally:
        server.ok("POST", "/resume")


def _load_adapter(server: Server, folder: str, tag: str, previous_tag: str) -> None:
    # A new name each time: vLLM reads an adapter loaded in place from its files for every batch.
    server.ok("POST", "/v1/load_lora_adapter", json={"lora_name": tag, "lora_path": folder})
    with contextlib.suppress(Refused):  # the server may have restarted and not know it
        server.ok("POST", "/v1/unload_lora_adapter", json={"lora_name": previous_tag})


class NcclSender:
    """A process group with the workers of one server, in which this process is rank 0.

    Written from the sources of vLLM 0.32's `distributed/weight_transfer`; not run yet, as that takes two GPUs. It
    needs vllm in the trainer's environment, a server started with `mm-agrae serve --nccl`, and NCCL between the
    trainer's GPU and the server's, which must be different ones. Raises what vLLM raises.
    """

    def __init__(self, server: Server):
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo, NCCLTrainerWeightTransferEngine

        host = _local_address(server.address)
        with socket.socket() as listener:
            listener.bind((host, 0))
            port = listener.getsockname()[1]
        world = 1 + server.about["world_size"]
        self._source = _Source()
        self._engine = NCCLTrainerWeightTransferEngine.trainer_init(
            NCCLTrainerInitInfo(master_address=host, master_port=port, world_size=world, rank=0),
            client=_Control(server),
            source=self._source,
        )

    def send(self, whole: Weights) -> None:
        self._source.whole = whole
        try:
            self._engine.send_weights()
        finally:
            self._source.whole = []


@dataclass
class _Source:
    """vLLM's WeightSource: names, dtypes and shapes first, then the tensors."""

    whole: Weights = field(default_factory=list)

    def metadata(self) -> list[Any]:
        from vllm.distributed.weight_transfer.base import ParamMeta

        return [ParamMeta(name, each.dtype, tuple(each.shape)) for name, each in self.whole]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return iter(self.whole)


@dataclass
class _Control:
    """vLLM's VLLMWeightSyncClient; vLLM's own client sends no key."""

    server: Server

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self.server.ok("POST", "/init_weight_transfer_engine", json={"init_info": init_info})

    def start_weight_update(self) -> None:
        self.server.ok("POST", "/start_weight_update")

    def update_weights(self, update_info: Any) -> None:
        self.server.ok("POST", "/update_weights", json={"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """The tag is set once the caches are empty, by `_replacing_weights`."""
        self.server.ok("POST", "/finish_weight_update")


def _local_address(address: str) -> str:
    """This machine's address as the server sees it."""
    url = urlsplit(address)
    port = url.port or (443 if url.scheme == "https" else 80)
    with socket.create_connection((url.hostname or "", port), timeout=10) as connection:
        return connection.getsockname()[0]
