"""Discrete-event simulation of a run on 1 to 10,000 workers, with stragglers and losses.

It drives the policies that the service uses: `cut_shards` and `Shards` for the workers of a driver or an aggregator,
and `Shares` among aggregators. Only workers, clock and the costs of Ray are made up, and those are measured
(`make bench`). The table of docs/operate/scaling.md: python -m tests.metatrain.simulation
"""

from __future__ import annotations

import dataclasses
import heapq
import math
import random

import numpy as np

from metatrain.ray.groups import GROUP_WORKERS, MANY_WORKERS
from metatrain.ray.shards import Shards, cut_shards
from metatrain.ray.shares import Shares


@dataclasses.dataclass(frozen=True)
class World:
    """What is simulated; times in seconds.

    Attributes:
      work: computation of a generation for each worker, on one of normal speed.
      call: of a compiled call, the smallest part that it can be cut into.
      shard_cost: work of a driver or aggregator for a shard, handing out and answer, one after the other. Measured.
      group_cost: work of the driver for an aggregator's part of a generation.
      generation: the driver's own work a generation: ask, tell, metrics.
      slow_share, slow_factor: how many workers are slow, and how much.
      hiccup_share, hiccup_factor: how many shards take longer, and how much.
      failures_an_hour: of one worker; a spot machine is reclaimed about once in 20 hours.
      recovery: until a lost worker is replaced. A new process on an available machine takes 6 s (measured, `make
      bench`), a new machine longer.
    """

    work: float = 52.0
    call: float = 0.25
    shard_cost: float = 0.002
    group_cost: float = 0.02
    generation: float = 0.05
    slow_share: float = 0.05
    slow_factor: float = 2.0
    hiccup_share: float = 0.01
    hiccup_factor: float = 5.0
    failures_an_hour: float = 0.05
    recovery: float = 40.0

    def calm(self) -> World:
        """The same without stragglers and losses."""
        return dataclasses.replace(self, slow_share=0.0, hiccup_share=0.0, failures_an_hour=0.0)


def simulate(world: World, workers: int, generations: int, seed: int = 0, group: int | None = None) -> float:
    """Efficiency: the time that normal workers without losses would need, divided by the time needed.

    Args:
      world: its times.
      workers: how many.
      generations: to simulate; the duration of a call is known from the generation before.
      seed: of what is random.
      group: workers of an aggregator; by default, as in the service.
    """
    rng = random.Random(seed)
    if group is None:
        group = GROUP_WORKERS if workers > MANY_WORKERS else workers
    groups = [_Workers(world, min(group, workers - first), rng) for first in range(0, workers, group)]
    calls = round(workers * world.work / world.call)
    now, speeds = 0.0, {index: float(own.count) for index, own in enumerate(groups)}
    for _ in range(generations):
        now = _generation(world, rng, groups, calls, speeds, now) + world.generation
    return generations * calls * world.call / workers / now


def _generation(
    world: World, rng: random.Random, groups: list[_Workers], calls: int, speeds: dict[int, float], now: float
) -> float:
    """The time at which a generation ends that starts at `now`."""
    if len(groups) == 1:
        return _Part(world, rng, calls, groups[0], now).end()
    shares = Shares(np.ones(calls))
    ends = []
    for index, own in enumerate(groups):
        now += world.group_cost / 2
        count = len(shares.take(index, speeds))
        end = _Part(world, rng, count, own, now).end() if count else now
        ends.append(end)
        if count:
            speeds[index] = (speeds[index] + count * world.call / (end - now)) / 2
    driver = 0.0
    for end in sorted(ends):
        driver = max(driver, end) + world.group_cost / 2
    return driver


class _Workers:
    """Workers that die and are replaced."""

    def __init__(self, world: World, count: int, rng: random.Random) -> None:
        self._world, self._rng, self.count = world, rng, count
        self.speed = [world.slow_factor if rng.random() < world.slow_share else 1.0 for _ in range(count)]
        self.ready = [0.0] * count  # when it exists (again)
        self.life = [0] * count  # how often it has been replaced
        self.dies = [self._lifetime() for _ in range(count)]

    def bury(self, worker: int, now: float) -> None:
        self.life[worker] += 1
        self.ready[worker] = now + self._world.recovery * (0.5 + self._rng.random())
        self.dies[worker] = self.ready[worker] + self._lifetime()

    def _lifetime(self) -> float:
        rate = self._world.failures_an_hour / 3600
        return self._rng.expovariate(rate) if rate else math.inf


