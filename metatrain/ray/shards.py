"""Which worker evaluates what in one generation: a state machine without a clock and without a network.

A generation is cut into shards. A free worker takes the next one. When all are handed out, it starts a
second time the shard that takes longest elsewhere, and the first answer counts. The shards of a lost
worker return to the queue.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections import deque
from collections.abc import Hashable, Sequence

_SLOW = 1.5  # times the median duration, after which a shard is started again
_AHEAD = 2  # shards that a worker holds while there are plenty, so that it need not ask for the next one
_SHARD_SECONDS = 0.25  # duration that hides Ray's 2 ms per call,
_SHARDS_PER_WORKER = 4  # unless it leaves fewer shards per worker: a generation waits for the last one


def shard_size(chunks: int, workers: int, chunk_seconds: float) -> int:
    """How many chunks to put into one shard.

    Args:
      chunks: of the generation.
      workers: that are ready.
      chunk_seconds: duration of a chunk; 0 if unknown.
    """
    enough = math.ceil(chunks / (_SHARDS_PER_WORKER * max(workers, 1)))
    wanted = math.ceil(_SHARD_SECONDS / chunk_seconds) if chunk_seconds else 1
    return min(wanted, enough)


def cut_shards(seconds: Sequence[float], workers: int, groups: Sequence[int] | None = None) -> list[range]:
    """Put the calls of a generation together to shards.

    Args:
      seconds: expected duration of each call; 0 if unknown.
      workers: among which they are shared.
      groups: of each call, in order; a shard is of one group.

    Returns:
      The calls of each shard.
    """
    size = shard_size(len(seconds), workers, sum(seconds) / len(seconds))
    found, first = [], 0
    for _, own in itertools.groupby(groups or [0] * len(seconds)):
        after = first + len(list(own))
        found += [range(i, min(i + size, after)) for i in range(first, after, size)]
        first = after
    return found


class Shards:
    """The shards of one generation. Workers are any hashable values; times are seconds of any clock.

    Args:
      count: how many shards there are, numbered from 0.

    Attributes:
      duplicated: how often a shard was started again while a worker still held it.
      requeued: how often a shard lost the last worker that held it.
    """

    def __init__(self, count: int) -> None:
        self.duplicated = 0
        self.requeued = 0
        self._pending = deque(range(count))
        self._open = set(range(count))  # without an answer
        self._held: dict[Hashable, deque[int]] = {}  # by worker; the first is running
        self._holders: dict[int, list[Hashable]] = {shard: [] for shard in range(count)}
        self._queued: dict[int, None] = {}  # held, but not running anywhere; in the order they were taken
        self._running: dict[int, float] = {}  # when it was last started; in that order
        self._since: dict[Hashable, float] = {}  # when a worker began with what it is running
        self._seconds: list[float] = []  # of the answers, sorted

    @property
    def finished(self) -> bool:
        return not self._open

    @property
    def seconds(self) -> float:
        """The median duration of a shard; 0 before the first answer."""
        return self._seconds[len(self._seconds) // 2] if self._seconds else 0.0

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
            if held and not (len(held) < _AHEAD and len(self._pending) > workers):
                return None
            shard = self._pending.popleft()
        else:
            again = None if held else self._slowest(now)
            if again is None:
                return None
            shard = again
            self.duplicated += 1
        held.append(shard)
        self._holders[shard].append(worker)
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
                bisect.insort(self._seconds, now - self._since[worker])
            self._open.discard(shard)
        self._drop(worker, shard, now)
        if not self._holders[shard] or first:
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

    def _requeue(self, shard: int) -> None:
        if shard not in self._open or self._holders[shard]:
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
        self._running.pop(shard, None)
        if shard in self._open:
            self._running[shard] = now

    def _slowest(self, now: float) -> int | None:
        """The shard to start again: one that waits behind another shard, else one that runs too long."""
        if self._queued:
            return next(iter(self._queued))
        if not self._seconds or not self._running:
            return None
        shard, since = next(iter(self._running.items()))
        return shard if now - since >= _SLOW * self.seconds else None
