"""Memory that ran out, told in one message: in which stage, how much was asked for, and which settings lower it."""

import contextlib
import functools
import os
import re
from collections.abc import Iterator
from typing import Any

from mm_agrae.errors import OutOfMemoryError, ProcessError

ROLLOUT = "rollout.batch_completions rollout.vllm.memory_fraction rollout.vllm.sleep=true *prompt.max_pixels"
SETTINGS = {
    "loading": "rollout.vllm.memory_fraction *model.lora FSDP2 *model.path",
    "rollout": f"{ROLLOUT} *rollout.max_new_tokens",
    "update": "update.micro_batch_tokens update.micro_batch_completions model.gradient_checkpointing=true "
    "rollout.vllm.memory_fraction *model.dtype=bfloat16 *prompt.max_pixels *rollout.max_new_tokens *model.lora FSDP2",
    "evaluate": f"{ROLLOUT} evaluate.max_new_tokens".replace("rollout.b", "evaluate.b"),
    "checkpoint": "checkpoint.background=false log.rollouts=false",
    "reward": "*reward.workers",
    "prompts": "*prompt.max_pixels",
}
"""What lowers the memory of each stage, what costs least first: a setting to lower, or the value to give it.

A resumed run may change all but those with a *.
"""
SETTINGS |= {"reference": f"{SETTINGS['update']} *update.kl_coef=0.0"}
SETTINGS |= dict.fromkeys(("sync", "probe"), SETTINGS["rollout"])

SIGNS = re.compile(r"out of memory|(can't|cannot|unable to) allocate|not enough memory|bad_alloc|ALLOC_FAILED", re.I)
SIZE = r"([\d.]+) ?(bytes|[KMGT]iB)"
UNITS = {"bytes": 2**-30, "KiB": 2**-20, "MiB": 2**-10, "GiB": 1, "TiB": 2**10}

RESERVE = [bytearray(16 << 20)]
"""Given up when memory has run out, so that there is some to say so."""


@contextlib.contextmanager
def during(stage: str) -> Iterator[None]:
    """Around a stage: an error inside remembers the innermost one."""
    try:
        yield
    except Exception as error:
        error.__dict__.setdefault("stage", stage)
        raise


def explained(error: BaseException, config: Any = None, stage: str = "loading") -> BaseException:
    """An OutOfMemoryError with advice if `error`, or one that caused it, says that memory ran out; else `error`.

    `config` gives the present values. `stage` is where it was if `during` has not noted another one.
    """
    RESERVE.clear()
    chain: list[BaseException] = []
    found: BaseException | None = error
    while found is not None and found not in chain:
        chain.append(found)
        found = found.__cause__ or found.__context__
    lost = [str(each) for each in chain if isinstance(each, MemoryError) or SIGNS.search(str(each))]
    # One that is explained already is this process's own, or quoted from another process.
    if not lost or isinstance(error, OutOfMemoryError | ProcessError):
        return error
    stage = next((each.__dict__["stage"] for each in chain if "stage" in each.__dict__), stage)
    asked = re.search(f"allocate {SIZE}", " ".join(lost))
    card = re.search(rf"GPU (\d+) has a total capacity of {SIZE} of which {SIZE} is free", " ".join(lost))
    what = f"{_gib(*asked.groups())} more were asked for" if asked else "the request's size is not known"
    if card:
        what += f", and of the {_gib(*card.groups()[1:3])} of GPU {card[1]} {_gib(*card.groups()[3:])} were free"
    return OutOfMemoryError(
        f"out of memory in {stage}: {what}. What lowers it, what costs least first: "
        f"{'; '.join(_advice(stage, config)) or 'nothing in the config'}. Checkpoints and records written before are "
        "intact; * makes another run, the rest may change on resuming"
    )


def _gib(number: str, unit: str) -> str:
    return f"{float(number.rstrip('.')) * UNITS[unit]:.3g} GiB"


def _advice(stage: str, config: Any) -> Iterator[str]:
    """The settings of a stage that `config` leaves something to lower of, with their values."""
    for entry in SETTINGS.get(stage, "").split():
        name, _, better = entry.removeprefix("*").partition("=")
        if name == "FSDP2":
            sharded = os.environ.get("ACCELERATE_USE_FSDP") == "true"
            how = "with fsdp_offload_params: true" if sharded else "the model sharded over GPUs"
            yield f"FSDP2, {how} (docs/clusters.md)"
        elif config is None:
            yield entry
        else:
            value = functools.reduce(getattr, name.split("."), config)
            useless = {
                "update.micro_batch_tokens": value is None,
                "update.micro_batch_completions": config.update.micro_batch_tokens is not None,
                "model.lora": value is not None,
            }.get(name, str(value).lower() == better)
            if not useless and ("vllm" not in name or config.rollout.engine.startswith("vllm")):
                yield entry if better or value is None else f"{entry} (now {value})"
