"""The workers of a run as Ray actors: asked for, set up, and given up when they are lost."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np

import l3rs
from l3rs.io.files import first_line
from metatrain.config import ExecutionConfig, OuterConfig, Plan, UserError
from metatrain.ray.health import Health
from metatrain.ray.share import actor_options, room, worker_share
from metatrain.ray.worker import Job, versions
from tasks import Task
from tasks.base import AnyTask
from tasks.data.cache import resident

COUNT_SECONDS = 1.0  # between two looks at the size of the cluster


@dataclasses.dataclass(eq=False)
class Member:
    """A worker as the driver sees it.

    Attributes:
      actor: Ray's handle.
      chunk: members in one compiled call.
      calls: references to the answers that it has not given yet, in the order of the calls.
      since: when it was asked for, or sent the arrays that it needs.
    """

    actor: Any
    chunk: int
    calls: dict[Any, None] = dataclasses.field(default_factory=dict)
    since: float = 0.0


class Sendable(Protocol):
    """The run as it is sent to workers: see `Package`."""

    blob: Any
    refs: dict[int, Any]

    def send(self, numbers: Sequence[int]) -> None: ...


class Fleet:
    """Keeps as many workers as the run wants.

    Args:
      worker: the actor's class.
      job: see `Package`.
      execution: workers and resources.
      chunk: members in one compiled call of a new worker.
      health: decides when new workers may be asked for.
      log: called with news of the workers.

    Attributes:
      members: workers that are ready.
      starting: {reference to the result of its set-up: worker} of the others.
      lost: how many workers were lost.

    """

    def __init__(
        self,
        worker: type,
        job: Sendable,
        execution: ExecutionConfig,
        chunk: int,
        health: Health,
        log: Callable[[str], None],
    ) -> None:
        import ray

        self.members: dict[Member, None] = {}
        self.starting: dict[Any, Member] = {}
        self.lost = 0
        self._ray, self._worker, self._job = ray, worker, job
        self._execution, self._chunk, self._health, self._log = execution, chunk, health, log
        self._wanted, self._count_at = 0, 0.0  # workers, and when to look whether the cluster has grown

    @property
    def missing(self) -> int:
        """Workers that are wanted and not ready."""
        return self._wanted - len(self.members)

    def recruit(self, now: float) -> list[Any]:
        """Ask for workers until there are as many as wanted. Ray places them when there is room.

        Returns:
          References to the results of their set-up, for `receive`.
        """
        if now >= self._count_at:
            self._count_at = now + COUNT_SECONDS
            self._wanted = wanted_workers(self._execution)
        if not self._health.may_recruit(now):
            return []
        refs = []
        for _ in range(self.missing - len(self.starting)):
            resources = self._execution.resources_per_worker
            actor: Any = (
                self._ray.remote(self._worker)
                .options(**actor_options(resources), max_restarts=0, scheduling_strategy="SPREAD")
                .remote(worker_share(resources))
            )
            refs.append(self._set_up(Member(actor, self._chunk), now))
        return refs

    def receive(self, ref: Any, future: Any, now: float) -> Any:
        """The set-up of a worker has ended, one way or another.

        Args:
          ref: to its result.
          future: of it.
          now: the time.

        Returns:
          The worker, if it is ready; a reference to the result of the next part of its set-up; or None if it failed.

        Raises:
          UserError: it failed, and no worker has ever been ready: the run is at fault.
        """
        member = self.starting.pop(ref)
        try:
            needed = future.result()
        except self._ray.exceptions.RayTaskError as error:
            self._reject(member, f"a worker cannot be set up: {first_line(error.cause or error)}", now)
            return None
        except self._ray.exceptions.RayError as error:
            self._failed_start(member, f"a worker was lost during its set-up ({first_line(error)})", now)
            return None
        return self.welcome(member, needed, now)

    def welcome(self, member: Member, needed: list[int] | str, now: float) -> Any:
        """Use a worker, send it the arrays that it needs, or reject it, as its set-up's result says; see `receive`.

        Raises:
          UserError: it is rejected, and no worker has ever been ready.
        """
        if isinstance(needed, str):
            self._reject(member, needed, now)
            return None
        if needed:  # its machine's cache lacks these arrays
            self._job.send(needed)
            return self._set_up(member, now)
        self._health.started(member, now)
        self.members[member] = None
        return member

    def lose(self, member: Member, why: str) -> None:
        """Give up a worker."""
        del self.members[member]
        self._health.lost(member)
        self.lost += 1
        self._log(f"a worker is lost ({why}); its candidates are evaluated again")
        self._kill(member)

    def halve_chunks(self, chunk: int, why: str) -> None:
        """Let new workers start with half of a chunk that was too large."""
        if chunk > 1 and self._chunk >= chunk:
            self._chunk = math.ceil(chunk / 2)
            self._log(f"{why}; new workers evaluate {self._chunk} candidates at once")

    def close(self) -> None:
        for member in [*self.members, *self.starting.values()]:
            self._kill(member)
        self.members, self.starting = {}, {}

    def give_up_slow_starts(self, now: float) -> None:
        """Ask again for workers that take too long: their process hangs, or the cluster has no room for them."""
        limit = self._health.start_seconds()
        slow = [(ref, member) for ref, member in self.starting.items() if now - member.since > limit]
        for ref, member in slow:
            del self.starting[ref]
            self._kill(member)
        if slow:
            self._log(
                f"{len(slow)} of the workers asked for did not start within {limit:.0f} s ({self.free_resources()}); "
                "they are asked for again"
            )
            self._health.slow_start()

    def free_resources(self) -> str:
        """See `free_resources`."""
        return free_resources(self._ray, self._execution)

    def _set_up(self, member: Member, now: float) -> Any:
        member.since = now
        ref = member.actor.setup.remote(self._job.blob, self._job.refs)
        self.starting[ref] = member
        return ref

    def _reject(self, member: Member, why: str, now: float) -> None:
        """If no worker has ever been ready, the run is at fault; later it is the worker's machine."""
        if not self._health.any_started:
            raise UserError(why)
        self._failed_start(member, f"a worker is not used: {why}", now)

    def _failed_start(self, member: Member, sentence: str, now: float) -> None:
        self.lost += 1
        self._log(sentence)
        self._health.failed_start(now)
        self._kill(member)

    def _kill(self, member: Member) -> None:
        with contextlib.suppress(Exception):
            self._ray.kill(member.actor)


