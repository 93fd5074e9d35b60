"""The figures of a page: what is drawn in each panel.

A plate is a figure of several panels. The page shows its panels one by one, so that they stand in as many
columns as the screen has room for; the files hold the whole plate.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from metatrain.evaluation.analysis import Findings
from metatrain.evaluation.results import L3RS
from metatrain.report import formatting as words
from metatrain.report.theme import FILE_DPI, INK, MUTED, PAPER, SHADE, STYLE, Look, inline_svg, look

_PANEL = (3.5, 2.4)  # inches
_RIVALS = 5  # shown beside L3RS
_MARGINS = (0.115, 0.135, 0.855, 0.77)  # left, bottom, width, height: the same for all, so that panels align


class Panel(NamedTuple):
    title: str
    message: str  # what it shows, in words
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

    def save(self, folder: Path) -> None:
        """`name.png` and `name.svg` of all panels and the legend."""
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
            figure.savefig(folder / f"{self.name}.png", dpi=FILE_DPI)
            figure.savefig(folder / f"{self.name}.svg", metadata={"Date": None})


def _cut(title: str, length: int = 46) -> str:
    return title if len(title) <= length else title[: length - 1] + "…"


def rivals(findings: Findings) -> dict[str, Look]:
    """What is drawn, and how: L3RS and the strongest baselines, the same in all figures."""
    return {label: look(i) for i, label in enumerate([L3RS, *findings.strongest(_RIVALS)])}


def _legend(looks: dict[str, Look]) -> list[tuple[str, Look]]:
    return [(words.optimizer(label), k) for label, k in looks.items()]


def horizons(findings: Findings, field: str) -> Plate:
    """Figure 3 of the paper: a field of the records over the horizon, a panel a setting, and the speed-up."""
    looks = rivals(findings)
    panels = [_horizon_panel(findings, setting, field, looks) for setting in findings.results.settings()]
    if field == "loss" and findings.results.speedup:
        panels.append(_speedup_panel(findings, findings.results.settings()[0], looks))
    return Plate(f"horizons-{field}", panels, _legend(looks))


def speedups(findings: Findings) -> Plate:
    """The speed-up in every setting."""
    looks = rivals(findings)
    panels = [_speedup_panel(findings, setting, looks) for setting in findings.results.settings()]
    return Plate("speedups", panels, _legend({k: v for k, v in looks.items() if k != L3RS}))


def _horizon_panel(findings: Findings, setting: str, field: str, looks: dict[str, Look]) -> Panel:
    steps = findings.results.horizons()

    def draw(ax: Axes) -> None:
        _horizon_axis(ax, findings)
        everything = []
        for label, k in reversed(looks.items()):
            value, low, high = np.array([findings.interval(setting, label, h, field) for h in steps]).T
            value = np.where(np.isfinite(value), value, np.nan)
            _line(ax, findings, value, k)
            known = np.isfinite(low) & np.isfinite(high)
            if label == L3RS:
                ax.fill_between(steps, low, high, where=known, color=k.colour, alpha=0.16, lw=0)
            ax.vlines(np.array(steps)[known], low[known], high[known], color=k.colour, lw=0.8, alpha=0.7)
            everything += [*value, *low[known], *high[known]]
        _value_axis(ax, everything, f"test {field}", log=field == "loss", share=field == "accuracy")

    ours = [findings.mean(setting, L3RS, h, field) for h in steps]
    lower = sum(findings.is_lower(setting, best, h) for h in steps if (best := findings.best(setting, h)))
    shown = words.percent if field == "accuracy" else words.tick
    message = (
        f"Test {field} of L3RS in {words.short(setting)}: {shown(ours[0])} after {words.counted(steps[0], 'step')}, "
        f"{shown(ours[-1])} after {steps[-1]:,}; its test loss is lower than the best baseline's at {lower} of "
        f"{words.counted(len(steps), 'horizon')}."
    )
    return Panel(setting or "Test", message, draw)


def _horizon_axis(ax: Axes, findings: Findings, room: float = 1.12) -> None:
    """Log steps, a tick at each horizon, and a shade beyond the range of meta-training."""
    steps = findings.results.horizons()
    ax.set_xscale("log")
    room = room if len(steps) > 1 else 2.0
    ax.set_xlim(steps[0] / room, steps[-1] * room)
    ax.minorticks_off()
    shown: list[int] = []
    reach = math.log(steps[-1] / steps[0]) if len(steps) > 1 else 1.0
    for step in steps:  # labels that would touch are left out
        if not shown or math.log(step / shown[-1]) > 0.105 * reach:
            shown.append(step)
    ax.set_xticks(steps, [f"{step:,}" if step in shown else "" for step in steps])
    name_axis(ax, x="steps")
    if findings.beyond:
        ax.axvspan(max(findings.high, steps[0] / room), steps[-1] * room, color=SHADE, lw=0, zorder=0)


def _line(ax: Axes, findings: Findings, value: np.ndarray, k: Look, nudge: float = 1.0) -> None:
    """Solid between horizons within the range of meta-training, dashed elsewhere."""
    steps = np.array(findings.results.horizons()) * nudge
    within = np.array([h in findings.inside for h in findings.results.horizons()])
    order = 4 if k.width > 1.5 else 3
    outside = ~within | np.append(~within[1:], False) | np.append(False, ~within[:-1])  # and the point next to it
    for shown, dash in ((within, "-"), (outside, (0, (3, 2)))):
        ax.plot(steps, np.where(shown, value, np.nan), color=k.colour, lw=k.width, ls=dash, zorder=order)
    size = 5.2 if k.width > 1.5 else 4.2
    ax.plot(steps, value, k.marker, color=k.colour, ms=size, mec=PAPER, mew=0.5, zorder=order, ls="none")


def _value_axis(ax: Axes, values: Sequence[float], name: str, *, log: bool, share: bool = False) -> None:
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
            room = 0.05 * (high - low) or 0.05
            ax.set_ylim(low - room, high + room)
            ticks = [t for t in ax.get_yticks() if low - room <= t <= high + room]
        ax.minorticks_off()
        shown = (lambda t: f"{100 * t:.3g}") if share else words.tick
        ax.set_yticks(ticks, [shown(float(t)) for t in ticks])
    name_axis(ax, y=name + (", %" if share else ""))


def name_axis(ax: Axes, x: str = "", y: str = "") -> None:
    """Names where they need no turning of the head: below the right end, above the upper end."""
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


def _speedup_panel(findings: Findings, setting: str, looks: dict[str, Look]) -> Panel:
    steps = findings.results.horizons()
    theirs = {label: k for label, k in looks.items() if label != L3RS}
    found = {label: [findings.speedup(setting, label, h) for h in steps] for label in theirs}

    def draw(ax: Axes) -> None:
        _horizon_axis(ax, findings, room=1.4)
        numbers = [x for row in found.values() for f in row if f for x in f if math.isfinite(x) and x > 0]
        low, high = min([*numbers, 1.0]) / 1.15, max([*numbers, 2.0]) * 1.15
        top = high * (high / low) ** 0.14  # the room of ∞
        ax.set_yscale("log")
        ax.set_ylim(low, top)
        ax.minorticks_off()
        ticks = log_ticks(low, high)
        ax.set_yticks(ticks, [f"{words.tick(t)}×" for t in ticks])
        ax.axhline(1, color=INK, lw=0.7)
        reach = (steps[-1] / steps[0]) ** 0.035 if len(steps) > 1 else 1.02
        for i, (label, k) in enumerate(theirs.items()):
            nudge = reach ** (i - (len(theirs) - 1) / 2)
            row = found[label]
            value = np.array([math.nan if f is None or math.isinf(f.value) else f.value for f in row])
            _line(ax, findings, value, k, nudge)
            for step, f in zip(np.array(steps) * nudge, row, strict=True):
                if f is None:
                    continue
                if math.isfinite(f.low) and f.low > 0:
                    ends = (f.low, min(f.high, high))
                    ax.vlines(step, *ends, color=k.colour, lw=0.8, alpha=0.7)
                    if math.isinf(f.high):
                        ax.plot(step, high, "^", color=k.colour, ms=2.6, mew=0)
                if math.isinf(f.value):
                    ax.text(step, (high * top) ** 0.5, "∞", color=k.colour, ha="center", va="center", fontsize=7.5)
        name_axis(ax, y="baseline’s steps ÷ L3RS’s, for the same accuracy")

    least = [f for h in findings.inside if (f := findings.least_speedup(setting, h)) is not None]
    message = f"Speed-up of L3RS in {words.short(setting)}"
    if least:
        message += (
            f": over the quickest baseline {words.ratio(min(least))} to {words.ratio(max(least))} within the range"
        )
    only = len(findings.results.settings()) == 1
    return Panel("Speed-up" if only else f"Speed-up, {words.short(setting)}", message + ".", draw)


def curves(findings: Findings) -> Plate | None:
    """Test loss along the runs of the longest horizon within the range."""
    looks = rivals(findings)
    at = (findings.inside or findings.results.horizons())[-1]
    panels = []
    for setting in findings.results.settings():
        rows = {c.optimizer: c for c in findings.results.curves if (c.setting, c.horizon) == (setting, at)}
        if not rows:
            continue

        def draw(ax: Axes, rows: dict = rows) -> None:
            values: list[float] = []
            for label, k in reversed(looks.items()):
                if label not in rows:
                    continue
                loss = np.array([math.nan if x is None else x for x in rows[label].loss])
                order = 4 if label == L3RS else 3
                ax.plot(rows[label].steps, loss, color=k.colour, lw=k.width, zorder=order)
                ax.plot(rows[label].steps[-1:], loss[-1:], k.marker, color=k.colour, mec=PAPER, mew=0.5, zorder=order)
                values += loss.tolist()
            _value_axis(ax, values, "test loss", log=True)
            ax.set_xlim(0, at * 1.03)
            name_axis(ax, x="steps")

        ends = {label: row.loss[-1] for label, row in rows.items() if label in looks and row.loss[-1] is not None}
        message = f"Test loss along runs of {at:,} steps in {words.short(setting)}; at the end " + ", ".join(
            f"{words.optimizer(label)} {words.number(loss)}" for label, loss in ends.items() if loss is not None
        )
        panels.append(Panel(setting or "Test", message + ".", draw))
    return Plate("curves", panels, _legend(looks)) if panels else None


def profile(findings: Findings) -> Plate | None:
    """The share of problems that an optimizer solves within a factor of the quickest."""
    looks = rivals(findings)
    found = {label: np.array(row) for label, row in findings.results.profile().items() if label in looks}
    problems = max(map(len, found.values()), default=0)
    if not problems:
        return None
    longest = max((x for row in found.values() for x in row if math.isfinite(x)), default=1.0)
    limit = max(longest * 1.15, 2.0)

    def draw(ax: Axes) -> None:
        for label, row in reversed(found.items()):
            k = looks[label]
            steps = np.concatenate([[1.0], row[np.isfinite(row)], [limit]])
            shares = np.array([(row <= s).mean() for s in steps])
            ax.plot(steps, shares, color=k.colour, lw=k.width, drawstyle="steps-post", zorder=4 if label == L3RS else 3)
            every = slice(None, None, max(len(steps) // 8, 1))
            ax.plot(steps[every], shares[every], k.marker, color=k.colour, mec=PAPER, mew=0.5, ls="none", ms=4)
        ax.set_xscale("log")
        ax.set_xlim(1 / 1.01, limit)
        ax.minorticks_off()
        ticks = log_ticks(1.0, limit)
        ax.set_xticks(ticks, [f"{words.tick(t)}×" for t in ticks])
        ax.set_ylim(-0.02, 1.04)
        ax.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "25", "50", "75", "100"])
        name_axis(ax, x="steps ÷ fewest steps of any", y="solved, % of problems")

    first = {label: float((row <= 1).mean()) for label, row in found.items()}
    solved = {label: float(np.isfinite(row).mean()) for label, row in found.items()}
    message = f"Of {words.counted(problems, 'problem')}, " + "; ".join(
        f"{words.optimizer(label)} is quickest in {words.percent(first[label], 0)} and solves "
        f"{words.percent(solved[label], 0)}"
        for label in looks
        if label in found
    )
    return Plate("profile", [Panel("Performance profile", message + ".", draw)], _legend(looks), (5.4, 3.0))
