"""A run's progress: a live bar in a terminal; elsewhere a log for programs, see `metatrain.log_lines`, or sentences."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar

from metatrain.log_lines import generation_line, generation_sentence, log_line
from metatrain.outer.metrics import seconds_left


class Display:
    """Shows generation, meta-loss, horizon, speed and time left.

    Args:
      total: generations of the run.
      log: where there is no terminal, called with a sentence for each generation and each message, instead of printing
        a log's lines.
    """

    def __init__(self, total: int, log: Callable[[str], None] | None = None) -> None:
        self._console = Console(highlight=False, markup=False, soft_wrap=True)  # messages may contain [brackets]
        self._log = log
        self._total = total
        self._bar: Bar | None = None

    def begin(self, start: int) -> None:
        """Start, after `start` finished generations."""
        self._generations: list[tuple[float, bool]] = []  # seconds of each, and whether they include compilation
        self._uncompiled = 0  # tasks
        if self._console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
            self._bar = Bar(*columns, TextColumn("{task.fields[line]}"), console=self._console)
            self._task = self._bar.add_task("generation", total=self._total, completed=start, line="starting")
            self._bar.start()
        else:
            self.log(f"generation {start}/{self._total}: starting")

    def starting(self, new: Sequence[int], compiled: int, tasks: int) -> None:
        """The first generation of some tasks in this process begins, with their compilation or the start of processes.

        Args:
          new: their numbers.
          compiled: how many tasks have been compiled with them.
          tasks: of the run.
        """
        self._uncompiled = tasks - compiled
        numbers = ", ".join(str(task + 1) for task in new)
        line = f"starting task {numbers} ({compiled} of {tasks}): its first generation takes longer …"
        if self._bar:
            self._bar.update(self._task, line=line)
        else:
            self.log(line)

    def update(self, metrics: dict[str, Any]) -> None:
        """Show a line of metrics."""
        done = metrics["generation"] + 1
        mean = metrics["meta_loss_mean"]
        if mean is None:
            self.warn(f"generation {done}: no candidate has a finite loss; the state is kept")
        self._generations.append((metrics["seconds"], metrics["compiled"]))
        left = seconds_left(self._generations, self._total - done, min(self._uncompiled, self._total - done))
        if self._bar:
            known = "" if left is None else f"  {left:,.0f} s left"
            loss = "not finite" if mean is None else f"{mean:.4f}"
            line = (
                f"meta-loss {loss}  horizon {metrics['horizon']:>4.0f}  "
                f"{metrics['candidate_steps_per_s']:,.0f} candidate-steps/s  {metrics['workers']} workers{known}"
            )
            self._bar.update(self._task, completed=done, line=line)
        elif self._log is None:
            self.log(generation_line(metrics, self._total, left))
        elif mean is not None:
            self.log(generation_sentence(metrics, self._total, left))

    def log(self, sentence: str, level: int = logging.INFO) -> None:
        """Print a sentence, above the bar in a terminal; in a log with its time and level."""
        if self._console.is_terminal:
            self._console.print(sentence)
        elif self._log is None:
            self._console.print(log_line(sentence, level))
        else:
            self._log(sentence)

    def warn(self, sentence: str) -> None:
        """Print a sentence that an operator should look at."""
        self.log(sentence, logging.WARNING)

    def close(self) -> None:
        if self._bar:
            self._bar.stop()
