"""The decisions of L3RS: Figures 4 and 5 of the paper, the path of the direction mix and the update size."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from matplotlib.axes import Axes

from l3rs.descriptors import Role, roles
from l3rs.spec import Layer
from metatrain.evaluation.records import DecisionPath
from metatrain.report import formatting
from metatrain.report.plates import Panel, Plate, log_ticks, name_axis
from metatrain.report.theme import INK, MUTED, PAPER, SERIES, Look

_PLACES = ("input", "hidden", "output", "norm")
_COLOURS = dict(zip(_PLACES, (SERIES[1], SERIES[2], SERIES[0], SERIES[3]), strict=True))
_DASHES = {"kernel": "-", "bias": ":", "scale": "--"}
_POINTS = 80  # steps of a path that are drawn


@dataclasses.dataclass(frozen=True)
class _Drawn:
    """The points of a path that are drawn."""

    steps: np.ndarray  # [K]
    mix: np.ndarray  # [K, L, P]
    size: np.ndarray  # [K, L]
    roles: list[Role]
    directions: list[str]

    @property
    def away(self) -> np.ndarray:
        """The share of all directions but the first [K, L]."""
        return 1.0 - self.mix[..., 0]

    @property
    def share(self) -> str:
        """The name of `away`."""
        others = self.directions[1:]
        return f"μ, share of {formatting.listed(others)}" if others else "μ"


def plate(path: DecisionPath, name: str) -> Plate:
    """μ against λ of every layer, and their means over layers step by step.

    Args:
      path: of one run.
      name: of the plate.
    """
    last = len(path.mix) - 1
    rows = np.unique(np.linspace(0, last, min(_POINTS, last + 1)).round().astype(int))
    layers = [Layer(layer, tuple(shape)) for layer, shape in zip(path.layers, path.shapes, strict=True)]
    mix, size = np.array(path.mix, float)[rows], np.array(path.step_rms, float)[rows]
    drawn = _Drawn(rows + 1, mix, size, roles(layers), path.directions)
    where = formatting.short(path.setting)
    run = f"in {where} over {formatting.counted(last + 1, 'step')}"
    sizes = [formatting.number(math.exp(float(_logs(size[i]).mean()))) for i in (0, -1)]
    away = [drawn.away[i].mean() for i in (0, -1)]
    return Plate(
        name,
        [
            Panel(
                f"{where}: every layer",
                f"Paths of {len(layers)} layers {run}: {drawn.share} against update size.",
                lambda ax: _draw_layers(ax, drawn),
            ),
            Panel(
                f"{where}: direction mix",
                f"{drawn.share} {run}: from {away[0]:.2f} to {away[1]:.2f} on average.",
                lambda ax: _draw_mix(ax, drawn),
            ),
            Panel(
                f"{where}: update size",
                f"Update size λ/√n {run}: from {sizes[0]} to {sizes[1]} on average.",
                lambda ax: _draw_size(ax, drawn),
            ),
        ],
        _legend(drawn.roles),
    )


def _legend(found: list[Role]) -> list[tuple[str, Look]]:
    places, components = ({getattr(role, field) for role in found} for field in Role._fields)
    return [
        *((place, Look(_COLOURS[place], "", 2.2)) for place in _PLACES if place in places),
        *((part, Look(MUTED, "", 1.2, dash)) for part, dash in _DASHES.items() if part in components),
        ("first step", Look(INK, "o", 0.0)),
        ("last step", Look(INK, "*", 0.0)),
    ]


def _draw_layers(ax: Axes, drawn: _Drawn) -> None:
    for layer, role in enumerate(drawn.roles):
        x, y = drawn.away[:, layer], drawn.size[:, layer]
        colour = _COLOURS[role.place]
        ax.plot(x, y, color=colour, ls=_DASHES[role.component], lw=1.0, alpha=0.85)
        ax.plot(x[:1], y[:1], "o", color=colour, ms=3.6, mec=PAPER, mew=0.4, zorder=5)
        ax.plot(x[-1:], y[-1:], "*", color=colour, ms=6.5, mec=PAPER, mew=0.4, zorder=5)
    _size_axis(ax, drawn.size)
    name_axis(ax, x=drawn.share, y="λ/√n, update size")
    low, high = float(drawn.away.min()), float(drawn.away.max())
    room = max(0.04 * (high - low), 0.005)
    ax.set_xlim(low - room, high + room)


def _draw_mix(ax: Axes, drawn: _Drawn) -> None:
    last = drawn.steps[-1]
    for i, direction in enumerate(drawn.directions):
        k = Look(SERIES[(1, 0, 2, 3, 4, 5)[i % 6]], "", 1.6, ("-", "--", ":", "-.")[i % 4])
        of_layers = drawn.mix[..., i]
        ax.plot(drawn.steps, of_layers.mean(1), color=k.colour, lw=k.width, ls=k.dash)
        ax.fill_between(drawn.steps, *_band(of_layers), color=k.colour, alpha=0.13, lw=0)
        ax.annotate(direction, (last, of_layers[-1].mean()), (4, 0), textcoords="offset points", va="center",
                    color=k.colour, fontsize=7)  # fmt: skip
    ax.set_xlim(0, last * 1.18)
    ax.set_ylim(-0.02, 1.02)
    name_axis(ax, x="step", y="μ, mean over layers")


def _draw_size(ax: Axes, drawn: _Drawn) -> None:
    ax.plot(drawn.steps, np.exp(_logs(drawn.size).mean(1)), color=SERIES[0], lw=1.6)
    low, high = _band(drawn.size)
    ax.fill_between(drawn.steps, low, high, color=SERIES[0], alpha=0.13, lw=0)
    _size_axis(ax, np.concatenate([low, high]))
    name_axis(ax, x="step", y="λ/√n, geometric mean over layers")
    ax.set_xlim(0, drawn.steps[-1] * 1.03)


def _logs(size: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(size, 1e-30))


def _band(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The range of the middle 80 % of layers at each step: [K, L] to two [K]."""
    low, high = np.quantile(values, (0.1, 0.9), axis=1)
    return low, high


def _size_axis(ax: Axes, values: np.ndarray) -> None:
    positive = values[values > 0]
    low, high = (float(positive.min()) / 1.15, float(positive.max()) * 1.15) if positive.size else (0.1, 1.0)
    ax.set_yscale("log")
    ax.set_ylim(low, high)
    ax.minorticks_off()
    ticks = log_ticks(low, high)
    ax.set_yticks(ticks, [formatting.tick(t) for t in ticks])
