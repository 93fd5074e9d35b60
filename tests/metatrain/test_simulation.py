"""The scheduler at scales that no test machine has."""

from __future__ import annotations

import pytest

from tests.metatrain.simulation import World, simulate

CALM = World(call=0.0, generation=0.0, slow_share=0.0, hiccup_share=0.0, failures_an_hour=0.0)


@pytest.mark.parametrize(("workers", "shards", "efficiency"), [(1, 8, 1.0), (4, 8, 1.0), (8, 12, 0.75), (100, 10, 0.1)])
def test_without_trouble_a_generation_takes_whole_rounds(workers: int, shards: int, efficiency: float) -> None:
    assert simulate(CALM, workers, shards, generations=3) == pytest.approx(efficiency)


def test_a_driver_that_is_the_bottleneck() -> None:
    """1,000 workers of one shard each, handed out 10 ms apart: the last one starts after 10 s."""
    world = World(shard=5.0, call=0.01, generation=0.0, slow_share=0.0, hiccup_share=0.0, failures_an_hour=0.0)
    assert simulate(world, 1000, 1000, generations=2) == pytest.approx(5 / 15, rel=1e-3)


def test_stragglers_cost_what_starting_again_costs_not_what_they_take() -> None:
    """One shard in 100 takes 50 times as long; without a second start a generation would take 50 shards' time."""
    world = World(call=0.0, generation=0.0, slow_share=0.0, hiccup_share=0.01, hiccup_factor=50.0, failures_an_hour=0.0)
    assert simulate(world, 100, 400, generations=5) > 0.4  # waiting for them: 400 / 100 / 50 = .08


def test_losses_slow_down_and_never_stop() -> None:
    rough = simulate(World(failures_an_hour=60.0), 50, 400, generations=3)
    assert 0.1 < rough < simulate(World(failures_an_hour=0.0), 50, 400, generations=3)


def test_a_thousand_workers_are_used_well() -> None:
    # Slow workers alone cost .06, the last of eight rounds .1.
    assert simulate(World(), 1000, 8000, generations=2) > 0.65
