"""A run's page: how far it is, and how it goes. Written again and again while the run goes on."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup, escape

from metatrain.config import Config, UserError, load_config
from metatrain.outer.metrics import read_metrics
from metatrain.report import formatting as words
from metatrain.report.html import write_page

_log = logging.getLogger("metatrain")

_WINDOW = 31  # generations of the running median
_RECENT = 50  # generations that the time left is reckoned from
_POINTS = 600  # of a series that are drawn
_BANDS = 3  # of horizons
_DASHES = ("", "6 3", "1.5 3")


class Live:
    """Keeps a run's page up to date, and never stops the run.

    Args:
      folder: of the run.
      every: seconds between two drawings, at least.
    """

    def __init__(self, folder: Path, every: float = 60.0) -> None:
        self._folder = folder
        self._every = every
        self._next = time.monotonic()
        self._complained = False

    def tick(self) -> None:
        """Called after every generation; draws when it is time."""
        if time.monotonic() >= self._next:
            self._draw(lambda: write(self._folder))
            self._next = time.monotonic() + self._every

    def close(self) -> None:
        """Draw the page as it stays: the run has ended, finished or not."""
        self._draw(lambda: write(self._folder, going=False))

    def _draw(self, draw: Callable[[], object]) -> None:
        try:
            draw()
        except Exception as error:  # whatever it is, a picture is not worth a run
            if not self._complained:
                _log.warning("%s has no page: %s", self._folder, error or type(error).__name__)
            self._complained = True


def write(folder: Path, *, going: bool = True) -> Path:
    """Write `report.html` into a run's folder, from its `config.yaml` and `metrics.jsonl`.

    Args:
      folder: of the run.
      going: whether more generations are to come; a run that has all of its own is finished in any case.

    Returns:
      The page; it loads itself again every minute while the run goes on.

    Raises:
      UserError: not a run's folder.
    """
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder} is not a run: it has no config.yaml")
    config = load_config(folder / "config.yaml")
    history = History.read(folder / "metrics.jsonl")
    done, total = history.done, config.outer.steps
    state = "finished" if done >= total else "running" if going else "stopped"
    return write_page(
        folder / "report.html",
        "live.html",
        name=config.name,
        state=state,
        done=done,
        total=total,
        updated=time.strftime("%Y-%m-%d %H:%M"),
        sentence=_sentence(history, config, state),
        facts=_facts(history, config, state),
        charts=[(title, caption, legend, Markup(svg)) for title, caption, legend, svg in _charts(history)],
        config=(folder / "config.yaml").read_text(),
    )


@dataclasses.dataclass(frozen=True)
class History:
    """The columns of `metrics.jsonl`, each float [G]; NaN where a line has no number."""

    columns: dict[str, np.ndarray]

    @classmethod
    def read(cls, file: Path) -> History:
        """Read the lines that are whole: the last one may be half-written."""
        names = (
            "generation", "horizon", "meta_loss_mean", "meta_loss_best", "theta_norm", "candidate_steps_per_s",
            "seconds", "workers",
        )  # fmt: skip
        lines = read_metrics(file)
        return cls({name: np.array([_number(line.get(name)) for line in lines]) for name in names})

    def __getitem__(self, name: str) -> np.ndarray:
        return self.columns[name]

    @property
    def done(self) -> int:
        """Generations."""
        generations = self["generation"]
        return int(generations[-1]) + 1 if len(generations) else 0

    def bands(self) -> list[tuple[int, int, np.ndarray]]:
        """Shortest and longest horizon of each band, and which generations are in it, bool [G]."""
        horizons = self["horizon"]
        known = horizons[np.isfinite(horizons)]
        if not len(known):
            return []
        edges = np.unique(np.quantile(known, np.linspace(0, 1, _BANDS + 1), method="nearest"))
        if len(edges) == 1:
            return [(int(edges[0]), int(edges[0]), horizons == edges[0])]
        found = []
        for low, high in itertools.pairwise(edges):
            inside = (horizons >= low) & ((horizons < high) | (high == edges[-1]))
            if inside.any():
                found.append((int(horizons[inside].min()), int(horizons[inside].max()), inside))
        return found


def running_median(values: np.ndarray, window: int = _WINDOW) -> np.ndarray:
    """The median of each value and those around it; what is no number is passed over."""
    if not len(values):
        return values
    half = window // 2
    padded = np.pad(values, half, constant_values=math.nan)
    around = np.lib.stride_tricks.sliding_window_view(padded, 2 * half + 1)
    empty = ~np.isfinite(around).any(1)
    found = np.full(len(values), math.nan)
    found[~empty] = np.nanmedian(np.where(np.isfinite(around[~empty]), around[~empty], math.nan), 1)
    return found


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def _sentence(history: History, config: Config, state: str) -> str:
    done, total = history.done, config.outer.steps
    if not done:
        return "No generation is done yet: the first one includes compilation."
    if state == "finished":
        spent = words.duration(float(np.nansum(history["seconds"])))
        return f"Finished: {words.counted(total, 'generation')} in {spent}."
    if state == "stopped":
        return f"Stopped after {done:,} of {words.counted(total, 'generation')}; `metatrain resume` goes on with it."
    left = float(np.nanmean(history["seconds"][-_RECENT:])) * (total - done)
    return f"{done:,} of {words.counted(total, 'generation')} done; about {words.about(left)} left."


def _facts(history: History, config: Config, state: str) -> list[tuple[str, str]]:
    """Number, and what it is."""
    if not history.done:
        return []
    best, mean = history["meta_loss_best"], history["meta_loss_mean"]
    facts = [(f"{100 * history.done / config.outer.steps:.0f} %", "of the generations")]
    if np.isfinite(best).any():
        at = int(np.nanargmin(best))
        horizon, generation = (int(history[name][at]) for name in ("horizon", "generation"))
        facts.append(
            (words.number(float(best[at])), f"lowest meta-loss so far: generation {generation:,}, {horizon:,} steps")
        )
    span = min(_RECENT, len(mean) // 2)
    if span and np.isfinite(mean[:span]).any() and np.isfinite(mean[-span:]).any():
        first, last = (float(np.nanmedian(part)) for part in (mean[:span], mean[-span:]))
        facts.append(
            (f"{words.number(first)} → {words.number(last)}", f"median meta-loss of the first and last {span}")
        )
    rate = history["candidate_steps_per_s"][-_RECENT:]
    if np.isfinite(rate).any():
        workers = history["workers"][-1]
        by = f" by {words.counted(int(workers), 'worker')}" if state == "running" and math.isfinite(workers) else ""
        facts.append((f"{np.nanmedian(rate):,.0f}", f"candidate-steps a second{by}"))
    return facts


def _charts(history: History) -> list[tuple[str, str, list[tuple[str, Markup]], str]]:
    """Title, caption, legend and picture of everything that has a number."""
    generation, loss = history["generation"], history["meta_loss_mean"]
    if not np.isfinite(loss).any():
        return []
    caption = f"Mean over candidates, a dot a generation, and the running median of {_WINDOW}."
    if lost := int((~np.isfinite(loss)).sum()):
        caption += f" In {words.counted(lost, 'generation')} no candidate had a finite loss."
    middle = running_median(loss)
    charts: list[tuple[str, str, list[tuple[str, Markup]], str]] = [
        (
            "Meta-loss",
            caption,
            [],
            _chart(
                "Meta-loss over generations", [Series(generation, loss, 0, dots=True), Series(generation, middle, 0)]
            ),
        )
    ]
    bands = history.bands()
    if len(bands) > 1:
        series, legend = [], []
        for i, (low, high, inside) in enumerate(bands):
            series.append(Series(generation[inside], running_median(loss[inside]), i + 1, dash=_DASHES[i]))
            legend.append((f"{low:,} … {high:,} steps", _sign(i + 1, _DASHES[i])))
        picture = _chart("Meta-loss over generations, by horizon", series)
        charts.append(
            ("Meta-loss by horizon", "Running median of the generations with such a horizon.", legend, picture)
        )
    for name, title, caption in (
        ("candidate_steps_per_s", "Candidate-steps a second", "Of each generation, and the running median."),
        ("seconds", "Seconds a generation", "Longer horizons take longer."),
        ("theta_norm", "Norm of theta", "Of the meta-parameters at the centre of the search."),
        ("workers", "Workers", "Alive at the end of each generation."),
    ):
        values = history[name]
        if np.isfinite(values).any() and (name != "workers" or np.nanmax(values) > 1):
            smooth = name in ("theta_norm", "workers")
            series = [Series(generation, values, 2)] if smooth else [
                Series(generation, values, 2, dots=True), Series(generation, running_median(values), 2)
            ]  # fmt: skip
            charts.append((title, caption, [], _chart(f"{title} over generations", series, zero=name == "workers")))
    return charts


@dataclasses.dataclass(frozen=True)
class Series:
    """One line, or one set of dots, of a chart."""

    x: np.ndarray
    y: np.ndarray
    colour: int  # of style.css
    dots: bool = False
    dash: str = ""


_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 340, 200, 40, 8, 8, 24


def _sign(colour: int, dash: str) -> Markup:
    return Markup(
        '<svg class="swatch" viewBox="0 0 30 12" aria-hidden="true"><path d="M1 6H29" '
        'style="stroke:var(--c{});stroke-width:1.8" stroke-dasharray="{}"/></svg>'
    ).format(colour, dash or "none")


def _chart(message: str, series: Sequence[Series], *, zero: bool = False) -> str:
    """A line chart drawn by hand: a plotting library would take longer than the page may."""
    shown = [_thin(s) for s in series]
    x = np.concatenate([s.x for s in shown])
    y = np.concatenate([s.y for s in shown])
    # A few wild values must not flatten all others.
    low, high = np.quantile(y, (0.0, 1.0) if len(y) < 20 else (0.005, 0.995))
    if zero:
        low = 0.0
    room = 0.06 * (high - low) or 0.05 * abs(high) or 0.5
    low, high = low - (0 if zero else room), high + room
    left, right = float(x.min()), max(float(x.max()), float(x.min()) + 1)

    def at(s: Series) -> tuple[np.ndarray, np.ndarray]:
        px = _LEFT + (s.x - left) / (right - left) * (_WIDTH - _LEFT - _RIGHT)
        py = _TOP + (high - np.clip(s.y, low, high)) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)
        return px.round(1), py.round(1)

    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(_told(message, series))}">']
    for tick in _ticks(low, high):
        level = _TOP + (high - tick) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)
        parts.append(f'<path d="M{_LEFT} {level:.1f}H{_WIDTH - _RIGHT}" style="stroke:var(--rule);stroke-width:.7"/>')
        parts.append(_text(_LEFT - 5, level + 3.3, "end", words.tick(tick)))
    base = _HEIGHT - _BOTTOM
    parts.append(f'<path d="M{_LEFT} {base}H{_WIDTH - _RIGHT}" style="stroke:var(--muted);stroke-width:.8"/>')
    for tick in _ticks(left, right):
        place = _LEFT + (tick - left) / (right - left) * (_WIDTH - _LEFT - _RIGHT)
        parts.append(_text(place, base + 14, "middle", f"{tick:,.0f}" if tick == int(tick) else ""))
    for s in shown:
        px, py = at(s)
        colour = f"var(--c{s.colour})"
        if s.dots:
            dots = "".join(f"M{a} {b}h0" for a, b in zip(px.tolist(), py.tolist(), strict=True))
            style = f"stroke:{colour};stroke-width:2.2;stroke-linecap:round;opacity:.35"
            parts.append(f'<path d="{dots}" style="{style}"/>')
        elif len(px):
            line = "L".join(f"{a} {b}" for a, b in zip(px.tolist(), py.tolist(), strict=True))
            style = f"fill:none;stroke:{colour};stroke-width:1.8;stroke-linejoin:round"
            parts.append(f'<path d="M{line}" style="{style}" stroke-dasharray="{s.dash or "none"}"/>')
    return "".join(parts) + "</svg>"


def _text(x: float, y: float, anchor: str, text: str) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" style="fill:var(--muted);font-size:10px">{text}</text>'
    )


def _told(message: str, series: Sequence[Series]) -> str:
    ends = [s.y[np.isfinite(s.y)] for s in series if not s.dots]
    told = "; ".join(f"from {words.number(float(y[0]))} to {words.number(float(y[-1]))}" for y in ends if len(y))
    return f"{message}: {told}." if told else f"{message}."


def _thin(s: Series) -> Series:
    """Finite values only, and no more than a screen can show."""
    finite = np.flatnonzero(np.isfinite(s.y) & np.isfinite(s.x))
    if len(finite) > _POINTS:
        finite = finite[np.linspace(0, len(finite) - 1, _POINTS).astype(int)]
    return dataclasses.replace(s, x=s.x[finite], y=s.y[finite])


def _ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers between two."""
    rough = (high - low) / 4
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(m * unit for m in (1, 2, 5, 10) if m * unit >= rough * 0.8)
    return [k * step for k in range(math.ceil(low / step), math.floor(high / step) + 1)]
