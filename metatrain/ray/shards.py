"""Which worker evaluates what in one generation: a state machine without a clock and without a network.

A generation is a list of calls, each of a known cost, that `cut_shards` puts together to shards. A free worker takes
the next one. When all are handed out, it starts a second time a shard that takes too long elsewhere, and the first
answer counts. The shards of a lost worker return to the queue. Every operation takes the same time however many
workers there are.
"""

from __future__ import annotations

import heapq
import statistics
from collections import deque
from collections.abc import Hashable, Mapping, Sequence

_SLOW = 1.5  # times the usual duration, after which a shard is started again
_AHEAD = 2  # shards that a worker holds while there are plenty, so that it need not ask for the next one
_RECENT = 255  # answers that the usual duration is the median of
_REFRESH = 16  # answers between two computations of that median, once there are as many
_LATE = 0.1  # seconds beyond the usual duration that are no reason to start a shard again

# A shard costs its driver some 2 ms, which its duration hides. With all workers at long ones, a driver is busy for a
# fifth of its time; with short ones, at the end of a generation, all the time.
_CALL_SECONDS = 0.002
_LONG = 5  # times as long as the driver needs for a shard of every worker
_SHORTEST, _LONGEST = 0.25, 4.0  # seconds
_ROUNDING = 1 + 1e-9
_PARTS = 2  # a shard is at most one part in so many of what is left for each worker: the last ones are short


def cut_shards(seconds: Sequence[float], workers: int, groups: Sequence[int] | None = None) -> list[range]:
    """Put the calls of a generation together to shards: long ones first, then shorter and shorter ones.

    Args:
      seconds: expected duration of each call; 0 if unknown, and then a shard is one call.
      workers: among which they are shared.
      groups: of each call; a shard is of one group.

    Returns:
      The calls of each shard.
    """
    workers = max(workers, 1)
    left, first, shards = sum(seconds), 0, []
    round_ = _CALL_SECONDS * workers  # of the driver, for a shard of every worker
    longest = min(max(_LONG * round_, _SHORTEST), _LONGEST)
    shortest = min(max(round_, min(_SHORTEST, left / workers)), longest)
    while first < len(seconds):
        wanted = min(max(left / (_PARTS * workers), shortest), longest)
        after, total = first + 1, seconds[first]
        while (
            after < len(seconds)
            and 0 < total + seconds[after] <= wanted * _ROUNDING
            and (groups is None or groups[after] == groups[first])
        ):
            total += seconds[after]
            after += 1
        shards.append(range(first, after))
        first, left = after, left - total
    return shards


