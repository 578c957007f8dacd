"""Prompts -> completions -> scores: what the groups of a step are made of.

Read `Collector.collect` first. The prompts of a step are dealt to the processes in turn (position
i to process i mod N), and every process samples and scores its own. Rows that cannot be used and
groups without a signal are replaced on all processes alike, so that the data stand at the same
place everywhere.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from mm_agrae.config import Config
from mm_agrae.errors import DataError, EngineError
from mm_agrae.model.policy import Policy
from mm_agrae.model.processing import Processing
from mm_agrae.parallel.processes import Processes
from mm_agrae.progress import Reporter
from mm_agrae.rewards import Rewarder
from mm_agrae.rollout import Engine, derive_seed
from mm_agrae.rollout import cache as unfinished
from mm_agrae.rollout import mismatch as parity
from mm_agrae.run import metrics
from mm_agrae.tasks import Concatenation
from mm_agrae.tasks.order import DataOrder
from mm_agrae.types import Completion, Group, Prompt

MAX_REFUSALS = 20
"""Prompts in one place that a rollout server may refuse before the fault is not the rows'."""


@dataclass(frozen=True)
class _Ahead:
    """Completions being sampled while the update of an earlier step runs.

    `version` is that of the weights they are sampled with; `place` says where the data stood
    before their prompts were drawn.
    """

    prompts: dict[int, Prompt]
    completions: Future[list[list[Completion]]]
    version: int
    place: dict[str, int]


