"""How far a run is, read from its folder or from its driver's log."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from metatrain.config import UserError, load_config
from metatrain.log_lines import read_generation_line
from metatrain.outer.lock import is_locked
from metatrain.outer.metrics import read_metrics, seconds_left
from metatrain.trust import refuse_links

_SHOWN = ("seconds", "meta_loss_mean", "candidate_steps_per_s", "workers")  # keys of a line of metrics.jsonl


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """A run at a moment.

    Attributes:
      name: of the run, as the user gave it.
      state: running, finished, stopped; or the state of its job.
      going: whether it is computing, so that time left has a meaning.
      metrics: the lines of its `metrics.jsonl`.
      total: generations of the run; None if unknown.
      updated: when the last line was written, seconds since 1970; None if unknown.
    """

    name: str
    state: str
    going: bool
    metrics: Sequence[dict[str, Any]]
    total: int | None
    updated: float | None = None

    @property
    def done(self) -> int:
        """Generations that are done."""
        return int(self.metrics[-1]["generation"]) + 1 if self.metrics else 0

    @property
    def seconds_left(self) -> float | None:
        """The time left, at the pace of the recent generations; None if it is not known or the run is not going."""
        if not self.going or self.total is None or not self.metrics:
            return None
        generations = [(line["seconds"], line.get("compiled") is True) for line in self.metrics]
        return seconds_left(generations, self.total - self.done)

    def line(self) -> str:
        """One line on its state and what it has computed."""
        if not self.metrics:
            return f"{self.name}: {self.state}, nothing computed yet"
        last, left = self.metrics[-1], self.seconds_left
        loss = "not finite" if last["meta_loss_mean"] is None else f"{last['meta_loss_mean']:.4f}"
        return (
            f"{self.name}: {self.state}, generation {self.done}/{self.total or '?'}, meta-loss {loss}, "
            f"{last['candidate_steps_per_s']:,.0f} candidate-steps/s, {last['workers']} workers"
            + ("" if left is None else f", about {left:,.0f} s left")
        )


def local_snapshot(folder: Path, name: str) -> Snapshot:
    """A run in a folder of this machine.

    Raises:
      UserError: not a run's folder, or its configuration is damaged.
    """
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{name} is not a run: it has no config.yaml")
    refuse_links(folder, name)
    going = is_locked(folder)
    found = folder_snapshot(folder, name, "running" if going else "stopped", going=going)
    # A run whose outer.steps has grown keeps the optimizer that it had, until it has finished again.
    unfinished = found.metrics and found.done < (found.total or 0)
    if going or unfinished or not (folder / "optimizer").is_dir():
        return found
    return dataclasses.replace(found, state="finished")


def folder_snapshot(folder: Path, name: str, state: str, *, going: bool) -> Snapshot:
    """A run from its folder, which need not be there; see `Snapshot`."""
    file, saved = folder / "metrics.jsonl", folder / "config.yaml"
    metrics = [line for line in read_metrics(file) if _is_shown(line)]
    total = load_config(saved).outer.steps if saved.is_file() else None
    return Snapshot(name, state, going, metrics, total, file.stat().st_mtime if metrics else None)


def logged_snapshot(log: str, name: str, state: str, *, going: bool) -> Snapshot:
    """A run from what its driver has logged, where its folder cannot be read; see `Snapshot`."""
    found = [line for text in log.splitlines() if (line := read_generation_line(text)) is not None]
    metrics = [line for line, _ in found if _is_shown(line)]
    return Snapshot(name, state, going, metrics, found[-1][1] if found else None)


def _is_shown(line: dict[str, Any]) -> bool:
    """Whether a line of a log, which may be damaged, has the numbers that the status shows."""
    values = {key: line.get(key) for key in _SHOWN}
    if values["meta_loss_mean"] is None and "meta_loss_mean" in line:
        values["meta_loss_mean"] = 0.0  # no candidate had a finite loss
    return all(type(value) in (int, float) for value in values.values())
