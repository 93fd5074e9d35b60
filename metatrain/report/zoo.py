"""The tables of an evaluation over many settings: L3RS out of the box, and the scale of its steps."""

from __future__ import annotations

import math

from metatrain.evaluation.analysis import Analysis
from metatrain.evaluation.records import MultiplierGrid
from metatrain.evaluation.zoo import UNTUNED_RATE, Count, Rival, ZooRow, ZooSummary, summarize, zoo_rows
from metatrain.report import formatting
from metatrain.report.tables import Cell, Grid, Row, setting_row

_PROPERTIES = {
    "not_above_adamw": "loss at most that of tuned AdamW",
    "ahead_of_all": "loss below the best of all tuned baselines",
    "close_to_best": "loss at most 5 % above the best of all tuned baselines",
    "right_scale": "best step multiplier between 0.5 and 2",
    "diverged": "diverged: a seed's loss is NaN or infinite",
    "above_start": "loss above that before the first step",
    "worse_than_untuned": f"worse than AdamW at {UNTUNED_RATE:g} by the paired 95 % interval",
    "settings_worse_than_untuned": "settings with such a horizon",
}


def zoo(analysis: Analysis) -> tuple[Grid, Grid] | None:
    """The summary, and a row per setting and horizon; None where there is nothing to show, see `zoo_rows`."""
    rows = zoo_rows(analysis)
    if not rows:
        return None
    return _summary(analysis, rows), _cases(analysis, rows)


def _summary(analysis: Analysis, rows: list[ZooRow]) -> Grid:
    scopes = {"all": rows}
    if analysis.beyond:
        scopes["within the range"] = [row for row in rows if row.horizon in analysis.inside]
        scopes["beyond the range"] = [row for row in rows if row.horizon in analysis.beyond]
    summaries = [summarize(members) for members in scopes.values()]
    return Grid(
        "L3RS out of the box: settings × horizons",
        "property",
        [Cell(scope) for scope in scopes],
        [_property_row(field, summaries) for field in ZooSummary._fields],
    )


def _property_row(field: str, summaries: list[ZooSummary]) -> Row:
    def cell(count: Count) -> Cell:
        if not count.of:
            return Cell(formatting.MISSING)
        return Cell(formatting.percent(count.met / count.of, 0), f"{count.met:,} of {count.of:,}")

    return Row(_PROPERTIES[field], [cell(getattr(summary, field)) for summary in summaries])


def _cases(analysis: Analysis, rows: list[ZooRow]) -> Grid:
    heads = [
        "steps",
        "L3RS",
        "best multiplier",
        f"AdamW {UNTUNED_RATE:g}",
        "AdamW tuned",
        "SGDM tuned",
        "best tuned baseline",
        "L3RS against it",
    ]
    shown = [setting_row(row.setting, _case(analysis, row)) for row in rows]
    return Grid("Test loss, mean over seeds", "setting", [Cell(head) for head in heads], shown)


def _case(analysis: Analysis, row: ZooRow) -> list[Cell]:
    against = Cell(formatting.MISSING)
    if row.best is not None:
        kind = "" if row.best.outcome == "undecided" else row.best.outcome
        against = Cell(formatting.percent_change(row.relative), kind=kind)
    return [
        Cell(f"{row.horizon:,}", "beyond" if row.horizon in analysis.beyond else ""),
        Cell(formatting.number(row.loss), "diverged" if row.diverged else "", "ours"),
        _multiplier(row.multiplier),
        *(_rival(rival, with_label) for rival, with_label in (
            (row.untuned, False), (row.adamw, True), (row.sgdm, True), (row.best, True)
        )),
        against,
    ]  # fmt: skip


def _multiplier(grid: MultiplierGrid | None) -> Cell:
    if grid is None:
        return Cell(formatting.MISSING)
    return Cell(f"{formatting.tick(grid.best)}×", formatting.number(grid.loss))


def _rival(rival: Rival | None, with_label: bool) -> Cell:
    if rival is None or math.isnan(rival.loss):
        return Cell(formatting.MISSING)
    mark = {"undecided": "≈", "worse": "↓"}.get(rival.outcome, "")
    return Cell(formatting.number(rival.loss), rival.label if with_label else "", mark=mark)
