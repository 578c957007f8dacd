"""What the demo shows of evaluations: pass@k of several, and the problems on which two differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby

from mm_agrae.evaluation.paired import OUTCOMES, PairedEvaluations, StoredEvaluation
from mm_agrae.view.components import (
    CardPage,
    EmbeddedImages,
    pass_at_k_plot,
    pass_at_k_table,
    trace_card,
)
from mm_agrae.view.page import Html, el, empty, join, note, percent, tile

CARDS_PER_PAGE = 5
LONGEST = 20_000  # characters shown of one completion

NO_EVALUATION = (
    "No evaluation was found in the given runs. A training run evaluates before and after; "
    "mm-agrae eval MODEL … --out FOLDER evaluates checkpoints side by side, and "
    "mm-agrae demo FOLDER shows them here."
)
CHOOSE_TWO = "Choose two different evaluations of the same problems."


def first_pair(found: Mapping[str, StoredEvaluation]) -> tuple[str, str]:
    """The pair to show first: the first and last of one run on one task, if it has two."""
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
            f"{counts} problems. Bands and ranges are 95 % bootstrap intervals over problems; "
            "dashed: before training."
        )
        parts += [
            el("h3", label),
            el("div", pass_at_k_plot(colored), class_="plots wide"),
            note(about),
            pass_at_k_table(shown),
        ]
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
    number = max(0, min(number, (len(problems) - 1) // CARDS_PER_PAGE))
    start = number * CARDS_PER_PAGE
    shown = problems[start : start + CARDS_PER_PAGE]
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
        cards.append(trace_card(samples[0], images, columns, limit=LONGEST))
    if shown:
        position = f"{start + 1:,} to {start + len(shown):,} of {len(problems):,}"
        heading = note(f"Problems {OUTCOMES[kind]}: {position}. One sample of each is shown.")
    else:
        heading = empty(f"No problem is {OUTCOMES[kind]}.")
    return CardPage(
        join([heading, *cards]),
        {name: len(found) for name, found in paired.by_outcome.items()},
        number,
        start + CARDS_PER_PAGE < len(problems),
    )
