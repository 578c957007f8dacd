"""vLLM inside the training process: one engine a process, or one over several of them.

The engine keeps weights of its own; `sync` hands the policy's over without leaving the process.
Prompts are checked before vLLM, which would accept or break on a bad one, sees them. Starting and
sampling leave the process's random state as it was. On CPUs all of this is tested; what only GPUs
do (sleeping between phases, CUDA graphs) follows vLLM 0.32's sources and has not been run.
"""

from __future__ import annotations

import collections
import contextlib
import gc
import os
import random
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from mm_agrae.config import RolloutSection, SamplingSection
from mm_agrae.errors import ConfigError, DataError, EngineError
from mm_agrae.model.lora import model_and_adapter
from mm_agrae.model.policy import Policy
from mm_agrae.model.processing import Processing
from mm_agrae.model.weights import adapter_config, adapter_weights, full_weights, save_adapter
from mm_agrae.rollout import Sync
from mm_agrae.rollout.vllm_common import (
    check,
    check_adapters,
    collapse_image_tokens,
    completion,
    load_weights_in_worker,
    sampling_arguments,
    usable,
)
from mm_agrae.rollout.vllm_worker import mend_install
from mm_agrae.types import Completion, Prompt

LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Sizes that vLLM has room for; an adapter takes the next larger one."""


class VllmEngine:
    exact = False

    _alive: ClassVar[int] = 0
    """Engines of this process that share vLLM's process groups."""

    def __init__(
        self,
        policy: Policy,
        processing: Processing,
        rollout: RolloutSection,
        *,
        batch_completions: int,
        max_tokens: int,
    ):
        """Start vLLM and hand the policy's weights over.

        Raises ConfigError for settings that contradict each other, EngineError if vLLM is not
        installed or cannot start.
        """
        self.policy = policy
        self.processing = processing
        self.settings = rollout.vllm
        self.max_tokens = self.settings.max_model_len or max_tokens
        self.version = -1
        self._adapter = self.settings.sync == "adapter"
        self._lost = ""
        self._asleep: set[str] = set()
        self._lora: Any = None
        self._folder = tempfile.TemporaryDirectory(prefix="mm-agrae-adapter-")
        self._processes = _processes()
        self._check_settings()
        vocabulary = len(policy.bias_V)
        self._forbidden = [index for index in processing.forbidden_ids if index < vocabulary]
        self._stop = [index for index in processing.eos_ids if index < vocabulary]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # what vLLM is yet to mend in itself
            self._llm: Any = self._start(batch_completions)
        VllmEngine._alive += 1
        try:
            self.sync()
        except BaseException:
            self.close()
            raise

    def sync(self) -> Sync:
        """See `rollout.Engine.sync`."""
        started = time.perf_counter()
        self._require_alive()
        version = self.policy.version
        weights = adapter_weights(self.policy) if self._adapter else full_weights(self.policy)
        try:
            self._wake("weights")
            taken = self._take_adapter(weights) if self._adapter else self._take_weights(weights)
            # Both hold what the former weights made of prompts and of pictures.
            if not self._llm.llm_engine.reset_prefix_cache():
                raise EngineError("vLLM kept prompts in its cache that older weights have read")
            self._llm.llm_engine.reset_encoder_cache()
        except Exception as error:
            self._lost = f"handing weights of version {version} over failed: {error}"
            # Gathering shards is a collective call, which the other processes are still in.
            collections.deque(weights, maxlen=0)
            raise EngineError(f"engine vllm: {self._lost}") from error
        self.version = version
        return Sync(megabytes=taken / 1e6, seconds=time.perf_counter() - started)

    def usable(
        self, prompts: Sequence[Prompt], max_new_tokens: int
    ) -> tuple[list[int], dict[int, DataError]]:
        """Indices of the prompts that `generate` takes, and the errors of the others by index."""
        return usable(prompts, self.max_tokens, self.processing, max_new_tokens)

    def generate(
        self,
        prompts: Sequence[Prompt],
        count: int,
        sampling: SamplingSection,
        seeds: Sequence[int],
        on_progress: Callable[[int], None] | None = None,
    ) -> list[list[Completion]]:
        """See `rollout.Engine.generate`.

        Raises DataError, before anything is sampled, for a prompt that vLLM must not see: `usable`
        finds those. The engine stays as it was. Progress is told a prompt at a time.
        """
        if len(seeds) != len(prompts):
            raise ValueError(f"{len(seeds)} seeds for {len(prompts)} prompts")
        self._require_alive()
        for prompt in prompts:
            check(prompt, self.max_tokens, self.processing, sampling.max_new_tokens)
        arguments = [
            sampling_arguments(sampling, count, seed, self._forbidden, self._stop) for seed in seeds
        ]
        inputs = [self._input(prompt) for prompt in prompts]
        inputs, arguments, own = self._over_ranks(inputs, arguments)
        try:
            self._wake("weights", "kv_cache")
            with _random_state(self.policy.device):
                outputs = self._sample(inputs, arguments, on_progress)
            self._sleep()
        except Exception as error:
            self._lost = f"sampling failed: {error or type(error).__name__}"
            raise EngineError(f"engine vllm: {self._lost}") from error
        return [
            self._group(prompt, output, count)
            for prompt, output in zip(prompts, outputs[own], strict=True)
        ]

    def close(self) -> None:
        """Stop vLLM and free its memory. The engine cannot be used any more."""
        if self._llm is None:
            return
        self._lost = "it was closed"
        with contextlib.suppress(Exception):
            self._llm.llm_engine.engine_core.shutdown()
        self._llm = None
        self._folder.cleanup()
        VllmEngine._alive -= 1
        if VllmEngine._alive == 0:
            from vllm.distributed import parallel_state

            parallel_state.destroy_model_parallel()
            if self._processes == 1:  # else the process group is the trainer's
                parallel_state.destroy_distributed_environment()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _check_settings(self) -> None:
        policy, parallel = self.policy, self.settings.tensor_parallel
        if self._processes % parallel:
            raise ConfigError(
                f"rollout.vllm.tensor_parallel is {parallel}, which does not divide the run's "
                f"{self._processes} process(es): the engine lives in them; start more, or use "
                "rollout.engine=vllm_server"
            )
        check_adapters(policy, self.settings.sync)

    def _start(self, batch_completions: int) -> Any:
        set_environment(on_gpu=torch.cuda.is_available())
        try:
            mend_install()
            import vllm
            from vllm.platforms import current_platform
            from vllm.v1.engine import core
        except ImportError as error:
            raise EngineError(
                f"rollout.engine=vllm: vLLM cannot be imported ({error}); "
                "pip install 'mm-agrae[vllm]', or use rollout.engine=hf"
            ) from error
        # It would end the process group of the whole process, which may be the trainer's.
        core.cleanup_dist_env_and_memory = lambda: None
        options = self._options(batch_completions, cpu=current_platform.is_cpu())
        threads = torch.set_num_threads
        try:
            with _random_state(self.policy.device):
                return vllm.LLM(**options)
        except Exception as error:
            raise EngineError(f"rollout.engine=vllm: cannot start: {error}") from error
        finally:
            # On CPUs vLLM makes it do nothing for the whole process.
            torch.set_num_threads = threads

    def _options(self, batch_completions: int, *, cpu: bool) -> dict[str, Any]:
        """Arguments of vllm.LLM; what `rollout.vllm.options` says wins."""
        settings, policy = self.settings, self.policy
        options: dict[str, Any] = {
            "model": model_and_adapter(policy.settings.path)[0],
            "dtype": policy.settings.dtype if settings.dtype == "auto" else settings.dtype,
            "trust_remote_code": policy.settings.trust_remote_code,
            "max_model_len": self.max_tokens,
            "max_num_seqs": batch_completions,
            "tensor_parallel_size": settings.tensor_parallel,
            "enforce_eager": settings.enforce_eager or cpu,
            "generation_config": "vllm",  # sampling follows our settings alone
            "logprobs_mode": "processed_logprobs",  # of the distribution sampled from
            "use_tqdm_on_load": False,
        }
        if cpu:
            options["kv_cache_memory_bytes"] = settings.cache_gib << 30
            # On CPUs vLLM breaks down where it cuts a prompt that has a seed into pieces.
            options["enable_chunked_prefill"] = False
            options["max_num_batched_tokens"] = max(8192, self.max_tokens)
        else:
            options["gpu_memory_utilization"] = settings.memory_fraction
            options["enable_sleep_mode"] = settings.sleep
        if self._processes > 1:
            options["distributed_executor_backend"] = "external_launcher"
        if self.processing.is_multimodal:
            size, prompt = self.processing.processor.image_processor.size, self.processing.settings
            least = prompt.min_pixels or size["shortest_edge"]
            most = max(least, prompt.max_pixels or size["longest_edge"])
            options["limit_mm_per_prompt"] = {"video": 0}
            options["mm_processor_cache_gb"] = 0  # it would keep broken requests
            options["mm_processor_kwargs"] = {
                "do_resize": False,  # pictures come in their final size, which bounds memory
                "size": {"shortest_edge": least, "longest_edge": most},
            }
        if self._adapter:
            rank = max(config.r for config in policy.model.peft_config.values())
            fitting = [size for size in LORA_RANKS if size >= rank]
            if not fitting:
                raise ConfigError(
                    f"model.lora.rank is {rank}: with rollout.vllm.sync=adapter vLLM takes at most "
                    f"{LORA_RANKS[-1]}; use sync=merged"
                )
            options |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": fitting[0]}
        return options | settings.options

    def _take_weights(self, weights: Iterator[tuple[str, torch.Tensor]]) -> int:
        return self._llm.collective_rpc(lambda worker: load_weights_in_worker(worker, weights))[0]

    def _take_adapter(self, weights: Iterator[tuple[str, torch.Tensor]]) -> int:
        from vllm.lora.request import LoRARequest

        whole, folder = dict(weights), self._folder.name
        save_adapter(Path(folder), whole, adapter_config(self.policy))
        # Without load_inplace an adapter of the same number stays the one it was.
        self._llm.llm_engine.add_lora(LoRARequest("policy", 1, folder, load_inplace=True))
        self._lora = LoRARequest("policy", 1, folder)
        return sum(tensor.numel() * tensor.element_size() for tensor in whole.values())

    def _input(self, prompt: Prompt) -> dict[str, Any]:
        made: dict[str, Any] = {"prompt_token_ids": collapse_image_tokens(prompt, self.processing)}
        if prompt.images:
            made["multi_modal_data"] = {"image": list(prompt.images)}
        return made

    def _over_ranks(self, inputs: list[Any], arguments: list[Any]) -> tuple[list, list, slice]:
        """Under tensor parallelism all processes of an engine must sample all their prompts."""
        if self.settings.tensor_parallel == 1:
            return inputs, arguments, slice(None)
        from vllm.distributed import parallel_state

        group = parallel_state.get_tp_group()
        gathered: list[Any] = [None] * group.world_size
        torch.distributed.all_gather_object(gathered, (inputs, arguments), group=group.cpu_group)
        start = sum(len(theirs) for theirs, _ in gathered[: group.rank_in_group])
        return (
            [each for theirs, _ in gathered for each in theirs],
            [each for _, theirs in gathered for each in theirs],
            slice(start, start + len(inputs)),
        )

    def _sample(
        self, inputs: list[Any], arguments: list[Any], on_progress: Callable[[int], None] | None
    ) -> list[Any]:
        """vLLM's outputs in the order of `inputs`."""
        from vllm import SamplingParams

        engine = self._llm.llm_engine
        params = [SamplingParams(**each) for each in arguments]
        requests = self._llm.enqueue(inputs, params, lora_request=self._lora, use_tqdm=False)
        outputs = []
        last = time.monotonic()
        try:
            while engine.has_unfinished_requests():
                done = [output for output in engine.step() if output.finished]
                outputs += done
                if done:
                    last = time.monotonic()
                    if on_progress:
                        on_progress(sum(len(output.outputs) for output in done))
                elif time.monotonic() - last > self.settings.request_limit_s:
                    raise EngineError(
                        f"no prompt was finished for {self.settings.request_limit_s:.0f} s "
                        "(rollout.vllm.request_limit_s)"
                    )
        except BaseException:  # Ctrl-C too: what is left must not turn up in the next call
            engine.abort_request(requests, internal=True)
            raise
        return sorted(outputs, key=lambda output: int(output.request_id))

    def _group(self, prompt: Prompt, output: Any, count: int) -> list[Completion]:
        if list(output.prompt_token_ids) != prompt.token_ids.tolist():
            where = prompt.example.origin or prompt.example.id
            raise EngineError(f"engine vllm: {where}: vLLM made another prompt of it than we did")
        made = [
            completion(
                each.token_ids,
                [found[token].logprob for token, found in zip(each.token_ids, each.logprobs)],  # noqa: B905
                each.finish_reason,
                self.processing,
                self.version,
            )
            for each in sorted(output.outputs, key=lambda each: each.index)
        ]
        return made * count if len(made) == 1 else made  # greedy ones are all the same

    def _sleep(self) -> None:
        """Give the GPU's memory to the update; the weights wait in main memory."""
        if self._sleeps:
            self._llm.sleep(level=1)
            self._asleep = {"weights", "kv_cache"}

    def _wake(self, *tags: str) -> None:
        if due := [tag for tag in tags if tag in self._asleep]:
            self._llm.wake_up(tags=due)
            self._asleep -= set(due)

    @property
    def _sleeps(self) -> bool:
        return self._llm.llm_engine.vllm_config.model_config.enable_sleep_mode

    def _require_alive(self) -> None:
        if self._lost:
            raise EngineError(f"engine vllm cannot be used any more: {self._lost}")


def set_environment(*, on_gpu: bool) -> None:
    """Variables that vLLM reads when it is imported; what the user has set stays."""
    wanted = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine lives in this process
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }
    if not on_gpu:
        wanted["TORCHDYNAMO_DISABLE"] = "1"  # nothing is compiled on CPUs
    for name, value in wanted.items():
        os.environ.setdefault(name, value)


@contextlib.contextmanager
def _random_state(device: torch.device) -> Iterator[None]:
    """vLLM seeds all generators of the process when it starts, and draws from torch's later."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def _processes() -> int:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return 1
    return torch.distributed.get_world_size()
