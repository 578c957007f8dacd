"""Run explorer: how a run went, and every group of every step with its pictures.

Pictures come inside the page, so the browser never asks for a file; runs go by names of the
`Library`, so what it does ask for is never a path.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gradio as gr

from mm_agrae.errors import UserError
from mm_agrae.view.demo_settings import DemoSettings
from mm_agrae.view.page import Html, el, empty, note
from mm_agrae.view.parts import ADVANTAGES, FIRST_CURVES, Pictures, curve_figures, group_card
from mm_agrae.view.runs import FILTERS, ORDERS, Group, Library, RunView, select

from . import style

GROUPS_A_PAGE = 8
COMPLETIONS_A_PAGE = 128
CHARACTERS_A_PAGE = 1_500_000
SHORTEST, LONGEST = 2_400, 40_000  # characters shown of one completion, by how many there are
SECONDS_BETWEEN_LOOKS = 3.0
MOST_SMOOTHING = 100  # steps on either side

ALL, AS_SAMPLED = next(iter(FILTERS)), next(iter(ORDERS))
NO_RUN = (
    "There is no run to look at yet. Name a run folder, or a folder with runs inside, "
    "on the command line: mm-agrae demo RUN"
)
NO_STEP = "No step has been finished yet. This page looks again by itself."
ONLY_EVALUATIONS = "There was no training here; the evaluations are under Compare."
NO_ROLLOUTS = "This run kept no completions (log.rollouts is off); its curves are above."


def build(settings: DemoSettings) -> None:
    """The tab. Reads the runs of `settings` and nothing else."""
    library = Library(settings.runs)

    run = gr.Dropdown(label="Run", choices=list(library.runs()), elem_id="explorer-run")
    about = html("explorer-about")
    with gr.Accordion("Curves", open=True):
        smoothing = gr.Slider(
            *(0, MOST_SMOOTHING),
            step=1,
            label="Smoothing: steps averaged on either side",
            elem_id="explorer-smoothing",
        )
        curves = html("explorer-curves")
        with gr.Accordion("More curves", open=False):
            more = html("explorer-more")
    step = gr.Slider(0, 1, step=1, label="Step", elem_id="explorer-step", interactive=False)
    follow = gr.Checkbox(label="Follow new steps", elem_id="explorer-follow")
    show = gr.Radio(list(FILTERS), value=ALL, label="Groups", elem_id="explorer-show")
    with gr.Row():
        order = gr.Dropdown(
            list(ORDERS),
            value=AS_SAMPLED,
            label="Order",
            scale=1,
            min_width=200,
            elem_id="explorer-order",
        )
        text = gr.Textbox(
            label="Search in completions, questions, answers",
            placeholder="words, then Enter",
            submit_btn="Search",
            max_length=500,
            scale=2,
            min_width=280,
            elem_id="explorer-search",
        )
    cards = html("explorer-cards")
    with gr.Row():
        back = gr.Button("← Previous groups", interactive=False, elem_id="explorer-back")
        onward = gr.Button("Next groups →", interactive=False, elem_id="explorer-next")
    page = gr.State(0)
    seen = gr.State(("", ()))
    timer = gr.Timer(SECONDS_BETWEEN_LOOKS)

    asked = [run, step, show, order, text, page]
    listed = [cards, show, page, back, onward]
    drawn = [about, curves, more]

    def open_run(name: str | None, progress: gr.Progress = gr.Progress()) -> list[Any]:  # noqa: B008
        """Everything about a run, at its latest step."""
        names = list(library.runs())
        name = name if name in names else library.first()
        chooser = gr.Dropdown(choices=names, value=name)
        reset = [gr.Dropdown(value=AS_SAMPLED), gr.Textbox(value="")]
        if name is None:
            nothing = [style.area(empty(NO_RUN)), "", "", _smoothing(0), _slider(None, None), False]
            return [chooser, *nothing, *reset, *_no_cards(""), (name, ())]
        try:
            progress(0.1, desc="Reading the run")
            view = library.open(name)
            stamp = view.refresh()
            reach = len(view.metrics) // 30
            newest = view.steps[-1] if view.steps else None
            progress(0.5, desc="Reading the newest step")
            return [
                chooser,
                *_drawn(view, newest, reach),
                _smoothing(reach),
                _slider(view, newest),
                not stamp[-1],
                *reset,
                *_cards(view, newest, ALL, AS_SAMPLED, "", 0),
                (name, stamp),
            ]
        except UserError as error:
            trouble = [style.error(error), "", "", _smoothing(0), _slider(None, None), False]
            return [chooser, *trouble, *reset, *_no_cards(""), (name, ())]

    def list_groups(
        name: str, step: float, show: str, order: str, text: str, page: int
    ) -> list[Any]:
        """The groups of a step that pass the filters, one page of them."""
        try:
            view = library.open(name)
            return _cards(view, view.nearest(step), show, order, text, page)
        except UserError as error:
            return _no_cards(style.error(error), show)

    def first_page(name: str, step: float, show: str, order: str, text: str) -> list[Any]:
        return list_groups(name, step, show, order, text, 0)

    def page_before(
        name: str, step: float, show: str, order: str, text: str, page: int
    ) -> list[Any]:
        return list_groups(name, step, show, order, text, page - 1)

    def page_after(
        name: str, step: float, show: str, order: str, text: str, page: int
    ) -> list[Any]:
        return list_groups(name, step, show, order, text, page + 1)

    def draw(name: str, step: float, reach: float) -> list[Any]:
        """The curves with the step marked."""
        try:
            view = library.open(name)
            return _drawn(view, view.nearest(step), reach)
        except UserError as error:
            return [style.error(error), "", ""]

    def look_again(
        name: str | None,
        seen: tuple[str, tuple[int, ...]],
        step: float,
        reach: float,
        follow: bool,
        show: str,
        order: str,
        text: str,
        page: int,
    ) -> list[Any]:
        """What has come since the last look; nothing is redrawn if nothing has."""
        untouched = [gr.skip()] * (len(drawn) + 1 + len(listed) + 1)
        if not name:
            return untouched
        try:
            view = library.open(name)
            stamp = view.refresh()
            if (name, tuple(stamp)) == (seen[0], tuple(seen[1])):
                return untouched
            newest = view.steps[-1] if view.steps else None
            shown = newest if follow else view.nearest(step)
            first_one = not any(seen[1])
            listing = (
                _cards(view, shown, show, order, text, 0)
                if follow or first_one
                else [gr.skip()] * len(listed)
            )
            slider = _slider(view, shown, move=follow or first_one)
            return [*_drawn(view, shown, reach), slider, *listing, (name, stamp)]
        except UserError as error:
            return [style.error(error), *untouched[1:]]

    reading: dict[str, Any] = {"api_visibility": "private", "concurrency_limit": 4}
    quiet = reading | {"show_progress": "minimal"}
    opened = [run, *drawn, smoothing, step, follow, order, text, *listed, seen]
    gr.on(None, open_run, [run], opened, **reading)
    # Whoever looks at something of their own is not taken away from it.
    own_way = [step.input, back.click, onward.click, text.submit]
    gr.on(own_way, lambda: False, None, follow, queue=False, **quiet)
    gr.on([step.input], draw, [run, step, smoothing], drawn, trigger_mode="always_last", **quiet)
    gr.on(
        [step.input, show.input, order.input, text.submit],
        first_page,
        asked[:-1],
        listed,
        trigger_mode="always_last",
        **quiet,
    )
    smoothing.input(draw, [run, step, smoothing], drawn, trigger_mode="always_last", **quiet)
    to_the_top = scroll_to("explorer-cards")
    back.click(page_before, asked, listed, **quiet).then(None, js=to_the_top)
    onward.click(page_after, asked, listed, **quiet).then(None, js=to_the_top)
    timer.tick(
        look_again,
        [run, seen, step, smoothing, follow, show, order, text, page],
        [*drawn, step, *listed, seen],
        **(reading | {"show_progress": "hidden"}),
    )


def html(elem_id: str) -> gr.HTML:
    """Where markup of `style.area` goes: no styles or scripts of Gradio's own on it."""
    return gr.HTML(elem_id=elem_id, apply_default_css=False, js_on_load=None)


