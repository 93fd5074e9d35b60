"""A figure of MADA's coefficients over a run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from l3rs import L3RSError
from l3rs.baselines.mada import COEFFICIENTS, DOMAIN, SYMBOLS


def plot_coefficients(
    history: Mapping[str, npt.ArrayLike], file: str | Path, *, title: str = "", start_step: int = 0
) -> Path:
    """The coefficients over the steps, each in a panel of its own with D's edges as dotted lines.

    Args:
      history: of `mada_history`.
      file: the image to write, such as coefficients.png; its folder is created.
      title: above the panels.
      start_step: the first step that moves coefficients, a vertical line; none where 0.

    Returns:
      The file.

    Raises:
      L3RSError: no steps.

    Example:
      >>> from metatrain.report.mada import plot_coefficients
      >>> history = {"step": [1, 2], "b1": [0.9, 0.8]}  # as mada_history gives it
      >>> plot_coefficients(history, "/tmp/coefficients.png").name
      'coefficients.png'
    """
    steps = np.asarray(history.get("step", ()))
    shown = [name for name in (*COEFFICIENTS, "learning_rate") if name in history]
    if not len(steps) or not shown:
        raise L3RSError("there are no steps to plot; keep some with mada(…, history=n)")
    if np.ptp(np.asarray(history.get("learning_rate", 0.0))) == 0:  # a constant needs no panel
        shown = [name for name in shown if name != "learning_rate"]
    figure = Figure(figsize=(9, 1.1 + 1.7 * -(-len(shown) // 3)), layout="constrained")
    FigureCanvasAgg(figure)
    rows = figure.subplots(-(-len(shown) // 3), 3, sharex=True, squeeze=False)
    for axes, name in zip(rows.flat, shown, strict=False):
        axes.plot(steps, np.asarray(history[name]), color="#0072B2", linewidth=1.4)
        axes.set_title(SYMBOLS[name], fontsize=10)
        axes.grid(alpha=0.25)
        for edge in filter(math.isfinite, DOMAIN[name] if name != "learning_rate" else ()):
            axes.axhline(edge, color="0.4", linestyle=":", linewidth=1)
        if start_step:
            axes.axvline(start_step, color="0.4", linestyle="--", linewidth=1)
    for axes in rows.flat[len(shown) :]:
        axes.set_visible(False)
    for column in range(3):  # the lowest panel of each column names the steps
        below = [axes for axes in rows[:, column] if axes.get_visible()]
        if below:
            below[-1].set_xlabel("step")
            below[-1].tick_params(labelbottom=True)
    figure.suptitle(title, fontsize=11)
    path = Path(file)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path
