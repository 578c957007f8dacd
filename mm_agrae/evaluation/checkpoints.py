"""`mm-agrae eval`: several checkpoints on the same problems with the same random numbers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from mm_agrae import config as configs
from mm_agrae.config import Config
from mm_agrae.errors import ConfigError
from mm_agrae.evaluation.evaluate import evaluate_all
from mm_agrae.model.policy import Policy
from mm_agrae.model.processing import Processing
from mm_agrae.progress import Reporter
from mm_agrae.rewards import Rewarder
from mm_agrae.rollout import Engine, make_engine
from mm_agrae.run import checkpoint
from mm_agrae.run.folder import RunFolder
from mm_agrae.run.records import EvaluationResult
from mm_agrae.run.versions import versions
from mm_agrae.tasks import load


def build_engine(config: Config, path: str) -> tuple[Processing, Policy, Engine]:
    """A checkpoint loaded for sampling with the settings of `config`."""
    processing = Processing(path, config.prompt, trust_remote_code=config.model.trust_remote_code)
    device = config.model.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    for_training = {"freeze": (), "lora": None, "gradient_checkpointing": False}
    model = config.model.model_copy(update={"path": path} | for_training)
    policy = Policy(model, processing, device=device)
    engine = make_engine(
        config.rollout,
        policy,
        processing,
        batch_completions=config.evaluate.batch_completions,
        max_tokens=config.prompt.max_tokens + config.evaluate.max_new_tokens,
    )
    return processing, policy, engine


def evaluate_checkpoints(
    models: Sequence[str],
    config_path: str | None,
    overrides: Sequence[str],
    out: Path,
    load_config: Callable[[str, Sequence[str]], Config],
) -> int:
    """Evaluate each model on every evaluation set and write results and samples to `out`.

    Returns the exit status. Raises ConfigError if no config is given and the first model has none.
    """
    paths = [str(checkpoint.newest(Path(model) / "checkpoints") or model) for model in models]
    if config_path is None:
        own = Path(paths[0]) / checkpoint.CONFIG_FILE
        if not own.is_file():
            raise ConfigError(f"eval: {paths[0]} has no {own.name}; pass a config with --config")
        config_path = str(own)
    config = load_config(config_path, overrides)
    if not config.data.evaluate:
        raise ConfigError(f"{config_path}: data.evaluate is empty; add data to evaluate on")
    tasks = {
        source.label: load(source, on_bad_row=config.data.on_bad_row)
        for source in config.data.evaluate
    }
    reporter = Reporter()
    run = RunFolder(out).create(configs.dump(config), versions(), resume=True)
    results: list[EvaluationResult] = []
    with Rewarder(config.reward, config.evaluate.max_new_tokens) as rewarder, reporter.bars():
        for name, path in zip(_names(models), paths, strict=True):
            processing, _, engine = build_engine(config, path)
            with contextlib.closing(engine):
                results += evaluate_all(
                    name, config, tasks, engine, processing, rewarder, run, reporter
                )
    for label in tasks:
        _table(reporter, label, [result for result in results if result.label == label])
    reporter.say(f"results and samples in {out}")
    return 0


def _names(models: Sequence[str]) -> list[str]:
    """Short distinct names: as many trailing parts of the paths as that takes."""
    for depth in range(1, 8):
        names = ["/".join(Path(model).parts[-depth:]) for model in models]
        if len(set(names)) == len(names):
            return names
    return [f"{index}:{model}" for index, model in enumerate(models)]


def _table(reporter: Reporter, label: str, results: Sequence[EvaluationResult]) -> None:
    rows = []
    for result in results:
        intervals = [*result.pass_at_k.values(), *([result.greedy] if result.greedy else [])]
        rows.append(
            [
                result.name,
                *(f"{each.mean:.1%} [{each.low:.1%}, {each.high:.1%}]" for each in intervals),
                "-" if result.entropy is None else f"{result.entropy:.3f}",
                f"{result.mean_tokens:.0f}",
            ]
        )
    ks = [f"pass@{k}" for k in results[0].pass_at_k]
    greedy = ["greedy"] if results[0].greedy else []
    reporter.table(
        f"{label}: {results[0].problems} problems × {results[0].samples} samples",
        ["checkpoint", *ks, *greedy, "entropy", "tokens"],
        rows,
    )
