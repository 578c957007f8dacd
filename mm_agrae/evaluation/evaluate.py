"""An engine and a task -> graded samples per problem -> result and samples in a run folder.

`evaluate_all` is what a training run does with its evaluation sets, `evaluate_checkpoints` is
`mm-agrae eval`: several checkpoints on the same problems with the same random numbers.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from mm_agrae import config as configs
from mm_agrae.config import Config, EvaluateSection
from mm_agrae.errors import ConfigError, DataError, with_skip
from mm_agrae.evaluation.statistics import summarise
from mm_agrae.model.policy import Policy
from mm_agrae.model.processing import Processing
from mm_agrae.progress import Reporter
from mm_agrae.rewards import Rewarder
from mm_agrae.rollout import Engine, derive_seed, engine_class
from mm_agrae.run import checkpoint
from mm_agrae.run.folder import RunFolder
from mm_agrae.run.records import EvaluationResult, SampleRecord
from mm_agrae.run.versions import versions
from mm_agrae.tasks import Task, load_all
from mm_agrae.types import Completion, Example, Prompt, Score

if TYPE_CHECKING:
    from PIL.Image import Image

    from mm_agrae.parallel.processes import Processes, StopRequest


class Scorer(Protocol):
    """A `Rewarder`, or what stands in for one."""

    def score(
        self, examples: Sequence[Example], completions: Sequence[Completion], stop: bool = False
    ) -> list[Score]: ...


@dataclass
class EvaluatedProblem:
    """One problem with its samples, the greedy one (if any) first."""

    index: int
    example: Example
    images: list[Image]
    records: list[SampleRecord]


def evaluate_all(
    name: str,
    config: Config,
    tasks: Mapping[str, Task],
    engine: Engine,
    processing: Processing,
    rewarder: Rewarder,
    run_folder: RunFolder,
    reporter: Reporter,
    processes: Processes | None = None,
    stop: StopRequest | None = None,
) -> list[EvaluationResult]:
    """Sample and grade every evaluation set; results go into the run folder under `name`.

    `tasks` are the sets of `config.data.evaluate` by label. The engine must hold the weights to
    evaluate. With `processes` every rank calls this and takes its share of the problems; only the
    main one writes and returns results. Raises DataError as `run` and `write`, Stopped as `stop` does.
    """
    # A vLLM engine of several processes has collective calls at every token.
    may_check = stop is not None and config.rollout.vllm.tensor_parallel == 1
    rank, world = (processes.rank, processes.world) if processes else (0, 1)
    sections = {each.label: config.evaluate.for_source(each) for each in config.data.evaluate}
    results = []
    for label, task in tasks.items():
        section, started = sections[label], time.perf_counter()
        mine = range(rank, len(task), world)
        count = len(mine) * (section.samples + section.greedy)
        with reporter.bar(f"evaluate {label} ({name})", count, lines=True) as advance:

            def on_progress(finished: int, advance: Callable[[int], None] = advance) -> None:
                advance(finished)
                if stop and may_check:
                    stop.check()

            problems = run(
                engine,
                processing,
                rewarder,
                task,
                mine,
                section,
                on_bad_row=config.data.on_bad_row,
                on_progress=on_progress,
                stop=stop,
            )
        if processes:
            problems = processes.gather(problems, "evaluation")
        if rank == 0:
            problems = sorted(problems, key=lambda problem: problem.index)
            seconds = time.perf_counter() - started
            results.append(write(run_folder, name, label, problems, section, seconds))
            reporter.say(_one_line(results[-1]))
    return results


def run(
    engine: Engine,
    processing: Processing,
    rewarder: Scorer,
    task: Task,
    indices: Sequence[int],
    section: EvaluateSection,
    *,
    on_bad_row: str = "error",
    on_progress: Callable[[int], None] | None = None,
    stop: StopRequest | None = None,
) -> list[EvaluatedProblem]:
    """Sample and grade the examples of `task` at `indices`.

    The seeds of a problem depend on `section.seed` and its index alone, so that checkpoints are compared with the same
    random numbers. Raises DataError for a row that cannot be used, unless `on_bad_row` is "skip", and what
    `stop.interruptible` does.
    """
    may_stop = stop.interruptible if stop else lambda work: work()
    problems: list[EvaluatedProblem] = []
    prompts: list[Prompt] = []
    refused: set[int] = set()
    for index in indices:
        try:
            prompts.append(processing.prompt(task[index]))
        except DataError as error:
            if on_bad_row == "error":
                raise with_skip(error) from None
            continue
        problems.append(EvaluatedProblem(index, prompts[-1].example, list(prompts[-1].images), []))
    decodings = [(range(section.samples), section)]
    if section.greedy:
        decodings.insert(0, (range(-1, 0), section.model_copy(update={"temperature": 0.0})))
    for numbers, sampling in decodings:
        seeds = [derive_seed(section.seed, "evaluate", problem.index) for problem in problems]
        groups = may_stop(partial(engine.generate, prompts, len(numbers), sampling, seeds, on_progress))
        refused |= {p.index for p, group in zip(problems, groups, strict=True) if not group}
        sampled = [
            (problem, number, completion)
            for problem, group in zip(problems, groups, strict=True)
            for number, completion in zip(numbers, group, strict=bool(group))
        ]
        answered = [problem.example for problem, _, _ in sampled]
        scores = may_stop(partial(rewarder.score, answered, [c for _, _, c in sampled], stop=True))
        for (problem, number, completion), score in zip(sampled, scores, strict=True):
            problem.records.append(_sample_record(problem.example, number, completion, score))
    if refused and on_bad_row == "error":
        row = next(problem.example for problem in problems if problem.index in refused)
        raise DataError(
            f"{row.origin or row.id}: the rollout server refused this row; its own message is in "
            "the log. Set data.on_bad_row=skip to continue without it"
        )
    return [problem for problem in problems if problem.index not in refused]


def write(
    run_folder: RunFolder,
    name: str,
    label: str,
    problems: Sequence[EvaluatedProblem],
    section: EvaluateSection,
    seconds: float,
) -> EvaluationResult:
    """Summarise what `run` returned; write result, samples and images into the run folder.

    Raises DataError if there are no problems.
    """
    if not problems:
        raise DataError(f"evaluation {label!r} holds no usable rows")

    def table(of: Callable[[SampleRecord], Any], greedy: bool = False) -> np.ndarray:
        return np.array([[of(r) for r in p.records if (r.sample < 0) == greedy] for p in problems])

    names = list(dict.fromkeys(name for problem in problems for r in problem.records for name in r.parts))
    part_PNK = table(lambda r: [r.parts.get(name, np.nan) for name in names])
    result = summarise(
        name,
        label,
        correct_PN=table(lambda r: r.success),
        greedy_correct_P=table(lambda r: r.success, True)[:, 0] if section.greedy else None,
        length_PN=table(lambda r: r.tokens),
        truncated_PN=table(lambda r: r.finish_reason == "length"),
        entropy_PN=table(lambda r: np.nan if r.entropy is None else r.entropy),
        meta_P=[problem.example.meta for problem in problems],
        seconds=seconds,
        tokens=sum(r.tokens for problem in problems for r in problem.records),
        bootstrap=section.bootstrap,
        seed=section.seed,
        parts=dict(zip(names, np.moveaxis(part_PNK, -1, 0), strict=True)),
    )
    samples = [
        replace(record, images=tuple(map(run_folder.store_image, problem.images)))
        for problem in problems
        for record in problem.records
    ]
    run_folder.write_evaluation(result, samples)
    return result


def _one_line(result: EvaluationResult) -> str:
    """A result's most important numbers, for the terminal."""
    shown = [k for k in (1, 4, 16, 64, 256) if k in result.pass_at_k]
    parts = [f"pass@{k} {result.pass_at_k[k].mean:.1%}" for k in shown]
    if result.greedy is not None:
        parts.append(f"greedy {result.greedy.mean:.1%}")
    return f"{result.name}: {result.label}  " + "  ".join(parts)


