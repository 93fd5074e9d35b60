"""What L3RS decided: Figures 4 and 5 of the paper, the path of direction mix and update size."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes

from metatrain.evaluation.results import DecisionPath
from metatrain.report import formatting as words
from metatrain.report.figures import Panel, Plate, log_ticks, name_axis
from metatrain.report.theme import INK, MUTED, PAPER, SERIES, Look

_PLACES = ("input", "hidden", "output", "norm")
_COLOURS = dict(zip(_PLACES, (SERIES[1], SERIES[2], SERIES[0], SERIES[3]), strict=True))
_DASHES = {"kernel": "-", "bias": ":", "scale": "--"}
_POINTS = 80  # of a path that are drawn
_INPUT = re.compile(r"\b(stem|input|embed\w*|patch\w*|cls_token|pos_embed|conv1)\b")
_OUTPUT = re.compile(r"\b(head|output|out|classifier|logits|fc)\b")


class Kind(NamedTuple):
    place: str  # of the network: input, hidden, output, norm
    component: str  # kernel, bias, scale


def kinds(layers: list[str], shapes: list[list[int]]) -> list[Kind]:
    """What each layer is, from its name and rank.

    A module without any kernel is a norm. Input and output are told by name (stem, head, …); where no name
    tells, they are the first and last module with a kernel.
    """
    modules = [path.rpartition("/")[0] for path in layers]
    wide = list(dict.fromkeys(m for m, shape in zip(modules, shapes, strict=True) if len(shape) >= 2))
    in_order = sorted(wide, key=_natural)
    first = next((m for m in in_order if _INPUT.search(m)), in_order[0] if in_order else "")
    last = next((m for m in reversed(in_order) if _OUTPUT.search(m)), in_order[-1] if in_order else "")
    found = []
    for path, module, shape in zip(layers, modules, shapes, strict=True):
        leaf = path.rpartition("/")[2]
        component = "bias" if "bias" in leaf else "kernel" if len(shape) >= 2 else "scale"
        if module not in wide:
            place = "norm"
        elif module == last:
            place = "output"
        elif module == first or _INPUT.search(path):
            place = "input"
        else:
            place = "hidden"
        found.append(Kind(place, component))
    return found


def _natural(name: str) -> list[tuple[int, str]]:
    """layers/2 before layers/10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"[/_.]|(?<=\D)(?=\d)", name)]


def plate(path: DecisionPath, name: str) -> Plate:
    """μ against λ of every layer; and their means over layers, step by step.

    Args:
      path: of one run.
      name: of the plate.
    """
    mix, size = np.array(path.mix, float), np.array(path.step_rms, float)  # [T, L, P], [T, L]
    away = 1.0 - mix[..., 0]  # [T, L]: the share of all directions but the first
    steps = np.arange(1, len(mix) + 1)
    rows = np.unique(np.linspace(0, len(mix) - 1, min(_POINTS, len(mix))).round().astype(int))
    others = path.directions[1:]
    share = f"μ, share of {words.listed(others)}" if others else "μ"
    found = kinds(path.layers, path.shapes)
    seen = {kind.place: None for kind in found}
    components = {kind.component: None for kind in found}
    legend = [(p, Look(_COLOURS[p], "", 2.2)) for p in _PLACES if p in seen]
    legend += [(c, Look(MUTED, "", 1.2, dash)) for c, dash in _DASHES.items() if c in components]
    legend += [("first step", Look(INK, "o", 0.0)), ("last step", Look(INK, "*", 0.0))]

    def paths(ax: Axes) -> None:
        for layer, kind in enumerate(found):
            x, y = away[rows, layer], size[rows, layer]
            colour = _COLOURS[kind.place]
            ax.plot(x, y, color=colour, ls=_DASHES[kind.component], lw=1.0, alpha=0.85)
            ax.plot(x[:1], y[:1], "o", color=colour, ms=3.6, mec=PAPER, mew=0.4, zorder=5)
            ax.plot(x[-1:], y[-1:], "*", color=colour, ms=6.5, mec=PAPER, mew=0.4, zorder=5)
        _size_axis(ax, size[rows])
        name_axis(ax, x=share, y="λ/√n, update size")
        low, high = float(away.min()), float(away.max())
        room = max(0.04 * (high - low), 0.005)
        ax.set_xlim(low - room, high + room)

    def mean_mix(ax: Axes) -> None:
        for i, direction in enumerate(path.directions):
            k = Look(SERIES[(1, 0, 2, 3, 4, 5)[i % 6]], "", 1.6, ("-", "--", ":", "-.")[i % 4])
            of_layers = mix[rows][..., i]
            ax.plot(steps[rows], of_layers.mean(1), color=k.colour, lw=k.width, ls=k.dash)
            ax.fill_between(steps[rows], *_band(of_layers), color=k.colour, alpha=0.13, lw=0)
            ax.annotate(direction, (steps[-1], of_layers[-1].mean()), (4, 0), textcoords="offset points", va="center",
                        color=k.colour, fontsize=7)  # fmt: skip
        ax.set_xlim(0, steps[-1] * 1.18)
        ax.set_ylim(-0.02, 1.02)
        name_axis(ax, x="step", y="μ, mean over layers")

    def mean_size(ax: Axes) -> None:
        logs = np.log(np.maximum(size[rows], 1e-30))
        ax.plot(steps[rows], np.exp(logs.mean(1)), color=SERIES[0], lw=1.6)
        low, high = _band(size[rows])
        ax.fill_between(steps[rows], low, high, color=SERIES[0], alpha=0.13, lw=0)
        _size_axis(ax, np.concatenate([low, high]))
        name_axis(ax, x="step", y="λ/√n, geometric mean over layers")
        ax.set_xlim(0, steps[-1] * 1.03)

    where = words.short(path.setting)
    start, end = away[0].mean(), away[-1].mean()
    first_size, last_size = (math.exp(float(np.log(np.maximum(size[i], 1e-30)).mean())) for i in (0, -1))
    told = f"in {where} over {words.counted(len(steps), 'step')}"
    return Plate(
        name,
        [
            Panel(f"{where}: every layer", f"Paths of {len(found)} layers {told}: {share} against update size.", paths),
            Panel(f"{where}: direction mix", f"{share} {told}: from {start:.2f} to {end:.2f} on average.", mean_mix),
            Panel(
                f"{where}: update size",
                f"Update size λ/√n {told}: from {words.number(first_size)} to {words.number(last_size)} on average.",
                mean_size,
            ),
        ],
        legend,
    )


def _band(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where the middle 80 % of layers lie, at each step: [T, L] to two [T]."""
    low, high = np.quantile(values, (0.1, 0.9), axis=1)
    return low, high


def _size_axis(ax: Axes, values: np.ndarray) -> None:
    positive = values[values > 0]
    low, high = (float(positive.min()) / 1.15, float(positive.max()) * 1.15) if positive.size else (0.1, 1.0)
    ax.set_yscale("log")
    ax.set_ylim(low, high)
    ax.minorticks_off()
    ticks = log_ticks(low, high)
    ax.set_yticks(ticks, [words.tick(t) for t in ticks])