class Shards:
    """The shards of one generation. Workers are any hashable values; times are seconds of any clock.

    Args:
      costs: of each shard, in any unit, e.g. candidate-steps.
      paces: seconds per unit of cost of each kind of shard, from earlier generations, as far as they are known.
      kinds: of each shard: what takes the same time for a unit of cost, e.g. a task; all are of kind 0 if not given.

    Attributes:
      paces: as above: the medians of this generation, or else what was known before.
      duplicated: how often a shard was started again while a worker still held it.
      requeued: how often a shard lost the last worker that held it.
    """

    def __init__(
        self, costs: Sequence[float], paces: Mapping[int, float] | None = None, kinds: Sequence[int] | None = None
    ) -> None:
        self.duplicated = 0
        self.requeued = 0
        self.paces = dict(paces or {})
        self._costs, self._kinds = costs, [0] * len(costs) if kinds is None else kinds
        self._pending = deque(range(len(costs)))
        self._open = set(self._pending)  # without an answer
        self._held: dict[Hashable, deque[int]] = {}  # by worker; the first is running
        self._holders: dict[int, list[Hashable]] = {}  # workers that hold it; of open shards that any has held
        self._queued: dict[int, None] = {}  # held, but not running anywhere; in the order they were taken
        self._running: dict[int, float] = {}  # when it was last started
        self._due: list[tuple[float, float, int]] = []  # heap of (when it takes too long, when it was started, shard)
        self._since: dict[Hashable, float] = {}  # when a worker began with what it is running
        self._recent: dict[int, deque[float]] = {}  # paces of the recent answers, by kind
        self._answers: dict[int, int] = {}  # by kind

    @property
    def finished(self) -> bool:
        return not self._open

    @property
    def pending(self) -> int:
        """Shards that no worker holds."""
        return len(self._pending)

    def holds(self, worker: Hashable) -> tuple[int, ...]:
        """The shards that a worker has not answered, the running one first."""
        return tuple(self._held.get(worker, ()))

    def take(self, worker: Hashable, workers: int, now: float) -> int | None:
        """The next shard for a worker, or None if it should wait.

        Args:
          worker: it.
          workers: the number of workers.
          now: the time.
        """
        held = self._held.setdefault(worker, deque())
        if self._pending:
            if held and not (len(held) < _AHEAD and len(self._pending) > workers and not self._is_long()):
                return None
            shard = self._pending.popleft()
        else:
            again = None if held else self._overdue(now)
            if again is None:
                return None
            shard = again
            self.duplicated += 1
        held.append(shard)
        self._holders.setdefault(shard, []).append(worker)
        if len(held) == 1:
            self._run(worker, shard, now)
        elif shard not in self._running:
            self._queued[shard] = None
        return shard

    def answer(self, worker: Hashable, shard: int, now: float) -> bool:
        """A worker has answered. Returns whether it is the shard's first answer."""
        first = shard in self._open
        if first:
            if self.holds(worker)[:1] == (shard,):
                self._note_pace(self._kinds[shard], (now - self._since[worker]) / self._costs[shard])
            self._open.discard(shard)
        self._drop(worker, shard, now)
        if first:
            self._running.pop(shard, None)
            self._queued.pop(shard, None)
        return first

    def reject(self, worker: Hashable, shard: int, now: float) -> None:
        """A worker's answer cannot be used: the shard is evaluated again."""
        self._drop(worker, shard, now)
        self._requeue(shard)

    def lose(self, worker: Hashable) -> None:
        """A worker is gone: its shards return to the queue unless another worker holds them."""
        for shard in self._held.pop(worker, ()):
            self._holders[shard].remove(worker)
            self._requeue(shard)

    def next_look(self) -> float:
        """When a free worker has something to start again, unless there is an answer before: a time, or infinity."""
        if self._queued:
            return 0.0
        self._forget_ended()
        return self._due[0][0] if self._due else float("inf")

    def _is_long(self) -> bool:
        """Whether the next shard is so long that it is not taken ahead: its worker would still compute it after another
        one has taken it over."""
        shard = self._pending[0]
        return self.paces.get(self._kinds[shard], 0.0) * self._costs[shard] > _LONGEST

    def _requeue(self, shard: int) -> None:
        if shard not in self._open or self._holders.get(shard):
            return
        self._running.pop(shard, None)
        self._queued.pop(shard, None)
        self._pending.appendleft(shard)
        self.requeued += 1

    def _drop(self, worker: Hashable, shard: int, now: float) -> None:
        held = self._held.get(worker)
        if held is None or shard not in held:
            return
        held.remove(shard)
        self._holders[shard].remove(worker)
        if held:
            self._run(worker, held[0], now)

    def _run(self, worker: Hashable, shard: int, now: float) -> None:
        self._since[worker] = now
        self._queued.pop(shard, None)
        if shard in self._open:
            self._running[shard] = now
            if self._kinds[shard] in self.paces:
                heapq.heappush(self._due, (self._due_at(shard, now), now, shard))

    def _note_pace(self, kind: int, pace: float) -> None:
        known = kind in self.paces
        recent = self._recent.setdefault(kind, deque(maxlen=_RECENT))
        recent.append(max(pace, 1e-12))
        self._answers[kind] = answers = self._answers.get(kind, 0) + 1
        if answers <= _REFRESH or answers % _REFRESH == 0:
            self.paces[kind] = statistics.median_low(recent)
        if not known:  # shards that began when no duration was known
            for shard, since in self._running.items():
                if self._kinds[shard] == kind:
                    heapq.heappush(self._due, (self._due_at(shard, since), since, shard))

    def _due_at(self, shard: int, since: float) -> float:
        return since + _SLOW * self.paces[self._kinds[shard]] * self._costs[shard] + _LATE

    def _forget_ended(self) -> None:
        """Remove from the top of the heap what has been answered or started again since."""
        while self._due:
            _, since, shard = self._due[0]
            if self._running.get(shard) == since:
                return
            heapq.heappop(self._due)

    def _overdue(self, now: float) -> int | None:
        """The shard to start again: one that waits behind another shard, else one that runs too long."""
        if self._queued:
            return next(iter(self._queued))
        self._forget_ended()
        return self._due[0][2] if self._due and self._due[0][0] <= now else None
