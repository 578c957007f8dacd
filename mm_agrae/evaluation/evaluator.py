"""Evaluating the policy that is being trained, on every evaluation set and over all ranks."""

from __future__ import annotations

import time
from collections.abc import Mapping

from mm_agrae.evaluation import evaluate
from mm_agrae.model.processing import Processing
from mm_agrae.rewards import Rewarder
from mm_agrae.rollout import Engine
from mm_agrae.run.context import RunContext
from mm_agrae.tasks import Task


class Evaluator:
    """`tasks` are the evaluation sets by label. All methods are called by every rank alike."""

    def __init__(
        self,
        context: RunContext,
        tasks: Mapping[str, Task],
        processing: Processing,
        engine: Engine,
    ):
        self.context, self.tasks = context, tasks
        self.processing, self.engine = processing, engine

    def run(self, name: str, rewarder: Rewarder) -> None:
        """Sample and grade every evaluation set; results go into the run folder under `name`.

        The engine must hold the policy's present weights.
        """
        config, processes, reporter = (
            self.context.config,
            self.context.processes,
            self.context.reporter,
        )
        settings, data = config.evaluate, config.data
        sections = {source.label: settings.for_source(source) for source in data.evaluate}
        for label, task in self.tasks.items():
            section, started = sections[label], time.perf_counter()
            mine = range(processes.rank, len(task), processes.world)
            count = len(mine) * section.samples
            with (
                self.context.stopwatch("evaluate"),
                reporter.bar(f"evaluate {label} ({name})", count) as advance,
            ):
                problems = evaluate.run(
                    self.engine,
                    self.processing,
                    rewarder,
                    task,
                    mine,
                    section,
                    on_bad_row=data.on_bad_row,
                    on_progress=advance,
                )
            problems = processes.gather(problems, "evaluation")
            problems = sorted(problems, key=lambda problem: problem.index)
            if not processes.is_main:
                continue
            seconds = time.perf_counter() - started
            result = evaluate.write(self.context.folder, name, label, problems, section, seconds)
            reporter.say(evaluate.one_line(result))

    def lacks(self, name: str) -> bool:
        """Whether a result of the evaluation `name` is missing from the run folder."""
        is_main = self.context.processes.is_main
        results = self.context.folder.read_evaluations() if is_main else []
        found = {result.label for result in results if result.name == name}
        missing = is_main and not found.issuperset(self.tasks)
        return any(self.context.processes.gather([missing], "evaluations done"))
