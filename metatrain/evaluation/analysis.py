"""The analysis of an evaluation: who is ahead, by how much, and whether that could be chance.

One sign convention: a difference is L3RS minus the baseline, so negative is better.
"""

from __future__ import annotations

import functools
import math
import statistics as plain_statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from metatrain.evaluation import statistics
from metatrain.evaluation.records import L3RS, Cost, RecordTable, Results, Speedup, family, nan_as_inf
from metatrain.evaluation.statistics import Interval

Outcome = Literal["better", "worse", "undecided"]


class GridSummary(NamedTuple):
    """How one learning rate was tuned."""

    chosen: float
    tried: int  # learning rates; 0 where it was given
    grown: bool  # whether the grid had to grow beyond the smallest one of the setting
    at_edge: bool


class RelativeCost(NamedTuple):
    """A step's cost beside that of the well-known optimizers that were measured, too."""

    optimizer: str
    cost: Cost
    share: float  # of the longest time a step
    ratios: dict[str, float]  # {"sgd", "sgdm", "adam": time a step over that family's}


class Rival(NamedTuple):
    """The baseline that L3RS is compared with beyond the range of its meta-training."""

    label: str
    is_adam: bool  # the best tuned Adam; else, where Adam was not among them, the best baseline


class Analysis:
    """Results, and the numbers that follow from them. Compute it once and pass it on: it keeps what it computed.

    Attributes:
      results: the results.
      low, high: the shortest and longest horizon of meta-training; 0 and infinity where the checkpoint has none.
      range_known: whether the checkpoint has them.
      inside, beyond: the evaluated horizons in that range, and those longer than it.
    """

    def __init__(self, results: Results) -> None:
        self.results = results
        trained = results.meta_training.get("horizon") or {}
        self.range_known = bool(trained)
        self.low, self.high = float(trained.get("min", 0)), float(trained.get("max", math.inf))
        self.inside = [h for h in results.horizons() if self.low <= h <= self.high]
        self.beyond = [h for h in results.horizons() if h > self.high]
        # The page asks for the same numbers in many places.
        self.mean = functools.cache(results.mean)
        self.interval = functools.cache(self._interval)
        self.difference = functools.cache(self._difference)
        self.best_baseline = functools.cache(self._best_baseline)
        self.steps_to = functools.cache(self._steps_to)

    # Means, intervals and differences

    def _interval(self, setting: str, optimizer: str, horizon: int, field: str = "loss") -> Interval:
        """Mean over seeds of a field of the records, and its interval."""
        return statistics.mean_interval(self.results.values(setting, optimizer, horizon, field))

    def _difference(self, setting: str, baseline: str, horizon: int) -> Interval:
        """Test loss of L3RS minus the baseline's, mean over seeds and paired interval; negative is better."""
        ours = self.results.values(setting, L3RS, horizon)
        return statistics.mean_interval(ours - self.results.values(setting, baseline, horizon))

    def relative_difference(self, setting: str, baseline: str, horizon: int) -> float:
        """The difference of mean test losses over the baseline's; NaN where that is 0."""
        ours, theirs = (self.mean(setting, label, horizon) for label in (L3RS, baseline))
        return ours / theirs - 1 if theirs > 0 else math.nan

    def win_rate(self, setting: str, baseline: str, horizon: int) -> float:
        """The share of seeds in which L3RS has the lower test loss."""
        ours, theirs = (self.results.values(setting, label, horizon).tolist() for label in (L3RS, baseline))
        return statistics.win_rate(ours, theirs)

    def outcome(self, setting: str, baseline: str, horizon: int) -> Outcome:
        """Of L3RS: better or worse only where the paired interval excludes zero, or where L3RS diverged."""
        if not math.isfinite(self.mean(setting, L3RS, horizon)):
            return "worse"
        difference = self.difference(setting, baseline, horizon)
        if not difference.excludes(0.0):
            return "undecided"
        return "better" if difference.value < 0 else "worse"

    def is_lower(self, setting: str, baseline: str, horizon: int) -> bool:
        """Whether the mean test loss of L3RS is lower; NaN counts as infinite."""
        ours, theirs = (nan_as_inf(self.mean(setting, label, horizon)) for label in (L3RS, baseline))
        return ours < theirs

    # The best

    def _best_baseline(self, setting: str, horizon: int, among: Callable[[str], bool] | None = None) -> str | None:
        """The baseline with the lowest mean test loss: chosen on test, which favours it. None if there is none."""
        labels = [label for label in self.results.baselines() if among is None or among(label)]
        return min(labels, key=lambda label: nan_as_inf(self.mean(setting, label, horizon)), default=None)

    def lowest_loss(self, setting: str, horizon: int) -> float:
        """The lowest mean test loss of any optimizer; NaN where all are NaN."""
        losses = (self.mean(setting, label, horizon) for label in self.results.optimizers())
        return min((loss for loss in losses if not math.isnan(loss)), default=math.nan)

    def highest_accuracy(self, setting: str, horizon: int, among: Sequence[str] | None = None) -> float:
        """The highest mean test accuracy of any optimizer, or of some."""
        return max(self.mean(setting, label, horizon, "accuracy") for label in among or self.results.optimizers())

    def rival_beyond(self, setting: str, horizon: int) -> Rival:
        """The best tuned Adam, or the best baseline where Adam was not among them."""
        adam = self.best_baseline(setting, horizon, _is_adam)
        best = self.best_baseline(setting, horizon)
        assert best is not None
        return Rival(best, False) if adam is None else Rival(adam, True)

    @functools.cached_property
    def ranked(self) -> list[str]:
        """All optimizers, the strongest first: by mean rank of test loss over settings and horizons."""
        return self._by_rank(self.results.settings())

    def ranked_in(self, setting: str) -> list[str]:
        """All optimizers, the strongest of a setting first."""
        return self._by_rank([setting])

    def _by_rank(self, settings: Sequence[str]) -> list[str]:
        labels = self.results.optimizers()
        cases = [(setting, horizon) for setting in settings for horizon in self.results.horizons()]
        losses = np.array([[nan_as_inf(self.mean(s, label, h)) for label in labels] for s, h in cases])
        # Ties, such as several that diverged, share a rank.
        ranks = (losses[:, None, :] < losses[:, :, None]).sum(2).mean(0)
        return [label for _, label in sorted(zip(ranks.tolist(), labels, strict=True), key=lambda pair: pair[0])]

    def strongest(self, count: int) -> list[str]:
        """The best schedule of each family, and of these the `count` with the best ranks."""
        families: dict[str, str] = {}
        for label in self.ranked:
            if label != L3RS:
                families.setdefault(family(label), label)
        return list(families.values())[:count]

    # All comparisons

    @functools.cached_property
    def tally(self) -> dict[str, int]:
        """Comparisons with the best baseline within the range: how many, with a lower mean, and by outcome."""
        cases = [
            (setting, best, horizon)
            for setting in self.results.settings()
            for horizon in self.inside
            if (best := self.best_baseline(setting, horizon)) is not None
        ]
        outcomes = [self.outcome(*case) for case in cases]
        lower = sum(self.is_lower(*case) for case in cases)
        return {"all": len(cases), "lower": lower} | {
            kind: outcomes.count(kind) for kind in ("better", "worse", "undecided")
        }

    def lower_count(self, setting: str) -> int:
        """At how many horizons L3RS has a lower test loss than the best baseline."""
        best = {h: self.best_baseline(setting, h) for h in self.results.horizons()}
        return sum(self.is_lower(setting, label, h) for h, label in best.items() if label is not None)

    def outcomes_beyond(self, horizon: int) -> dict[Outcome, list[str]]:
        """The settings by outcome at a horizon beyond the range, compared with `rival_beyond`."""
        found: dict[Outcome, list[str]] = {}
        for setting in self.results.settings():
            rival = self.rival_beyond(setting, horizon)
            found.setdefault(self.outcome(setting, rival.label, horizon), []).append(setting)
        return found

    # Speed

    def speedup(self, setting: str, baseline: str, horizon: int) -> Interval | None:
        """F with its interval; None where it is not defined: not computed, or L3RS diverged."""
        found = self._speedups.get((setting, baseline, horizon))
        if found is None or not math.isfinite(self.mean(setting, L3RS, horizon, "accuracy")):
            return None
        value = math.inf if found.steps_ratio is None else found.steps_ratio
        if self.results.seeds() < statistics.FEWEST_SEEDS or (found.low is None and math.isfinite(value)):
            return Interval(value, -math.inf, math.inf)
        low, high = (math.inf if end is None else end for end in (found.low, found.high))
        return Interval(value, low, high)

    @functools.cached_property
    def _speedups(self) -> dict[tuple[str, str, int], Speedup]:
        return {(s.setting, s.baseline, s.horizon): s for s in self.results.speedup}

    def least_speedup(self, setting: str, horizon: int) -> float | None:
        """F over the baseline that is quickest to L3RS's accuracy."""
        found = [self.speedup(setting, label, horizon) for label in self.results.baselines()]
        return min((f.value for f in found if f is not None), default=None)

    @functools.cached_property
    def median_speedup(self) -> float | None:
        """The median of `least_speedup` over all settings and horizons within the range."""
        cases = [(setting, horizon) for setting in self.results.settings() for horizon in self.inside]
        found = [f for case in cases if (f := self.least_speedup(*case)) is not None]
        return plain_statistics.median_low(found) if found else None

    def _steps_to(self, setting: str, optimizer: str, accuracy: float) -> float:
        """The horizon that an optimizer, tuned for each, needs for a mean test accuracy; may be infinite."""
        curve = self.results.accuracy_curve(setting, optimizer).mean(0).tolist()
        return statistics.steps_to_reach(self.results.horizons(), curve, accuracy)

    def to_target(self, setting: str, optimizer: str, horizon: int) -> tuple[float, float]:
        """Steps, and seconds, that an optimizer needs for the best baseline's accuracy at a horizon.

        Without baselines it is the accuracy of L3RS. Steps may be infinite, seconds also NaN if they were not measured.
        """
        target = self.highest_accuracy(setting, horizon, self.results.baselines())
        steps = self.steps_to(setting, optimizer, target)
        return steps, steps * self.seconds_a_step(setting, optimizer)

    @functools.cached_property
    def profile(self) -> dict[str, list[float]]:
        """Performance profile over all (setting, horizon) pairs: a problem is to reach the best baseline's
        mean test accuracy at that horizon; the cost is the number of steps. See `statistics.performance_profile`."""
        results = self.results
        costs: dict[str, list[float]] = {label: [] for label in results.optimizers()}
        for setting in results.settings():
            for horizon in results.horizons():
                reached = [self.mean(setting, label, horizon, "accuracy") for label in results.baselines()]
                target = max((a for a in reached if math.isfinite(a)), default=math.inf)
                for label, row in costs.items():
                    row.append(self.steps_to(setting, label, target))
        return statistics.performance_profile(costs)

    # Costs and tuning

    def seconds_a_step(self, setting: str, optimizer: str) -> float:
        """Measured seconds of one training step, NaN where they were not measured, as in all settings but the first."""
        measured = (cost for cost in self.results.costs if (cost.setting, cost.optimizer) == (setting, optimizer))
        return next((cost.seconds_a_step for cost in measured), math.nan)

    def relative_costs(self) -> list[RelativeCost]:
        """L3RS and one schedule of each family, because schedules cost nothing; empty if nothing was measured."""
        costs = {cost.optimizer: cost for cost in self.results.costs}
        labels = [label for label in [L3RS, *self.strongest(len(costs))] if label in costs]
        units: dict[str, float] = {}
        for cost in costs.values():
            if (name := family(cost.optimizer)) in ("sgd", "sgdm", "adam") and cost.seconds_a_step > 0:
                units.setdefault(name, cost.seconds_a_step)
        units = {name: units[name] for name in ("sgd", "sgdm", "adam") if name in units}
        longest = max((costs[label].seconds_a_step for label in labels), default=math.nan)
        return [
            RelativeCost(
                label,
                costs[label],
                costs[label].seconds_a_step / longest,
                {name: costs[label].seconds_a_step / seconds for name, seconds in units.items()},
            )
            for label in labels
        ]

    def grids(self, setting: str) -> dict[str, dict[int, GridSummary]]:
        """{baseline: {horizon: how its learning rate was tuned}}, the strongest baseline first."""
        grids = self.results.tuning.get(setting) or {}
        smallest = min(
            (tried for of in grids.values() for grid in of.values() if (tried := tried_rates(grid))), default=0
        )

        def summary(grid: dict) -> GridSummary:
            return GridSummary(grid["chosen"], tried_rates(grid), tried_rates(grid) > smallest, grid["at_edge"])

        return {
            label: {int(horizon): summary(grid) for horizon, grid in grids[label].items()}
            for label in self.ranked_in(setting)
            if label in grids
        }


def tried_rates(grid: Mapping[str, Any]) -> int:
    """How many learning rates; none where it was given, for which earlier versions had a grid of one."""
    tried = len(grid["inner_valid_loss"])
    return tried if tried > 1 and grid.get("seeds", 1) else 0


def speedups(records: RecordTable) -> list[Speedup]:
    """Of L3RS over every baseline, from their test accuracies at the evaluated horizons, linear in log steps between
    them; empty without L3RS."""
    if L3RS not in records.optimizers():
        return []
    horizons = records.horizons()
    found = []
    for setting in records.settings():
        ours = records.accuracy_curve(setting, L3RS)
        for baseline in records.baselines():
            theirs = records.accuracy_curve(setting, baseline)
            for at, horizon in enumerate(horizons):
                ratio = statistics.speedup(horizons, ours, theirs, at)
                found.append(Speedup(setting, baseline, horizon, *(x if math.isfinite(x) else None for x in ratio)))
    return found


def _is_adam(label: str) -> bool:
    return family(label) == "adam"
