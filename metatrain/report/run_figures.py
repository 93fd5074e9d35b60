"""The figures of a run: meta-loss, speed and others over its generations."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from metatrain.report import formatting
from metatrain.report.history import WINDOW, History, running_median
from metatrain.report.plates import Panel, name_axis, value_axis
from metatrain.report.theme import SERIES, Look

_POINTS = 600  # of a series that are drawn: a screen shows no more
_LOSS, *_BANDS = (Look(SERIES[0], "", 1.6), Look(SERIES[1], "", 1.6), Look(SERIES[2], "", 1.6, "--"),
                  Look(SERIES[3], "", 1.6, ":"))  # fmt: skip
_COUNTS = {"lost": "workers lost", "duplicated": "shards started twice", "requeued": "candidates evaluated again"}
_OTHER = Look(SERIES[2], "", 1.6)


class Chart(NamedTuple):
    """A panel of the page, with its own caption and legend."""

    panel: Panel
    caption: str
    legend: list[tuple[str, Look]]


class _Series(NamedTuple):
    """A line, or a dot per value."""

    x: np.ndarray
    y: np.ndarray
    look: Look
    dots: bool = False


def charts(history: History) -> list[Chart]:
    """A chart of each column that has numbers; none before the first finite loss."""
    generation, loss = history["generation"], history["meta_loss_mean"]
    if not np.isfinite(loss).any():
        return []
    caption = f"Mean over candidates, a dot per generation, and the running median of {WINDOW}."
    if history.lost:
        caption += f" In {formatting.counted(history.lost, 'generation')} no candidate had a finite loss."
    found = [_chart("Meta-loss", caption, _with_median(generation, loss, _LOSS))]
    bands = history.bands()
    if len(bands) > 1:
        series = [
            _Series(generation[band.members], running_median(loss[band.members], WINDOW), look)
            for band, look in zip(bands, _BANDS, strict=False)
        ]
        legend = [
            (f"{band.shortest:,} … {band.longest:,} steps", look) for band, look in zip(bands, _BANDS, strict=False)
        ]
        found.append(
            _chart("Meta-loss by horizon", "Running median of the generations with such a horizon.", series, legend)
        )
    for name, title, caption in (
        ("candidate_steps_per_s", "Candidate-steps a second", "Of each generation, and the running median."),
        ("seconds", "Seconds a generation", "Longer horizons take longer."),
        ("theta_norm", "Norm of theta", "Of the meta-parameters at the centre of the search."),
        ("workers", "Workers", "Alive at the end of each generation."),
    ):
        values = history[name]
        if not np.isfinite(values).any() or (name == "workers" and np.nanmax(values) <= 1):
            continue
        smooth = name in ("theta_norm", "workers")
        series = [_Series(generation, values, _OTHER)] if smooth else _with_median(generation, values, _OTHER)
        found.append(_chart(title, caption, series, zero=name == "workers"))
    if counted := [name for name in _COUNTS if history.count(name)]:
        looks = dict(zip(_COUNTS, (_LOSS, *_BANDS), strict=False))
        series = [_Series(generation, history[name], looks[name]) for name in counted]
        legend = [(_COUNTS[name], looks[name]) for name in counted]
        caption = "Since the start of the run. None of it changes the result."
        found.append(_chart("Lost, started twice, evaluated again", caption, series, legend, zero=True))
    return found


def _with_median(x: np.ndarray, y: np.ndarray, look: Look) -> list[_Series]:
    return [_Series(x, y, look, dots=True), _Series(x, running_median(y, WINDOW), look)]


def _chart(
    title: str,
    caption: str,
    series: Sequence[_Series],
    legend: list[tuple[str, Look]] | None = None,
    *,
    zero: bool = False,
) -> Chart:
    """Args: see `Chart`; `zero`: whether the vertical axis starts at 0."""
    ends = [y[np.isfinite(y)] for _, y, _, dots in series if not dots]
    change = "; ".join(f"from {formatting.number(y[0])} to {formatting.number(y[-1])}" for y in ends if len(y))
    message = f"{title} over generations: {change}." if change else f"{title} over generations."
    return Chart(Panel(title, message, functools.partial(_draw, series, zero)), caption, legend or [])


def _draw(series: Sequence[_Series], zero: bool, ax: Axes) -> None:
    shown = [_thinned(each) for each in series]
    x, y = (np.concatenate([each[i] for each in shown]) for i in (0, 1))
    # A few extreme values must not flatten the others: they are drawn at the edge.
    low, high = np.quantile(y, (0.0, 1.0) if len(y) < 20 else (0.005, 0.995))
    low = 0.0 if zero else low
    for each in shown:
        clipped = np.clip(each.y, low, high)
        if each.dots:
            ax.plot(each.x, clipped, ".", color=each.look.colour, ms=3.4, mew=0, alpha=0.4)
        else:
            ax.plot(each.x, clipped, color=each.look.colour, lw=each.look.width, ls=each.look.dash)
    ax.yaxis.set_major_locator(MaxNLocator(5, integer=zero))
    value_axis(ax, [low, high], "", log=False)
    ax.set_xlim(x.min(), max(x.max(), x.min() + 1))
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda generation, _: f"{generation:,.0f}"))
    name_axis(ax, x="generation")


def _thinned(series: _Series) -> _Series:
    """Finite values only, and at most `_POINTS` of them."""
    finite = np.flatnonzero(np.isfinite(series.y) & np.isfinite(series.x))
    if len(finite) > _POINTS:
        finite = finite[np.linspace(0, len(finite) - 1, _POINTS).astype(int)]
    return series._replace(x=series.x[finite], y=series.y[finite])
