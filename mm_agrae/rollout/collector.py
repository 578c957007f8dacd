"""Prompts -> completions -> scores: the groups of a training step.

Read `Collector.collect` first. The prompts of a step are dealt to the ranks in turn (position i to rank i mod N), and
every rank samples and scores its own. Rows that cannot be used and groups without an advantage are replaced on all
ranks alike, so that the data cursor is the same everywhere. A problem and its variants are neighbours in the step, and
kept or replaced together.
"""

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from threading import Lock
from typing import Any

from mm_agrae.batching import StepTable
from mm_agrae.errors import DataError, EngineError, with_skip
from mm_agrae.model.policy import Policy
from mm_agrae.model.processing import Processing
from mm_agrae.rewards import Rewarder
from mm_agrae.rollout import cache, mismatch
from mm_agrae.rollout.correction import Corrector
from mm_agrae.rollout.engine import Engine, derive_seed
from mm_agrae.run.context import RunContext
from mm_agrae.tasks import Concatenation
from mm_agrae.tasks.order import DataOrder
from mm_agrae.tasks.variants import Draw, Problems
from mm_agrae.types import Completion, Group, Prompt

Prompts = dict[int, Prompt]
Completions = dict[int, list[Completion]]
"""A rank's prompts, and the completions of each, by position in the step."""

MAX_REFUSALS = 20
"""Prompts in a row that a rollout server may refuse; after that the rows are not at fault."""


@dataclass(frozen=True)
class _Overlapped:
    """Completions being sampled while the update of an earlier step runs.

    `version` is the policy version they are sampled with, `data_state` the data cursor before
    their prompts were drawn.
    """

    prompts: Prompts
    completions: Future[Completions]
    version: int
    data_state: dict[str, Any]


