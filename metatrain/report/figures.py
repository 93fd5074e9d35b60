"""The figures of an evaluation: curves over horizons and along runs, speed-ups, the performance profile."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes

from metatrain.evaluation.analysis import Analysis
from metatrain.evaluation.records import L3RS, Curve
from metatrain.evaluation.statistics import Interval, share_within
from metatrain.report import formatting
from metatrain.report.plates import Panel, Plate, log_ticks, name_axis, value_axis
from metatrain.report.theme import INK, PAPER, SHADE, Look, look

_RIVALS = 5  # baselines shown beside L3RS


def rivals(analysis: Analysis) -> dict[str, Look]:
    """The optimizers that are drawn and their looks: L3RS and the strongest baselines, the same in all figures."""
    return {label: look(i) for i, label in enumerate([L3RS, *analysis.strongest(_RIVALS)])}


def _legend(looks: dict[str, Look]) -> list[tuple[str, Look]]:
    return [(formatting.optimizer(label), k) for label, k in looks.items()]


def horizons(analysis: Analysis, field: str) -> Plate:
    """Figure 3 of the paper: a field of the records over the horizon, a panel per setting, and the speed-up."""
    looks = rivals(analysis)
    panels = [_horizon_panel(analysis, setting, field, looks) for setting in analysis.results.settings()]
    if field == "loss" and analysis.results.speedup:
        panels.append(_speedup_panel(analysis, analysis.results.settings()[0], looks))
    return Plate(f"horizons-{field}", panels, _legend(looks))


def speedups(analysis: Analysis) -> Plate:
    """The speed-up in every setting."""
    looks = rivals(analysis)
    panels = [_speedup_panel(analysis, setting, looks) for setting in analysis.results.settings()]
    return Plate("speedups", panels, _legend({k: v for k, v in looks.items() if k != L3RS}))


def _horizon_panel(analysis: Analysis, setting: str, field: str, looks: dict[str, Look]) -> Panel:
    steps = analysis.results.horizons()

    def draw(ax: Axes) -> None:
        _horizon_axis(ax, analysis)
        everything = []
        for label, k in reversed(looks.items()):
            value, low, high = np.array([analysis.interval(setting, label, h, field) for h in steps]).T
            value = np.where(np.isfinite(value), value, np.nan)
            _line(ax, analysis, value, k)
            known = np.isfinite(low) & np.isfinite(high)
            if label == L3RS:
                ax.fill_between(steps, low, high, where=known, color=k.colour, alpha=0.16, lw=0)
            ax.vlines(np.array(steps)[known], low[known], high[known], color=k.colour, lw=0.8, alpha=0.7)
            everything += [*value, *low[known], *high[known]]
        value_axis(ax, everything, f"test {field}", log=field == "loss", share=field == "accuracy")

    shown = formatting.percent if field == "accuracy" else formatting.tick
    first, last = (shown(analysis.mean(setting, L3RS, h, field)) for h in (steps[0], steps[-1]))
    message = (
        f"Test {field} of L3RS in {formatting.short(setting)}: {first} after {formatting.counted(steps[0], 'step')}, "
        f"{last} after {steps[-1]:,}; its test loss is lower than the best baseline's at "
        f"{analysis.lower_count(setting)} of {formatting.counted(len(steps), 'horizon')}."
    )
    return Panel(setting or "Test", message, draw)


def _horizon_axis(ax: Axes, analysis: Analysis, room: float = 1.12) -> None:
    """Log steps, a tick at each horizon, and a shade beyond the range of meta-training."""
    steps = analysis.results.horizons()
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
    if analysis.beyond:
        ax.axvspan(max(analysis.high, steps[0] / room), steps[-1] * room, color=SHADE, lw=0, zorder=0)


def _line(ax: Axes, analysis: Analysis, value: np.ndarray, k: Look, nudge: float = 1.0) -> None:
    """Solid between horizons within the range of meta-training, dashed elsewhere."""
    steps = np.array(analysis.results.horizons()) * nudge
    within = np.array([h in analysis.inside for h in analysis.results.horizons()])
    order = 4 if k.width > 1.5 else 3
    outside = ~within | np.append(~within[1:], False) | np.append(False, ~within[:-1])  # and the point next to it
    for shown, dash in ((within, "-"), (outside, (0, (3, 2)))):
        ax.plot(steps, np.where(shown, value, np.nan), color=k.colour, lw=k.width, ls=dash, zorder=order)
    size = 5.2 if k.width > 1.5 else 4.2
    ax.plot(steps, value, k.marker, color=k.colour, ms=size, mec=PAPER, mew=0.5, zorder=order, ls="none")


def _speedup_panel(analysis: Analysis, setting: str, looks: dict[str, Look]) -> Panel:
    steps = analysis.results.horizons()
    theirs = {label: k for label, k in looks.items() if label != L3RS}
    found = {label: [analysis.speedup(setting, label, h) for h in steps] for label in theirs}
    least = [f for h in analysis.inside if (f := analysis.least_speedup(setting, h)) is not None]
    message = f"Speed-up of L3RS in {formatting.short(setting)}"
    if least:
        ends = f"{formatting.ratio(min(least))} to {formatting.ratio(max(least))}"
        message += f": over the quickest baseline {ends} within the range"
    title = "Speed-up" if len(analysis.results.settings()) == 1 else f"Speed-up, {formatting.short(setting)}"
    return Panel(title, message + ".", functools.partial(_draw_speedups, analysis, found, theirs))


def _draw_speedups(
    analysis: Analysis, found: Mapping[str, Sequence[Interval | None]], looks: Mapping[str, Look], ax: Axes
) -> None:
    steps = np.array(analysis.results.horizons())
    _horizon_axis(ax, analysis, room=1.4)
    numbers = [x for row in found.values() for f in row if f for x in f if math.isfinite(x) and x > 0]
    low, high = min([*numbers, 1.0]) / 1.15, max([*numbers, 2.0]) * 1.15
    top = high * (high / low) ** 0.14  # the space for ∞
    ax.set_yscale("log")
    ax.set_ylim(low, top)
    ax.minorticks_off()
    ticks = log_ticks(low, high)
    ax.set_yticks(ticks, [f"{formatting.tick(t)}×" for t in ticks])
    ax.axhline(1, color=INK, lw=0.7)
    reach = (steps[-1] / steps[0]) ** 0.035 if len(steps) > 1 else 1.02
    for i, (label, k) in enumerate(looks.items()):
        nudge = reach ** (i - (len(looks) - 1) / 2)
        row = found[label]
        value = np.array([math.nan if f is None or math.isinf(f.value) else f.value for f in row])
        _line(ax, analysis, value, k, nudge)
        for step, f in zip(steps * nudge, row, strict=True):
            if f is not None:
                _draw_interval(ax, step, f, k.colour, high, top)
    name_axis(ax, y="baseline’s steps ÷ L3RS’s, for the same accuracy")


def _draw_interval(ax: Axes, step: float, f: Interval, colour: str, high: float, top: float) -> None:
    """The interval of one speed-up, with an arrowhead at `high` if it has no end; ∞ above if the speed-up has none."""
    if math.isfinite(f.low) and f.low > 0:
        ax.vlines(step, f.low, min(f.high, high), color=colour, lw=0.8, alpha=0.7)
        if math.isinf(f.high):
            ax.plot(step, high, "^", color=colour, ms=2.6, mew=0)
    if math.isinf(f.value):
        ax.text(step, (high * top) ** 0.5, "∞", color=colour, ha="center", va="center", fontsize=7.5)


def longest_inside(analysis: Analysis) -> int:
    """The horizon whose runs `curves` shows: the longest within the range, or of all if none is within it."""
    return (analysis.inside or analysis.results.horizons())[-1]


def curves(analysis: Analysis) -> Plate | None:
    """Test loss along the runs of `longest_inside`; None where there are no curves."""
    looks = rivals(analysis)
    horizon = longest_inside(analysis)
    panels = []
    for setting in analysis.results.settings():
        rows = {c.optimizer: c for c in analysis.results.curves if (c.setting, c.horizon) == (setting, horizon)}
        rows = {label: rows[label] for label in looks if label in rows}
        if not rows:
            continue
        ends = {label: row.loss[-1] for label, row in rows.items()}
        message = f"Test loss along runs of {horizon:,} steps in {formatting.short(setting)}; at the end " + ", ".join(
            f"{formatting.optimizer(label)} {formatting.number(loss)}"
            for label, loss in ends.items()
            if loss is not None
        )
        panels.append(Panel(setting or "Test", message + ".", functools.partial(_draw_curves, rows, looks)))
    return Plate("curves", panels, _legend(looks)) if panels else None


def _draw_curves(rows: Mapping[str, Curve], looks: Mapping[str, Look], ax: Axes) -> None:
    values: list[float] = []
    for label, row in reversed(list(rows.items())):
        k = looks[label]
        loss = np.array([math.nan if x is None else x for x in row.loss])
        order = 4 if label == L3RS else 3
        ax.plot(row.steps, loss, color=k.colour, lw=k.width, zorder=order)
        ax.plot(row.steps[-1:], loss[-1:], k.marker, color=k.colour, mec=PAPER, mew=0.5, zorder=order)
        values += loss.tolist()
        ax.set_xlim(0, row.horizon * 1.03)
    value_axis(ax, values, "test loss", log=True)
    name_axis(ax, x="steps")


def profile(analysis: Analysis) -> Plate | None:
    """The share of problems that an optimizer solves within a factor of the quickest; None where none is solved."""
    looks = rivals(analysis)
    found = {label: np.array(analysis.profile[label]) for label in looks if label in analysis.profile}
    problems = max(map(len, found.values()), default=0)
    if not problems:
        return None
    shares = {label: [formatting.percent(share_within(row, limit), 0) for limit in (1, math.inf)]
              for label, row in found.items()}  # fmt: skip
    message = f"Of {formatting.counted(problems, 'problem')}, " + "; ".join(
        f"{formatting.optimizer(label)} is quickest in {quickest} and solves {solved}"
        for label, (quickest, solved) in shares.items()
    )
    draw = functools.partial(_draw_profile, found, looks)
    return Plate("profile", [Panel("Performance profile", message + ".", draw)], _legend(looks), (5.4, 3.0))


def _draw_profile(found: Mapping[str, np.ndarray], looks: Mapping[str, Look], ax: Axes) -> None:
    longest = max((x for row in found.values() for x in row if math.isfinite(x)), default=1.0)
    limit = max(longest * 1.15, 2.0)
    for label, row in reversed(list(found.items())):
        k = looks[label]
        ratios = np.concatenate([[1.0], row[np.isfinite(row)], [limit]])
        shares = np.array([share_within(row, ratio) for ratio in ratios])
        ax.plot(ratios, shares, color=k.colour, lw=k.width, drawstyle="steps-post", zorder=4 if label == L3RS else 3)
        every = slice(None, None, max(len(ratios) // 8, 1))
        ax.plot(ratios[every], shares[every], k.marker, color=k.colour, mec=PAPER, mew=0.5, ls="none", ms=4)
    ax.set_xscale("log")
    ax.set_xlim(1 / 1.01, limit)
    ax.minorticks_off()
    ticks = log_ticks(1.0, limit)
    ax.set_xticks(ticks, [f"{formatting.tick(t)}×" for t in ticks])
    ax.set_ylim(-0.02, 1.04)
    ax.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "25", "50", "75", "100"])
    name_axis(ax, x="steps ÷ fewest steps of any", y="solved, % of problems")
