"""Compare: pass@k of several evaluations, and the problems on which two of them differ."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import groupby
from typing import Any

import gradio as gr

from mm_agrae.errors import UserError
from mm_agrae.evaluation.paired import (
    OUTCOMES,
    PairedEvaluations,
    SampleCache,
    StoredEvaluation,
    find_evaluations,
)
from mm_agrae.view.demo_settings import DemoSettings
from mm_agrae.view.page import Html, el, empty, note, percent, tile
from mm_agrae.view.parts import Pictures, pass_at_k_plot, pass_at_k_table, trace_card
from mm_agrae.view.runs import Library

from . import style
from .explorer import html, scroll_to

CARDS_A_PAGE = 5
LONGEST = 20_000  # characters shown of one completion
SHOWN_AT_FIRST = 6

NO_EVALUATION = (
    "No evaluation was found in the runs given. A training run evaluates before and after; "
    "mm-agrae eval MODEL … --out FOLDER evaluates checkpoints side by side, and "
    "mm-agrae demo FOLDER shows them here."
)
CHOOSE_TWO = "Choose two different evaluations of the same problems."


def build(settings: DemoSettings) -> None:
    """The tab. Reads the runs of `settings` and nothing else."""
    library = Library(settings.runs)
    reader = SampleCache()

    names = list(find_evaluations(library.runs())[0])
    chosen = gr.Dropdown(
        label="Evaluations", choices=names, value=[], multiselect=True, elem_id="compare-chosen"
    )
    overview = html("compare-overview")
    gr.Markdown("### Problem by problem")
    with gr.Row():
        first = gr.Dropdown(
            label="First", choices=names, value=None, min_width=260, elem_id="compare-first"
        )
        second = gr.Dropdown(
            label="Second", choices=names, value=None, min_width=260, elem_id="compare-second"
        )
    gains = html("compare-gains")
    kind = gr.Radio(_labels(), value=next(iter(OUTCOMES)), label="Problems", elem_id="compare-kind")
    cards = html("compare-cards")
    with gr.Row():
        back = gr.Button("← Previous problems", interactive=False, elem_id="compare-back")
        onward = gr.Button("Next problems →", interactive=False, elem_id="compare-next")
    page = gr.State(0)
    listed = [gains, kind, cards, page, back, onward]

    def evaluations() -> tuple[dict[str, StoredEvaluation], list[str]]:
        return find_evaluations(library.runs())

    def open_all(progress: gr.Progress = gr.Progress()) -> list[Any]:  # noqa: B008
        """The evaluations there are, the first few drawn, the ends of the first run compared."""
        found, troubles = evaluations()
        names = list(found)
        drawn = _overview(found, names[:SHOWN_AT_FIRST], troubles)
        if not names:
            nothing = gr.Dropdown(choices=[], value=None)
            empties = [gr.Dropdown(choices=[], value=[]), drawn, nothing, nothing]
            return [*empties, *_nothing("")]
        ends = _ends(found)
        return [
            gr.Dropdown(choices=names, value=names[:SHOWN_AT_FIRST]),
            drawn,
            gr.Dropdown(choices=names, value=ends[0]),
            gr.Dropdown(choices=names, value=ends[1]),
            *pair_up(*ends, next(iter(OUTCOMES)), 0, progress, found),
        ]

    def draw(names: Sequence[str]) -> Html:
        found, troubles = evaluations()
        return _overview(found, [name for name in found if name in (names or ())], troubles)

    def pair_up(
        one: str,
        other: str,
        kind: str,
        page: int,
        progress: gr.Progress,
        found: dict[str, StoredEvaluation] | None = None,
    ) -> list[Any]:
        found = found or evaluations()[0]
        if not {str(one), str(other)} <= found.keys() or one == other:
            return _nothing(style.area(empty(CHOOSE_TWO)))
        pair = found[one], found[other]
        try:
            samples = []
            for name, evaluation in zip((one, other), pair, strict=True):
                report = partial(progress, desc=f"Reading the samples of {name}")
                samples.append(reader.read(evaluation, report))
            result = PairedEvaluations.of(*samples)
            return _paired_problems((one, other), pair, result, kind, page)
        except UserError as error:
            return _nothing(style.error(error))

    def choose(
        one: str,
        other: str,
        kind: str,
        page: int,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> list[Any]:
        return pair_up(one, other, kind, 0, progress)

    def page_before(
        one: str,
        other: str,
        kind: str,
        page: int,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> list[Any]:
        return pair_up(one, other, kind, page - 1, progress)

    def page_after(
        one: str,
        other: str,
        kind: str,
        page: int,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> list[Any]:
        return pair_up(one, other, kind, page + 1, progress)

    reading: dict[str, Any] = {"api_visibility": "private", "concurrency_limit": 4}
    asked = [first, second, kind, page]
    gr.on(None, open_all, [], [chosen, overview, first, second, *listed], **reading)
    chosen.input(draw, chosen, overview, trigger_mode="always_last", **reading)
    gr.on(
        [first.input, second.input, kind.input],
        choose,
        asked,
        listed,
        trigger_mode="always_last",
        **reading,
    )
    to_the_top = scroll_to("compare-cards")
    back.click(page_before, asked, listed, **reading).then(None, js=to_the_top)
    onward.click(page_after, asked, listed, **reading).then(None, js=to_the_top)


def _ends(found: dict[str, StoredEvaluation]) -> tuple[str, str]:
    """The two to begin with: the first and the last of one run on one task, if it has two."""
    keys = {
        name: (evaluation.folder.path, evaluation.result.label)
        for name, evaluation in found.items()
    }
    names = list(found)
    for name in names:
        alike = [other for other in names if keys[other] == keys[name]]
        if len(alike) > 1:
            return alike[0], alike[-1]
    return names[0], names[-1]


def _overview(
    found: dict[str, StoredEvaluation], names: Sequence[str], troubles: Sequence[str]
) -> Html:
    """Curves and a table for each task."""
    parts = [style.error(trouble) for trouble in troubles]
    if not found:
        return style.area(*parts, empty(NO_EVALUATION))
    if not names:
        return style.area(*parts, empty("Choose one evaluation or more."))

    def task(name: str) -> str:
        return found[name].result.label

    for label, group in groupby(sorted(names, key=task), key=task):
        shown = [(name.removesuffix(f" · {label}"), found[name].result) for name in group]
        colored = [(name, result, color) for color, (name, result) in enumerate(shown)]
        problems = sorted({result.problems for _, result in shown})
        counts = " or ".join(f"{count:,}" for count in problems)
        about = (
            f"{counts} problems. Bands and ranges are 95 % bootstrap intervals over problems; "
            "dashed: before training."
        )
        parts += [
            el("h3", label),
            el("div", pass_at_k_plot(colored), class_="plots wide"),
            note(about),
            pass_at_k_table(shown),
        ]
    return style.area(*parts)


def _paired_problems(
    names: Sequence[str],
    pair: tuple[StoredEvaluation, StoredEvaluation],
    paired: PairedEvaluations,
    kind: str,
    page: int,
) -> list[Any]:
    """Values of: the gains, the kinds with their counts, the cards, the page, its two buttons."""
    if not paired.count:
        return _nothing(style.area(empty(f"They have no problem in common. {CHOOSE_TWO}")))
    problems = paired.by_outcome[kind]
    page = max(0, min(page, (len(problems) - 1) // CARDS_A_PAGE))
    start = page * CARDS_A_PAGE
    shown = problems[start : start + CARDS_A_PAGE]
    short = [evaluation.result.name for evaluation in pair]
    titles = short if short[0] != short[1] else names
    pictures = Pictures(pair[0].folder)
    cards = []
    for problem in shown:
        rows = paired.sample_pair(problem)
        counts = zip(titles, problem.correct, problem.samples, rows, strict=True)
        columns = [
            (f"{title}: {right} of {samples} right ({percent(right / samples)})", row)
            for title, right, samples, row in counts
        ]
        cards.append(trace_card(rows[0], pictures, columns, limit=LONGEST))
    place = f"{start + 1:,} to {start + len(shown):,} of {len(problems):,}"
    heading = (
        note(f"Problems {OUTCOMES[kind]}: {place}. One sample of each is shown.")
        if shown
        else empty(f"No problem is {OUTCOMES[kind]}.")
    )
    more = start + CARDS_A_PAGE < len(problems)
    return [
        _gains(pair, paired),
        gr.Radio(choices=_labels(paired), value=kind),
        style.area(heading, *cards),
        page,
        gr.Button(interactive=page > 0),
        gr.Button(interactive=more),
    ]


def _gains(pair: tuple[StoredEvaluation, StoredEvaluation], paired: PairedEvaluations) -> Html:
    common = set(pair[0].result.pass_at_k) & set(pair[1].result.pass_at_k)
    tiles = []
    for k in sorted({min(common), max(common)} if common else ()):
        gain = paired.gain(k)
        if gain is not None:
            points = f"{100 * gain.mean:+.1f} points"
            interval = f"95 % interval {100 * gain.low:+.1f} to {100 * gain.high:+.1f}"
            tiles.append(tile(f"pass@{k}, second minus first", points, interval))
    about = f"On {paired.count:,} problems both were asked."
    if paired.mismatched:
        about += f" {paired.mismatched:,} more share an id but not the question; left out."
    return style.area(note(about), el("div", *tiles, class_="tiles") if tiles else None)


def _nothing(message: Html | str) -> list[Any]:
    button = gr.Button(interactive=False)
    return ["", gr.Radio(choices=_labels()), message, 0, button, button]


def _labels(paired: PairedEvaluations | None = None) -> list[tuple[str, str]]:
    labels = []
    for kind, words in OUTCOMES.items():
        count = f" ({len(paired.by_outcome[kind]):,})" if paired else ""
        labels.append((f"{words[0].upper()}{words[1:]}{count}", kind))
    return labels
