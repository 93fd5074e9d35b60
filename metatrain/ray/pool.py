"""The loop that hands out the shards of a generation to workers, and collects their answers.

What it does for an answer takes the same time however many workers there are: an answer announces itself, and nothing
is searched for. What concerns every worker (who hangs, who is missing) is looked at once a second.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from l3rs.io.files import first_line
from metatrain.config import UserError
from metatrain.ray.announced import Announced
from metatrain.ray.fleet import Fleet, Member
from metatrain.ray.health import Health, Load
from metatrain.ray.shards import Shards, cut_shards
from metatrain.ray.waits import Waits
from metatrain.ray.worker import unusable
from tasks import TaskError

LOOK_SECONDS = 1.0  # between two looks at all workers
_PAUSE = 10  # times as long without a look: this process was stopped, or starved


class Calls(NamedTuple):
    """Calls of a generation, in the order in which they are handed out.

    Attributes:
      draw: index into the draws of the generation, int32 [n].
      task: of that draw, int32 [n].
      members: member numbers, int32 [n, chunk].
      steps: candidate-steps of each, float64 [n].
    """

    draw: np.ndarray
    task: np.ndarray
    members: np.ndarray
    steps: np.ndarray

    def part(self, which: Any) -> Calls:
        """Some of the calls: an index array or a slice."""
        return Calls(*(field[which] for field in self))


class Work(NamedTuple):
    """A generation, or a part of it, as a pool is given it.

    Attributes:
      number: tells answers of this generation from those of earlier ones.
      shared: holds Ray's reference to the values that all members share; see `Worker.evaluate`.
      calls: what to compute.
    """

    number: int
    shared: list[Any]
    calls: Calls


@dataclasses.dataclass(eq=False)
class _Round:
    """The state of one call of `evaluate`: the calls of each shard, who evaluates what, and the result."""

    work: Work
    ranges: list[range]
    shards: Shards
    waits: Waits | None
    loads: list[Load]  # of each shard
    losses: np.ndarray  # float32 [n, chunk]
    answered: np.ndarray  # bool [n]


class Pool:
    """Evaluates on the workers of a fleet.

    Args:
      fleet: its workers; asked for, replaced and closed here.
      health: its health.
      log: called with news of the workers.
      wait_seconds: without any worker, after which an evaluation ends with an error; None: never.
    """

    def __init__(
        self,
        fleet: Fleet,
        health: Health,
        log: Callable[[str], None],
        wait_seconds: float | None = None,
    ) -> None:
        import ray

        self._fleet, self._health, self._log = fleet, health, log
        self._errors = ray.exceptions
        self._answers = Announced()
        self._calls: dict[Any, tuple[Member, _Round, int]] = {}  # by reference: worker, round, shard
        self._idle: dict[Member, None] = {}
        self._paces: dict[int, float] = {}  # seconds per candidate-step of each task, of the last generation with it
        self._look_at = 0.0
        self._wait_seconds = wait_seconds
        self._received = False  # an answer since the last look
        self._devices: set[str] = set()  # kinds of the workers' devices
        self._counts = dict.fromkeys(("duplicated", "requeued", "stale", "rejected"), 0)

    def prepare(self, patience: float, more: float) -> None:
        """Ask for workers, and wait until they are ready.

        Args:
          patience: seconds to wait for the first one.
          more: seconds to wait for others after it.

        Raises:
          UserError: no worker can be set up.
        """
        until = time.monotonic() + patience
        had_one = False
        while True:
            now = time.monotonic()
            self._fleet.give_up_slow_starts(now)
            self._recruit(now)
            if self.workers and not had_one:
                had_one, until = True, now + more
            if now >= until or not self._fleet.missing:
                return
            for ref, future in self._answers.ready(LOOK_SECONDS / 4):
                self._set_up(ref, future, time.monotonic())

    def evaluate(self, work: Work, look: Callable[[], bool] = lambda: True) -> tuple[np.ndarray, np.ndarray]:
        """Evaluate the calls of a generation.

        Args:
          work: what to compute.
          look: called about once a second; whether to go on.

        Returns:
          (their meta-losses float32 [n, chunk], which have been computed bool [n])

        Raises:
          UserError: candidates fail on the workers, or no worker can be set up.
          WaitError: there has been no worker for longer than `wait_seconds`.
        """
        round_ = self._begin(work)
        looked = time.monotonic()
        while not round_.shards.finished:
            now = time.monotonic()
            if now >= self._look_at:
                if now - looked > _PAUSE * LOOK_SECONDS:
                    self._health.paused(now)  # answers may have come since, and workers may have been stopped, too
                self._look_at, looked = now + LOOK_SECONDS, now
                self._look_after(round_, now)
                if not look():
                    break
            self._use_idle(round_, now)
            until = min(self._look_at, round_.shards.next_look() if self._idle else self._look_at)
            for ref, future in self._answers.ready(until - now):
                self._receive(ref, future, round_)
        self._end(round_)
        return round_.losses, round_.answered

    @property
    def workers(self) -> int:
        """Workers that are ready."""
        return len(self._fleet.members)

    def report(self) -> dict[str, Any]:
        """See `metatrain.ray.evaluator.RayEvaluator.report`."""
        return {"workers": self.workers, "lost": self._fleet.lost, **self._counts, "devices": sorted(self._devices)}

    def close(self) -> None:
        self._fleet.close()

    def _begin(self, work: Work) -> _Round:
        calls = work.calls
        paces = np.array([self._paces.get(task, 0.0) for task in calls.task.tolist()])
        ranges = cut_shards((paces * calls.steps).tolist(), self.workers, calls.draw.tolist())
        loads = [Load(int(calls.task[own.start]), float(calls.steps[own.start : own.stop].sum())) for own in ranges]
        shards = Shards([load.steps for load in loads], self._paces, [load.task for load in loads])
        losses = np.full(calls.members.shape, np.nan, np.float32)
        limit = self._wait_seconds
        waits = None if limit is None else Waits(self._fleet, self._health, limit, self._log, time.monotonic())
        return _Round(work, ranges, shards, waits, loads, losses, np.zeros(len(losses), bool))

    def _end(self, round_: _Round) -> None:
        mean = round_.losses.size / len(round_.ranges)  # members of a shard
        self._counts["duplicated"] += round_.shards.duplicated
        self._counts["requeued"] += round(round_.shards.requeued * mean)
        self._paces = round_.shards.paces

    def _recruit(self, now: float) -> None:
        for ref in self._fleet.recruit(now):
            self._answers.watch(ref)

    def _set_up(self, ref: Any, future: Any, now: float) -> bool:
        """Go on with the set-up of a worker. Returns whether the answer was of a set-up."""
        if ref not in self._fleet.starting:
            return False
        found = self._fleet.receive(ref, future, now)
        if isinstance(found, Member):
            self._idle[found] = None
        elif found is not None:  # the next part of its set-up
            self._answers.watch(found)
        return True

    def _use_idle(self, round_: _Round, now: float) -> None:
        """Give work to idle workers as long as there is some."""
        while self._idle and (round_.shards.pending or round_.shards.next_look() <= now):
            member = next(iter(self._idle))
            self._hand_out(member, round_)
            if member in self._idle:
                return  # nothing for it, so nothing for the others

    def _hand_out(self, member: Member, round_: _Round) -> None:
        now, work = time.monotonic(), round_.work
        while (shard := round_.shards.take(member, self.workers, now)) is not None:
            if not member.calls:
                self._health.given_work(member, now)
            own = round_.ranges[shard]
            members = work.calls.members[own.start : own.stop].reshape(-1)
            draw = int(work.calls.draw[own.start])
            ref = member.actor.evaluate.remote(work.number, work.shared, shard, draw, members, member.chunk)
            member.calls[ref] = None
            self._calls[ref] = (member, round_, shard)
            self._answers.watch(ref)
        if member.calls:
            self._idle.pop(member, None)
        else:
            self._idle[member] = None

    def _receive(self, ref: Any, future: Any, round_: _Round) -> None:
        now, self._received = time.monotonic(), True
        if self._set_up(ref, future, now):
            return
        found = self._calls.pop(ref, None)
        if found is None:
            return  # of a worker that was given up
        member, asked, shard = found
        del member.calls[ref]
        # Not by the number: an aggregator evaluates several parts of one generation, whose shards are others.
        current = asked is round_
        try:
            answer = future.result()
        except self._errors.RayTaskError as error:
            self._failed(member, round_, shard if current else None, error)
        except self._errors.RayError as error:
            if isinstance(error, self._errors.OutOfMemoryError):
                self._fleet.halve_chunks(member.chunk, "the node ran out of memory")
            self._lose(member, round_, first_line(error))
            return
        else:
            self._health.answered(member, now, asked.loads[shard], current)
            if current:
                self._accept(member, round_, shard, answer, now)
            else:
                self._counts["stale"] += 1
        # A worker that still computes what another has answered is given nothing until it has answered, too.
        if member in self._fleet.members and all(self._calls[other][1] is round_ for other in member.calls):
            self._hand_out(member, round_)

    def _accept(self, member: Member, round_: _Round, shard: int, answer: Any, now: float) -> None:
        """Use an answer of this round, if it can be used."""
        own, shape = round_.ranges[shard], round_.losses.shape
        if why := unusable(answer, round_.work.number, shard, len(own) * shape[1]):
            self._counts["rejected"] += 1
            self._log(f"a worker's answer is dropped: {why}")
            round_.shards.reject(member, shard, now)
            if self._health.unusable(member):
                self._lose(member, round_, "too many unusable answers")
            return
        self._note_device(answer.device)
        if answer.chunk < member.chunk:
            self._log(f"a worker ran out of memory; it now evaluates {answer.chunk} candidates at once")
            member.chunk = answer.chunk
        if round_.shards.answer(member, shard, now):
            round_.losses[own.start : own.stop] = answer.fitness.reshape(-1, shape[1])
            round_.answered[own.start : own.stop] = True
        else:
            self._counts["stale"] += 1

    def _note_device(self, device: str) -> None:
        if device in self._devices:
            return
        self._devices.add(device)
        if len(self._devices) > 1:
            kinds = " / ".join(sorted(self._devices))
            self._log(f"workers compute on different devices ({kinds}); the last bits of results depend on the device")

    def _failed(self, member: Member, round_: _Round, shard: int | None, error: Any) -> None:
        """The task's code raised an error; `shard` is None if it was a shard of an earlier round."""
        cause = error.cause or error
        reason = str(cause) if isinstance(cause, TaskError) else first_line(cause)
        if self._health.error():
            raise UserError(f"candidates fail on the workers: {reason}") from error
        self._log(f"a candidate failed ({reason}); it is tried again")
        if shard is not None:
            round_.shards.reject(member, shard, time.monotonic())

    def _look_after(self, round_: _Round, now: float) -> None:
        """Ask for workers that are missing, replace those that hang, and name long waits."""
        self._fleet.give_up_slow_starts(now)
        self._recruit(now)
        busy = {member: self._running(member) for member in self._fleet.members if member.calls}
        if round_.waits is not None:
            round_.waits.look(self._received, busy, now)
        self._received = False
        for member, seconds in self._health.hung(busy, now).items():
            self._lose(member, round_, f"no answer for {seconds:.0f} s")

    def _running(self, member: Member) -> Load:
        """What a busy worker computes now."""
        _, asked, shard = self._calls[next(iter(member.calls))]
        return asked.loads[shard]

    def _lose(self, member: Any, round_: _Round, why: str) -> None:
        if member not in self._fleet.members:
            return
        round_.shards.lose(member)
        for ref in member.calls:
            self._calls.pop(ref, None)
        self._idle.pop(member, None)
        self._fleet.lose(member, why)
        self._look_at = 0.0  # ask for another one at once
