"""The policy of worker health, with a made-up clock: no Ray, no processes."""

from __future__ import annotations

import pytest

from metatrain.ray.health import FIRST_CALL_SECONDS, HANG_FACTOR, HANG_SECONDS, START_SECONDS, Health


def ready(*workers: str) -> Health:
    """Workers that have answered once, at time 0."""
    health = Health()
    for worker in workers:
        health.started(worker, 0.0)
        health.answered(worker, 0.0, None)
    return health


def running(*workers: str) -> dict[str, bool]:
    """Busy workers, none of which compiles."""
    return dict.fromkeys(workers, False)


def test_the_first_call_of_a_task_may_compile() -> None:
    health = ready("a", "b")
    health.given_work("a", 5.0)
    health.given_work("b", 5.0)
    assert not health.hung({"a": True, "b": False}, 10, 5.0 + HANG_SECONDS)
    assert set(health.hung({"a": True, "b": False}, 10, 6.0 + HANG_SECONDS)) == {"b"}
    health.lost("b")
    health.answered("a", 5.0, None)
    assert not health.hung({"a": True}, 10, 5.0 + FIRST_CALL_SECONDS)
    assert health.hung({"a": True}, 10, 6.0 + FIRST_CALL_SECONDS) == {"a": FIRST_CALL_SECONDS + 1}


def test_patience_follows_the_horizon() -> None:
    health = ready("a")
    assert health.patience(10, False) == HANG_SECONDS
    health.given_work("a", 1.0)
    health.answered("a", 1.6, 10)  # 0.06 s per step
    assert health.patience(10, False) == HANG_SECONDS  # twenty times 0.6 s is less than the minimum
    assert health.patience(500, False) == pytest.approx(HANG_FACTOR * 0.06 * 500)


def test_an_answer_without_a_cost_measures_no_speed() -> None:
    health = Health()
    health.started("a", 0.0)
    health.answered("a", 500.0, None)
    health.given_work("a", 500.0)
    health.answered("a", 900.0, None)
    assert health.patience(10, False) == HANG_SECONDS
    assert health.answers("a") == 2


def test_patience_doubles_until_there_is_an_answer() -> None:
    """A task whose first call takes 20 minutes is computed at the third attempt."""
    health, now = Health(), 0.0
    for attempt, patience in enumerate((600, 1200, 2400)):
        worker = f"worker-{attempt}"
        health.started(worker, now)
        health.given_work(worker, now)
        assert not health.hung({worker: True}, 10, now + patience)
        if patience > 1300:
            health.answered(worker, now + 1300, None)
            assert health.patience(10, False) == HANG_SECONDS
            return
        now += patience + 1
        assert health.hung({worker: True}, 10, now)
        health.lost(worker)
    raise AssertionError


def test_workers_that_hang_at_the_same_time_double_patience_once() -> None:
    health = ready("a", "b", "c")
    assert set(health.hung(running("a", "b"), 10, HANG_SECONDS + 1)) == {"a", "b"}  # c is idle
    assert health.patience(10, False) == 2 * HANG_SECONDS


def test_a_worker_that_hung_for_a_while_and_hangs_again_is_replaced_as_soon_as_any() -> None:
    """Its late answer does not count as its speed: twenty times 25 s would be a wait of 500 s."""
    health, now = ready("a", "b"), 0.0
    for seconds in (0.5, 25.0, 0.5):
        health.given_work("a", now)
        now += seconds
        health.answered("a", now, 10)
    health.given_work("a", now)
    assert set(health.hung(running("a"), 10, now + HANG_SECONDS + 1)) == {"a"}


def test_the_speed_of_a_lost_worker_is_forgotten() -> None:
    health = ready("slow", "fast")
    for worker, seconds in (("slow", 10.0), ("fast", 1.0)):
        health.given_work(worker, 0.0)
        health.answered(worker, seconds, 10)
    assert health.patience(10, False) == pytest.approx(HANG_FACTOR * 10)
    health.lost("slow")
    assert health.patience(10, False) == HANG_SECONDS


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
        health.hung(running("a"), 10, 1e9)
    assert health.patience(10, False) == HANG_SECONDS * 2**6


def test_a_worker_is_replaced_at_its_third_unusable_answer() -> None:
    health = ready("a", "b")
    assert [health.unusable("a") for _ in range(2)] == [False, False]
    assert not health.unusable("b")
    assert health.unusable("a")


def test_errors_end_the_run_unless_there_are_answers_in_between() -> None:
    health = ready("a", "b")
    assert [health.error(), health.error()] == [False, False]
    health.answered("b", 1.0, 10)
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
