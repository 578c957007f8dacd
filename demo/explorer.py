"""Run explorer: the course of a run, how hard its problems are, and every group of every step with its images.

Runs are asked for by the names of a `RunLibrary`, never by path.
"""

from __future__ import annotations

from typing import Any

import gradio as gr

from mm_agrae.errors import UserError
from mm_agrae.view.demo_pages import curve_panels, difficulty_page, group_page
from mm_agrae.view.demo_settings import DemoSettings
from mm_agrae.view.page import empty, note
from mm_agrae.view.runs import FILTERS, ORDERS, RunLibrary, RunReader

from .elements import CardList, area, error, html, turned

SECONDS_BETWEEN_LOOKS = 3.0
MOST_SMOOTHING = 100  # steps on either side
ALL, AS_SAMPLED = next(iter(FILTERS)), next(iter(ORDERS))
NO_RUN = (
    "There is no run to look at yet. Name a run folder, or a folder with runs inside, "
    "on the command line: mm-agrae demo RUN"
)


class ExplorerTab:
    """Reads the runs of `settings` and nothing else."""

    def __init__(self, settings: DemoSettings) -> None:
        self.library = RunLibrary(settings.runs)
        self._lay_out()
        self._connect()

    def _lay_out(self) -> None:
        names = list(self.library.runs())
        self.run = gr.Dropdown(label="Run", choices=names, elem_id="explorer-run")
        self.about = html("explorer-about")
        with gr.Accordion("Curves", open=True):
            self.smoothing = gr.Slider(
                *(0, MOST_SMOOTHING),
                step=1,
                label="Smoothing: steps averaged on either side",
                elem_id="explorer-smoothing",
            )
            self.curves = html("explorer-curves")
            with gr.Accordion("More curves", open=False):
                self.more = html("explorer-more")
        # Filled when it is opened, as that reads all rollouts.
        self.difficulty = gr.Accordion("Difficulty", open=False, elem_id="explorer-difficulty")
        with self.difficulty:
            self.problems = html("explorer-problems")
        self.step = gr.Slider(0, 1, step=1, label="Step", elem_id="explorer-step", interactive=False)
        self.follow = gr.Checkbox(label="Follow new steps", elem_id="explorer-follow")
        self.groups = CardList("explorer", {name: name for name in FILTERS}, "Groups")
        with gr.Row():
            self.order = gr.Dropdown(
                list(ORDERS), value=AS_SAMPLED, label="Order", scale=1, min_width=200, elem_id="explorer-order"
            )
            self.text = gr.Textbox(
                label="Search in completions, questions, answers",
                placeholder="words, then Enter",
                submit_btn="Search",
                max_length=500,
                scale=2,
                min_width=280,
                elem_id="explorer-search",
            )
            self.everywhere = gr.Checkbox(label="Search all steps", scale=0, elem_id="explorer-everywhere")
        self.groups.cards("groups")
        self.seen = gr.State(("", ()))
        self.timer = gr.Timer(SECONDS_BETWEEN_LOOKS)

    def _connect(self) -> None:
        reading: dict[str, Any] = {"api_visibility": "private", "concurrency_limit": 4}
        quiet = reading | {"show_progress": "minimal"}
        latest = quiet | {"trigger_mode": "always_last"}
        curves = [self.about, self.curves, self.more]
        filters = [self.run, self.step, self.groups.filter, self.order, self.text, self.everywhere]
        gr.on(
            None,
            self.open_run,
            [self.run],
            [
                *(self.run, *curves, self.difficulty, self.problems, self.smoothing, self.step, self.follow),
                *(self.order, self.text, self.everywhere, *self.groups.outputs, self.seen),
            ],
            **reading,
        )
        self.difficulty.expand(self.show_difficulty, self.run, self.problems, **reading)
        # Following stops as soon as someone looks at something else.
        elsewhere = [*(self.step.input, self.text.submit), *(self.groups.back.click, self.groups.onward.click)]
        gr.on(elsewhere, lambda: False, None, self.follow, queue=False, **quiet)
        gr.on(
            [self.step.input, self.smoothing.input],
            self.draw_curves,
            [self.run, self.step, self.smoothing],
            curves,
            **latest,
        )
        # Whoever chooses a step wants to see it: that ends a search over all.
        self.step.input(lambda: False, None, self.everywhere, queue=False, **quiet)
        asking = [self.groups.filter.input, self.order.input, self.text.submit, self.everywhere.input]
        for events, asked in ((asking, filters), ([self.step.input], [*filters[:-1], gr.State(False)])):
            gr.on(
                events, self.list_groups, [*asked, self.groups.first, self.groups.first], self.groups.outputs, **latest
            )
        self.groups.connect(self.list_groups, filters, **quiet)
        self.timer.tick(
            self.look_again,
            [self.seen, self.smoothing, self.follow, *filters],
            [*curves, self.step, *self.groups.outputs, self.seen],
            **(reading | {"show_progress": "hidden"}),
        )

    def open_run(
        self,
        name: str | None,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> list[Any]:
        """Everything about a run, at its latest step."""
        names = list(self.library.runs())
        name = name if name in names else self.library.first()
        chooser = gr.Dropdown(choices=names, value=name)
        reset = [gr.Dropdown(value=AS_SAMPLED), gr.Textbox(value=""), False]
        try:
            if name is None:
                return [chooser, *_no_run(empty(NO_RUN)), *reset, *self.groups.message(), ("", ())]
            progress(0.1, desc="Reading the run")
            run = self.library.open(name)
            stamp = run.refresh()
            reach = len(run.metrics) // 30
            newest = run.steps[-1] if run.steps else None
            measured = run.only_evaluations() and (run.folder.path / "difficulty.json").is_file()
            progress(0.5, desc="Reading the newest step")
            return [
                chooser,
                *_curves(run, newest, reach),
                gr.Accordion(open=measured),
                self.show_difficulty(name) if measured else "",
                gr.Slider(value=min(reach, MOST_SMOOTHING)),
                _slider(run, newest),
                not stamp[-1],
                *reset,
                *self._groups(run, newest, ALL, AS_SAMPLED, "", False, 0),
                (name, stamp),
            ]
        except UserError as problem:
            seen = (name, ())
            return [chooser, *_no_run(error(problem)), *reset, *self.groups.message(), seen]

    def list_groups(
        self, name: str, step: float, show: str, order: str, text: str, everywhere: bool, number: int, turn: int
    ) -> list[Any]:
        """The groups of a step, or of all, that pass the filters, one page of them."""
        try:
            run = self.library.open(name)
            return self._groups(run, run.nearest(step), show, order, text, everywhere, turned(number, turn))
        except UserError as problem:
            return self.groups.message(error(problem), show)

    def draw_curves(self, name: str, step: float, reach: float) -> list[Any]:
        """The curves with the step marked."""
        try:
            run = self.library.open(name)
            return _curves(run, run.nearest(step), reach)
        except UserError as problem:
            return [area(error(problem)), "", ""]

    def show_difficulty(self, name: str | None) -> str:
        """How hard the problems of the run are, of those steps that were kept until now."""
        try:
            return area(difficulty_page(self.library.open(name)))
        except UserError as problem:
            return area(error(problem))

    def look_again(
        self,
        seen: tuple[str, tuple[int, ...]],
        reach: float,
        follow: bool,
        name: str | None,
        step: float,
        show: str,
        order: str,
        text: str,
        everywhere: bool,
    ) -> list[Any]:
        """What has been written since the last look; nothing is redrawn if there is nothing."""
        same_groups = [gr.skip()] * len(self.groups.outputs)
        untouched = [*[gr.skip()] * 4, *same_groups, gr.skip()]
        if not name:
            return untouched
        try:
            run = self.library.open(name)
            stamp = run.refresh()
            if (name, tuple(stamp)) == (seen[0], tuple(seen[1])):
                return untouched
            newest = run.steps[-1] if run.steps else None
            shown = newest if follow else run.nearest(step)
            move = follow or not any(seen[1])
            groups = self._groups(run, shown, show, order, text, everywhere, 0) if move else same_groups
            return [*_curves(run, shown, reach), _slider(run, shown, move=move), *groups, (name, stamp)]
        except UserError as problem:
            return [area(error(problem)), *untouched[1:]]

    def _groups(self, run: RunReader, step: int | None, show: str, *asked: Any) -> list[Any]:
        try:
            return self.groups.show(group_page(run, step, show, *asked), show)
        except UserError as problem:
            return self.groups.message(error(problem), show)


def _no_run(message: Any) -> list[Any]:
    """Values of about, curves, more, difficulty, problems, smoothing, step and follow."""
    return [area(message), "", "", gr.Accordion(open=False), "", gr.Slider(value=0), _slider(None, None), False]


def _slider(run: RunReader | None, step: int | None, *, move: bool = True) -> Any:
    """From the first kept step to the last. Without `move` it stays where the user has put it."""
    if run is None or step is None:
        return gr.Slider(minimum=0, maximum=1, step=1, value=0, interactive=False, label="Step")
    first, last = run.steps[0], run.steps[-1]
    settings: dict[str, Any] = {"value": step} if move else {}
    return gr.Slider(
        minimum=first,
        maximum=max(last, first + 1),
        step=run.stride,
        interactive=len(run.steps) > 1,
        label=f"Step ({len(run.steps):,} kept, from {first:,} to {last:,})",
        **settings,
    )


def _curves(run: RunReader, step: int | None, reach: float) -> list[Any]:
    """Values of about, curves and more."""
    about = area(note(run.progress()))
    if not run.metrics:
        return [about, "", ""]
    return [about, *map(area, curve_panels(run, step, reach))]
