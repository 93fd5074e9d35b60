"""A run's progress on the screen: a live bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar

from metatrain.outer.metrics import seconds_left

_SECONDS_BETWEEN_LINES = 10.0


def print_line(sentence: str) -> None:
    """Print a sentence of the set-up of a run, before there is a `Display`."""
    print(sentence, flush=True)


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
        self._last_line = -math.inf
        self._generations: list[tuple[float, bool]] = []  # seconds of each, and whether they include compilation
        self._uncompiled = 0  # tasks
        if self._console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
            self._bar = Bar(*columns, TextColumn("{task.fields[line]}"), console=self._console)
            self._task = self._bar.add_task("generation", total=self._total, completed=start, line="starting")
            self._bar.start()
        else:
            self._console.print(f"generation {start}/{self._total}: starting")

    def compiling(self, new: Sequence[int], compiled: int, tasks: int) -> None:
        """The first generation of some tasks in this process begins, which includes their compilation.

        Args:
          new: their numbers.
          compiled: how many tasks have been compiled with them.
          tasks: of the run.
        """
        self._uncompiled = tasks - compiled
        line = f"compiling task {', '.join(str(task + 1) for task in new)} ({compiled} of {tasks}) …"
        if self._bar:
            self._bar.update(self._task, line=line)
        else:
            self._console.print(line)

    def update(self, metrics: dict[str, Any]) -> None:
        """Show a line of metrics."""
        done = metrics["generation"] + 1
        mean = metrics["meta_loss_mean"]
        if mean is None:
            self.log(f"generation {metrics['generation']}: no candidate has a finite loss; the state is kept")
        self._generations.append((metrics["seconds"], metrics["compiled"]))
        left = seconds_left(self._generations, self._total - done, min(self._uncompiled, self._total - done))
        known = "" if left is None else f"  {left:,.0f} s left"
        line = (
            f"meta-loss {'not finite' if mean is None else format(mean, '.4f')}  horizon {metrics['horizon']:>4.0f}  "
            f"{metrics['candidate_steps_per_s']:,.0f} candidate-steps/s  {metrics['workers']} workers{known}"
        )
        if self._bar:
            self._bar.update(self._task, completed=done, line=line)
        elif done == self._total or time.monotonic() - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            self._console.print(f"generation {done}/{self._total}  {line}")

    def log(self, sentence: str) -> None:
        """Print a sentence above the bar."""
        self._console.print(sentence)

    def close(self) -> None:
        if self._bar:
            self._bar.stop()
