"""The records of an evaluation: plain data, and the file that holds them, `results.json`."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pydantic

from l3rs.baselines.iomt import Stage
from l3rs.baselines.mada import DOMAIN
from l3rs.io.files import write_atomically
from metatrain.evaluation.results_file import read_results

L3RS = "l3rs"
NO_OPTIMIZER = "-"  # in place of a checkpoint: compare the baselines only

_STAGE = pydantic.TypeAdapter(Stage)


@dataclasses.dataclass(frozen=True)
class Record:
    """One training run."""

    setting: str
    optimizer: str  # "l3rs", "adam/cosine", …
    horizon: int  # inner steps
    seed: int
    loss: float  # on test
    accuracy: float  # on test
    seconds: float  # wall time of the compiled call that ran it, divided by the number of runs in that call
    hparams: dict[str, float]
    auc: float  # mean test loss along the run: the area under the curve over its length


@dataclasses.dataclass(frozen=True)
class Speedup:
    """How many times L3RS's steps a baseline needs for the accuracy that L3RS has at `horizon`.

    The ratio of means over seeds, and its paired 95 % interval. None means infinite: the baseline does not reach
    that accuracy within the longest horizon. With fewer than five seeds both ends are None.
    """

    setting: str
    baseline: str
    horizon: int
    steps_ratio: float | None
    low: float | None
    high: float | None


@dataclasses.dataclass(frozen=True)
class Curve:
    """Test loss and accuracy along a run, means over seeds; None where the value is NaN or infinite."""

    setting: str
    optimizer: str
    horizon: int
    steps: list[int]
    loss: list[float | None]
    accuracy: list[float | None]

    def __post_init__(self) -> None:
        _check_lengths("a curve", len(self.steps), self.loss, self.accuracy)


@dataclasses.dataclass(frozen=True)
class DecisionPath:
    """The decisions of L3RS at every step of one run: mixing weights μ and step sizes λ. T ≥ 1 steps, L ≥ 1 layers."""

    setting: str
    horizon: int
    layers: list[str]  # [L]
    shapes: list[list[int]]  # [L]
    directions: list[str]  # [P]
    mix: list[list[list[float]]]  # [T][L][P]
    step_rms: list[list[float]]  # [T][L]: λ / √n, the root mean square of a layer's update

    def __post_init__(self) -> None:
        _check_lengths("a path", len(self.layers), self.shapes, *self.mix, *self.step_rms)
        _check_lengths("a path", len(self.directions), *(weights for layers in self.mix for weights in layers))
        _check_lengths("a path", len(self.mix), self.step_rms)
        if not (self.mix and self.layers and self.directions) or any(n < 0 for shape in self.shapes for n in shape):
            raise ValueError("a path has no steps, no layers or no directions, or a negative size")


@dataclasses.dataclass(frozen=True)
class CoefficientPath:
    """The coefficients that MADA or HyperAdam learned in one run, at some of its steps."""

    setting: str
    optimizer: str
    steps: list[int]  # [K]
    values: dict[str, list[float]]  # {coefficient: [K]}, K ≥ 1

    def __post_init__(self) -> None:
        _check_lengths("coefficients", len(self.steps), *self.values.values())
        if not self.steps or not set(self.values) <= set(DOMAIN):
            raise ValueError(f"coefficients have no steps, or other names than {', '.join(DOMAIN)}")


@dataclasses.dataclass(frozen=True)
class SwitchHistory:
    """The stages of one run of IOMT, and its training loss."""

    setting: str
    optimizer: str
    stages: list[dict[str, Any]]  # the fields of `l3rs.baselines.iomt.Stage`
    losses: list[float | None]  # [steps + 1]: before the first step, and after each

    def __post_init__(self) -> None:
        stages = [_validate(_STAGE, stage, "stages") for stage in self.stages]
        if not stages or any(stage.step < 0 or stage.steps < 1 for stage in stages):
            raise ValueError("a history has no stages, or one without steps")
        _check_lengths("a history", max(stage.step + stage.steps for stage in stages) + 1, self.losses)


@dataclasses.dataclass(frozen=True)
class Cost:
    """The cost of a training step, measured with nothing else running."""

    setting: str
    optimizer: str
    seconds_a_step: float  # of a whole training step: the gradient and the update
    state_floats_a_parameter: float

    def __post_init__(self) -> None:
        if not 0 < self.seconds_a_step < math.inf:
            raise ValueError(f"a cost has {self.seconds_a_step} seconds a step")


@dataclasses.dataclass(frozen=True)
class MultiplierGrid:
    """L3RS with all its updates multiplied by a factor: which factor is best on inner_valid, and its test loss."""

    setting: str
    horizon: int
    multipliers: list[float]  # [M]
    inner_valid_loss: list[float | None]  # [M], mean over seeds; None where it is NaN or infinite
    best: float  # the multiplier with the lowest inner_valid loss
    loss: float  # mean over seeds, on test, with the best multiplier
    accuracy: float

    def __post_init__(self) -> None:
        _check_lengths("a grid of multipliers", len(self.multipliers), self.inner_valid_loss)


@dataclasses.dataclass(frozen=True)
class Grid:
    """How a learning rate was tuned; see `tuning.search`."""

    learning_rate: list[float]
    inner_valid_loss: list[float | None]
    seeds: int
    chosen: float
    at_edge: bool

    def __post_init__(self) -> None:
        _check_lengths("a grid", len(self.learning_rate), self.inner_valid_loss)


class RecordTable:
    """Records, looked up by setting, optimizer and horizon."""

    records: Sequence[Record]

    def __init__(self, records: Sequence[Record]) -> None:
        self.records = records

    def values(self, setting: str, optimizer: str, horizon: int, field: str = "loss") -> np.ndarray:
        """`field` of each seed's record, float [S]; empty where there is no such run."""
        return np.array([getattr(record, field) for record in self._index.get((setting, optimizer, horizon), [])])

    def mean(self, setting: str, optimizer: str, horizon: int, field: str = "loss") -> float:
        """Mean of `field` over seeds."""
        return float(np.mean(self.values(setting, optimizer, horizon, field)))

    def accuracy_curve(self, setting: str, optimizer: str) -> np.ndarray:
        """Test accuracies [S, H] of the runs of each horizon."""
        return np.stack([self.values(setting, optimizer, h, "accuracy") for h in self.horizons()], axis=1)

    def optimizers(self) -> list[str]:
        return self._names["optimizer"]

    def baselines(self) -> list[str]:
        return [label for label in self.optimizers() if label != L3RS]

    def horizons(self) -> list[int]:
        return sorted(self._names["horizon"])

    def settings(self) -> list[str]:
        return self._names["setting"]

    def seeds(self) -> int:
        """The number of seeds."""
        return len(self._names["seed"])

    @functools.cached_property
    def _index(self) -> dict[tuple[str, str, int], list[Record]]:
        found: dict[tuple[str, str, int], list[Record]] = {}
        for record in self.records:
            found.setdefault((record.setting, record.optimizer, record.horizon), []).append(record)
        return found

    @functools.cached_property
    def _names(self) -> dict[str, list[Any]]:
        fields = ("setting", "optimizer", "horizon", "seed")
        return {field: list(dict.fromkeys(getattr(r, field) for r in self.records)) for field in fields}


