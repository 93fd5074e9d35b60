"""The Evaluator in this process: a generation's candidates, spread over all local devices.

The population is cut into chunks of `members_per_call`; each chunk is one compiled call that
regenerates its members from (strategy state, key). A member's fitness is a pure function of
(state, spec, member), so neither the number of devices nor the order of completion changes a bit.
"""

from __future__ import annotations

import contextlib
import queue
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

import l3rs
from metatrain.rollout import Plan, fused_rollout, learned, stepwise_rollout
from metatrain.strategy import State, Strategy
from tasks import Task, TaskSample


class GenerationSpec(NamedTuple):
    """What the members of one generation share."""

    generation: int
    key: jax.Array  # uint32 [2], of `Strategy.ask`
    sample: TaskSample
    horizon: int


class Evaluator(Protocol):
    """Evaluates a generation."""

    def evaluate(self, state: State, spec: GenerationSpec) -> np.ndarray:
        """The meta-loss of each member, float32 [population]; non-finite where it diverged."""

    def close(self) -> None:
        """Free what it holds."""


class LocalEvaluator:
    """Evaluates on devices of this process.

    Args:
      task: what candidates train.
      spec: the form of the candidates.
      strategy: makes the members.
      population: members of a generation.
      members_per_call: candidates in one compiled call; results may depend on it in the last bits.
      plan: "fused", chunks of members in one compiled loop; "stepwise", a member at a time.
      devices: where; all local devices when not given.
    """

    def __init__(
        self,
        task: Task,
        spec: l3rs.Spec,
        strategy: Strategy,
        population: int,
        members_per_call: int,
        plan: Plan,
        devices: Sequence[jax.Device] | None = None,
    ) -> None:
        self._devices = list(devices or jax.local_devices())
        self._data = [jax.device_put(task.data, device) for device in self._devices]
        self._population = population
        self._chunk = members_per_call
        self._pool = ThreadPoolExecutor(len(self._devices))
        self._call = candidate_losses(task, spec, strategy, plan)

    def evaluate(self, state: State, spec: GenerationSpec) -> np.ndarray:
        chunks: queue.SimpleQueue[np.ndarray] = queue.SimpleQueue()
        for first in range(0, self._population, self._chunk):
            members = np.arange(first, first + self._chunk)
            chunks.put(np.minimum(members, self._population - 1))  # the last chunk is filled up

        fitness = np.full(self._population, np.nan, np.float32)

        def work(device: jax.Device, data: Any) -> None:
            arguments = jax.device_put((state, spec.key, spec.sample, np.int32(spec.horizon)), device)
            while True:
                try:
                    members = chunks.get_nowait()
                except queue.Empty:
                    return
                fitness[members] = np.asarray(self._call(*arguments, data, jax.device_put(members, device)))

        try:
            for done in [self._pool.submit(work, *place) for place in zip(self._devices, self._data, strict=True)]:
                done.result()
        finally:
            while not chunks.empty():  # interrupted, or a device failed: the others need not go on
                with contextlib.suppress(queue.Empty):
                    chunks.get_nowait()
        return fitness

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


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
