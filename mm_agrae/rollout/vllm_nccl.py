"""Weights from this process's GPU to a vLLM server's GPUs, by vLLM's own transfer engine.

Written from the sources of vLLM 0.32's `distributed/weight_transfer`; not run yet, as that takes
two GPUs. It needs vllm in the trainer's environment, a server started with `mm-agrae serve
--nccl`, and NCCL between the trainer's GPU and the server's, which must be different ones.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import torch

Weights = list[tuple[str, torch.Tensor]]


class NcclSender:
    """A process group with the workers of one server, in which this process is rank 0.

    `post(path, json=…)` makes a request to that server. Raises what vLLM raises.
    """

    def __init__(self, post: Callable[..., Any], address: str, workers: int):
        from vllm.distributed.weight_transfer.nccl_engine import (
            NCCLTrainerInitInfo,
            NCCLTrainerWeightTransferEngine,
        )

        host = _local_address(address)
        with socket.socket() as listener:
            listener.bind((host, 0))
            port = listener.getsockname()[1]
        self._source = _Source()
        self._engine = NCCLTrainerWeightTransferEngine.trainer_init(
            NCCLTrainerInitInfo(
                master_address=host, master_port=port, world_size=1 + workers, rank=0
            ),
            client=_Control(post),
            source=self._source,
        )

    def send(self, whole: Weights) -> None:
        self._source.whole = whole
        try:
            self._engine.send_weights()
        finally:
            self._source.whole = []


class _Source:
    """vLLM's WeightSource: names, dtypes and shapes first, then the tensors."""

    whole: Weights

    def __init__(self) -> None:
        self.whole = []

    def metadata(self) -> list[Any]:
        from vllm.distributed.weight_transfer.base import ParamMeta

        return [ParamMeta(name, each.dtype, tuple(each.shape)) for name, each in self.whole]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return iter(self.whole)


class _Control:
    """vLLM's VLLMWeightSyncClient; vLLM's own client sends no key."""

    def __init__(self, post: Callable[..., Any]):
        self._post = post

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._post("/init_weight_transfer_engine", json={"init_info": init_info})

    def shutdown_weight_transfer_engine(self) -> None:
        self._post("/shutdown_weight_transfer_engine")

    def start_weight_update(self) -> None:
        self._post("/start_weight_update")

    def update_weights(self, update_info: Any) -> None:
        self._post("/update_weights", json={"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """`vllm_transfer` sets the tag once the caches are empty."""
        self._post("/finish_weight_update")


def _local_address(address: str) -> str:
    """This machine's address as the server sees it."""
    url = urlsplit(address)
    port = url.port or (443 if url.scheme == "https" else 80)
    with socket.create_connection((url.hostname or "", port), timeout=10) as connection:
        return connection.getsockname()[0]
