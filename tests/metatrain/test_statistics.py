import math

import numpy as np
import pytest

from metatrain.evaluation import statistics
from metatrain.evaluation.statistics import (
    area_under_curve,
    mean_interval,
    performance_profile,
    speedup,
    steps_to_reach,
    win_rate,
)


def covered(draw, truth, seeds, trials=2000):
    rng = np.random.default_rng(1)
    found = [mean_interval(draw(rng, seeds)) for _ in range(trials)]
    return np.mean([not interval.excludes(truth) for interval in found])


@pytest.mark.parametrize("seeds", [2, 3, 4, 5, 6, 12, 30])
def test_interval_of_normal_differences_covers_as_often_as_it_says(seeds):
    assert covered(lambda rng, n: rng.normal(0.3, 2.0, n), 0.3, seeds) == pytest.approx(0.95, abs=0.02)


def test_interval_of_skewed_differences_covers_nearly_as_often():
    assert covered(lambda rng, n: rng.gamma(2.0, 1.0, n), 2.0, 12) > 0.9


def test_the_plain_percentile_interval_would_be_too_narrow(monkeypatch):
    # Why the quantiles are moved: without it six seeds cover the truth much less often than stated.
    monkeypatch.setattr(statistics, "_expanded", lambda _: (0.025, 0.975))
    assert covered(lambda rng, n: rng.normal(0.0, 1.0, n), 0.0, 6) < 0.91


def test_pairing_removes_what_seeds_share():
    shared = np.random.default_rng(0).normal(0, 10, 8)
    ours, theirs = shared - 0.1 + 0.01 * np.arange(8), shared
    low, high = mean_interval(ours - theirs)[1:]
    assert high - low < 0.1
    assert mean_interval(ours)[2] - mean_interval(ours)[1] > 1


def test_a_ratio_of_four_seeds_or_fewer_has_no_interval():
    # All resamples of n seeds lie between the least and the greatest, which n normal values cover with 1 - 2^(1-n).
    curves = np.array([[0.5, 0.7], [0.5, 0.8], [0.5, 0.9], [0.5, 0.75]])
    assert speedup([10, 100], curves, curves - 0.01, 0)[1:] == (-math.inf, math.inf)


def test_one_seed_says_nothing_of_the_spread():
    assert mean_interval([0.5]) == (0.5, -math.inf, math.inf)
    assert not mean_interval([0.5]).excludes(100.0)


def test_a_diverged_run_makes_the_interval_nan():
    value, low, high = mean_interval([0.1, math.nan, 0.2])
    assert math.isnan(value)
    assert math.isnan(low)
    assert math.isnan(high)


def test_win_rate_counts_ties_as_halves_and_nan_as_lost():
    assert win_rate([1, 2, 3, math.nan], [2, 2, 1, 5]) == pytest.approx((1 + 0.5 + 0 + 0) / 4)
    assert win_rate([math.nan], [math.nan]) == 0.5


def test_steps_to_reach_on_hand_made_curves():
    horizons, curve = [10, 100, 1000], [0.5, 0.7, 0.8]
    assert steps_to_reach(horizons, curve, 0.4) == pytest.approx(10)
    assert steps_to_reach(horizons, curve, 0.7) == pytest.approx(100)
    assert steps_to_reach(horizons, curve, 0.75) == pytest.approx(math.sqrt(100 * 1000))
    assert steps_to_reach(horizons, curve, 0.81) == math.inf
    assert steps_to_reach([10, 100, 1000], [0.5, 0.4, 0.6], 0.5) == pytest.approx(10)  # the first time, not the last
    assert steps_to_reach([7], [0.5], 0.6) == math.inf
    assert steps_to_reach([10, 100], [0.5, 0.5], math.nan) == math.inf


def test_speedup_on_hand_made_curves():
    horizons = [10, 100, 1000]
    theirs = np.tile([0.5, 0.7, 0.8], (6, 1))
    ours = np.tile([0.7, 0.8, 0.9], (6, 1))
    assert speedup(horizons, ours, theirs, 0) == pytest.approx((10, 10, 10))
    assert speedup(horizons, ours, theirs, 1) == pytest.approx((10, 10, 10))
    assert speedup(horizons, ours, theirs, 2) == (math.inf, math.inf, math.inf)


def test_speedup_is_infinite_only_in_some_resamples():
    ours = np.array([[0.7, 0.79], [0.7, 0.79], [0.7, 0.84], [0.7, 0.78], [0.7, 0.8]])
    theirs = np.tile([0.6, 0.801], (5, 1))
    value, low, high = speedup([10, 100], ours, theirs, 1)
    assert math.isfinite(value)
    assert low <= value
    assert high == math.inf


def test_area_under_curve():
    assert area_under_curve([0, 10, 20], [1.0, 0.0, 0.0]) == pytest.approx(0.25)
    assert area_under_curve([5], [0.3]) == 0.3


def test_performance_profile():
    profile = performance_profile({"a": [10, 100, math.inf], "b": [20, 50, math.inf]})
    assert profile == {"a": [1.0, 2.0], "b": [1.0, 2.0]}
    assert performance_profile({"a": [10, 30], "b": [math.inf, 30]})["b"] == [1.0, math.inf]
