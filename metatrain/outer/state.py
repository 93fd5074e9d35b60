"""The state of a run on disk, from which it resumes as if it had never stopped."""

from __future__ import annotations

import hashlib
import itertools
import logging
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from l3rs.io.files import ORBAX_UNFINISHED
from l3rs.io.orbax_limits import check_arrays, check_files
from l3rs.io.orbax_store import saving
from metatrain.config import CodeConfig, UserError
from metatrain.config_errors import reason
from metatrain.outer.strategy import State

_log = logging.getLogger("metatrain")


class Progress(NamedTuple):
    """The part of a run that changes from generation to generation."""

    generation: int  # generations done; the random streams are functions of it and the seed
    failures: int  # generations in a row without a finite fitness
    candidate_steps: int  # inner steps done by all candidates
    seconds: float  # spent in generations, by all processes of the run
    strategy: State


class StateStore:
    """Checkpoints of a run, written atomically by Orbax.

    A save that was interrupted leaves no checkpoint. A checkpoint that cannot be read, or whose values
    do not match their stored digest, is reported, and the one before it is used.

    Args:
      folder: `state/` of the run.
      keep: how many checkpoints to keep.
      code: noted in each checkpoint: which code wrote it.
    """

    def __init__(self, folder: Path, keep: int, code: CodeConfig | None = None) -> None:
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=False)
        self._code = None if code is None else code.model_dump()
        self._folder = folder.absolute()
        self._manager = ocp.CheckpointManager(self._folder, options=options)

    def save(self, progress: Progress) -> None:
        """Write a checkpoint, unless there is one of this generation.

        Raises:
          OSError: the disk is full or the folder cannot be written.
        """
        if progress.generation in self._manager.all_steps():
            return
        leaves = {f"{i:04d}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(progress.strategy))}
        counters = {name: value for name, value in progress._asdict().items() if name != "strategy"}
        items = ocp.args.Composite(
            strategy=ocp.args.PyTreeSave(leaves),
            counters=ocp.args.JsonSave({**counters, "code": self._code, "sha256": _digest(leaves)}),
        )
        with saving(self._folder, sum(leaf.nbytes for leaf in leaves.values())):
            self._manager.save(progress.generation, args=items)

    def restore(self, like: State, *, to_resume: bool = True) -> Progress | None:
        """Read the newest good checkpoint; None if there is no checkpoint at all.

        Args:
          like: a strategy state of the same structure, or its shapes.
          to_resume: set aside newer, damaged checkpoints: the run is going to write these steps again. What killed
            processes left half-written is removed.

        Raises:
          UserError: there are checkpoints, but none can be read.
        """
        for unfinished in self._folder.glob(f"*{ORBAX_UNFINISHED}*") if to_resume else ():
            shutil.rmtree(unfinished, ignore_errors=True)
        steps = sorted(self._manager.all_steps(), reverse=True)
        for step in steps:
            try:
                progress = self._read(step, like)
            except Exception as error:  # Orbax and TensorStore raise many kinds for damaged files
                _log.warning("checkpoint %s is damaged and is not used: %s", self._folder / str(step), reason(error))
                continue
            for newer in steps[: steps.index(step)] if to_resume else ():
                (self._folder / str(newer)).rename(_free(self._folder.parent / f"damaged-state-{newer}"))
            self._manager.reload()
            return progress
        if steps:
            raise UserError(f"{self._folder}: none of the {len(steps)} checkpoints can be read")
        return None

    def close(self) -> None:
        self._manager.close()

    def _read(self, step: int, like: State) -> Progress:
        _check_sizes(self._folder / str(step), like)
        items = ocp.args.Composite(strategy=ocp.args.PyTreeRestore(), counters=ocp.args.JsonRestore())
        restored: Any = self._manager.restore(step, args=items)
        leaves = {name: np.asarray(leaf) for name, leaf in restored["strategy"].items()}
        counters = dict(restored["counters"])
        counters.pop("code", None)
        if counters.pop("sha256") != _digest(leaves):
            raise ValueError("its values do not match their digest")
        expected = [(x.shape, x.dtype) for x in jax.tree.leaves(like)]
        found = [(leaves[name].shape, leaves[name].dtype) for name in sorted(leaves)]
        if found != expected:
            raise ValueError("it belongs to another strategy or another network")
        strategy = jax.tree.unflatten(jax.tree.structure(like), [leaves[name] for name in sorted(leaves)])
        return Progress(strategy=jax.tree.map(jax.numpy.asarray, strategy), **counters)


def _check_sizes(folder: Path, like: State) -> None:
    """Compare what is stored with what the state needs before anything is decoded: others may have written it."""
    leaves = {f"{i:04d}": leaf for i, leaf in enumerate(jax.tree.leaves(like))}
    shapes = {name: leaf.shape for name, leaf in leaves.items()}
    check_files(folder, shapes)
    check_arrays(folder / "strategy", shapes, {name: np.dtype(leaf.dtype).str for name, leaf in leaves.items()})


def _free(path: Path) -> Path:
    """A name that is not in use: folders set aside earlier stay."""
    names = itertools.chain([path], (path.with_name(f"{path.name}-{i}") for i in itertools.count(2)))
    return next(name for name in names if not name.exists())


def _digest(leaves: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(leaves):
        array = leaves[name]
        digest.update(f"{name}{array.dtype.str}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
