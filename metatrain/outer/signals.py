"""Ctrl-C and SIGTERM during a run: they interrupt a generation, but nothing that is being written."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class Interrupts:
    """Delays Ctrl-C and SIGTERM until the code is in a block that may be interrupted.

    A context manager: it installs its handlers on entry and restores the earlier ones on exit. Python
    allows this in the main thread only; in another thread it changes nothing.
    """

    def __init__(self) -> None:
        self._allowed = self._pending = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._stop) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def allowed(self) -> Iterator[None]:
        """Raise KeyboardInterrupt in this block, also for a signal that arrived before it."""
        self._allowed = True
        try:
            if self._pending:
                raise KeyboardInterrupt
            yield
        finally:
            self._allowed = self._pending = False

    @contextmanager
    def held(self) -> Iterator[None]:
        """Delay them in a part of an `allowed` block, in which something is written."""
        allowed, self._allowed = self._allowed, False
        try:
            yield
        finally:
            self._allowed = allowed
        if allowed and self._pending:
            self._allowed = False
            raise KeyboardInterrupt

    def _stop(self, _signal: int, _frame: FrameType | None) -> None:
        if self._allowed:
            self._allowed = False
            raise KeyboardInterrupt
        self._pending = True
