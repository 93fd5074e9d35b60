"""Health of workers: a policy without a clock and without a network.

It decides which workers hang, which are replaced because their answers are unusable, when new workers
are asked for after others failed to start, and when errors of the task's code end the run.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections import deque
from collections.abc import Hashable, Mapping
from typing import Any, NamedTuple

HANG_SECONDS = 30.0  # a worker may take at least this long to answer
HANG_FACTOR = 20.0  # and this many times the usual duration of the slowest worker
START_SECONDS = 120.0  # until a worker that was asked for has its place, its process and its tasks
FIRST_CALL_SECONDS = 600.0  # and this long for a task that nothing is known of: a worker's first call compiles
_MAX_DOUBLINGS = 6  # of the time to answer, which doubles as long as every worker exceeds it
_MAX_SLOW_STARTS = 3  # doublings of the time to start
_MAX_UNUSABLE = 3  # answers of a worker before it is replaced
_MAX_ERRORS = 3  # of the task's code without an answer in between, before the run ends
_RECENT = 9  # answers of a worker whose median is its usual speed: one that hung for a while does not count
_RECRUIT_SECONDS = 60.0  # longest wait before workers are asked for again after failed starts


class Load(NamedTuple):
    """What a shard asks of a worker."""

    task: int
    steps: float  # candidate-steps


@dataclasses.dataclass
class _Worker:
    since: float  # when it was last given work or answered
    answered: int = 0
    unusable: int = 0
    # By task: seconds per candidate-step of its recent answers; nothing yet if it has only compiled it.
    paces: dict[int, deque[float]] = dataclasses.field(default_factory=dict)


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

    def answered(self, worker: Hashable, now: float, load: Load, current: bool = True) -> None:
        """A worker has answered.

        Args:
          worker: it.
          now: the time.
          load: of the shard.
          current: whether it is of this generation; the time of another is not used.
        """
        record = self._workers[worker]
        if load.task not in record.paces:  # a first answer includes compilation
            record.paces[load.task] = deque(maxlen=_RECENT)
        elif current:
            record.paces[load.task].append((now - record.since) / load.steps)
        record.since, record.answered = now, record.answered + 1
        self.heard()

    def paused(self, now: float) -> None:
        """The time to answer begins anew for all workers: until now nobody looked."""
        for record in self._workers.values():
            record.since = now

    def heard(self) -> None:
        """There has been an answer: errors and patience are counted anew."""
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

    def patience(self, worker: Hashable, load: Load) -> float:
        """Seconds that a worker may take to answer for a shard."""
        usual = self.usual_seconds(load)
        new = load.task not in self._workers[worker].paces or not usual
        seconds = max(HANG_SECONDS, HANG_FACTOR * usual, FIRST_CALL_SECONDS if new else 0.0)
        return seconds * 2.0**self._doublings

    def usual_seconds(self, load: Load) -> float:
        """Seconds that the slowest worker usually takes for such a shard; 0 if unknown."""
        recent = (worker.paces.get(load.task) for worker in self._workers.values())
        return load.steps * max((statistics.median_low(paces) for paces in recent if paces), default=0.0)

    def hung(self, busy: Mapping[Any, Load], now: float) -> dict[Any, float]:
        """The busy workers that exceed their patience, and how long each has not answered.

        Args:
          busy: what each of them computes.
          now: the time.

        Each time there are any, patience doubles until the next answer: workers that are slow, and not
        dead, will answer at last.
        """
        silent = {worker: now - self._workers[worker].since for worker in busy}
        found = {worker: seconds for worker, seconds in silent.items() if seconds > self.patience(worker, busy[worker])}
        self._doublings = min(self._doublings + bool(found), _MAX_DOUBLINGS)
        return found

    def lost(self, worker: Hashable) -> None:
        """A worker is gone."""
        self._workers.pop(worker, None)
