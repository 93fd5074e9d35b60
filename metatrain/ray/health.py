"""Health of workers: a policy without a clock and without a network.

It decides which workers hang, which are replaced because their answers are unusable, when new workers
are asked for after others failed to start, and when errors of the task's code end the run.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections import deque
from collections.abc import Hashable, Mapping
from typing import Any

HANG_SECONDS = 30.0  # a worker may take at least this long to answer
HANG_FACTOR = 20.0  # and this many times the usual duration of the slowest worker
START_SECONDS = 120.0  # until a worker that was asked for has its place, its process and its tasks
FIRST_CALL_SECONDS = 600.0  # and this long for what is new: a worker's first call of a task compiles
_MAX_DOUBLINGS = 6  # of the time to answer, which doubles as long as every worker exceeds it
_MAX_SLOW_STARTS = 3  # doublings of the time to start
_MAX_UNUSABLE = 3  # answers of a worker before it is replaced
_MAX_ERRORS = 3  # of the task's code without an answer in between, before the run ends
_RECENT = 9  # answers of a worker whose median is its usual speed: one that hung for a while does not count
_RECRUIT_SECONDS = 60.0  # longest wait before workers are asked for again after failed starts


@dataclasses.dataclass
class _Worker:
    since: float  # when it was last given work or answered
    answered: int = 0
    unusable: int = 0
    # Seconds per unit of cost of its recent answers.
    pace: deque[float] = dataclasses.field(default_factory=lambda: deque(maxlen=_RECENT))


class Health:
    """The health of a run's workers.

    A worker is any hashable value; times are seconds of any clock.

    Attributes:
      any_started: whether a worker has ever been ready. If none has, the run is at fault, not a machine.
    """

    def __init__(self) -> None:
        self.any_started = False
        self._workers: dict[Hashable, _Worker] = {}
        self._errors = 0  # of the task's code since the last answer
        self._doublings = 0  # of the time to answer since the last answer
        self._failed_starts = 0  # in a row
        self._slow_starts = 0  # in a row
        self._recruit_at = 0.0

    def started(self, worker: Hashable, now: float) -> None:
        """A worker is ready."""
        self.any_started = True
        self._failed_starts = self._slow_starts = 0
        self._workers[worker] = _Worker(now)

    def failed_start(self, now: float) -> None:
        """A worker was lost before it was ready: wait before asking for another, longer each time."""
        self._failed_starts += 1
        self._recruit_at = now + min(2.0**self._failed_starts, _RECRUIT_SECONDS)

    def may_recruit(self, now: float) -> bool:
        """Whether workers may be asked for."""
        return now >= self._recruit_at

    def start_seconds(self) -> float:
        """Seconds that a worker may take to start; twice as many after every start that took longer."""
        return START_SECONDS * 2.0**self._slow_starts

    def slow_start(self) -> None:
        """A worker has exceeded its time to start, and is asked for again."""
        self._slow_starts = min(self._slow_starts + 1, _MAX_SLOW_STARTS)

    def given_work(self, worker: Hashable, now: float) -> None:
        """A worker that was idle has been given a shard."""
        self._workers[worker].since = now

    def answered(self, worker: Hashable, now: float, cost: float | None) -> None:
        """A worker has answered.

        Args:
          worker: it.
          now: the time.
          cost: of the shard; None if the answer belongs to an earlier generation or includes compilation.
        """
        record = self._workers[worker]
        if cost is not None:
            record.pace.append((now - record.since) / cost)
        record.since, record.answered = now, record.answered + 1
        self._errors = self._doublings = 0

    def answers(self, worker: Hashable) -> int:
        """How often a worker has answered."""
        return self._workers[worker].answered

    def unusable(self, worker: Hashable) -> bool:
        """A worker's answer is unusable. Returns whether to replace the worker."""
        self._workers[worker].unusable += 1
        return self._workers[worker].unusable >= _MAX_UNUSABLE

    def error(self) -> bool:
        """The task's code raised an error on a worker. Returns whether to end the run."""
        self._errors += 1
        return self._errors >= _MAX_ERRORS

    def patience(self, cost: float, new: bool) -> float:
        """Seconds that a worker may take to answer for a shard of that cost; of a task that is new to it, or not."""
        seconds = max(HANG_SECONDS, HANG_FACTOR * self.usual_seconds(cost), FIRST_CALL_SECONDS if new else 0.0)
        return seconds * 2.0**self._doublings

    def usual_seconds(self, cost: float) -> float:
        """Seconds that the slowest worker usually takes for a shard of that cost; 0 if unknown."""
        return cost * max((statistics.median_low(w.pace) for w in self._workers.values() if w.pace), default=0.0)

    def hung(self, busy: Mapping[Any, bool], cost: float, now: float) -> dict[Any, float]:
        """The busy workers that exceed their patience, and how long each has not answered.

        Args:
          busy: whether what a worker runs is new, by worker.
          cost: of the largest shard.
          now: the time.

        Each time there are any, patience doubles until the next answer: workers that are slow, and not
        dead, will answer at last.
        """
        limits = {new: self.patience(cost, new) for new in (False, True)}
        silent = {worker: now - self._workers[worker].since for worker in busy}
        found = {worker: seconds for worker, seconds in silent.items() if seconds > limits[busy[worker]]}
        self._doublings = min(self._doublings + bool(found), _MAX_DOUBLINGS)
        return found

    def lost(self, worker: Hashable) -> None:
        """A worker is gone."""
        self._workers.pop(worker, None)
