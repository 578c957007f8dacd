"""mm-agrae: group-relative policy optimisation with A-GRAE for vision-language and text models.

As a library:

    from mm_agrae import Config, load_model, train
    run = train(Config.load("quickstart", "train.steps=20"), on_step=lambda step, metrics: print(step, metrics))
    run.rollouts().to_pandas()
    load_model(run.path).ask("How many circles?", "drawing.png").text

`mm_agrae.grading.verify` and `mm_agrae.advantage` can be used alone. Importing this package loads nothing heavy: each
function imports what it needs when it is called.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from torch import Tensor

    from mm_agrae.config import Config
    from mm_agrae.run.records import EvaluationResult
    from mm_agrae.run.results import Run
    from mm_agrae.trainer import OnEvaluation, OnStep
    from mm_agrae.view.asking import Model

    AnyConfig: TypeAlias = Config | str | PathLike[str] | Mapping[str, Any]

__version__ = "0.2.0"
__all__ = ["Config", "advantages", "evaluate", "load_model", "load_run", "train"]


def train(
    config: AnyConfig, *, overwrite: bool = False, quiet: bool = False, on_step: OnStep | None = None,
    on_evaluation: OnEvaluation | None = None,
) -> Run:  # fmt: skip
    """Train, and return the run; as `mm-agrae train`, a run that is in `run_dir` already is gone on with.

    config         a Config, the path or shipped name of one ("quickstart"), or a mapping such as
                   {"base": "quickstart", "train": {"steps": 20}}
    overwrite      delete the run in `run_dir` first
    quiet          print nothing
    on_step        called with the number of each step and its metrics
    on_evaluation  called with the EvaluationResult of each evaluation

    In a notebook, interrupting the kernel ends the run after the present step, with a checkpoint. An exception in a
    callback ends it as an error does. Raises UserError for what the user can mend.
    """
    from mm_agrae.progress import Reporter
    from mm_agrae.trainer import Trainer, delete_run

    config = _config(config)
    if overwrite:
        delete_run(config)
    Trainer(config, Reporter(enabled=False) if quiet else None, on_step, on_evaluation).train()
    return load_run(config.run_dir)


def evaluate(
    models: str | PathLike[str] | Sequence[str | PathLike[str]], config: AnyConfig | None = None, *,
    out: str | PathLike[str] = "runs/eval", quiet: bool = False,
) -> list[EvaluationResult]:  # fmt: skip
    """Evaluate checkpoints side by side on the same problems, as `mm-agrae eval`.

    models  one or more run folders (their newest checkpoint), checkpoint folders or model ids
    config  as for `train`, with data.evaluate; None: the one that the first model was trained with
    out     folder for the results and all samples, which `load_run` reads too

    Returns one result for each model and evaluation set. Raises UserError for what the user can mend.
    """
    from mm_agrae.evaluation.evaluate import checkpoints_and_config, evaluate_checkpoints
    from mm_agrae.progress import Reporter

    names = [str(model) for model in ([models] if isinstance(models, str | PathLike) else models)]
    paths, own = checkpoints_and_config(names, None if config is None else "")
    config = _config(own if config is None else config)
    return evaluate_checkpoints(names, paths, config, Path(out), Reporter(enabled=not quiet))


def load_run(path: str | PathLike[str]) -> Run:
    """What a run has left in its folder, finished or not. Raises RunFolderError if there is no run."""
    from mm_agrae.config.shipped import found
    from mm_agrae.run.results import Run

    return Run(found(str(path)))


def load_model(name: str | PathLike[str], *, device: str = "auto") -> Model:
    """A checkpoint to ask questions: of a run folder the newest one, a checkpoint folder, a model id, or one that
    comes with mm-agrae ("data/warm_start/vl"). device: auto, cpu or cuda.
    """
    from mm_agrae.view.asking import Model

    return Model(str(name), device=device)


def advantages(
    rewards: Any, success: Any = None, lengths: Any = None, *, rule: str = "agrae", **settings: Any
) -> Tensor:
    """Advantages [P, G] of P prompts with G completions each, by one of the rules of `mm-agrae rules`.

    rewards   [P, G], lists or a tensor: those of the whole step, as A-GRAE's ω is a mean over them
    success   [P, G], 1 where the answer is correct; None: the rewards, which must then be 0 or 1 for rules that use it
    lengths   [P, G] in tokens, for the rules that need them
    settings  those of the rule, such as alpha=0.5

    `mm_agrae.advantage.levels` gives the stages too. Raises ValueError as `mm_agrae.advantage.compute`.
    """
    from mm_agrae.advantage import compute

    return compute(rule, rewards, rewards if success is None else success, lengths, **settings)


def _config(given: AnyConfig) -> Config:
    from mm_agrae.config import Config

    return given if isinstance(given, Config) else Config.load(given if isinstance(given, Mapping) else str(given))


def __getattr__(name: str) -> Any:
    if name == "Config":
        from mm_agrae.config import Config

        return Config
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
