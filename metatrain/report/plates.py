"""Plates: figures of several panels.

The page shows the panels one by one, so that they stand in as many columns as the screen has room for; the files hold
the whole plate.
"""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from l3rs.io.files import write_atomically
from metatrain.report import formatting
from metatrain.report.theme import FILE_DPI, MUTED, STYLE, Look, inline_svg

_PANEL = (3.5, 2.4)  # inches
_MARGINS = (0.115, 0.135, 0.855, 0.77)  # left, bottom, width, height: the same for all, so that panels align
_TITLE = 46  # characters of a title


class Panel(NamedTuple):
    title: str
    message: str  # a description, for readers who cannot see the panel
    draw: Callable[[Axes], None]


@dataclasses.dataclass(frozen=True)
class Plate:
    name: str  # of the files
    panels: list[Panel]
    legend: list[tuple[str, Look]]
    size: tuple[float, float] = _PANEL  # of a panel, inches

    def inline(self) -> list[str]:
        """An SVG element a panel."""
        found = []
        with mpl.rc_context(STYLE):
            for i, panel in enumerate(self.panels):
                figure = Figure(self.size)
                panel.draw(figure.add_axes(_MARGINS))
                found.append(inline_svg(figure, f"{self.name}-{i}", panel.message))
        return found

    def save(self, folder: Path) -> Path:
        """Write `name.png` and `name.svg`, of all panels and the legend; returns the first. The folder is created."""
        folder.mkdir(parents=True, exist_ok=True)
        columns = min(3, len(self.panels))
        rows = math.ceil(len(self.panels) / columns)
        width, height = self.size
        head, foot = 0.22, 0.35  # inches: of a panel's title, of the legend
        with mpl.rc_context(STYLE):
            total = rows * (height + head) + foot
            figure = Figure((columns * width, total))
            for i, panel in enumerate(self.panels):
                row, column = divmod(i, columns)
                left, bottom, wide, high = _MARGINS
                ax = figure.add_axes(
                    (
                        (column + left) / columns,
                        (total - (row + 1) * (height + head) + bottom * height) / total,
                        wide / columns,
                        high * height / total,
                    )
                )
                panel.draw(ax)
                ax.set_title(_cut(panel.title), loc="left", pad=19, weight="bold")
            handles = [
                Line2D([], [], color=k.colour, marker=k.marker, lw=k.width, ls=k.dash, label=label)
                for label, k in self.legend
            ]
            figure.legend(handles=handles, loc="lower center", ncols=max(len(handles), 1))
            for kind, options in (("png", {"dpi": FILE_DPI}), ("svg", {"metadata": {"Date": None}})):
                content = io.BytesIO()
                figure.savefig(content, format=kind, **options)
                write_atomically(folder / f"{self.name}.{kind}", content.getvalue())  # a link is not followed
        return folder / f"{self.name}.png"


def _cut(title: str) -> str:
    return title if len(title) <= _TITLE else title[: _TITLE - 1] + "…"


def value_axis(ax: Axes, values: Sequence[float], name: str, *, log: bool, share: bool = False) -> None:
    """Limits around the values, a few ticks with plain numbers, and the name above the axis."""
    finite = np.array([v for v in values if math.isfinite(v) and (v > 0 or not log)])
    if finite.size:
        low, high = float(finite.min()), float(finite.max())
        if log:
            ax.set_yscale("log")
            low, high = low / 1.06, high * 1.06
            ax.set_ylim(low, high)
            ticks = log_ticks(low, high)
        else:
            room = 0.05 * (high - low) or 0.05 * abs(high) or 0.05
            ax.set_ylim(low - room, high + room)
            ticks = [t for t in ax.get_yticks() if low - room <= t <= high + room]
        ax.minorticks_off()
        ax.set_yticks(ticks, formatting.ticks([float(100 * t if share else t) for t in ticks]))
    name_axis(ax, y=name + (", %" if share else ""))


def name_axis(ax: Axes, x: str = "", y: str = "") -> None:
    """Write the axes' names horizontally: below the right end, and above the upper end."""
    for text, at, shift, side in ((x, (1, 0), (0, -21), "right"), (y, (0, 1), (-28, 6), "left")):
        if text:
            ax.annotate(
                text, at, shift, xycoords="axes fraction", textcoords="offset points", ha=side, fontsize=7, color=MUTED
            )


def log_ticks(low: float, high: float) -> list[float]:
    """Three to seven round numbers between two positive ones."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks: list[float] = []
    for mantissas in (
        (1,),
        (1, 3),
        (1, 2, 5),
        (1, 1.5, 2, 3, 5, 7),
        np.arange(10, 100, 2) / 10,
        np.arange(20, 200) / 20,
    ):
        ticks = [float(m) * 10.0**d for d in decades for m in mantissas if low <= m * 10.0**d <= high]
        if len(ticks) >= 3:
            break
    return ticks[:: math.ceil(len(ticks) / 7)]