def scroll_to(elem_id: str) -> str:
    """JavaScript for an event: bring an element's top into view."""
    return f"() => {{ document.getElementById('{elem_id}').scrollIntoView() }}"


def _smoothing(reach: int) -> Any:
    return gr.Slider(value=min(reach, MOST_SMOOTHING))


def _slider(view: RunView | None, step: int | None, *, move: bool = True) -> Any:
    """From the first step kept to the last, in the stride they were kept at.

    Without `move` it stays where it is: someone may have their hand on it.
    """
    if view is None or step is None:
        return gr.Slider(minimum=0, maximum=1, step=1, value=0, interactive=False, label="Step")
    first, last = view.steps[0], view.steps[-1]
    settings: dict[str, Any] = {"value": step} if move else {}
    return gr.Slider(
        minimum=first,
        maximum=max(last, first + 1),
        step=view.stride,
        interactive=len(view.steps) > 1,
        label=f"Step ({len(view.steps):,} kept, from {first:,} to {last:,})",
        **settings,
    )


def _drawn(view: RunView, step: int | None, reach: float) -> list[Any]:
    about = style.area(note(view.progress()))
    if not view.metrics:
        return [about, "", ""]
    figures, same = curve_figures(view.metrics, reach=reach, mark=step)
    first, rest = figures[:FIRST_CURVES], figures[FIRST_CURVES:]
    return [
        about,
        style.area(el("div", *first, class_="plots")),
        style.area(el("div", *rest, class_="plots"), note(same) if same else None),
    ]


