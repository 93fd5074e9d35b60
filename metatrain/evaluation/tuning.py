"""Tuning: a baseline's learning rate for one horizon, by grid search on inner_valid."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from metatrain.evaluation.baselines import Baseline, Interleaved, Tuned
from metatrain.evaluation.runner import Runner

PER_CALL = 4  # hyper-parameters that run in one compiled call

_GRID = 12  # learning rates, a factor 2 apart, around the baseline's own
_GROW = 4  # learning rates added where the best one is at the edge
_GROWTHS = 3  # at most


def search(
    run: Runner, baseline: Baseline | Interleaved, schedule: str, horizon: int, tuning_seeds: int
) -> dict[str, Any]:
    """Search the learning rate with the lowest mean inner_valid loss over the first `tuning_seeds` samples.

    A grid whose best value is at its edge grows outwards. A baseline whose learning rate was given is not run: it has
    that one value as its grid. The test split is not read.

    Returns:
      learning_rate: the grid, increasing; inner_valid_loss: of each; seeds; chosen: the best learning rate;
      at_edge: whether it still is at the edge of the grid.
    """
    start = baseline.learning_rate
    if not baseline.tuned:
        return {
            "learning_rate": [start],
            "inner_valid_loss": [None],
            "seeds": 0,
            "chosen": start,
            "at_edge": False,
        }
    losses: dict[float, float] = {}
    exponents = list(range(-(_GRID // 2), _GRID - _GRID // 2))
    for growth in range(_GROWTHS + 1):
        for first in range(0, len(exponents), PER_CALL):
            rates = [start * 2.0**k for k in exponents[first : first + PER_CALL]]
            scores, _ = run(Tuned.grid(rates, schedule), horizon, "inner_valid", tuning_seeds)
            losses |= {rate: mean_or_inf(loss) for rate, loss in zip(rates, scores.loss, strict=True)}
        ordered = sorted(losses)
        best = min(ordered, key=lambda rate: losses[rate])
        if growth == _GROWTHS or best not in (ordered[0], ordered[-1]):
            break
        edge = round(math.log2(best / start))
        outwards = -1 if best == ordered[0] else 1
        exponents = [edge + outwards * k for k in range(1, _GROW + 1)]
    return {
        "learning_rate": ordered,
        "inner_valid_loss": [losses[rate] for rate in ordered],
        "seeds": tuning_seeds,
        "chosen": best,
        "at_edge": best in (ordered[0], ordered[-1]),
    }


def mean_or_inf(losses: np.ndarray) -> float:
    """Mean over seeds, infinite where one of them is NaN or infinite."""
    mean = float(np.mean(losses))
    return mean if math.isfinite(mean) else math.inf


def edge_notes(tuning: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[str]:
    """A sentence for each grid that has its best value at the edge although it grew as far as it may."""
    return [
        f"{setting}: {label} has its best learning rate for {horizon} steps, {grid['chosen']:.3g}, at the edge of "
        f"a grid of {len(grid['learning_rate'])}"
        for setting, labels in tuning.items()
        for label, horizons in labels.items()
        for horizon, grid in horizons.items()
        if grid["at_edge"]
    ]
