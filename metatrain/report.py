"""What an evaluation shows: a table, a verdict, and a figure."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from rich.table import Table

from metatrain.evaluate import L3RS, Results

# Okabe and Ito's colours, which the colour-blind can tell apart; L3RS is the strongest of them.
_COLOURS = ("#0072B2", "#56B4E9", "#E69F00", "#009E73", "#CC79A7", "#999999")
_MARKERS = "os^vD*P"


def table(results: Results, setting: str) -> Table:
    """Mean test loss and accuracy of each optimizer at each horizon; the best of a column is bold."""
    horizons, optimizers = results.horizons(), results.optimizers()
    view = Table(title=f"{setting}: test loss (accuracy), mean of {_seeds(results)} seeds")
    view.add_column("optimizer")
    for horizon in horizons:
        view.add_column(f"{horizon} steps", justify="right")
    losses = {(o, h): results.mean(setting, o, h) for o in optimizers for h in horizons}
    best = {h: min(losses[o, h] for o in optimizers) for h in horizons}
    for optimizer in optimizers:
        cells = []
        for horizon in horizons:
            loss = losses[optimizer, horizon]
            cell = f"{loss:.3f} ({100 * results.mean(setting, optimizer, horizon, 'accuracy'):.1f} %)"
            cells.append(f"[bold]{cell}[/bold]" if loss == best[horizon] else cell)
        view.add_row(optimizer, *cells)
    return view


def verdict(results: Results, setting: str) -> str:
    """One sentence with numbers, also when it is bad news."""
    parts = []
    for horizon in results.horizons():
        rivals = [o for o in results.optimizers() if o != L3RS]
        rival = min(rivals, key=lambda o: results.mean(setting, o, horizon))
        ours, theirs = results.mean(setting, L3RS, horizon), results.mean(setting, rival, horizon)
        parts.append(f"{'wins' if ours < theirs else 'loses'} at {horizon} steps ({ours:.3f} / {theirs:.3f} {rival})")
    return f"{setting}: L3RS " + ", ".join(parts) + "."


def figure(results: Results, setting: str, file: Path) -> Path:
    """Test loss and accuracy over the horizon, mean and standard error over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    horizons = results.horizons()
    rivals = strongest(results, setting, len(_COLOURS))
    fig, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for ax, field in zip(axes, ("loss", "accuracy"), strict=True):
        for i, optimizer in enumerate([L3RS, *rivals]):
            values = np.array([[getattr(r, field) for r in results.select(setting, optimizer, h)] for h in horizons])
            error = values.std(1, ddof=1) / np.sqrt(values.shape[1]) if values.shape[1] > 1 else None
            ours = optimizer == L3RS
            ax.errorbar(
                horizons,
                values.mean(1),
                error,
                label="L3RS" if ours else optimizer,
                color="#D55E00" if ours else _COLOURS[(i - 1) % len(_COLOURS)],
                marker=_MARKERS[i % len(_MARKERS)],
                markersize=5,
                linewidth=2.2 if ours else 1.2,
                zorder=3 if ours else 2,
            )
        ax.set_xscale("log")
        ax.set_xticks(horizons, [str(h) for h in horizons])
        ax.minorticks_off()
        ax.set_xlabel("steps of fine-tuning")
        ax.set_ylabel(f"test {field}")
        ax.grid(alpha=0.25)
    axes[0].set_yscale("log")
    for axis_formatter in (axes[0].yaxis.set_major_formatter, axes[0].yaxis.set_minor_formatter):
        axis_formatter("{x:.3g}")
    axes[1].legend(frameon=False)
    count = len(results.optimizers()) - 1
    words = f"the best {len(rivals)} of {count} baselines, " if len(rivals) < count else "baselines "
    fig.suptitle(f"{setting}: {words}tuned for every horizon")
    file.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(file, dpi=150)
    plt.close(fig)
    return file


def strongest(results: Results, setting: str, count: int) -> list[str]:
    """All baselines when they are no more than `count`; else the best schedule of each family, and of
    these the `count` that are most often ahead: the lowest mean rank by test loss over the horizons."""
    labels = [label for label in results.optimizers() if label != L3RS]
    if len(labels) <= count:
        return labels
    losses = np.array([[results.mean(setting, label, h) for h in results.horizons()] for label in labels])
    ranks = np.where(np.isfinite(losses), losses, np.inf).argsort(0).argsort(0).mean(1)
    families: dict[str, str] = {}
    for _, label in sorted(zip(ranks.tolist(), labels, strict=True)):
        families.setdefault(label.partition("/")[0], label)
    return list(families.values())[:count]


def _seeds(results: Results) -> int:
    return len({r.seed for r in results.records})
