"""Evaluation of a generation in this process, on all local devices.

The population is cut into chunks of `members_per_call`. Each chunk is one compiled call that
regenerates its members from (strategy state, key). A member's fitness is a pure function of
(state, spec, draw, member), so neither the number of devices nor the order of completion changes a bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

import l3rs
from metatrain.config import Plan
from metatrain.inner.device_runner import DeviceRunner
from metatrain.inner.rollout import Rollout, fused_rollout, learned, stepwise_rollout
from metatrain.outer.strategy import State, Strategy
from tasks import Task, TaskSample
from tasks.base import AnyTask


class Draw(NamedTuple):
    """One training run that every member of a generation does: a task, where it starts, and how long it is."""

    sample: TaskSample
    horizon: int
    task: int = 0  # index into the run's tasks


class GenerationSpec(NamedTuple):
    """The values that all members of a generation share."""

    generation: int
    key: jax.Array  # uint32 [2], of `Strategy.ask`
    draws: tuple[Draw, ...]  # `outer.samples` of them


class Evaluator(Protocol):
    """Evaluates a generation."""

    def evaluate(self, state: State, spec: GenerationSpec, waiting: Callable[[str], None] | None = None) -> np.ndarray:
        """The meta-loss of each member in each draw, float32 [draws, population]; non-finite where training diverged.

        Args:
          state: of the strategy.
          spec: of the generation.
          waiting: called once with the reason if there is no worker left to compute.
        """

    def report(self) -> dict[str, Any]:
        """The workers' part of a generation's metrics: `workers`, their number, and more."""

    def close(self) -> None:
        """Release threads, processes and connections."""


class LocalEvaluator:
    """Evaluates on the local devices of this process.

    Args:
      tasks: what candidates train; each generation uses one of them.
      spec: the form of the optimizer.
      strategy: generates the members.
      population: members per generation.
      members_per_call: candidates in one compiled call; results may depend on it in the last bits.
      plan: "fused", chunks of members in one compiled loop; "stepwise" and "torch", one member at a time.
    """

    def __init__(
        self,
        tasks: Sequence[AnyTask],
        spec: l3rs.Spec,
        strategy: Strategy,
        population: int,
        members_per_call: int,
        plan: Plan,
    ) -> None:
        self._population = population
        self._chunk = members_per_call
        self._calls = [candidate_losses(task, spec, strategy, plan) for task in tasks]
        self._runner = DeviceRunner(tasks, self._calls, plan_devices(plan))

    def evaluate(self, state: State, spec: GenerationSpec, waiting: Callable[[str], None] | None = None) -> np.ndarray:
        del waiting  # this process can always compute
        arguments = [(state, spec.key, draw.sample, np.int32(draw.horizon)) for draw in spec.draws]
        self._runner.begin([(draw.task, own) for draw, own in zip(spec.draws, arguments, strict=True)])
        chunks = generation_chunks(spec.draws, self._population, self._chunk)
        found, self._chunk = self._runner.run(chunks, self._chunk)
        losses = np.full((len(spec.draws), self._population), np.nan, np.float32)
        for (index, members), own in zip(chunks, found, strict=True):
            losses[index, members] = own
        return losses

    def report(self) -> dict[str, Any]:
        return {"workers": len(self._runner.devices)}

    def close(self) -> None:
        self._runner.close()


def plan_devices(plan: Plan) -> list[jax.Device]:
    """The devices of this process that a plan uses: all, or one where PyTorch computes, one candidate at a time."""
    return jax.local_devices()[:1] if plan == "torch" else jax.local_devices()


def host_arguments(state: State, spec: GenerationSpec) -> list[tuple[int, tuple[Any, ...]]]:
    """For each draw, (index of its task, first arguments of `candidate_losses`), to be sent to other processes.

    The arguments are arrays of the host.
    """

    def arguments(draw: Draw) -> tuple[Any, ...]:
        return (*jax.tree.map(np.asarray, (state, spec.key, draw.sample)), np.int32(draw.horizon))

    return [(draw.task, arguments(draw)) for draw in spec.draws]


def cut(population: int, chunk: int) -> list[np.ndarray]:
    """Cut member numbers into arrays int32 [chunk]. The last one repeats the last member, to have the same shape."""
    return [
        np.minimum(np.arange(first, first + chunk, dtype=np.int32), population - 1)
        for first in range(0, population, chunk)
    ]


def generation_chunks(draws: Sequence[Draw], population: int, chunk: int) -> list[tuple[int, np.ndarray]]:
    """The calls of a generation, as pairs (index of the draw, member numbers int32 [chunk]).

    Those of the longest horizon come first, so that no device waits long for the last one.
    """
    parts = cut(population, chunk)
    longest_first = sorted(range(len(draws)), key=lambda index: -draws[index].horizon)
    return [(index, members) for index in longest_first for members in parts]


def candidate_losses(task: AnyTask, spec: l3rs.Spec, strategy: Strategy, plan: Plan) -> Any:
    """(state, key, sample, horizon, data, members int32 [m]) -> meta-losses float32 [m]; compiled, if by JAX."""

    def chosen(state: State, key: jax.Array, members: jax.Array) -> l3rs.spec.Theta:
        return jax.tree.map(lambda x: x[members], strategy.ask(jax.random.wrap_key_data(key), state))

    def one_by_one(rollout: Rollout) -> Any:
        member = jax.jit(chosen)

        def losses(
            state: State, key: jax.Array, sample: TaskSample, horizon: jax.Array, data: Any, members: jax.Array
        ) -> np.ndarray:
            thetas = [member(state, key, m) for m in members]
            return np.array([rollout(theta, data, sample, horizon)["outer_valid"].loss for theta in thetas])

        return losses

    if plan == "torch":
        from metatrain.inner.torch_rollout import LearnedTorch, torch_rollout
        from tasks.torch import TorchTask
        from tasks.torch_training import Training

        assert isinstance(task, TorchTask)
        return one_by_one(torch_rollout(Training(task), LearnedTorch(spec), ("outer_valid",)))
    assert isinstance(task, Task)
    candidate, own = learned(spec), task
    if plan == "stepwise":
        return one_by_one(stepwise_rollout(own, candidate, ("outer_valid",)))

    def fused(
        state: State, key: jax.Array, sample: TaskSample, horizon: jax.Array, data: Any, members: jax.Array
    ) -> jax.Array:
        rollout = jax.vmap(fused_rollout(own, candidate, ("outer_valid",)), (0, None, None, None))
        return rollout(chosen(state, key, members), data, sample, horizon)["outer_valid"].loss

    return jax.jit(fused)
