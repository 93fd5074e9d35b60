"""Statistics of a few seeds: paired intervals, win rates, speed-ups, performance profiles.

Seeds are resampled together for all optimizers, because all of them saw the same inits and batches.
With few seeds the plain percentile interval is too narrow, so its quantiles are moved outwards by the
ratio of Student's quantiles to the normal's (the expanded percentile interval of T. Hesterberg, What Teachers
Should Know About the Bootstrap, The American Statistician 69(4), 2015). No resample lies outside of the seeds' own
range, which with four or fewer is too narrow whatever the quantiles: then a mean has Student's interval, and a ratio
none.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

LEVEL = 0.95
FEWEST_SEEDS = 5  # of a bootstrap
_RESAMPLES = 4000


class Interval(NamedTuple):
    """An estimate and its confidence interval; the ends are infinite where the seeds are too few."""

    value: float
    low: float
    high: float

    def excludes(self, number: float) -> bool:
        """Whether the interval lies on one side of `number`."""
        return self.low > number or self.high < number


def mean_interval(values: Sequence[float] | np.ndarray) -> Interval:
    """The mean over seeds with its 95 % interval. For differences between two optimizers on the same
    seeds it is the paired interval.

    Args:
      values: one per seed [S].
    """
    array = np.asarray(values, float)
    if 1 < len(array) < FEWEST_SEEDS:
        return _students_interval(array)
    return interval(lambda rows: array[rows].mean(-1), len(array))


def _students_interval(values: np.ndarray) -> Interval:
    mean = float(values.mean())
    if not math.isfinite(mean):  # a run diverged, so there is no interval
        return Interval(mean, math.nan, math.nan)
    from scipy import stats

    room = float(stats.t.ppf((1 + LEVEL) / 2, len(values) - 1) * stats.sem(values))
    return Interval(mean, mean - room, mean + room)


def interval(statistic: Callable[[np.ndarray], np.ndarray], seeds: int) -> Interval:
    """The bootstrap interval of a statistic of the seeds.

    Args:
      statistic: seed numbers int [B, S] -> its value on each of the B resamples [B]; may be infinite or NaN.
      seeds: S; with fewer than `FEWEST_SEEDS` the ends are infinite.
    """
    value = float(statistic(np.arange(seeds)[None])[0])
    if seeds < FEWEST_SEEDS:
        return Interval(value, -math.inf, math.inf)
    found = statistic(_resamples(seeds))
    if np.isnan(found).any():  # a run diverged, so there is no interval
        return Interval(value, math.nan, math.nan)
    # An order statistic: infinite values are not interpolated.
    low, high = np.quantile(found, _expanded(seeds), method="inverted_cdf")
    return Interval(value, float(low), float(high))


@functools.cache
def _resamples(seeds: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, seeds, (_RESAMPLES, seeds))


@functools.cache
def _expanded(seeds: int) -> tuple[float, float]:
    """The two quantiles: Φ(±√(S/(S-1)) t), t the quantile of Student's distribution with S-1 degrees of freedom."""
    from scipy import stats

    tail = (1 - LEVEL) / 2
    outer = float(stats.norm.cdf(math.sqrt(seeds / (seeds - 1)) * stats.t.ppf(tail, seeds - 1)))
    return outer, 1 - outer


def win_rate(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The share of seeds whose loss is lower; a tie is half a win, and a loss of NaN is infinite."""
    a, b = (np.nan_to_num(np.asarray(x, float), nan=np.inf, posinf=np.inf) for x in (ours, theirs))
    return float(np.mean((a < b) + 0.5 * (a == b)))


def steps_to_reach(horizons: Sequence[int], curve: Sequence[float], target: float) -> float:
    """The first number of steps at which `curve`, linear in log steps, reaches `target`.

    Args:
      horizons: increasing numbers of steps [H].
      curve: the accuracy at each [H].
      target: the accuracy to reach.

    Returns:
      Steps; the first horizon if it reaches the target already; infinity if none does.
    """
    return float(_steps_to_reach(horizons, np.asarray(curve, float)[None], np.array([target], float))[0])


def speedup(horizons: Sequence[int], ours: np.ndarray, theirs: np.ndarray, at: int) -> Interval:
    """Steps that a baseline needs for the accuracy that L3RS has at a horizon, over that horizon.

    Args:
      horizons: increasing numbers of steps [H].
      ours, theirs: accuracies [S, H].
      at: index into `horizons`.

    Returns:
      The ratio of the means over seeds, paired interval; infinite where the baseline never reaches it.
    """

    def ratio(rows: np.ndarray) -> np.ndarray:
        return _steps_to_reach(horizons, theirs[rows].mean(1), ours[rows, at].mean(1)) / horizons[at]

    return interval(ratio, len(ours))


def _steps_to_reach(horizons: Sequence[int], curves: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """[B, H] and [B] to [B]."""
    log_steps = np.log(np.asarray(horizons, float))
    reached = curves >= targets[:, None]
    first = reached.argmax(1)
    before = np.maximum(first - 1, 0)
    rows = np.arange(len(curves))
    rise = curves[rows, first] - curves[rows, before]
    share = np.where(rise > 0, (targets - curves[rows, before]) / np.where(rise > 0, rise, 1.0), 0.0)
    steps = np.exp(log_steps[before] + np.clip(share, 0.0, 1.0) * (log_steps[first] - log_steps[before]))
    return np.where(reached.any(1), steps, np.inf)


def area_under_curve(steps: Sequence[int], values: Sequence[float]) -> float:
    """The mean of a curve over its steps, by trapezoids; of a single point its value."""
    if len(steps) == 1:
        return float(values[0])
    return float(np.trapezoid(values, steps) / (steps[-1] - steps[0]))


def performance_profile(costs: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    """For each optimizer and problem, its cost over the least cost of any (Dolan and Moré, 2002).

    Args:
      costs: {optimizer: steps it needs on each problem}, infinite where it never solves it.

    Returns:
      {optimizer: ratios ≥ 1, increasing}. Problems that no optimizer solves are left out. See `share_within`.
    """
    table = np.array([list(row) for row in costs.values()], float)
    best = table.min(0)
    solved = np.isfinite(best)
    ratios = table[:, solved] / best[solved]
    return {name: sorted(row.tolist()) for name, row in zip(costs, ratios, strict=True)}


def share_within(ratios: Sequence[float] | np.ndarray, factor: float) -> float:
    """The share of problems solved with at most `factor` times the least cost; infinity: solved at all.

    Args:
      ratios: of one optimizer, from `performance_profile`.
    """
    array = np.asarray(ratios)
    return float(np.mean(array <= factor if math.isfinite(factor) else np.isfinite(array)))
