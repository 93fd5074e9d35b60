"""The scheduler at scales that no test machine has."""

from __future__ import annotations

import dataclasses

import pytest

from tests.metatrain.simulation import World, simulate

FREE = World(shard_cost=0.0, group_cost=0.0, generation=0.0).calm()


@pytest.mark.parametrize(
    ("workers", "calls", "efficiency"), [(1, 8, 1.0), (4, 2, 1.0), (8, 1.5, 0.75), (100, 0.1, 0.1)]
)
def test_without_trouble_a_generation_takes_whole_rounds(workers: int, calls: float, efficiency: float) -> None:
    world = dataclasses.replace(FREE, call=5.0, work=5.0 * calls)  # calls of each worker, which cannot be cut
    assert simulate(world, workers, generations=3) == pytest.approx(efficiency)


def test_a_driver_that_is_the_bottleneck() -> None:
    """1,000 workers of one call each, handed out 10 ms apart: the last one starts after 10 s."""
    world = dataclasses.replace(FREE, work=5.0, call=5.0, shard_cost=0.02)
    assert simulate(world, 1000, generations=2, group=1000) == pytest.approx(5 / 25, rel=0.25)


def test_stragglers_cost_what_starting_again_costs_not_what_they_take() -> None:
    """One shard in 100 takes 50 times as long; without a second start a generation would take as long as 50 shards."""
    world = dataclasses.replace(FREE, work=8.0, call=2.0, hiccup_share=0.01, hiccup_factor=50.0)
    assert simulate(world, 100, generations=5) > 0.4  # waiting for them: 400 / 100 / 50 = .08


def test_losses_slow_down_and_never_stop() -> None:
    rough = simulate(World(failures_an_hour=60.0), 50, generations=3)
    assert 0.1 < rough < simulate(World(failures_an_hour=0.0), 50, generations=3)


def test_a_hundred_workers_are_used_well() -> None:
    assert simulate(World().calm(), 100, generations=2) > 0.97
    assert simulate(World(), 100, generations=2) > 0.85


def test_aggregators_cost_little() -> None:
    """Ten groups of 20 with shorter generations, to be quick."""
    world = World(work=15.0)
    assert simulate(world.calm(), 200, generations=2, group=20) > 0.93
    assert simulate(world, 200, generations=2, group=20) > 0.75


@pytest.mark.slow
def test_a_thousand_workers_are_used_well() -> None:
    assert simulate(World().calm(), 1000, generations=2) > 0.95
    assert simulate(World(), 1000, generations=2) > 0.85
