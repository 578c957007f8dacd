"""What runs inside vLLM's workers: loading weights, and two corrections of vLLM 0.32.

Nothing here is imported by vLLM itself: the engine `vllm` calls `load_weights` in its worker, and
`mm-agrae serve` starts this module as a program, which is vLLM's own server with `WorkerExtension`
mixed into its workers. Weights arrive as safetensors; nothing is ever unpickled.
"""

from __future__ import annotations

import importlib
import runpy
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm_agrae import __version__
from mm_agrae.errors import EngineError
from mm_agrae.model.compat import prepare

if TYPE_CHECKING:
    import torch


class WorkerExtension:
    """Methods added to vLLM's worker and called through /collective_rpc.

    Their prefix keeps them from clashing with the worker's own.
    """

    vllm_config: Any
    model_runner: Any

    def mm_agrae_describe(self) -> dict[str, Any]:
        """What a trainer checks before it samples. Also applies `fix_seeds` to the worker."""
        fix_seeds(self.model_runner)
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

    def mm_agrae_load(self, folder: str) -> None:
        """Load all weights from the safetensors files that `vllm_gate.Gate` stored in `folder`."""
        from safetensors.torch import load_file

        files = sorted(Path(folder).glob("*.safetensors"))
        if not files:
            raise FileNotFoundError(f"{folder} holds no safetensors files")
        load_weights(self, (pair for file in files for pair in load_file(file).items()))


def load_weights(worker: Any, weights: Iterable[tuple[str, torch.Tensor]]) -> int:
    """Give vLLM's model new weights under their checkpoint names; returns the bytes loaded.

    Raises EngineError if a weight is unknown to vLLM's model or one of the model's is missing; the model must not be
    used any more then. The caller resets the scheduler's prefix and encoder caches.
    """
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    runner = worker.model_runner
    model = runner.get_model()
    expected = {name for name, _ in model.named_parameters()}
    loaded_bytes = 0

    def counted() -> Iterator[tuple[str, torch.Tensor]]:
        nonlocal loaded_bytes
        for name, tensor in weights:
            loaded_bytes += tensor.nbytes
            yield name, tensor

    with torch.no_grad(), set_current_vllm_config(worker.vllm_config):
        initialize_layerwise_reload(model)
        try:
            loaded = model.load_weights(counted())
            # Checked before the reload is finalised, which fills gaps with the old values.
            missing = sorted((expected - set(loaded)) | _incomplete_layers(model))
        except (ValueError, KeyError, RuntimeError) as error:
            raise EngineError(f"vLLM cannot load the weights: {error}") from error
        finally:
            finalize_layerwise_reload(model, worker.vllm_config.model_config)
        if missing:
            listed = ", ".join(missing[:5])
            raise EngineError(f"vLLM got no value for {len(missing)} of its weights: {listed}")
        _renew_vocabulary_heads(model)
    runner.reset_lora_state()
    runner.reset_encoder_cache()
    runner.reset_mm_cache()
    return loaded_bytes


def clear_inputs(worker: Any) -> None:
    """After a sleep at level 2: zero, as at the start, the inputs that vLLM's V2 runner keeps among the weights.

    Rows that only pad a CUDA graph are read from them, and a rotary position out of range would be a fault.
    """
    import torch

    state = getattr(worker.model_runner, "model_state", None)
    owners = [state, *vars(state).values()] if state is not None else []
    for owner in owners:
        if hasattr(owner, "__dict__") and not isinstance(owner, torch.nn.Module):
            for value in vars(owner).values():
                if isinstance(value, torch.Tensor):
                    value.zero_()


def _incomplete_layers(model: torch.nn.Module) -> set[str]:
    """Layers of which only a part was given, such as keys and values without queries."""
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    found = set()
    for name, layer in model.named_modules():
        info = get_layerwise_info(layer)
        # No checkpoint holds the rows that pad a vocabulary.
        if not info.can_load() or isinstance(layer, VocabParallelEmbedding):
            continue
        if 0 < info.load_numel < (info.load_numel_total or 0):
            found.add(name)
    return found


def _renew_vocabulary_heads(model: torch.nn.Module) -> None:
    """On CPUs a tied head keeps a packed copy of the embedding, which reloading leaves stale."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for layer in model.modules():
        if isinstance(layer, ParallelLMHead):
            layer.quant_method.process_weights_after_loading(layer)


def fix_seeds(runner: Any) -> None:
    """Let a CPU's `runner` survive seeded requests whose prompts are read in several chunks.

    After each chunk vLLM rewinds such a request's generator by one draw, which generators on CPUs
    cannot do, and the engine ends. A prompt that is still being read has drawn nothing that
    counts, so its generator is reset instead: samples are those of a prompt read in one go.
    """
    if runner.device.type != "cpu" or getattr(runner, "mm_agrae_fixed", False):
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
    runner.mm_agrae_fixed = True


def prepare_vllm() -> None:
    """`compat.prepare` here, and in the subprocess in which vLLM inspects model classes."""
    prepare()
    registry: Any = importlib.import_module("vllm.model_executor.models.registry")
    program = f"import {__package__}.vllm_worker as worker; worker.prepare_vllm(); "
    program += f"import runpy; runpy.run_module({registry.__name__!r}, run_name='__main__')"
    registry._SUBPROCESS_COMMAND = [sys.executable, "-c", program]


if __name__ in ("__main__", "__mp_main__"):
    prepare_vllm()  # the server's child processes import this module first, as __mp_main__
if __name__ == "__main__":
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__")