class Collector:
    """Draws prompts, has the engine sample, and scores, for one step after another.

    `rewarder` is to be set before the first step. `values` gathers what sync and probe measured.
    """

    rewarder: Rewarder

    def __init__(
        self,
        config: Config,
        task: Concatenation,
        processing: Processing,
        policy: Policy,
        engine: Engine,
        processes: Processes,
        reporter: Reporter,
        stopwatch: metrics.Stopwatch,
    ):
        self.config, self.task, self.processing = config, task, processing
        self.policy, self.engine, self.processes = policy, engine, processes
        self.reporter, self.stopwatch = reporter, stopwatch
        self.order = DataOrder(len(task), config.train.seed, config.data.shuffle)
        self.rows_skipped = len(task.skipped)
        self.sampled_by = engine.version
        """The policy version that the completions of the present step are from."""
        self.values: dict[str, float] = {}
        self._probed = False
        self._row_at: dict[int, int] = {}
        """Which row of the data stands at a position of the step."""
        self._ahead: _Ahead | None = None
        self._background = ThreadPoolExecutor(1, "rollout")

    def collect(self, step: int, last: bool) -> list[Group]:
        """This process's groups of a step (from 0), groups without signal drawn again if asked.

        Raises DataError for rows and EngineError for engines that cannot be used.
        """
        rollout = self.config.rollout
        positions: list[int] = list(range(rollout.prompts_per_step))
        if rollout.overlap:
            return self._overlapped(step, positions, last)
        self.sync()
        draws = 1 + (rollout.dynamic_sampling.max_draws if rollout.dynamic_sampling else 0)
        groups: dict[int, Group] = {}
        for draw in range(draws):
            with self.stopwatch("prompts"):
                prompts = self._draw_prompts(positions)
            if draw == 0:
                self._probe(step, list(prompts.values()))
            count = len(prompts) * rollout.completions_per_prompt
            with self.stopwatch("rollout"), self.reporter.bar("  rollout", count) as advance:
                completions = self._generate(prompts, step, draw, advance)
            prompts, completions = self._replace_refused(prompts, completions, step, draw)
            fresh = self._score(prompts, completions, draw)
            groups.update({group.position: group for group in fresh})
            if draw + 1 == draws:
                break
            flat = [g.position for g in fresh if len({s.reward for s in g.scores}) == 1]
            positions = sorted(self.processes.gather(flat, "dynamic sampling"))
            if not positions:
                break
        return [groups[position] for position in sorted(groups)]

    def sync(self) -> None:
        """Hand the policy's weights to an engine that holds older ones."""
        if self._ahead:
            self._wait(self._ahead)  # weights must not change under it
        if self.engine.version != self.policy.version:
            with self.stopwatch("sync"):
                self.processes.barrier("sync")
                self.values["sync/megabytes"] = self.engine.sync().megabytes
        self.sampled_by = self.engine.version

    def take_values(self) -> dict[str, float]:
        """What sync and probe measured since the last call."""
        values, self.values = self.values, {}
        return values

    def close(self) -> None:
        self.engine.close()
        self._background.shutdown(wait=False, cancel_futures=True)

    # ------------------------------------------------------------------ over a kill

    @property
    def place(self) -> dict[str, int]:
        """Where the data stand; a resumed run draws again what is being sampled ahead."""
        return self._ahead.place if self._ahead else self._place()

    def go_to(self, place: dict[str, int]) -> None:
        self.order.position, self.rows_skipped = place["data_position"], place["rows_skipped"]

    def _place(self) -> dict[str, int]:
        return {"data_position": self.order.position, "rows_skipped": self.rows_skipped}

    def keep(self, path: Path, checkpoint_id: str, groups: Sequence[Group]) -> None:
        """Have the groups of the step after a checkpoint outlive a kill; see `unfinished`."""
        rows = [self._row_at[group.position] for group in groups]
        unfinished.write(path, checkpoint_id, groups, rows, self._place())

    def take_up(self, path: Path, checkpoint_id: str) -> list[Group] | None:
        """The groups that `keep` kept, on all processes or on none."""
        kept = unfinished.read(path, checkpoint_id)
        groups: list[Group] = []
        with self.stopwatch("prompts"), contextlib.suppress(DataError, IndexError):
            for each in kept[0] if kept else []:
                prompt = self.processing.prompt(self.task[each.row])
                if prompt.token_ids.tolist() == each.prompt_ids:
                    self._row_at[each.position] = each.row
                    groups.append(
                        Group(each.position, prompt, each.completions, each.scores, each.draw)
                    )
        wanted = range(
            self.processes.rank, self.config.rollout.prompts_per_step, self.processes.world
        )
        whole = kept is not None and [group.position for group in groups] == list(wanted)
        if not all(self.processes.gather([whole], "kept rollouts")) or kept is None:
            return None
        self.go_to(kept[1])
        self.sampled_by = self.policy.version
        return groups

    # ------------------------------------------------------------------ prompts

    def _draw_prompts(self, positions: Iterable[int]) -> dict[int, Prompt]:
        """This process's prompts by position; a bad row is skipped on all processes alike."""
        drawn: dict[int, Prompt] = {}
        missing = list(positions)
        in_a_row = 0
        while missing:
            bad = []
            for position, index in [(position, self.order.next()) for position in missing]:
                if position % self.processes.world != self.processes.rank:
                    continue
                try:
                    drawn[position] = self.processing.prompt(self.task[index])
                    self._row_at[position] = index
                except DataError as error:
                    if self.config.data.on_bad_row == "error":
                        raise
                    bad.append((position, str(error)))
            missing = []
            for position, message in sorted(self.processes.gather(bad, "prompts")):
                self.reporter.say(f"skipped {message}")
                missing.append(position)
            self.rows_skipped += len(missing)
            in_a_row = in_a_row + len(missing) if missing else 0
            if in_a_row > len(self.task):
                raise DataError("data.train: no usable row was found in a whole pass over the data")
        return dict(sorted(drawn.items()))

    def _replace_refused(
        self,
        prompts: dict[int, Prompt],
        completions: list[list[Completion]],
        step: int,
        draw: int,
    ) -> tuple[dict[int, Prompt], list[list[Completion]]]:
        """Other prompts in the place of those that a rollout server refused."""
        found = dict(zip(prompts, completions, strict=True))
        for attempt in range(1, MAX_REFUSALS + 1):
            own = [
                (position, prompts[position].example.origin or prompts[position].example.id)
                for position, group in found.items()
                if not group
            ]
            refused = sorted(self.processes.gather(own, "refused rows"))
            if not refused:
                return prompts, [found[position] for position in prompts]
            for _, where in refused:
                self.reporter.say(f"skipped {where}: the rollout server refused it")
            if self.config.data.on_bad_row == "error":
                raise DataError(
                    f"{refused[0][1]}: the rollout server refused this row; its message is in the "
                    "log. Mend it or set data.on_bad_row=skip"
                )
            self.rows_skipped += len(refused)
            fresh = self._draw_prompts([position for position, _ in refused])
            prompts = dict(sorted({**prompts, **fresh}.items()))
            again = self._generate(fresh, step, draw + 1000 * attempt)
            found |= dict(zip(fresh, again, strict=True))
        raise EngineError(f"the rollout server refused {MAX_REFUSALS} rows in a row")

    # ------------------------------------------------------------------ completions

    def _generate(
        self,
        prompts: dict[int, Prompt],
        step: int,
        draw: int,
        advance: Callable[[int], None] | None = None,
    ) -> list[list[Completion]]:
        rollout, seed = self.config.rollout, self.config.train.seed
        seeds = [derive_seed(seed, "rollout", step, draw, position) for position in prompts]
        return self.engine.generate(
            list(prompts.values()), rollout.completions_per_prompt, rollout, seeds, advance
        )

    def _overlapped(self, step: int, positions: Sequence[int], last: bool) -> list[Group]:
        """The step's groups, sampled during the last update; those of the next step are begun."""
        self.sync()
        present = self._ahead or self._begin(step, positions)
        completions = self._wait(present)
        self._probe(step, list(present.prompts.values()))
        self._ahead = None
        if any(self.processes.gather([not all(completions)], "refused rows")):
            raise DataError(
                "a rollout server refused a row, which rollout.overlap cannot replace in time; "
                "its message is in the log. Remove the row, or set rollout.overlap=false"
            )
        if not last:
            self._ahead = self._begin(step + 1, positions)
        self.sampled_by = present.version
        return self._score(present.prompts, completions, draw=0)

    def _begin(self, step: int, positions: Sequence[int]) -> _Ahead:
        """Draw the prompts of `step` here, and let the engine sample beside what follows."""
        place = self._place()
        with self.stopwatch("prompts"):
            prompts = self._draw_prompts(positions)
        future = self._background.submit(self._generate, prompts, step, 0)
        return _Ahead(prompts, future, self.engine.version, place)

    def _wait(self, ahead: _Ahead) -> list[list[Completion]]:
        with self.stopwatch("rollout"):
            return ahead.completions.result()

    def _probe(self, step: int, prompts: Sequence[Prompt]) -> None:
        """At the start, and every so often: are the engine's log-probabilities the policy's?

        Raises EngineError if they are far from it.
        """
        rollout, mismatch = self.config.rollout, self.config.rollout.mismatch
        due = not self.engine.exact and step % max(1, mismatch.probe_every) == 0
        if mismatch.probe_every == 0 or (self._probed and not due):
            return
        few = prompts[: mismatch.probe_prompts]
        seeds = [
            derive_seed(self.config.train.seed, "probe", step, self.processes.rank, index)
            for index in range(len(few))
        ]
        with self.stopwatch("probe"):
            found = parity.probe(self.engine, self.policy, few, rollout, seeds)
            found = parity.Parity.over(self.processes.gather([found], "probe"))
        self.values |= {
            "mismatch/probe_mean": found.mean,
            "mismatch/probe_max": found.highest,
            "mismatch/probe_kl": found.kl,
        }
        what = f"engine {rollout.engine} against the policy: {found}"
        if not self._probed:
            self.reporter.say(what)
        self._probed = True
        if not found.mean <= mismatch.stop_above:
            raise EngineError(
                f"{what}. That is more than rollout.mismatch.stop_above = {mismatch.stop_above}: "
                "it holds other weights, sees other pictures, or computes otherwise; try "
                "rollout.engine=hf, or rollout.vllm.dtype=float32 to see which"
            )
        if found.mean > mismatch.warn_above:
            self.reporter.say(f"warning: {what}; check rollout.vllm.dtype and model.dtype")

    # ------------------------------------------------------------------ scores

    def _score(
        self, prompts: dict[int, Prompt], completions: list[list[Completion]], draw: int
    ) -> list[Group]:
        count = self.config.rollout.completions_per_prompt
        with self.stopwatch("reward"):
            scores = self.rewarder.score(
                [prompt.example for prompt in prompts.values() for _ in range(count)],
                list(itertools.chain(*completions)),
            )
        return [
            Group(position, prompt, completions[row], scores[row * count : (row + 1) * count], draw)
            for row, (position, prompt) in enumerate(prompts.items())
        ]
