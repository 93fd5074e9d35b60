"""The parts of an evaluation, each the result of one job, kept so that an evaluation that was interrupted goes on."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from l3rs.io.files import write_atomically
from metatrain.config import UserError
from metatrain.evaluation.learned import LearnedOptimizer
from metatrain.evaluation.records import (
    LISTS,
    CoefficientPath,
    Curve,
    DecisionPath,
    MultiplierGrid,
    Record,
    SwitchHistory,
    finite,
)
from metatrain.evaluation.results_file import read_dataclass
from metatrain.outer.code import current_code

FOLDER = "parts"  # in the folder of the evaluation
_NAME_LENGTH = 32  # hexadecimal digits


@dataclasses.dataclass
class Part:
    """The results of one job, or of several; see `Results` for its fields."""

    records: list[Record] = dataclasses.field(default_factory=list)
    curves: list[Curve] = dataclasses.field(default_factory=list)
    paths: list[DecisionPath] = dataclasses.field(default_factory=list)
    coefficients: list[CoefficientPath] = dataclasses.field(default_factory=list)
    switches: list[SwitchHistory] = dataclasses.field(default_factory=list)
    multipliers: list[MultiplierGrid] = dataclasses.field(default_factory=list)
    tuning: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)  # {setting: {label: …}}
    notes: list[str] = dataclasses.field(default_factory=list)

    def add(self, other: Part) -> None:
        """Append the results of another job."""
        for field in dataclasses.fields(self):
            if field.name != "tuning":
                getattr(self, field.name).extend(getattr(other, field.name))
        for setting, grids in other.tuning.items():
            self.tuning.setdefault(setting, {}).update(grids)


Job = Callable[[jax.Device], Part]


class Parts:
    """Finished parts of an evaluation in files, found again by the same evaluation with the same code.

    Args:
      folder: which need not exist; None keeps nothing.
      optimizer: the evaluated one.
      config: the resolved configuration.

    Attributes:
      found: labels of the parts that were there.
    """

    def __init__(self, folder: Path | None, optimizer: LearnedOptimizer | None, config: Mapping[str, Any]) -> None:
        identity = {"code": current_code().model_dump(), "optimizer": _digest(optimizer), "config": config}
        self._folder, self._identity = folder, json.dumps(identity, sort_keys=True)
        self.found: list[str] = []

    def kept(self, label: str, job: Job) -> Job:
        """The job; where its part is there, it is not computed again, and else it leaves it there."""
        if self._folder is None:
            return job
        name = hashlib.sha256(f"{label}\0{self._identity}".encode()).hexdigest()[:_NAME_LENGTH]
        file = self._folder / f"{name}.json"

        def run(device: jax.Device) -> Part:
            with contextlib.suppress(UserError):  # none, or a damaged one
                part: Part = read_dataclass(file, Part, [name for name in LISTS if name in _FIELDS])
                self.found.append(label)
                return part
            part = job(device)
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(file, json.dumps(finite(dataclasses.asdict(part)), allow_nan=False) + "\n")
            return part

        return run


def remove_parts(folder: Path) -> None:
    """Delete the parts in a folder, and the folder unless it holds something else."""
    for file in folder.glob("*.json"):
        if re.fullmatch(f"[0-9a-f]{{{_NAME_LENGTH}}}", file.stem):
            file.unlink()
    with contextlib.suppress(OSError):
        folder.rmdir()


_FIELDS = {field.name for field in dataclasses.fields(Part)}


def _digest(optimizer: LearnedOptimizer | None) -> str:
    if optimizer is None:
        return ""
    digest = hashlib.sha256(repr((optimizer.spec, optimizer.guard)).encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(optimizer.theta):
        digest.update(jax.tree_util.keystr(path).encode() + np.asarray(leaf).tobytes())
    return digest.hexdigest()