class Collector:
    """Draws prompts, has the engine sample, and scores, for one step after another.

    `rewarder` is to be set before the first step. `values` collects what weight syncs and mismatch checks measured.
    `behaviour_version` is the policy version that the present completions were sampled with.
    """

    rewarder: Rewarder

    def __init__(
        self, context: RunContext, task: Concatenation, processing: Processing, policy: Policy, engine: Engine
    ):
        self.config, self.processes = context.config, context.processes
        self.reporter, self.stopwatch, self.folder = context.reporter, context.stopwatch, context.folder
        self.task, self.processing, self.policy, self.engine = task, processing, policy, engine
        data = self.config.data
        difficulty = task.difficulty if data.easy_to_hard else ()
        self.order = DataOrder(len(task), self.config.train.seed, data.shuffle, difficulty)
        self.problems = Problems(task, self.config.rollout.variants, self.config.train.seed)
        self.rows_skipped = len(task.skipped)
        self.behaviour_version = engine.version
        self.values: dict[str, float] = {}
        self._corrector = Corrector(context, processing) if self.config.rollout.correct else None
        self._mismatch_checked = False
        self._draw_at: dict[int, Draw] = {}
        """What was drawn for each position of the step."""
        self._overlapped: _Overlapped | None = None
        self._sampling_thread = ThreadPoolExecutor(1, "rollout")
        self._prefetched: dict[Draw, Future[Prompt]] = {}
        """Prompts of the next step, being prepared during the present one."""
        # Threads, as decoding, resizing and cutting into patches hold the interpreter lock for 7 % of their time:
        # processes are no faster, and would send each prompt's pixels, up to 100 MB, through a pipe.
        self._prefetch_threads = ThreadPoolExecutor(self.config.data.prefetch_threads or 1, "prompts")
        self._task_lock = Lock()

    def collect(self, step: int, last: bool) -> list[Group]:
        """This rank's groups of a step (from 0), resampled where dynamic sampling asks for it.

        Raises DataError for rows and EngineError for engines that cannot be used.
        """
        rollout = self.config.rollout
        if rollout.overlap:
            return self._collect_overlapped(step, last)
        self.sync()
        positions = [*range(rollout.prompts_per_step)]
        rounds = 1 + (rollout.dynamic_sampling.max_draws if rollout.dynamic_sampling else 0)
        groups: dict[int, Group] = {}
        for resample_round in range(rounds):
            with self.stopwatch("prompts"):
                prompts = self._draw_prompts(positions)
            if not last:
                self.prefetch()
            if resample_round == 0:
                self._check_mismatch(step, list(prompts.values()))
            count = len(prompts) * rollout.completions_per_prompt
            with self.stopwatch("rollout"), self.reporter.bar("  rollout", count) as advance:
                completions = self._generate(prompts, step, resample_round, advance)
            prompts, completions = self._replace_refused(prompts, completions, step, resample_round)
            fresh = self._score(prompts, completions, resample_round)
            groups.update({group.position: group for group in fresh})
            own = [(self._draw_at[g.position].row, sum(s.success for s in g.scores), len(g.scores)) for g in fresh]
            self.problems.update(self.processes.gather(own, "difficulty") if self.problems.size > 1 else ())
            if resample_round + 1 == rounds:
                break
            positions = self._without_advantage(groups.values())
            if not positions:
                break
        found = [groups[position] for position in sorted(groups)]
        if self._corrector:  # after dynamic sampling, which judges the policy's own completions
            self._corrector.correct(found, step, self.engine, self.rewarder)
        return found

    def _without_advantage(self, groups: Iterable[Group]) -> list[int]:
        """Positions, over all ranks, of groups that the update would skip: all advantages of a problem are 0."""
        summaries = [group.summary() for group in groups]
        table = StepTable.of(self.processes.gather(summaries, "dynamic sampling"))
        advantage_PG = table.advantages(self.config).advantage_PG
        flat = {
            group.position
            for group, advantage_G in zip(table.groups, advantage_PG, strict=True)
            if not advantage_G.any()
        }
        return sorted(position for position in flat if flat.issuperset(self.problems.siblings(position)))

    def sync(self) -> None:
        """Hand the policy's weights to an engine that holds older ones."""
        if self._overlapped:
            self._wait(self._overlapped)  # its weights must not change while it samples
        if self.engine.version != self.policy.version:
            with self.stopwatch("sync"):
                self.processes.barrier("sync")
                self.values["sync/megabytes"] = self.engine.sync().megabytes
        self.behaviour_version = self.engine.version

    def check_versions(self, groups: Iterable[Group]) -> None:
        """Raise RuntimeError for completions of another than the behaviour-policy version."""
        for completion in chain.from_iterable(group.completions for group in groups):
            if completion.policy_version != self.behaviour_version:
                raise RuntimeError(
                    f"a completion of policy version {completion.policy_version} reached the "
                    f"update of version {self.policy.version}, whose behaviour policy is of "
                    f"version {self.behaviour_version}"
                )

    def take_values(self) -> dict[str, float]:
        """What weight syncs and mismatch checks measured since the last call."""
        values, self.values = self.values, {}
        return values

    def close(self) -> None:
        self.engine.close()
        self._sampling_thread.shutdown(wait=False, cancel_futures=True)
        self._prefetch_threads.shutdown(wait=True, cancel_futures=True)

    @property
    def data_state(self) -> dict[str, Any]:
        """Data cursor and D of the problems. A resumed run draws again what is being sampled for the next step."""
        return self._overlapped.data_state if self._overlapped else self._data_state()

    def load_data_state(self, state: Mapping[str, Any]) -> None:
        self.order.position, self.rows_skipped = state["data_position"], state["rows_skipped"]
        self.problems.found = {int(row): difficulty for row, difficulty in state.get("difficulty", {}).items()}

    def _data_state(self) -> dict[str, Any]:
        state = {"data_position": self.order.position, "rows_skipped": self.rows_skipped}
        return state | {"difficulty": dict(self.problems.found)}

    @property
    def cache_path(self) -> Path:
        return Path(self.config.run_dir) / f"rollout_cache_{self.processes.rank}.safetensors"

    def write_cache(self, checkpoint_id: str, groups: Sequence[Group]) -> None:
        """Have the groups of the step after a checkpoint survive a kill; see `cache`."""
        draws = [self._draw_at[group.position] for group in groups]
        cache.write(self.cache_path, checkpoint_id, groups, draws, self._data_state())

    def read_cache(self, checkpoint_id: str) -> list[Group] | None:
        """The groups that `write_cache` stored after this checkpoint, on all ranks or on none."""
        cached = cache.read(self.cache_path, checkpoint_id)
        groups: list[Group] = []
        with self.stopwatch("prompts"), contextlib.suppress(DataError, IndexError):
            for drawn, prompt_ids, values in cached[0] if cached else []:
                prompt = self._take(draw := Draw(*drawn))
                if prompt.token_ids.tolist() == prompt_ids:
                    groups.append(Group(prompt=prompt, **values))
                    self._draw_at[groups[-1].position] = draw
        positions = range(self.processes.rank, self.config.rollout.prompts_per_step, self.processes.world)
        whole = cached is not None and [group.position for group in groups] == list(positions)
        if not all(self.processes.gather([whole], "rollout cache")) or cached is None:
            return None
        self.load_data_state(cached[1])
        self.behaviour_version = self.policy.version
        return groups

    def prefetch(self) -> None:
        """Begin to prepare the prompts of the next rows (reading, decoding, processing) in threads.

        `_draw_prompts` uses them in the order in which it would have made them itself, so that nothing but the time
        changes: the data cursor does not move, and the error of a bad row is raised where the row is drawn.
        """
        if not self.config.data.prefetch_threads:
            return
        rows = enumerate(self.order.peek(self.config.rollout.problems_per_step), self.order.position)
        draws = [draw for number, row in rows for draw in self.problems.draws(row, number)]
        before, self._prefetched = self._prefetched, {}
        for draw in draws[self.processes.rank :: self.processes.world]:
            self._prefetched[draw] = before.get(draw) or self._prefetch_threads.submit(self._prompt, draw)

    def store_images(self, groups: Iterable[Group]) -> None:
        """Begin to store a step's images, which takes longer than decoding them; logging finds them stored."""
        if self.config.data.prefetch_threads and self.config.log.rollouts:
            for image in chain.from_iterable(group.prompt.images for group in groups):
                self._prefetch_threads.submit(self.folder.store_image, image)

    def _take(self, draw: Draw) -> Prompt:
        """The prompt of what was drawn, prefetched or not. Raises DataError."""
        prefetched = self._prefetched.pop(draw, None)
        return prefetched.result() if prefetched else self._prompt(draw)

    def _prompt(self, draw: Draw) -> Prompt:
        """The problem as it is takes the place of a variant that cannot be used, such as one of too many tokens."""
        try:
            with self._task_lock:  # a task may be anyone's code
                example = self.problems.example(draw)
            return self.processing.prompt(example)
        except DataError:
            if draw.variant == 0:
                raise
            return self._prompt(draw._replace(variant=0))

    def _draw_prompts(self, positions: Iterable[int]) -> Prompts:
        """This rank's prompts by position, all of whole problems; a bad row is skipped on all ranks alike."""
        drawn: Prompts = {}
        missing = list(positions)
        in_a_row = 0
        while missing:
            bad = []
            draws = [
                draw
                for _ in missing[:: self.problems.size]
                for draw in self.problems.draws(number=self.order.position, row=self.order.next())
            ]
            for position, draw in zip(missing, draws, strict=True):
                if position % self.processes.world != self.processes.rank:
                    continue
                try:
                    drawn[position] = self._take(draw)
                    self._draw_at[position] = draw
                except DataError as error:
                    if self.config.data.on_bad_row == "error":
                        raise with_skip(error) from None
                    bad.append((position, str(error)))
            messages = {
                self.problems.siblings(position): message
                for position, message in sorted(self.processes.gather(bad, "prompts"))
            }
            for message in messages.values():
                self.reporter.say(f"skipped {message}")
            missing = [*chain(*messages)]
            self.rows_skipped += len(messages)
            in_a_row = in_a_row + len(messages) if messages else 0
            if in_a_row > len(self.task):
                raise DataError("data.train: no usable row was found in a whole pass over the data")
        return dict(sorted(drawn.items()))

    def _replace_refused(
        self, prompts: Prompts, completions: Completions, step: int, resample_round: int
    ) -> tuple[Prompts, Completions]:
        """Replace prompts that a rollout server refused by the next ones of the data."""
        for attempt in range(1, MAX_REFUSALS + 1):
            own = [
                (position, prompts[position].example.origin or prompts[position].example.id)
                for position, group in completions.items()
                if not group
            ]
            refused = sorted(self.processes.gather(own, "refused rows"))
            if not refused:
                return prompts, completions
            for _, where in refused:
                self.reporter.say(f"skipped {where}: the rollout server refused it")
            if self.config.data.on_bad_row == "error":
                raise DataError(
                    f"{refused[0][1]}: the rollout server refused this row; its message is in the "
                    "log. Mend it or set data.on_bad_row=skip"
                )
            problems = sorted({self.problems.siblings(position)[0] for position, _ in refused})
            self.rows_skipped += len(problems)
            fresh = self._draw_prompts([*chain(*map(self.problems.siblings, problems))])
            prompts = dict(sorted({**prompts, **fresh}.items()))
            completions |= self._generate(fresh, step, resample_round + 1000 * attempt)
        raise EngineError(f"the rollout server refused {MAX_REFUSALS} rows in a row")

    def _generate(
        self, prompts: Prompts, step: int, resample_round: int, advance: Callable[[int], None] | None = None
    ) -> Completions:
        rollout, seed = self.config.rollout, self.config.train.seed
        seeds = [derive_seed(seed, "rollout", step, resample_round, each) for each in prompts]
        groups = self.engine.generate(list(prompts.values()), rollout.completions_per_prompt, rollout, seeds, advance)
        return dict(zip(prompts, groups, strict=True))

    def _collect_overlapped(self, step: int, last: bool) -> list[Group]:
        """The groups sampled during the last update; starts sampling those of the next step."""
        self.sync()
        present = self._overlapped or self._start_sampling(step)
        completions = self._wait(present)
        self._check_mismatch(step, list(present.prompts.values()))
        self._overlapped = None
        if any(self.processes.gather([not all(completions.values())], "refused rows")):
            raise DataError(
                "a rollout server refused a row, which rollout.overlap cannot replace in time; "
                "its message is in the log. Remove the row, or set rollout.overlap=false"
            )
        if not last:
            self._overlapped = self._start_sampling(step + 1)
        self.behaviour_version = present.version
        return self._score(present.prompts, completions, resample_round=0)

    def _start_sampling(self, step: int) -> _Overlapped:
        """Draw the prompts of `step`, and have the engine sample while the update runs."""
        data_state = self._data_state()
        with self.stopwatch("prompts"):
            prompts = self._draw_prompts(range(self.config.rollout.prompts_per_step))
        future = self._sampling_thread.submit(self._generate, prompts, step, 0)
        return _Overlapped(prompts, future, self.engine.version, data_state)

    def _wait(self, overlapped: _Overlapped) -> Completions:
        with self.stopwatch("rollout"):
            return overlapped.completions.result()

    def _check_mismatch(self, step: int, prompts: Sequence[Prompt]) -> None:
        """At the start and every so often: are the engine's log-probabilities the policy's?

        Raises EngineError if they are far from it.
        """
        rollout, settings = self.config.rollout, self.config.rollout.mismatch
        due = not self.engine.exact and step % max(1, settings.probe_every) == 0
        if settings.probe_every == 0 or (self._mismatch_checked and not due):
            return
        few = prompts[: settings.probe_prompts]
        seeds = [
            derive_seed(self.config.train.seed, "probe", step, self.processes.rank, index) for index in range(len(few))
        ]
        with self.stopwatch("probe"):
            own = mismatch.check(self.engine, self.policy, few, rollout, seeds)
            found = mismatch.Mismatch.over(self.processes.gather([own], "mismatch check"))
        self.values |= {
            "mismatch/probe_mean": found.mean,
            "mismatch/probe_max": found.highest,
            "mismatch/probe_kl": found.kl,
        }
        what = f"engine {rollout.engine} against the policy: {found}"
        if not self._mismatch_checked:
            self.reporter.say(what)
        self._mismatch_checked = True
        if not found.mean <= settings.stop_above:
            raise EngineError(
                f"{what}. That is more than rollout.mismatch.stop_above = {settings.stop_above}: "
                "it holds other weights, sees other images, or computes otherwise; try "
                "rollout.engine=hf, or rollout.vllm.dtype=float32 to see which"
            )
        if found.mean > settings.warn_above:
            self.reporter.say(f"warning: {what}; check rollout.vllm.dtype and model.dtype (docs/warnings.md#mismatch)")

    def _score(self, prompts: Prompts, completions: Completions, resample_round: int) -> list[Group]:
        count = self.config.rollout.completions_per_prompt
        with self.stopwatch("reward"):
            scores = self.rewarder.score(
                [prompt.example for prompt in prompts.values() for _ in range(count)],
                [each for position in prompts for each in completions[position]],
                stop=True,
            )
        rest = iter(scores)
        return [
            Group(
                position,
                prompt,
                completions[position],
                [*islice(rest, count)],
                resample_round,
                problem=self.problems.siblings(position)[0],
            )
            for position, prompt in prompts.items()
        ]
