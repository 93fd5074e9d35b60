from __future__ import annotations

import pytest

from metatrain.outer.estimate import Estimate, estimate
from metatrain.outer.setup import Setup
from tests.metatrain.common import small_config


def test_hours_and_bytes_by_hand() -> None:
    found = Estimate(
        horizons=((10,), (100,)),
        population=12,
        members_per_shard=2,
        seconds_per_step=0.5,
        seconds_per_call=3.0,
        state_bytes=1000,
        shard_bytes=10,
    )
    assert found.candidate_steps == 12 * 110
    assert found.shards == 6
    one = 6 * ((3 + 2 * 0.5 * 10) + (3 + 2 * 0.5 * 100)) / 3600
    assert found.hours(1) == pytest.approx(one)
    assert found.hours(4) == pytest.approx(one / 3)  # two rounds of six shards on four workers
    assert found.hours(100) == pytest.approx(one / 6)
    assert found.bytes_per_generation(3) == 3000 + 60


def test_the_samples_of_a_generation_are_counted() -> None:
    found = Estimate(
        horizons=((10, 40), (20, 20)),
        population=4,
        members_per_shard=2,
        seconds_per_step=0.5,
        seconds_per_call=3.0,
        state_bytes=1000,
        shard_bytes=10,
    )
    assert found.candidate_steps == 4 * 90
    assert found.shards == 4
    assert found.hours(1) == pytest.approx(2 * (13 + 43 + 23 + 23) / 3600)
    assert found.hours(2) == pytest.approx((13 + 43 + 23 + 23) / 3600)
    assert found.hours(3) == pytest.approx((43 + 13 + 23 + 23) / 3600)
    assert found.hours(4) == pytest.approx((43 + 23) / 3600)


def test_the_estimate_counts_the_runs_own_generations() -> None:
    config = small_config(outer={"steps": 7, "population": 8, "samples": 2}, execution={"members_per_call": 2})
    found = estimate(config)
    setup = Setup.build(config)
    assert found.horizons == tuple(tuple(draw.horizon for draw in setup.generation(n).draws) for n in range(7))
    assert len(found.horizons[0]) == 2
    assert found.members_per_shard == 2
    assert 0 < found.seconds_per_step < 1
    assert found.state_bytes > 0
