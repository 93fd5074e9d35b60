"""The state machine that hands out a generation's shards."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from metatrain.ray.shards import Shards


def test_a_worker_is_one_shard_ahead_while_there_are_plenty() -> None:
    shards = Shards(5)
    assert [shards.take("a", 1, 0.0) for _ in range(3)] == [0, 1, None]
    assert shards.answer("a", 0, 1.0)
    assert shards.take("a", 1, 1.0) == 2
    assert shards.answer("a", 1, 2.0)
    assert shards.take("a", 1, 2.0) == 3  # one is left: no reason to hold it back from others
    assert shards.take("a", 1, 2.0) is None
    assert shards.holds("a") == (2, 3)


def test_the_slowest_is_started_again_elsewhere_and_the_first_answer_counts() -> None:
    shards = Shards(2)
    assert (shards.take("slow", 2, 0.0), shards.take("fast", 2, 0.0)) == (0, 1)
    assert shards.answer("fast", 1, 10.0)
    assert shards.take("fast", 2, 14.0) is None  # 14 s are less than 1.5 times the median of 10 s
    assert shards.take("fast", 2, 15.0) == 0
    assert shards.take("third", 3, 25.0) is None  # it was started 10 s ago
    assert shards.take("third", 3, 30.0) == 0  # the second is slow, too
    assert shards.answer("third", 0, 35.0)
    assert shards.finished
    assert not shards.answer("slow", 0, 40.0)  # too late
    assert shards.duplicated == 2


def test_what_waits_behind_a_running_shard_is_taken_over_at_once() -> None:
    shards = Shards(4)
    assert [shards.take("a", 2, 0.0), shards.take("a", 2, 0.0)] == [0, 1]
    assert shards.take("b", 2, 0.0) == 2
    assert shards.take("c", 2, 0.0) == 3
    assert shards.answer("c", 3, 1.0)
    assert shards.take("c", 2, 1.0) == 1  # nobody has begun with it


def test_a_lost_workers_shards_go_to_the_next_who_asks() -> None:
    shards = Shards(3)
    shards.take("a", 1, 0.0)
    shards.take("a", 1, 0.0)
    shards.lose("a")
    assert shards.requeued == 2
    assert {shards.take("b", 1, 1.0), shards.take("b", 1, 1.0)} == {0, 1}
    shards.lose("nobody")


def test_a_shard_that_two_hold_survives_one_of_them() -> None:
    shards = Shards(2)
    shards.take("a", 2, 0.0)
    shards.take("b", 2, 0.0)
    shards.answer("b", 1, 1.0)
    assert shards.take("b", 2, 2.0) == 0
    shards.lose("a")
    assert shards.requeued == 0
    assert shards.answer("b", 0, 3.0)
    assert shards.finished


def test_a_rejected_answer_is_asked_for_again() -> None:
    shards = Shards(1)
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
    shards, firsts, now = Shards(count), [0] * count, 0.0
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
