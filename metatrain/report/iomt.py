"""A figure of an IOMT run: its loss, and which optimizer trained when."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from l3rs import L3RSError
from l3rs.baselines.iomt import Stage

# The colour-blind safe palette of Okabe and Ito, without yellow, which is too pale for a line.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")


def plot_history(history: Sequence[Stage], losses: npt.ArrayLike, file: str | Path, *, title: str = "") -> Path:
    """The loss in the colour of the optimizer that trains, and below it the choices over the steps.

    A cross marks a stage that diverged; its loss may leave the figure. The dotted line is where the initial phase
    ends. With more than seven optimizers, colours repeat.

    Args:
      history, losses: of a `Result`, or of a controller; losses are [steps + 1].
      file: the image to write, such as run.png; its folder is created.

    Raises:
      L3RSError: no stages, or losses of another length.
    """
    values = np.asarray(losses, np.float64)
    if not history or values.shape != (history[-1].step + history[-1].steps + 1,):
        raise L3RSError(f"{len(history)} stages and losses {values.shape} do not belong to one run of [steps + 1]")

    optimizers = sorted({stage.optimizer for stage in history})
    colours = {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(optimizers)}
    labels = sorted({(stage.optimizer, *stage.hyperparameters.values()): _label(stage) for stage in history}.items())
    rows = {label: i for i, (_, label) in enumerate(labels)}

    figure = Figure(figsize=(9, 3.4 + 0.2 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 0.5 + 0.2 * len(rows)))
    for i, stage in enumerate(history):
        colour, row, end = colours[stage.optimizer], rows[_label(stage)], stage.step + stage.steps
        above.plot(_steps(history, i), values[_steps(history, i)], color=colour, linewidth=1.2)
        below.plot([stage.step, end], [row, row], color=colour, linewidth=6, solid_capstyle="butt")
        if stage.diverged:
            below.plot((stage.step + end) / 2, row, "x", color="black", markersize=5)
    stayed = [values[_steps(history, i)] for i, stage in enumerate(history) if not stage.diverged]
    shown = np.concatenate(stayed or [values])
    shown = shown[np.isfinite(shown)]
    if len(shown) and shown.min() > 0 and shown.max() > 10 * shown.min():
        above.set_yscale("log")
        above.set_ylim(shown.min() / 1.5, shown.max() * 1.5)
    above.set_ylabel("training loss")
    above.set_title(title)
    below.set_yticks(range(len(rows)), list(rows), fontsize=8)
    for tick, (key, _) in zip(below.get_yticklabels(), labels, strict=True):
        tick.set_color(colours[str(key[0])])
    below.set_ylim(len(rows) - 0.4, -0.6)
    below.set_xlim(0, len(values) - 1)
    below.set_xlabel("step")
    first = next((stage.step for stage in history if stage.chosen == "surrogate"), 0)
    for axes in (above, below):
        axes.grid(alpha=0.25)
        if first:
            axes.axvline(first, color="0.4", linestyle=":", linewidth=1)
    path = Path(file)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path


def _steps(history: Sequence[Stage], i: int) -> np.ndarray:
    """Where the losses of a stage are: from its start, unless the stage before diverged and left another one there."""
    stage = history[i]
    return np.arange(stage.step + (i > 0 and history[i - 1].diverged), stage.step + stage.steps + 1)


def _label(stage: Stage) -> str:
    """adam, learning rate 0.01"""
    values = (f"{key.replace('_', ' ')} {value:g}" for key, value in stage.hyperparameters.items())
    return ", ".join([stage.optimizer, *values])
