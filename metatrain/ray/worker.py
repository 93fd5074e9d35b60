"""The worker: a Ray actor that evaluates shards."""

from __future__ import annotations

import dataclasses
import platform
import socket
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any, NamedTuple

import jax
import numpy as np

import l3rs
from metatrain.config import OuterConfig, Plan
from metatrain.inner.device_runner import DeviceRunner, split
from metatrain.inner.devices import device_kind
from metatrain.inner.population import candidate_losses, plan_devices
from metatrain.outer.strategy import make_strategy
from metatrain.ray.metrics import WorkerCounters
from metatrain.ray.node_report import PACKAGES
from metatrain.ray.share import Share, take_share
from tasks import Task, TaskError
from tasks.base import AnyTask
from tasks.data.cache import Resident, find_resident


class Answer(NamedTuple):
    """A worker's answer for one shard."""

    round: int
    shard: int
    fitness: np.ndarray  # float32 [members]
    chunk: int  # members in one compiled call; fewer than asked for if memory ran out
    device: str = ""  # kind of the device


@dataclasses.dataclass(frozen=True)
class Job:
    """The description of a run for its workers; pickled once."""

    # The fields of each Task, with arrays replaced by their numbers; a TorchTask is built anew where it is unpickled.
    tasks: list[dict[str, Any] | AnyTask]
    arrays: list[Resident | None]  # where to find each array in a machine's cache
    spec: l3rs.Spec
    outer: OuterConfig
    plan: Plan
    versions: dict[str, str]


def versions(plan: Plan) -> dict[str, str]:
    """Versions that must be equal on driver and workers for equal results."""
    packages = [*PACKAGES, "torch"] if plan == "torch" else PACKAGES
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


class Worker:
    """The actor: one process with a copy of the tasks and the compiled rollouts, on all devices of its share.

    Args:
      share: the part of the machine that it may use.
    """

    def __init__(self, share: Share) -> None:
        take_share(share)
        self._round = -1

    def setup(self, blob: bytes, sent: Mapping[int, Any]) -> list[int] | str:
        """Build the tasks.

        Args:
          blob: a pickled `Job`.
          sent: references to arrays, by number.

        Returns:
          The numbers of the arrays that are still missing, or the reason why a task cannot be built.
        """
        found = unpack(blob, sent)
        if not isinstance(found, tuple):
            return found
        job, tasks = found
        strategy = make_strategy(job.outer, l3rs.init_meta_params(jax.random.key(0), job.spec))
        calls = [candidate_losses(task, job.spec, strategy, job.plan) for task in tasks]
        self._runner, self._kind = DeviceRunner(tasks, calls, plan_devices(job.plan)), device_kind()
        self._counters = WorkerCounters()
        return []

    def evaluate(
        self, round_: int, shared: Sequence[Any], shard: int, draw: int, members: np.ndarray, chunk: int
    ) -> Answer:
        """The meta-losses of `members` in one draw of the generation.

        Args:
          round_, shard: returned with the answer.
          shared: holds a reference to (task, arguments of `candidate_losses`) of each draw.
          draw: its index.
          members: int32 [m].
          chunk: members in one compiled call.
        """
        import ray

        if round_ != self._round:
            draws = ray.get(shared[0])
            self._horizons = [int(np.asarray(own[-1])) for _, own in draws]
            self._runner.begin(draws)
            self._round = round_
        began = time.monotonic()
        parts, chunk = self._runner.run([(draw, part) for part in split(members, chunk)], chunk)
        self._counters.add(len(members) * self._horizons[draw], time.monotonic() - began)
        return Answer(round_, shard, np.concatenate(parts), chunk, self._kind)


def unpack(blob: bytes, sent: Mapping[int, Any]) -> tuple[Job, list[AnyTask]] | list[int] | str:
    """A run from what a worker is sent.

    Args:
      blob: a pickled `Job`.
      sent: references to arrays, by number.

    Returns:
      (the job, its tasks); or the numbers of arrays that are still missing; or why a task cannot be built.
    """
    import ray
    from ray import cloudpickle

    try:
        job: Job = cloudpickle.loads(blob)
    except (ImportError, AttributeError) as error:
        return f"the task's code cannot be imported on {socket.gethostname()}: {error}"
    except TaskError as error:
        return f"the task cannot be built on {socket.gethostname()}: {error}"
    if job.versions != (ours := versions(job.plan)):
        different = [f"{k} {ours[k]} (driver: {v})" for k, v in job.versions.items() if ours[k] != v]
        return f"{socket.gethostname()} has {', '.join(different)}; all machines need the same versions"
    found: dict[int, np.ndarray] = {i: ray.get(ref) for i, ref in sent.items()}
    for i, where in enumerate(job.arrays):
        if i not in found and where is not None and (array := find_resident(where)) is not None:
            found[i] = array
    if missing := [i for i in range(len(job.arrays)) if i not in found]:
        return missing
    return job, [own if isinstance(own, AnyTask) else _filled(own, found) for own in job.tasks]


def _filled(fields: Mapping[str, Any], arrays: Mapping[int, np.ndarray]) -> Task:
    """A task from its fields in a `Job` and the arrays by number."""
    return Task(**{**fields, "data": jax.tree.map(lambda i: arrays[i], fields["data"])})


def unusable(answer: Any, round_: int, shard: int, members: int) -> str | None:
    """Why an answer cannot be used; None if it can."""
    if not isinstance(answer, Answer):
        return f"it is a {type(answer).__name__}"
    if (answer.round, answer.shard) != (round_, shard):
        return f"it is for shard {answer.shard} of round {answer.round}, not {shard} of {round_}"
    fitness = answer.fitness
    if not isinstance(fitness, np.ndarray) or fitness.shape != (members,) or fitness.dtype != np.float32:
        shape = getattr(fitness, "shape", None)
        return f"it contains {getattr(fitness, 'dtype', type(fitness).__name__)}{shape}, not float32({members},)"
    return None