def _cards(
    view: RunView, step: int | None, show: str, order: str, text: str, page: int
) -> list[Any]:
    """Values of: the cards, the filters with their counts, the page, its two buttons."""
    if step is None:
        only = view.only_evaluations()
        why = NO_ROLLOUTS if view.metrics else ONLY_EVALUATIONS if only else NO_STEP
        return _no_cards(style.area(empty(why)), show)
    try:
        groups = view.groups(step)
        chosen = select(groups, show, order)
        places: set[int] = set()
        if text.strip():
            places = view.search(step, text.strip())
            chosen = [group for group in chosen if places.intersection(group.rows)]
        size = _page_size(groups)
        page = max(0, min(page, (len(chosen) - 1) // size))
        shown = chosen[page * size : (page + 1) * size]
        body = style.area(
            _heading(step, groups, chosen, shown, page * size),
            *_group_cards(view, step, shown, places),
        )
    except UserError as error:
        return _no_cards(style.error(error), show)
    more = (page + 1) * size < len(chosen)
    return [
        body,
        gr.Radio(choices=_counted(groups), value=show),
        page,
        gr.Button(interactive=page > 0),
        gr.Button(interactive=more),
    ]


def _no_cards(message: Html | str, show: str = ALL) -> list[Any]:
    button = gr.Button(interactive=False)
    return [message, gr.Radio(choices=list(FILTERS), value=show), 0, button, button]


def _counted(groups: Sequence[Group]) -> list[tuple[str, str]]:
    return [(f"{name} ({len(select(groups, name)):,})", name) for name in FILTERS]


def _page_size(groups: Sequence[Group]) -> int:
    largest = max((len(group.rows) for group in groups), default=1)
    return max(1, min(GROUPS_A_PAGE, COMPLETIONS_A_PAGE // largest))


def _heading(
    step: int, groups: Sequence[Group], chosen: Sequence[Group], shown: Sequence[Group], start: int
) -> Html:
    if not chosen:
        return empty(f"No group of step {step:,} is like that; {len(groups):,} are not.")
    completions = sum(len(group.rows) for group in groups)
    place = f"{start + 1:,} to {start + len(shown):,} of {len(chosen):,}"
    return note(
        f"Step {step:,}: {len(groups):,} groups, {completions:,} completions; "
        f"shown are {place}. {ADVANTAGES}"
    )


def _group_cards(view: RunView, step: int, shown: Sequence[Group], places: set[int]) -> list[Html]:
    completions = sum(len(group.rows) for group in shown) or 1
    limit = max(SHORTEST, min(LONGEST, CHARACTERS_A_PAGE // completions))
    pictures = Pictures(view.folder)
    cards = []
    for group, rows in zip(shown, view.rows(step, shown), strict=True):
        found = [index for index, place in enumerate(group.rows) if place in places]
        cards.append(group_card(rows, pictures, limit=limit, opened=found))
    return cards
