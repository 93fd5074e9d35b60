"""An aggregator: a Ray actor that has about a hundred workers of its own, and answers once for all of them.

It does for its part of a generation what the driver does for a whole one when there are few workers: the same `Pool`.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from metatrain.config import ExecutionConfig
from metatrain.ray.fleet import Fleet
from metatrain.ray.health import Health
from metatrain.ray.pool import Calls, Pool, Work
from metatrain.ray.share import Share, take_share

STARVED_SECONDS = 30.0  # without any worker, after which an aggregator gives back what it has not computed
_PREPARE_SECONDS = 10.0  # of waiting for its first worker, before it says that there is none
_MORE_SECONDS = 3.0  # of waiting for more workers when there is one


class Status(NamedTuple):
    """What an aggregator says about its workers."""

    counts: dict[str, Any]  # see `Pool.report`
    news: list[str]  # sentences since the last status


class GroupAnswer(NamedTuple):
    """An aggregator's answer for its part of a generation."""

    round: int
    losses: np.ndarray  # float32 [calls, chunk]
    answered: np.ndarray  # bool [calls]
    seconds: float
    status: Status


class Sent:
    """The run as an aggregator passes it on to its workers; see `metatrain.ray.fleet.Package`."""

    def __init__(self, blob: Any, refs: dict[int, Any]) -> None:
        self.blob, self.refs = blob, refs

    def send(self, numbers: Sequence[int]) -> None:
        """The driver has made all arrays available already."""


class Aggregator:
    """The actor. `status` is answered while another method runs.

    Args:
      worker: the class of its workers.
      package: holds references to the pickled `Job` and, by number, to all arrays.
      execution: of the run; `workers` is how many this aggregator has.
      chunk: members in one compiled call.
    """

    def __init__(
        self, worker: type, package: tuple[Any, dict[int, Any]], execution: ExecutionConfig, chunk: int
    ) -> None:
        take_share(Share())
        self._news: queue.SimpleQueue[str] = queue.SimpleQueue()
        health = Health()
        fleet = Fleet(worker, Sent(*package), execution, chunk, health, self._news.put)
        self._pool = Pool(fleet, health, self._news.put)
        self._starving_since = time.monotonic()

    def prepare(self) -> Status:
        """Ask for workers, and wait a while until there are some.

        Raises:
          UserError: no worker can be set up.
        """
        self._pool.prepare(_PREPARE_SECONDS, _MORE_SECONDS)
        return self.status()

    def evaluate(self, number: int, shared: list[Any], calls: Calls) -> GroupAnswer:
        """Evaluate some calls of a generation: all, unless there is no worker left for a while.

        Raises:
          UserError: candidates fail on the workers, or no worker can be set up.
        """
        began = self._starving_since = time.monotonic()
        losses, answered = self._pool.evaluate(Work(number, shared, calls), self._look)
        return GroupAnswer(number, losses, answered, time.monotonic() - began, self.status())

    def status(self) -> Status:
        """What there is to say about its workers."""
        news = []
        while not self._news.empty():
            news.append(self._news.get())
        return Status(self._pool.report(), news)

    def _look(self) -> bool:
        now = time.monotonic()
        if self._pool.workers:
            self._starving_since = now
        return now - self._starving_since < STARVED_SECONDS
