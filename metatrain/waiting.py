"""No wait in silence: after half a minute a sentence says what for, how long already, and what to do."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

NOTICE_SECONDS = 30.0  # of waiting before the sentence


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
