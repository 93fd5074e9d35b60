"""What follows from the results: who is ahead, by how much, and whether that could be chance."""

from __future__ import annotations

import functools
import math
import statistics as plain_statistics
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from metatrain.evaluation import statistics
from metatrain.evaluation.results import L3RS, Results, Speedup, worst_if_no_number
from metatrain.evaluation.statistics import Interval
from metatrain.report import formatting as words

Outcome = Literal["better", "worse", "undecided"]


class Payback(NamedTuple):
    """What a fine-tuning in one setting saves, and after how many of them meta-training has paid.

    A baseline that never has L3RS's accuracy is counted with the steps of the longest evaluated horizon:
    it needs more, so savings are at least, and fine-tunings at most, what is said.
    """

    setting: str
    steps: int  # of L3RS, the longest horizon of its meta-training
    seconds: float  # of these
    baseline: str  # that has L3RS's accuracy in the least time
    baseline_steps: float  # it needs for that; may be infinite
    saved: float  # seconds a fine-tuning
    fine_tunings: float  # infinite: never, or not known where no baseline has the accuracy
    runs: int  # of the baseline's tuning: grid values × seeds
    saved_tuned: float  # seconds a fine-tuning, when the baseline has to be tuned for it
    fine_tunings_tuned: float

    @property
    def reached(self) -> bool:
        return math.isfinite(self.baseline_steps)


