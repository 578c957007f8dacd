"""vLLM inside the training process: one engine per process, or one across several processes.

The engine has its own copy of the weights, which `sync` updates in memory. Starting and sampling
leave the process's random state unchanged. All of this is tested on CPUs; what only GPUs do
(sleeping between phases, CUDA graphs) follows vLLM 0.32's sources and has not been run.

Asleep, an engine that gets whole weights drops its own (vLLM's level 2): the next sync brings all of them, which
`load_weights` checks. vLLM saves and restores buffers (rotary tables, scales) and CUDA graphs (gpu_worker.sleep,
sleep_mode_backend.CuMemBackend); `clear_inputs` does what remains. With sync=adapter the base weights come from disk
alone, and are kept in main memory (level 1).
"""

import collections
import contextlib
import gc
import itertools
import os
import random
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from mm_agrae.errors import ConfigError, EngineError, install
from mm_agrae.model.lora import model_and_adapter
from mm_agrae.model.weights import adapter_config, save_adapter
from mm_agrae.rollout.vllm_common import Progress, Request, VllmBase, max_lora_rank, world_size
from mm_agrae.rollout.vllm_worker import clear_inputs, load_weights, prepare_vllm
from mm_agrae.types import Completion, Prompt


class VllmEngine(VllmBase):
    _alive: ClassVar[int] = 0
    """Open engines of this process, which share vLLM's process groups."""

    _lost = ""
    """Why the engine cannot be used any more; empty while it can."""
    _lora: Any = None

    def _start(self) -> None:
        """Start vLLM and load the policy's weights.

        Raises EngineError if vLLM is not installed or cannot start.
        """
        self._processes = world_size()
        if self._processes % self.settings.tensor_parallel:
            raise ConfigError(
                f"rollout.vllm.tensor_parallel is {self.settings.tensor_parallel}, which does not "
                f"divide the run's {self._processes} process(es), in which the engine lives; start "
                "more processes, or use rollout.engine=vllm_server"
            )
        self._asleep: set[str] = set()
        self._dropped = False  # whether it has no weights until the next sync
        self._folder = tempfile.TemporaryDirectory(prefix="mm-agrae-adapter-")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # about vLLM's own code
            self._llm: Any = self._start_vllm()
        VllmEngine._alive += 1
        try:
            self.sync()
        except BaseException:
            self.close()
            raise

    def _sync(self) -> int:
        self._require_usable()
        weights = self.weights()
        try:
            self._wake("weights")
            if self._dropped:
                self._llm.collective_rpc(clear_inputs)
            if self.by_adapter:
                sent = self._load_adapter(weights)
            else:
                sent = self._llm.collective_rpc(lambda worker: load_weights(worker, weights))[0]
            self._dropped = False
            # Both hold what the previous weights made of prompts and images.
            if not self._llm.llm_engine.reset_prefix_cache():
                raise EngineError("vLLM did not drop prompts that older weights have read")
            self._llm.llm_engine.reset_encoder_cache()
        except Exception as error:
            self._lost = f"loading the weights of version {self.policy.version} failed: {error}"
            # Gathering shards is collective: finish it for the sake of the other processes.
            collections.deque(weights, maxlen=0)
            raise EngineError(f"engine vllm: {self._lost}") from error
        return sent

    def _generate(
        self, prompts: Sequence[Prompt], requests: list[Request], count: int, on_progress: Progress
    ) -> list[list[Completion]]:
        self._require_usable()
        pairs: list[Any] = []
        for prompt, (ids, arguments) in zip(prompts, requests, strict=True):
            images = {"multi_modal_data": {"image": list(prompt.images)}} if prompt.images else {}
            pairs.append(({"prompt_token_ids": ids, **images}, arguments))
        pairs, own = self._gather(pairs)
        if self._dropped:  # sampling again without an update in between: all processes do
            self.sync()
        try:
            self._wake("weights", "kv_cache")
            with _random_state(self.policy.device):
                outputs = self._sample(pairs, on_progress)
            if self._llm.llm_engine.vllm_config.model_config.enable_sleep_mode:
                self._dropped = not self.by_adapter
                self._llm.sleep(level=2 if self._dropped else 1)
                self._asleep = {"weights", "kv_cache"}
        except Exception as error:
            self._lost = f"sampling failed: {error or type(error).__name__}"
            raise EngineError(f"engine vllm: {self._lost}") from error
        return [self._completions(prompt, output, count) for prompt, output in zip(prompts, outputs[own], strict=True)]

    def close(self) -> None:
        """Stop vLLM and free its memory; the engine cannot be used afterwards."""
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
            if self._processes == 1:  # otherwise the process group is the trainer's
                parallel_state.destroy_distributed_environment()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _start_vllm(self) -> Any:
        variables = {  # vLLM reads them when it is imported
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine lives in this process
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_LOGGING_LEVEL": "ERROR",
        }
        if not torch.cuda.is_available():
            variables["TORCHDYNAMO_DISABLE"] = "1"  # nothing is compiled on CPUs
        for name, value in variables.items():
            os.environ.setdefault(name, value)
        try:
            prepare_vllm()
            import vllm
            from vllm.platforms import current_platform
            from vllm.v1.engine import core
        except ImportError as error:
            raise EngineError(
                f"rollout.engine=vllm: vLLM cannot be imported ({error}); {install('vllm')}, or use rollout.engine=hf"
            ) from error
        # It would destroy the process group of the whole process, which may be the trainer's.
        core.cleanup_dist_env_and_memory = lambda: None
        options = self._options(cpu=current_platform.is_cpu())
        threads = torch.set_num_threads
        try:
            with _random_state(self.policy.device):
                return vllm.LLM(**options)
        except Exception as error:
            raise EngineError(f"rollout.engine=vllm: cannot start: {error}") from error
        finally:
            # On CPUs vLLM replaces it by a function that does nothing.
            torch.set_num_threads = threads

    def _options(self, *, cpu: bool) -> dict[str, Any]:
        """Arguments of vllm.LLM; those in `rollout.vllm.options` take precedence."""
        settings, policy = self.settings, self.policy
        options: dict[str, Any] = {
            "model": model_and_adapter(policy.settings.path)[0],
            "dtype": self.dtype,
            "trust_remote_code": policy.settings.trust_remote_code,
            "max_model_len": self.max_tokens,
            "max_num_seqs": settings.max_num_seqs,  # None: vLLM's own, which follows the GPU
            "tensor_parallel_size": settings.tensor_parallel,
            "enforce_eager": settings.enforce_eager or cpu,
            "generation_config": "vllm",  # no sampling defaults from the checkpoint
            "logprobs_mode": "processed_logprobs",  # of the distribution sampled from
            "use_tqdm_on_load": False,
        }
        if cpu:
            options["kv_cache_memory_bytes"] = settings.cache_gib << 30
            # On CPUs vLLM crashes when it reads a seeded prompt in chunks.
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
            options["mm_processor_cache_gb"] = 0  # it would keep those of failed requests
            options["mm_processor_kwargs"] = {
                "do_resize": False,  # images arrive in their final size
                "size": {"shortest_edge": least, "longest_edge": most},
            }
        if self.by_adapter:
            rank = max_lora_rank(self.adapter_rank)
            options |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": rank}
        return options | settings.options

    def _load_adapter(self, weights: Iterator[tuple[str, torch.Tensor]]) -> int:
        from vllm.lora.request import LoRARequest

        whole, folder = dict(weights), self._folder.name
        save_adapter(Path(folder), whole, adapter_config(self.policy))
        # Without load_inplace vLLM keeps the adapter it already has under this number.
        self._llm.llm_engine.add_lora(LoRARequest("policy", 1, folder, load_inplace=True))
        self._lora = LoRARequest("policy", 1, folder)
        return sum(tensor.nbytes for tensor in whole.values())

    def _gather(self, pairs: list[Any]) -> tuple[list[Any], slice]:
        """Inputs and arguments of all processes of this engine, and which are this process's.

        Under tensor parallelism each process of an engine must submit the same requests.
        """
        if self.settings.tensor_parallel == 1:
            return pairs, slice(None)
        from vllm.distributed import parallel_state

        group = parallel_state.get_tp_group()
        gathered: list[Any] = [None] * group.world_size
        torch.distributed.all_gather_object(gathered, pairs, group=group.cpu_group)
        start = sum(map(len, gathered[: group.rank_in_group]))
        return [*itertools.chain(*gathered)], slice(start, start + len(pairs))

    def _sample(self, pairs: list[Any], on_progress: Progress) -> list[Any]:
        """vLLM's outputs in the order of the inputs."""
        from vllm import SamplingParams

        engine = self._llm.llm_engine
        inputs = [each for each, _ in pairs]
        params = [SamplingParams(**arguments) for _, arguments in pairs]
        requests = self._llm.enqueue(inputs, params, lora_request=self._lora, use_tqdm=False)
        outputs = []
        last = time.monotonic()
        try:
            while engine.has_unfinished_requests():
                done = [output for output in engine.step() if output.finished]
                outputs += done
                if done:
                    last = time.monotonic()
                    on_progress(sum(len(output.outputs) for output in done))
                elif time.monotonic() - last > self.settings.request_limit_s:
                    raise EngineError(
                        f"no prompt was finished within {self.settings.request_limit_s:.0f} s "
                        "(rollout.vllm.request_limit_s)"
                    )
        except BaseException:  # Ctrl-C too: nothing may be left over for the next call
            engine.abort_request(requests, internal=True)
            raise
        return sorted(outputs, key=lambda output: int(output.request_id))

    def _completions(self, prompt: Prompt, output: Any, count: int) -> list[Completion]:
        if list(output.prompt_token_ids) != prompt.token_ids.tolist():
            where = prompt.example.origin or prompt.example.id
            raise EngineError(f"engine vllm: {where}: vLLM changed the prompt's token ids")
        outputs = []
        for each in sorted(output.outputs, key=lambda each: each.index):
            pairs = zip(each.token_ids, each.logprobs or (), strict=False)  # `group` counts them
            logprobs = [candidates[token].logprob for token, candidates in pairs]
            outputs.append((each.token_ids, logprobs, each.finish_reason))
        return self.group(outputs, count)

    def _wake(self, *tags: str) -> None:
        if due := [tag for tag in tags if tag in self._asleep]:
            self._llm.wake_up(tags=due)
            self._asleep -= set(due)

    def _require_usable(self) -> None:
        if self._lost:
            raise EngineError(f"engine vllm cannot be used any more: {self._lost}")


@contextlib.contextmanager
def _random_state(device: torch.device) -> Iterator[None]:
    """Restore all generators: vLLM seeds them when it starts, and later draws from torch's."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
