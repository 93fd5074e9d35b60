"""The waits of a generation on Ray: for a worker, and for an answer. Each is named after half a minute."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from metatrain.ray.fleet import Fleet
from metatrain.ray.health import Health, Load
from metatrain.waiting import NOTICE_SECONDS, Wait, WaitError, notice

_UNUSUAL = 3.0  # times the usual duration of a shard, until a lack of answers is worth a sentence


class WorkerWait:
    """The wait for a first worker, which is named, and ended when it reaches its bound.

    Args:
      limit: seconds without any worker.
      log: called with a sentence for each wait.
      now: the time.
    """

    def __init__(self, limit: float, log: Callable[[str], None], now: float) -> None:
        self._limit, self._log, self._wait = limit, log, Wait(now)

    def over(self, now: float) -> None:
        """There is a worker."""
        self._wait.over(now)

    def look(self, asked: Callable[[], int], free: Callable[[], str], now: float) -> None:
        """Call this again and again while there is no worker.

        Args:
          asked: how many workers the cluster has been asked for.
          free: what the cluster has, and what of it is free.
          now: the time.

        Raises:
          WaitError: there has been no worker for longer than the limit.
        """
        minutes = self._limit / 60
        if self._wait.seconds(now) > self._limit:
            raise WaitError(
                f"no worker of the cluster has been available for {minutes:g} min ({free()}); the run stops, and "
                "what it has computed is saved; start or resume it when the cluster has room, or wait longer with "
                "execution.wait_minutes"
            )
        if self._wait.is_notice_due(now):
            what = f"the first of {asked()} workers that it has asked the cluster for ({free()})"
            advice = (
                f"at most {minutes:g} min (execution.wait_minutes); if nothing is free, another run uses the cluster: "
                "see `metatrain list`"
            )
            self._log(notice(what, self._wait.seconds(now), advice))


class Waits:
    """Logs what a generation waits for, and ends the wait for a worker.

    Args:
      fleet, health: of the run.
      limit: seconds without any worker.
      log: called with a sentence for each wait.
      now: the time.
    """

    def __init__(self, fleet: Fleet, health: Health, limit: float, log: Callable[[str], None], now: float) -> None:
        self._fleet, self._health, self._log = fleet, health, log
        self._worker, self._answer = WorkerWait(limit, log, now), Wait(now)

    def look(self, received: bool, busy: Mapping[Any, Load], now: float) -> None:
        """Call this again and again.

        Args:
          received: whether a worker has answered or has been set up since the last call.
          busy: what each worker that is busy computes.
          now: the time.

        Raises:
          WaitError: there has been no worker for longer than the limit.
        """
        if self._fleet.members:
            self._worker.over(now)
            self._look_for_answer(received, busy, now)
        else:
            self._answer.over(now)
            self._worker.look(lambda: len(self._fleet.starting), self._fleet.free_resources, now)

    def _look_for_answer(self, received: bool, busy: Mapping[Any, Load], now: float) -> None:
        if received or not busy:
            self._answer.over(now)
        usual = max(map(self._health.usual_seconds, busy.values()), default=0.0)
        if self._answer.is_notice_due(now, max(NOTICE_SECONDS, _UNUSUAL * usual)):
            limit = max(self._health.patience(member, load) for member, load in busy.items())
            expected = f"usually {usual:.3g} s" if usual else "the first answer includes compilation"
            what = f"an answer of {len(self._fleet.members)} workers ({expected})"
            advice = f"a worker without an answer for {limit:.0f} s is replaced; nothing is lost"
            self._log(notice(what, self._answer.seconds(now), advice))
