"""The Evaluator on Ray: workers on any number of machines, which may be lost and come back at any time.

A worker is a Ray actor with a copy of the task and the compiled rollout. It is sent (strategy state,
key, task sample, horizon, member numbers), regenerates these members and answers with their
meta-losses: scalars. Because a fitness is a pure function of these, it does not matter which worker
computes it, when, or how often.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import platform
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from typing import Any, NamedTuple

import jax
import numpy as np

import l3rs
from l3rs.io.files import first_line
from metatrain.config import ExecutionConfig, OuterConfig, Plan, UserError
from metatrain.inner.devices import use_cores
from metatrain.inner.population import GenerationSpec, candidate_losses, cut, fitness_by_halves
from metatrain.outer.strategy import State, make_strategy
from metatrain.ray.connection import connect
from metatrain.ray.shards import Shards
from tasks import Task
from tasks.data.cache import Resident, find_resident, resident

_log = logging.getLogger("metatrain")

_POLL_SECONDS = 1.0  # how often an idle driver looks for new workers
_WATCH_SECONDS = 0.05  # how often it looks for slow shards while a worker idles
_HANG_FACTOR = 20.0  # times the slowest answer of the run, after which a worker is taken for dead
_HANG_SECONDS = 30.0  # and at least so long
_FIRST_CALL_SECONDS = 600.0  # a worker's first call compiles
_SHARD_SECONDS = 0.25  # shards are made so large that Ray's 2 ms a call do not matter,
_SHARDS_A_WORKER = 4  # as long as there are so many: the last one to end is waited for
_RECRUIT_SECONDS = 60.0  # at most, before a worker is asked for again when the last ones died at once
_MAX_BAD = 3  # unusable answers of a worker before it is replaced
_MAX_ERRORS = 3  # errors of the task's own code, with no answer in between, before the run stops
_MAX_DOUBLINGS = 6  # of the time to answer: it doubles when it was too short, until there is an answer


class Answer(NamedTuple):
    """What a worker says of one shard."""

    round: int
    shard: int
    fitness: np.ndarray  # float32 [members]
    chunk: int  # members in one compiled call; fewer than asked for when memory ran out


@dataclasses.dataclass(frozen=True)
class _Job:
    """What a worker needs to know, pickled once."""

    tasks: list[dict[str, Any]]  # each Task's fields, arrays replaced by their numbers
    arrays: list[Resident | None]  # where each array is in the cache
    spec: l3rs.Spec
    outer: OuterConfig
    plan: Plan
    versions: dict[str, str]


def versions() -> dict[str, str]:
    """What must be equal on driver and workers for equal results."""
    packages = ("l3rs", "ray", "jax", "jaxlib", "evosax", "optax", "flax", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


class Worker:
    """The actor: one process that evaluates shards."""

    def __init__(self) -> None:
        use_cores(1)
        self._round = -1

    def setup(self, blob: bytes, sent: Mapping[int, Any]) -> list[int] | str:
        """Build the task. Returns the numbers of the arrays it still needs, or why it cannot be built."""
        import ray
        from ray import cloudpickle

        try:
            job: _Job = cloudpickle.loads(blob)
        except (ImportError, AttributeError) as error:
            return f"the task's code cannot be imported on {socket.gethostname()}: {error}"
        if job.versions != versions():
            ours = versions()
            different = [f"{k} {ours[k]} (driver: {v})" for k, v in job.versions.items() if ours[k] != v]
            return f"{socket.gethostname()} has {', '.join(different)}; all machines need the same versions"
        found: dict[int, np.ndarray] = {i: ray.get(ref) for i, ref in sent.items()}
        for i, where in enumerate(job.arrays):
            if i not in found and where is not None and (array := find_resident(where)) is not None:
                found[i] = array
        if missing := [i for i in range(len(job.arrays)) if i not in found]:
            return missing
        data = [jax.tree.map(lambda i: found[i], fields["data"]) for fields in job.tasks]
        tasks = [Task(**{**fields, "data": own}) for fields, own in zip(job.tasks, data, strict=True)]
        strategy = make_strategy(job.outer, l3rs.init_meta_params(jax.random.key(0), job.spec))
        self._calls = [candidate_losses(task, job.spec, strategy, job.plan) for task in tasks]
        self._device = jax.local_devices()[0]
        self._data = jax.device_put(data, self._device)
        return []

    def evaluate(self, round_: int, shared: Sequence[Any], shard: int, members: np.ndarray, chunk: int) -> Answer:
        """The meta-losses of `members`; `shared` refers to what the members of a round share."""
        import ray

        if round_ != self._round:
            self._task, arguments = ray.get(shared[0])
            self._shared = jax.device_put(arguments, self._device)
            self._round = round_

        def call(part: np.ndarray) -> np.ndarray:
            data = self._data[self._task]
            return np.asarray(self._calls[self._task](*self._shared, data, jax.device_put(part, self._device)))

        fitness, chunk = fitness_by_halves(call, members, chunk)
        return Answer(round_, shard, fitness, chunk)


@dataclasses.dataclass(eq=False)
class _Member:
    """A worker as the driver sees it; in `RayEvaluator._members` once it is set up."""

    actor: Any
    chunk: int
    calls: dict[Any, tuple[int, int]] = dataclasses.field(default_factory=dict)  # ref -> (round, shard)
    since: float = 0.0  # when it was last given work, or answered
    answered: int = 0
    bad: int = 0


class RayEvaluator:
    """Evaluates on the workers of a Ray cluster; see `metatrain.inner.population.Evaluator`.

    Args:
      tasks, spec, outer, plan: what candidates are, and what they train.
      members_per_call: candidates in one compiled call; a shard is one or more calls.
      execution: address, workers, resources, security.
      say: told of workers lost and found.

    Raises:
      UserError: the cluster cannot be used: see `connect`; or no node can hold a worker.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        spec: l3rs.Spec,
        outer: OuterConfig,
        members_per_call: int,
        plan: Plan,
        execution: ExecutionConfig,
        say: Callable[[str], None],
    ) -> None:
        connected = connect(execution)
        import ray
        from ray import cloudpickle

        self._ray, self._owned, self._say = ray, connected, say
        self._execution, self._population, self._chunk = execution, outer.population, members_per_call
        self._shards_of = self._chunks = cut(outer.population, members_per_call)
        self._steps = 1  # candidate-steps of a shard, in this generation
        self._pace = 0.0  # seconds of a chunk's step, in the last generation
        arrays, treedef = jax.tree.flatten([task.data for task in tasks])
        self._arrays = [np.asanyarray(array) for array in arrays]
        numbers = jax.tree.unflatten(treedef, range(len(arrays)))
        names = [field.name for field in dataclasses.fields(Task)]
        hollow = [
            {**{name: getattr(task, name) for name in names}, "data": own}
            for task, own in zip(tasks, numbers, strict=True)
        ]
        where = [resident(array) for array in self._arrays]
        self._blob = ray.put(cloudpickle.dumps(_Job(hollow, where, spec, outer, plan, versions())))
        self._refs: dict[int, Any] = {}
        self._members: list[_Member] = []
        self._starting: dict[Any, _Member] = {}
        self._round = 0  # calls of `evaluate`: what answers are told apart by
        self._begun = False  # a worker has been ready
        self._wanted, self._count_again = 0, 0.0  # workers, and when to look whether the cluster has grown
        self._stillborn, self._recruit_again = 0, 0.0  # workers in a row that died before they began; wait so long
        self._errors = self._timeouts = 0  # since the last answer: errors, and times that nobody answered in time
        self._slowest = 0.0  # seconds of an answer, for each candidate-step of its shard
        self._counts = dict.fromkeys(("lost", "duplicated", "requeued", "stale", "rejected"), 0)
        try:
            self._refuse_what_never_fits()
        except UserError:
            self.close()
            raise

    def evaluate(self, state: State, spec: GenerationSpec, waiting: Callable[[str], None] | None = None) -> np.ndarray:
        self._round += 1
        self._count_again = 0.0
        self._shards_of = self._group(spec.horizon)
        self._steps = len(self._shards_of[0]) * spec.horizon
        shards = Shards(len(self._shards_of))
        fitness = np.full(self._population, np.nan, np.float32)
        host = jax.tree.map(np.asarray, (state, spec.key, spec.sample))
        shared = [self._ray.put((spec.task, (*host, np.int32(spec.horizon))))]
        told = False
        while not shards.finished:
            self._recruit()
            now = time.monotonic()
            for member in self._members:
                self._hand_out(member, shards, shared, len(self._members), now)
            if waiting and self._begun and not self._members and not told:
                told = True
                waiting("no worker is left: waiting for the cluster")
            refs = [*self._starting, *(ref for member in self._members for ref in member.calls)]
            idle = any(not member.calls for member in self._members)
            for ref in self._wait(refs, _WATCH_SECONDS if idle else _POLL_SECONDS):
                self._receive(ref, shards, fitness)
            self._replace_hung(shards)
        self._counts["duplicated"] += shards.duplicated
        self._counts["requeued"] += shards.requeued * len(self._shards_of[0])
        if shards.seconds:
            self._pace = shards.seconds * len(self._chunks[0]) / len(self._shards_of[0]) / spec.horizon
        return fitness

    def _group(self, horizon: int) -> list[np.ndarray]:
        """Chunks put together to shards. A worker calls chunk by chunk, so the values do not depend on it."""
        workers = max(len(self._members), 1)
        enough = math.ceil(len(self._chunks) / (_SHARDS_A_WORKER * workers))
        wanted = math.ceil(_SHARD_SECONDS / (self._pace * horizon)) if self._pace else 1
        size = min(wanted, enough)
        return [np.concatenate(self._chunks[i : i + size]) for i in range(0, len(self._chunks), size)]

    def report(self) -> dict[str, Any]:
        """Workers now; since the start: workers lost, shards started twice, members evaluated again
        because their worker was lost, answers that came too late, answers that could not be used."""
        return {"workers": len(self._members), **self._counts}

    def close(self) -> None:
        for member in [*self._members, *self._starting.values()]:
            with contextlib.suppress(Exception):
                self._ray.kill(member.actor)
        self._members, self._starting = [], {}
        if self._owned:
            self._ray.shutdown()

    # Workers come and go.

    def _recruit(self) -> None:
        """Ask for workers until there are as many as wanted; Ray places them when there is room."""
        now, workers = time.monotonic(), self._execution.workers
        if now >= self._count_again:
            self._count_again = now + _POLL_SECONDS
            self._wanted = max(self._slots(), 1) if workers == "auto" else workers
        if now < self._recruit_again:
            return
        for _ in range(self._wanted - len(self._members) - len(self._starting)):
            needs = dict(self._execution.resources_per_worker)
            options: dict[str, Any] = {"num_cpus": needs.pop("CPU", 0), "num_gpus": needs.pop("GPU", 0)}
            actor = (
                self._ray.remote(Worker)
                .options(**options, resources=needs, max_restarts=0, scheduling_strategy="SPREAD")
                .remote()
            )
            self._start(_Member(actor, self._chunk))

    def _start(self, member: _Member) -> None:
        self._starting[member.actor.setup.remote(self._blob, self._refs)] = member

    def _slots(self) -> int:
        return sum(_room(node, self._execution.resources_per_worker) for node in self._nodes())

    def _nodes(self) -> list[Mapping[str, float]]:
        return [node["Resources"] for node in self._ray.nodes() if node["Alive"]]

    def _refuse_what_never_fits(self) -> None:
        if self._execution.autoscaling or self._slots():
            return
        needs = self._execution.resources_per_worker
        shown = [", ".join(f"{name} {node.get(name, 0):g}" for name in needs) for node in self._nodes()]
        raise UserError(
            f"execution.resources_per_worker is {_listed(needs)}; no node has that: the cluster's nodes have "
            f"{' / '.join(sorted(set(shown))) or 'nothing'} (execution.autoscaling: true waits for nodes to come)"
        )

    def _lose(self, member: _Member, shards: Shards, why: str) -> None:
        if member not in self._members:
            return
        self._members.remove(member)
        shards.lose(id(member))
        self._counts["lost"] += 1
        self._say(f"a worker is lost ({why}); its candidates are evaluated again")
        with contextlib.suppress(Exception):
            self._ray.kill(member.actor)

    def _replace_hung(self, shards: Shards) -> None:
        now, hung = time.monotonic(), []
        for member in self._members:
            patience = max(_HANG_SECONDS, _HANG_FACTOR * self._slowest * self._steps)
            if not member.answered:
                patience = max(patience, _FIRST_CALL_SECONDS)
            if member.calls and now - member.since > patience * 2**self._timeouts:
                hung.append(member)
        for member in hung:
            self._lose(member, shards, f"no answer for {now - member.since:.0f} s")
        # What is slow, and not dead, ends some time.
        self._timeouts = min(self._timeouts + bool(hung), _MAX_DOUBLINGS)

    # Work goes out, answers come in.

    def _hand_out(self, member: _Member, shards: Shards, shared: Sequence[Any], workers: int, now: float) -> None:
        if any(number != self._round for number, _ in member.calls.values()):
            return  # it is still busy with a shard that another worker has answered
        while (shard := shards.take(id(member), workers, now)) is not None:
            if not member.calls:
                member.since = now
            members = self._shards_of[shard]
            ref = member.actor.evaluate.remote(self._round, shared, shard, members, member.chunk)
            member.calls[ref] = (self._round, shard)

    def _wait(self, refs: list[Any], seconds: float) -> list[Any]:
        if not refs:
            time.sleep(seconds)
            return []
        done, _ = self._ray.wait(refs, num_returns=1, timeout=seconds)
        if done:
            done, _ = self._ray.wait(refs, num_returns=len(refs), timeout=0)
        return done

    def _receive(self, ref: Any, shards: Shards, fitness: np.ndarray) -> None:
        if ref in self._starting:
            self._welcome(self._starting.pop(ref), ref)
            return
        member = next((m for m in self._members if ref in m.calls), None)
        if member is None:
            return
        now = time.monotonic()
        asked, shard = member.calls.pop(ref)
        try:
            answer = self._ray.get(ref)
        except self._ray.exceptions.RayTaskError as error:
            self._failed(member, shards, asked == self._round, shard, error)
            return
        except self._ray.exceptions.RayError as error:
            if isinstance(error, self._ray.exceptions.OutOfMemoryError):
                self._halve(member.chunk, "the node ran out of memory")
            self._lose(member, shards, first_line(error))
            return
        self._note_time(member, asked, now)
        if asked != self._round:
            self._counts["stale"] += 1
            return
        if why := _unusable(answer, self._round, shard, len(self._shards_of[shard])):
            self._reject(member, shards, shard, why)
            return
        if answer.chunk < member.chunk:
            self._say(f"a worker ran out of memory; it now evaluates {answer.chunk} candidates at once")
            member.chunk = answer.chunk
        if shards.answer(id(member), shard, now):
            fitness[self._shards_of[shard]] = answer.fitness
        else:
            self._counts["stale"] += 1

    def _note_time(self, member: _Member, asked: int, now: float) -> None:
        """An answer has come: of a worker's first one the time is that of compiling."""
        if member.answered and asked == self._round:
            self._slowest = max(self._slowest, (now - member.since) / self._steps)
        self._errors = self._timeouts = 0
        member.since, member.answered = now, member.answered + 1

    def _welcome(self, member: _Member, ref: Any) -> None:
        try:
            needed = self._ray.get(ref)
        except self._ray.exceptions.RayTaskError as error:
            self._turn_away(member, f"a worker cannot be set up: {first_line(error.cause or error)}")
            return
        except self._ray.exceptions.RayError as error:
            self._stillborn_one(member, f"a worker was lost before it began ({first_line(error)})")
            return
        if isinstance(needed, str):
            self._turn_away(member, needed)
            return
        if needed:  # not in that machine's cache
            for i in needed:
                if i not in self._refs:
                    self._refs[i] = self._ray.put(np.asarray(self._arrays[i]))
            self._start(member)
            return
        self._stillborn = 0
        self._begun = True
        self._members.append(member)

    def _turn_away(self, member: _Member, why: str) -> None:
        """Where no worker has ever been ready it is the run that is wrong; later it is that machine."""
        if not self._begun:
            raise UserError(why)
        self._stillborn_one(member, f"a worker is not used: {why}")

    def _stillborn_one(self, member: _Member, sentence: str) -> None:
        self._counts["lost"] += 1
        self._say(sentence)
        self._stillborn += 1
        self._recruit_again = time.monotonic() + min(2.0**self._stillborn, _RECRUIT_SECONDS)
        with contextlib.suppress(Exception):
            self._ray.kill(member.actor)

    def _failed(self, member: _Member, shards: Shards, current: bool, shard: int, error: Any) -> None:
        self._errors += 1
        if self._errors >= _MAX_ERRORS:
            raise UserError(f"candidates fail on the workers: {first_line(error.cause or error)}") from error
        self._say(f"a candidate failed ({first_line(error.cause or error)}); it is tried again")
        if current:
            shards.reject(id(member), shard, time.monotonic())

    def _reject(self, member: _Member, shards: Shards, shard: int, why: str) -> None:
        self._counts["rejected"] += 1
        member.bad += 1
        self._say(f"a worker's answer is dropped: {why}")
        shards.reject(id(member), shard, time.monotonic())
        if member.bad >= _MAX_BAD:
            self._lose(member, shards, f"{member.bad} unusable answers")

    def _halve(self, chunk: int, why: str) -> None:
        """New workers start with half of what was too much."""
        if chunk > 1 and self._chunk >= chunk:
            self._chunk = math.ceil(chunk / 2)
            self._say(f"{why}; new workers evaluate {self._chunk} candidates at once")


def _unusable(answer: Any, round_: int, shard: int, members: int) -> str | None:
    if not isinstance(answer, Answer):
        return f"it is a {type(answer).__name__}"
    if (answer.round, answer.shard) != (round_, shard):
        return f"it is for shard {answer.shard} of round {answer.round}, not {shard} of {round_}"
    fitness = answer.fitness
    if not isinstance(fitness, np.ndarray) or fitness.shape != (members,) or fitness.dtype != np.float32:
        shape = getattr(fitness, "shape", None)
        return f"it holds {getattr(fitness, 'dtype', type(fitness).__name__)}{shape}, not float32({members},)"
    return None


def _room(node: Mapping[str, float], needs: Mapping[str, float]) -> int:
    """How many workers a node can hold."""
    return min((int(node.get(name, 0) / amount) for name, amount in needs.items() if amount > 0), default=0)


def _listed(needs: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {amount:g}" for name, amount in needs.items())
