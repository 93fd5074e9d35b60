"""The loops of driver and aggregators, on a stand-in for Ray whose actors are threads."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import pytest

from metatrain.config import UserError
from metatrain.ray.aggregator import Aggregator
from metatrain.ray.groups import Groups
from metatrain.ray.pool import Calls, Pool, Work
from metatrain.ray.worker import Answer
from tests.metatrain.fake_ray import FakeRay
from tests.metatrain.loops import groups, pool

CALLS = Calls(
    draw=np.repeat(np.arange(3, dtype=np.int32), 40),
    task=np.zeros(120, np.int32),
    members=np.tile(np.arange(80, dtype=np.int32).reshape(40, 2), (3, 1)),
    steps=np.repeat([30.0, 20.0, 10.0], 40),
)
EXPECTED = (CALLS.members + 1000 * CALLS.draw[:, None]).astype(np.float32)


class Counting:
    """A worker whose losses say which draw and which members it was given."""

    seconds = 0.002

    def __init__(self, share: object) -> None:
        del share

    def setup(self, blob: object, sent: object) -> list[int]:
        del blob, sent
        return []

    def evaluate(self, round_: int, shared: object, shard: int, draw: int, members: np.ndarray, chunk: int) -> Answer:
        del shared
        time.sleep(self.seconds)
        return Answer(round_, shard, (members + 1000 * draw).astype(np.float32), chunk)


class Failing(Counting):
    def evaluate(self, *_: Any) -> Answer:
        raise ZeroDivisionError("by zero")


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeRay]:
    fake = FakeRay(cpus=32)
    monkeypatch.setitem(sys.modules, "ray", fake)
    monkeypatch.setattr("metatrain.ray.aggregator.take_share", lambda _: None)
    monkeypatch.setattr("metatrain.ray.groups.GROUP_WORKERS", 8)
    monkeypatch.setattr("metatrain.ray.pool.LOOK_SECONDS", 0.05)
    monkeypatch.setattr("metatrain.ray.groups.LOOK_SECONDS", 0.05)
    yield fake
    fake.close()


def evaluate(workers: Pool | Groups, number: int = 0) -> np.ndarray:
    losses, answered = workers.evaluate(Work(number, [None], CALLS))
    assert answered.all()
    return losses


@pytest.mark.parametrize("workers", [1, 3])
def test_a_pool_of_any_size_computes_every_call(ray: FakeRay, workers: int) -> None:
    own = pool(Counting, workers, 2)
    for number in range(3):
        np.testing.assert_array_equal(evaluate(own, number), EXPECTED)
    assert (own.workers, own.report()["lost"], own.report()["rejected"]) == (workers, 0, 0)
    own.close()
    assert not ray.of(Counting)


@pytest.mark.usefixtures("ray")
def test_a_late_answer_for_one_part_of_a_generation_is_not_used_for_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """A part ends while a slow worker still computes what another one has answered; the next part has the same
    number."""
    slow = threading.Event()

    class Late(Counting):
        def evaluate(
            self, round_: int, shared: object, shard: int, draw: int, members: np.ndarray, chunk: int
        ) -> Answer:
            if members[0] or slow.is_set():
                return super().evaluate(round_, shared, shard, draw, members, chunk)
            slow.set()
            time.sleep(0.5)
            return Answer(round_, shard, (members + 1000 * draw).astype(np.float32), chunk)

    members = np.arange(44, dtype=np.int32).reshape(22, 2)
    draw = np.arange(22, dtype=np.int32) % 2  # a shard is of one draw: so each is of one call
    calls = Calls(draw, np.zeros(22, np.int32), members, np.ones(22))
    own = pool(Late, 2, 2)
    for part, seconds in ((slice(20), 0.002), (slice(20, 22), 1.0)):
        monkeypatch.setattr(Counting, "seconds", seconds)
        losses, answered = own.evaluate(Work(1, [None], calls.part(part)))
        assert answered.all()
        np.testing.assert_array_equal(losses, (members + 1000 * draw[:, None])[part])
    assert slow.is_set()
    assert own.report()["stale"] == 2  # and the shard that waited behind it
    own.close()


class Unequal(Counting):
    """A worker for which one of two tasks takes 300 times as long, and the first call of each still longer."""

    dear: ClassVar[int]  # the draw of that task
    rounds: ClassVar[list[int]] = []  # of its shards
    seconds = 0.0

    def __init__(self, share: object) -> None:
        super().__init__(share)
        self.known: set[int] = set()

    def evaluate(self, round_: int, shared: object, shard: int, draw: int, members: np.ndarray, chunk: int) -> Answer:
        time.sleep((0.6 if draw == self.dear else 0.002) * len(members) / chunk)
        if draw not in self.known:
            time.sleep(0.3)
        self.known.add(draw)
        if draw == self.dear:
            self.rounds.append(round_)
        return super().evaluate(round_, shared, shard, draw, members, chunk)


@pytest.mark.parametrize(("make", "dear"), [(pool, 0), (pool, 1), (groups, 1)])
def test_tasks_of_unequal_cost_are_neither_started_twice_nor_taken_for_hung(
    ray: FakeRay, make: Any, dear: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("metatrain.ray.health.HANG_SECONDS", 0.5)
    monkeypatch.setattr("metatrain.ray.shards._LONGEST", 0.5)
    monkeypatch.setattr(Unequal, "dear", dear, raising=False)
    Unequal.rounds.clear()
    own = make(Unequal, 6, 2)
    draw = np.repeat(np.arange(2, dtype=np.int32), (40, 6) if dear else (6, 40))
    calls = Calls(draw, draw, np.zeros((46, 2), np.int32), np.full(46, 100.0))
    number = 0
    # One worker a generation gets all of the cheap task, so some may not have compiled that yet.
    while number < 2 or any(dear not in actor.instance.known for actor in ray.of(Unequal)):
        own.evaluate(Work(number, [None], calls))
        number += 1
        assert number < 30
    started = set()
    for last in range(number, number + 3):
        own.evaluate(Work(last, [None], calls))
        started.add(Unequal.rounds.count(last))
    assert min(started) == 6  # a machine that is late by .4 s may start one twice in one generation, but not in each
    assert own.report()["lost"] == 0
    own.close()


@pytest.mark.usefixtures("ray")
def test_no_worker_is_lost_because_the_machine_slept(monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver does nothing for 3 s, and its workers are late by as much."""
    own, looks = pool(Counting, 3, 2), 0
    for number in range(3):  # how long a call takes is known
        evaluate(own, number)
    monkeypatch.setattr("metatrain.ray.health.HANG_SECONDS", 1.5)

    def sleep() -> bool:
        nonlocal looks
        looks += 1
        if looks == 2:  # the workers are busy
            time.sleep(3.0)
        return True

    monkeypatch.setattr(Counting, "seconds", 3.5)
    _, answered = own.evaluate(Work(3, [None], CALLS.part(np.array([0, 40, 80]))), sleep)
    assert answered.all()
    assert own.report()["lost"] == 0
    own.close()