class _Part:
    """The part of a generation that one driver or aggregator evaluates: its events, ordered by time."""

    def __init__(self, world: World, rng: random.Random, calls: int, workers: _Workers, now: float) -> None:
        self._world, self._rng, self._workers = world, rng, workers
        ranges = cut_shards([world.call] * calls, workers.count)
        self._seconds = [len(own) * world.call for own in ranges]
        self._shards = Shards(self._seconds, paces={0: 1.0})
        self._server = now  # the driver or aggregator does one thing after the other
        self._busy = [now] * workers.count  # until when a worker computes
        self._idle: dict[int, None] = {}
        self._events: list[tuple[float, int, str, int, int, int]] = []  # time, tie, what, worker, its life, shard
        self._ties = 0
        for worker in range(workers.count):
            self._push(max(now, workers.ready[worker]), "free", worker)
            if workers.dies[worker] < math.inf:
                self._push(max(workers.dies[worker], now), "dies", worker)

    def end(self) -> float:
        """When the last shard has its answer."""
        workers = self._workers
        while True:
            now, _, what, worker, life, shard = heapq.heappop(self._events)
            if what == "look":
                self._use_idle(now)
                continue
            if life != workers.life[worker]:
                continue  # of a worker that is gone
            if what == "dies":
                self._shards.lose((worker, life))
                self._idle.pop(worker, None)
                workers.bury(worker, now)
                self._push(workers.ready[worker], "free", worker)
                self._push(workers.dies[worker], "dies", worker)
                self._use_idle(now)
                continue
            if what == "done":
                self._server = max(self._server, now) + self._world.shard_cost / 2
                self._shards.answer((worker, life), shard, self._server)
                if self._shards.finished:
                    return self._server
            self._hand_out(worker, max(self._server, now))

    def _use_idle(self, now: float) -> None:
        while self._idle and (self._shards.pending or self._shards.next_look() <= now):
            worker = next(iter(self._idle))
            self._hand_out(worker, now)
            if worker in self._idle:
                return

    def _hand_out(self, worker: int, now: float) -> None:
        name = (worker, self._workers.life[worker])
        while (shard := self._shards.take(name, self._workers.count, now)) is not None:
            self._server = max(self._server, now) + self._world.shard_cost / 2
            seconds = self._seconds[shard] * self._workers.speed[worker]
            if self._rng.random() < self._world.hiccup_share:
                seconds *= self._world.hiccup_factor
            self._busy[worker] = max(self._busy[worker], self._server) + seconds
            self._push(self._busy[worker], "done", worker, shard)
        if self._shards.holds(name):
            self._idle.pop(worker, None)
            return
        self._idle[worker] = None
        if (look := self._shards.next_look()) < math.inf:
            self._push(max(look, now), "look", worker)

    def _push(self, time: float, what: str, worker: int, shard: int = -1) -> None:
        self._ties += 1
        heapq.heappush(self._events, (time, self._ties, what, worker, self._workers.life[worker], shard))


def main() -> None:
    print(
        "| workers | aggregators | without stragglers and losses | with them | with calls of 6.5 s | one driver alone |"
    )
    print("| ---: | ---: | ---: | ---: | ---: | ---: |")
    world, coarse = World(), World(call=6.5)
    for workers in (1, 10, 100, 1_000, 10_000):
        generations = 4 if workers <= 1_000 else 1
        aggregators = math.ceil(workers / GROUP_WORKERS) if workers > MANY_WORKERS else 0
        found = [
            simulate(world.calm(), workers, generations),
            simulate(world, workers, generations),
            simulate(coarse, workers, generations),
            simulate(world.calm(), workers, generations, group=workers),
        ]
        print(
            f"| {workers:,} | {aggregators or '–'} | " + " | ".join(f"{each:.2f}" for each in found) + " |", flush=True
        )


if __name__ == "__main__":
    main()
