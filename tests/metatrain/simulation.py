"""Discrete-event simulation of one run on 1 to 10,000 workers, with stragglers and failures.

It drives the scheduler that the service uses (`metatrain.ray.shards.Shards`); only workers and clock are
made up. Run it to get the table of the README: python -m tests.metatrain.simulation
"""

from __future__ import annotations

import dataclasses
import heapq
import random

from metatrain.ray.shards import Shards


@dataclasses.dataclass(frozen=True)
class World:
    """What is simulated; times in seconds.

    Attributes:
      shard: of one shard on a worker of normal speed. ResNet-8, 32 × 32, horizon 100: measured 6.5.
      call: the driver's own work a shard, which it does one after the other; measured, `make bench`.
      generation: the driver's own work a generation: ask, tell, metrics.
      slow_share, slow_factor: how many workers are slow, and how much.
      hiccup_share, hiccup_factor: how many shards take longer, and how much.
      failures_an_hour: of one worker; spot machines are taken about once in 20 hours.
      recovery: until a lost worker's place is taken. A new process on a machine that is there takes
        6 s (measured, `make bench`), a new machine longer.
    """

    shard: float = 6.5
    call: float = 0.0018
    generation: float = 0.05
    slow_share: float = 0.05
    slow_factor: float = 2.0
    hiccup_share: float = 0.01
    hiccup_factor: float = 5.0
    failures_an_hour: float = 0.05
    recovery: float = 40.0


def simulate(world: World, workers: int, shards: int, generations: int, seed: int = 0) -> float:
    """Efficiency: the time that normal workers without losses would need, over the time needed."""
    rng = random.Random(seed)
    staff = _Workers(world, workers, rng)
    now = 0.0
    for _ in range(generations):
        now = _Generation(world, rng, Shards(shards), staff, now).end() + world.generation
    return generations * shards * world.shard / workers / now


class _Workers:
    """Workers that die and are replaced."""

    def __init__(self, world: World, count: int, rng: random.Random) -> None:
        self._world, self._rng = world, rng
        self.speed = [world.slow_factor if rng.random() < world.slow_share else 1.0 for _ in range(count)]
        self.ready = [0.0] * count  # when it (again) exists
        self.life = [0] * count  # how often it was replaced
        self.dies = [self._lifetime() for _ in range(count)]

    def bury(self, worker: int, now: float) -> None:
        self.life[worker] += 1
        self.ready[worker] = now + self._world.recovery * (0.5 + self._rng.random())
        self.dies[worker] = self.ready[worker] + self._lifetime()

    def _lifetime(self) -> float:
        rate = self._world.failures_an_hour / 3600
        return self._rng.expovariate(rate) if rate else float("inf")


class _Generation:
    """One generation's events, in the order of time."""

    def __init__(self, world: World, rng: random.Random, shards: Shards, workers: _Workers, now: float) -> None:
        self._world, self._rng, self._shards, self._workers = world, rng, shards, workers
        self._driver = now  # it hands out one shard after the other
        self._busy = [now] * len(workers.speed)  # until when a worker computes
        self._events: list[tuple[float, int, str, int, int, int]] = []  # time, tie, what, worker, its life, shard
        self._ties = 0
        for worker in range(len(workers.speed)):
            self._push(max(now, workers.ready[worker]), "free", worker)
            self._push(max(workers.dies[worker], now), "dies", worker)

    def end(self) -> float:
        """When the last shard has its answer."""
        workers = self._workers
        while True:
            now, _, what, worker, life, shard = heapq.heappop(self._events)
            if life != workers.life[worker]:
                continue  # of a worker that is gone
            if what == "dies":
                self._shards.lose((worker, life))
                workers.bury(worker, now)
                self._push(workers.ready[worker], "free", worker)
                self._push(workers.dies[worker], "dies", worker)
                continue
            if what == "done":
                self._shards.answer((worker, life), shard, now)
                if self._shards.finished:
                    return now
            self._hand_out(worker, now)

    def _hand_out(self, worker: int, now: float) -> None:
        name = (worker, self._workers.life[worker])
        while (shard := self._shards.take(name, len(self._busy), now)) is not None:
            self._driver = max(self._driver, now) + self._world.call
            seconds = self._world.shard * self._workers.speed[worker]
            if self._rng.random() < self._world.hiccup_share:
                seconds *= self._world.hiccup_factor
            self._busy[worker] = max(self._busy[worker], self._driver) + seconds
            self._push(self._busy[worker], "done", worker, shard)
        if not self._shards.holds(name):
            self._push(now + self._world.shard / 10, "free", worker)  # it asks again

    def _push(self, time: float, what: str, worker: int, shard: int = -1) -> None:
        self._ties += 1
        heapq.heappush(self._events, (time, self._ties, what, worker, self._workers.life[worker], shard))


def main() -> None:
    print("| workers | shards | efficiency | without stragglers and losses |")
    print("| ---: | ---: | ---: | ---: |")
    calm = World(slow_share=0.0, hiccup_share=0.0, failures_an_hour=0.0)
    for workers in (1, 10, 100, 1_000, 10_000):
        shards = 8 * workers
        rough, smooth = (simulate(world, workers, shards, generations=5) for world in (World(), calm))
        print(f"| {workers:,} | {shards:,} | {rough:.2f} | {smooth:.2f} |")


if __name__ == "__main__":
    main()
