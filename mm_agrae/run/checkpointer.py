"""Saving and resuming a run: when a checkpoint is written, which are kept, and which is resumed.

`checkpoint` is the format of one checkpoint folder; here is what a training run does with them.
All methods but `wait` and `mark_best` are called by every rank alike.
"""

import math
import uuid
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from mm_agrae import config as configs
from mm_agrae.errors import ConfigError, RunFolderError
from mm_agrae.model.policy import Policy
from mm_agrae.model.processing import Processing
from mm_agrae.parallel import sharding
from mm_agrae.run import checkpoint
from mm_agrae.run.context import RunContext
from mm_agrae.run.files import to_json, write_atomic
from mm_agrae.run.model_card import CARD_FILE, model_card, step_of
from mm_agrae.run.versions import changes, versions


class Checkpointer:
    """Writes, keeps and restores the checkpoints of one run.

    `saved_step` is the step of the newest checkpoint that belongs to this run (None: none yet), `id` its random name,
    by which a rollout cache knows what it belongs to, and `resumed` says whether the run goes on from it.
    """

    def __init__(self, context: RunContext, policy: Policy, processing: Processing, *, optimizer: Any, scheduler: Any):
        self.config, self.run = context.config, context.folder
        self.processes, self.reporter = context.processes, context.reporter
        self.policy, self.processing = policy, processing
        self.optimizer, self.scheduler = optimizer, scheduler
        self.folder = Path(self.config.run_dir) / "checkpoints"
        self.saved_step: int | None = None
        self.id = ""
        self.resumed = False
        self._writer = checkpoint.Writer(self.config.checkpoint.background)

    def wait(self) -> None:
        """Until everything is on disk. Raises what went wrong in the background."""
        self._writer.wait()

    def save(self, state: Mapping[str, Any], best_step: int | None) -> None:
        """Write a checkpoint of the last whole step, or have it written in the background.

        `state` are the plain values of the run's progress, and `best_step` the step whose checkpoint is kept as the
        best. Raises RunFolderError if it cannot be written, or the one before could not.
        """
        is_main, step = self.processes.is_main, int(state["step"])
        self.processes.barrier("checkpoint")
        self.id = self.processes.gather([uuid.uuid4().hex], "checkpoint")[0]
        # The main process gets whole weights and moments of sharded ones, the others none.
        optimizer = sharding.whole_state(self.optimizer, keep=is_main)
        with self.policy.gathered(saving=True, keep=is_main):
            if is_main:
                self._writer.wait()
                state = {**state, "id": self.id, "versions": versions()}
                snapshot = checkpoint.Snapshot(
                    self.policy,
                    self.processing,
                    config=self.config,
                    card=model_card(self.config, self.policy, self.processing, state, self.run.path),
                    state=state,
                    training={"optimizer": optimizer, "scheduler": self.scheduler.state_dict()},
                    copied=self._writer.background,
                )
                self._writer.write(partial(self._write, snapshot, step, best_step))
        self.saved_step = step

    def _write(self, snapshot: checkpoint.Snapshot, step: int, best: int | None) -> None:
        name = checkpoint.name_of(step)
        snapshot.write(self.folder / name)
        checkpoint.point(self.folder / checkpoint.LATEST, name)
        keep = self.config.checkpoint.keep
        checkpoint.prune(self.folder, keep, checkpoint.name_of(best) if best else "")

    def describe(self, step: int) -> None:
        """Write the card of that step's checkpoint anew, if it is the newest, with what was evaluated since."""
        if self.processes.is_main and step == self.saved_step:
            state = {"step": step, "versions": versions()}
            card = model_card(self.config, self.policy, self.processing, state, self.run.path)
            self._writer.write(partial(write_atomic, self.folder / checkpoint.name_of(step) / CARD_FILE, card))

    def best(self, step: int, total_steps: int) -> dict[str, Any]:
        """Step and value of the highest `checkpoint.best` among steps up to `step`; {} for none.

        {} on all but the main process, too.
        """
        label, _, metric = self.config.checkpoint.best.rpartition("/")
        best: dict[str, Any] = {}
        for result in self.run.read_evaluations() if metric and self.processes.is_main else []:
            evaluated = total_steps if result.name == "after" else step_of(result.name)
            if result.label != label or not 0 < evaluated <= step:
                continue
            is_there = (self.folder / checkpoint.name_of(evaluated)).is_dir()
            value = result.metrics()[f"evaluate/{label}/{metric}"]
            if (is_there or evaluated == step) and value > best.get("value", -math.inf):
                best = {"step": evaluated, "metric": self.config.checkpoint.best, "value": value}
        return best

    def mark_best(self, best: Mapping[str, Any]) -> None:
        """Point the link `best` at the checkpoint of that step. For the main process alone."""

        def mark() -> None:
            write_atomic(self.folder / checkpoint.BEST_FILE, to_json(best, indent=1) + "\n")
            name = checkpoint.name_of(best["step"])
            checkpoint.point(self.folder / checkpoint.BEST, name)
            checkpoint.prune(self.folder, self.config.checkpoint.keep, name)

        self._writer.write(mark)
        self.reporter.say(f"best so far: {best['metric']} {best['value']:.3f}")

    def restore(self) -> dict[str, Any] | None:
        """Load the newest whole checkpoint of the run, or the one that `resume` names.

        Returns its state; None if the run starts anew. Raises ConfigError if the checkpoint was
        made with settings that would make this another run, RunFolderError if all are damaged.
        """
        found = self._candidates()
        for folder in found:
            # One process reads it all; the others go by its verdict.
            own = [checkpoint.damaged(folder)] if self.processes.is_main else []
            bad = self.processes.gather(own, "checking the checkpoint")[0]
            if bad and len(found) > 1:
                self.reporter.say(f"{folder} is damaged ({', '.join(bad)}); trying an older one")
                continue
            earlier = configs.load(folder / checkpoint.CONFIG_FILE)
            if differences := configs.contradictions(self.config, earlier):
                raise ConfigError(
                    f"the run in {folder} was made with other settings; give it those, another "
                    "run_dir, or --overwrite:\n  " + "\n  ".join(differences)
                )
            state, training = checkpoint.restore(folder, self.policy, bad)
            sharding.load_whole_state(self.optimizer, training["optimizer"])
            self.scheduler.load_state_dict(training["scheduler"])
            self.policy.version = state["policy_version"]
            if folder.parent == self.folder:
                self.saved_step, self.resumed = state["step"], True
                self.id = str(state.get("id", ""))
            self.reporter.say(f"resumed from {folder} after step {state['step']}")
            if changed := changes(state.get("versions", {})):
                self.reporter.say(f"results may differ in the last digits: {', '.join(changed)}")
            return state
        if found:
            raise RunFolderError(
                f"all checkpoints in {self.folder} are damaged; put a whole one back, or begin anew with --overwrite"
            )
        return None

    def _candidates(self) -> list[Path]:
        """The checkpoints to try, best first."""
        resume, own = self.config.resume, checkpoint.candidates(self.folder)
        if resume == "never":
            return []
        if resume == "auto":
            return own
        # The same command, given again, goes on with what it has made so far.
        if next(filter(None, map(_resume_setting, own)), None) == resume:
            return own
        start = Path(resume).resolve()
        if not (start / checkpoint.STATE_FILE).is_file():
            raise ConfigError(
                f"resume: {resume} is not a checkpoint (a folder such as "
                f"RUN/checkpoints/{checkpoint.name_of(10)}); name one, or use auto"
            )
        if start.parent == self.folder.resolve():
            return [self.folder / start.name]
        if own:
            raise ConfigError(
                f"resume: {resume} belongs to another run than {self.config.run_dir}, which holds "
                "checkpoints of its own; give another run_dir, or --overwrite"
            )
        return [start]

    def forget_after(self, step: int) -> None:
        """Delete the checkpoints of later steps, if an earlier one was named to go on from."""
        if self.config.resume not in ("auto", "never"):
            checkpoint.forget_after(self.folder, step)


def _resume_setting(folder: Path) -> str | None:
    """The setting `resume` of a checkpoint's run; None if it can no longer be read."""
    try:
        return configs.load(folder / checkpoint.CONFIG_FILE).resume
    except ConfigError:
        return None
