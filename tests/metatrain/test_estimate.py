from __future__ import annotations

import pytest

from metatrain.outer.estimate import Estimate, estimate
from metatrain.outer.setup import Setup
from tests.metatrain.common import small_config


def test_hours_and_bytes_by_hand() -> None:
    found = Estimate(
        horizons=(10, 100),
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


def test_the_estimate_counts_the_runs_own_generations() -> None:
    config = small_config(outer={"steps": 7, "population": 8}, execution={"members_per_call": 2})
    found = estimate(config)
    setup = Setup.build(config)
    assert found.horizons == tuple(setup.generation(n).horizon for n in range(7))
    assert found.members_per_shard == 2
    assert 0 < found.seconds_per_step < 1
    assert found.state_bytes > 0
