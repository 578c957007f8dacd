"""What a config needs, before anything is loaded: versions, files, disk, GPU memory by part.

    mm-agrae doctor configs/paper/math_llama_3.2_3b.yaml --gpus 8 --gpu-memory 80
    mm-agrae doctor configs/paper/math_qwen2.5_math_7b.yaml --gpus 8 --gpu-memory 80 --fsdp2

Parameters are counted on the real module, built without memory on torch's meta device, adapters
and frozen parts included; weights, gradients, optimiser and cache follow from them exactly. What
activations take is a sum over the tensors that a layer keeps (`_layer_bytes`), counted on Qwen2.5
layers; other families differ. Prompts and completions are taken at their limits, so that a run
usually needs less. Nothing here raises for what is missing: it is reported.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mm_agrae import config as configs
from mm_agrae import tasks
from mm_agrae.config import Config
from mm_agrae.config.reading import apply_override
from mm_agrae.errors import ModelError, UserError
from mm_agrae.model.compat import prepare
from mm_agrae.model.loading import misfit, model_modules
from mm_agrae.model.lora import add_lora, model_and_adapter
from mm_agrae.model.vocab_head import CHUNK_BYTES
from mm_agrae.progress import Reporter
from mm_agrae.run.versions import versions

ROOT = Path(__file__).resolve().parent.parent
GIB = 2**30
RESERVE = 0.06
"""Share of a GPU's memory that the driver, libraries and fragmentation take."""
MARK = {True: "ok", False: "!!"}


# ------------------------------------------------------------------------------- the model's shape


@dataclass(frozen=True)
class Unit:
    """What FSDP2 gathers in one go: its bytes, and how many of its numbers learn."""

    bytes: int
    trainable: int


@dataclass(frozen=True)
class Shape:
    """A model's size under given settings, from its config alone."""

    config: Any
    parameters: int
    trainable: int
    weight_bytes: int
    """Of all parameters, in the precisions they are kept in."""
    cast_parameters: int
    """Weights of linear layers that autocast keeps a 16-bit copy of: those that learn."""
    largest: int
    """Numbers of the largest parameter that learns."""
    tied: int
    """Numbers of embeddings that learn and are the vocabulary head as well; 0 if there are none."""
    learning_parts: frozenset[str]
    rank: int
    """Of the LoRA adapters; 0 for full tuning."""
    layer: Unit
    """The largest layer, which FSDP2 gathers at once."""
    root: Unit
    """What is in no layer, embeddings and head above all, and is gathered for the whole update."""
    unsharded: int
    """Bytes of a frozen vision tower, which FSDP2 leaves whole on every process."""

    @property
    def text(self) -> Any:
        return self.config.get_text_config()

    @property
    def head_dim(self) -> int:
        text = self.text
        return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads

    @property
    def kv_size(self) -> int:
        heads = getattr(self.text, "num_key_value_heads", None) or self.text.num_attention_heads
        return heads * self.head_dim


def find_config(path: str, trust_remote_code: bool = False) -> tuple[Any, str]:
    """The transformers config of a model and where it was found.

    Looked for in the folder or the hub's local cache, then among the published shapes that come
    with the project, then on the hub. Raises ModelError if it is nowhere.
    """
    prepare()
    from transformers import AutoConfig

    def load(**options: Any) -> Any:
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code, **options)

    errors = (OSError, ValueError, KeyError, ImportError)
    try:
        return load(local_files_only=True), "its own config.json"
    except errors as error:
        reason = error
    file = ROOT / "data" / "model_shapes" / f"{path.replace('/', '--')}.json"
    if file.is_file():
        values = json.loads(file.read_text(encoding="utf-8"))
        return AutoConfig.for_model(**values), "the published shape"
    try:
        return load(), "its config.json on the hub"
    except errors:
        raise ModelError(
            f"model.path {path!r}: no config.json there, in the hub's cache or on the hub "
            f"({reason})"
        ) from None


