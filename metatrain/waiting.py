"""No wait in silence: after half a minute a sentence says what for, how long already, and what to do."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

NOTICE_SECONDS = 30.0  # of waiting before the sentence


class WaitError(Exception):
    """Something outside does not answer. Nobody's input is wrong: the same command may succeed later."""


class Wait:
    """A wait that is looked at again and again.

    Args:
      now: the time, in seconds of any clock.
    """

    def __init__(self, now: float) -> None:
        self.over(now)

    def over(self, now: float) -> None:
        """What was waited for is here; the next wait begins."""
        self._since, self._noticed = now, False

    def seconds(self, now: float) -> float:
        """How long the wait has lasted."""
        return now - self._since

    def is_notice_due(self, now: float, after: float = NOTICE_SECONDS) -> bool:
        """Whether to log a sentence now: once in a wait, after so many seconds."""
        due = not self._noticed and self.seconds(now) >= after
        self._noticed |= due
        return due


@contextlib.contextmanager
def noticed(what: str, advice: str, log: Callable[[str], None]) -> Iterator[None]:
    """Log one sentence if the block takes longer than `NOTICE_SECONDS`.

    Args:
      what: what the block waits for, e.g. "an answer from the cluster at 10.0.0.5:6379".
      advice: how long it may take, and what the user can do.
      log: called from another thread.
    """
    timer = threading.Timer(NOTICE_SECONDS, lambda: log(notice(what, NOTICE_SECONDS, advice)))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def notice(what: str, seconds: float, advice: str) -> str:
    """The sentence: what for, how long, what to do."""
    return f"waiting for {what} for {seconds:.0f} s; {advice}"
