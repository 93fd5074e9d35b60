"""Out of the box on many settings: L3RS without any tuning against tuned baselines, and the scale of its steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from metatrain.evaluation.analysis import Analysis, Outcome
from metatrain.evaluation.baselines import parse_entry
from metatrain.evaluation.records import L3RS, MultiplierGrid, family, nan_as_inf

UNTUNED_RATE = 1e-3  # AdamW's usual learning rate, the rival of people who tune nothing

_CLOSE = 1.05  # times the best baseline's loss
_RIGHT_SCALE = (0.5, 2.0)  # step multipliers that show a right scale


class Rival(NamedTuple):
    """A baseline's mean test loss beside that of L3RS."""

    label: str
    loss: float
    outcome: Outcome  # of L3RS against it


class ZooRow(NamedTuple):
    """L3RS in one setting at one horizon; a rival is None where it was not among the baselines."""

    setting: str
    horizon: int
    loss: float  # of L3RS, mean over seeds
    start: float  # test loss before the first step; NaN where it is not known
    diverged: bool  # whether the loss of any seed is NaN or infinite
    untuned: Rival | None  # AdamW at `UNTUNED_RATE`, constant
    adamw: Rival | None  # tuned, the better of its schedules
    sgdm: Rival | None  # likewise
    best: Rival | None  # of all tuned baselines
    multiplier: MultiplierGrid | None

    @property
    def relative(self) -> float:
        """The loss over that of the best tuned baseline, minus 1; NaN without one."""
        if self.best is None or not self.best.loss > 0:
            return math.nan
        return self.loss / self.best.loss - 1


class Count(NamedTuple):
    """How many of the rows that can tell have a property."""

    met: int
    of: int


class ZooSummary(NamedTuple):
    """Counts over rows (settings × horizons)."""

    not_above_adamw: Count  # L3RS's loss is at most that of tuned AdamW
    ahead_of_all: Count  # below the best tuned baseline
    close_to_best: Count  # at most 5 % above it
    right_scale: Count  # the best step multiplier is between 0.5 and 2
    diverged: Count  # the loss of a seed is NaN or infinite
    above_start: Count  # the loss is higher than before the first step
    worse_than_untuned: Count  # by the paired 95 % interval, against AdamW at 1e-3
    settings_worse_than_untuned: Count  # settings with such a row


def zoo_rows(analysis: Analysis) -> list[ZooRow]:
    """A row per setting and horizon; empty unless AdamW at `UNTUNED_RATE` or step multipliers were evaluated."""
    results = analysis.results
    if L3RS not in results.optimizers():
        return []
    labels = _Labels(analysis)
    if not labels.untuned and not results.multipliers:
        return []
    multipliers = {(grid.setting, grid.horizon): grid for grid in results.multipliers}
    starts = {(c.setting, c.horizon): c.loss[0] for c in results.curves if c.optimizer == L3RS and c.steps[0] == 0}
    rows = []
    for setting in results.settings():
        for horizon in results.horizons():
            start = starts.get((setting, horizon))

            def best_of(among: Sequence[str], setting: str = setting, horizon: int = horizon) -> Rival | None:
                return _rival(analysis, setting, horizon, among)

            losses = results.values(setting, L3RS, horizon)
            rows.append(
                ZooRow(
                    setting,
                    horizon,
                    analysis.mean(setting, L3RS, horizon),
                    math.nan if start is None else start,
                    not all(map(math.isfinite, losses)),
                    best_of(labels.untuned),
                    best_of(labels.tuned("adamw")),
                    best_of(labels.tuned("sgdm")),
                    best_of(labels.tuned()),
                    multipliers.get((setting, horizon)),
                )
            )
    return rows


class _Labels:
    """The baselines' labels by what they are, read off the configuration of the evaluation."""

    def __init__(self, analysis: Analysis) -> None:
        entries = [e for e in analysis.results.config.get("evaluation", {}).get("baselines", ()) if e != "all"]
        parsed = [parse_entry(entry) for entry in entries]
        self._names = {entry.label: entry.name for entry in parsed}
        self._given = {e.label: e.options["learning_rate"] for e in parsed if "learning_rate" in e.options}
        self._labels = analysis.results.baselines()

    def tuned(self, name: str | None = None) -> list[str]:
        """All baselines that were tuned, or those of one name."""
        tuned = [label for label in self._labels if family(label) not in self._given]
        return [label for label in tuned if name is None or self._names.get(family(label), family(label)) == name]

    @property
    def untuned(self) -> list[str]:
        """AdamW at `UNTUNED_RATE`, with its constant schedule."""
        return [
            label
            for label in self._labels
            if self._names.get(family(label)) == "adamw"
            and self._given.get(family(label)) == UNTUNED_RATE
            and label.endswith("/constant")
        ]


def _rival(analysis: Analysis, setting: str, horizon: int, among: Sequence[str]) -> Rival | None:
    """The one with the lowest mean test loss, which is chosen on test, in its favour."""
    label = min(among, key=lambda each: nan_as_inf(analysis.mean(setting, each, horizon)), default=None)
    if label is None:
        return None
    return Rival(label, analysis.mean(setting, label, horizon), analysis.outcome(setting, label, horizon))


def summarize(rows: Sequence[ZooRow]) -> ZooSummary:
    """Counts over rows. A loss of NaN counts as infinite."""

    def against(rival: Callable[[ZooRow], Rival | None], factor: float, strict: bool) -> Count:
        pairs = [(nan_as_inf(row.loss), nan_as_inf(found.loss)) for row in rows if (found := rival(row)) is not None]
        met = [
            math.isfinite(ours) and (ours < factor * theirs if strict else ours <= factor * theirs)
            for ours, theirs in pairs
        ]
        return Count(sum(met), len(met))

    low, high = _RIGHT_SCALE
    scales = [row.multiplier.best for row in rows if row.multiplier is not None]
    untuned = [row for row in rows if row.untuned is not None]
    worse = [row for row in untuned if row.untuned is not None and row.untuned.outcome == "worse"]
    started = [row for row in rows if math.isfinite(row.start)]
    return ZooSummary(
        not_above_adamw=against(lambda row: row.adamw, 1.0, strict=False),
        ahead_of_all=against(lambda row: row.best, 1.0, strict=True),
        close_to_best=against(lambda row: row.best, _CLOSE, strict=False),
        right_scale=Count(sum(low <= scale <= high for scale in scales), len(scales)),
        diverged=Count(sum(row.diverged for row in rows), len(rows)),
        above_start=Count(sum(nan_as_inf(row.loss) > row.start for row in started), len(started)),
        worse_than_untuned=Count(len(worse), len(untuned)),
        settings_worse_than_untuned=Count(len({row.setting for row in worse}), len({row.setting for row in untuned})),
    )
