"""What two of the demo's tabs show: a run's curves, difficulties and groups, and evaluations side by side.

Images are embedded, so the browser never requests a file.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import chain, groupby
from typing import TypeVar

from mm_agrae.evaluation.paired import OUTCOMES, PairedEvaluations, StoredEvaluation
from mm_agrae.view.components import (
    ADVANTAGES,
    FIRST_CURVES,
    EmbeddedImages,
    curve_figures,
    group_card,
    measured_difficulty,
    pass_at_k_plot,
    pass_at_k_table,
    problem_table,
    trace_card,
)
from mm_agrae.view.page import Html, el, empty, join, note, percent, tile
from mm_agrae.view.replay import StepReplay
from mm_agrae.view.runs import FILTERS, MOST_FOUND, Found, RunReader, select

GROUPS_PER_PAGE = 8
COMPLETIONS_PER_PAGE = 128
CHARACTERS_PER_PAGE = 1_500_000
SHORTEST, LONGEST = 2_400, 40_000  # characters shown of one completion, depending on their number
PAIRS_PER_PAGE = 5
LONGEST_OF_PAIR = 20_000

NO_STEP = "No step has been finished yet. This page updates by itself."
ONLY_EVALUATIONS = "There was no training here; see Compare for the evaluations."
NO_ROLLOUTS = "This run kept no completions (log.rollouts is off); its curves are above."
NO_DIFFICULTY = "How hard the problems are is not known: no completions were kept, nor was mm-agrae difficulty run."
NO_EVALUATION = (
    "No evaluation was found in the given runs. A training run evaluates before and after; "
    "mm-agrae eval MODEL … --out FOLDER evaluates checkpoints side by side, and "
    "mm-agrae demo FOLDER shows them here."
)
CHOOSE_TWO = "Choose two different evaluations of the same problems."

Item = TypeVar("Item")


@dataclass(frozen=True)
class CardPage:
    """One page of a list of cards. `counts`: how many items pass each filter."""

    body: Html
    counts: Mapping[str, int] = field(default_factory=dict)
    number: int = 0
    has_next: bool = False


def _page(items: Sequence[Item], number: int, size: int) -> tuple[int, Sequence[Item], str]:
    """The existing page nearest to `number`, its items, and which of all they are, in words."""
    number = max(0, min(number, (len(items) - 1) // size))
    start = number * size
    shown = items[start : start + size]
    return number, shown, f"{start + 1:,} to {start + len(shown):,} of {len(items):,}"


def curve_panels(run: RunReader, step: int | None, reach: float) -> tuple[Html, Html]:
    """The first curves and the others, with `step` marked; see `curve_figures`."""
    figures, constant = curve_figures(run.metrics, reach=reach, mark=step)
    more = el("div", *figures[FIRST_CURVES:], class_="plots")
    return el("div", *figures[:FIRST_CURVES], class_="plots"), join([more, constant])


def difficulty_page(run: RunReader) -> Html:
    """What `mm-agrae difficulty` measured, and how often each problem was solved. Raises RunFolderError."""
    parts = measured_difficulty(run.folder)
    if run.steps:
        title, problems = problem_table(run.folder)
        parts += [el("h4", title), problems]
    return join(parts) if parts else empty(NO_DIFFICULTY)


def group_page(
    run: RunReader, step: int | None, show: str, order: str, text: str, everywhere: bool, number: int
) -> CardPage:
    """The groups of a step, or `everywhere`, that pass a filter and contain `text`. Raises RunFolderError."""
    if step is None:
        if run.metrics:
            return CardPage(empty(NO_ROLLOUTS))
        return CardPage(empty(ONLY_EVALUATIONS if run.only_evaluations() else NO_STEP))
    text, everywhere = text.strip(), everywhere and bool(text.strip())
    groups = [] if everywhere else run.groups(step)
    found = run.find(text, run.steps if everywhere else [step]) if text else Found(groups)
    groups = found.groups if everywhere else groups
    chosen = select(found.groups, show, order)
    largest = max((len(group.rows) for group in groups), default=1)
    size = max(1, min(GROUPS_PER_PAGE, COMPLETIONS_PER_PAGE // largest))
    number, shown, position = _page(chosen, number, size)
    if everywhere:
        heading = note(f"{_found(found, len(run.steps))} Showing {position if shown else 'none of them'}.")
    elif shown:
        completions = sum(len(group.rows) for group in groups)
        heading = note(
            f"Step {step:,}: {len(groups):,} groups, {completions:,} completions; showing {position}. {ADVANTAGES}"
        )
    else:
        heading = empty(f"None of the {len(groups):,} groups of step {step:,} matches.")
    on_page = sum(len(group.rows) for group in shown) or 1
    limit = max(SHORTEST, min(LONGEST, CHARACTERS_PER_PAGE // on_page))
    images = EmbeddedImages(run.folder)
    cards = list[Html]()
    replay = cache(partial(StepReplay.of, run))
    read = (run.rows(each, same) for each, same in groupby(shown, key=lambda group: group.step))
    for group, records in zip(shown, chain.from_iterable(read), strict=True):
        opened = [index for index, row in enumerate(group.rows) if (group.step, row) in found.rows]
        if everywhere:
            cards.append(el("h4", f"Step {group.step:,}"))
        cards.append(group_card(records, images, limit=limit, opened=opened, replay=replay(group.step)))
    counts = {name: len(select(groups, name)) for name in FILTERS}
    return CardPage(join([heading, *cards]), counts, number, (number + 1) * size < len(chosen))


def _found(found: Found, steps: int) -> str:
    """What a search over all steps has read and found, and where it ended."""
    ended = f"as {MOST_FOUND} end the search, only the newest {found.searched:,} of"
    read = f"{'all' if found.searched == steps else ended} {steps:,} steps were searched"
    damaged = f"; {found.damaged:,} of them cannot be read" if found.damaged else ""
    return f"{len(found.groups):,} groups contain it, newest step first; {read}{damaged}."


def first_pair(found: Mapping[str, StoredEvaluation]) -> tuple[str, str]:
    """The pair to show first: the first and last of one run on one task, if it has two."""
    alike: dict[object, list[str]] = {}
    for name, evaluation in found.items():
        alike.setdefault((evaluation.folder.path, evaluation.result.label), []).append(name)
    names = next((names for names in alike.values() if len(names) > 1), list(found))
    return names[0], names[-1]


def overview(found: Mapping[str, StoredEvaluation], names: Sequence[str]) -> Html:
    """For each task, curves and a table of the chosen evaluations."""
    if not found:
        return empty(NO_EVALUATION)
    if not names:
        return empty("Choose at least one evaluation.")

    def task(name: str) -> str:
        return found[name].result.label

    parts = []
    for label, group in groupby(sorted(names, key=task), key=task):
        shown = [(name.removesuffix(f" · {label}"), found[name].result) for name in group]
        colored = [(name, result, color) for color, (name, result) in enumerate(shown)]
        problems = sorted({result.problems for _, result in shown})
        counts = " or ".join(f"{count:,}" for count in problems)
        about = (
            f"{counts} problems. Bands and ranges are 95 % bootstrap intervals over problems; dashed: before training."
        )
        curves = el("div", pass_at_k_plot(colored), class_="plots wide")
        parts += [el("h3", label), curves, note(about), pass_at_k_table(shown)]
    return join(parts)


def gains(pair: tuple[StoredEvaluation, StoredEvaluation], paired: PairedEvaluations) -> Html:
    """pass@k of the second minus the first, with intervals, on the problems they share."""
    common = set(pair[0].result.pass_at_k) & set(pair[1].result.pass_at_k)
    tiles = []
    for k in sorted({min(common), max(common)} if common else ()):
        gain = paired.gain(k)
        if gain is not None:
            points = f"{100 * gain.mean:+.1f} points"
            interval = f"95 % interval {100 * gain.low:+.1f} to {100 * gain.high:+.1f}"
            tiles.append(tile(f"pass@{k}, second minus first", points, interval))
    about = f"{paired.count:,} problems are in both."
    if paired.mismatched:
        about += f" {paired.mismatched:,} more share an id but not the question; left out."
    return join([note(about), el("div", *tiles, class_="tiles") if tiles else None])


def problem_page(
    names: tuple[str, str],
    pair: tuple[StoredEvaluation, StoredEvaluation],
    paired: PairedEvaluations,
    kind: str,
    number: int,
) -> CardPage:
    """The problems of one of OUTCOMES, with a completion of each. Raises RunFolderError."""
    if not paired.count:
        return CardPage(empty(f"They have no problem in common. {CHOOSE_TWO}"))
    problems = paired.by_outcome[kind]
    number, shown, position = _page(problems, number, PAIRS_PER_PAGE)
    short = [evaluation.result.name for evaluation in pair]
    titles = short if short[0] != short[1] else names
    images = EmbeddedImages(pair[0].folder)
    cards = []
    for problem in shown:
        samples = paired.sample_pair(problem)
        counts = zip(titles, problem.correct, problem.samples, samples, strict=True)
        columns = [
            (f"{title}: {correct} of {total} correct ({percent(correct / total)})", sample)
            for title, correct, total, sample in counts
        ]
        cards.append(trace_card(samples[0], images, columns, limit=LONGEST_OF_PAIR))
    if shown:
        heading = note(f"Problems {OUTCOMES[kind]}: {position}. One sample of each is shown.")
    else:
        heading = empty(f"No problem is {OUTCOMES[kind]}.")
    totals = {name: len(found) for name, found in paired.by_outcome.items()}
    has_next = (number + 1) * PAIRS_PER_PAGE < len(problems)
    return CardPage(join([heading, *cards]), totals, number, has_next)
