from __future__ import annotations

import dataclasses

import pytest

from metatrain.config import UserError
from metatrain.outer.estimate import Estimate, check_workers, estimate
from metatrain.outer.setup import Setup
from metatrain.ray.shards import cut_shards
from tests.metatrain.common import small_config

_GENERATION, _RAY_SHARD = 0.05, 0.002  # seconds of the driver, as documented


def made_up(horizons: tuple[tuple[int, ...], ...], population: int, **changed: object) -> Estimate:
    """Two candidates in a call, which takes 3 s and 1 s for each step."""
    found = Estimate(
        horizons, population, members_per_call=2, seconds_per_step=0.5, seconds_per_call=3.0, state_bytes=1000
    )
    return dataclasses.replace(found, **changed)  # type: ignore[arg-type]


def test_hours_by_hand() -> None:
    found = made_up(((10,), (100,)), 12)
    assert found.candidate_steps == 12 * 110
    assert found.shards(1) == found.shards(8) == 6
    overhead = 2 * _GENERATION
    assert found.hours(1) == pytest.approx((6 * (13 + 103) + overhead) / 3600)
    assert found.hours(4) == pytest.approx((2 * (13 + 103) + overhead) / 3600)  # six calls on four devices
    assert found.hours(100) == pytest.approx((13 + 103 + overhead) / 3600)


def test_the_samples_of_a_generation_are_counted() -> None:
    found = made_up(((10, 40), (20, 20)), 4)
    assert found.candidate_steps == 4 * 90
    assert found.shards(1) == 4
    for workers, seconds in ((1, 2 * 102), (2, 102), (3, 43 + 13 + 46), (4, 66)):
        assert found.hours(workers) == pytest.approx((seconds + 2 * _GENERATION) / 3600)


def test_on_ray_calls_are_put_together_to_shards_and_the_driver_counts() -> None:
    found = made_up(((10,),), 64, members_per_call=1, seconds_per_step=0.001, seconds_per_call=0.0, ray=True)
    for workers in (1, 4):
        shards = cut_shards([0.01] * 64, workers)
        assert found.shards(workers) == len(shards) < 64
    one = found.shards(1)
    assert found.hours(1) == pytest.approx((0.64 + one * _RAY_SHARD + _GENERATION) / 3600)
    assert found.hours(2) < found.hours(1)
    # However many workers: the driver hands out one shard after the other.
    tiny = dataclasses.replace(found, population=100_000, seconds_per_step=1e-4)
    assert tiny.hours(1000) >= (tiny.shards(1000) * _RAY_SHARD + _GENERATION) / 3600
    assert found.bytes_per_generation(3) == pytest.approx(3 * 1000 + found.shards(3) * 200 + 64 * 8)


def test_long_runs_are_estimated_from_a_part_of_their_generations() -> None:
    short, long = made_up(((10,), (100,)) * 50, 12), made_up(((10,), (100,)) * 5000, 12)
    assert long.hours(4) == pytest.approx(100 * short.hours(4), rel=0.01)


def test_numbers_of_workers_have_bounds() -> None:
    for wrong in ([], [0, 4], [10**9]):
        with pytest.raises(UserError, match=r"--workers.*from 1 to 100,000"):
            check_workers(wrong)
    check_workers([1, 100_000])


def test_the_estimate_counts_the_runs_own_generations() -> None:
    execution = {"members_per_call": 2, "plan": "fused", "backend": "ray"}
    config = small_config(outer={"steps": 7, "population": 8, "samples": 2}, execution=execution)
    steps: list[str] = []
    found = estimate(config, steps.append)
    setup = Setup.build(config)
    assert found.horizons == tuple(tuple(draw.horizon for draw in setup.generation(n).draws) for n in range(7))
    assert len(found.horizons[0]) == 2
    assert found.members_per_call == 2
    assert found.ray
    assert 0 < found.seconds_per_step < 1
    assert found.state_bytes > 0
    assert any(step.startswith("measuring task 1 of 1") for step in steps)
