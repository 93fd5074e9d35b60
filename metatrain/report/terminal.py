"""The comparison as a table for a terminal."""

from __future__ import annotations

import math

from rich.table import Table
from rich.text import Text

from metatrain.evaluation.analysis import Findings
from metatrain.evaluation.results import L3RS, Results
from metatrain.report import formatting as words


def table(results: Results, setting: str) -> Table:
    """Mean test loss and accuracy of each optimizer at each horizon, the strongest first; the best of a
    column is bold, and ≈ marks what is not distinguishable from L3RS."""
    findings = Findings(results)
    horizons = results.horizons()
    view = Table(title=f"{setting or 'test'}: test loss (accuracy), mean of {words.counted(results.seeds(), 'seed')}")
    compared = L3RS in results.optimizers()
    if compared:
        view.caption = "≈ not distinguishable from L3RS: the paired 95 % interval of the difference contains zero"
    view.add_column("optimizer", no_wrap=True)
    for horizon in horizons:
        view.add_column(words.counted(horizon, "step"), justify="right", no_wrap=True)
    optimizers = findings.ranked_in(setting)
    losses = {(o, h): results.mean(setting, o, h) for o in optimizers for h in horizons}
    best = {h: min((x for o in optimizers if not math.isnan(x := losses[o, h])), default=None) for h in horizons}
    for optimizer in optimizers:
        cells = []
        for horizon in horizons:
            accuracy = results.mean(setting, optimizer, horizon, "accuracy")
            cell = f"{words.number(losses[optimizer, horizon])} ({words.percent(accuracy)})"
            if compared and optimizer != L3RS and findings.outcome(setting, optimizer, horizon) == "undecided":
                cell = f"≈ {cell}"
            cells.append(Text(cell, "bold" if losses[optimizer, horizon] == best[horizon] else ""))
        view.add_row(words.optimizer(optimizer), *cells, style="cyan" if optimizer == L3RS else None)
    return view