def _sample_record(example: Example, number: int, completion: Completion, score: Score) -> SampleRecord:
    return SampleRecord(
        example_id=example.id,
        sample=number,
        question=example.question,
        answer=example.answer,
        completion=completion.text,
        success=score.success,
        tokens=len(completion.token_ids),
        finish_reason=completion.finish_reason,
        # The mean of −log p over sampled tokens is an unbiased estimate of the entropy.
        entropy=-float(np.mean(completion.logprobs)) if completion.logprobs else None,
        error=score.error,
        meta=dict(example.meta),
        parts=dict(score.parts),
    )


def build_engine(config: Config, path: str) -> tuple[Processing, Policy, Engine]:
    """A checkpoint loaded for sampling with the settings of `config`."""
    processing = Processing(path, config.prompt, trust_remote_code=config.model.trust_remote_code)
    device = config.model.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    for_training = {"freeze": (), "lora": None, "gradient_checkpointing": False}
    model = config.model.model_copy(update={"path": path} | for_training)
    policy = Policy(model, processing, device=device)
    engine = engine_class(config.rollout.engine)(
        policy,
        processing,
        config.rollout,
        batch_completions=config.evaluate.batch_completions,
        max_tokens=config.prompt.max_tokens + config.evaluate.max_new_tokens,
    )
    return processing, policy, engine


