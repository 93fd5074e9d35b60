"""From the state of a run to the optimizer that is deployed.

A run keeps the form of its optimizer in `optimizer.json`, so that no task has to be built to export it: a task may be
code, and the run may belong to another user.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

import l3rs
from l3rs.io.files import read_regular, write_atomically
from l3rs.io.manifest import MAX_MANIFEST_BYTES, parse_spec
from l3rs.spec import Theta
from metatrain.config import Config, UserError, as_written, load_config, portable
from metatrain.outer.state import Progress, StateStore
from metatrain.outer.store import RunFolder, run_folder
from metatrain.outer.strategy import make_strategy, state_like
from metatrain.trust import refuse_links

_FILE = "optimizer.json"


class Form(NamedTuple):
    """What a run's optimizer consists of, apart from its meta-parameters."""

    spec: l3rs.Spec
    task: str  # names of the tasks that it is meta-trained on


def export(folder: str | Path, destination: str | Path, results: Mapping[str, Any] | None = None) -> Path:
    """Write the optimizer of a run's newest checkpoint, whether the run is finished or not. No task is built.

    Args:
      folder: the run; a folder or a URL.
      destination: the folder to create.
      results: measurements of the optimizer, stored in its `info`; see `Results.summary`.

    Raises:
      UserError: not a run's folder, or it has no checkpoint yet.
      L3RSError: the destination exists.
    """
    with run_folder(folder, to_write=False) as opened:
        if not (opened.path / "config.yaml").is_file():
            raise UserError(f"{opened.name} is not a run: it has no config.yaml")
        refuse_links(opened.path, opened.name)
        config = load_config(opened.path / "config.yaml")
        if not (opened.path / "state").is_dir():
            raise UserError(f"{opened.name} has no checkpoint yet")
        form = _read_form(opened)
        strategy = make_strategy(config.outer, l3rs.init_meta_params(jax.random.key(0), form.spec))
        like = state_like(strategy, form.spec)
        store = StateStore(opened.path / "state", config.checkpoint.keep)
        try:
            progress = store.restore(like, to_resume=False)
        finally:
            store.close()
        if progress is None:
            raise UserError(f"{opened.name} has no checkpoint yet")
        return save_optimizer(config, form, progress, strategy.mean(progress.strategy), Path(destination), results)


def save_optimizer(
    config: Config,
    form: Form,
    progress: Progress,
    theta: Theta,
    destination: Path,
    results: Mapping[str, Any] | None = None,
    *,
    overwrite: bool = False,
) -> Path:
    """Write the deployable optimizer with meta-parameters `theta`; returns its folder."""
    info = {
        "name": config.name,
        "task": form.task,
        "horizon": config.outer.horizon.model_dump(include={"min", "max"}),
        "generations": progress.generation,
        "candidate_steps": progress.candidate_steps,
        "seconds": round(progress.seconds, 1),
        "config": portable(as_written(config)),
    }
    if results is not None:
        info["results"] = dict(results)
    return l3rs.save(destination, theta, form.spec, info, overwrite=overwrite)


def write_form(folder: Path, form: Form) -> None:
    """Write `optimizer.json` into a run's folder."""
    text = json.dumps({"spec": form.spec.to_json(), "task": form.task}, indent=1) + "\n"
    write_atomically(folder / _FILE, text)


def _read_form(folder: RunFolder) -> Form:
    file = folder.path / _FILE
    try:
        data = json.loads(read_regular(file, MAX_MANIFEST_BYTES))
    except FileNotFoundError:
        raise UserError(
            f"{folder.name} has no {_FILE}: an earlier version began it; resume it with this one, then export it"
        ) from None
    except OSError as error:
        raise UserError(f"{folder.name}: {_FILE} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError):
        raise UserError(f"{folder.name}: {_FILE} is damaged: it is not JSON") from None
    spec = data.get("spec") if isinstance(data, dict) else None
    if not isinstance(spec, dict) or not isinstance(data.get("task"), str):
        raise UserError(f"{folder.name}: {_FILE} is damaged: it must hold a spec and the name of a task")
    return Form(parse_spec(spec, file), data["task"][:1000])