def setting_name(setting: str) -> str:
    """`A` of `A: resnet8(imagenet → places)`; nothing where it has no such prefix."""
    return setting.partition(": ")[0] if ": " in setting else ""


_Horizon = Annotated[str, pydantic.Field(pattern=r"^[1-9][0-9]{0,14}$")]
_TUNING = pydantic.TypeAdapter(dict[str, dict[str, dict[_Horizon, Grid]]])


@dataclasses.dataclass(frozen=True)
class Results(RecordTable):
    """The result of `evaluate`; `results.json` holds its fields.

    Attributes:
      optimizer: the checkpoint, or "-" for baselines only.
      records: every training run that was judged on test.
      speedup: of L3RS over each baseline.
      tuning: {setting: {baseline: {horizon: fields of `Grid`}}}.
      curves, paths, coefficients, switches, costs, multipliers: see their classes.
      notes: sentences that a reader should know: what was left out, diverged, or has its best value at the edge of
        the grid.
      meta_training: how the checkpoint was made, as far as it says: seconds, candidate_steps, horizon, …
      environment: versions, processor, devices.
      config: the resolved configuration.
    """

    optimizer: str
    records: list[Record]
    speedup: list[Speedup]
    tuning: dict[str, Any]
    curves: list[Curve] = dataclasses.field(default_factory=list)
    paths: list[DecisionPath] = dataclasses.field(default_factory=list)
    coefficients: list[CoefficientPath] = dataclasses.field(default_factory=list)
    switches: list[SwitchHistory] = dataclasses.field(default_factory=list)
    costs: list[Cost] = dataclasses.field(default_factory=list)
    multipliers: list[MultiplierGrid] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    meta_training: dict[str, Any] = dataclasses.field(default_factory=dict)
    environment: dict[str, Any] = dataclasses.field(default_factory=dict)
    config: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        _validate(_TUNING, self.tuning, "tuning")

    def summary(self) -> dict[str, Any]:
        """{setting: {optimizer: {horizon: [mean test loss, mean test accuracy, seeds]}}}."""

        def cell(setting: str, optimizer: str, horizon: int) -> list[float]:
            means = [self.mean(setting, optimizer, horizon, field) for field in ("loss", "accuracy")]
            return [*(round(mean, 4) for mean in means), len(self.values(setting, optimizer, horizon))]

        return finite(
            {
                setting: {
                    optimizer: {str(horizon): cell(setting, optimizer, horizon) for horizon in self.horizons()}
                    for optimizer in self.optimizers()
                }
                for setting in self.settings()
            }
        )

    @classmethod
    def load(cls, file: str | Path) -> Results:
        """Read a `results.json`, also one that an older version wrote.

        Raises:
          UserError: the file cannot be read, or is not a `results.json`.
        """
        found = read_results(file, cls, LISTS)
        assert isinstance(found, cls)
        return found

    def save(self, folder: Path) -> Path:
        """Write `results.json`."""
        text = json.dumps(finite(dataclasses.asdict(self)), allow_nan=False) + "\n"
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "results.json", text)
        return folder / "results.json"


def _validate(adapter: pydantic.TypeAdapter[Any], value: Any, what: str) -> Any:
    """The value as the adapter's type.

    Raises:
      ValueError: it is not of that type.
    """
    try:
        return adapter.validate_python(value)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{'.'.join([what, *map(str, first['loc'])])}: {first['msg']}") from None


def _check_lengths(what: str, length: int, *parts: Sequence[Any]) -> None:
    """Raise ValueError unless all parts are as long."""
    if wrong := [len(part) for part in parts if len(part) != length]:
        raise ValueError(f"{what} has lists of {length} and of {wrong[0]} values, which belong together")


# Fields that are lists of objects; older files lack some of them.
LISTS = ("speedup", "curves", "paths", "coefficients", "switches", "costs", "multipliers")


def family(label: str) -> str:
    """The optimizer's name in a label: `adam` in `adam/cosine`."""
    return label.partition("/")[0]


def nan_as_inf(loss: float) -> float:
    """A loss that can be ordered: infinite where it is NaN."""
    return math.inf if math.isnan(loss) else loss


def finite(value: Any) -> Any:
    """JSON has no infinity and no NaN: they become null."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
