"""What an evaluation found: plain data, and `results.json`."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from metatrain.config import UserError
from metatrain.evaluation import statistics
from metatrain.evaluation.statistics import Interval

L3RS = "l3rs"


@dataclasses.dataclass(frozen=True)
class Record:
    """One training run."""

    setting: str
    optimizer: str  # "l3rs", "adam/cosine", …
    horizon: int  # inner steps
    seed: int
    loss: float  # on test
    accuracy: float  # on test
    seconds: float  # wall time of the compiled call that held it, over the runs in that call
    hparams: dict[str, float]
    auc: float  # area under the test loss along the run, over its steps


@dataclasses.dataclass(frozen=True)
class Speedup:
    """Steps that a baseline needs for the accuracy that L3RS has at `horizon`, over `horizon`: the ratio
    of means over seeds, and its paired 95 % interval. None: infinite, not reached at the longest horizon."""

    setting: str
    baseline: str
    horizon: int
    steps_ratio: float | None
    low: float | None
    high: float | None


@dataclasses.dataclass(frozen=True)
class Curve:
    """Test loss and accuracy along a run, means over seeds; a value that is no number is None."""

    setting: str
    optimizer: str
    horizon: int
    steps: list[int]
    loss: list[float | None]
    accuracy: list[float | None]


@dataclasses.dataclass(frozen=True)
class DecisionPath:
    """What L3RS decided at every step of one run: directions' weights μ and step sizes λ."""

    setting: str
    horizon: int
    layers: list[str]  # [L]
    shapes: list[list[int]]  # [L]
    directions: list[str]  # [P]
    mix: list[list[list[float]]]  # [T][L][P]
    step_rms: list[list[float]]  # [T][L]: λ / √n, the root mean square of a layer's update


@dataclasses.dataclass(frozen=True)
class CoefficientPath:
    """What a baseline of MADA's family learned in one run: its coefficients after some of the steps."""

    setting: str
    optimizer: str
    steps: list[int]  # [K]
    values: dict[str, list[float]]  # {coefficient: [K]}


@dataclasses.dataclass(frozen=True)
class SwitchHistory:
    """What trained each stage of one run of IOMT, and the training loss."""

    setting: str
    optimizer: str
    stages: list[dict[str, Any]]  # the fields of `l3rs.baselines.iomt.Stage`
    losses: list[float | None]  # [steps + 1]: before the first step, and after each


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one step of an optimizer costs beside others', measured alone, in one run."""

    setting: str
    optimizer: str
    seconds_a_step: float  # of a whole training step: the gradient and the update
    state_floats_a_parameter: float


