"""Progress bars on a terminal; plain lines where there is none. Quiet on all but one process."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table


class Reporter:
    """What a person sees of a run."""

    def __init__(self, enabled: bool = True):
        self.enabled = enabled
        self.console = Console(quiet=not enabled, highlight=False, soft_wrap=True)
        self._bars: Progress | None = None

    def say(self, text: str) -> None:
        self.console.print(text, markup=False)

    def table(self, title: str, columns: list[str], rows: list[list[str]]) -> None:
        table = Table(title=title, title_justify="left", title_style="bold")
        for index, column in enumerate(columns):
            table.add_column(column, justify="left" if index == 0 else "right")
        for row in rows:
            table.add_row(*row)
        self.console.print(table)

    @contextmanager
    def bars(self) -> Iterator[None]:
        """Show bars until the block ends; what is printed meanwhile goes above them."""
        if not (self.enabled and sys.stdout.isatty()):
            yield
            return
        with Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
        ) as self._bars:
            try:
                yield
            finally:
                self._bars = None

    @contextmanager
    def bar(self, name: str, total: int, keep: bool = False) -> Iterator[Callable[[int], None]]:
        """A bar of `total` units; the value is called with the units just finished."""
        bars = self._bars
        if bars is None:
            yield _ignore
            return
        task: Any = bars.add_task(name, total=total)
        try:
            yield lambda units: bars.advance(task, units)
        finally:
            if not keep:
                bars.remove_task(task)


def _ignore(units: int) -> None:
    pass
