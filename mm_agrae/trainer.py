"""The loop: prompts -> completions -> scores -> advantages -> update, once per step.

Read `Trainer.step` first; each line of it is one stage. Where a step's groups come from is told
in `rollout/collector.py`, what an update does in `step.py`. All communication with other processes
goes through `self.processes`.
"""

import contextlib
import functools
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mm_agrae import config as configs
from mm_agrae.advantage import AdvantageLevels
from mm_agrae.batching import StepTable, plan_update
from mm_agrae.config import Config
from mm_agrae.errors import ConfigError, DataError
from mm_agrae.evaluation.evaluate import evaluate_all
from mm_agrae.model import checking
from mm_agrae.model.memory import require_fit
from mm_agrae.model.policy import Policy
from mm_agrae.model.processing import Processing
from mm_agrae.parallel.processes import Processes, Stopped, StopRequest, announced, start
from mm_agrae.progress import Reporter
from mm_agrae.rewards import Rewarder
from mm_agrae.rollout import derive_seed, engine_class
from mm_agrae.rollout.collector import Collector
from mm_agrae.run import checkpoint, metrics
from mm_agrae.run.checkpointer import Checkpointer
from mm_agrae.run.context import RunContext
from mm_agrae.run.folder import RunFolder, summarise_evaluations
from mm_agrae.run.problems import difficulty_of, difficulty_source, keep_difficulty
from mm_agrae.run.records import EvaluationResult
from mm_agrae.run.step_line import step_line
from mm_agrae.run.versions import versions
from mm_agrae.run.warnings import Watch
from mm_agrae.step import Updater, rollout_records, step_metrics
from mm_agrae.tasks import load_all
from mm_agrae.types import Group

OnStep = Callable[[int, Mapping[str, float]], object]
"""Called with the number of a step that has just ended, from 1 on, and its metrics."""
OnEvaluation = Callable[[EvaluationResult], object]
"""Called with the result of an evaluation that has just ended, before, during or after training."""