def checkpoints_and_config(models: Sequence[str], config_path: str | None) -> tuple[list[str], str]:
    """What each model stands for (of a run folder, its newest checkpoint), and the file of the config.

    Raises ConfigError if no config is given and the first model has none.
    """
    paths = [checkpoint.of(model) for model in models]
    own = Path(paths[0]) / checkpoint.CONFIG_FILE
    if config_path is None and not own.is_file():
        raise ConfigError(f"eval: {paths[0]} has no {own.name}; pass a config with --config")
    return paths, config_path or str(own)


def evaluate_checkpoints(
    models: Sequence[str], paths: Sequence[str], config: Config, out: Path, reporter: Reporter | None = None
) -> list[EvaluationResult]:
    """Evaluate each model, which lies in its path, on every evaluation set; write results and samples to `out`.

    Raises ConfigError if there is nothing to evaluate on.
    """
    if not config.data.evaluate:
        raise ConfigError("data.evaluate is empty; add data to evaluate on")
    tasks = {source.label: load_all([source], on_bad_row=config.data.on_bad_row) for source in config.data.evaluate}
    reporter = reporter or Reporter()
    run_folder = RunFolder(out).create(configs.dump(config), versions(), resume=True)
    results: list[EvaluationResult] = []
    try:
        with Rewarder(config.reward, config.evaluate.max_new_tokens) as rewarder, reporter.bars():
            for name, path in zip(distinct_names(models), paths, strict=True):
                processing, _, engine = build_engine(config, path)
                with contextlib.closing(engine):
                    results += evaluate_all(name, config, tasks, engine, processing, rewarder, run_folder, reporter)
    except KeyboardInterrupt:
        reporter.say(f"interrupted; the evaluations that were finished are in {out}")
        raise
    for label in tasks:
        _table(reporter, label, [result for result in results if result.label == label])
    reporter.say(f"results and samples in {out}")
    return results


def distinct_names(models: Sequence[str]) -> list[str]:
    """Short distinct names: as many trailing parts of the paths as that takes."""
    for depth in range(1, 8):
        names = ["/".join(Path(model).parts[-depth:]) for model in models]
        if len(set(names)) == len(names):
            return names
    return [f"{index}:{model}" for index, model in enumerate(models)]


def _table(reporter: Reporter, label: str, results: Sequence[EvaluationResult]) -> None:
    columns = [["", *(f"pass@{k}" for k in results[0].pass_at_k), "greedy", "entropy", "tokens"]]
    for result in results:
        intervals = [*result.pass_at_k.values(), result.greedy]
        columns.append(
            [
                result.name,
                *(f"{each.mean:.1%} [{each.low:.1%}, {each.high:.1%}]" if each else "-" for each in intervals),
                "-" if result.entropy is None else f"{result.entropy:.3f}",
                f"{result.mean_tokens:.0f}",
            ]
        )
    header, *rows = zip(*columns, strict=True)
    reporter.table(f"{label}: {results[0].problems} problems × {results[0].samples} samples", header, rows)
