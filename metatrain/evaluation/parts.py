"""The parts of an evaluation, each the result of one job, kept so that an evaluation that was interrupted goes on."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.util
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from l3rs.io.files import write_atomically
from l3rs.theta import digest
from metatrain.config import Config, UserError
from metatrain.evaluation.environment import environment
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

_FOLDER = "parts"  # in the folder of the evaluation


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
    """Finished parts of an evaluation in files, which the same evaluation finds again.

    It is the same with the same optimizer, configuration and settings, the same code, also of the user's own modules,
    and the same versions and devices. Data files are not looked at.

    Args:
      out: the folder of the evaluation, which need not exist; None keeps nothing.
      optimizer: the evaluated one.
      config: the configuration.
      settings: names of the evaluated settings.
      log: called with a sentence about what is there.

    Attributes:
      found: labels of the parts that were there.
    """

    def __init__(
        self,
        out: Path | None,
        optimizer: LearnedOptimizer | None,
        config: Config,
        settings: Sequence[str],
        log: Callable[[str], None],
    ) -> None:
        self.found: list[str] = []
        self._folder, self._log = None, log
        if out is None:
            return
        identity = {
            "optimizer": optimizer and [digest(optimizer.theta), repr(optimizer.spec), repr(optimizer.guard)],
            "config": config.model_dump(
                mode="json", exclude={"execution", "checkpoint", "logging", "measured", "code"}
            ),
            "plan": config.execution.plan,
            "settings": list(settings),
            "code": [current_code().model_dump(), *map(_source, config.own_code())],
            "environment": {key: value for key, value in environment().items() if key != "date"},
        }
        self._folder = out / _FOLDER / _name(identity)
        if not self._folder.exists() and self._folder.parent.is_dir() and any(self._folder.parent.iterdir()):
            log(f"{self._folder.parent} holds parts of another evaluation, or of one with other code: not used here")

    def kept(self, label: str, job: Job) -> Job:
        """The job; where its part is there, it is not computed again, and else the part is written."""
        if self._folder is None:
            return job
        file = self._folder / f"{_name(label)}.json"

        def run(device: jax.Device) -> Part:
            if file.exists():
                try:
                    part: Part = read_dataclass(file, Part, [name for name in LISTS if name in _FIELDS])
                    self.found.append(label)
                    self._log(f"{label}: done by an earlier start")
                    return part
                except UserError as error:
                    self._log(f"{label}: computed again, because {error}")
            part = job(device)
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(file, json.dumps(finite(dataclasses.asdict(part)), allow_nan=False) + "\n")
            return part

        return run

    def remove(self) -> None:
        """Delete the files, once the results are saved."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            with contextlib.suppress(OSError):  # it holds parts of another evaluation
                self._folder.parent.rmdir()


_FIELDS = {field.name for field in dataclasses.fields(Part)}


def _name(identity: Any) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]


def _source(name: str) -> str:
    """The digest of the file of `package.module:function`; "" where there is none."""
    try:
        spec = importlib.util.find_spec(name.partition(":")[0])
        return hashlib.sha256(Path(spec.origin or "").read_bytes()).hexdigest() if spec else ""
    except Exception:  # of the user's own package; its import is reported where it is needed
        return ""
