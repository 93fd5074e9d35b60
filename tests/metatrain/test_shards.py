"""The state machine that hands out a generation's shards."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metatrain.ray.shards import Shards, cut_shards


def test_a_worker_is_one_shard_ahead_while_there_are_plenty() -> None:
    shards = Shards([1.0] * 5)
    assert [shards.take("a", 1, 0.0) for _ in range(3)] == [0, 1, None]
    assert shards.answer("a", 0, 1.0)
    assert shards.take("a", 1, 1.0) == 2
    assert shards.answer("a", 1, 2.0)
    assert shards.take("a", 1, 2.0) == 3  # one is left: it is not kept from the others
    assert shards.take("a", 1, 2.0) is None
    assert shards.holds("a") == (2, 3)


def test_the_slowest_is_started_again_elsewhere_and_the_first_answer_counts() -> None:
    shards = Shards([1.0] * 2)
    assert (shards.take("slow", 2, 0.0), shards.take("fast", 2, 0.0)) == (0, 1)
    assert shards.answer("fast", 1, 10.0)
    assert shards.next_look() == pytest.approx(15.1)  # 1.5 times the median of 10 s, and .1 s
    assert shards.take("fast", 2, 15.0) is None
    assert shards.take("fast", 2, 15.2) == 0
    assert shards.next_look() == pytest.approx(30.3)
    assert shards.take("third", 3, 30.0) is None  # it was started less than 15.1 s ago
    assert shards.take("third", 3, 30.4) == 0  # the second one is also slow
    assert shards.answer("third", 0, 35.0)
    assert shards.finished
    assert not shards.answer("slow", 0, 40.0)  # too late
    assert shards.duplicated == 2


def test_what_waits_behind_a_running_shard_is_taken_over_at_once() -> None:
    shards = Shards([1.0] * 4)
    assert [shards.take("a", 2, 0.0), shards.take("a", 2, 0.0)] == [0, 1]
    assert shards.take("b", 2, 0.0) == 2
    assert shards.take("c", 2, 0.0) == 3
    assert shards.answer("c", 3, 1.0)
    assert shards.take("c", 2, 1.0) == 1  # no worker has begun it


def test_the_limit_for_a_second_start_depends_on_the_cost_of_the_shard() -> None:
    shards = Shards([4.0, 1.0, 1.0], paces={0: 1.0})
    assert [shards.take(name, 3, 0.0) for name in "abc"] == [0, 1, 2]
    assert shards.answer("c", 2, 1.0)
    assert shards.next_look() == pytest.approx(1.6)
    assert shards.take("c", 3, 1.7) == 1  # not the one that was started first, which may take 6 s
    assert shards.answer("c", 1, 2.7)
    assert shards.take("c", 3, 5.9) is None
    assert shards.take("c", 3, 6.2) == 0


def test_what_began_before_any_duration_was_known_is_started_again_too() -> None:
    shards = Shards([1.0] * 3)
    assert [shards.take(name, 3, 0.0) for name in "abc"] == [0, 1, 2]
    assert shards.next_look() == math.inf
    assert shards.answer("a", 0, 2.0)
    assert shards.next_look() == pytest.approx(3.1)
    assert {shards.take("a", 3, 3.2), shards.take("d", 3, 3.2)} == {1, 2}


def sizes(calls: int, workers: int, seconds: float) -> list[int]:
    ranges = cut_shards([seconds] * calls, workers)
    assert [call for own in ranges for call in own] == list(range(calls))
    return [len(own) for own in ranges]


def test_shards_get_shorter_towards_the_end_and_longer_the_more_workers_there_are() -> None:
    assert sizes(64, workers=2, seconds=0.0) == [1] * 64  # duration unknown
    assert sizes(8, workers=2, seconds=1.0) == [1] * 8  # a call cannot be cut
    assert sizes(64, workers=2, seconds=0.05) == [5] * 12 + [4]  # a quarter of a second
    few, many, huge = (sizes(200 * n, workers=n, seconds=0.1) for n in (10, 100, 1000))
    assert (few[0], many[0], huge[0]) == (2, 10, 40)  # .25, 1 and 4 s
    assert max(few[-1], many[-1]) == 2
    assert min(huge[:-1]) == 20  # 2 s: as long as a driver needs for a shard of each of 1,000 workers
    assert huge == sorted(huge, reverse=True)
    assert sizes(20, workers=20, seconds=0.1) == [1] * 20  # no worker waits for work that another one holds
    assert sizes(10, workers=0, seconds=0.1) == [2] * 5


def test_a_shard_is_of_one_draw() -> None:
    assert cut_shards([0.1] * 6, 1, [0, 0, 0, 1, 1, 1]) == [range(2), range(2, 3), range(3, 5), range(5, 6)]


def test_a_lost_workers_shards_go_to_the_next_worker_that_asks() -> None:
    shards = Shards([1.0] * 3)
    shards.take("a", 1, 0.0)
    shards.take("a", 1, 0.0)
    shards.lose("a")
    assert shards.requeued == 2
    assert {shards.take("b", 1, 1.0), shards.take("b", 1, 1.0)} == {0, 1}
    shards.lose("nobody")


def test_a_shard_that_two_hold_survives_one_of_them() -> None:
    shards = Shards([1.0] * 2)
    shards.take("a", 2, 0.0)
    shards.take("b", 2, 0.0)
    shards.answer("b", 1, 1.0)
    assert shards.take("b", 2, 2.0) == 0
    shards.lose("a")
    assert shards.requeued == 0
    assert shards.answer("b", 0, 3.0)
    assert shards.finished


def test_a_rejected_answer_is_asked_for_again() -> None:
    shards = Shards([1.0] * 1)
    assert shards.take("a", 1, 0.0) == 0
    shards.reject("a", 0, 1.0)
    assert not shards.finished
    assert shards.take("a", 1, 1.0) == 0


@given(
    count=st.integers(1, 30),
    workers=st.integers(1, 6),
    seed=st.integers(0, 2**31),
    failures=st.integers(0, 20),
)
def test_every_shard_gets_exactly_one_first_answer_whatever_happens(
    count: int, workers: int, seed: int, failures: int
) -> None:
    rng = random.Random(seed)
    shards, firsts, now = Shards([1.0] * count), [0] * count, 0.0
    names = [f"w{i}" for i in range(workers)]
    for _ in range(10_000):
        if shards.finished:
            break
        now += rng.random()
        worker = rng.choice(names)
        event = rng.random()
        held = shards.holds(worker)
        if failures and event < 0.1:
            failures -= 1
            shards.lose(worker)
        elif failures and event < 0.2 and held:
            failures -= 1
            shards.reject(worker, held[0], now)
        elif event < 0.6 and held:
            firsts[held[0]] += shards.answer(worker, held[0], now)
        else:
            shards.take(worker, workers, now)
        assert all(len(shards.holds(name)) <= 2 for name in names)
    assert shards.finished
    assert firsts == [1] * count
