"""What a candidate-step of each task costs, learned from how long workers took for it."""

from __future__ import annotations

import numpy as np


class TaskCosts:
    """The costs of tasks in units of a candidate-step of the task that was measured first.

    A deep network may take a hundred times as long for a step as a small one. The least time for a task counts: what
    else a machine does only adds to it. A task without a measurement costs one unit a step.
    """

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}  # by task: for one candidate-step
        self._unit: float | None = None

    @property
    def measured(self) -> frozenset[int]:
        """The tasks with a measurement."""
        return frozenset(self._seconds)

    def cost(self, task: np.ndarray, steps: np.ndarray) -> np.ndarray:
        """The expected cost of calls.

        Args:
          task: of each call, int [n].
          steps: candidate-steps of each, float [n].

        Returns:
          float64 [n]
        """
        unit = self._unit or 1.0
        return steps * np.array([self._seconds.get(int(one), unit) / unit for one in task])

    def note(self, task: np.ndarray, steps: np.ndarray, seconds: np.ndarray) -> None:
        """Learn from calls.

        Args:
          task, steps: as in `cost`.
          seconds: that each took, float [n]; NaN where that is not known.
        """
        for one in np.unique(task[np.isfinite(seconds)]).tolist():
            own = (task == one) & np.isfinite(seconds)
            least = max(float((seconds[own] / steps[own]).min()), 1e-12)
            self._seconds[one] = min(least, self._seconds.get(one, least))
            self._unit = self._unit or least
