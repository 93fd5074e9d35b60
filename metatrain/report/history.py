"""The history of a run: the columns of its `metrics.jsonl`."""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from metatrain.outer.metrics import COUNTS, read_metrics, seconds_left

WINDOW = 31  # generations of the running median

_RECENT = 50  # generations that are compared with the first ones, and that give the rate
_BANDS = 3  # of horizons
_COLUMNS = (
    "generation",
    "horizon",
    "meta_loss_mean",
    "meta_loss_best",
    "theta_norm",
    "candidate_steps_per_s",
    "seconds",
    "compiled",
    "workers",
    *COUNTS,
)


class Band(NamedTuple):
    """Generations whose horizons are alike."""

    shortest: int
    longest: int
    members: np.ndarray  # bool [G]


class Lowest(NamedTuple):
    """The lowest meta-loss of a candidate."""

    loss: float
    generation: int
    horizon: int


@dataclasses.dataclass(frozen=True)
class History:
    """The columns of `metrics.jsonl`, each float [G]; NaN where a line has no number."""

    columns: dict[str, np.ndarray]

    @classmethod
    def read(cls, file: Path) -> History:
        """Read the whole lines of a file, which may be missing; the last line may be half written."""
        lines = read_metrics(file)
        return cls({name: np.array([_number(line.get(name)) for line in lines]) for name in _COLUMNS})

    def __getitem__(self, name: str) -> np.ndarray:
        return self.columns[name]

    @property
    def done(self) -> int:
        """Generations that are done."""
        generations = self["generation"]
        return int(generations[-1]) + 1 if len(generations) else 0

    @property
    def seconds_spent(self) -> float:
        """The time of all generations."""
        return float(np.nansum(self["seconds"]))

    def seconds_left(self, total: int) -> float | None:
        """The time that the remaining generations of `total` will take; None as long as each one has compiled."""
        return seconds_left(zip(self["seconds"], self["compiled"] == 1, strict=True), total - self.done)

    @property
    def lowest(self) -> Lowest | None:
        """The lowest meta-loss so far; None without a finite one."""
        best = self["meta_loss_best"]
        if not np.isfinite(best).any():
            return None
        at = int(np.nanargmin(best))
        return Lowest(float(best[at]), int(self["generation"][at]), int(self["horizon"][at]))

    @property
    def trend(self) -> tuple[float, float, int] | None:
        """Median meta-loss of the first and of the last N generations, and N; None without finite ones."""
        mean = self["meta_loss_mean"]
        span = min(_RECENT, len(mean) // 2)
        if not span or not (np.isfinite(mean[:span]).any() and np.isfinite(mean[-span:]).any()):
            return None
        return float(np.nanmedian(mean[:span])), float(np.nanmedian(mean[-span:])), span

    @property
    def rate(self) -> float | None:
        """Recent candidate-steps per second; None where they are not known."""
        rate = self["candidate_steps_per_s"][-_RECENT:]
        return float(np.nanmedian(rate)) if np.isfinite(rate).any() else None

    @property
    def lost(self) -> int:
        """Generations in which no candidate had a finite loss."""
        return int((~np.isfinite(self["meta_loss_mean"])).sum())

    def count(self, name: str) -> float | None:
        """How often something of `metatrain.outer.metrics.COUNTS` has happened; None where it is not counted."""
        values = self[name][np.isfinite(self[name])]
        return float(values[-1]) if len(values) else None

    def bands(self) -> list[Band]:
        """The generations by horizon, in at most three groups of about equal size."""
        horizons = self["horizon"]
        known = horizons[np.isfinite(horizons)]
        if not len(known):
            return []
        edges = np.unique(np.quantile(known, np.linspace(0, 1, _BANDS + 1), method="nearest"))
        if len(edges) == 1:
            return [Band(int(edges[0]), int(edges[0]), horizons == edges[0])]
        found = []
        for low, high in itertools.pairwise(edges):
            members = (horizons >= low) & ((horizons < high) | (high == edges[-1]))
            if members.any():
                found.append(Band(int(horizons[members].min()), int(horizons[members].max()), members))
        return found


def running_median(values: np.ndarray, window: int) -> np.ndarray:
    """The median of each value and its neighbours, `window` in all; NaN and infinities are left out."""
    if not len(values):
        return values
    half = window // 2
    padded = np.pad(values, half, constant_values=math.nan)
    around = np.lib.stride_tricks.sliding_window_view(padded, 2 * half + 1)
    empty = ~np.isfinite(around).any(1)
    found = np.full(len(values), math.nan)
    found[~empty] = np.nanmedian(np.where(np.isfinite(around[~empty]), around[~empty], math.nan), 1)
    return found


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan
