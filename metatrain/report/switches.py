"""The optimizers that IOMT chose: its training loss, in the colour of the optimizer of each stage."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes

from l3rs import L3RSError
from l3rs.baselines.iomt import Stage
from metatrain.evaluation.records import SwitchHistory
from metatrain.report import formatting
from metatrain.report.plates import Panel, Plate, name_axis
from metatrain.report.theme import INK, MUTED, SERIES, Look

_RUG = 0.06  # of a panel's height: the strip below the loss that shows the stages


def plate(histories: Sequence[SwitchHistory], name: str) -> Plate:
    """A panel per variant of IOMT. The dotted line is the end of the random start, a cross is a stage that diverged.

    Args:
      histories: of one setting.
      name: of the plate.
    """
    chosen = dict.fromkeys(stage["optimizer"] for history in histories for stage in history.stages)
    looks = {optimizer: Look(SERIES[i % len(SERIES)], "", 1.6) for i, optimizer in enumerate(sorted(chosen))}
    return Plate(name, [_panel(history, looks) for history in histories], list(looks.items()))


def plot_history(history: Sequence[Stage], losses: npt.ArrayLike, folder: str | Path, title: str = "a run") -> Path:
    """Draw one run of IOMT, see `plate`.

    Args:
      history, losses: of a `Result`, or of a controller; losses are [steps + 1].
      folder: where switches.png and switches.svg are written; it is created.
      title: of the panel.

    Returns:
      The PNG file.

    Raises:
      L3RSError: there are no stages, or losses of another length.
    """
    values = np.asarray(losses, np.float64)
    if not history or values.shape != (history[-1].step + history[-1].steps + 1,):
        raise L3RSError(f"{len(history)} stages and losses {values.shape} do not belong to one run of [steps + 1]")
    run = SwitchHistory(title, "iomt", [stage._asdict() for stage in history], values.tolist())
    return plate([run], "switches").save(Path(folder))


def _panel(history: SwitchHistory, looks: dict[str, Look]) -> Panel:
    stages = [Stage(**stage) for stage in history.stages]
    losses = np.array([np.nan if loss is None else loss for loss in history.losses])

    def draw(ax: Axes) -> None:
        shown = losses[np.isfinite(losses)]
        for optimizer, group in itertools.groupby(
            stages, lambda stage: stage.optimizer
        ):  # drawn in one piece, without seams
            first, *others = group
            last, colour = (others or [first])[-1], looks[optimizer].colour
            end = last.step + last.steps
            ax.plot(np.arange(first.step, end + 1), losses[first.step : end + 1], color=colour, lw=1)
            ax.axvspan(first.step, end, 0, _RUG, color=colour, lw=0)
        for stage in stages:
            if stage.diverged:
                middle = stage.step + stage.steps / 2
                ax.plot(middle, 1.5 * _RUG, "x", color=INK, ms=4, transform=ax.get_xaxis_transform())
        if (start := next((stage.step for stage in stages if stage.chosen == "surrogate"), 0)) > 0:
            ax.axvline(start, color=MUTED, ls=":", lw=0.8)
        if len(shown) and shown.min() > 0:
            ax.set_yscale("log")
            low = shown.min()
            high = min(shown.max(), 10 * float(np.median(shown)))  # a stage that diverged may leave the panel
            ax.set_ylim(low / (high / low) ** (2 * _RUG), 1.1 * high)
        name_axis(ax, x="step", y="training loss")

    name = formatting.optimizer(history.optimizer)
    counts = Counter(stage.optimizer for stage in stages).most_common()
    diverged = sum(stage.diverged for stage in stages)
    message = f"{name} in {formatting.short(history.setting)}: {len(stages)} stages, " + ", ".join(
        f"{count} of {optimizer}" for optimizer, count in counts
    )
    title = f"{name} in {formatting.short(history.setting)}"
    return Panel(title, f"{message}{f', {diverged} diverged' if diverged else ''}.", draw)
