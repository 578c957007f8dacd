"""How much GPU memory a run takes, phase by phase, worked out from its config and `ModelSize`.

Weights, gradients, optimiser state and KV cache follow exactly from the counts of `size.measure`. Activations are
summed over the tensors that a layer keeps for its backward pass (`_layer_bytes`), derived from Qwen2.5 layers; other
families differ somewhat. Prompts and completions are assumed to reach their limits, so a run usually needs less.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from mm_agrae import config as configs
from mm_agrae.config import Config
from mm_agrae.config.reading import apply_override
from mm_agrae.errors import ConfigError
from mm_agrae.model.lora import model_and_adapter
from mm_agrae.model.size import ModelSize, find_model_config, measure
from mm_agrae.model.vocab_head import CHUNK_BYTES

GIB = 2**30

# What torch's allocator does not count, rounded up from what vLLM logs on an H100 with an 8B model (vllm-project/vllm
# #10511: 1.8 GiB outside torch in one process, 3.6 GiB in each of two; #15815 and others: 0.4-0.7 GiB of CUDA graphs).
# Nothing of it has been measured with this project.
CONTEXT = GIB  # CUDA's context, and kernels and workspaces of its libraries
NCCL = 2 * GIB  # buffers of the communicators, with several processes
ASLEEP = GIB  # what a sleeping vLLM keeps: CUDA graphs, and workspaces outside its pools
FRAGMENTED = 0.03  # share of a GPU's memory that the allocator holds in pieces too small to use


def usable_bytes(config: Config, device_bytes: int, processes: int = 1) -> int:
    """What the tensors of a run may take of a GPU's memory."""
    libraries = CONTEXT + NCCL * (processes > 1) + ASLEEP * (config.rollout.engine == "vllm")
    return max(0, int(device_bytes * (1 - FRAGMENTED)) - libraries)


@dataclass(frozen=True)
class VllmShare:
    """What the engine vllm does with its share of a GPU, in bytes."""

    share: int
    weights: int
    profile: int
    """Of the run on its largest batch with which vLLM measures what it may use for its cache; with CUDA graphs."""
    sequence: int
    """Cache of one prompt and completion of the rollout, at their limits."""
    cache: int
    """Cache that must fit: one group, though vLLM itself would start with one sequence of max_model_len."""

    @property
    def least(self) -> int:
        return self.weights + self.profile + self.cache

    @property
    def sequences(self) -> int:
        return max(0, self.share - self.weights - self.profile) // self.sequence

    def __str__(self) -> str:
        inside = f"weights {shown(self.weights)}, profile run and CUDA graphs {shown(self.profile)}, one group "
        inside += shown(self.cache)
        return f"{shown(self.share)} of at least {shown(self.least)} ({inside}); {self.sequences} sequences at once"


def vllm_share(config: Config, size: ModelSize, device_bytes: int) -> VllmShare:
    """The arithmetic of vLLM 0.32's start (gpu_worker.determine_available_memory), its profile run an estimate.

    The profile run takes the largest of: gate, up and their product in the MLP; logits, sorted for top-p; images that
    fill the batch in the vision tower.
    """
    settings, text = config.rollout.vllm, size.text
    large = device_bytes >= 70 * GIB  # where vLLM's own defaults are larger (arg_utils.py)
    sampled = config.prompt.max_tokens + config.rollout.max_new_tokens
    length = settings.max_model_len or max(sampled, config.prompt.max_tokens + config.evaluate.max_new_tokens)
    sequences = settings.max_num_seqs or settings.options.get("max_num_seqs", 1024 if large else 256)
    tokens = settings.options.get("max_num_batched_tokens", 16384 if large else 8192)
    tokens = max(1, min(tokens, sequences * length))
    dtype = config.model.dtype if settings.dtype == "auto" else settings.dtype
    element = 2 if dtype == "bfloat16" else 4
    layer = tokens * (3 * _inner(text) + 6 * text.hidden_size) * element
    sampler = sequences * text.vocab_size * 24
    tower = features = 0
    if (vision := getattr(size.config, "vision_config", None)) is not None:
        tower = 4 * tokens * (3 * _inner(vision) + 12 * vision.hidden_size) * element
        features = tokens * text.hidden_size * element
    adapters = size.trainable if size.rank else 0
    weights = size.parameters - (adapters if settings.sync == "merged" else 0)
    sequence = kv_cache_bytes(size, 1, sampled, element) // settings.tensor_parallel
    longest = kv_cache_bytes(size, 1, length, element) // settings.tensor_parallel
    return VllmShare(
        share=int(settings.memory_fraction * device_bytes),
        weights=weights * element // settings.tensor_parallel,
        profile=max(layer, sampler, tower) + features + GIB,
        sequence=sequence,
        cache=max(config.rollout.completions_per_prompt * sequence, longest),
    )