def test_aggregators_compute_what_one_pool_does_and_answer_once(ray: FakeRay) -> None:
    own = groups(Counting, 32, 2)
    for number in range(3):
        np.testing.assert_array_equal(evaluate(own, number), EXPECTED)
    assert (len(ray.of(Aggregator)), len(ray.of(Counting)), own.workers) == (4, 32, 32)
    own.close()
    assert not ray.of(Aggregator)
    assert not ray.of(Counting)


def test_an_aggregator_that_is_killed_is_replaced_and_its_calls_are_computed(
    ray: FakeRay, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    own = groups(Counting, 32, 2, said.append)
    evaluate(own)
    monkeypatch.setattr(Counting, "seconds", 0.1)
    victim = ray.of(Aggregator)[1]

    def kill_at_work() -> None:
        while not any(worker.at_work() for worker in victim.children):
            time.sleep(0.001)
        victim.kill()

    threading.Thread(target=kill_at_work, daemon=True).start()
    np.testing.assert_array_equal(evaluate(own, 1), EXPECTED)
    assert victim.dead
    assert any("an aggregator is lost with 8 workers" in sentence for sentence in said)
    assert own.report()["lost"] == 8
    monkeypatch.setattr(Counting, "seconds", 0.002)
    for number in range(2, 5):
        np.testing.assert_array_equal(evaluate(own, number), EXPECTED)
    assert len(ray.of(Aggregator)) == 4
    own.close()


def test_an_aggregator_without_a_sign_of_life_is_given_up(ray: FakeRay, monkeypatch: pytest.MonkeyPatch) -> None:
    own = groups(Counting, 16, 2)
    evaluate(own)
    monkeypatch.setattr("metatrain.ray.groups.STATUS_SECONDS", 0.05)
    monkeypatch.setattr("metatrain.ray.groups.SILENT_SECONDS", 0.5)
    silent = ray.of(Aggregator)[0].instance
    forever = threading.Event()
    silent.status = silent.evaluate = lambda *_: forever.wait()
    np.testing.assert_array_equal(evaluate(own, 1), EXPECTED)
    assert silent not in [actor.instance for actor in ray.of(Aggregator)]
    own.close()
    forever.set()


def test_an_aggregator_without_workers_gives_back_what_it_has_not_computed(
    ray: FakeRay, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("metatrain.ray.aggregator.STARVED_SECONDS", 0.2)
    own = groups(Counting, 16, 2)
    evaluate(own)
    monkeypatch.setattr(Counting, "seconds", 0.05)
    starved = ray.of(Aggregator)[0]
    starved.instance._pool._fleet.recruit = lambda _: []

    def kill_at_work() -> None:
        while not any(worker.at_work() for worker in starved.children):
            time.sleep(0.001)
        for worker in list(starved.children):
            worker.kill()

    threading.Thread(target=kill_at_work, daemon=True).start()
    np.testing.assert_array_equal(evaluate(own, 1), EXPECTED)
    assert own.workers == 8
    own.close()


@pytest.mark.usefixtures("ray")
def test_errors_of_a_task_end_the_run_through_an_aggregator() -> None:
    own = groups(Failing, 8, 2)
    with pytest.raises(UserError, match=r"^candidates fail on the workers: ZeroDivisionError: by zero"):
        evaluate(own)
    own.close()
