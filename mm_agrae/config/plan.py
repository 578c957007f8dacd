"""What a config amounts to: steps, batches, tokens; and what a resumed run may change of it."""

from typing import Any

from mm_agrae.config.reading import public
from mm_agrae.config.schema import Config
from mm_agrae.errors import ConfigError


def plan(config: Config, train_rows: int, processes: int = 1) -> list[tuple[str, str]]:
    """What a run will do, as (name, value) lines, worked out before anything is loaded."""
    rollout, update = config.rollout, config.update
    steps = total_steps(config, train_rows)
    prompts, group, problems = rollout.prompts_per_step, rollout.completions_per_prompt, rollout.problems_per_step
    completions = prompts * group
    mini = update.mini_batch_prompts or prompts
    optimiser_steps = prompts // mini * update.epochs
    rows = -(-mini * group // processes)
    micro = -(-rows // update.micro_batch_completions)
    if update.micro_batch_tokens:
        micro_batches = f"of up to {update.micro_batch_tokens:,} tokens"
    else:
        most = min(rows, update.micro_batch_completions)
        micro_batches = f"{micro} an optimiser step and process, up to {most} completions each"
    tokens = completions * rollout.max_new_tokens
    policy = "on-policy" if optimiser_steps == 1 else "off-policy after the first"
    epochs = steps * problems / train_rows
    left = (config.train.epochs or 0) * train_rows - steps * problems
    dropped = f"; {left} of the last epoch are not used: a step takes {problems}" if left > 0 else ""
    return [
        ("training rows", f"{train_rows:,} ({epochs:.2f} epochs{dropped})"),
        ("steps (rollouts)", f"{steps:,}"),
        (
            "per step",
            (f"{problems} problems × {prompts // problems} variants = " if problems < prompts else "")
            + f"{prompts} prompts × {group} completions = {completions} on {processes} "
            f"process{'es' if processes > 1 else ''}",
        ),
        ("optimiser steps", f"{optimiser_steps} a rollout ({policy}), {steps * optimiser_steps:,} in all"),
        ("micro-batches", micro_batches),
        ("tokens", f"up to {tokens:,} sampled a step, {steps * tokens:,} in all"),
        ("rule and loss", f"{config.advantage.rule} / {update.loss}"),
    ]


RESUMABLE = (
    "run_dir",
    "resume",
    "evaluate",
    "checkpoint",
    "log",
    "data.evaluate",
    "data.check",
    "data.prefetch_threads",
    "prompt.max_tokens",
    "train.timeout_minutes",
    "train.check_memory",
    "train.deterministic",
    "rollout.vllm.servers",
    "rollout.vllm.start_limit_s",
    "rollout.vllm.request_limit_s",
    "rollout.mismatch.probe_every",
    "rollout.mismatch.probe_prompts",
    "rollout.mismatch.warn_above",
    "rollout.mismatch.stop_above",
    # These bound memory; sums are taken in another order.
    "update.micro_batch_completions",
    "update.micro_batch_tokens",
    "model.gradient_checkpointing",
    "rollout.batch_completions",
    "rollout.vllm.memory_fraction",
    "rollout.vllm.sleep",
)
"""What a resumed run may change: nothing here has a say in the weights, but for rounding and for rows left out as bad.
`data.on_bad_row` may become skip as well: the rows that were read stay the same."""


def contradictions(config: Config, earlier: Config) -> list[str]:
    """Settings that would make a resumed run another run: "key: earlier value -> new value"."""
    new, old = _flat(public(config)), _flat(public(earlier))
    found = []
    for key in sorted(new.keys() | old.keys()):
        same = new.get(key) == old.get(key)
        if same or any(key == free or key.startswith(f"{free}.") for free in RESUMABLE):
            continue
        if key in ("train.steps", "train.epochs") and config.update.schedule == "constant":
            continue  # a longer or shorter run with a constant rate is the same run
        if key == "data.on_bad_row" and new[key] == "skip":
            continue
        found.append(f"{key}: {old.get(key)!r} -> {new.get(key)!r}")
    return found


def _flat(values: Any, key: str = "") -> dict[str, Any]:
    if isinstance(values, list):
        values = dict(enumerate(values))
    if not isinstance(values, dict):
        return {key: values}
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{key}.{name}" if key else str(name))
    return flat


def total_steps(config: Config, train_rows: int) -> int:
    """Rollouts of the whole run. Raises ConfigError if an epoch is less than one rollout."""
    if config.train.steps is not None:
        return config.train.steps
    assert config.train.epochs is not None
    problems = config.rollout.problems_per_step
    steps = config.train.epochs * train_rows // problems
    if steps == 0:
        raise ConfigError(
            f"rollout.prompts_per_step = {config.rollout.prompts_per_step} takes {problems} rows, more than "
            f"train.epochs × rows = {config.train.epochs} × {train_rows}; lower it"
        )
    return steps