@dataclass(frozen=True)
class Verdict:
    """Whether a run fits a GPU, and why not."""

    estimate: MemoryEstimate
    usable: int
    vllm: VllmShare | None
    """Of the engine vllm alone."""

    @property
    def reasons(self) -> list[str]:
        """Why the run does not fit, one line each; empty if it fits."""
        found, vllm = [], self.vllm
        if self.estimate.peak > self.usable:
            found.append(f"peak {shown(self.estimate.peak)} of {shown(self.usable)} usable")
        if vllm is not None and vllm.share < vllm.least:
            found.append(f"vLLM's share (rollout.vllm.memory_fraction) is too small: {vllm}")
        return found


def judge(config: Config, size: ModelSize, *, processes: int, device_bytes: int, sharded: bool) -> Verdict:
    """Compare what a run takes of each GPU with what there is."""
    vllm = vllm_share(config, size, device_bytes) if config.rollout.engine == "vllm" else None
    found = estimate(config, size, processes=processes, device_bytes=device_bytes, sharded=sharded)
    return Verdict(found, usable_bytes(config, device_bytes, processes), vllm)


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one device, by what takes them: `always`, and in each phase, one at a time."""

    always: dict[str, int]
    rollout: dict[str, int]
    update: dict[str, int]
    optimiser: dict[str, int]

    @property
    def phases(self) -> dict[str, dict[str, int]]:
        return {"rollout": self.rollout, "update": self.update, "optimiser step": self.optimiser}

    @property
    def peak(self) -> int:
        return sum(self.always.values()) + max(sum(p.values()) for p in self.phases.values())


def estimate(
    config: Config,
    size: ModelSize,
    *,
    processes: int = 1,
    device: str = "cuda",
    device_bytes: int | None = None,
    sharded: bool = False,
) -> MemoryEstimate:
    """Memory of one process. `device_bytes`, the GPU's memory, is what vLLM takes a share of.

    `sharded`: the model is spread over the processes by FSDP2.
    """
    shards = processes if sharded else 1
    bf16, cuda = config.model.dtype == "bfloat16", device == "cuda"
    gradient_bytes = 4 * size.trainable // shards
    always = {
        "weights": (size.weight_bytes - size.unsharded) // shards + size.unsharded,
        "optimiser (Adam)": 8 * size.trainable // shards,
    }
    gradients = {"gradients": gradient_bytes}
    if processes > 1 and not sharded:
        always["gradients (DDP's buckets)"], gradients = gradient_bytes, {}
    tokens = micro_batch_tokens(config)
    casts = 2 * size.cast_parameters if bf16 else 0
    copies = {"16-bit copies of weights": casts}
    backward = _backward(config, size, tokens, device)
    if bf16 and config.model.gradient_checkpointing:
        if sharded:
            # Otherwise autograd holds the copies of all layers until their backward pass.
            copies["16-bit copies of weights"] = 2 * size.layer.trainable
        else:
            # Autocast's copies of all weights are gone when the backward pass begins.
            backward = max(0, backward - casts)
    kept = kept_activations(config, size, tokens, cuda) + _vision(config, size, tokens, cuda)
    # Lookup and head of tied embeddings each make a whole gradient, which join the one that is there
    # at the end of the backward pass, when the activations are gone.
    update = gradients | copies | {"activations": max(kept, 8 * size.tied), "backward pass": backward}
    rollout = _rollout(config, size, casts, device_bytes, cuda)
    if sharded:
        # One layer in use, the next one being gathered, the last one's gradient being summed.
        update["gathered weights"] = size.root.bytes + 2 * size.layer.bytes
        update["whole gradients"] = 4 * (2 * size.root.trainable + 2 * size.layer.trainable)
        if config.rollout.engine == "hf":
            rollout["gathered weights"] = size.weight_bytes - size.unsharded
    if config.update.kl_coef > 0 and not size.rank:
        if sharded:
            # The reference's weights take the place of the policy's, which are set aside.
            always["reference model"] = update["weights set aside"] = gradient_bytes
        else:
            always["reference model"] = size.weight_bytes
    if not config.rollout.vllm.sleep:
        always |= _vllm(config, device_bytes)
    # AdamW's fused form, used on a GPU, needs none; on a CPU it goes from parameter to parameter.
    temporary = 0 if cuda else 8 * size.largest // shards
    step = gradients | {"temporaries of the step": temporary}
    return MemoryEstimate(always, rollout, update, step)


@dataclass(frozen=True)
class MicroBatchTokens:
    """Tokens of one micro-batch at its limits."""

    tokens: int
    """All that go through the text layers."""
    predicted: int
    """Those of completions."""
    prompts: int
    shared: bool
    """Whether the prompt of a group goes through the model once."""


def micro_batch_tokens(config: Config) -> MicroBatchTokens:
    update, rollout = config.update, config.rollout
    prompt, completion = config.prompt.max_tokens, rollout.max_new_tokens
    group = rollout.completions_per_prompt
    shared = update.shared_prompt != "off" and config.model.attn_implementation == "sdpa"
    if update.micro_batch_tokens is None:
        completions = update.micro_batch_completions
        prompts = -(-completions // group)
    else:
        whole = prompt + group * completion
        prompts = max(1, update.micro_batch_tokens // whole)
        room = update.micro_batch_tokens - prompts * prompt
        completions = max(1, min(room // completion, prompts * group))
    tokens = (prompts if shared else completions) * prompt + completions * completion
    return MicroBatchTokens(tokens, completions * completion, prompts, shared)


def _layer_bytes(
    tokens: int, hidden: int, inner: int, query: int, key: int, *, bf16: bool, rank: int, fused: bool
) -> int:
    """What one layer keeps for its backward pass, elementwise results recomputed.

    Inputs of both norms, queries, keys, values, attention's output, gate and up. In 16 bits also
    the norms' results, once if they are `fused`, and otherwise in each layer that casts them.
    """
    if bf16:
        norms = 8 if rank and fused else 12 if fused or rank else 18
        each = norms * hidden + 4 * query + 4 * key + 4 * inner + 14 * rank
    elif rank:
        each = 8 * hidden + 8 * query + 8 * key + 8 * inner + 28 * rank
    else:
        each = 8 * hidden + 8 * query + 8 * key + 8 * inner
    return tokens * each


def kept_activations(config: Config, size: ModelSize, batch: MicroBatchTokens, cuda: bool) -> int:
    """What the text layers and the last norm hold between forward and backward."""
    text, rank = size.text, size.rank
    bf16 = config.model.dtype == "bfloat16"
    stream = batch.tokens * text.hidden_size * (2 if bf16 and rank else 4)
    last = batch.tokens * text.hidden_size * 4
    if config.model.gradient_checkpointing:
        return text.num_hidden_layers * stream + last
    query = text.num_attention_heads * size.head_dim
    layer = _layer_bytes(
        batch.tokens, text.hidden_size, _inner(text), query, size.kv_size, bf16=bf16, rank=rank, fused=cuda
    )
    if not batch.shared:
        layer *= 2  # elementwise results are recomputed only where the prompt is shared
    elif cuda and not bf16:
        # Completions attend to [prompt keys; own keys], which are copied for each of them.
        completions = batch.predicted // config.rollout.max_new_tokens
        keys = completions * (config.prompt.max_tokens + config.rollout.max_new_tokens)
        layer += 8 * (keys * size.kv_size + batch.predicted * query)
    return text.num_hidden_layers * layer + last


def _backward(config: Config, size: ModelSize, batch: MicroBatchTokens, device: str) -> int:
    """What the backward pass takes for a while: the vocabulary head, or one layer after it."""
    text = size.text
    # In the backward pass of a layer: gradients of gate, up and their product, and of the stream.
    element = 2 if config.model.dtype == "bfloat16" else 4
    layer = batch.tokens * (3 * _inner(text) * element + 2 * text.hidden_size * 4)
    if config.model.gradient_checkpointing:  # one layer at a time is computed again
        plain = _changed(config, ["model.gradient_checkpointing=false"])
        layer += kept_activations(plain, size, batch, device == "cuda") // text.num_hidden_layers
    return max(layer, _vocabulary_head(size, batch.predicted, device))


def _inner(section: Any) -> int:
    return getattr(section, "intermediate_size", None) or 4 * section.hidden_size


def _vision(config: Config, size: ModelSize, batch: MicroBatchTokens, cuda: bool) -> int:
    """Activations of the vision tower, whose tokens are patches; only if it is trained."""
    vision = getattr(size.config, "vision_config", None)
    if vision is None or not size.trained_modules & {"vision", "merger"}:
        return 0
    depth: int = getattr(vision, "depth", None) or getattr(vision, "num_hidden_layers", None) or 0
    patches = 4 * batch.prompts * config.prompt.max_tokens  # as if prompts were all image
    hidden = vision.hidden_size
    bf16 = config.model.dtype == "bfloat16"
    layer = _layer_bytes(patches, hidden, _inner(vision), hidden, hidden, bf16=bf16, rank=size.rank, fused=cuda)
    if cuda and bf16:  # the MLP's product, and queries and keys out of their common tensor
        layer += patches * (2 * _inner(vision) + 4 * hidden)
    if config.model.gradient_checkpointing:
        return depth * patches * hidden * 4 + layer
    return depth * layer


def _vocabulary_head(size: ModelSize, predicted: int, device: str) -> int:
    chunk = max(CHUNK_BYTES.get(device, CHUNK_BYTES["cuda"]), predicted * 256 * 4)
    return 2 * chunk + predicted * size.text.hidden_size * 12


def _rollout(config: Config, size: ModelSize, casts: int, device_bytes: int | None, cuda: bool) -> dict[str, int]:
    rollout = config.rollout
    if rollout.engine != "hf":
        return _vllm(config, device_bytes) if rollout.vllm.sleep else {}
    group = rollout.completions_per_prompt
    rows = group * min(max(1, rollout.batch_completions // group), rollout.prompts_per_step)
    length = config.prompt.max_tokens + rollout.max_new_tokens
    return {
        "16-bit copies of weights": casts,
        "KV cache": kv_cache_bytes(size, rows, length, kv_element_bytes(config, size, cuda)),
        # Logits, and what temperature, softmax and the sum over it make of them.
        "sampling": 6 * 4 * rows * size.text.vocab_size,
    }


def _vllm(config: Config, device_bytes: int | None) -> dict[str, int]:
    """What the engine vllm takes for its own copy of the weights and its cache."""
    if config.rollout.engine != "vllm":
        return {}
    share = config.rollout.vllm.memory_fraction
    return {f"vLLM ({share:.0%} of the GPU)": int(share * (device_bytes or 0))}


def kv_element_bytes(config: Config, size: ModelSize, cuda: bool) -> int:
    """Bytes of one number in the KV cache of the engine hf.

    On a CPU rotary embeddings multiply keys in the precision of the residual stream, which autocast
    leaves alone, and the cache stores values in the precision of keys.
    """
    return 2 if config.model.dtype == "bfloat16" and (cuda or size.rank) else 4


def kv_cache_bytes(size: ModelSize, rows: int, length: int, element: int) -> int:
    """Cache of `rows` sequences of `length` tokens; a sliding window keeps no more than itself."""
    text = size.text
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
    window = getattr(text, "sliding_window", None) or length
    cached = sum(min(length, max(1, window - 1)) if kind == "sliding_attention" else length for kind in kinds)
    return 2 * rows * cached * size.kv_size * element


def suggest(
    config: Config, size: ModelSize, *, processes: int, device_bytes: int, sharded: bool = False
) -> tuple[list[str], Verdict] | None:
    """Overrides that make the run fit into `device_bytes`, as few as will do; None if none do."""
    sizes = {_counted(config): size}

    def result(changes: Iterable[str]) -> Verdict:
        changed = _changed(config, changes)
        key = _counted(changed)
        if key not in sizes:
            sizes[key] = measure(changed, size.config)
        return judge(changed, sizes[key], processes=processes, device_bytes=device_bytes, sharded=sharded)

    chosen: dict[str, str] = {}
    for key, value in _candidates(config, size, device_bytes):
        if not result(chosen.values()).reasons:
            break
        chosen[key] = f"{key}={value}"
    if result(chosen.values()).reasons:
        return None
    for key in list(chosen):
        fewer = [change for other, change in chosen.items() if other != key]
        if not result(fewer).reasons:
            del chosen[key]
    return list(chosen.values()), result(chosen.values())


def remedies(config: Config, size: ModelSize, *, processes: int, device_bytes: int, sharded: bool) -> list[str]:
    """What would make a run fit that does not, one line each."""
    options: dict[str, Any] = {"processes": processes, "device_bytes": device_bytes}
    lines = []
    if processes > 1 and not sharded:
        spread = judge(config, size, sharded=True, **options)
        if not spread.reasons:
            lines.append(
                f"would fit ({shown(spread.estimate.peak)}) with the model sharded over the GPUs: PARALLEL=fsdp2 "
                "(configs/accelerate/fsdp2.yaml)"
            )
    advice = suggest(config, size, sharded=sharded, **options)
    if advice is None:
        return [*lines, "no setting makes it fit: a smaller model or a larger GPU is needed"]
    changes, after = advice
    # Quoted as one types them in a shell.
    typed = " ".join(f"'{each}'" if set(each) & set(" {[") else each for each in changes)
    return [*lines, f"would fit ({shown(after.estimate.peak)}) with: {typed}"]


def require_fit(config: Config, *, processes: int, device_bytes: int, sharded: bool) -> None:
    """Raise ConfigError, saying what would help, for a run that does not fit its GPUs; none if nobody can tell."""
    options: dict[str, Any] = {"processes": processes, "device_bytes": device_bytes, "sharded": sharded}
    try:
        model_config, _ = find_model_config(model_and_adapter(config.model.path)[0], config.model.trust_remote_code)
        size = measure(config, model_config)
        reasons = judge(config, size, **options).reasons
    except Exception:  # loading the model says better what is wrong with it
        return
    if reasons:
        lines = [*reasons, *remedies(config, size, **options)]
        raise ConfigError(
            f"this run does not fit GPUs of {shown(device_bytes)} (an estimate; `mm-agrae doctor` shows what takes "
            "how much, and train.check_memory=false goes on regardless):\n  " + "\n  ".join(lines)
        )


def _candidates(config: Config, size: ModelSize, device_bytes: int) -> Iterator[tuple[str, str]]:
    """Changes in order of their cost, each made on top of the ones before it."""
    rollout, update = config.rollout, config.update
    if rollout.engine == "vllm":
        share, fraction = vllm_share(config, size, device_bytes), rollout.vllm.memory_fraction
        least = -(-100 * share.least // device_bytes) / 100
        if fraction < least <= 1:
            yield "rollout.vllm.memory_fraction", str(least)
        while (fraction := round(fraction - 0.05, 2)) > least:
            yield "rollout.vllm.memory_fraction", str(fraction)
    if not config.model.gradient_checkpointing:
        yield "model.gradient_checkpointing", "true"
    least = config.prompt.max_tokens + rollout.max_new_tokens
    tokens = update.micro_batch_tokens or micro_batch_tokens(config).tokens
    while tokens // 2 >= least:
        tokens //= 2
        yield "update.micro_batch_tokens", str(tokens)
    if rollout.engine == "vllm":
        yield "rollout.engine", "hf"
    if rollout.engine in ("hf", "vllm"):
        batch = rollout.batch_completions
        while batch // 2 >= rollout.completions_per_prompt:
            batch //= 2
            yield "rollout.batch_completions", str(batch)
    if not size.rank:
        if hasattr(size.config, "vision_config") and not config.model.freeze:
            yield "model.freeze", "[vision, embeddings]"
        yield "model.freeze", "[]"
        yield "model.lora", "{rank: 32, alpha: 64}"


def _counted(config: Config) -> str:
    """The settings that change what is counted on the module."""
    return repr((config.model.freeze, config.model.lora))


def _changed(config: Config, changes: Iterable[str]) -> Config:
    values = config.model_dump(mode="json")
    for change in changes:
        apply_override(values, change)
    return configs.parse(values)


def shown(count: int) -> str:
    """A number of bytes as people read it."""
    return f"{count / GIB:.1f} GiB" if count >= GIB / 10 else f"{count / 2**20:.1f} MiB"
