"""Cost of a run before it is started: `metatrain estimate`."""

from __future__ import annotations

import dataclasses
import heapq
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from rich.table import Table

from metatrain.config import Config, UserError
from metatrain.inner.plan import time_steps
from metatrain.inner.population import candidate_losses, cut
from metatrain.outer.setup import Setup
from metatrain.ray.shards import cut_shards
from tasks import sample
from tasks.base import AnyTask
from tasks.user_code import callbacks

WORKERS = (1, 2, 4, 8, 16, 32, 64, 128)
_STEPS, _ROUNDS = 10, 3  # of the measurement
_ANSWER_BYTES = 200  # of a pickled answer, apart from its scalars
_MAX_WORKERS = 100_000
_GENERATIONS = 200  # that are computed for each number of workers; the others are like them

# Seconds, measured with `make bench`.
_GENERATION = 0.05  # the driver's own work for a generation: ask, tell, metrics, and on Ray its state
_RAY_SHARD = 0.002  # what Ray takes for a shard, in the driver and on the way


@dataclasses.dataclass(frozen=True)
class Estimate:
    """The work of a run, and the speed of one worker of this machine.

    Attributes:
      horizons: of each generation's draws, [G][samples]; they follow from the seed.
      population, members_per_call: candidates per generation, and per compiled call.
      seconds_per_step: of a candidate-step on one core or accelerator; measured.
      seconds_per_call: of a compiled call apart from its steps (evaluation of the meta-loss, dispatch); measured.
      state_bytes: sent to every machine in a generation.
      ray: whether the run uses Ray: it puts calls together to shards, and its driver hands them out.
    """

    horizons: tuple[tuple[int, ...], ...]
    population: int
    members_per_call: int
    seconds_per_step: float
    seconds_per_call: float
    state_bytes: int
    ray: bool = False
    _known: dict[int, tuple[float, float]] = dataclasses.field(  # see `_means`
        default_factory=dict, init=False, repr=False, compare=False
    )

    @property
    def candidate_steps(self) -> int:
        return self.population * sum(map(sum, self.horizons))

    def hours(self, workers: int) -> float:
        """Duration with `workers` workers as fast as the measured one, none of which fails."""
        seconds, _ = self._means(workers)
        return seconds * len(self.horizons) / 3600

    def shards(self, workers: int) -> float:
        """Shards of a generation, the mean."""
        _, shards = self._means(workers)
        return shards

    def bytes_per_generation(self, machines: int) -> float:
        """Bytes that the driver sends and receives for a generation, the mean, with one worker on each machine."""
        members = self.population * len(self.horizons[0])
        return machines * self.state_bytes + self.shards(machines) * _ANSWER_BYTES + 4 * 2 * members

    def _means(self, workers: int) -> tuple[float, float]:
        """(seconds, shards) of a generation, the means; computed once for each number of workers."""
        if workers not in self._known:
            each = [self._shard_seconds(horizons, workers) for horizons in self._chosen()]
            seconds = sum(self._generation_seconds(shards, workers) for shards in each) / len(each)
            self._known[workers] = seconds, sum(map(len, each)) / len(each)
        return self._known[workers]

    def _chosen(self) -> list[tuple[int, ...]]:
        """Generations that stand for all: each of an equal share of them, ordered by their length."""
        count = min(len(self.horizons), _GENERATIONS)
        ordered = sorted(self.horizons, key=sum)
        return [ordered[int((i + 0.5) * len(ordered) / count)] for i in range(count)]

    def _generation_seconds(self, shards: Sequence[float], workers: int) -> float:
        """A free worker takes the next shard; the driver hands them out one after the other."""
        free = [0.0] * workers
        for seconds in shards:
            heapq.heapreplace(free, free[0] + seconds)
        return max(max(free), len(shards) * _RAY_SHARD * self.ray) + _GENERATION

    def _shard_seconds(self, horizons: Sequence[int], workers: int) -> list[float]:
        """The duration of each shard of a generation, in the order in which they are handed out."""
        each, calls = self.members_per_call * self.seconds_per_step, math.ceil(self.population / self.members_per_call)
        seconds = [self.seconds_per_call + each * horizon for horizon in horizons for _ in range(calls)]
        if not self.ray:
            return seconds
        draws = [index for index in range(len(horizons)) for _ in range(calls)]
        return [sum(seconds[i] for i in shard) + _RAY_SHARD for shard in cut_shards(seconds, workers, draws)]


def estimate(config: Config, log: Callable[[str], None] = lambda _: None) -> Estimate:
    """Measure the speed of one worker on this machine and compute the rest.

    Args:
      config: of the run.
      log: called before each step that may take a while.

    Raises:
      UserError, TaskError, L3RSError: the configuration cannot be run.
    """
    setup = Setup.build(config, log)
    execution, population = setup.config.execution, setup.config.outer.population
    members, plan = execution.members_per_call, execution.plan
    assert members != "auto"
    assert plan != "auto"
    horizons = tuple(tuple(draw.horizon for draw in setup.generation(n).draws) for n in range(config.outer.steps))
    state = setup.fresh().strategy
    spec = setup.generation(0)
    shard = cut(population, members)[0]
    device = jax.local_devices()[0]

    def measure(number: int, task: AnyTask) -> tuple[float, float]:
        log(f"measuring task {number} of {len(setup.tasks)}, {task.name}: compiling takes a while")
        call = candidate_losses(task, setup.spec, setup.strategy, plan)
        placed = jax.device_put((state, spec.key, sample(task, jax.random.key(0)), task.data, shard), device)
        *arguments, data, own_shard = placed
        with callbacks(task.name):
            return time_steps(lambda steps: call(*arguments, np.int32(steps), data, own_shard), _STEPS, _ROUNDS)

    measured = [measure(number, task) for number, task in enumerate(setup.tasks, 1)]
    per_step, per_call = (float(x) for x in np.mean(measured, axis=0))
    host: Any = jax.tree.leaves(jax.tree.map(np.asarray, (state, spec.key, [draw.sample for draw in spec.draws])))
    return Estimate(
        horizons=horizons,
        population=population,
        members_per_call=members,
        seconds_per_step=max(per_step / members, 1e-9),
        seconds_per_call=max(per_call, 0.0),
        state_bytes=sum(leaf.nbytes for leaf in host),
        ray=execution.backend == "ray",
    )


def check_workers(workers: Sequence[int]) -> None:
    """Raise UserError unless an estimate can be made for these numbers of workers."""
    if not workers or min(workers) < 1 or max(workers) > _MAX_WORKERS:
        raise UserError(f"--workers is {list(workers)}; each number must be from 1 to {_MAX_WORKERS:,}")


def table(found: Estimate, workers: Sequence[int] = WORKERS) -> Table:
    """Hours and efficiency for each number of workers."""
    view = Table(title="expected with workers as fast as this machine's")
    for column in ("workers", "hours", "efficiency", "shards per generation", "sent per generation"):
        view.add_column(column, justify="right")
    one = found.hours(1)
    for count in workers:
        hours, sent = found.hours(count), found.bytes_per_generation(count)
        row = (f"{count:,}", f"{hours:,.2f}", f"{one / (count * hours):.0%}", f"{found.shards(count):,.0f}")
        view.add_row(*row, f"{sent / 2**10:,.0f} KiB")
    return view