@dataclasses.dataclass(frozen=True)
class Results:
    """What `evaluate` found; `results.json` holds its fields.

    Attributes:
      optimizer: the checkpoint.
      records: every training run that was judged on test.
      speedup: L3RS over each baseline.
      tuning: {setting: {baseline: {horizon: grid, inner_valid_loss, chosen}}}.
      curves, paths, coefficients, switches, costs: see their classes.
      notes: what a reader has to know: what was left out, diverged, or found its best value at the grid's edge.
      meta_training: what the checkpoint knows of its making: seconds, candidate_steps, horizon, …
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
    notes: list[str] = dataclasses.field(default_factory=list)
    meta_training: dict[str, Any] = dataclasses.field(default_factory=dict)
    environment: dict[str, Any] = dataclasses.field(default_factory=dict)
    config: dict[str, Any] = dataclasses.field(default_factory=dict)

    def values(self, setting: str, optimizer: str, horizon: int, field: str = "loss") -> np.ndarray:
        """`field` of each seed, float [S]; empty where there is no such run."""
        return np.array([getattr(record, field) for record in self._index.get((setting, optimizer, horizon), [])])

    def mean(self, setting: str, optimizer: str, horizon: int, field: str = "loss") -> float:
        """Mean over seeds of a field of the records."""
        return float(np.mean(self.values(setting, optimizer, horizon, field)))

    def difference(self, setting: str, baseline: str, horizon: int, field: str = "loss") -> Interval:
        """L3RS minus the baseline, mean over seeds and paired 95 % interval."""
        ours = self.values(setting, L3RS, horizon, field)
        return statistics.mean_interval(ours - self.values(setting, baseline, horizon, field))

    def win_rate(self, setting: str, baseline: str, horizon: int) -> float:
        """The share of seeds in which L3RS has the lower test loss."""
        return statistics.win_rate(
            self.values(setting, L3RS, horizon).tolist(), self.values(setting, baseline, horizon).tolist()
        )

    def best_baseline(self, setting: str, horizon: int, among: Callable[[str], bool] | None = None) -> str | None:
        """The baseline with the lowest mean test loss: chosen on test, which favours it. None if there is none."""
        labels = [label for label in self.baselines() if among is None or among(label)]
        return min(labels, key=lambda label: worst_if_no_number(self.mean(setting, label, horizon)), default=None)

    def accuracy_curve(self, setting: str, optimizer: str) -> np.ndarray:
        """Accuracies [S, H] at each horizon's end."""
        return np.stack([self.values(setting, optimizer, h, "accuracy") for h in self.horizons()], axis=1)

    def steps_to(self, setting: str, optimizer: str, accuracy: float) -> float:
        """The horizon that an optimizer, tuned for each, needs for a mean test accuracy; may be infinite."""
        return statistics.steps_to_reach(
            self.horizons(), self.accuracy_curve(setting, optimizer).mean(0).tolist(), accuracy
        )

    def profile(self) -> dict[str, list[float]]:
        """Performance profile over all (setting, horizon) pairs: a problem is to reach the best baseline's
        mean test accuracy at that horizon; the cost is the number of steps. See `statistics.performance_profile`."""
        costs: dict[str, list[float]] = {label: [] for label in self.optimizers()}
        for setting in self.settings():
            for horizon in self.horizons():
                reached = [self.mean(setting, label, horizon, "accuracy") for label in self.baselines()]
                target = max((a for a in reached if math.isfinite(a)), default=math.inf)
                for label, row in costs.items():
                    row.append(self.steps_to(setting, label, target))
        return statistics.performance_profile(costs)

    def seconds_a_step(self, optimizer: str) -> float:
        """Measured seconds of one training step, NaN where it was not measured."""
        return next((cost.seconds_a_step for cost in self.costs if cost.optimizer == optimizer), math.nan)

    def optimizers(self) -> list[str]:
        return self._names["optimizer"]

    def baselines(self) -> list[str]:
        return [label for label in self.optimizers() if label != L3RS]

    def horizons(self) -> list[int]:
        return sorted(self._names["horizon"])

    def settings(self) -> list[str]:
        return self._names["setting"]

    def seeds(self) -> int:
        return len(self._names["seed"])

    def summary(self) -> dict[str, Any]:
        """{setting: {optimizer: {horizon: [mean test loss, mean test accuracy, seeds]}}}."""

        def cell(setting: str, optimizer: str, horizon: int) -> list[float]:
            means = [self.mean(setting, optimizer, horizon, field) for field in ("loss", "accuracy")]
            return [*(round(mean, 4) for mean in means), len(self.values(setting, optimizer, horizon))]

        return _finite(
            {
                setting: {
                    optimizer: {str(horizon): cell(setting, optimizer, horizon) for horizon in self.horizons()}
                    for optimizer in self.optimizers()
                }
                for setting in self.settings()
            }
        )

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

    @classmethod
    def load(cls, file: str | Path) -> Results:
        """Read a `results.json`.

        Raises:
          UserError: not one.
        """
        try:
            data = json.loads(Path(file).read_text())
            kinds: dict[str, Any] = {"speedup": Speedup, "curves": Curve, "paths": DecisionPath, "costs": Cost}
            data |= {name: [kind(**item) for item in data[name]] for name, kind in kinds.items()}
            data["coefficients"] = [CoefficientPath(**path) for path in data.get("coefficients", ())]
            data["switches"] = [SwitchHistory(**history) for history in data.get("switches", ())]
            data["records"] = [Record(**_numbers(record)) for record in data["records"]]
            return cls(**data)
        except OSError as error:
            raise UserError(f"{file} cannot be read: {error.strerror}") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{file} is not a results.json: {error!r}") from None

    def save(self, folder: Path) -> Path:
        """Write `results.json`."""
        text = json.dumps(_finite(dataclasses.asdict(self)), allow_nan=False) + "\n"
        return write_whole(folder / "results.json", text)


def write_whole(file: Path, text: str) -> Path:
    """Write a file such that a reader finds either what was there before or the whole new text."""
    file.parent.mkdir(parents=True, exist_ok=True)
    scratch = file.with_suffix(".tmp")
    scratch.write_text(text)
    os.replace(scratch, file)
    return file


def worst_if_no_number(loss: float) -> float:
    """A loss that can be ordered: infinite where it is no number."""
    return math.inf if math.isnan(loss) else loss


def _numbers(record: dict[str, Any]) -> dict[str, Any]:
    """Null, which stood for a loss that is no number, is NaN again."""
    return {**record, **{key: math.nan for key in ("loss", "accuracy", "auc") if record.get(key) is None}}


def _finite(value: Any) -> Any:
    """JSON has no infinity and no NaN: they become null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
