"""The tables of an evaluation's page: numbers of the analysis, formatted as cells."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from metatrain.evaluation.analysis import Analysis
from metatrain.evaluation.payback import Payback
from metatrain.evaluation.records import L3RS, family
from metatrain.report import formatting

_SHOWN = 8  # baselines in the visible table of a setting
_MARKS = {"better": "▼", "worse": "▲", "undecided": "≈"}


class Cell(NamedTuple):
    text: str
    small: str = ""  # below the text; of a bar, its length in percent
    kind: str = ""  # classes of style.css
    mark: str = ""  # after the text


class Row(NamedTuple):
    name: str
    cells: list[Cell]
    kind: str = ""
    rest: str = ""  # of the name, left out where there is little room


class Grid(NamedTuple):
    """A table, mostly with a row per optimizer and a column per horizon."""

    caption: str
    corner: str
    columns: list[Cell]
    rows: list[Row]


class Section(NamedTuple):
    """The tables of a setting."""

    title: str
    main: Grid
    hidden: str  # how many baselines only the long tables have; empty if none
    more: list[Grid]


def setting_row(setting: str, cells: list[Cell]) -> Row:
    """A row whose name is a setting: its prefix, such as `A`, and the rest."""
    short, colon, rest = (setting or "the task").partition(": ")
    return Row(short, cells, rest=colon + rest)


def horizon_heads(analysis: Analysis) -> list[Cell]:
    """A column head per horizon."""
    return [Cell(f"{h:,}", kind="beyond" if h in analysis.beyond else "") for h in analysis.results.horizons()]


def glance(analysis: Analysis) -> Grid | None:
    """L3RS against the best baseline: settings × horizons; None without baselines."""
    rows = []
    for setting in analysis.results.settings():
        cells = []
        for horizon in analysis.results.horizons():
            best = analysis.best_baseline(setting, horizon)
            if best is None:
                return None
            outcome = analysis.outcome(setting, best, horizon)
            change = formatting.percent_change(analysis.relative_difference(setting, best, horizon))
            cells.append(Cell(f"{_MARKS[outcome]} {change}", best, outcome))
        rows.append(setting_row(setting, cells))
    return Grid("Test loss of L3RS relative to the best baseline", "setting", horizon_heads(analysis), rows)


def section(analysis: Analysis, setting: str) -> Section:
    """The main table of a setting, with the strongest baselines, and the long ones, with all of them."""
    ranked = analysis.ranked_in(setting)
    theirs = [label for label in ranked if label != L3RS]
    top = set(theirs[:_SHOWN])
    shown = [label for label in ranked if label == L3RS or label in top]
    cells = _SettingCells(analysis, setting)
    # Differences, speed-ups and win rates have no row for L3RS itself.
    more: list[tuple[str, Sequence[str], Callable[[str, int], Cell]]] = [
        ("Test loss, mean and 95 % interval", ranked, cells.loss),
        ("Test accuracy, mean and 95 % interval", ranked, cells.accuracy),
        (
            "Test loss of L3RS minus the baseline’s (negative: L3RS is better), paired 95 % interval, and the share of "
            "seeds that L3RS wins",
            theirs,
            cells.difference,
        ),
        ("Speed-up F: the baseline’s steps over L3RS’s, for its accuracy", theirs, cells.speedup),
        ("Steps, and time, to the best baseline’s accuracy at each horizon", ranked, cells.steps_to_target),
        ("Mean test loss along the run (area under the curve over its steps)", ranked, cells.area),
    ]
    if not analysis.results.speedup:
        more = [table for table in more if table[2] != cells.speedup]
    hidden = len(theirs) - len(top)
    return Section(
        setting or "The task",
        _by_horizon(analysis, "Test loss, and accuracy below it", shown, cells.main),
        f"{formatting.counted(hidden, 'weaker baseline')} in the tables below." if hidden else "",
        [_by_horizon(analysis, *table) for table in more if table[1]],
    )


def _by_horizon(analysis: Analysis, caption: str, labels: Sequence[str], cell: Callable[[str, int], Cell]) -> Grid:
    rows = [
        Row(
            formatting.optimizer(label),
            [cell(label, h) for h in analysis.results.horizons()],
            "ours" if label == L3RS else "",
        )
        for label in labels
    ]
    return Grid(caption, "optimizer", horizon_heads(analysis), rows)


class _SettingCells:
    """Cells of one setting's tables, each a function of an optimizer and a horizon."""

    def __init__(self, analysis: Analysis, setting: str) -> None:
        self._analysis = analysis
        self._setting = setting

    def _outcome(self, label: str, horizon: int) -> str:
        return "" if label == L3RS else self._analysis.outcome(self._setting, label, horizon)

    def main(self, label: str, horizon: int) -> Cell:
        loss = self._analysis.mean(self._setting, label, horizon)
        accuracy = formatting.percent(self._analysis.mean(self._setting, label, horizon, "accuracy"))
        mark = {"undecided": "≈", "worse": "↓"}.get(self._outcome(label, horizon), "")
        return Cell(formatting.number(loss), accuracy, self._best(loss, horizon), mark)

    def _best(self, loss: float, horizon: int) -> str:
        return "best" if loss == self._analysis.lowest_loss(self._setting, horizon) else ""

    def loss(self, label: str, horizon: int) -> Cell:
        found = self._analysis.interval(self._setting, label, horizon)
        return Cell(formatting.number(found.value), formatting.bounds(found), self._best(found.value, horizon))

    def accuracy(self, label: str, horizon: int) -> Cell:
        found = self._analysis.interval(self._setting, label, horizon, "accuracy")
        best = "best" if found.value == self._analysis.highest_accuracy(self._setting, horizon) else ""
        return Cell(formatting.percent(found.value), formatting.bounds(found, "percent"), best)

    def difference(self, label: str, horizon: int) -> Cell:
        found = self._analysis.difference(self._setting, label, horizon)
        wins = formatting.percent(self._analysis.win_rate(self._setting, label, horizon), 0)
        small = " · ".join(filter(None, [formatting.bounds(found, "signed"), f"{wins} won"]))
        return Cell(formatting.signed(found.value), small, self._outcome(label, horizon))

    def speedup(self, label: str, horizon: int) -> Cell:
        found = self._analysis.speedup(self._setting, label, horizon)
        if found is None:
            return Cell(formatting.MISSING)
        return Cell(formatting.ratio(found.value), formatting.bounds(found, "ratio"))

    def steps_to_target(self, label: str, horizon: int) -> Cell:
        steps, seconds = self._analysis.to_target(self._setting, label, horizon)
        text = formatting.number(round(steps, 1)) if math.isfinite(steps) else "∞"
        return Cell(text, formatting.duration(seconds) if math.isfinite(seconds) else "")

    def area(self, label: str, horizon: int) -> Cell:
        return Cell(formatting.number(self._analysis.mean(self._setting, label, horizon, "auc")))


