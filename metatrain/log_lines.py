"""Lines of a driver's log: the time, the level, and a sentence or the figures of a generation.

2026-01-31T12:00:00Z WARNING a worker is lost (…); its candidates are evaluated again
2026-01-31T12:00:05Z INFO generation 12/400 meta_loss_mean=0.5123 horizon=37 candidate_steps_per_s=2100 workers=8
"""

from __future__ import annotations

import json
import logging
import re
import sys
import time
from typing import Any

from metatrain.durations import about

_TIME = "%Y-%m-%dT%H:%M:%SZ"
_GENERATION = re.compile(r"\S+Z INFO generation (\d{1,12})/(\d{1,12}) (.*)")
_PAIR = re.compile(r"(\w+)=(\S+)")


class LogFormatter(logging.Formatter):
    """Formats records of `logging` as `log_line` does."""

    def format(self, record: logging.LogRecord) -> str:
        message = record.getMessage()
        if record.exc_info:
            message += "\n" + self.formatException(record.exc_info)
        return log_line(message, record.levelno, record.created)


def log_line(sentence: str, level: int = logging.INFO, seconds: float | None = None) -> str:
    """A sentence with its time in UTC and its level.

    Args:
      sentence: what to log.
      level: of `logging`.
      seconds: since 1970; now by default.
    """
    return f"{time.strftime(_TIME, time.gmtime(seconds))} {logging.getLevelName(level)} {sentence}"


def print_line(sentence: str) -> None:
    """Print a sentence of a driver; as it is in a terminal."""
    print(sentence if sys.stdout.isatty() else log_line(sentence), flush=True)


def generation_line(metrics: dict[str, Any], total: int, seconds_left: float | None = None) -> str:
    """The figures of a generation as one line, without time and level.

    Args:
      metrics: its line of `metrics.jsonl`.
      total: generations of the run.
      seconds_left: of the run, where that is known.
    """
    values = {**metrics, "seconds_left": seconds_left}
    shown = {key: value for key, value in values.items() if isinstance(value, bool | int | float | str)}
    pairs = [f"{key}={_shown(value)}" for key, value in shown.items() if key != "generation"]
    return f"generation {metrics['generation'] + 1}/{total} {' '.join(pairs)}"


def generation_sentence(metrics: dict[str, Any], total: int, seconds_left: float | None = None) -> str:
    """What a person wants to know of a generation with a finite loss; see `generation_line`."""
    left = "" if seconds_left is None else f", about {about(seconds_left)} left"
    return (
        f"generation {metrics['generation'] + 1} of {total}: meta-loss {metrics['meta_loss_mean']:.4g} after "
        f"{metrics['horizon']:.0f} steps{left}"
    )


def read_generation_line(text: str) -> tuple[dict[str, Any], int] | None:
    """The metrics and the number of generations of a logged generation; None if the line is about something else.

    A value that was not finite is None, as in `metrics.jsonl`.
    """
    found = _GENERATION.match(text)
    if found is None:
        return None
    metrics: dict[str, Any] = {"meta_loss_mean": None, "meta_loss_best": None}
    for key, value in _PAIR.findall(found[3]):
        try:
            metrics[key] = json.loads(value)
        except ValueError:
            metrics[key] = value
    return {"generation": int(found[1]) - 1, **metrics}, int(found[2])


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, float):
        return f"{value:.6g}"
    return re.sub(r"\s+", "_", str(value)) or "none"
