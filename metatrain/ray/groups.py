"""The loop of a driver that has many workers: it shares a generation among aggregators, see `aggregator`.

It hears from an aggregator once in a generation, apart from a sign of life now and then. So its work grows with the
number of aggregators, not with that of workers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from l3rs.io.files import first_line
from metatrain.config import ExecutionConfig, UserError
from metatrain.ray.aggregator import Aggregator, GroupAnswer, Status
from metatrain.ray.announced import Announced
from metatrain.ray.fleet import Package, free_resources
from metatrain.ray.health import Health
from metatrain.ray.pool import LOOK_SECONDS, Work
from metatrain.ray.shares import Shares
from metatrain.ray.waits import WorkerWait

MANY_WORKERS = 200  # more of them are given aggregators
GROUP_WORKERS = 100  # of an aggregator, about

STATUS_SECONDS = 5.0  # between two signs of life
SILENT_SECONDS = 60.0  # without a sign of life, after which an aggregator is given up
_SPEED_MEMORY = 0.5  # share of what was known before in the speed of a group


@dataclasses.dataclass(eq=False)
class Group:
    """An aggregator as the driver sees it.

    Attributes:
      actor: Ray's handle.
      wanted: workers that it is to have.
      heard: when it last gave a sign of life.
      counts: its last report.
      started: whether it has ever had a worker.
      rate: candidate-steps per second of one of its workers; 0 if unknown.
      asked: whether it has been asked for its status.
      busy: whether it prepares or evaluates.
    """

    actor: Any
    wanted: int
    heard: float
    counts: dict[str, Any]
    started: bool = False
    rate: float = 0.0
    asked: bool = False
    busy: bool = False

    @property
    def workers(self) -> int:
        return self.counts["workers"]


class Groups:
    """Evaluates on the workers of aggregators; as `metatrain.ray.pool.Pool`.

    Args:
      worker: class of the workers.
      package: the run.
      execution: resources of a worker.
      chunk: members in one compiled call.
      wanted: the number of workers; called now and then.
      log: called with news.
      wait_seconds: without any worker, after which an evaluation ends with an error.
    """

    def __init__(
        self,
        worker: type,
        package: Package,
        execution: ExecutionConfig,
        chunk: int,
        wanted: Callable[[], int],
        log: Callable[[str], None],
        wait_seconds: float = math.inf,
    ) -> None:
        import ray

        package.send_all()
        self._ray, self._worker, self._package, self._execution = ray, worker, package, execution
        self._chunk, self._wanted, self._log = chunk, wanted, log
        self._groups: dict[Group, None] = {}
        self._answers = Announced()
        self._calls: dict[Any, tuple[Group, str]] = {}  # by reference: who was asked, and for what
        # What lost groups have counted, and what is counted here.
        self._counts = dict.fromkeys(("lost", "duplicated", "requeued", "stale", "rejected"), 0)
        self._health = Health()  # of the aggregators
        self._wait = WorkerWait(wait_seconds, log, time.monotonic())
        self._look_at = 0.0

    def evaluate(self, work: Work, look: Callable[[], bool] = lambda: True) -> tuple[np.ndarray, np.ndarray]:
        """See `Pool.evaluate`."""
        shares = Shares(work.calls.steps)
        losses = np.full(work.calls.members.shape, np.nan, np.float32)
        while not shares.finished:
            now = time.monotonic()
            if now >= self._look_at:
                self._look_at = now + LOOK_SECONDS
                self._look_after(shares, now)
                if not look():
                    break
            for group in [group for group in self._groups if not group.busy]:
                self._hand_out(group, shares, work)
            for ref, future in self._answers.ready(self._look_at - time.monotonic()):
                self._receive(ref, future, shares, work, losses)
        return losses, shares.answered

    @property
    def workers(self) -> int:
        """Workers that are ready."""
        return sum(group.workers for group in self._groups)

    def report(self) -> dict[str, Any]:
        """See `metatrain.ray.evaluator.RayEvaluator.report`."""
        total = {name: n + sum(group.counts[name] for group in self._groups) for name, n in self._counts.items()}
        devices = sorted({kind for group in self._groups for kind in group.counts["devices"]})
        return {"workers": self.workers, **total, "devices": devices}

    def close(self) -> None:
        for group in self._groups:
            self._kill(group)
        self._groups = {}

    def _look_after(self, shares: Shares, now: float) -> None:
        """Ask for aggregators that are missing and for signs of life, and give up those without one."""
        if self.workers:
            self._wait.over(now)
        else:
            self._wait.look(self._wanted, lambda: free_resources(self._ray, self._execution), now)
        wanted = self._wanted() if self._health.may_recruit(now) else 0
        while (missing := wanted - sum(group.wanted for group in self._groups)) > 0:
            count = max(math.ceil(wanted / GROUP_WORKERS) - len(self._groups), 1)
            self._start(math.ceil(missing / count), now)
        for group in list(self._groups):
            # A first sign of life takes a process, on a machine that may have to start.
            limit = SILENT_SECONDS if group.started else max(SILENT_SECONDS, self._health.start_seconds())
            if now - group.heard > limit:
                if not group.started:
                    self._health.slow_start()
                self._lose(group, shares, f"no sign of life for {now - group.heard:.0f} s")
            elif not group.asked and now - group.heard > STATUS_SECONDS:
                group.asked = True
                self._ask(group, "status", group.actor.status.remote())

    def _start(self, workers: int, now: float) -> None:
        """Ask for an aggregator with so many workers."""
        execution = self._execution.model_copy(update={"workers": workers})
        package = (self._package.blob, self._package.refs)  # references in a tuple are passed on as they are
        options = {"num_cpus": 0, "max_restarts": 0, "max_concurrency": 2, "scheduling_strategy": "SPREAD"}
        actor: Any = self._ray.remote(Aggregator).options(**options)
        actor = actor.remote(self._worker, package, execution, self._chunk)
        group = Group(actor, workers, now, {**dict.fromkeys(["workers", *self._counts], 0), "devices": []})
        self._groups[group] = None

    def _hand_out(self, group: Group, shares: Shares, work: Work) -> None:
        if not group.workers:
            group.busy = True
            self._ask(group, "prepare", group.actor.prepare.remote())
        elif shares.pending:
            own = shares.take(group, self._speeds())
            group.busy = True
            self._ask(group, "evaluate", group.actor.evaluate.remote(work.number, work.shared, work.calls.part(own)))

    def _speeds(self) -> dict[Group, float]:
        """Candidate-steps per second of each group that has workers; 1 a worker as long as nothing is known."""
        able = [group for group in self._groups if group.workers]
        known = [group.rate for group in able if group.rate]
        usual = sum(known) / len(known) if known else 1.0
        return {group: group.workers * (group.rate or usual) for group in able}

    def _ask(self, group: Group, what: str, ref: Any) -> None:
        self._calls[ref] = (group, what)
        self._answers.watch(ref)

    def _receive(self, ref: Any, future: Any, shares: Shares, work: Work, losses: np.ndarray) -> None:
        group, what = self._calls.pop(ref)
        if group not in self._groups:
            return
        try:
            answer = future.result()
        except self._ray.exceptions.RayTaskError as error:
            reason = str(error.cause) if isinstance(error.cause, UserError) else first_line(error.cause or error)
            if not self._health.any_started or self._health.error():
                raise UserError(reason) from error
            self._lose(group, shares, reason)
            return
        except self._ray.exceptions.RayError as error:
            self._lose(group, shares, first_line(error))
            return
        group.heard = time.monotonic()
        if what == "status":
            group.asked = False
        else:
            group.busy = False
        if what != "evaluate":
            self._note(group, answer)
            return
        self._note(group, answer.status)
        if group.started:
            self._health.heard()
        if answer.round != work.number:
            self._counts["stale"] += 1
            return
        self._accept(group, shares, answer, losses)

    def _accept(self, group: Group, shares: Shares, answer: GroupAnswer, losses: np.ndarray) -> None:
        own = shares.holds(group)
        first = shares.answer(group, answer.answered)
        losses[own[first]] = answer.losses[first]
        if answer.answered.all() and answer.seconds > 0 and group.workers:
            rate = shares.cost(own) / answer.seconds / group.workers
            group.rate = _SPEED_MEMORY * group.rate + (1 - _SPEED_MEMORY) * rate if group.rate else rate

    def _note(self, group: Group, status: Status) -> None:
        if status.counts["workers"] and not group.started:
            group.started = True
            self._health.started(group, group.heard)
        group.counts = status.counts
        for sentence in status.news:
            self._log(sentence)

    def _lose(self, group: Group, shares: Shares, why: str) -> None:
        del self._groups[group]
        self._health.lost(group)
        if not group.started:
            self._health.failed_start(time.monotonic())
        shares.lose(group)
        for name in self._counts:
            self._counts[name] += group.counts[name]
        self._counts["lost"] += group.workers
        self._log(f"an aggregator is lost with {group.workers} workers ({why}); its candidates are evaluated again")
        self._kill(group)
        self._look_at = 0.0  # ask for another one at once

    def _kill(self, group: Group) -> None:
        with contextlib.suppress(Exception):
            self._ray.kill(group.actor)
