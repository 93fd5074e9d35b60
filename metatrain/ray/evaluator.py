"""The Evaluator on Ray: workers on any number of machines, which may disappear and come back at any time.

A worker is a Ray actor. It receives (strategy state, key, draws, index of a draw, member numbers), regenerates these
members and answers with their meta-losses: scalars. A fitness is a pure function of what was received, so it does not
matter which worker computes it, when, or how often.

The driver hands out work to each worker itself (`pool`), or, if there are many, to aggregators that do so (`groups`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

import l3rs
from metatrain.config import ExecutionConfig, OuterConfig, Plan
from metatrain.inner.population import GenerationSpec, generation_chunks, host_arguments
from metatrain.outer.strategy import State
from metatrain.ray import groups
from metatrain.ray.connection import connect
from metatrain.ray.fleet import Fleet, Package, refuse_what_never_fits, wanted_workers
from metatrain.ray.health import Health
from metatrain.ray.pool import Calls, Pool, Work
from metatrain.ray.worker import Worker
from tasks.base import AnyTask


class RayEvaluator:
    """Evaluates on the workers of a Ray cluster; see `metatrain.inner.population.Evaluator`.

    Args:
      tasks, spec, outer, plan: the candidates and what they train.
      members_per_call: candidates in one compiled call; a shard is one or more calls.
      execution: address, workers, resources, security.
      log: called with what an operator should look at: workers that are lost, long waits.

    Raises:
      UserError: the cluster cannot be used, see `connect`; or no node can hold a worker.
    """

    def __init__(
        self,
        tasks: Sequence[AnyTask],
        spec: l3rs.Spec,
        outer: OuterConfig,
        members_per_call: int,
        plan: Plan,
        execution: ExecutionConfig,
        log: Callable[[str], None],
    ) -> None:
        self._owned = connect(execution, log)
        import ray

        self._ray = ray
        self._population, self._chunk = outer.population, members_per_call
        self._rounds = 0
        self._waited = 0.0  # seconds without any worker
        wait_seconds = 60.0 * execution.wait_minutes
        try:
            refuse_what_never_fits(execution)
            package = Package(tasks, spec, outer, plan)
            self._workers: Pool | groups.Groups
            if wanted_workers(execution) > groups.MANY_WORKERS:
                wanted = lambda: wanted_workers(execution)  # noqa: E731
                self._workers = groups.Groups(Worker, package, execution, members_per_call, wanted, log, wait_seconds)
            else:
                health = Health()
                fleet = Fleet(Worker, package, execution, members_per_call, health, log)
                self._workers = Pool(fleet, health, log, wait_seconds)
        except BaseException:
            self._disconnect()
            raise

    def evaluate(self, state: State, spec: GenerationSpec, waiting: Callable[[str], None] | None = None) -> np.ndarray:
        self._rounds += 1
        shared = [self._ray.put(host_arguments(state, spec))]
        calls = generation_calls(spec, self._population, self._chunk)
        had_workers, last = False, time.monotonic()

        def look() -> bool:
            nonlocal had_workers, last
            if not self._workers.workers:
                self._waited += time.monotonic() - last
            last = time.monotonic()
            if had_workers and not self._workers.workers and waiting:
                waiting("no worker is left: waiting for the cluster")
            had_workers = bool(self._workers.workers)
            return True

        found, _ = self._workers.evaluate(Work(self._rounds, shared, calls), look)
        losses = np.full((len(spec.draws), self._population), np.nan, np.float32)
        losses[calls.draw[:, None], calls.members] = found
        return losses

    def report(self) -> dict[str, Any]:
        """The workers' part of the metrics.

        `workers`: workers now. Since the start, `lost`: workers lost; `duplicated`: shards started twice;
        `requeued`: members evaluated again because their worker was lost; `stale`: answers that came too
        late; `rejected`: unusable answers; `devices`: kinds of the workers' devices; `waited`: seconds without any
        worker.
        """
        return {**self._workers.report(), "waited": round(self._waited, 1)}

    def close(self) -> None:
        self._workers.close()
        self._disconnect()

    def _disconnect(self) -> None:
        if self._owned:
            self._ray.shutdown()


def generation_calls(spec: GenerationSpec, population: int, chunk: int) -> Calls:
    """The calls of a generation; a worker computes each for itself, so how they are shared changes no value."""
    chunks = generation_chunks(spec.draws, population, chunk)
    draw = np.array([index for index, _ in chunks], np.int32)
    horizons = np.array([own.horizon for own in spec.draws], np.float64)
    task = np.array([own.task for own in spec.draws], np.int32)
    return Calls(draw, task[draw], np.stack([members for _, members in chunks]), chunk * horizons[draw])
