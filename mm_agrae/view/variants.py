"""A problem's variants side by side: one HTML page, and a table of what fits how many problems."""

from collections import Counter
from pathlib import Path

from mm_agrae.config import Config
from mm_agrae.config.rollout import VariantsSection
from mm_agrae.progress import Reporter
from mm_agrae.tasks import load_all
from mm_agrae.tasks.variants import Problems
from mm_agrae.view.page import Html, el, join, page
from mm_agrae.view.sample import card, spread, write


def write_variants(config: Config, *, count: int, out: Path) -> Path:
    """Show `count` training problems, spread evenly over the data, with every variant that keeps the answer.

    The table goes to the terminal, the page to `out`. Raises ConfigError and DataError as `Problems`, and for a file
    that cannot be written.
    """
    task = load_all(config.data.train, on_bad_row=config.data.on_bad_row)
    settings = config.rollout.variants or VariantsSection()
    problems = Problems(task, settings, config.train.seed)
    fitting, deltas = Counter[str](), dict[str, int]()
    rows, sections = spread(len(task), count), list[tuple[str, Html | None]]()
    for row in rows:
        [draw, *_] = problems.draws(row, number=row)
        original = problems.example(draw)
        chosen = ", ".join(each.name if each else "itself" for each in problems.choose(row, original, row))
        cards = [card(original, title=f"as it is, D = {draw.difficulty:g}; goes with: {chosen}")]
        for operator in problems.operators(row, original):
            deltas[operator.name] = operator.delta
            fitting[operator.name] += operator.fits(original)
            if operator.fits(original):
                made = problems.made(original, operator, draw)
                cards.append(card(made, title=f"{operator.name}, D {operator.delta:+d}"))
        sections.append((original.id, el("div", join(cards), class_="beside")))
    by_delta = sorted(deltas.items(), key=lambda item: item[1])
    table = [[name, f"{delta:+d}", f"{fitting[name]} of {len(rows)}"] for name, delta in by_delta]
    Reporter().table("Variants", ["operator", "D", "keeps the answer"], table)
    return write(out, page("Variants", el("header", el("h1", "Variants of problems")), sections))
