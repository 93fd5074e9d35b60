"""Cost of a run before it is started: `metatrain estimate`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from rich.table import Table

from metatrain.config import Config, UserError
from metatrain.inner.plan import time_steps
from metatrain.inner.population import candidate_losses, cut
from metatrain.outer.setup import Setup
from tasks import sample
from tasks.base import AnyTask

WORKERS = (1, 2, 4, 8, 16, 32, 64, 128)
_STEPS, _ROUNDS = 10, 3  # of the measurement
_ANSWER_BYTES = 200  # of a pickled answer, apart from its scalars


@dataclasses.dataclass(frozen=True)
class Estimate:
    """The work of a run, and the speed of one worker of this machine.

    Attributes:
      horizons: of each generation's draws, [G][samples]; they follow from the seed.
      population, members_per_shard: candidates per generation, and per shard.
      seconds_per_step: of a candidate-step on one core or accelerator; measured.
      seconds_per_call: of a shard apart from its steps (evaluation of the meta-loss, dispatch); measured.
      state_bytes: sent to every machine in a generation.
      shard_bytes: sent to a worker and back for one shard.
    """

    horizons: tuple[tuple[int, ...], ...]
    population: int
    members_per_shard: int
    seconds_per_step: float
    seconds_per_call: float
    state_bytes: int
    shard_bytes: int

    @property
    def candidate_steps(self) -> int:
        return self.population * sum(map(sum, self.horizons))

    @property
    def shards(self) -> int:
        """Shards of a generation."""
        return math.ceil(self.population / self.members_per_shard) * len(self.horizons[0])

    def hours(self, workers: int) -> float:
        """Duration with `workers` workers as fast as the measured one, none of which fails."""
        each = self.members_per_shard * self.seconds_per_step
        total = 0.0
        for horizons in self.horizons:
            seconds = np.repeat([self.seconds_per_call + each * h for h in horizons], self.shards // len(horizons))
            total += float(np.sort(seconds)[::-1][::workers].sum())  # in every round of shards, the longest one
        return total / 3600

    def bytes_per_generation(self, machines: int) -> int:
        return machines * self.state_bytes + self.shards * self.shard_bytes


def estimate(config: Config) -> Estimate:
    """Measure the speed of one worker on this machine and compute the rest.

    Raises:
      UserError, TaskError, L3RSError: the configuration cannot be run.
    """
    setup = Setup.build(config)
    execution, population = setup.config.execution, setup.config.outer.population
    members, plan = execution.members_per_call, execution.plan
    assert members != "auto"
    assert plan != "auto"
    horizons = tuple(tuple(draw.horizon for draw in setup.generation(n).draws) for n in range(config.outer.steps))
    state = setup.fresh().strategy
    spec = setup.generation(0)
    shard = cut(population, members)[0]
    device = jax.local_devices()[0]

    def measure(task: AnyTask) -> tuple[float, float]:
        call = candidate_losses(task, setup.spec, setup.strategy, plan)
        placed = jax.device_put((state, spec.key, sample(task, jax.random.key(0)), task.data, shard), device)
        *arguments, data, own_shard = placed
        return time_steps(lambda steps: call(*arguments, np.int32(steps), data, own_shard), _STEPS, _ROUNDS)

    per_step, per_call = (float(x) for x in np.mean([measure(task) for task in setup.tasks], axis=0))
    host: Any = jax.tree.leaves(jax.tree.map(np.asarray, (state, spec.key, [draw.sample for draw in spec.draws])))
    return Estimate(
        horizons=horizons,
        population=population,
        members_per_shard=members,
        seconds_per_step=max(per_step / members, 1e-9),
        seconds_per_call=max(per_call, 0.0),
        state_bytes=sum(leaf.nbytes for leaf in host),
        shard_bytes=_ANSWER_BYTES + 4 * 2 * members,
    )


def table(found: Estimate, workers: Sequence[int] = WORKERS) -> Table:
    """Hours and efficiency for each number of workers."""
    if not workers or min(workers) < 1:
        raise UserError(f"--workers is {list(workers)}; each number must be ≥ 1")
    view = Table(title="expected with workers as fast as this machine's")
    for column in ("workers", "hours", "efficiency", "sent per generation"):
        view.add_column(column, justify="right")
    for count in workers:
        hours = found.hours(count)
        efficiency = found.hours(1) / (count * hours)
        sent = found.bytes_per_generation(count)
        view.add_row(f"{count:,}", f"{hours:,.2f}", f"{efficiency:.0%}", f"{sent / 2**10:,.0f} KiB")
    return view
