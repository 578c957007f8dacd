"""Progress bars on a terminal; plain lines where there is none. Quiet on all but one process."""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich import progress
from rich.console import Console
from rich.table import Table


class Reporter:
    """What a person sees of a run."""

    def __init__(self, enabled: bool = True):
        self.enabled = enabled
        self.console = Console(quiet=not enabled, highlight=False, soft_wrap=True)
        self._bars: progress.Progress | None = None

    def say(self, text: str) -> None:
        self.console.print(text, markup=False)

    def table(self, title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
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
    def bar(self, name: str, total: int, keep: bool = False) -> Iterator[Callable[[int], None]]:
        """A bar of `total` units; the value is called with the units just finished."""
        bars = self._bars
        if bars is None:
            yield lambda units: None
            return
        task: Any = bars.add_task(name, total=total)
        try:
            yield lambda units: bars.advance(task, units)
        finally:
            if not keep:
                bars.remove_task(task)
