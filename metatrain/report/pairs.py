"""One optimizer against each of the others, as tables and sentences for a terminal."""

from __future__ import annotations

import numpy as np
from rich.table import Table

from metatrain.evaluation.pairs import Field, overheads, pairs
from metatrain.evaluation.records import Results
from metatrain.report import formatting

_POINTS = 100  # accuracies are compared in percentage points


def pair_table(results: Results, optimizer: str, setting: str, horizon: int, field: Field) -> Table:
    """Test loss and accuracy of all optimizers, and the difference of one of them to each other with its interval."""
    what = "accuracy, in points," if field == "accuracy" else "loss"
    name = formatting.optimizer(optimizer)
    view = Table(
        title=f"{setting or 'test'}, {formatting.counted(horizon, 'step')}: {what} of {name} minus that of others",
        caption=f"mean of {formatting.counted(results.seeds(), 'seed')} ± standard deviation; paired 95 % interval",
    )
    view.add_column("optimizer", no_wrap=True)
    for head in ("test loss", "accuracy", "difference", "interval", f"{name} is"):
        view.add_column(head, justify="right", no_wrap=True)
    view.add_row(name, *_scores(results, optimizer, setting, horizon), style="cyan")
    scale = _POINTS if field == "accuracy" else 1
    for pair in pairs(results, optimizer, setting, horizon, field):
        value, low, high = (_signed(scale * x, 2 if field == "accuracy" else 3) for x in pair.difference)
        interval = f"{low} … {high}" if np.isfinite(pair.difference.low) else formatting.MISSING
        scores = _scores(results, pair.optimizer, setting, horizon)
        view.add_row(formatting.optimizer(pair.optimizer), *scores, value, interval, pair.outcome)
    return view


def overhead_sentences(results: Results, setting: str) -> list[str]:
    """What IOMT's controller took, a sentence for each variant."""
    return [
        f"{found.optimizer}: the controller took {formatting.duration(found.seconds / found.stages)} a stage in "
        f"{formatting.counted(found.stages, 'stage')}, {formatting.percent(found.share)} of the training"
        for found in overheads(results, setting)
    ]


def _scores(results: Results, optimizer: str, setting: str, horizon: int) -> tuple[str, str]:
    loss, accuracy = (results.values(setting, optimizer, horizon, field) for field in ("loss", "accuracy"))
    return _mean(loss, 1, 3), f"{_mean(accuracy, 100, 2)} %"


def _signed(value: float, digits: int) -> str:
    return formatting.MISSING if np.isnan(value) else f"{value:+.{digits}f}".replace("-", "−")


def _mean(values: np.ndarray, scale: float, digits: int) -> str:
    deviation = f" ± {scale * values.std(ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{scale * values.mean():.{digits}f}{deviation}"
