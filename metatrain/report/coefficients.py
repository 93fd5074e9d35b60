"""The coefficients that MADA learned, over a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes

from l3rs import L3RSError
from l3rs.baselines.mada import COEFFICIENTS, DOMAIN, SYMBOLS
from metatrain.evaluation.records import CoefficientPath
from metatrain.report import formatting
from metatrain.report.plates import Panel, Plate, name_axis
from metatrain.report.theme import MUTED, SERIES, Look

_DASHES = ("-", "--", ":", "-.")


def plate(paths: Sequence[CoefficientPath], name: str) -> Plate:
    """A panel per coefficient, a line per optimizer; dotted lines are the bounds of a coefficient.

    Args:
      paths: of one setting.
      name: of the plate.
    """
    looks = [Look(SERIES[1 + i % 5], "", 1.6, _DASHES[i % len(_DASHES)]) for i in range(len(paths))]
    where = formatting.short(paths[0].setting)
    names = dict.fromkeys(name for path in paths for name in path.values)
    panels = [
        _panel(name, [each for each in zip(paths, looks, strict=True) if name in each[0].values], where)
        for name in names
    ]
    return Plate(
        name, panels, [(formatting.optimizer(p.optimizer), look) for p, look in zip(paths, looks, strict=True)]
    )


def plot_coefficients(history: Mapping[str, npt.ArrayLike], folder: str | Path, title: str = "a run") -> Path:
    """Draw the coefficients of one run of MADA, see `plate`.

    Args:
      history: of `mada_history`.
      folder: where coefficients.png and coefficients.svg are written; it is created.
      title: of the panels.

    Returns:
      The PNG file.

    Raises:
      L3RSError: there are no steps.

    Example:
      >>> from metatrain.report.coefficients import plot_coefficients
      >>> history = {"step": [1, 2], "b1": [0.9, 0.8]}  # as mada_history gives it
      >>> plot_coefficients(history, "/tmp/mada").name
      'coefficients.png'
    """
    steps = np.asarray(history.get("step", ())).tolist()
    values = {name: np.asarray(history[name]).tolist() for name in COEFFICIENTS if name in history}
    if not steps or not values:
        raise L3RSError("there are no steps to plot; keep some with mada(…, history=n)")
    return plate([CoefficientPath(title, "mada", steps, values)], "coefficients").save(Path(folder))


def _panel(coefficient: str, paths: Sequence[tuple[CoefficientPath, Look]], where: str) -> Panel:
    def draw(ax: Axes) -> None:
        for edge in DOMAIN[coefficient]:
            ax.axhline(edge, color=MUTED, ls=":", lw=0.8)
        for path, look in paths:
            ax.plot(path.steps, path.values[coefficient], color=look.colour, lw=look.width, ls=look.dash)
        ax.set_ylim(-0.05, 1.05)
        name_axis(ax, x="step", y="")

    ends = ", ".join(f"{formatting.optimizer(p.optimizer)} ends at {p.values[coefficient][-1]:.2f}" for p, _ in paths)
    return Panel(f"{where}: {SYMBOLS[coefficient]}", f"{SYMBOLS[coefficient]} over the steps in {where}: {ends}.", draw)