def measure(config: Config, model_config: Any) -> Shape:
    """Count parameters as a run would have them. Raises ModelError as loading would."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    settings = config.model
    loader = (
        AutoModelForImageTextToText
        if hasattr(model_config, "vision_config")
        else AutoModelForCausalLM
    )
    try:
        with torch.device("meta"):
            model: Any = loader.from_config(
                model_config, trust_remote_code=settings.trust_remote_code
            )
        model.tie_weights()
        if reason := misfit(model):
            raise ModelError(f"model.path {settings.path!r} ({model_config.model_type}): {reason}")
        known = model_modules(model)
        for name in (*settings.freeze, *(settings.lora.parts if settings.lora else ())):
            if name not in known:
                raise ModelError(
                    f"model.path {settings.path!r} has no part {name!r}; it has {sorted(known)}"
                )
        for name in settings.freeze:
            known[name].requires_grad_(False)
        rank, model = _adapt(model, config, known)
    except (OSError, ValueError, KeyError, AttributeError, NotImplementedError) as error:
        raise ModelError(f"model.path {settings.path!r}: cannot be built: {error}") from error
    frozen_bytes = 2 if rank and settings.dtype == "bfloat16" else 4
    parameters = list(model.parameters())
    trainable = sum(p.numel() for p in parameters if p.requires_grad)
    total = sum(p.numel() for p in parameters)
    embeddings = model.get_input_embeddings().weight
    head = model.get_output_embeddings().weight
    linear = {
        id(module.weight): module.weight
        for module in model.modules()
        if isinstance(module, nn.Linear) and module.weight.requires_grad
    }
    frozen_tower = [] if _learns(known.get("vision")) else list(known["vision"].parameters())
    whole = set(frozen_tower)

    def unit(members: Iterable[nn.Parameter]) -> Unit:
        sharded = set(members) - whole
        learning = sum(p.numel() for p in sharded if p.requires_grad)
        frozen = sum(p.numel() for p in sharded if not p.requires_grad)
        return Unit(4 * learning + frozen_bytes * frozen, learning)

    names = getattr(model, "_no_split_modules", None) or ()
    layers = [module for module in model.modules() if type(module).__name__ in names]
    in_layers = {p for module in layers for p in module.parameters()}
    units = [unit(module.parameters()) for module in layers]
    return Shape(
        config=model_config,
        parameters=total,
        trainable=trainable,
        weight_bytes=4 * trainable + frozen_bytes * (total - trainable),
        cast_parameters=sum(weight.numel() for weight in linear.values()),
        largest=max((p.numel() for p in parameters if p.requires_grad), default=0),
        tied=embeddings.numel() if embeddings is head and embeddings.requires_grad else 0,
        learning_parts=frozenset(
            name
            for name, module in known.items()
            if any(parameter.requires_grad for parameter in module.parameters())
        ),
        rank=rank,
        layer=max(units, key=lambda each: each.bytes, default=Unit(0, 0)),
        root=unit(set(parameters) - in_layers),
        unsharded=frozen_bytes * sum(p.numel() for p in frozen_tower),
    )


def _learns(tower: nn.Module | None) -> bool:
    """Also true of a tower that is not there: it is not kept whole either."""
    return tower is None or any(parameter.requires_grad for parameter in tower.parameters())


def _adapt(model: Any, config: Config, known: dict[str, nn.Module]) -> tuple[int, Any]:
    """The rank of the adapters that a run would train, and the model with them in place."""
    _, adapter = model_and_adapter(config.model.path)
    if adapter is not None:
        from peft import PeftConfig, get_peft_model

        found: Any = PeftConfig.from_pretrained(adapter)
        found.inference_mode = False
        return found.r, get_peft_model(model, found)
    if config.model.lora is not None:
        return config.model.lora.rank, add_lora(model, config.model.lora, known)
    return 0, model


# ----------------------------------------------------------------------------------- GPU memory


@dataclass(frozen=True)
class Estimate:
    """Bytes on one device. `always` are there throughout; of the phases only one at a time."""

    always: dict[str, int]
    rollout: dict[str, int]
    update: dict[str, int]
    optimiser: dict[str, int] = field(default_factory=dict)

    @property
    def phases(self) -> dict[str, dict[str, int]]:
        return {"rollout": self.rollout, "update": self.update, "optimiser step": self.optimiser}

    @property
    def peak(self) -> int:
        return sum(self.always.values()) + max(sum(p.values()) for p in self.phases.values())


def estimate(
    config: Config,
    shape: Shape,
    *,
    processes: int = 1,
    device: str = "cuda",
    device_bytes: int | None = None,
    sharded: bool = False,
) -> Estimate:
    """Memory of one process. `device_bytes`, the GPU's memory, is what vLLM takes a share of.

    `sharded`: the model is spread over the processes by FSDP2.
    """
    if sharded:
        return _sharded_estimate(config, shape, processes, device, device_bytes)
    trainable, cuda = shape.trainable, device == "cuda"
    halved = config.model.dtype == "bfloat16"
    casts = 2 * shape.cast_parameters if halved else 0
    always = {"weights": shape.weight_bytes, "optimiser (Adam)": 8 * trainable}
    if config.update.kl_coef > 0 and not shape.rank:
        always["reference model"] = shape.weight_bytes
    if processes > 1:
        always["gradients (DDP's buckets)"] = 4 * trainable
    if not config.rollout.vllm.sleep:
        always |= vllm_bytes(config, device_bytes)
    gradients = {"gradients": 4 * trainable} if processes == 1 else {}
    rows = row_tokens(config)
    update = {
        **gradients,
        "16-bit copies of weights": casts,
        # Lookup and head of tied embeddings each make a whole gradient, which are added at the end
        # of the backward pass, when the activations are gone.
        "activations": max(_activations(config, shape, rows, cuda), 4 * shape.tied),
        "vocabulary head": _head(shape, rows.predicted, device),
    }
    # AdamW's fused form, used on a GPU, needs none; on a CPU it goes from parameter to parameter.
    temporary = 0 if cuda else 8 * shape.largest
    step = {**gradients, "temporaries of the step": temporary}
    return Estimate(always, _rollout(config, shape, casts, device_bytes), update, step)


def _sharded_estimate(
    config: Config, shape: Shape, processes: int, device: str, device_bytes: int | None
) -> Estimate:
    """Under FSDP2: shards throughout, and what is gathered of them in each phase."""
    trainable, halved = shape.trainable, config.model.dtype == "bfloat16"
    shards = (shape.weight_bytes - shape.unsharded) // processes
    always = {
        "weights": shards + shape.unsharded,
        "optimiser (Adam)": 8 * trainable // processes,
    }
    gradients = {"gradients": 4 * trainable // processes}
    reference = {}
    if config.update.kl_coef > 0 and not shape.rank:
        always["reference model"] = 4 * trainable // processes
        # The present weights stand aside while the reference's are in their place.
        reference["weights set aside"] = 4 * trainable // processes
    if not config.rollout.vllm.sleep:
        always |= vllm_bytes(config, device_bytes)
    rows = row_tokens(config)
    # Without checkpointing autograd holds the 16-bit copies of all layers until its backward pass.
    at_once = shape.layer.trainable if config.model.gradient_checkpointing else None
    casts = 2 * (shape.cast_parameters if at_once is None else at_once) if halved else 0
    update = {
        **gradients,
        **reference,
        # One layer is worked on, the next one being gathered, the last one's gradient summed.
        "gathered weights": shape.root.bytes + 2 * shape.layer.bytes,
        "whole gradients": 4 * (2 * shape.root.trainable + 2 * shape.layer.trainable),
        "16-bit copies of weights": casts,
        "activations": max(_activations(config, shape, rows, device == "cuda"), 4 * shape.tied),
        "vocabulary head": _head(shape, rows.predicted, device),
    }
    step = gradients | {
        "temporaries of the step": 0 if device == "cuda" else 8 * shape.largest // processes
    }
    cached = 2 * shape.cast_parameters if halved else 0
    rollout = _rollout(config, shape, cached, device_bytes)
    if config.rollout.engine == "hf":
        rollout["gathered weights"] = shape.weight_bytes - shape.unsharded
    return Estimate(always, rollout, update, step)


@dataclass(frozen=True)
class Row:
    """Tokens of one micro-batch: all that go through the text layers, and their parts."""

    tokens: int
    predicted: int
    prompts: int
    shared: bool


def row_tokens(config: Config) -> Row:
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
    return Row(tokens, completions * completion, prompts, shared)


def _layer_bytes(
    tokens: int, hidden: int, inner: int, query: int, key: int, *, halved: bool, rank: int
) -> int:
    """What one layer keeps for its backward pass, elementwise results recomputed.

    Inputs of both norms, queries, keys, values, attention's output, gate and up. In 16 bits also
    the cast copies, and with adapters what goes into them.
    """
    if halved and rank:
        each = 20 * hidden + 4 * query + 4 * key + 6 * inner + 14 * rank
    elif halved:
        each = 18 * hidden + 4 * query + 4 * key + 4 * inner
    elif rank:
        each = 16 * hidden + 8 * query + 8 * key + 8 * inner + 28 * rank
    else:
        each = 8 * hidden + 8 * query + 8 * key + 8 * inner
    return tokens * each


def kept_activations(config: Config, shape: Shape, row: Row, cuda: bool) -> int:
    """What the text layers and the last norm hold between forward and backward."""
    text, rank = shape.text, shape.rank
    halved = config.model.dtype == "bfloat16"
    element = 2 if halved else 4
    stream = row.tokens * text.hidden_size * (2 if halved and rank else 4)
    last = row.tokens * text.hidden_size * 4
    if config.model.gradient_checkpointing:
        return text.num_hidden_layers * stream + last
    query = text.num_attention_heads * shape.head_dim
    layer = _layer_bytes(
        row.tokens, text.hidden_size, _inner(text), query, shape.kv_size, halved=halved, rank=rank
    )
    if not row.shared:
        layer *= 2  # elementwise results are recomputed in the shared form alone
    elif cuda:
        # Completions attend to [prompt keys; own keys], which are copied for each of them.
        completions = row.predicted // config.rollout.max_new_tokens
        keys = completions * (config.prompt.max_tokens + config.rollout.max_new_tokens)
        layer += element * 2 * (keys * shape.kv_size + row.predicted * query)
    return text.num_hidden_layers * layer + last


def _activations(config: Config, shape: Shape, row: Row, cuda: bool) -> int:
    text = shape.text
    kept = kept_activations(config, shape, row, cuda)
    if config.model.gradient_checkpointing:  # one layer at a time is computed again
        plain = _changed(config, ["model.gradient_checkpointing=false"])
        kept += kept_activations(plain, shape, row, cuda) // text.num_hidden_layers
    # In the backward pass of a layer: gradients of gate, up and their product, and of the stream.
    element = 2 if config.model.dtype == "bfloat16" else 4
    working = row.tokens * (3 * _inner(text) * element + 2 * text.hidden_size * 4)
    return kept + working + _vision(config, shape, row)


def _inner(part: Any) -> int:
    return getattr(part, "intermediate_size", None) or 4 * part.hidden_size


def _vision(config: Config, shape: Shape, row: Row) -> int:
    """Activations of the vision tower, whose tokens are patches; only if it learns."""
    vision = getattr(shape.config, "vision_config", None)
    if vision is None or not shape.learning_parts & {"vision", "merger"}:
        return 0
    depth: int = getattr(vision, "depth", None) or getattr(vision, "num_hidden_layers", None) or 0
    patches = 4 * row.prompts * config.prompt.max_tokens  # were prompts all picture
    hidden = vision.hidden_size
    halved = config.model.dtype == "bfloat16"
    layer = _layer_bytes(
        patches, hidden, _inner(vision), hidden, hidden, halved=halved, rank=shape.rank
    )
    if config.model.gradient_checkpointing:
        return depth * patches * hidden * 4 + layer
    return depth * layer


def _head(shape: Shape, predicted: int, device: str) -> int:
    chunk = max(CHUNK_BYTES.get(device, CHUNK_BYTES["cuda"]), predicted * 256 * 4)
    return 2 * chunk + predicted * shape.text.hidden_size * 12


def _rollout(config: Config, shape: Shape, casts: int, device_bytes: int | None) -> dict[str, int]:
    rollout = config.rollout
    if rollout.engine != "hf":
        return vllm_bytes(config, device_bytes) if rollout.vllm.sleep else {}
    group = rollout.completions_per_prompt
    rows = min(max(1, rollout.batch_completions // group) * group, rollout.prompts_per_step * group)
    length = config.prompt.max_tokens + rollout.max_new_tokens
    return {
        "16-bit copies of weights": casts,
        "KV cache": kv_cache_bytes(shape, rows, length, kv_element_bytes(config, shape)),
        # Logits, and what temperature, softmax and the sum over it make of them.
        "sampling": 6 * 4 * rows * shape.text.vocab_size,
    }


def vllm_bytes(config: Config, device_bytes: int | None) -> dict[str, int]:
    """What the engine vllm takes for its own copy of the weights and its cache."""
    rollout = config.rollout
    if rollout.engine != "vllm":
        return {}
    share = rollout.vllm.memory_fraction
    return {f"vLLM ({share:.0%} of the GPU)": int(share * (device_bytes or 0))}


def kv_element_bytes(config: Config, shape: Shape) -> int:
    """Bytes of one number in the cache of the engine hf.

    Rotary embeddings multiply keys in the precision of the residual stream, which autocast leaves
    alone, and the cache takes values in the precision of keys.
    """
    return 2 if config.model.dtype == "bfloat16" and shape.rank else 4


def kv_cache_bytes(shape: Shape, rows: int, length: int, element: int) -> int:
    """Cache of `rows` sequences of `length` tokens; a sliding window keeps no more than itself."""
    text = shape.text
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
    window = getattr(text, "sliding_window", None) or length
    cached = sum(
        min(length, max(1, window - 1)) if kind == "sliding_attention" else length for kind in kinds
    )
    return 2 * rows * cached * shape.kv_size * element


# --------------------------------------------------------------------------------------- advice


def suggest(
    config: Config, shape: Shape, *, processes: int, device_bytes: int, sharded: bool = False
) -> tuple[list[str], Estimate] | None:
    """Overrides that make the run fit into `device_bytes`, as few as will do; None if none do."""
    limit = int(device_bytes * (1 - RESERVE))

    def result(changes: Sequence[str]) -> Estimate:
        changed = _changed(config, changes)
        # Only these settings change what is counted on the module.
        same = changed.model.lora == config.model.lora and (
            changed.model.freeze == config.model.freeze
        )
        size = shape if same else measure(changed, shape.config)
        return estimate(
            changed, size, processes=processes, device_bytes=device_bytes, sharded=sharded
        )

    chosen: dict[str, str] = {}
    for key, value in _candidates(config, shape):
        if result([*chosen.values()]).peak <= limit:
            break
        chosen[key] = f"{key}={value}"
    if result([*chosen.values()]).peak > limit:
        return None
    for key in list(chosen):
        fewer = [change for other, change in chosen.items() if other != key]
        if result(fewer).peak <= limit:
            del chosen[key]
    return list(chosen.values()), result([*chosen.values()])


def _candidates(config: Config, shape: Shape) -> Iterator[tuple[str, str]]:
    """Changes from those that cost least, each over the ones before it."""
    rollout, update = config.rollout, config.update
    if not config.model.gradient_checkpointing:
        yield "model.gradient_checkpointing", "true"
    least = config.prompt.max_tokens + rollout.max_new_tokens
    tokens = update.micro_batch_tokens or row_tokens(config).tokens
    while tokens // 2 >= least:
        tokens //= 2
        yield "update.micro_batch_tokens", str(tokens)
    if rollout.engine == "hf":
        batch = rollout.batch_completions
        while batch // 2 >= rollout.completions_per_prompt:
            batch //= 2
            yield "rollout.batch_completions", str(batch)
    if rollout.engine == "vllm":
        yield "rollout.vllm.memory_fraction", "0.25"
    if not shape.rank:
        if hasattr(shape.config, "vision_config") and not config.model.freeze:
            yield "model.freeze", "[vision, embeddings]"
        yield "model.freeze", "[]"
        yield "model.lora", "{rank: 32, alpha: 64}"


def _changed(config: Config, changes: Sequence[str]) -> Config:
    values = config.model_dump(mode="json")
    for change in changes:
        apply_override(values, change)
    return configs.parse(values)


# --------------------------------------------------------------------------------- what is there


@dataclass
class Findings:
    """Lines of the report by section; those that stop a run are counted."""

    reporter: Reporter
    problems: int = 0

    def line(self, good: bool, text: str) -> None:
        self.problems += not good
        self.reporter.say(f"  {MARK[good]}  {text}")

    def section(self, title: str) -> None:
        self.reporter.say(f"\n{title}")


def examine(
    config: Config,
    *,
    gpus: int | None = None,
    gpu_memory: float | None = None,
    sharded: bool = False,
    reporter: Reporter | None = None,
) -> int:
    """Print the whole report. Returns the number of problems that would stop a run.

    `gpus`, `gpu_memory` (GiB): the machine to plan for; not given: this one. `sharded`: the model
    is spread over the GPUs by FSDP2.
    """
    findings = Findings(reporter or Reporter())
    processes = gpus or max(1, torch.cuda.device_count())
    if gpu_memory is not None:
        device_bytes: int | None = int(gpu_memory * GIB)
    elif torch.cuda.is_available():
        device_bytes = torch.cuda.get_device_properties(0).total_memory
    else:
        device_bytes = None
    _versions(config, findings)
    shape = _model(config, findings)
    rows = _data(config, findings)
    _disk(config, shape, findings)
    _plan(config, rows, processes, findings)
    if shape is not None:
        _limits(config, shape, findings)
        _memory(config, shape, processes, device_bytes, sharded, findings)
    count = findings.problems
    findings.reporter.say(
        f"\n{count} problem{'s' if count != 1 else ''} to mend before this run"
        if count
        else "\nnothing stands in the way of this run"
    )
    return count


def _versions(config: Config, findings: Findings) -> None:
    findings.section("versions")
    tested = _tested()
    for name, version in versions().items():
        expected = tested.get(name)
        if expected is None or version.split("+")[0] == expected:
            note = "" if expected is None else " (tested)"
        else:
            note = f" (tested with {expected})"
        findings.line(True, f"{name} {version}{note}")
    needed = {"vllm": "rollout.engine is vllm"} if config.rollout.engine == "vllm" else {}
    needed |= dict.fromkeys(config.log.sinks, "log.sinks names it")
    for name, why in needed.items():
        if importlib.util.find_spec(name) is None:
            extra = "vllm" if name == "vllm" else "trackers"
            findings.line(
                False, f"{name} is not installed, but {why}: pip install 'mm-agrae[{extra}]'"
            )


def _tested() -> dict[str, str]:
    """The tested set of versions, from constraints.txt; empty in an installed package."""
    file = ROOT / "constraints.txt"
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    pairs = (line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    return {name.strip(): version.strip() for name, version in pairs}


def _model(config: Config, findings: Findings) -> Shape | None:
    findings.section(f"model {config.model.path}")
    path = config.model.path
    try:
        base, _ = model_and_adapter(path)
        model_config, source = find_config(base, config.model.trust_remote_code)
        shape = measure(config, model_config)
    except UserError as error:
        findings.line(False, str(error))
        return None
    except Exception as error:  # remote code and foreign classes may fail in any way
        findings.line(False, f"{path}: cannot be examined: {type(error).__name__}: {error}")
        return None
    for line in _files(base, shape):
        findings.line(*line)
    text = shape.text
    tuning = f"LoRA of rank {shape.rank}" if shape.rank else "full tuning"
    findings.line(
        True,
        f"{shape.parameters:,} parameters, {shape.trainable:,} of them learn ({tuning}; "
        f"{text.num_hidden_layers} layers of {text.hidden_size}; from {source})",
    )
    return shape


def _files(path: str, shape: Shape) -> Iterator[tuple[bool, str]]:
    """Whether weights, tokenizer and chat template are on this machine."""
    folder = Path(path)
    if not folder.is_dir():
        try:
            from huggingface_hub import snapshot_download

            folder = Path(snapshot_download(path, local_files_only=True))
        except Exception:
            size = 2 * shape.parameters / 1e9
            yield (
                False,
                f"not on this machine. With a network it is fetched at the start of the run (about "
                f"{size:.0f} GB); or: hf download {path}, or a local folder in model.path",
            )
            return
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        named = set(json.loads(index.read_text(encoding="utf-8")).get("weight_map", {}).values())
        missing = sorted(name for name in named if not (folder / name).is_file())
        yield (
            not missing,
            (
                f"{folder}: {', '.join(missing)} missing; fetch it again"
                if missing
                else f"{len(named)} files of weights"
            ),
        )
    else:
        weights = [*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")]
        yield bool(weights), "weights" if weights else f"{folder}: no *.safetensors file"
    tokenizer = any((folder / n).is_file() for n in ("tokenizer.json", "vocab.json"))
    tokenizer |= (folder / "tokenizer.model").is_file()
    yield tokenizer, "tokenizer" if tokenizer else f"{folder}: no tokenizer.json"


def _data(config: Config, findings: Findings) -> int | None:
    """Load every source; returns the training rows, None if a source is missing."""
    findings.section("data")
    rows: int | None = 0
    for split in ("train", "evaluate"):
        for source in getattr(config.data, split):
            try:
                task = tasks.load(source, on_bad_row=config.data.on_bad_row)
            except UserError as error:
                findings.line(False, f"{split} {source.label}: {error}")
                rows = None if split == "train" else rows
                continue
            except Exception as error:  # a task of the user's may fail in any way
                findings.line(False, f"{split} {source.label}: {type(error).__name__}: {error}")
                rows = None if split == "train" else rows
                continue
            skipped = f", {len(task.skipped)} left out" if task.skipped else ""
            findings.line(len(task) > 0, f"{split} {source.label}: {len(task):,} rows{skipped}")
            if split == "train" and rows is not None:
                rows += len(task)
    return rows


def checkpoint_bytes(shape: Shape) -> int:
    """One checkpoint: weights (or adapters) and two moments of each number that learns."""
    return (4 * shape.trainable if shape.rank else shape.weight_bytes) + 8 * shape.trainable


def _disk(config: Config, shape: Shape | None, findings: Findings) -> None:
    findings.section("disk")
    folder = Path(config.run_dir).absolute()
    while not folder.is_dir():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if not os.access(folder, os.W_OK):
        findings.line(False, f"{folder} cannot be written to; choose another run_dir")
    if shape is None:
        findings.line(True, f"{free / 1e9:.0f} GB free at {folder}")
        return
    one = checkpoint_bytes(shape)
    # The oldest is deleted only once the new one is whole.
    needed = one * (config.checkpoint.keep + 1)
    findings.line(
        needed < free,
        f"{config.checkpoint.keep + 1} checkpoints of {_size(one)} at most (checkpoint.keep = "
        f"{config.checkpoint.keep} and the one being written), {_size(free)} free at {folder}",
    )


def _plan(config: Config, rows: int | None, processes: int, findings: Findings) -> None:
    findings.section("plan")
    counts_rows = ("training rows", "steps (rollouts)")
    try:
        lines = configs.plan(config, rows or config.rollout.prompts_per_step, processes)
    except UserError as error:
        findings.line(False, str(error))
        return
    for name, value in lines:
        if rows is not None or name not in counts_rows:
            unknown = rows is None and config.train.steps is None
            findings.line(True, f"{name}: {value.split(', ')[0] if unknown else value}")
    if config.rollout.prompts_per_step % processes:
        findings.line(
            True,
            f"note: {config.rollout.prompts_per_step} prompts do not divide evenly among "
            f"{processes} processes; some wait for others",
        )


def _limits(config: Config, shape: Shape, findings: Findings) -> None:
    most = getattr(shape.text, "max_position_embeddings", None)
    if not most:
        return
    for name, section in (("rollout", config.rollout), ("evaluate", config.evaluate)):
        length = config.prompt.max_tokens + section.max_new_tokens
        if length > most:
            findings.line(
                True,
                f"note: prompt.max_tokens + {name}.max_new_tokens = {length}, more than the "
                f"model's {most} positions; a completion may run past what it was trained for",
            )


def _memory(
    config: Config,
    shape: Shape,
    processes: int,
    device_bytes: int | None,
    sharded: bool,
    findings: Findings,
) -> None:
    machine = f"{processes} process{'es' if processes > 1 else ''}"
    machine += ", model spread by FSDP2," if sharded else ""
    if device_bytes is None:
        findings.section(f"GPU memory of each of {machine} (estimate; give --gpu-memory to judge)")
    else:
        findings.section(f"GPU memory of each of {machine} with {_size(device_bytes)} (estimate)")
    found = estimate(config, shape, processes=processes, device_bytes=device_bytes, sharded=sharded)
    for line in table(found):
        findings.reporter.say(f"      {line}")
    if device_bytes is None:
        return
    limit = int(device_bytes * (1 - RESERVE))
    findings.line(
        found.peak <= limit,
        f"peak {_size(found.peak)} of {_size(limit)} usable (6 % are left to the driver)",
    )
    if found.peak <= limit:
        return
    if processes > 1 and not sharded:
        spread = estimate(
            config, shape, processes=processes, device_bytes=device_bytes, sharded=True
        )
        if spread.peak <= limit:
            findings.line(
                True,
                f"would fit ({_size(spread.peak)}) with the model spread over the GPUs: "
                "PARALLEL=fsdp2 (configs/accelerate/fsdp2.yaml)",
            )
    advice = suggest(config, shape, processes=processes, device_bytes=device_bytes, sharded=sharded)
    if advice is None:
        findings.line(True, "no setting makes it fit: a smaller model or a larger GPU is needed")
        return
    changes, after = advice
    findings.line(True, f"would fit ({_size(after.peak)}) with: {_shell(changes)}")


def table(found: Estimate) -> list[str]:
    """The estimate as text, largest parts first."""
    lines = []
    for title, values in {"throughout": found.always, **found.phases}.items():
        listed = sorted(values.items(), key=lambda item: -item[1])
        inside = ", ".join(f"{name} {_size(size)}" for name, size in listed if size)
        lines.append(f"{title:15} {_size(sum(values.values())):>9}  {inside}".rstrip())
    lines.append(f"{'peak':15} {_size(found.peak):>9}")
    return lines


def _shell(changes: Sequence[str]) -> str:
    return " ".join(f"'{change}'" if set(change) & set(" {[") else change for change in changes)


def _size(count: int) -> str:
    return f"{count / GIB:.1f} GiB" if count >= GIB / 10 else f"{count / 2**20:.1f} MiB"
