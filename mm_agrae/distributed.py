"""The other processes: starting up beside them, waiting for them, and naming who does not come.

accelerate says how many there are and in which form each holds the model: a copy (DDP), or a slice
(FSDP2, or DeepSpeed's ZeRO-3). This, `sharding` and `zero` are the only files that talk to other
processes.

Before every exchange of the trainer all processes meet (`Processes.wait`), through the store that
torch.distributed keeps. There they can be counted, which a collective call cannot do: it hangs if
one is missing. A process that fails says so in the store, with its message, before it ends; all of
them note there where they are, every second. So a process that waits in vain knows whom for:

    rank 1 (node-b) failed in evaluate of step 200: DataError: rows.jsonl:17: …
    rank 1 (node-b) is gone since 45 s; it was last seen in update of step 3
    rank 0 (node-a) has waited 1800 s at rewards of step 3 for rank 1 (node-b), in rollout of step 3
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    FullyShardedDataParallelPlugin,
    InitProcessGroupKwargs,
    gather_object,
    parse_flag_from_env,
)

from mm_agrae import zero
from mm_agrae.config import Config
from mm_agrae.errors import ConfigError, ProcessError
from mm_agrae.policy import Policy
from mm_agrae.sharding import reshard, shard

BEAT_S = 1.0
LOST_AFTER_S = 45.0
"""A process that has not shown itself for so long is gone; on the same machine one can look."""
GRACE_S = 15.0
"""What a process that cannot be interrupted gets to end by itself, once another one has failed."""

Method = TypeVar("Method", bound=Callable[..., Any])


def start(config: Config) -> PartialState:
    """Join the other processes, if there are any."""
    with zero.unseen_by_accelerate():
        return PartialState(cpu=config.model.device == "cpu", timeout=_limit(config))


def _limit(config: Config) -> timedelta:
    # Collective calls give up a little later than we do, who can say what for.
    return timedelta(minutes=config.train.timeout_minutes, seconds=2 * GRACE_S)


def announced(method: Method) -> Method:
    """For methods of an object with `processes`: tell the others what ends this process."""

    @functools.wraps(method)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return method(self, *args, **kwargs)
        except BaseException as error:
            if processes := getattr(self, "processes", None):
                processes.announce(error)
            raise

    return cast(Method, run)


class Processes:
    """This process among all those of a run. With one process alone every method is trivial.

    Raises ConfigError for an accelerate config that cannot be served.
    """

    def __init__(self, config: Config):
        _refuse_what_is_not_supported()
        self.timeout_s = 60 * config.train.timeout_minutes
        with zero.unseen_by_accelerate():
            self.accelerator = Accelerator(
                cpu=config.model.device == "cpu",
                kwargs_handlers=[
                    # Gradients live in DDP's buckets, of which there would else be a second copy.
                    DistributedDataParallelKwargs(gradient_as_bucket_view=True),
                    InitProcessGroupKwargs(timeout=_limit(config)),
                ],
            )
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        self.is_main = self.accelerator.is_main_process
        self.device = self.accelerator.device
        self.form = _form(self.accelerator)
        if self.world > config.rollout.prompts_per_step:
            raise ConfigError(
                f"rollout.prompts_per_step = {config.rollout.prompts_per_step} is less than the "
                f"{self.world} processes, each of which needs a prompt; raise it or start fewer"
            )
        self._watch = _Watch(self.rank, self.world, self.timeout_s) if self.world > 1 else None

    # ------------------------------------------------------------------ the model

    @property
    def loading_device(self) -> torch.device:
        """Where the model is loaded to: a whole one may not fit on the device."""
        return torch.device("cpu") if self.form.sharded else self.device

    def shard(self, policy: Policy) -> None:
        """Spread the weights, if that is asked for; before the optimiser is made."""
        if self._watch is None:
            return
        policy.meet = functools.partial(self.wait, "gathering weights")
        policy.vision_always = policy.vision_learns
        self.form.shard(policy)

    def prepare(self, policy: Policy, optimizer: Any) -> tuple[Any, Any]:
        """The module whose backward pass sums gradients over all processes; the optimiser."""
        return self.form.prepare(policy, optimizer)

    def micro_batch(self, module: Any, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Around forward and backward pass; the `last` one before the optimiser steps."""
        return self.form.micro_batch(module, last)

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradient of a loss whose denominator counts all processes."""
        self.form.backward(loss)

    def clip(self, parameters: list[torch.nn.Parameter], most: float) -> float:
        """Cut the gradient to a norm of `most`; returns the norm it had, over all processes."""
        return self.form.clip(parameters, most)

    # ------------------------------------------------------------------ the others

    def note(self, stage: str, step: int) -> None:
        """Say what this process is doing, for whoever waits for it."""
        if self._watch is not None:
            self._watch.note(stage, step)

    def wait(self, place: str) -> None:
        """Wait until all processes are at the same place. Raises ProcessError if one is not."""
        if self._watch is not None:
            self._watch.wait(place)

    def gather(self, items: list[Any], place: str) -> list[Any]:
        """Items of all processes, in the order of processes. Raises ProcessError as `wait`."""
        if self._watch is None:
            return items
        self.wait(place)
        with self.explained():
            return gather_object(items)

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """Around collective calls: if one fails because of another process, say of which."""
        try:
            yield
        except RuntimeError as error:
            if self._watch is None or not _of_communication(error):
                raise
            if problem := self._watch.explain():
                raise ProcessError(problem) from error
            raise

    def announce(self, error: BaseException) -> None:
        """Tell the other processes that this one ends, and why."""
        if self._watch is not None:
            self._watch.announce(f"{type(error).__name__}: {error}")

    def close(self) -> None:
        """Leave: from now on nobody needs this process."""
        if self._watch is not None:
            self._watch.close()


class _Copies:
    """The form in which each process holds a copy of the model (DDP), or is alone.

    The methods of a form are those of `Processes` of the same name.
    """

    sharded = False

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator

    def shard(self, policy: Policy) -> None:
        pass

    def prepare(self, policy: Policy, optimizer: Any) -> tuple[Any, Any]:
        if self.accelerator.num_processes == 1:  # torchrun starts one as if it were several
            return policy, self.accelerator.prepare(optimizer)
        return self.accelerator.prepare(policy, optimizer)

    def micro_batch(self, module: Any, last: bool) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if last else self.accelerator.no_sync(module)

    def backward(self, loss: torch.Tensor) -> None:
        # DDP and FSDP take the mean over processes.
        self.accelerator.backward(loss * self.accelerator.num_processes)

    def clip(self, parameters: list[torch.nn.Parameter], most: float) -> float:
        norm = self.accelerator.clip_grad_norm_(parameters, most)
        return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)


class _Fsdp2(_Copies):
    """The form in which each process holds a slice of every weight, gradient and moment."""

    sharded = True

    def shard(self, policy: Policy) -> None:
        spread = functools.partial(
            shard,
            device=self.accelerator.device,
            reshard_after_forward=bool(_fsdp_settings().reshard_after_forward),
        )
        policy.shard(spread)
        policy.release = functools.partial(reshard, policy)

    def prepare(self, policy: Policy, optimizer: Any) -> tuple[Any, Any]:
        return policy, optimizer

    def micro_batch(self, module: Any, last: bool) -> contextlib.AbstractContextManager[Any]:
        # Shards are summed every time: whole gradients, kept until the last one, would not fit.
        return contextlib.nullcontext()


def _form(accelerator: Accelerator) -> _Copies | zero.Zero3:
    """The form that accelerate's launcher asks for. Raises ConfigError if it cannot be served."""
    if zero.asked_for():
        stage = zero.settings()
        if accelerator.num_processes > 1:
            return zero.Zero3(stage, accelerator.device)
        if offloaded := [key for key in stage if key.startswith("offload")]:
            raise ConfigError(
                f"the DeepSpeed config sets {', '.join(offloaded)}, and there is one process, "
                "which is trained without DeepSpeed; start two or more, or use model.lora"
            )
    elif accelerator.num_processes > 1 and parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return _Fsdp2(accelerator)
    return _Copies(accelerator)


