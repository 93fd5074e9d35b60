"""Payback: after how many fine-tunings meta-training has saved the time that it took."""

from __future__ import annotations

import math
from typing import NamedTuple

from metatrain.evaluation.analysis import Analysis, tried_rates
from metatrain.evaluation.records import L3RS


class Payback(NamedTuple):
    """The time that a fine-tuning saves in one setting, and after how many of them meta-training has paid for itself.

    A baseline that never reaches L3RS's accuracy is counted with the steps of the longest evaluated horizon.
    Because it needs more than that, the savings are a lower bound and the fine-tunings an upper bound.
    """

    setting: str
    steps: int  # of L3RS: the longest evaluated horizon of its meta-training
    seconds: float  # of these steps
    baseline: str  # the one that reaches L3RS's accuracy in the least time
    baseline_steps: float  # it needs for that; may be infinite
    saved: float  # seconds per fine-tuning
    fine_tunings: float  # infinite: never, or not known where no baseline reaches the accuracy
    runs: int  # of the baseline's tuning: grid values × seeds
    saved_tuned: float  # seconds per fine-tuning, when the baseline has to be tuned for each
    fine_tunings_tuned: float

    @property
    def reached(self) -> bool:
        """Whether a baseline reaches L3RS's accuracy."""
        return math.isfinite(self.baseline_steps)


def paybacks(analysis: Analysis) -> list[Payback]:
    """One per setting whose steps were timed; empty where the time of meta-training is not known."""
    spent = analysis.results.meta_training.get("seconds")
    if not spent or not analysis.inside:
        return []
    found = [_payback(analysis, setting, float(spent)) for setting in analysis.results.settings()]
    return [payback for payback in found if payback is not None]


def _payback(analysis: Analysis, setting: str, spent: float) -> Payback | None:
    results, horizon = analysis.results, analysis.inside[-1]
    own_seconds = analysis.seconds_a_step(setting, L3RS) * horizon
    target = analysis.mean(setting, L3RS, horizon, "accuracy")
    timed = {label: analysis.seconds_a_step(setting, label) for label in results.baselines()}
    needs = {
        label: (analysis.steps_to(setting, label, target), seconds)
        for label, seconds in timed.items()
        if math.isfinite(seconds)
    }
    if not needs or not math.isfinite(own_seconds) or not math.isfinite(target):
        return None
    longest = results.horizons()[-1]
    # Where none reaches the accuracy, the cheapest one at the longest horizon is the lower bound.
    best = min(needs, key=lambda label: (needs[label][0] * needs[label][1], longest * needs[label][1]))
    steps, seconds = needs[best]
    baseline_seconds = min(steps, longest) * seconds
    runs = _tuning_runs(analysis, setting, best, steps)
    saved = baseline_seconds - own_seconds
    saved_tuned = runs * baseline_seconds + saved
    return Payback(
        setting=setting,
        steps=horizon,
        seconds=own_seconds,
        baseline=best,
        baseline_steps=steps,
        saved=saved,
        fine_tunings=_fine_tunings(spent, saved),
        runs=runs,
        saved_tuned=saved_tuned,
        fine_tunings_tuned=_fine_tunings(spent, saved_tuned),
    )


def _tuning_runs(analysis: Analysis, setting: str, baseline: str, steps: float) -> int:
    """Grid values × seeds at the evaluated horizon nearest to `steps`."""
    results = analysis.results
    grids = results.tuning.get(setting, {}).get(baseline, {})
    if not grids:
        return 0
    nearest = min(grids, key=lambda h: abs(math.log(int(h) / min(steps, results.horizons()[-1]))))
    return tried_rates(grids[nearest]) * int(grids[nearest].get("seeds", 1))


def _fine_tunings(spent: float, saved: float) -> float:
    return float(math.ceil(spent / saved)) if saved > 0 else math.inf
