"""Memory that ran out, told in one message: in which stage, how much was asked for, and which settings lower it."""

import contextlib
import functools
import os
import re
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

from mm_agrae.config import Config
from mm_agrae.config.plan import may_change
from mm_agrae.errors import OutOfMemoryError, ProcessError

Method = TypeVar("Method", bound=Callable[..., Any])

ROLLOUT = ("rollout.batch_completions", "rollout.vllm.memory_fraction", "rollout.vllm.sleep=true",
           "prompt.max_pixels", "rollout.max_new_tokens")  # fmt: skip
UPDATE = ("update.micro_batch_tokens", "update.micro_batch_completions", "model.gradient_checkpointing=true",
          "rollout.vllm.memory_fraction", "model.dtype=bfloat16", "prompt.max_pixels", "rollout.max_new_tokens",
          "model.lora", "FSDP2")  # fmt: skip
SETTINGS = {
    "loading": ("rollout.vllm.memory_fraction", "model.lora", "FSDP2", "model.path"),
    "prompts": ("prompt.max_pixels",),
    "rollout": ROLLOUT,
    "sync": ROLLOUT,
    "probe": ROLLOUT,
    "reward": ("reward.workers",),
    "update": UPDATE,
    "reference": (*UPDATE, "update.kl_coef=0.0"),
    "evaluate": ("evaluate.batch_completions", *ROLLOUT[1:3], "prompt.max_pixels", "evaluate.max_new_tokens"),
    "checkpoint": ("checkpoint.background=false", "log.rollouts=false"),
}
"""What lowers the memory of each stage, what costs least first: a setting to lower, or the value to give it."""

SIGNS = re.compile(r"out of memory|(can't|cannot|unable to) allocate|not enough memory|bad_alloc|ALLOC_FAILED", re.I)
SIZE = r"([\d.]+) ?(bytes|[KMGT]iB)"
UNITS = {"bytes": 2**-30, "KiB": 2**-20, "MiB": 2**-10, "GiB": 1, "TiB": 2**10}


@contextlib.contextmanager
def during(stage: str) -> Iterator[None]:
    """Around a stage: an error inside remembers the innermost one."""
    try:
        yield
    except Exception as error:
        if not hasattr(error, "stage"):
            cast(Any, error).stage = stage
        raise


def told(method: Method) -> Method:
    """For methods of an object with a `config`: memory that runs out becomes an OutOfMemoryError."""

    @functools.wraps(method)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return method(self, *args, **kwargs)
        except Exception as error:
            if (problem := explained(error, self.config)) is not error:
                raise problem from error
            raise

    return cast(Method, run)


def explained(error: Exception, config: Config | None = None, stage: str = "loading") -> Exception:
    """An OutOfMemoryError with advice if `error`, or one that caused it, says that memory ran out; else `error`.

    `stage` is where it was if `during` has not noted another one.
    """
    if isinstance(error, OutOfMemoryError | ProcessError):  # of this process, or of another one
        return error
    found: BaseException | None = error
    chain = []
    while found is not None and found not in chain:
        chain.append(found)
        found = found.__cause__ or found.__context__
    lost = [each for each in chain if isinstance(each, MemoryError) or SIGNS.search(str(each))]
    if not lost:
        return error
    stage = next((each.stage for each in chain if hasattr(each, "stage")), stage)
    text = " ".join(str(each) for each in lost)
    asked = re.search(f"allocate {SIZE}", text)
    card = re.search(rf"GPU (\d+) has a total capacity of {SIZE} of which {SIZE} is free", text)
    what = f"{_gib(*asked.groups())} more were asked for" if asked else "the request's size is not known"
    if card:
        what += f", and of the {_gib(*card.groups()[1:3])} of GPU {card[1]} {_gib(*card.groups()[3:])} were free"
    lower = "; ".join(_advice(stage, config)) or "nothing in the config"
    return OutOfMemoryError(
        f"out of memory in {stage}: {what}. What lowers it, what costs least first: {lower}. Checkpoints and records "
        "written before are intact; * makes another run, the rest may change on resuming"
    )


def _gib(number: str, unit: str) -> str:
    return f"{float(number.rstrip('.')) * UNITS[unit]:.3g} GiB"


def _advice(stage: str, config: Config | None) -> Iterator[str]:
    for entry in SETTINGS.get(stage, ()):
        name, _, better = entry.partition("=")
        if name == "FSDP2":
            sharded = os.environ.get("ACCELERATE_USE_FSDP") == "true"
            how = "with fsdp_offload_params: true" if sharded else "the model sharded over GPUs"
            yield f"FSDP2, {how} (docs/clusters.md)"
            continue
        value = functools.reduce(getattr, name.split("."), cast(Any, config)) if config else "?"
        unused = name == "update.micro_batch_completions" and config and config.update.micro_batch_tokens
        elsewhere = name.startswith("rollout.vllm.") and config and not config.rollout.engine.startswith("vllm")
        already = str(value).lower() == better or (name == "update.micro_batch_tokens" and value is None)
        if unused or elsewhere or already or (name == "model.lora" and value is not None and config):
            continue
        mark = "" if may_change(name) else "*"
        yield f"{mark}{entry}" + ("" if better or value is None else f" (now {value})")
