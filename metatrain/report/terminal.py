"""The comparison as a table for a terminal."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from metatrain.evaluation.analysis import Analysis
from metatrain.evaluation.records import L3RS
from metatrain.report import formatting
from metatrain.report.tables import Cell, Grid
from metatrain.report.zoo import zoo


def table(analysis: Analysis, setting: str) -> Table:
    """Mean test loss and accuracy of each optimizer at each horizon, the strongest first; the best of a
    column is bold, and ≈ marks what is not distinguishable from L3RS."""
    results = analysis.results
    seeds = formatting.counted(results.seeds(), "seed")
    view = Table(title=f"{setting or 'test'}: test loss (accuracy), mean of {seeds}")
    compared = L3RS in results.optimizers()
    view.add_column("optimizer", no_wrap=True)
    for horizon in results.horizons():
        view.add_column(formatting.counted(horizon, "step"), justify="right", no_wrap=True)
    for optimizer in analysis.ranked_in(setting):
        cells = []
        for horizon in results.horizons():
            loss, accuracy = (analysis.mean(setting, optimizer, horizon, field) for field in ("loss", "accuracy"))
            cell = f"{formatting.number(loss)} ({formatting.percent(accuracy)})"
            if compared and optimizer != L3RS and analysis.outcome(setting, optimizer, horizon) == "undecided":
                cell = f"≈ {cell}"
                view.caption = (
                    "≈ not distinguishable from L3RS: the paired 95 % interval of the difference contains zero"
                )
            cells.append(Text(cell, "bold" if loss == analysis.lowest_loss(setting, horizon) else ""))
        view.add_row(formatting.optimizer(optimizer), *cells, style="cyan" if optimizer == L3RS else None)
    return view


def zoo_tables(analysis: Analysis) -> list[Table]:
    """L3RS out of the box over many settings: the summary and all cases; empty where there is nothing to show."""
    return [_grid_table(grid) for grid in zoo(analysis) or ()]


def _grid_table(grid: Grid) -> Table:
    view = Table(title=grid.caption)
    view.add_column(grid.corner)
    for head in grid.columns:
        view.add_column(head.text, justify="right")
    for row in grid.rows:
        view.add_row(row.name + row.rest, *map(_cell_text, row.cells))
    return view


def _cell_text(cell: Cell) -> str:
    return f"{cell.text}{cell.mark}" + (f" ({cell.small})" if cell.small else "")