def costs(analysis: Analysis) -> Grid | None:
    """Time and memory of a step; None where they were not measured."""
    found = analysis.relative_costs()
    if not found:
        return None
    rows = []
    for each in found:
        cells = [Cell(formatting.duration(each.cost.seconds_a_step), f"{100 * each.share:.0f}", "bar")]
        cells += [Cell(f"{ratio:.2f}×") for ratio in each.ratios.values()]
        cells.append(Cell(f"{each.cost.state_floats_a_parameter:.2f}"))
        name = formatting.optimizer(family(each.optimizer))
        rows.append(Row(name, cells, "ours" if each.optimizer == L3RS else ""))
    heads = ["time a step", *(f"÷ {name}" for name in found[0].ratios), "state, floats a parameter"]
    return Grid("Cost of a training step", "optimizer", [Cell(head) for head in heads], rows)


def payback_row(payback: Payback) -> Row:
    """Of the table of fine-tunings until meta-training has paid for itself."""
    steps = f"{payback.baseline_steps:,.0f} steps" if payback.reached else "never: ∞ steps"

    def saving(seconds: float) -> str:
        if seconds > 0:
            return f"{'' if payback.reached else 'at least '}{formatting.duration(seconds)}"
        return f"none ({formatting.duration(-seconds)} more)" if payback.reached else "not known"

    tuned = Cell(formatting.MISSING)
    if payback.runs:
        runs = formatting.counted(payback.runs, "run")
        tuned = Cell(fine_tunings(payback, payback.fine_tunings_tuned), f"{saving(payback.saved_tuned)}, {runs}")
    return Row(
        formatting.short(payback.setting),
        [
            Cell(f"{payback.steps:,} steps", formatting.duration(payback.seconds)),
            Cell(steps, payback.baseline),
            Cell(fine_tunings(payback, payback.fine_tunings), saving(payback.saved)),
            tuned,
        ],
    )


def fine_tunings(payback: Payback, count: float) -> str:
    """A number of fine-tunings, an upper bound where no baseline reaches L3RS's accuracy."""
    if math.isinf(count):
        return "never" if payback.reached else "not known"
    return f"{'' if payback.reached else '≤ '}{count:,.0f}"


def tuning(analysis: Analysis, setting: str) -> Grid | None:
    """The chosen learning rates, and how many values were tried; None where nothing was tuned."""
    grids = analysis.grids(setting)
    if not grids:
        return None

    def cell(label: str, horizon: int) -> Cell:
        if (grid := grids[label].get(horizon)) is None:
            return Cell(formatting.MISSING)
        small = f"{grid.tried} tried" if grid.tried else "given"
        small += f"{', grown' if grid.grown else ''}{', at the edge' if grid.at_edge else ''}"
        return Cell(formatting.number(grid.chosen), small, "worse" if grid.at_edge else "")

    return _by_horizon(analysis, f"{setting or 'The task'}: chosen learning rates", list(grids), cell)