def wanted_workers(execution: ExecutionConfig) -> int:
    """How many workers a run wants: as many as it says, or as many as the cluster has room for now."""
    if execution.workers != "auto":
        return execution.workers
    return max(sum(room(node, execution.resources_per_worker) for node in live_nodes()), 1)


def free_resources(ray: Any, execution: ExecutionConfig) -> str:
    """What the cluster has and what of it is free, in the resources that a worker needs."""
    total, free = ray.cluster_resources(), ray.available_resources()
    return ", ".join(
        f"{name}: {free.get(name, 0):g} of {total.get(name, 0):g} free, a worker needs {amount:g}"
        for name, amount in execution.resources_per_worker.items()
    )


def live_nodes() -> list[Mapping[str, float]]:
    """The resources of each node of the cluster, as Ray names them."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def refuse_what_never_fits(execution: ExecutionConfig) -> None:
    """Raise UserError if no node can hold a worker, unless the cluster may grow."""
    needs, nodes = execution.resources_per_worker, live_nodes()
    if execution.autoscaling or any(room(node, needs) for node in nodes):
        return
    have = {", ".join(f"{name} {node.get(name, 0):g}" for name in needs) for node in nodes}
    raise UserError(
        f"execution.resources_per_worker is {', '.join(f'{name} {amount:g}' for name, amount in needs.items())}; "
        f"no node has that: the cluster's nodes have {' / '.join(sorted(have)) or 'nothing'} "
        "(with execution.autoscaling=true the run waits for such a node)"
    )


class Package:
    """The run as it is sent to workers: a pickled `Job`, and arrays for machines that lack them.

    Attributes:
      blob: Ray's reference to the pickled `Job`.
      refs: Ray's references to arrays that were sent, by number.
    """

    def __init__(self, tasks: Sequence[AnyTask], spec: l3rs.Spec, outer: OuterConfig, plan: Plan) -> None:
        import ray
        from ray import cloudpickle

        arrays, treedef = jax.tree.flatten([task.data for task in tasks])
        self._put = ray.put
        self._arrays = [np.asanyarray(array) for array in arrays]
        numbers = jax.tree.unflatten(treedef, range(len(arrays)))
        names = [field.name for field in dataclasses.fields(Task)]
        hollow = [
            {**{name: getattr(task, name) for name in names}, "data": own} if isinstance(task, Task) else task
            for task, own in zip(tasks, numbers, strict=True)
        ]
        where = [resident(array) for array in self._arrays]
        self.blob = ray.put(cloudpickle.dumps(Job(hollow, where, spec, outer, plan, versions(plan))))
        self.refs: dict[int, Any] = {}

    def send_all(self) -> None:
        """Make all arrays available on the cluster."""
        self.send(range(len(self._arrays)))

    def send(self, numbers: Sequence[int]) -> None:
        """Make arrays available on the cluster."""
        for i in numbers:
            if i not in self.refs:
                self.refs[i] = self._put(np.asarray(self._arrays[i]))