class Findings:
    """Results, and what can be said of them.

    Attributes:
      results: the results.
      low, high: the shortest and longest horizon of meta-training; zero and infinity where the checkpoint does not say.
      inside, beyond: the evaluated horizons in that range, and those longer than it.
      mean: `results.mean`.
      best: `results.best_baseline`, the best one on test.
    """

    def __init__(self, results: Results) -> None:
        self.results = results
        trained = results.meta_training.get("horizon") or {}
        self.range_known = bool(trained)
        self.low, self.high = float(trained.get("min", 0)), float(trained.get("max", math.inf))
        self.inside = [h for h in results.horizons() if self.low <= h <= self.high]
        self.beyond = [h for h in results.horizons() if h > self.high]
        # A page asks for the same numbers in many places.
        self.mean = functools.cache(results.mean)
        self.best = functools.cache(results.best_baseline)
        self.difference = functools.cache(self._difference)

    def interval(self, setting: str, optimizer: str, horizon: int, field: str = "loss") -> Interval:
        """Mean over seeds of a field, and its interval."""
        return statistics.mean_interval(self.results.values(setting, optimizer, horizon, field))

    def _difference(self, setting: str, baseline: str, horizon: int) -> Interval:
        """Test loss of the baseline minus that of L3RS: positive where L3RS is better."""
        value, low, high = self.results.difference(setting, baseline, horizon)
        return Interval(-value, -high, -low)

    def outcome(self, setting: str, baseline: str, horizon: int) -> Outcome:
        """Of L3RS: better or worse only where the paired interval excludes zero, or where L3RS diverged."""
        if not math.isfinite(self.mean(setting, L3RS, horizon)):
            return "worse"
        found = self.difference(setting, baseline, horizon)
        if not found.excludes(0.0):
            return "undecided"
        return "better" if found.value > 0 else "worse"

    def is_lower(self, setting: str, baseline: str, horizon: int) -> bool:
        """Whether the mean test loss of L3RS is lower; one that is no number is infinite."""
        ours, theirs = (worst_if_no_number(self.mean(setting, label, horizon)) for label in (L3RS, baseline))
        return ours < theirs

    def rival_beyond(self, setting: str, horizon: int) -> tuple[str, str]:
        """The best tuned Adam, or the best baseline where Adam was not among them: its label, and which it is."""
        adam = self.results.best_baseline(setting, horizon, lambda label: words.family(label) == "adam")
        if adam is not None:
            return adam, "the best tuned Adam"
        best = self.best(setting, horizon)
        assert best is not None
        return best, "the best baseline"

    def speedup(self, setting: str, baseline: str, horizon: int) -> Interval | None:
        """F with its interval; None where it is not defined: not computed, or L3RS diverged."""
        found = self._speedups.get((setting, baseline, horizon))
        if found is None or not math.isfinite(self.mean(setting, L3RS, horizon, "accuracy")):
            return None
        value = math.inf if found.steps_ratio is None else found.steps_ratio
        if self.results.seeds() < 2 or (found.low is None and math.isfinite(value)):
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
    def ranked(self) -> list[str]:
        """All optimizers, the strongest first: by mean rank of test loss over settings and horizons."""
        return _by_rank(self.results, self.results.optimizers(), self.results.settings())

    def ranked_in(self, setting: str) -> list[str]:
        """All optimizers, the strongest in a setting first."""
        return _by_rank(self.results, self.results.optimizers(), [setting])

    def strongest(self, count: int) -> list[str]:
        """The best schedule of each family, and of these the `count` that are most often ahead."""
        families: dict[str, str] = {}
        for label in self.ranked:
            if label != L3RS:
                families.setdefault(words.family(label), label)
        return list(families.values())[:count]

    def verdict(self) -> list[str]:
        """Sentences: within the range of meta-training, the speed-up, and beyond the range."""
        if not self.results.baselines():
            return ["There is no baseline to compare L3RS with."]
        return [s for s in (self._within(), self._chance(), self._speed(), self._outside()) if s]

    def _pairs(self) -> list[tuple[str, str, int]]:
        """(setting, best baseline, horizon) of all comparisons within the range."""
        return [
            (setting, best, horizon)
            for setting in self.results.settings()
            for horizon in self.inside
            if (best := self.best(setting, horizon)) is not None
        ]

    def tally(self) -> dict[str, int]:
        """How the comparisons within the range came out: all, lower, and by outcome."""
        pairs = self._pairs()
        outcomes = [self.outcome(*pair) for pair in pairs]
        lower = sum(self.is_lower(*pair) for pair in pairs)
        return {"all": len(pairs), "lower": lower} | {
            kind: outcomes.count(kind) for kind in ("better", "worse", "undecided")
        }

    def _within(self) -> str:
        if not self.inside:
            trained = f"{self.low:,.0f} to {self.high:,.0f} steps"
            return f"None of the evaluated horizons is in the range of L3RS's meta-training, {trained}."
        tally = self.tally()
        settings = len(self.results.settings())
        grid = words.counted(len(self.inside), "horizon")
        if settings > 1:
            grid = f"{settings} settings × {grid}"
        if self.range_known:
            where = f"Within the range of its meta-training, {self.low:,.0f} to {self.high:,.0f} steps,"
        else:
            steps = " to ".join(f"{h:,}" for h in dict.fromkeys((self.inside[0], self.inside[-1])))
            where = f"At {steps} steps (the checkpoint does not name its range)"
        return (
            f"{where} L3RS has a lower test loss than the best baseline in {tally['lower']} of "
            f"{words.counted(tally['all'], 'comparison')} ({grid})."
        )

    def _chance(self) -> str:
        if not self.inside:
            return ""
        if self.results.seeds() < 2:
            return "One seed gives no interval, so how much of this is chance cannot be said."
        tally = self.tally()
        return (
            f"By the paired {statistics.LEVEL:.0%} interval it is better in {tally['better']}, worse in "
            f"{tally['worse']} and not distinguishable in {tally['undecided']}.".replace("%", " %")
        )

    def median_speedup(self) -> float | None:
        """Of F over the quickest baseline, over all comparisons within the range."""
        pairs = [(setting, horizon) for setting in self.results.settings() for horizon in self.inside]
        found = [f for pair in pairs if (f := self.least_speedup(*pair)) is not None]
        return plain_statistics.median_low(found) if found else None

    def _speed(self) -> str:
        median = self.median_speedup()
        if median is None:
            return ""
        if math.isinf(median):
            return "The median speed-up in steps is ∞: no baseline has its accuracy within the longest horizon."
        return f"The median speed-up in steps is {words.ratio(median)} over the quickest baseline."

    def _outside(self) -> str:
        """One sentence for all horizons beyond the range: in which settings better, worse, undecided."""
        settings = self.results.settings()
        if not self.beyond:
            return ""
        clauses = []
        for horizon in self.beyond:
            groups: dict[Outcome, list[str]] = {}
            for setting in settings:
                rival, _ = self.rival_beyond(setting, horizon)
                groups.setdefault(self.outcome(setting, rival, horizon), []).append(setting)
            clauses.append(f"at {horizon:,} steps {self._grouped(groups, horizon)}")
        name = self.rival_beyond(settings[0], self.beyond[0])[1]
        return f"Beyond the range, compared with {name}, it is {'; '.join(clauses)}."

    def _grouped(self, groups: dict[Outcome, list[str]], horizon: int) -> str:
        phrases: dict[Outcome, str] = {
            "better": "better", "worse": "worse", "undecided": "not distinguishable",
        }  # fmt: skip
        parts = []
        for outcome, phrase in phrases.items():
            members = groups.get(outcome, [])
            if not members:
                continue
            if len(self.results.settings()) == 1:
                rival, _ = self.rival_beyond(members[0], horizon)
                losses = (words.number(self.mean(members[0], label, horizon)) for label in (L3RS, rival))
                return f"{phrase} ({' against '.join(losses)})"
            everywhere = len(members) == len(self.results.settings())
            parts.append(f"{phrase} in {'all settings' if everywhere else words.listed([*map(words.short, members)])}")
        return words.listed(parts)

    def payback(self) -> list[Payback]:
        """One a setting; empty where steps were not timed or nothing is known of the meta-training."""
        spent = self.results.meta_training.get("seconds")
        if not spent or not self.inside:
            return []
        found = [self._payback(setting, float(spent)) for setting in self.results.settings()]
        return [p for p in found if p is not None]

    def _payback(self, setting: str, spent: float) -> Payback | None:
        results, horizon = self.results, self.inside[-1]
        own_seconds = results.seconds_a_step(L3RS) * horizon
        target = self.mean(setting, L3RS, horizon, "accuracy")
        timed = {label: results.seconds_a_step(label) for label in results.baselines()}
        needs = {
            label: (results.steps_to(setting, label, target), seconds)
            for label, seconds in timed.items()
            if math.isfinite(seconds)
        }
        if not needs or not math.isfinite(own_seconds) or not math.isfinite(target):
            return None
        longest = results.horizons()[-1]
        # Where none gets there, the cheapest one at the longest horizon is the lower bound.
        best = min(needs, key=lambda label: (needs[label][0] * needs[label][1], longest * needs[label][1]))
        steps, seconds = needs[best]
        spent_there = min(steps, longest) * seconds
        runs = self._tuning_runs(setting, best, steps)
        saved = spent_there - own_seconds
        saved_tuned = runs * spent_there + saved
        return Payback(
            setting=setting,
            steps=horizon,
            seconds=own_seconds,
            baseline=best,
            baseline_steps=steps,
            saved=saved,
            fine_tunings=_times(spent, saved),
            runs=runs,
            saved_tuned=saved_tuned,
            fine_tunings_tuned=_times(spent, saved_tuned),
        )

    def _tuning_runs(self, setting: str, baseline: str, steps: float) -> int:
        """Grid values × seeds at the evaluated horizon nearest to `steps`."""
        grids = self.results.tuning.get(setting, {}).get(baseline, {})
        if not grids:
            return 0
        nearest = min(grids, key=lambda h: abs(math.log(int(h) / min(steps, self.results.horizons()[-1]))))
        return len(grids[nearest]["inner_valid_loss"]) * int(grids[nearest].get("seeds", 1))


def _times(spent: float, saved: float) -> float:
    return float(math.ceil(spent / saved)) if saved > 0 else math.inf


def _by_rank(results: Results, labels: Sequence[str], settings: Sequence[str]) -> list[str]:
    places = [(setting, horizon) for setting in settings for horizon in results.horizons()]
    losses = np.array([[worst_if_no_number(results.mean(s, label, h)) for label in labels] for s, h in places])
    # Ties, such as several that diverged, share a rank.
    ranks = (losses[:, None, :] < losses[:, :, None]).sum(2).mean(0)
    return [label for _, label in sorted(zip(ranks.tolist(), labels, strict=True), key=lambda pair: pair[0])]
