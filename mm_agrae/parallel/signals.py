"""Ctrl-C and SIGTERM: finish the step and save, instead of ending at once."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any


class StopRequest:
    """Whether the run was asked to stop. `on_request` is called when it first is."""

    def __init__(self, on_request: Callable[[], None]):
        self.requested = False
        self._on_request = on_request

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """While active, the first SIGINT or SIGTERM asks for a stop; the second raises."""
        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread receives signals
            return

        def ask(number: int, frame: Any) -> None:
            if self.requested:
                raise KeyboardInterrupt
            self.requested = True
            self._on_request()

        earlier = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in earlier.items():
                signal.signal(number, handler)
