"""The policy of worker health, with a made-up clock: no Ray, no processes."""

from __future__ import annotations

import pytest

from metatrain.ray.health import FIRST_CALL_SECONDS, HANG_FACTOR, HANG_SECONDS, START_SECONDS, Health, Load

LOAD = Load(0, 10)  # 10 candidate-steps of task 0


def ready(*workers: str) -> Health:
    """Workers that have answered twice, and take a thousandth of a second for a step of task 0, at time 0."""
    health = Health()
    for worker in workers:
        health.started(worker, -0.01)
        health.answered(worker, -0.01, LOAD)
        health.answered(worker, 0.0, LOAD)
    return health


def running(*workers: str) -> dict[str, Load]:
    return dict.fromkeys(workers, LOAD)


def test_the_first_call_of_a_task_may_compile() -> None:
    health, other = ready("a", "b"), Load(1, 10)
    for worker in ("a", "b"):
        health.given_work(worker, 5.0)
    assert not health.hung({"a": other, "b": LOAD}, 5.0 + HANG_SECONDS)
    assert set(health.hung({"a": other, "b": LOAD}, 6.0 + HANG_SECONDS)) == {"b"}
    health.lost("b")
    health.heard()
    assert not health.hung({"a": other}, 5.0 + FIRST_CALL_SECONDS)
    assert health.hung({"a": other}, 6.0 + FIRST_CALL_SECONDS) == {"a": FIRST_CALL_SECONDS + 1}


def test_a_task_whose_duration_nobody_has_measured_may_take_as_long() -> None:
    health, other = ready("a", "b"), Load(1, 10)
    health.answered("a", 300.0, other)  # it has compiled, and says nothing about the speed
    assert health.patience("a", other) == FIRST_CALL_SECONDS
    assert health.patience("b", other) == FIRST_CALL_SECONDS
    health.answered("a", 350.0, other)
    assert health.patience("a", other) == pytest.approx(HANG_FACTOR * 50)
    assert health.patience("a", LOAD) == HANG_SECONDS  # another task is as quick as it was
    assert health.patience("b", Load(1, 1)) == FIRST_CALL_SECONDS  # it compiles


def test_patience_follows_the_horizon() -> None:
    health = Health()
    health.started("a", 0.0)
    health.answered("a", 1.0, LOAD)
    health.answered("a", 1.6, LOAD)  # 0.06 s per step
    assert health.patience("a", LOAD) == HANG_SECONDS  # twenty times 0.6 s is less than the minimum
    assert health.patience("a", Load(0, 500)) == pytest.approx(HANG_FACTOR * 0.06 * 500)


def test_neither_a_first_answer_nor_one_of_an_earlier_generation_measures_speed() -> None:
    health = Health()
    health.started("a", 0.0)
    health.answered("a", 500.0, LOAD)
    health.given_work("a", 500.0)
    health.answered("a", 900.0, LOAD, current=False)
    assert health.usual_seconds(LOAD) == 0.0
    assert health.answers("a") == 2


def test_after_a_pause_the_time_to_answer_begins_anew() -> None:
    health = ready("a")
    health.given_work("a", 0.0)
    health.paused(1000.0)
    assert not health.hung(running("a"), 1000.0 + HANG_SECONDS)
    assert health.hung(running("a"), 1001.0 + HANG_SECONDS)


def test_patience_doubles_until_there_is_an_answer() -> None:
    """A task whose first call takes 20 minutes is computed at the third attempt."""
    health, now = Health(), 0.0
    for attempt, patience in enumerate((600, 1200, 2400)):
        worker = f"worker-{attempt}"
        health.started(worker, now)
        health.given_work(worker, now)
        assert not health.hung(running(worker), now + patience)
        if patience > 1300:
            health.answered(worker, now + 1300, LOAD)
            assert health.patience(worker, LOAD) == FIRST_CALL_SECONDS
            return
        now += patience + 1
        assert health.hung(running(worker), now)
        health.lost(worker)
    raise AssertionError


def test_workers_that_hang_at_the_same_time_double_patience_once() -> None:
    health = ready("a", "b", "c")
    assert set(health.hung(running("a", "b"), HANG_SECONDS + 1)) == {"a", "b"}  # c is idle
    assert health.patience("c", LOAD) == 2 * HANG_SECONDS


def test_a_worker_that_hung_for_a_while_and_hangs_again_is_replaced_as_soon_as_any() -> None:
    """Its late answer does not count as its speed: twenty times 25 s would be a wait of 500 s."""
    health, now = ready("a", "b"), 0.0
    for seconds in (0.5, 25.0, 0.5):
        health.given_work("a", now)
        now += seconds
        health.answered("a", now, LOAD)
    health.given_work("a", now)
    assert set(health.hung(running("a"), now + HANG_SECONDS + 1)) == {"a"}


def test_the_speed_of_a_lost_worker_is_forgotten() -> None:
    health = Health()
    for worker, seconds in (("slow", 10.0), ("fast", 1.0)):
        health.started(worker, 0.0)
        health.answered(worker, 0.0, LOAD)
        health.answered(worker, seconds, LOAD)
    assert health.patience("fast", LOAD) == pytest.approx(HANG_FACTOR * 10)
    health.lost("slow")
    assert health.patience("fast", LOAD) == HANG_SECONDS


def test_a_start_has_a_limit_that_grows_to_a_bound_and_shrinks_after_a_success() -> None:
    health = Health()
    limits = []
    for _ in range(5):
        limits.append(health.start_seconds() / START_SECONDS)
        health.slow_start()
    assert limits == [1, 2, 4, 8, 8]
    health.started("a", 0.0)
    assert health.start_seconds() == START_SECONDS


def test_patience_has_a_bound() -> None:
    health = ready("a")
    for _ in range(100):
        health.hung(running("a"), 1e9)
    assert health.patience("a", LOAD) == HANG_SECONDS * 2**6


def test_a_worker_is_replaced_at_its_third_unusable_answer() -> None:
    health = ready("a", "b")
    assert [health.unusable("a") for _ in range(2)] == [False, False]
    assert not health.unusable("b")
    assert health.unusable("a")


def test_errors_end_the_run_unless_there_are_answers_in_between() -> None:
    health = ready("a", "b")
    assert [health.error(), health.error()] == [False, False]
    health.answered("b", 1.0, LOAD)
    assert [health.error() for _ in range(3)] == [False, False, True]


def test_workers_that_cannot_start_are_asked_for_less_and_less_often() -> None:
    health, waits, now = Health(), [], 0.0
    assert health.may_recruit(now)
    for _ in range(8):
        health.failed_start(now)
        wait = next(seconds for seconds in range(1000) if health.may_recruit(now + seconds))
        waits.append(wait)
        now += wait
    assert waits == [2, 4, 8, 16, 32, 60, 60, 60]
    assert not health.any_started
    health.started("a", now)
    assert health.any_started
    health.failed_start(now)
    assert health.may_recruit(now + 2)
