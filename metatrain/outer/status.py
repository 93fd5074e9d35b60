"""How far a run is, read from its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from metatrain.config import UserError, load_config
from metatrain.outer.lock import BusyError, run_lock
from metatrain.outer.metrics import read_metrics, seconds_left
from metatrain.trust import refuse_links

_SHOWN = ("seconds", "meta_loss_mean", "candidate_steps_per_s", "workers")  # keys of a line of metrics.jsonl


def local_status(folder: Path, name: str) -> str:
    """One line on a run in a folder of this machine: its state, and what it has computed.

    Raises:
      UserError: not a run's folder.
    """
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{name} is not a run: it has no config.yaml")
    refuse_links(folder, name)
    load_config(folder / "config.yaml")  # a damaged one is refused before there are metrics, too
    try:
        with run_lock(folder, name):
            state = "finished" if (folder / "optimizer").is_dir() else "stopped"
    except BusyError:
        state = "running"
    return progress(folder, name, state, going=state == "running") or f"{name}: {state}, nothing computed yet"


def progress(folder: Path, name: str, state: str, *, going: bool) -> str | None:
    """One line from a run's metrics; None if there are none yet.

    Args:
      folder: of the run.
      name, state: what the line starts with.
      going: whether the run is computing, so that time left has a meaning.
    """
    lines = [line for line in read_metrics(folder / "metrics.jsonl") if _is_shown(line)]
    if not lines:
        return None
    last, saved = lines[-1], folder / "config.yaml"
    total = load_config(saved).outer.steps if saved.is_file() else None
    done = last["generation"] + 1
    left = ""
    if going and total is not None:
        seconds = seconds_left([(line["seconds"], line.get("compiled") is True) for line in lines], total - done)
        left = "" if seconds is None else f", about {seconds:,.0f} s left"
    loss = "not finite" if last["meta_loss_mean"] is None else f"{last['meta_loss_mean']:.4f}"
    return (
        f"{name}: {state}, generation {done}/{total or '?'}, meta-loss {loss}, "
        f"{last['candidate_steps_per_s']:,.0f} candidate-steps/s, {last['workers']} workers{left}"
    )


def _is_shown(line: dict[str, Any]) -> bool:
    """Whether a line of a log, which may be damaged, has the numbers that the status shows."""
    values = {key: line.get(key) for key in _SHOWN}
    if values["meta_loss_mean"] is None and "meta_loss_mean" in line:
        values["meta_loss_mean"] = 0.0  # no candidate had a finite loss
    return all(type(value) in (int, float) for value in values.values())
