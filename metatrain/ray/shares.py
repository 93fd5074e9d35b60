"""Which group of workers evaluates which calls of a generation: a policy without a clock and without a network."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np

_GOLDEN = (5**0.5 - 1) / 2


class Shares:
    """The calls of one generation, shared among groups of workers in proportion to their speeds.

    Every group takes its share once, so that all end at about the same time. What a lost group leaves is shared again,
    by those that are done. Groups are any hashable values.

    Args:
      costs: of each call, in any unit, e.g. candidate-steps, float [n].

    Attributes:
      answered: which calls have an answer, bool [n].
    """

    def __init__(self, costs: np.ndarray) -> None:
        self._costs = np.asarray(costs, np.float64)
        # In such an order that every stretch of it has calls of all costs.
        self._pending = np.argsort(np.arange(len(costs)) * _GOLDEN % 1, kind="stable")
        self._open = len(costs)  # calls without an answer
        self.answered = np.zeros(len(costs), bool)
        self._held: dict[Hashable, np.ndarray] = {}
        self._served: set[Hashable] = set()  # groups that have taken their share

    @property
    def finished(self) -> bool:
        return not self._open

    @property
    def pending(self) -> int:
        """Calls that no group holds."""
        return len(self._pending)

    def cost(self, calls: np.ndarray) -> float:
        """The cost of some calls together."""
        return float(self._costs[calls].sum())

    def holds(self, group: Hashable) -> np.ndarray:
        """The calls that a group has not answered, int [m]."""
        return self._held.get(group, np.zeros(0, int))

    def take(self, group: Hashable, speeds: Mapping[Any, float]) -> np.ndarray:
        """The share of a group that holds nothing: indices of calls in ascending order, int [m].

        Args:
          group: it.
          speeds: cost per second of every group that has workers, and of this one.
        """
        waiting = [other for other in speeds if other not in self._served]
        of = waiting if group not in self._served else list(speeds)
        part = speeds[group] / sum(speeds[other] for other in of)
        done = np.cumsum(self._costs[self._pending])
        count = int(np.searchsorted(done, part * done[-1] * (1 - 1e-9))) + 1 if len(done) else 0
        taken, self._pending = np.sort(self._pending[:count]), self._pending[count:]
        self._served.add(group)
        self._held[group] = taken
        return taken

    def answer(self, group: Hashable, answered: np.ndarray) -> np.ndarray:
        """A group has answered.

        Args:
          group: it.
          answered: whether each of the calls that it holds has an answer, bool [m].

        Returns:
          Which of them have their first answer, bool [m]. The others are shared again.
        """
        held = self._held.pop(group)
        first = answered & ~self.answered[held]
        self.answered[held[first]] = True
        self._open -= int(first.sum())
        self._pending = np.concatenate([held[~answered], self._pending])
        return first

    def lose(self, group: Hashable) -> None:
        """A group is gone: its calls are shared again."""
        self._served.discard(group)
        held = self._held.pop(group, None)
        if held is not None:
            self._pending = np.concatenate([held, self._pending])
