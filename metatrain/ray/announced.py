"""Answers of Ray that announce themselves, so that nobody has to look for them among thousands."""

from __future__ import annotations

import queue
from typing import Any


class Announced:
    """References whose results are awaited: any number of them, at a cost that does not depend on the number."""

    def __init__(self) -> None:
        self._ready: queue.SimpleQueue[tuple[Any, Any]] = queue.SimpleQueue()

    def watch(self, ref: Any) -> None:
        """Await the result of a reference."""
        ref.future().add_done_callback(lambda future: self._ready.put((ref, future)))

    def ready(self, seconds: float) -> list[tuple[Any, Any]]:
        """The references whose results are there, each with its future; waits at most `seconds` for the first one."""
        found = []
        try:
            found.append(self._ready.get(timeout=max(seconds, 0.0)))
            while True:
                found.append(self._ready.get_nowait())
        except queue.Empty:
            return found
