"""The Evaluator in this process: a generation's candidates, spread over all local devices.

The population is cut into chunks of `members_per_call`; each chunk is one compiled call that
regenerates its members from (strategy state, key). A member's fitness is a pure function of
(state, spec, member), so neither the number of devices nor the order of completion changes a bit.
"""

from __future__ import annotations

import contextlib
import queue
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

import l3rs
from metatrain.inner.rollout import Plan, fused_rollout, learned, stepwise_rollout
from metatrain.outer.strategy import State, Strategy
from tasks import Task, TaskSample


class GenerationSpec(NamedTuple):
    """What the members of one generation share."""

    generation: int
    key: jax.Array  # uint32 [2], of `Strategy.ask`
    sample: TaskSample
    horizon: int
    task: int = 0  # which of the run's tasks


class Evaluator(Protocol):
    """Evaluates a generation."""

    def evaluate(self, state: State, spec: GenerationSpec, waiting: Callable[[str], None] | None = None) -> np.ndarray:
        """The meta-loss of each member, float32 [population]; non-finite where it diverged.

        `waiting` is called once, when nobody is there to do it.
        """

    def report(self) -> dict[str, Any]:
        """What a generation's metrics say of the workers: `workers`, how many there are, and more."""

    def close(self) -> None:
        """Free what it holds."""


class LocalEvaluator:
    """Evaluates on devices of this process.

    Args:
      tasks: what candidates train; each generation one of them.
      spec: the form of the candidates.
      strategy: makes the members.
      population: members of a generation.
      members_per_call: candidates in one compiled call; results may depend on it in the last bits.
      plan: "fused", chunks of members in one compiled loop; "stepwise", a member at a time.
      devices: where; all local devices when not given.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        spec: l3rs.Spec,
        strategy: Strategy,
        population: int,
        members_per_call: int,
        plan: Plan,
        devices: Sequence[jax.Device] | None = None,
    ) -> None:
        self._devices = list(devices or jax.local_devices())
        self._data = [[jax.device_put(task.data, device) for device in self._devices] for task in tasks]
        self._population = population
        self._chunk = members_per_call
        self._pool = ThreadPoolExecutor(len(self._devices))
        self._calls = [candidate_losses(task, spec, strategy, plan) for task in tasks]

    def evaluate(self, state: State, spec: GenerationSpec, waiting: Callable[[str], None] | None = None) -> np.ndarray:
        del waiting  # this process is always there
        chunks: queue.SimpleQueue[np.ndarray] = queue.SimpleQueue()
        for members in cut(self._population, self._chunk):
            chunks.put(members)

        fitness = np.full(self._population, np.nan, np.float32)
        call = self._calls[spec.task]

        def work(device: jax.Device, data: Any) -> None:
            arguments = jax.device_put((state, spec.key, spec.sample, np.int32(spec.horizon)), device)
            while True:
                try:
                    members = chunks.get_nowait()
                except queue.Empty:
                    return
                fitness[members], self._chunk = fitness_by_halves(
                    lambda part: np.asarray(call(*arguments, data, jax.device_put(part, device))),
                    members,
                    self._chunk,
                )

        try:
            for done in [
                self._pool.submit(work, *place) for place in zip(self._devices, self._data[spec.task], strict=True)
            ]:
                done.result()
        finally:
            while not chunks.empty():  # interrupted, or a device failed: the others need not go on
                with contextlib.suppress(queue.Empty):
                    chunks.get_nowait()
        return fitness

    def report(self) -> dict[str, Any]:
        return {"workers": len(self._devices)}

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


def cut(population: int, chunk: int) -> list[np.ndarray]:
    """Member numbers, int32 [chunk] each: one compiled shape. The last is filled up with the last member."""
    return [
        np.minimum(np.arange(first, first + chunk, dtype=np.int32), population - 1)
        for first in range(0, population, chunk)
    ]


def fitness_by_halves(
    call: Callable[[np.ndarray], np.ndarray], members: np.ndarray, chunk: int
) -> tuple[np.ndarray, int]:
    """Call for `members` in chunks; chunks that do not fit the memory are halved, and stay so.

    Args:
      call: member numbers int32 [chunk] -> fitness [chunk].
      members: int32 [m].
      chunk: how many at once.

    Returns:
      (fitness float32 [m], the chunk that fitted).
    """
    while True:
        try:
            parts = [call(np.resize(part, chunk))[: len(part)] for part in _parts(members, chunk)]
            return np.concatenate(parts).astype(np.float32), chunk
        except jax.errors.JaxRuntimeError as error:
            if chunk == 1 or "RESOURCE_EXHAUSTED" not in str(error):
                raise
        chunk = (chunk + 1) // 2


def _parts(members: np.ndarray, chunk: int) -> list[np.ndarray]:
    return [members[first : first + chunk] for first in range(0, len(members), chunk)]


def candidate_losses(task: Task, spec: l3rs.Spec, strategy: Strategy, plan: Plan) -> Any:
    """(state, key, sample, horizon, data, members int32 [m]) -> meta-losses float32 [m], compiled."""

    candidate = learned(spec)

    def chosen(state: State, key: jax.Array, members: jax.Array) -> l3rs.spec.Theta:
        return jax.tree.map(lambda x: x[members], strategy.ask(jax.random.wrap_key_data(key), state))

    def fused(
        state: State, key: jax.Array, sample: TaskSample, horizon: jax.Array, data: Any, members: jax.Array
    ) -> jax.Array:
        rollout = jax.vmap(fused_rollout(task, candidate, ("outer_valid",)), (0, None, None, None))
        return rollout(chosen(state, key, members), data, sample, horizon)["outer_valid"].loss

    rollout = stepwise_rollout(task, candidate, ("outer_valid",))
    member = jax.jit(chosen)

    def stepwise(
        state: State, key: jax.Array, sample: TaskSample, horizon: jax.Array, data: Any, members: jax.Array
    ) -> np.ndarray:
        thetas = [member(state, key, m) for m in members]
        return np.array([rollout(theta, data, sample, horizon)["outer_valid"].loss for theta in thetas])

    return jax.jit(fused) if plan == "fused" else stepwise