def _of_communication(error: RuntimeError) -> bool:
    words = ("gloo", "nccl", "connection", "timed out", "timeout")
    return isinstance(error, dist.DistError) or any(word in str(error).lower() for word in words)


def _refuse_what_is_not_supported() -> None:
    """Raise ConfigError for settings of accelerate's launcher, which come by the environment."""
    if not parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise ConfigError("the accelerate config asks for FSDP 1; set fsdp_version: 2")
    if parse_flag_from_env("FSDP_OFFLOAD_PARAMS"):
        raise ConfigError("the accelerate config sets fsdp_offload_params, which is not supported")
    if parse_flag_from_env("FSDP_ACTIVATION_CHECKPOINTING"):
        raise ConfigError(
            "the accelerate config sets fsdp_activation_checkpointing; use "
            "model.gradient_checkpointing=true in its place"
        )


def _fsdp_settings() -> FullyShardedDataParallelPlugin:
    """What accelerate's launcher was told about FSDP; accelerate itself ignores it on a CPU."""
    plugin = FullyShardedDataParallelPlugin()
    # All processes read the weights: they compare the model's forms with each other.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    return plugin


_counter = itertools.count()
"""Runs in this process, which share a store one after another."""


class _Watch:
    """Notes in the store where this process is, and reads where the others are."""

    def __init__(self, rank: int, world: int, timeout_s: float):
        self.rank, self.world, self.timeout_s = rank, world, timeout_s
        store: Any = dist.distributed_c10d._get_default_store()
        prefix = f"mm_agrae/{next(_counter)}"
        self._store = dist.PrefixStore(prefix, store)
        # The thread has a connection of its own: one that waits blocks all others.
        self._own = dist.PrefixStore(prefix, store.clone())
        self._lock = threading.Lock()
        self._meetings = self._beat = 0
        self._since = time.monotonic()
        self._status: dict[str, Any] = {
            "host": socket.gethostname(), "machine": _machine(), "pid": os.getpid(),
            "stage": "start", "step": 0,
        }  # fmt: skip
        self._peers: list[dict[str, Any]] = []
        self._seen = [(0, time.monotonic())] * world
        self._problem = ""
        self._closed = threading.Event()
        self._publish(self._store)
        self._store.wait([f"status/{other}" for other in range(world)])
        self.wait("start")
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    # -------------------------------------------------- by the main thread

    def note(self, stage: str, step: int) -> None:
        here = {"stage": stage, "step": step}
        new = not here.items() <= self._status.items()
        with self._lock:
            self._status |= here
            self._since = time.monotonic()
        if new:  # or whoever misses this process soon would look in the wrong place
            with contextlib.suppress(RuntimeError):
                self._publish(self._store)

    def wait(self, place: str) -> None:
        self._meetings += 1
        number, began = self._meetings, time.monotonic()
        self._store.set(f"{number}/{self.rank}", "here")
        # All were at the meeting before, so that nobody is still waiting for the one before that.
        self._store.delete_key(f"{number - 2}/{self.rank}")
        keys = [f"{number}/{rank}" for rank in range(self.world)]
        pause = 0.0005
        while not self._all_have(keys):
            waited = time.monotonic() - began
            if not self._problem and waited > self.timeout_s:
                self._problem = self._too_late(place, keys, waited)
            if self._problem:
                raise ProcessError(f"{self._problem} (rank {self.rank} was waiting at {place})")
            time.sleep(pause)  # the store's own wait cannot be interrupted, and grumbles
            pause = min(2 * pause, 0.05)
        self._since = time.monotonic()

    def _all_have(self, keys: list[str]) -> bool:
        try:
            return self._store.check(keys)
        except RuntimeError:
            self._problem = self._problem or self._store_is_gone()
            return False

    def explain(self) -> str:
        """What is known of the others' failure; waits a little for it to come out."""
        end = time.monotonic() + LOST_AFTER_S + 2 * BEAT_S
        while not self._problem and time.monotonic() < end:
            time.sleep(BEAT_S / 5)
        return self._problem

    def announce(self, message: str) -> None:
        with self._lock:
            self._status["failed"] = message
        with contextlib.suppress(RuntimeError):
            self._publish(self._store)
            time.sleep(3 * BEAT_S)  # the store may end with this process; let them read it
        self._closed.set()

    def close(self) -> None:
        self._closed.set()
        with self._lock:
            self._status["done"] = True
        with contextlib.suppress(RuntimeError):
            self._publish(self._store)

    def _too_late(self, place: str, keys: list[str], waited: float) -> str:
        found = self._read(self._store)
        where = ", ".join(
            f"{_name(rank, found[rank])}, which is in {_place(found[rank])} since "
            f"{found[rank]['for_s']:.0f} s"
            for rank, key in enumerate(keys)
            if not self._store.check([key])
        )
        return (
            f"{_name(self.rank, self._status)} has waited {waited:.0f} s at {place} of step "
            f"{self._status['step']} for {where}; if that is only slow, raise "
            f"train.timeout_minutes ({self.timeout_s / 60:g})"
        )

    # -------------------------------------------------- by the thread

    def _run(self) -> None:
        problem_since, grace = 0.0, min(GRACE_S, self.timeout_s)
        while not self._closed.wait(BEAT_S):
            now = time.monotonic()
            try:
                self._publish(self._own)
                self._peers = self._read(self._own)
                self._problem = self._problem or self._look(now)
            except RuntimeError:
                self._problem = self._problem or self._store_is_gone()
            stuck = now - self._since
            if self._status["stage"] == "update" and stuck > self.timeout_s + grace:
                self._problem = self._problem or self._stuck(stuck)
                self._end()
            if self._problem and not problem_since:
                problem_since = now
            if problem_since and now - problem_since > grace:
                self._end()

    def _look(self, now: float) -> str:
        for rank, peer in enumerate(self._peers):
            if rank == self.rank or peer.get("done"):
                continue
            if failed := peer.get("failed"):
                return f"{_name(rank, peer)} failed in {_place(peer)}: {failed}"
            if self._seen[rank][0] != peer["beat"]:
                self._seen[rank] = (peer["beat"], now)
            silent = now - self._seen[rank][1]
            if peer["machine"] == self._status["machine"]:
                gone = silent > 2 * BEAT_S and not _runs(peer["pid"])
            else:
                gone = silent > LOST_AFTER_S
            if gone:
                return (
                    f"{_name(rank, peer)} is gone since {silent:.0f} s; it was last seen in "
                    f"{_place(peer)}. If it was killed for its memory, the machine's log says so"
                )
        return ""

    def _stuck(self, seconds: float) -> str:
        where = ", ".join(
            f"{_name(r, p)} in {_place(p)} since {p['for_s']:.0f} s"
            for r, p in enumerate(self._peers)
            if r != self.rank
        )
        return (
            f"{_name(self.rank, self._status)} has been in {_place(self._status)} for "
            f"{seconds:.0f} s without getting on; the others: {where}"
        )

    def _store_is_gone(self) -> str:
        first = f" It was last seen in {_place(self._peers[0])}." if self._peers else ""
        return f"the store that connects the processes is gone, and with it rank 0.{first}"

    def _end(self) -> None:
        """The main thread is caught in a call that never returns: only this is left."""
        print(f"error: {self._problem} (rank {self.rank} ends)", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(2)

    def _publish(self, store: Any) -> None:
        with self._lock:
            self._beat += 1
            status = self._status | {
                "beat": self._beat, "for_s": round(time.monotonic() - self._since, 1),
            }  # fmt: skip
            store.set(f"status/{self.rank}", json.dumps(status))

    def _read(self, store: Any) -> list[dict[str, Any]]:
        keys = [f"status/{rank}" for rank in range(self.world)]
        return [json.loads(value) for value in store.multi_get(keys)]


def _name(rank: int, status: dict[str, Any]) -> str:
    return f"rank {rank} ({status['host']})"


def _place(status: dict[str, Any]) -> str:
    return f"{status['stage']} of step {status['step']}"


def _machine() -> str:
    """The same for processes that see each other's ids. Host names need not differ."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="utf-8") as file:
            return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"unknown {socket.gethostname()} {os.getpid()}"


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    try:  # one that has ended and that nobody has asked for yet
        with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return True
