"""What a run's plan and members per call are chosen by, measured on the devices that will compute it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Protocol

import jax

import l3rs
from metatrain.config import OuterConfig, Plan
from metatrain.inner.devices import device_kind
from metatrain.inner.plan import device_memory, members_that_fit, plan_seconds
from metatrain.outer.strategy import make_strategy
from tasks import Task
from tasks.base import AnyTask


@dataclasses.dataclass(frozen=True)
class Probe:
    """Measures on the first device of this process.

    Args:
      tasks, spec, outer: the run.
      log: called before each step that may take a while.
    """

    tasks: Sequence[AnyTask]
    spec: l3rs.Spec
    outer: OuterConfig
    log: Callable[[str], None] = lambda _: None

    def device(self) -> str:
        return device_kind()

    def plan_seconds(self) -> dict[Plan, float]:
        """Seconds per candidate-step of each plan, the mean over the tasks."""
        return plan_seconds([task for task in self.tasks if isinstance(task, Task)], self.spec, self.log)

    def members_that_fit(self) -> int | None:
        """Candidates of a fused call that fit into the device's memory; None for a CPU, which has no limit of its own.

        Raises:
          UserError: not even one fits.
        """
        memory = device_memory(jax.local_devices()[0])
        if memory is None:
            return None
        self.log("computing how many candidates fit into the memory of a device: compiling takes a while")
        strategy = make_strategy(self.outer, l3rs.init_meta_params(jax.random.key(0), self.spec))
        tasks = [task for task in self.tasks if isinstance(task, Task)]
        return min(members_that_fit(task, self.spec, strategy, memory) for task in tasks)


class Measurements(Protocol):
    """Measures on every kind of device of a run."""

    def plan_seconds(self) -> dict[str, dict[Plan, float]]:
        """{kind of device: {plan: seconds per candidate-step, the mean over the tasks}}."""

    def members_that_fit(self) -> dict[str, int | None]:
        """{kind of device: candidates of a fused call that fit into its memory; None without a limit}.

        Raises:
          UserError: not even one fits.
        """

    def close(self) -> None:
        """Release what the measurements took."""


class LocalMeasurements:
    """`Measurements` in this process, whose devices are all of one kind.

    Args:
      probe: measures.
    """

    def __init__(self, probe: Probe) -> None:
        self._probe = probe

    def plan_seconds(self) -> dict[str, dict[Plan, float]]:
        return {self._probe.device(): self._probe.plan_seconds()}

    def members_that_fit(self) -> dict[str, int | None]:
        return {self._probe.device(): self._probe.members_that_fit()}

    def close(self) -> None:
        pass
