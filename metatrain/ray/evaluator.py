"""The Evaluator on Ray: workers on any number of machines, which may disappear and come back at any time.

A worker is a Ray actor. It receives (strategy state, key, draws, index of a draw, member numbers),
regenerates these members and answers with their meta-losses: scalars. A fitness is a pure function of
what was received, so it does not matter which worker computes it, when, or how often.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

import l3rs
from l3rs.io.files import first_line
from metatrain.config import ExecutionConfig, OuterConfig, Plan, UserError
from metatrain.inner.population import Draw, GenerationSpec, cut, generation_chunks, host_arguments
from metatrain.outer.strategy import State
from metatrain.ray.connection import connect
from metatrain.ray.fleet import COUNT_SECONDS, Fleet, Member, Package
from metatrain.ray.health import Health
from metatrain.ray.shards import Shards, shard_size
from metatrain.ray.waits import Waits
from metatrain.ray.worker import Worker, unusable
from tasks.base import AnyTask

_WATCH_SECONDS = 0.05  # between two looks for slow shards while a worker is idle


@dataclasses.dataclass
class _Round:
    """One call of `evaluate`.

    Attributes:
      number: tells answers of this call from those of earlier ones.
      members: (index of the draw, member numbers) of each shard; see `GenerationSpec.draws`.
      steps: candidate-steps of the largest shard.
      shared: reference to the values that all members share.
      shards: who evaluates what.
      losses: the result, float32 [draws, population].
    """

    number: int
    members: list[tuple[int, np.ndarray]]
    steps: int
    shared: list[Any]
    shards: Shards
    losses: np.ndarray


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

        self._ray, self._log = ray, log
        self._population, self._chunks = outer.population, cut(outer.population, members_per_call)
        self._rounds = 0
        self._pace = 0.0  # seconds per step of a chunk in the last generation
        self._wait_seconds = 60.0 * execution.wait_minutes
        self._devices: set[str] = set()  # kinds of the workers' devices
        self._counts = dict.fromkeys(("duplicated", "requeued", "stale", "rejected"), 0)
        self._waited = 0.0  # seconds without any worker
        self._health = Health()
        try:
            package = Package(tasks, spec, outer, plan)
            self._fleet = Fleet(Worker, package, execution, members_per_call, self._health, log)
        except BaseException:
            self._disconnect()
            raise

    def evaluate(self, state: State, spec: GenerationSpec, waiting: Callable[[str], None] | None = None) -> np.ndarray:
        work = self._begin(state, spec)
        fleet, reported = self._fleet, False
        last = time.monotonic()
        waits = Waits(fleet, self._health, self._wait_seconds, self._log, last)
        while not work.shards.finished:
            now = time.monotonic()
            if not fleet.members:
                self._waited += now - last
            last = now
            fleet.recruit(now)
            for member in fleet.members:
                self._hand_out(member, work)
            if waiting and self._health.any_started and not fleet.members and not reported:
                reported = True
                waiting("no worker is left: waiting for the cluster")
            refs = [*fleet.starting, *(ref for member in fleet.members for ref in member.calls)]
            idle = any(not member.calls for member in fleet.members)
            ready = self._wait(refs, _WATCH_SECONDS if idle else COUNT_SECONDS)
            for ref in ready:
                self._receive(ref, work)
            self._replace_hung(work)
            fleet.give_up_slow_starts(time.monotonic())
            waits.look(bool(ready), work.steps, time.monotonic())
        self._end(work, spec.draws)
        return work.losses

    def report(self) -> dict[str, Any]:
        """The workers' part of the metrics.

        `workers`: workers now. Since the start, `lost`: workers lost; `duplicated`: shards started twice;
        `requeued`: members evaluated again because their worker was lost; `stale`: answers that came too
        late; `rejected`: unusable answers; `waited`: seconds without any worker.
        """
        counts = {"lost": self._fleet.lost, **self._counts, "waited": round(self._waited, 1)}
        return {"workers": len(self._fleet.members), **counts}

    def close(self) -> None:
        self._fleet.close()
        self._disconnect()

    def _disconnect(self) -> None:
        if self._owned:
            self._ray.shutdown()

    def _begin(self, state: State, spec: GenerationSpec) -> _Round:
        self._rounds += 1
        members = self._group(spec.draws)
        return _Round(
            number=self._rounds,
            members=members,
            steps=max(len(own) * spec.draws[index].horizon for index, own in members),
            shared=[self._ray.put([(draw.task, host_arguments(state, spec.key, draw)) for draw in spec.draws])],
            shards=Shards(len(members)),
            losses=np.full((len(spec.draws), self._population), np.nan, np.float32),
        )

    def _group(self, draws: Sequence[Draw]) -> list[tuple[int, np.ndarray]]:
        """The shards, each of one draw. A worker calls chunk by chunk, so the grouping does not change the values."""
        mean = sum(draw.horizon for draw in draws) / len(draws)
        calls = generation_chunks(draws, self._population, len(self._chunks[0]))
        size = shard_size(len(calls), len(self._fleet.members), self._pace * mean)
        found = []
        for index, own in itertools.groupby(calls, key=lambda call: call[0]):
            members = [part for _, part in own]
            found += [(index, np.concatenate(members[i : i + size])) for i in range(0, len(members), size)]
        return found

    def _end(self, work: _Round, draws: Sequence[Draw]) -> None:
        self._counts["duplicated"] += work.shards.duplicated
        self._counts["requeued"] += work.shards.requeued * len(work.members[0][1])
        if work.shards.seconds:
            steps = sum(len(own) * draws[index].horizon for index, own in work.members)
            self._pace = work.shards.seconds * len(work.members) * len(self._chunks[0]) / steps

    def _hand_out(self, member: Member, work: _Round) -> None:
        if any(number != work.number for number, _ in member.calls.values()):
            return  # it still computes a shard that another worker has answered
        now, workers = time.monotonic(), len(self._fleet.members)
        while (shard := work.shards.take(member, workers, now)) is not None:
            if not member.calls:
                self._health.given_work(member, now)
            ref = member.actor.evaluate.remote(work.number, work.shared, shard, *work.members[shard], member.chunk)
            member.calls[ref] = (work.number, shard)

    def _wait(self, refs: list[Any], seconds: float) -> list[Any]:
        """The references that are ready, after at most `seconds`."""
        if not refs:
            time.sleep(seconds)
            return []
        done, _ = self._ray.wait(refs, num_returns=1, timeout=seconds)
        if done:
            done, _ = self._ray.wait(refs, num_returns=len(refs), timeout=0)
        return done

    def _receive(self, ref: Any, work: _Round) -> None:
        now = time.monotonic()
        if ref in self._fleet.starting:
            self._fleet.receive(ref, now)
            return
        member = next((m for m in self._fleet.members if ref in m.calls), None)
        if member is None:
            return
        number, shard = member.calls.pop(ref)
        try:
            answer = self._ray.get(ref)
        except self._ray.exceptions.RayTaskError as error:
            self._failed(member, work, shard if number == work.number else None, error)
            return
        except self._ray.exceptions.RayError as error:
            if isinstance(error, self._ray.exceptions.OutOfMemoryError):
                self._fleet.halve_chunks(member.chunk, "the node ran out of memory")
            self._lose(member, work, first_line(error))
            return
        self._health.answered(member, now, work.steps if number == work.number else None)
        if number != work.number:
            self._counts["stale"] += 1
        else:
            self._accept(member, work, shard, answer, now)

    def _accept(self, member: Member, work: _Round, shard: int, answer: Any, now: float) -> None:
        """Use an answer of this round, if it can be used."""
        if why := unusable(answer, work.number, shard, len(work.members[shard][1])):
            self._counts["rejected"] += 1
            self._log(f"a worker's answer is dropped: {why}")
            work.shards.reject(member, shard, now)
            if self._health.unusable(member):
                self._lose(member, work, "too many unusable answers")
            return
        self._note_device(answer.device)
        if answer.chunk < member.chunk:
            self._log(f"a worker ran out of memory; it now evaluates {answer.chunk} candidates at once")
            member.chunk = answer.chunk
        if work.shards.answer(member, shard, now):
            work.losses[work.members[shard]] = answer.fitness
        else:
            self._counts["stale"] += 1

    def _note_device(self, device: str) -> None:
        if device in self._devices:
            return
        self._devices.add(device)
        if len(self._devices) > 1:
            kinds = " / ".join(sorted(self._devices))
            self._log(f"workers compute on different devices ({kinds}); the last bits of results depend on the device")

    def _failed(self, member: Member, work: _Round, shard: int | None, error: Any) -> None:
        """The task's code raised an error; `shard` is None if it was a shard of an earlier round."""
        reason = first_line(error.cause or error)
        if self._health.error():
            raise UserError(f"candidates fail on the workers: {reason}") from error
        self._log(f"a candidate failed ({reason}); it is tried again")
        if shard is not None:
            work.shards.reject(member, shard, time.monotonic())

    def _replace_hung(self, work: _Round) -> None:
        busy = [member for member in self._fleet.members if member.calls]
        hung = self._health.hung(busy, work.steps, time.monotonic())
        for member in busy:
            if member in hung:
                self._lose(member, work, f"no answer for {hung[member]:.0f} s")

    def _lose(self, member: Member, work: _Round, why: str) -> None:
        if member in self._fleet.members:
            work.shards.lose(member)
            self._fleet.lose(member, why)
