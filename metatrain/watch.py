"""`metatrain status --watch`: a run's progress as a small live screen."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from metatrain.durations import about
from metatrain.outer.status import Snapshot

LOOK_SECONDS = 2.0  # between two looks at the run
_BARS = "▁▂▃▄▅▆▇█"
_COUNTS = {"lost": "lost", "duplicated": "shards started twice", "requeued": "candidates requeued"}
_RECENT = 20  # generations of a median
_LATE = 10.0  # times a recent generation's duration, and at least
_LATE_SECONDS = 60.0  # so long without a new generation, before the screen points it out


def watch(read: Callable[[], Snapshot], console: Console | None = None) -> None:
    """Show a run until it is not going any more, or until Ctrl-C.

    Without a terminal, a line is printed whenever there is something new.

    Args:
      read: reads the run.
      console: where to show it.
    """
    console = console or Console(highlight=False, markup=False)
    snapshot = read()
    try:
        if console.is_terminal:
            with Live(screen(snapshot, time.time()), console=console, auto_refresh=False) as live:
                while snapshot.going:
                    time.sleep(LOOK_SECONDS)
                    snapshot = read()
                    live.update(screen(snapshot, time.time()), refresh=True)
        else:
            shown = None
            while True:
                if (line := snapshot.line()) != shown:
                    console.print(line, soft_wrap=True)
                    shown = line
                if not snapshot.going:
                    return
                time.sleep(LOOK_SECONDS)
                snapshot = read()
    except KeyboardInterrupt:  # the screen ends, the run does not
        return


def screen(run: Snapshot, now: float) -> RenderableType:
    """The screen of a moment.

    Args:
      run: the run.
      now: seconds since 1970.
    """
    rows = Table.grid(padding=(0, 2))
    rows.add_column(style="dim", no_wrap=True)
    rows.add_column()
    for title, value in _rows(run, now):
        rows.add_row(title, value)
    total = run.total or max(run.done, 1)
    progress = Table.grid(padding=(0, 2))
    left = run.seconds_left
    progress.add_row(
        ProgressBar(total=total, completed=run.done, width=40),
        f"{run.done:,}/{run.total:,}" if run.total else f"{run.done:,}",
        f"{run.done / total:.0%}",
        "" if left is None else f"about {about(left)} left",
    )
    foot = "Ctrl-C ends this screen, not the run" if run.going else f"the run is {run.state}"
    head = Text.assemble((run.name, "bold"), f", {run.state}")
    return Panel(Group(progress, "", rows), title=head, title_align="left", subtitle=foot, subtitle_align="left")


def _rows(run: Snapshot, now: float) -> list[tuple[str, RenderableType]]:
    if not run.metrics:
        return [("", "nothing computed yet: the first generation includes compilation")]
    last, losses = run.metrics[-1], _finite(run.metrics, "meta_loss_mean")
    rows: list[tuple[str, RenderableType]] = []
    if losses:
        median = statistics.median(losses[-_RECENT:])
        rows.append(("meta-loss", f"{losses[-1]:.4f}; median of the last {min(_RECENT, len(losses))}: {median:.4f}"))
        rows.append(("", sparkline(losses, 40)))
    if best := [line for line in run.metrics if line.get("meta_loss_best") is not None]:
        lowest = min(best, key=lambda line: line["meta_loss_best"])
        rows.append(("lowest", f"{lowest['meta_loss_best']:.4f} in generation {lowest['generation']:,}"))
    if without := len(run.metrics) - len(losses):
        rows.append(("", Text(f"{without:,} generations without a finite meta-loss", "yellow")))
    seconds = statistics.median(line["seconds"] for line in run.metrics[-_RECENT:])
    rows.append(
        ("speed", f"{last['candidate_steps_per_s']:,.0f} candidate-steps/s, {seconds:.3g} s a generation, "
                  f"horizon {last.get('horizon', '?')}")
    )  # fmt: skip
    counts = [f"{last[key]:,} {meaning}" for key, meaning in _COUNTS.items() if last.get(key)]
    if last.get("waited"):
        counts.append(f"waited {about(last['waited'])} for workers")
    rows.append(("workers", "; ".join([f"{last['workers']:,}", *counts])))
    if run.updated is not None:
        age = max(now - run.updated, 0.0)
        late = run.going and age > max(_LATE * seconds, _LATE_SECONDS)
        text = f"{about(age)} ago" if age >= 1 else "now"
        rows.append(("last news", Text(f"{text}: longer than usual; see its log", "yellow") if late else text))
    return rows


def sparkline(values: Sequence[float], width: int) -> str:
    """The course of values as a line of bars, each the median of as many neighbours as needed."""
    width = min(width, len(values))
    cuts = [round(i * len(values) / width) for i in range(width + 1)]
    points = [statistics.median(values[a:b]) for a, b in itertools.pairwise(cuts)]
    low, high = min(points), max(points)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BARS[round((point - low) * scale)] for point in points)


def _finite(metrics: Sequence[dict[str, Any]], key: str) -> list[float]:
    return [line[key] for line in metrics if line.get(key) is not None]