class Trainer:
    """A run of one config. Raises UserError for what the user can mend; see `train`."""

    @announced
    def __init__(
        self, config: Config, reporter: Reporter | None = None, on_step: OnStep | None = None,
        on_evaluation: OnEvaluation | None = None,
    ):  # fmt: skip
        """`on_step` and `on_evaluation` are called on the main process, after what they get is in the run folder."""
        self.config = config = checkpoint.as_begun(config)
        if config.train.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA is first used
            torch.use_deterministic_algorithms(True)
        engine_class(config.rollout.engine)  # a wrong name shows before a model is loaded
        self.processes = Processes(config)
        self.rank, self.world = self.processes.rank, self.processes.world
        self.is_main = self.processes.is_main
        self.reporter = reporter or Reporter(enabled=self.is_main)
        torch.manual_seed(derive_seed(config.train.seed, "start"))
        self.run = RunFolder(config.run_dir)
        self.stopwatch = metrics.Stopwatch(self._note)
        self.stop = StopRequest(self.processes, self.reporter.say)
        self.steps_done = 0
        self.tokens_seen = 0
        self.watch = Watch()
        self.difficulty: dict[str, float] = {}
        self.on_step, self.on_evaluation = on_step, on_evaluation or (lambda result: None)
        check_device(config, self.processes, self.reporter)
        self._load_data()
        with self.processes.explained():
            self._load_model()
        context = RunContext(config, self.processes, self.run, self.reporter, self.stopwatch)
        self.updater = Updater(context, self.policy, total_steps=self.total_steps, exact_engine=self.engine.exact)
        self.collector = Collector(context, self.task, self.processing, self.policy, self.engine)
        self.checkpointer = Checkpointer(
            context, self.policy, self.processing, optimizer=self.updater.optimizer, scheduler=self.updater.scheduler
        )
        with self.processes.explained():
            state = self.checkpointer.restore()
        if state is not None:
            self._load_state(state)
        self.processes.barrier("resume")  # before the main process tidies up the run folder
        self._whole_step = self._state()

    def _load_data(self) -> None:
        """Training and evaluation examples, and the plan that follows from their number."""
        data = self.config.data
        self.task = load_all(data.train, on_bad_row=data.on_bad_row)
        self.evaluation_tasks = {
            source.label: load_all([source], on_bad_row=data.on_bad_row) for source in data.evaluate
        }
        if len(self.task) == 0:
            raise DataError("data.train holds no usable rows")
        if data.difficulty_from:
            own = [difficulty_of(difficulty_source(self.config))] if self.is_main else []
            self.difficulty = self.processes.gather(own, "difficulty")[0]
            self.reporter.say(self.task.rate(self.difficulty, data.difficulty_from))
        self.total_steps = configs.total_steps(self.config, len(self.task))
        plan = configs.plan(self.config, len(self.task), self.world)
        self.reporter.table(f"Plan of {self.config.run_dir}", ["what", "how much"], plan)
        for message in [*self.task.notes, *(f"skipped {reason}" for reason in self.task.skipped[:5])]:
            self.reporter.say(message)
        problems = [checking.at_the_start(self.task, self.config, self.reporter)] if self.is_main else []
        if problem := self.processes.gather(problems, "checking the data")[0]:
            raise DataError(problem)

    def _load_model(self) -> None:
        """Processing, policy (sharded if asked for) and rollout engine."""
        config, model = self.config, self.config.model
        self.processing = Processing(model.path, config.prompt, trust_remote_code=model.trust_remote_code)
        how = self.processing.describe()
        self.reporter.table(f"Prompts for {model.path}", ["what", "how"], how)
        self.policy = Policy(
            model,
            self.processing,
            temperature=config.rollout.temperature,
            entropy_grad=config.update.entropy_bonus,
            shared_prompt=config.update.shared_prompt,
            device=self.processes.loading_device,
            compute_device=self.processes.device,
        )
        if self.policy.repeats_because:
            self.reporter.say(f"prompts are repeated in the update: {self.policy.repeats_because}")
        if self.world > 1:
            barrier = functools.partial(self.processes.barrier, "gathering weights")
            self.policy.distribute(barrier, self.processes.strategy.shard)
        if config.update.kl_coef > 0:
            self.policy.keep_reference()
        self.engine = engine_class(config.rollout.engine)(
            self.policy,
            self.processing,
            config.rollout,
            batch_completions=config.rollout.batch_completions,
            max_tokens=config.prompt.max_tokens + max(config.rollout.max_new_tokens, config.evaluate.max_new_tokens),
        )

    # ------------------------------------------------------------------ the run

    @announced
    def train(self) -> dict[str, Any]:
        """Evaluate, take every step that is left, evaluate again. Returns the run's summary.

        SIGINT and SIGTERM end the run after the present step, with a checkpoint; an evaluation is cut short, and done
        anew when the run goes on (`stop.exit_status` is then that of SIGINT). A second signal ends it at once. An
        error midway (a bad row, a full disk, an engine that breaks down) leaves the records of all steps done and, if
        the disk allows, a checkpoint of the last whole step.
        """
        started_at_the_end = self.steps_done == self.total_steps
        with contextlib.ExitStack() as stack:
            logger = self._open_run_folder(stack)
            self.collector.rewarder = stack.enter_context(
                Rewarder(self.config.reward, self.config.rollout.max_new_tokens)
            )
            stack.callback(self.collector.close)
            stack.enter_context(self.processes.explained())
            stack.enter_context(self.stop.listening())
            stack.enter_context(self.reporter.bars())
            if not started_at_the_end:
                self.collector.prefetch()
            self._evaluate_at_start()
            self._take_steps(logger)
            if self.checkpointer.saved_step != self.steps_done:
                self.save()
            if self.stop.everywhere():
                self.reporter.say(f"stopped after step {self.steps_done}; the same command goes on from there")
            elif self.config.evaluate.after and not (started_at_the_end and self._evaluated("after")):
                self.evaluate("after")
            self.checkpointer.wait()
            self.collector.cache_path.unlink(missing_ok=True)
        summary = self._write_summary()
        self.processes.close()
        return summary

    def _take_steps(self, logger: metrics.MetricLogger | None) -> None:
        with self.reporter.bar("training", self.total_steps, keep=True) as advance:
            advance(self.steps_done)
            self.stopwatch.lap()  # what came before belongs to no step
            try:
                while self.steps_done < self.total_steps and not self.stop.everywhere():
                    values = self.step()
                    if logger:
                        logger.log(self.steps_done, values)
                        if self.on_step:
                            self.on_step(self.steps_done, values)
                    warnings = self.watch.add({"step": self.steps_done} | values)
                    for line in (step_line(values, self.steps_done, self.total_steps), *warnings):
                        self.reporter.say(line)
                    advance(1)
                    if self._due(self.config.checkpoint.every):
                        self.save()
                    if self._evaluation_due():
                        self.evaluate(checkpoint.name_of(self.steps_done))
            except Exception:
                self._save_after_error()
                raise

    def step(self) -> dict[str, float]:
        """One rollout and its optimiser steps. Returns the metrics of the step."""
        config, watch = self.config, self.stopwatch
        last = self.steps_done + 1 == self.total_steps
        groups = self._cached_groups() or self.collector.collect(self.steps_done, last)
        self._cache_groups(groups)
        self.collector.store_images(groups)
        if not last:
            self.collector.prefetch()
        # Dropout is all that draws from torch's own state; a resumed run finds it as it was.
        torch.manual_seed(derive_seed(config.train.seed, "torch", self.steps_done))
        with watch("advantage"):
            table = StepTable.of(self.processes.gather([g.summary() for g in groups], "rewards"))
            if config.advantage.entropy_from != "sampled" and configs.uses_entropy(config):
                table = self.updater.exact_entropy(groups, table)
            levels = table.advantages(config)
        with watch("update"):
            self.collector.check_versions(groups)
            plan = plan_update(
                groups,
                table,
                levels.advantage_PG,
                config,
                rank=self.rank,
                world=self.world,
                device=self.processes.device,
            )
            lag = self.policy.version - self.collector.behaviour_version
            update = self.updater.run(plan, lambda: self._note("update"))
        self.steps_done += 1
        self.tokens_seen += int(table.length_PG.sum())
        self._whole_step = self._state()
        with watch("log"):
            self._record(groups, levels)
        return {
            **step_metrics(table, levels),
            **update,
            **self.collector.take_values(),
            "policy/lag": float(lag),
            "tokens/seen": float(self.tokens_seen),
            "data/rows_skipped": float(self.collector.rows_skipped),
            "data/epoch": self.collector.order.position / self.collector.order.rows,
            **watch.lap(),
            **metrics.peak_memory(),
        }

    def _record(self, groups: Sequence[Group], levels: AdvantageLevels) -> None:
        """Write every completion of the step, and each distinct image once."""
        if not self.config.log.rollouts:
            return
        own = rollout_records(self.steps_done, groups, levels, self.run.store_image)
        records = self.processes.gather(own, "records")
        records = sorted(records, key=lambda r: (r.prompt_index, r.completion_index))
        if self.is_main:
            self.run.write_rollouts(self.steps_done, records)

    # ------------------------------------------------------------------ evaluation

    def evaluate(self, name: str) -> None:
        """Evaluate the present weights; results go into the run folder under `name`.

        If they are the best so far, their checkpoint is saved and marked.
        """
        self.collector.sync()
        try:
            with self.stopwatch("evaluate"):
                results = evaluate_all(
                    name,
                    self.config,
                    self.evaluation_tasks,
                    self.engine,
                    self.processing,
                    self.collector.rewarder,
                    self.run,
                    self.reporter,
                    self.processes,
                    self.stop,
                )
            for result in results:
                self.on_evaluation(result)
            self._keep_best()
            self.checkpointer.describe(self.steps_done)
        except Stopped:
            self.reporter.say(f"evaluation {name!r} was not finished; the same command does it when it goes on")

    def _evaluated(self, name: str) -> bool:
        """Whether the run folder holds the results of the evaluation `name`."""
        results = self.run.read_evaluations() if self.is_main else []
        found = {result.label for result in results if result.name == name}
        missing = self.is_main and not found.issuperset(self.evaluation_tasks)
        return not any(self.processes.gather([missing], "evaluations done"))

    def _evaluate_at_start(self) -> None:
        name = checkpoint.name_of(self.steps_done)
        if self.config.evaluate.before and self.steps_done == 0:
            self.evaluate("before")
        elif self._evaluation_due() and not self._evaluated(name):
            self.evaluate(name)  # the run was cut off between checkpoint and evaluation
        else:
            self._keep_best()

    def _evaluation_due(self) -> bool:
        between = 0 < self.steps_done < self.total_steps
        return between and self._due(self.config.evaluate.every)

    def _due(self, every: int) -> bool:
        return every > 0 and self.steps_done % every == 0

    # ------------------------------------------------------------------ saving and resuming

    def save(self) -> None:
        """Write a checkpoint of the last whole step. Raises RunFolderError."""
        with self.stopwatch("checkpoint"):
            state = {**self._whole_step, "seconds": dict(self.stopwatch.totals)}
            best = self.checkpointer.best(self.steps_done, self.total_steps)
            self.checkpointer.save(state, best.get("step"))

    def newest_checkpoint(self) -> Path | None:
        return checkpoint.newest(self.checkpointer.folder)

    def _keep_best(self) -> None:
        if not self.config.checkpoint.best:
            return
        best = self.checkpointer.best(self.steps_done, self.total_steps)
        if not any(self.processes.gather([best.get("step") == self.steps_done], "best")):
            return
        if self.checkpointer.saved_step != self.steps_done:
            self.save()
        if self.is_main:
            self.checkpointer.mark_best(best)

    def _save_after_error(self) -> None:
        """A checkpoint of the last whole step, if the weights are still those of that step."""
        self.reporter.say(f"failed after step {self._whole_step['step']}")
        whole = self.policy.version == self._whole_step["policy_version"]
        # With several processes the others are elsewhere, and saving is collective.
        missing = self.world == 1 and self.steps_done
        missing = missing and self.checkpointer.saved_step != self.steps_done
        # The error that is being raised says more than those that come up here.
        with contextlib.suppress(Exception):
            self.checkpointer.wait()
        with contextlib.suppress(Exception):
            if whole and missing:
                self.save()
                self.checkpointer.wait()
        if newest := self.newest_checkpoint():
            self.reporter.say(f"the same command goes on from {newest}")

    def _state(self) -> dict[str, Any]:
        """The run's progress after a whole step, whatever of the next one has begun."""
        return {
            "step": self.steps_done,
            "tokens_seen": self.tokens_seen,
            **self.collector.data_state,
            "policy_version": self.policy.version,
            "bad_gradients": self.updater.bad_gradients,
            "bad_in_a_row": self.updater.bad_in_a_row,
            "entropy_control": [self.updater.entropy_coef, self.updater.entropy],
        }

    def _load_state(self, state: dict[str, Any]) -> None:
        """Take up the run's progress. Raises ConfigError if that is more than the config asks for."""
        if state["step"] > self.total_steps:
            raise ConfigError(
                f"the run has done {state['step']} steps, more than the {self.total_steps} of train.steps or "
                "train.epochs: ask for as many or more, go on from an earlier checkpoint (resume=PATH), or give "
                "another run_dir, or --overwrite"
            )
        self.steps_done, self.tokens_seen = state["step"], state["tokens_seen"]
        self.collector.load_data_state(state)
        self.updater.bad_gradients = state.get("bad_gradients", 0)
        self.updater.bad_in_a_row = state.get("bad_in_a_row", 0)
        if "entropy_control" in state:
            self.updater.entropy_coef, self.updater.entropy = state["entropy_control"]
        self.stopwatch.totals.update(state.get("seconds", {}))

    def _cache_groups(self, groups: Sequence[Group]) -> None:
        """After a checkpoint: the next step's rollouts survive a kill."""
        saved = self.checkpointer.saved_step == self.steps_done
        if saved and not self.config.rollout.overlap:
            with self.stopwatch("checkpoint"):
                self.collector.write_cache(self.checkpointer.id, groups)

    def _cached_groups(self) -> list[Group] | None:
        """The groups of this step, if the run was killed after they had been sampled."""
        resumed, self.checkpointer.resumed = self.checkpointer.resumed, False
        if not resumed:
            return None
        groups = self.collector.read_cache(self.checkpointer.id)
        if groups:
            self.reporter.say(f"read the rollouts of step {self.steps_done + 1} from the cache")
        return groups

    # ------------------------------------------------------------------ start and end

    def _open_run_folder(self, stack: contextlib.ExitStack) -> metrics.MetricLogger | None:
        """The main process's folder and metric log; a resumed run drops later steps."""
        if not self.is_main:
            return None
        config = self.config
        self.run.create(configs.dump(config), versions(), resume=config.resume != "never")
        if self.difficulty:
            keep_difficulty(self.run.path, self.difficulty)
        self.run.rewind(self.steps_done)
        self.watch = Watch(self.run.read_metrics())
        self.checkpointer.forget_after(self.steps_done)
        logger = metrics.MetricLogger(self.run, config.log.sinks, config.log.project, configs.public(config))
        stack.callback(logger.close)
        return logger

    def _note(self, stage: str) -> None:
        done = stage in ("log", "checkpoint", "evaluate")
        self.processes.note(stage, self.steps_done + (not done))

    def _reward_errors(self) -> dict[str, Any]:
        """Completions with a failed reward part in all steps; each kind of failure since this process started."""
        rows = self.run.read_metrics()
        failed, all_ = (sum(row.get(name, 0) for row in rows) for name in ("reward/errors", "completions/count"))
        kinds = dict(self.collector.rewarder.error_counts)
        return {"completions": int(failed), "share": failed / max(1, all_), "kinds": kinds}

    def _write_summary(self) -> dict[str, Any]:
        """The figures of the whole run, as in its summary.json."""
        if not self.is_main:
            return {}
        self.stopwatch.lap()
        summary: dict[str, Any] = {
            "steps": self.steps_done,
            "finished": self.steps_done == self.total_steps and not self.stop.requested,
            **summarise_evaluations(self.run, next(iter(self.evaluation_tasks), "")),
            "seconds": self.stopwatch.wall_seconds(),
            "tokens": self.tokens_seen,
            "rows_skipped": self.collector.rows_skipped,
            "reward_errors": self._reward_errors(),
            "warnings": self.watch.spans,
            "peak_memory_mb": metrics.peak_memory_mb(),
            "versions": versions(),
        }
        if best := self.checkpointer.best(self.steps_done, self.total_steps):
            summary["best"] = best
        self.run.write_summary(summary)
        self.checkpointer.describe(self.steps_done)
        self.checkpointer.wait()
        return summary


def check_device(config: Config, processes: Processes, reporter: Reporter) -> None:
    """On a GPU: raise ConfigError for what will not fit; say what will be slow."""
    device, strategy = processes.device, processes.strategy
    if device.type != "cuda":
        return
    if config.model.dtype == "float32" and "dtype" in config.model.model_fields_set:
        reporter.say("model.dtype=float32: several times slower on a GPU than bfloat16, and more memory")
    if config.train.check_memory and not strategy.offloads:
        total = torch.cuda.get_device_properties(device).total_memory
        require_fit(config, processes=processes.world, device_bytes=total, sharded=strategy.sharded)


def delete_run(config: Config) -> None:
    """Delete the run that is in `run_dir`, if any. Raises ConfigError if that folder holds anything else."""
    state, folder = start(config), Path(config.run_dir)
    if state.is_main_process and folder.exists():
        if any(folder.iterdir()) and not (folder / "config.yaml").exists():
            raise ConfigError(f"run_dir {folder} is not empty and holds no run; it was not deleted")
        shutil.rmtree(folder)
    # No process may look for checkpoints in a folder that is about to be deleted.
    state.wait_for_everyone()
