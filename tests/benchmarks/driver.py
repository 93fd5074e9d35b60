"""The driver's own work a shard: its real loop, without Ray, at 10 to 10,000 workers.

The stand-in for Ray answers at once, one answer each time that the loop looks: the most expensive way.
"""

from __future__ import annotations

import sys
import time
import types
from collections import deque
from typing import Any
from unittest import mock

import numpy as np

from metatrain.ray.aggregator import GroupAnswer, Status
from metatrain.ray.announced import Announced
from metatrain.ray.groups import GROUP_WORKERS
from metatrain.ray.pool import Calls, Work
from metatrain.ray.worker import Answer
from tests.metatrain.loops import groups, pool, shards_of_one_call

SHARDS_A_WORKER = 4
WORKERS = (10, 100, 1_000, 10_000)


class _Ref:
    def __init__(self, value: Any) -> None:
        self.value = value

    def future(self) -> _Ref:
        return self

    def result(self) -> Any:
        return self.value


class _OneByOne(Announced):
    """Answers in the order of the calls, one at a time."""

    def __init__(self) -> None:
        self._calls: deque[_Ref] = deque()

    def watch(self, ref: _Ref) -> None:
        self._calls.append(ref)

    def ready(self, seconds: float) -> list[tuple[Any, Any]]:
        del seconds
        if not self._calls:
            return []
        ref = self._calls.popleft()
        return [(ref, ref)]


def _method(function: Any) -> Any:
    return types.SimpleNamespace(remote=lambda *arguments: _Ref(function(*arguments)))


def _evaluate(round_: int, shared: Any, shard: int, draw: int, members: np.ndarray, chunk: int) -> Answer:
    del shared, draw
    return Answer(round_, shard, np.zeros(len(members), np.float32), chunk)


class _Worker:
    setup = _method(lambda *_: [])
    evaluate = _method(_evaluate)


class _Aggregator:
    """Has all its workers at once."""

    def __init__(self, workers: int) -> None:
        counts = dict.fromkeys(("lost", "duplicated", "requeued", "stale", "rejected"), 0) | {"workers": workers}
        status = Status(counts, [])

        def evaluate(number: int, _: Any, calls: Calls) -> GroupAnswer:
            losses, answered = np.zeros(calls.members.shape, np.float32), np.ones(len(calls.draw), bool)
            return GroupAnswer(number, losses, answered, 1.0, status)

        self.status = self.prepare = _method(lambda: status)
        self.evaluate = _method(evaluate)


def _fake_ray() -> Any:
    def remote(cls: type) -> Any:
        def start(*arguments: Any) -> Any:
            return _Worker() if cls is _Worker else _Aggregator(arguments[2].workers)

        return types.SimpleNamespace(options=lambda **_: types.SimpleNamespace(remote=start))

    class Error(Exception):
        pass

    errors = types.SimpleNamespace(RayError=Error, RayTaskError=Error, OutOfMemoryError=Error)
    ray: Any = types.ModuleType("ray")
    ray.remote, ray.exceptions, ray.kill = remote, errors, lambda _: None
    return ray


def milliseconds(workers: int, rounds: int, aggregators: bool) -> float:
    """The driver's own CPU time for a shard, or for what would be one, with so many workers; median over rounds."""
    calls = SHARDS_A_WORKER * workers
    none, members = np.zeros(calls, np.int32), np.arange(8 * calls, dtype=np.int32).reshape(calls, 8)
    own = Calls(none, none, members, np.full(calls, 100.0))
    with (
        mock.patch.dict(sys.modules, {"ray": _fake_ray()}),
        mock.patch("metatrain.ray.pool.Announced", _OneByOne),
        mock.patch("metatrain.ray.groups.Announced", _OneByOne),
        shards_of_one_call(),
    ):
        loop = groups(_Worker, workers, 8) if aggregators else pool(_Worker, workers, 8)
        taken = []
        for number in range(rounds + 1):
            began = time.process_time()
            loop.evaluate(Work(number, [None], own))
            taken.append(1e3 * (time.process_time() - began) / calls)
    return float(np.median(taken[1:]))  # without the first one, in which the workers are set up


def main() -> None:
    for workers in WORKERS:
        found = milliseconds(workers, 5, aggregators=False)
        print(f"driver's own work, {workers:,} workers: {found:.3f} ms a shard  (wanted: ≤ 0.3)", flush=True)
    for workers in (1_000, 10_000):
        found = milliseconds(workers, 5, aggregators=True)
        each = f"{workers // GROUP_WORKERS} aggregators of {GROUP_WORKERS}"
        print(f"driver's own work, {each}: {found:.4f} ms a shard", flush=True)
