"""The loop: prompts -> completions -> scores -> advantages -> update, once per step.

Read `Trainer.step` first; each line of it is one stage. Where its groups come from is told in
`collect`. Everything that must be the same on all processes, the advantages, the loss
denominators and the number of micro-batches, is worked out from the gathered rewards and
lengths, so that one process and N processes take the same gradient. All talk with other
processes goes through `self.processes`.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import re
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial, reduce
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mm_agrae import advantage
from mm_agrae import config as configs
from mm_agrae import loss as losses
from mm_agrae.config import Config
from mm_agrae.errors import ConfigError, DataError, ModelError, RunFolderError
from mm_agrae.evaluation import evaluate
from mm_agrae.model.policy import Policy
from mm_agrae.model.processing import Processing
from mm_agrae.parallel import sharding
from mm_agrae.parallel.processes import Processes, announced
from mm_agrae.progress import Reporter
from mm_agrae.rewards import Rewarder
from mm_agrae.rollout import derive_seed, make_engine
from mm_agrae.rollout.collector import Collector
from mm_agrae.run import checkpoint, metrics
from mm_agrae.run.records import RunFolder, to_json, write_atomic
from mm_agrae.run.versions import changes, versions
from mm_agrae.step import (
    MiniBatch,
    StepTable,
    UpdateTotals,
    plan_update,
    rollout_records,
    step_metrics,
)
from mm_agrae.tasks import load_all
from mm_agrae.types import Group, MicroBatch


class Trainer:
    """A run of one config. Raises UserError for what the user can mend; see `train`."""

    @announced
    def __init__(self, config: Config, reporter: Reporter | None = None):
        self.config = config
        self.processes = Processes(config)
        self.rank, self.world = self.processes.rank, self.processes.world
        self.is_main = self.processes.is_main
        self.reporter = reporter or Reporter(enabled=self.is_main)
        torch.manual_seed(derive_seed(config.train.seed, "start"))

        self.task = load_all(config.data.train, on_bad_row=config.data.on_bad_row)
        self.evaluation_tasks = {
            source.label: load_all([source], on_bad_row=config.data.on_bad_row)
            for source in config.data.evaluate
        }
        if len(self.task) == 0:
            raise DataError("data.train holds no usable rows")
        self.total_steps = configs.total_steps(config, len(self.task))
        self.reporter.table(
            f"Plan of {config.run_dir}",
            ["what", "how much"],
            [list(line) for line in configs.plan(config, len(self.task), self.world)],
        )
        for message in self.task.skipped[:5]:
            self.reporter.say(f"skipped {message}")

        self.processing = Processing(
            config.model.path, config.prompt, trust_remote_code=config.model.trust_remote_code
        )
        self.reporter.table(
            f"Prompts for {config.model.path}",
            ["what", "how"],
            [list(line) for line in self.processing.describe()],
        )
        self.policy = Policy(
            config.model,
            forbidden_ids=self.processing.forbidden_ids,
            pad_id=self.processing.pad_id,
            temperature=config.rollout.temperature,
            entropy_grad=config.update.entropy_coef > 0,
            shared_prompt=config.update.shared_prompt,
            device=self.processes.loading_device,
        )
        if self.policy.repeats_because:
            self.reporter.say(f"prompts are repeated in the update: {self.policy.repeats_because}")
        self.processes.distribute(self.policy)
        if config.update.kl_coef > 0:
            self.policy.keep_reference()
        self.engine = make_engine(
            config.rollout,
            self.policy,
            self.processing,
            batch_completions=config.rollout.batch_completions,
            max_tokens=config.prompt.max_tokens
            + max(config.rollout.max_new_tokens, config.evaluate.max_new_tokens),
        )
        self.optimizer, self.scheduler = self._optimizer()
        self.module, self.optimizer = self.processes.prepare(self.policy, self.optimizer)

        self.steps_done = 0
        self.tokens_seen = 0
        self.stopwatch = metrics.Stopwatch(self._note)
        self.collector = Collector(
            config,
            self.task,
            self.processing,
            self.policy,
            self.engine,
            self.processes,
            self.reporter,
            self.stopwatch,
        )
        self.run = RunFolder(config.run_dir)
        self.bad_gradients = self.bad_in_a_row = 0
        self.stop_requested = False
        self.sharing_checked = False
        self._writer = checkpoint.Writer(config.checkpoint.background)
        self._saved_step: int | None = None
        self._checkpoint_id = ""
        self._resumed = False
        self._resume()
        self.processes.barrier("resume")  # before the main process tidies up the run folder
        self._step_end = self._place()

    # ------------------------------------------------------------------ the run

    @announced
    def train(self) -> dict[str, Any]:
        """Evaluate, take every step that is left, evaluate again. Returns the run's summary.

        SIGINT and SIGTERM end the run after the present step, with a checkpoint; a second one
        ends it at once. An error that strikes midway (a bad row, a full disk, an engine that
        breaks down) leaves the records of all steps done and, if the disk allows, a checkpoint of
        the last whole step.
        """
        config = self.config
        started_at_the_end = self.steps_done == self.total_steps
        with contextlib.ExitStack() as stack:
            logger = self._open_run_folder(stack)
            self.collector.rewarder = stack.enter_context(
                Rewarder(config.reward, config.rollout.max_new_tokens)
            )
            stack.callback(self.collector.close)
            stack.enter_context(self.processes.explained())
            stack.enter_context(self._signals())
            stack.enter_context(self.reporter.bars())
            if config.evaluate.before and self.steps_done == 0:
                self.evaluate("before")
            elif self._evaluation_due() and self._not_evaluated(self._evaluation_name):
                self._evaluate_midway()  # the run was cut off between checkpoint and evaluation
            else:
                self._keep_best()
            advance = stack.enter_context(
                self.reporter.bar("training", self.total_steps, keep=True)
            )
            advance(self.steps_done)
            self.stopwatch.lap()  # what came before belongs to no step
            try:
                while self.steps_done < self.total_steps and not self._stop_everywhere():
                    values = self.step()
                    if logger:
                        logger.log(self.steps_done, values)
                    self._show(values)
                    advance(1)
                    if self._due(config.checkpoint.every):
                        self.save()
                    if self._evaluation_due():
                        self._evaluate_midway()
            except Exception:
                self._save_what_can_be()
                raise
            if self._saved_step != self.steps_done:
                self.save()
            if self._stop_everywhere():
                self.reporter.say(
                    f"stopped after step {self.steps_done}; the same command goes on from there"
                )
            elif config.evaluate.after and not (
                started_at_the_end and not self._not_evaluated("after")
            ):
                self.evaluate("after")
                self._keep_best()
            self._writer.wait()
            self._unfinished.unlink(missing_ok=True)
        summary = self._summary()
        self.processes.close()
        return summary

    def step(self) -> dict[str, float]:
        """One rollout and its optimiser steps. Returns the metrics of the step."""
        config, watch = self.config, self.stopwatch
        last = self.steps_done + 1 == self.total_steps
        groups = self._kept_groups() or self.collector.collect(self.steps_done, last)
        self._keep_groups(groups)
        # Dropout is all that draws from torch's own state; a resumed run finds it as it was.
        torch.manual_seed(derive_seed(config.train.seed, "torch", self.steps_done))
        with watch("advantage"):
            rows = self._gather("rewards", [group.summary() for group in groups])
            table = StepTable.of(rows)
            levels = advantage.levels(
                config.advantage.rule,
                table.reward_PG,
                table.success_PG,
                table.length_PG,
                **config.advantage.settings,
            )
        with watch("update"):
            plan = self._plan_update(groups, table, levels.advantage_PG)
            update = self._update(plan)
        lag = self.policy.version - self.collector.sampled_by - len(plan) * config.update.epochs
        self.steps_done += 1
        self.tokens_seen += int(table.length_PG.sum())
        self._step_end = self._place()
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
            "memory/peak_mb": metrics.peak_memory_mb(),
        }

    @property
    def _unfinished(self) -> Path:
        return self.run.path / f"unfinished_{self.rank}.safetensors"

    def _keep_groups(self, groups: Sequence[Group]) -> None:
        """After a checkpoint: have the next step's rollouts outlive a kill."""
        if self._saved_step == self.steps_done and not self.config.rollout.overlap:
            with self.stopwatch("checkpoint"):
                self.collector.keep(self._unfinished, self._checkpoint_id, groups)

    def _kept_groups(self) -> list[Group] | None:
        """The groups that a run killed in this step had ready, if this is it, resumed."""
        resumed, self._resumed = self._resumed, False
        if not resumed:
            return None
        groups = self.collector.take_up(self._unfinished, self._checkpoint_id)
        if groups:
            self.reporter.say(f"took up the rollouts of step {self.steps_done + 1}")
        return groups

    # ------------------------------------------------------------------ update

    def _plan_update(
        self, groups: Sequence[Group], table: StepTable, advantage_PG: torch.Tensor
    ) -> list[MiniBatch]:
        self._check_versions(groups)
        update, rollout = self.config.update, self.config.rollout
        # KL and entropy give every completion a gradient, also one without advantage.
        everyone = update.kl_coef > 0 or update.entropy_coef > 0
        return plan_update(
            groups,
            table,
            advantage_PG,
            wanted_PG=(advantage_PG != 0) | everyone,
            prompts=update.mini_batch_prompts or rollout.prompts_per_step,
            micro_completions=update.micro_batch_completions,
            micro_tokens=update.micro_batch_tokens,
            max_new_tokens=rollout.max_new_tokens,
            rank=self.rank,
            world=self.world,
            device=self.processes.device,
        )

    def _check_versions(self, groups: Sequence[Group]) -> None:
        for completion in itertools.chain.from_iterable(group.completions for group in groups):
            if completion.policy_version != self.collector.sampled_by:
                raise RuntimeError(
                    f"a completion of policy version {completion.policy_version} reached the "
                    f"update of version {self.policy.version}, whose completions are to be of "
                    f"version {self.collector.sampled_by}"
                )

    def _update(self, plan: Sequence[MiniBatch]) -> dict[str, float]:
        """Take the optimiser steps of a rollout. Returns loss, gradient norm and statistics."""
        update = self.config.update
        if not self.sharing_checked:
            self.policy.check_sharing(plan[0].batches[0])
            self.sharing_checked = True
        self.module.train()
        off_policy = len(plan) * update.epochs > 1
        with torch.no_grad():
            for batch in itertools.chain.from_iterable(mini.batches for mini in plan):
                if off_policy:
                    batch.old_logp_BT = self.module(batch)[0]
                if update.kl_coef > 0:
                    batch.ref_logp_BT = self.policy.reference_logprobs(batch)
        totals = UpdateTotals()
        norms = []
        work = sum(len(mini.batches) for mini in plan) * update.epochs
        with self.reporter.bar("  update", work) as advance:
            for mini in itertools.chain.from_iterable([plan] * update.epochs):
                self._backward(mini, totals, advance)
                norms.append(self._optimiser_step())
        return {
            **reduce(UpdateTotals.merge, self._gather("update", [totals])).means(len(norms)),
            "update/grad_norm": float(np.mean(norms)),
            "update/bad_gradients": float(self.bad_gradients),
            "update/learning_rate": self.scheduler.get_last_lr()[0],
        }

    def _backward(
        self, mini: MiniBatch, totals: UpdateTotals, advance: Callable[[int], None]
    ) -> None:
        update = self.config.update
        # Weights are gathered for the backward pass of their own forward pass only.
        self.policy.pictures.plan(() if self.policy.is_sharded else mini.batches)
        for index, batch in enumerate(mini.batches):
            last = index + 1 == len(mini.batches)
            with self.processes.strategy.micro_batch(self.module, last):
                logp_BT, entropy_BT = self.module(batch)
                weight = self._sampler_weight(batch, logp_BT)
                output = losses.policy_loss(
                    update.loss,
                    logp_BT=logp_BT,
                    old_logp_BT=batch.old_logp_BT,
                    advantage_B=batch.advantage_B,
                    mask_BT=batch.mask_BT,
                    denominator=mini.denominator,
                    clip_low=update.clip_low,
                    clip_high=update.clip_high,
                    ref_logp_BT=batch.ref_logp_BT,
                    kl_coef=update.kl_coef,
                    entropy_BT=entropy_BT,
                    entropy_coef=update.entropy_coef,
                    sampler_weight_BT=weight.weight_BT if weight else None,
                )
                self.processes.strategy.backward(output.loss)
            totals.add(output, weight)
            self._note("update")
            advance(1)

    def _sampler_weight(
        self, batch: MicroBatch, logp_BT: torch.Tensor
    ) -> losses.SamplerWeight | None:
        """Importance weights for an engine whose numbers or weights are not the policy's."""
        mismatch = self.config.rollout.mismatch
        level = mismatch.correction
        if level == "auto":
            level = "off" if self.engine.exact else "token"
        if level == "off":
            return None
        old_BT = batch.old_logp_BT if batch.old_logp_BT is not None else logp_BT
        return losses.sampler_weight(
            old_BT,
            batch.sampling_logp_BT,
            batch.mask_BT,
            level=level,
            limit=mismatch.limit,
            beyond=mismatch.beyond,
        )

    def _optimiser_step(self) -> float:
        """Clip, step, and return the gradient's norm; a gradient that is not finite is dropped."""
        update = self.config.update
        norm = self.processes.strategy.clip(
            list(self.policy.trainable_parameters()), update.max_grad_norm
        )
        if math.isfinite(norm):
            self.optimizer.step()
            self.bad_in_a_row = 0
        else:
            self.bad_in_a_row += 1
            self.bad_gradients += 1
            self.reporter.say(f"the gradient is {norm}; this optimiser step is left out")
        self.optimizer.zero_grad()
        if self.bad_in_a_row > update.max_bad_gradients:
            raise ModelError(
                f"the gradient was not finite {self.bad_in_a_row} times in a row; lower "
                "update.learning_rate, or use model.dtype=float32 to see where it comes from"
            )
        self.scheduler.step()
        self.policy.version += 1
        return norm

    def _optimizer(self) -> tuple[Any, Any]:
        from transformers import get_scheduler

        update, prompts = self.config.update, self.config.rollout.prompts_per_step
        optimizer = torch.optim.AdamW(
            self.policy.trainable_parameters(),
            lr=update.learning_rate,
            betas=update.betas,
            weight_decay=update.weight_decay,
            # Without it AdamW makes a temporary of the size of all parameters on a GPU.
            fused=True if self.processes.device.type == "cuda" else None,
        )
        per_rollout = prompts // (update.mini_batch_prompts or prompts) * update.epochs
        name = "constant_with_warmup" if update.schedule == "constant" else update.schedule
        scheduler = get_scheduler(
            name, optimizer, update.warmup_steps, self.total_steps * per_rollout
        )
        return optimizer, scheduler

    # ------------------------------------------------------------------ evaluation, records

    def evaluate(self, name: str) -> None:
        """Sample and grade every evaluation set; results go into the run folder."""
        self.collector.sync()
        settings = self.config.evaluate
        sections = {s.label: settings.for_source(s) for s in self.config.data.evaluate}
        for label, task in self.evaluation_tasks.items():
            section = sections[label]
            started = time.perf_counter()
            mine = range(self.rank, len(task), self.world)
            with (
                self.stopwatch("evaluate"),
                self.reporter.bar(f"evaluate {label} ({name})", len(mine) * section.samples) as bar,
            ):
                problems = evaluate.run(
                    self.engine,
                    self.processing,
                    self.collector.rewarder,
                    task,
                    mine,
                    section,
                    on_bad_row=self.config.data.on_bad_row,
                    on_progress=bar,
                )
            problems = self._gather("evaluation", problems)
            problems = sorted(problems, key=lambda problem: problem.index)
            if not self.is_main:
                continue
            result = evaluate.write(
                self.run, name, label, problems, section, time.perf_counter() - started
            )
            self.reporter.say(evaluate.one_line(result))

    def _evaluation_due(self) -> bool:
        between = 0 < self.steps_done < self.total_steps
        return between and self._due(self.config.evaluate.every)

    @property
    def _evaluation_name(self) -> str:
        return checkpoint.name_of(self.steps_done)

    def _evaluate_midway(self) -> None:
        self.evaluate(self._evaluation_name)
        self._keep_best()

    def _best(self) -> dict[str, Any]:
        """Which step has the highest value of `checkpoint.best` so far, and which value."""
        label, _, metric = self.config.checkpoint.best.rpartition("/")
        best: dict[str, Any] = {}
        for result in self.run.read_evaluations() if metric else []:
            step = self.total_steps if result.name == "after" else _step_of(result.name)
            if result.label != label or not 0 < step <= self.steps_done:
                continue
            there = (self._checkpoints / checkpoint.name_of(step)).is_dir()
            value = result.metrics()[f"evaluate/{label}/{metric}"]
            if (there or step == self.steps_done) and value > best.get("value", -math.inf):
                best = {"step": step, "metric": self.config.checkpoint.best, "value": value}
        return best

    def _keep_best(self) -> None:
        """After an evaluation: if it is the best so far, its checkpoint is saved and marked."""
        if not self.config.checkpoint.best:
            return
        best = self._best() if self.is_main else {}
        if not any(self._gather("best", [best.get("step") == self.steps_done])):
            return
        if self._saved_step != self.steps_done:
            self.save()
        if self.is_main:
            self._writer.write(partial(self._mark_best, best))
            self.reporter.say(f"best so far: {best['metric']} {best['value']:.3f}")

    def _mark_best(self, best: dict[str, Any]) -> None:
        write_atomic(self._checkpoints / checkpoint.BEST_FILE, to_json(best, indent=1) + "\n")
        name = checkpoint.name_of(best["step"])
        checkpoint.point(self._checkpoints / checkpoint.BEST, name)
        checkpoint.prune(self._checkpoints, self.config.checkpoint.keep, name)

    def save(self) -> None:
        """Write a checkpoint of the last whole step, or have it written in the background.

        Raises RunFolderError if it cannot be written, or the one before could not.
        """
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.stopwatch("checkpoint"))
            self.processes.barrier("checkpoint")
            self._checkpoint_id = self._gather("checkpoint", [uuid.uuid4().hex])[0]
            # Of sharded weights and moments the main process gets whole ones, all others none.
            optimizer = sharding.whole_state(self.optimizer, keep=self.is_main)
            stack.enter_context(self.policy.gathered(saving=True, keep=self.is_main))
            if not self.is_main:
                self._saved_step = self.steps_done
                return
            self._writer.wait()
            snapshot = checkpoint.Snapshot.take(
                self.policy,
                self.processing,
                config_yaml=configs.dump(self.config),
                state={
                    **self._step_end,
                    "id": self._checkpoint_id,
                    "seconds": dict(self.stopwatch.totals),
                    "versions": versions(),
                },
                training={
                    "optimizer": optimizer,
                    "scheduler": self.scheduler.state_dict(),
                },
                copied=self._writer.background,
            )
            best = self._best().get("step")
            self._writer.write(partial(self._write, snapshot, self.steps_done, best))
            self._saved_step = self.steps_done

    def _write(self, snapshot: checkpoint.Snapshot, step: int, best: int | None) -> None:
        name = checkpoint.name_of(step)
        snapshot.write(self._checkpoints / name)
        checkpoint.point(self._checkpoints / checkpoint.LATEST, name)
        keep = self.config.checkpoint.keep
        checkpoint.prune(self._checkpoints, keep, checkpoint.name_of(best) if best else "")

    def _place(self) -> dict[str, int]:
        """Where the run stands after a whole step, whatever a next one may have begun."""
        return {
            "step": self.steps_done,
            "tokens_seen": self.tokens_seen,
            **self.collector.place,
            "policy_version": self.policy.version,
            "bad_gradients": self.bad_gradients,
            "bad_in_a_row": self.bad_in_a_row,
        }

    def _save_what_can_be(self) -> None:
        """After an error: a checkpoint of the last whole step, if the weights are still its."""
        self.reporter.say(f"failed after step {self._step_end['step']}")
        whole = self.policy.version == self._step_end["policy_version"]
        # With several processes the others are elsewhere, and saving is done by all together.
        missing = self.world == 1 and self.steps_done and self._saved_step != self.steps_done
        # The error that is on its way says more than those that come up here.
        with contextlib.suppress(Exception):
            self._writer.wait()
        with contextlib.suppress(Exception):
            if whole and missing:
                self.save()
                self._writer.wait()
        if newest := self.newest_checkpoint():
            self.reporter.say(f"the same command goes on from {newest}")

    def _resume(self) -> None:
        """Take up the newest whole checkpoint of the run folder, or the one that is named."""
        found = self._to_resume()
        for folder in found:
            bad = checkpoint.damaged(folder)
            if bad and len(found) > 1:
                self.reporter.say(f"{folder} is damaged ({', '.join(bad)}); trying an older one")
                continue
            earlier = configs.load(folder / checkpoint.CONFIG_FILE)
            differences = configs.contradictions(self.config, earlier)
            if differences:
                raise ConfigError(
                    f"the run in {folder} was made with other settings; give it those, another "
                    "run_dir, or --overwrite:\n  " + "\n  ".join(differences)
                )
            state, training = checkpoint.restore(folder, self.policy)
            sharding.load_whole_state(self.optimizer, training["optimizer"])
            self.scheduler.load_state_dict(training["scheduler"])
            self.steps_done = self._saved_step = state["step"]
            self.tokens_seen = state["tokens_seen"]
            self.collector.go_to(state)
            self.policy.version = state["policy_version"]
            self.bad_gradients = state.get("bad_gradients", 0)
            self.bad_in_a_row = state.get("bad_in_a_row", 0)
            self.stopwatch.totals.update(state.get("seconds", {}))
            if folder.parent == self._checkpoints:
                self._checkpoint_id, self._resumed = str(state.get("id", "")), True
            else:
                self._saved_step = None  # another run's
            self.reporter.say(f"resumed from {folder} after step {self.steps_done}")
            if changed := changes(state.get("versions", {})):
                self.reporter.say(f"results may differ in the last digits: {', '.join(changed)}")
            return
        if found:
            raise RunFolderError(
                f"all checkpoints in {self._checkpoints} are damaged; put a whole one back, or "
                "begin anew with --overwrite"
            )

    def _to_resume(self) -> list[Path]:
        """The checkpoints to try, best first."""
        resume = self.config.resume
        own = checkpoint.candidates(self._checkpoints)
        if resume == "never":
            return []
        if resume == "auto":
            return own
        # The same command, given again, goes on with what it has made so far.
        if next(filter(None, map(_resume_of, own)), None) == resume:
            return own
        start = Path(resume).resolve()
        if not (start / checkpoint.STATE_FILE).is_file():
            raise ConfigError(
                f"resume: {resume} is not a checkpoint (a folder such as "
                f"RUN/checkpoints/{checkpoint.name_of(10)}); name one, or use auto"
            )
        if start.parent == self._checkpoints.resolve():
            return [self._checkpoints / start.name]
        if own:
            raise ConfigError(
                f"resume: {resume} belongs to another run than {self.config.run_dir}, which holds "
                "checkpoints of its own; give another run_dir, or --overwrite"
            )
        return [start]

    @property
    def _checkpoints(self) -> Path:
        return Path(self.config.run_dir) / "checkpoints"

    def newest_checkpoint(self) -> Path | None:
        return checkpoint.newest(self._checkpoints)

    def _due(self, every: int) -> bool:
        return every > 0 and self.steps_done % every == 0

    def _record(self, groups: Sequence[Group], levels: advantage.AdvantageLevels) -> None:
        """Write every completion of the step, and each picture once."""
        if not self.config.log.rollouts:
            return
        own = rollout_records(self.steps_done, groups, levels, self.run.store_image)
        records = self._gather("records", own)
        records = sorted(records, key=lambda r: (r.prompt_index, r.completion_index))
        if self.is_main:
            self.run.write_rollouts(self.steps_done, records)

    def _show(self, values: dict[str, float]) -> None:
        width = len(str(self.total_steps))
        self.reporter.say(
            f"step {self.steps_done:{width}}/{self.total_steps}  "
            f"reward {values['reward/mean']:.3f}  right {values['success/mean']:6.1%}  "
            f"ω {values['advantage/omega']:.2f}  mixed {values['groups/mixed']:4.0%}  "
            f"entropy {values['policy/entropy']:.3f}  "
            f"tokens {values['completions/mean_tokens']:.0f}  "
            f"|g| {values['update/grad_norm']:.2f}  {values['seconds/total']:.1f} s"
        )

    def _open_run_folder(self, stack: contextlib.ExitStack) -> metrics.MetricLogger | None:
        """The main process's folder and metric log; a resumed run forgets later steps."""
        if not self.is_main:
            return None
        config = self.config
        self.run.create(configs.dump(config), versions(), resume=config.resume != "never")
        self.run.rewind(self.steps_done)
        if config.resume not in ("auto", "never"):
            checkpoint.forget_after(self._checkpoints, self.steps_done)
        logger = metrics.MetricLogger(
            self.run,
            config.log.sinks,
            config.log.project,
            Path(config.run_dir).name,
            configs.public(config),
        )
        stack.callback(logger.close)
        return logger

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """While active, the first SIGINT or SIGTERM asks for a stop; the second one strikes."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def ask(number: int, frame: Any) -> None:
            if self.stop_requested:
                raise KeyboardInterrupt
            self.stop_requested = True
            self.reporter.say("stopping after this step; once more to stop at once")

        earlier = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in earlier.items():
                signal.signal(number, handler)

    def _stop_everywhere(self) -> bool:
        self.stop_requested = any(self._gather("stop", [self.stop_requested]))
        return self.stop_requested

    def _not_evaluated(self, name: str) -> bool:
        """Whether a result of this evaluation is missing, in the main process's eyes."""
        results = self.run.read_evaluations() if self.is_main else []
        found = {result.label for result in results if result.name == name}
        missing = self.is_main and not found.issuperset(self.evaluation_tasks)
        return any(self._gather("evaluations done", [missing]))

    def _summary(self) -> dict[str, Any]:
        if not self.is_main:
            return {}
        self.stopwatch.lap()
        first = next(iter(self.evaluation_tasks), None)
        found = {r.name: r for r in self.run.read_evaluations() if r.label == first}
        prefix = "seconds/"
        stages = {
            name.removeprefix(prefix): value
            for name, value in self.stopwatch.totals.items()
            if name.startswith(prefix)
        }
        summary = {
            "steps": self.steps_done,
            "finished": self.steps_done == self.total_steps and not self.stop_requested,
            "pass_at_k": {
                name: {k: asdict(interval) for k, interval in result.pass_at_k.items()}
                for name, result in found.items()
            },
            "greedy": {
                name: asdict(result.greedy) for name, result in found.items() if result.greedy
            },
            "seconds": stages,
            "tokens": self.tokens_seen,
            "rows_skipped": self.collector.rows_skipped,
            "peak_memory_mb": metrics.peak_memory_mb(),
            "versions": versions(),
        }
        if best := self._best():
            summary["best"] = best
        self.run.write_summary(summary)
        return summary

    # ------------------------------------------------------------------ other processes

    def _note(self, stage: str) -> None:
        done = stage in ("log", "checkpoint", "evaluate")
        self.processes.note(stage, self.steps_done + (not done))

    def _gather(self, place: str, items: list[Any]) -> list[Any]:
        """Items of all processes, in the order of processes. `place` is for who waits in vain."""
        return self.processes.gather(items, place)


def _resume_of(folder: Path) -> str | None:
    """The setting `resume` of a checkpoint's run; None if it cannot be read any more."""
    try:
        return configs.load(folder / checkpoint.CONFIG_FILE).resume
    except ConfigError:
        return None


def _step_of(name: str) -> int:
    """The step of an evaluation called step_000010; 0 for any other name."""
    return int(name.removeprefix("step_")) if re.fullmatch(r"step_\d+", name) else 0
