"""Progress bars on a terminal; plain lines where there is none. Quiet on all but one process."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich import progress
from rich.console import Console
from rich.table import Table

MOST_COLUMNS = 80
"""A wider table is continued below, with its first column repeated."""
LINE_EVERY_S = 30.0
"""Where there is no terminal, a bar that has no other lines becomes one so often."""


class Reporter:
    """What a person sees of a run."""

    def __init__(self, enabled: bool = True):
        self.enabled = enabled
        self.console = Console(quiet=not enabled, highlight=False, soft_wrap=True)
        self._bars: progress.Progress | None = None

    def say(self, text: str) -> None:
        self.console.print(text, markup=False)

    def table(self, title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        cells = [*zip(columns, *rows, strict=True)]  # by column
        widths = [max(map(len, column)) + 3 for column in cells]
        start = 1
        while start < len(columns):
            end = start + 1
            while end < len(columns) and 1 + widths[0] + sum(widths[start : end + 1]) <= MOST_COLUMNS:
                end += 1
            table = Table(title=title if start == 1 else None, title_justify="left", title_style="bold")
            table.add_column(cells[0][0])
            for name, *_ in cells[start:end]:
                table.add_column(name, justify="right")
            for row in zip(cells[0][1:], *(column[1:] for column in cells[start:end]), strict=True):
                table.add_row(*row)
            self.console.print(table)
            start = end

    @contextmanager
    def bars(self) -> Iterator[None]:
        """Show bars until the block ends; what is printed meanwhile goes above them."""
        if not (self.enabled and sys.stdout.isatty()):
            yield
            return
        with progress.Progress(
            progress.SpinnerColumn(),
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TimeElapsedColumn(),
            progress.TimeRemainingColumn(),
            console=self.console,
        ) as self._bars:
            try:
                yield
            finally:
                self._bars = None

    @contextmanager
    def bar(self, name: str, total: int, keep: bool = False, lines: bool = False) -> Iterator[Callable[[int], None]]:
        """A bar of `total` units; the value is called with the units just finished.

        `lines`: without a terminal, say now and then how far it is.
        """
        bars = self._bars
        if bars is None:
            yield self._lines(name, total) if lines else lambda units: None
            return
        task: Any = bars.add_task(name, total=total)
        try:
            yield lambda units: bars.advance(task, units)
        finally:
            if not keep:
                bars.remove_task(task)

    def _lines(self, name: str, total: int) -> Callable[[int], None]:
        done, began = 0, time.monotonic()
        said = began

        def advance(units: int) -> None:
            nonlocal done, said
            done, now = done + units, time.monotonic()
            if now - said >= LINE_EVERY_S:
                said = now
                self.say(f"{name}: {done:,} of {total:,} in {now - began:.0f} s")

        return advance
