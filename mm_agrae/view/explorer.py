"""What the run explorer shows: the curves of a run, and the groups of a step page by page.

Images are embedded, so the browser never requests a file.
"""

from __future__ import annotations

from collections.abc import Sequence

from mm_agrae.view.components import (
    ADVANTAGES,
    FIRST_CURVES,
    CardPage,
    EmbeddedImages,
    curve_figures,
    group_card,
)
from mm_agrae.view.page import Html, el, empty, join, note
from mm_agrae.view.runs import FILTERS, GroupOverview, RunReader, select

GROUPS_PER_PAGE = 8
COMPLETIONS_PER_PAGE = 128
CHARACTERS_PER_PAGE = 1_500_000
SHORTEST, LONGEST = 2_400, 40_000  # characters shown of one completion, depending on their number

NO_STEP = "No step has been finished yet. This page updates by itself."
ONLY_EVALUATIONS = "There was no training here; see Compare for the evaluations."
NO_ROLLOUTS = "This run kept no completions (log.rollouts is off); its curves are above."


def curve_panels(run: RunReader, step: int | None, reach: float) -> tuple[Html, Html]:
    """The first curves and the others, with `step` marked; see `curve_figures`."""
    figures, constant = curve_figures(run.metrics, reach=reach, mark=step)
    return (
        el("div", *figures[:FIRST_CURVES], class_="plots"),
        join(
            [
                el("div", *figures[FIRST_CURVES:], class_="plots"),
                note(constant) if constant else None,
            ]
        ),
    )


def group_page(
    run: RunReader, step: int | None, show: str, order: str, text: str, number: int
) -> CardPage:
    """The groups of a step that pass a filter and contain `text`. Raises RunFolderError."""
    if step is None:
        if run.metrics:
            return CardPage(empty(NO_ROLLOUTS))
        return CardPage(empty(ONLY_EVALUATIONS if run.only_evaluations() else NO_STEP))
    groups = run.groups(step)
    chosen = select(groups, show, order)
    matches: set[int] = set()
    if text.strip():
        matches = run.search(step, text.strip())
        chosen = [group for group in chosen if matches.intersection(group.rows)]
    largest = max((len(group.rows) for group in groups), default=1)
    size = max(1, min(GROUPS_PER_PAGE, COMPLETIONS_PER_PAGE // largest))
    number = max(0, min(number, (len(chosen) - 1) // size))
    start = number * size
    shown = chosen[start : start + size]
    if shown:
        completions = sum(len(group.rows) for group in groups)
        heading = note(
            f"Step {step:,}: {len(groups):,} groups, {completions:,} completions; "
            f"showing {start + 1:,} to {start + len(shown):,} of {len(chosen):,}. {ADVANTAGES}"
        )
    else:
        heading = empty(f"None of the {len(groups):,} groups of step {step:,} matches.")
    return CardPage(
        join([heading, *_cards(run, step, shown, matches)]),
        {name: len(select(groups, name)) for name in FILTERS},
        number,
        start + size < len(chosen),
    )


def _cards(
    run: RunReader, step: int, shown: Sequence[GroupOverview], matches: set[int]
) -> list[Html]:
    completions = sum(len(group.rows) for group in shown) or 1
    limit = max(SHORTEST, min(LONGEST, CHARACTERS_PER_PAGE // completions))
    images = EmbeddedImages(run.folder)
    cards = []
    for group, records in zip(shown, run.rows(step, shown), strict=True):
        opened = [index for index, row in enumerate(group.rows) if row in matches]
        cards.append(group_card(records, images, limit=limit, opened=opened))
    return cards
