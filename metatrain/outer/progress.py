"""A run's progress on the screen: a live bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

_SECONDS_BETWEEN_LINES = 10.0


class Display:
    """Shows generation, meta-loss, horizon, speed and time left.

    Args:
      total: generations of the run.
    """

    def __init__(self, total: int) -> None:
        self._console = Console(highlight=False, markup=False, soft_wrap=True)  # messages may contain [brackets]
        self._total = total
        self._bar: Bar | None = None

    def begin(self, start: int) -> None:
        """Start, after `start` finished generations."""
        self._start, self._began, self._last_line = start, time.monotonic(), 0.0
        if self._console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Bar(*columns, TextColumn("{task.fields[line]}"), console=self._console)
            self._task = self._bar.add_task("generation", total=self._total, completed=start, line="compiling …")
            self._bar.start()
        else:
            self._console.print(f"generation {start}/{self._total}: compiling …")

    def update(self, metrics: dict[str, Any]) -> None:
        """Show a line of metrics."""
        done = metrics["generation"] + 1
        mean = metrics["meta_loss_mean"]
        if mean is None:
            self.log(f"generation {metrics['generation']}: no candidate has a finite loss; the state is kept")
        line = (
            f"meta-loss {'not finite' if mean is None else format(mean, '.4f')}  horizon {metrics['horizon']:>4.0f}  "
            f"{metrics['candidate_steps_per_s']:,.0f} candidate-steps/s  {metrics['workers']} workers"
        )
        if self._bar:
            self._bar.update(self._task, completed=done, line=line)
        elif done == self._total or time.monotonic() - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            left = (self._last_line - self._began) / max(done - self._start, 1) * (self._total - done)
            self._console.print(f"generation {done}/{self._total}  {line}  {left:,.0f} s left")

    def log(self, sentence: str) -> None:
        """Print a sentence above the bar."""
        self._console.print(sentence)

    def close(self) -> None:
        if self._bar:
            self._bar.stop()
