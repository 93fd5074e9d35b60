"""The page of a run: its progress and its curves, written again and again while the run goes on."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from pathlib import Path

from markupsafe import Markup

from metatrain.config import Config, UserError, load_config
from metatrain.durations import about
from metatrain.report import formatting
from metatrain.report.history import History
from metatrain.report.html import write_page
from metatrain.trust import refuse_links

_log = logging.getLogger("metatrain")

DRAW_SECONDS = 60.0  # between two drawings, at least

_COUNTS = {
    "lost": "workers lost",
    "duplicated": "shards started twice, because the first took too long",
    "requeued": "candidates evaluated again, because their worker was lost",
    "waited": "waited without any worker",
}

_Charts = list[tuple[str, str, list[tuple[str, Markup]], Markup]]


class Live:
    """Keeps the page of a run up to date, and never stops the run.

    Args:
      folder: of the run.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._next = time.monotonic()
        self._warned = False

    def tick(self) -> None:
        """Call this after every generation; it draws when it is time."""
        if time.monotonic() >= self._next:
            self._draw(lambda: write(self._folder))
            self._next = time.monotonic() + DRAW_SECONDS

    def close(self) -> None:
        """Draw the page one last time: the run has ended, finished or not."""
        self._draw(lambda: write(self._folder, going=False))

    def _draw(self, draw: Callable[[], object]) -> None:
        try:
            draw()
        except Exception as error:  # no failure to draw is worth stopping the run
            if not self._warned:
                _log.warning("the page of %s could not be written: %s", self._folder, error or type(error).__name__)
            self._warned = True


def write(folder: Path, *, going: bool = True) -> Path:
    """Write `report.html` into a run's folder, from its `config.yaml` and `metrics.jsonl`.

    Args:
      folder: of the run.
      going: whether more generations will follow; a run with all its generations is finished in any case.

    Returns:
      The page; it reloads itself every minute while the run goes on.

    Raises:
      UserError: not the folder of a run.
    """
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder} is not a run: it has no config.yaml")
    refuse_links(folder, str(folder))
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
        progress=f"{100 * done / total:.2f}",
        updated=time.strftime("%Y-%m-%d %H:%M"),
        sentence=_sentence(history, config, state),
        facts=_facts(history, config, state),
        charts=_charts(history),
        config=(folder / "config.yaml").read_text(),
    )


def _sentence(history: History, config: Config, state: str) -> str:
    total = config.outer.steps
    if not history.done:
        return "No generation is done yet: the first one includes compilation."
    if state == "finished":
        spent = formatting.duration(history.seconds_spent)
        return f"Finished: {formatting.counted(total, 'generation')} in {spent}."
    progress = f"{history.done:,} of {formatting.counted(total, 'generation')}"
    if state == "stopped":
        return f"Stopped after {progress}; `metatrain resume` continues it."
    left = history.seconds_left(total)
    return f"{progress} done." if left is None else f"{progress} done; about {about(left)} left."


def _facts(history: History, config: Config, state: str) -> list[tuple[str, str]]:
    """Number, and its meaning."""
    if not history.done:
        return []
    facts = [(f"{100 * history.done / config.outer.steps:.0f} %", "of the generations")]
    if (lowest := history.lowest) is not None:
        where = f"generation {lowest.generation:,}, {lowest.horizon:,} steps"
        facts.append((formatting.number(lowest.loss), f"lowest meta-loss so far: {where}"))
    if (trend := history.trend) is not None:
        first, last, span = trend
        change = f"{formatting.number(first)} → {formatting.number(last)}"
        facts.append((change, f"median meta-loss of the first and last {span}"))
    if (rate := history.rate) is not None:
        workers = history["workers"][-1]
        by = (
            f" by {formatting.counted(int(workers), 'worker')}" if state == "running" and math.isfinite(workers) else ""
        )
        facts.append((f"{rate:,.0f}", f"candidate-steps a second{by}"))
    counts = {name: count for name in _COUNTS if (count := history.count(name)) is not None}
    facts += [(about(n) if name == "waited" else f"{n:,.0f}", _COUNTS[name]) for name, n in counts.items()]
    return facts


def _charts(history: History) -> _Charts:
    """Title, caption, legend and picture of each chart."""
    # matplotlib takes a while to import; a run without a page should not pay for it
    from metatrain.report.plates import Plate
    from metatrain.report.run_figures import charts
    from metatrain.report.theme import swatch

    found = charts(history)
    # These are safe as markup: made of our own text and numbers.
    pictures = map(Markup, Plate("run", [chart.panel for chart in found], []).inline())
    return [
        (chart.panel.title, chart.caption, [(label, Markup(swatch(look))) for label, look in chart.legend], picture)
        for chart, picture in zip(found, pictures, strict=True)
    ]
