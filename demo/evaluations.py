"""Compare: pass@k of several evaluations, and the problems on which two of them differ."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import gradio as gr

from mm_agrae.errors import UserError
from mm_agrae.evaluation.paired import OUTCOMES, PairedEvaluations, SampleCache, StoredEvaluation, find_evaluations
from mm_agrae.view import demo_pages as view
from mm_agrae.view.demo_settings import DemoSettings
from mm_agrae.view.page import Html, empty
from mm_agrae.view.runs import RunLibrary

from .elements import CardList, area, error, html, turned

SHOWN_AT_FIRST = 6


class EvaluationsTab:
    """Reads the runs of `settings` and nothing else."""

    def __init__(self, settings: DemoSettings) -> None:
        self.library = RunLibrary(settings.runs)
        self.reader = SampleCache()
        self._lay_out()
        self._connect()

    def _lay_out(self) -> None:
        names = list(self._find()[0])
        self.chosen = gr.Dropdown(
            label="Evaluations", choices=names, value=[], multiselect=True, elem_id="compare-chosen"
        )
        self.overview = html("compare-overview")
        gr.Markdown("### Problem by problem")
        with gr.Row():
            self.first = gr.Dropdown(label="First", choices=names, value=None, min_width=260, elem_id="compare-first")
            self.second = gr.Dropdown(
                label="Second", choices=names, value=None, min_width=260, elem_id="compare-second"
            )
        self.gains = html("compare-gains")
        labels = {kind: f"{words[0].upper()}{words[1:]}" for kind, words in OUTCOMES.items()}
        self.problems = CardList("compare", labels, "Problems")
        self.problems.cards("problems")
        self.outputs = [self.gains, *self.problems.outputs]

    def _connect(self) -> None:
        reading: dict[str, Any] = {"api_visibility": "private", "concurrency_limit": 4}
        gr.on(None, self.open_all, [], [self.chosen, self.overview, self.first, self.second, *self.outputs], **reading)
        self.chosen.input(self.draw_overview, self.chosen, self.overview, trigger_mode="always_last", **reading)
        asked = [self.first, self.second, self.problems.filter]
        gr.on(
            [self.first.input, self.second.input, self.problems.filter.input],
            self.list_problems,
            [*asked, self.problems.first, self.problems.first],
            self.outputs,
            trigger_mode="always_last",
            **reading,
        )
        self.problems.connect(self.list_problems, asked, [self.gains], **reading)

    def _find(self) -> tuple[dict[str, StoredEvaluation], list[str]]:
        return find_evaluations(self.library.runs())

    def open_all(self, progress: gr.Progress = gr.Progress()) -> list[Any]:  # noqa: B008
        """The evaluations there are, the first few drawn, a pair of them compared."""
        found, problems = self._find()
        names = list(found)
        shown = names[:SHOWN_AT_FIRST]
        first, second = view.first_pair(found) if found else (None, None)
        return [
            gr.Dropdown(choices=names, value=shown),
            self._overview(found, shown, problems),
            gr.Dropdown(choices=names, value=first),
            gr.Dropdown(choices=names, value=second),
            *self._compare(found, first, second, next(iter(OUTCOMES)), 0, progress),
        ]

    def draw_overview(self, names: Sequence[str] | None) -> Html:
        found, problems = self._find()
        return self._overview(found, [name for name in found if name in (names or ())], problems)

    def list_problems(
        self,
        first: str,
        second: str,
        kind: str,
        number: int,
        turn: int,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> list[Any]:
        """One page of the problems on which two evaluations differ in the chosen way."""
        found = self._find()[0]
        return self._compare(found, first, second, kind, turned(number, turn), progress)

    def _overview(self, found: dict[str, StoredEvaluation], names: Sequence[str], problems: Sequence[str]) -> Html:
        return area(*map(error, problems), view.overview(found, names))

    def _compare(
        self,
        found: dict[str, StoredEvaluation],
        first: str | None,
        second: str | None,
        kind: str,
        number: int,
        progress: gr.Progress,
    ) -> list[Any]:
        """Values of the gains and the list of problems."""
        if not found:
            return ["", *self.problems.message()]
        if not {str(first), str(second)} <= found.keys() or first == second:
            return ["", *self.problems.message(empty(view.CHOOSE_TWO))]
        names = str(first), str(second)
        pair = found[names[0]], found[names[1]]
        try:
            samples = []
            for name, evaluation in zip(names, pair, strict=True):
                report = partial(progress, desc=f"Reading the samples of {name}")
                samples.append(self.reader.read(evaluation, report))
            paired = PairedEvaluations.of(*samples)
            page = view.problem_page(names, pair, paired, kind, number)
        except UserError as problem:
            return ["", *self.problems.message(error(problem))]
        gains = area(view.gains(pair, paired)) if paired.count else ""
        return [gains, *self.problems.show(page, kind)]
