"""The metrics of a run: one line of `metrics.jsonl` per generation, and further sinks."""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from l3rs.io.files import write_atomically

if TYPE_CHECKING:
    from metatrain.inner.population import Draw  # imports JAX, which those who read metrics do without
    from metatrain.outer.sinks import Sink

# What evaluators on workers count from the start of the process; in `metrics.jsonl`, from the start of the run.
COUNTS = ("lost", "duplicated", "requeued", "stale", "rejected", "waited")
_MAX_BYTES = 1 << 30
_MAX_LINE = 1 << 20  # 1,000 samples of a generation are 80 KB
_RECENT = 50  # generations whose duration the estimate of the time left uses


class Metrics:
    """Writes `metrics.jsonl` and hands each generation's numbers to the sinks.

    Args:
      folder: the run's folder.
      generation: the generation that comes next. Lines of this and later generations are dropped:
        a resumed run writes them again.
      sinks: TensorBoard and others.
    """

    def __init__(self, folder: Path, generation: int, sinks: Sequence[Sink] = ()) -> None:
        path = folder / "metrics.jsonl"
        self._before: dict[str, Any] = {}  # the line before `generation`
        if path.exists():
            kept = [line for line in _lines(path) if _is_before(line, generation)]
            write_atomically(path, "".join(f"{line}\n" for line in kept))
            self._before = (_parse(kept[-1]) or {}) if kept else {}
        self._file = path.open("a", encoding="utf-8")
        self._sinks = sinks

    def write(self, line: dict[str, Any]) -> dict[str, Any]:
        """Write a generation; returns its line, whose counts go back to the start of the run."""
        earlier = {name: self._before.get(name) for name in COUNTS if name in line}
        line = {**line, **{name: line[name] + count for name, count in earlier.items() if _is_number(count)}}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        figures = {name: value for name, value in line.items() if name != "generation" and _is_number(value)}
        for sink in self._sinks:
            sink.write(line["generation"], figures)
        return line

    def close(self) -> None:
        self._file.close()
        for sink in self._sinks:
            sink.close()


def describe_draws(draws: Sequence[Draw], losses: np.ndarray) -> dict[str, Any]:
    """What a line of metrics says about the draws of a generation and the losses in them.

    With one draw, `task`, `init` and `horizon` are its own. With several, `samples` lists these and the mean loss of
    each, `horizon` is the mean of theirs, `meta_loss_mean` the mean of their means, and `meta_loss_best` the lowest
    mean loss of a member that is finite in every draw.

    Args:
      draws: of the generation.
      losses: float32 [draws, population].
    """
    rows = [row[np.isfinite(row)] for row in losses]
    means = [float(row.mean()) if row.size else None for row in rows]
    each = [
        {"horizon": draw.horizon, "task": draw.task, "init": int(draw.sample.init), "meta_loss_mean": mean}
        for draw, mean in zip(draws, means, strict=True)
    ]
    finite = sum(int(row.size) for row in rows)
    if len(draws) == 1:
        best = float(rows[0].min()) if finite else None
        return {**each[0], "meta_loss_best": best, "finite": finite}
    known = [mean for mean in means if mean is not None]
    members = losses.mean(0)
    members = members[np.isfinite(members)]
    return {
        "horizon": sum(draw.horizon for draw in draws) / len(draws),
        "samples": each,
        "meta_loss_mean": sum(known) / len(known) if known else None,
        "meta_loss_best": float(members.min()) if members.size else None,
        "finite": finite,
    }


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """The readable lines of a `metrics.jsonl`, in the order of the file; none if there is no file.

    A log must not stop a run: a line that is damaged, half-written or of another type is skipped.
    Files of earlier versions call `theta_norm` by its old name, `psi_norm`.
    """
    if not file.is_file():
        return []
    lines = [line for text in _lines(file) if (line := _parse(text)) is not None]
    return [{"theta_norm" if key == "psi_norm" else key: value for key, value in line.items()} for line in lines]


def seconds_left(generations: Iterable[tuple[float, bool]], remaining: int, uncompiled: int = 0) -> float | None:
    """The time that the rest of a run will take.

    Args:
      generations: (seconds, whether that includes compilation) of each generation so far.
      remaining: generations.
      uncompiled: tasks that are still to be compiled.

    Returns:
      Seconds, at the pace of the recent generations without compilation; None as long as there is none.
    """
    known = [(seconds, compiled) for seconds, compiled in generations if math.isfinite(seconds)]
    recent = [*itertools.islice((s for s, compiled in reversed(known) if not compiled), _RECENT)]
    if not recent:
        return None
    pace = statistics.fmean(recent)
    extra = [max(seconds - pace, 0.0) for seconds, compiled in known if compiled]
    return pace * remaining + uncompiled * (statistics.fmean(extra) if extra else 0.0)


def _lines(file: Path) -> Iterator[str]:
    """The lines of a file, which may be of any size and without line breaks."""
    left = _MAX_BYTES
    with file.open("rb") as opened:
        while left > 0 and (line := opened.readline(_MAX_LINE)):
            left -= len(line)
            yield line.decode(errors="replace").rstrip("\n")


def _is_before(text: str, generation: int) -> bool:
    line = _parse(text)
    return line is not None and line["generation"] < generation


def _parse(text: str) -> dict[str, Any] | None:
    """A line with a whole number as its generation, or None."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return line if isinstance(line, dict) and type(line.get("generation")) is int else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
