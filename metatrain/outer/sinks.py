"""Where a run's figures go beside `metrics.jsonl`: TensorBoard, MLflow, Weights & Biases, and Ray's Prometheus metrics.

None of them contacts a network unless an environment variable of its own says so, and none of them stops a run that has
begun.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from l3rs.extras import pip_install
from l3rs.io.files import read_regular, write_atomically
from metatrain.config import Config, UserError, as_written, flat
from metatrain.config_errors import reason

_log = logging.getLogger("metatrain")

_MAX_FAILURES = 3  # of a sink in a row, before it is left out
_IDS = "logging.json"  # {sink: id of the run there}, in the run's folder
_MAX_ID_BYTES = 4096
_MAX_PARAMETER = 500  # characters that MLflow keeps of one


class Sink(Protocol):
    """Takes the figures of each generation."""

    def write(self, generation: int, figures: dict[str, float]) -> None:
        """Take the figures of a generation, by their names in `metrics.jsonl`."""

    def close(self) -> None:
        """Write what is left."""


def make_sinks(config: Config, folder: Path, generation: int) -> list[Sink]:
    """The sinks that a configuration asks for.

    Args:
      config: of the run.
      folder: of the run.
      generation: the next one; the figures of a resumed run continue there.

    Raises:
      UserError: a sink's package is not installed; or it cannot be used, and the run has not begun.
    """
    makers: dict[str, Callable[[], Sink]] = {}
    if config.logging.tensorboard:
        makers["tensorboard"] = lambda: TensorBoardSink(folder, generation)
    if config.logging.mlflow:
        makers["mlflow"] = lambda: MlflowSink(config, folder)
    if config.logging.wandb:
        makers["wandb"] = lambda: WandbSink(config, folder)
    if config.execution.backend == "ray":
        from metatrain.ray.metrics import RunGauges

        makers["ray"] = lambda: RunGauges(config.name)
    found: list[Sink] = []
    for name, make in makers.items():
        try:
            found.append(_Lasting(name, make()))
        except ImportError:
            raise UserError(f"logging.{name} is true, but its package is not installed: {pip_install(name)}") from None
        except Exception as error:  # these libraries' exceptions have no common base
            sentence = f"logging.{name} cannot be used: {reason(error)}"
            if not generation:
                raise UserError(sentence) from error
            _log.warning("%s; the run goes on without it", sentence)
    return found


class TensorBoardSink:
    """Event files in the run's folder `tensorboard`.

    Args:
      folder: of the run.
      generation: figures of this and later generations are purged: a resumed run writes them again.
    """

    def __init__(self, folder: Path, generation: int) -> None:
        from tensorboardX import SummaryWriter

        # The suffix: its file names have whole seconds.
        suffix = f".{generation}"
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=generation or None, filename_suffix=suffix)

    def write(self, generation: int, figures: dict[str, float]) -> None:
        for name, value in figures.items():
            self._board.add_scalar(name, value, generation)

    def close(self) -> None:
        self._board.close()


class MlflowSink:
    """A run of MLflow, on the server of MLFLOW_TRACKING_URI; without it, in `mlflow.db` in the run's folder.

    A resumed run continues the same run of MLflow. The configuration's values are its parameters.
    """

    def __init__(self, config: Config, folder: Path) -> None:
        # MLflow's defaults report usage to its makers, and retry for minutes.
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        for logger in ("mlflow", "alembic"):  # importing it sets its level
            logging.getLogger(logger).setLevel(logging.WARNING)
        self._metric = Metric
        server = os.environ.get("MLFLOW_TRACKING_URI")
        self._client = MlflowClient(server or f"sqlite:///{(folder / 'mlflow.db').absolute()}")
        self._id = _read_ids(folder).get("mlflow")
        self._logged = -1  # the last generation that is there
        if self._id is None:
            experiment = self._client.get_experiment_by_name("l3rs")
            artifacts = None if server else (folder / "mlflow").absolute().as_uri()
            found = experiment.experiment_id if experiment else self._client.create_experiment("l3rs", artifacts)
            self._id = self._client.create_run(found, run_name=config.name).info.run_id
            _write_id(folder, "mlflow", self._id)
            values = flat(as_written(config)).items()
            parameters = [Param(key, str(value)[:_MAX_PARAMETER]) for key, value in values if value is not None]
            for first in range(0, len(parameters), 100):  # MLflow's limit
                self._client.log_batch(self._id, params=parameters[first : first + 100])
        else:
            history = self._client.get_metric_history(self._id, "horizon")
            self._logged = max((metric.step for metric in history), default=-1)

    def write(self, generation: int, figures: dict[str, float]) -> None:
        if generation <= self._logged:  # before it was resumed
            return
        now = round(1e3 * time.time())
        metrics = [self._metric(name, float(value), now, generation) for name, value in figures.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def close(self) -> None:
        self._client.set_terminated(self._id)


class WandbSink:
    """A run of Weights & Biases in the run's folder `wandb`; offline unless WANDB_MODE or WANDB_API_KEY is set.

    `wandb sync` sends an offline run later. A resumed run continues the same run.
    """

    def __init__(self, config: Config, folder: Path) -> None:
        import wandb

        mode: Any = os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline")
        ids = _read_ids(folder)
        if "wandb" not in ids:
            ids["wandb"] = secrets.token_hex(8)
            _write_id(folder, "wandb", ids["wandb"])
        # The driver's output, code and machine are not sent.
        settings = wandb.Settings(
            symlink=False, console="off", silent=True, disable_git=True, save_code=False,
            x_disable_stats=True, x_disable_machine_info=True,
        )  # fmt: skip
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "l3rs"), name=config.name, id=ids["wandb"], resume="allow",
            mode=mode, dir=str(folder), config=as_written(config), settings=settings,
        )  # fmt: skip
        for file in (folder / "wandb").rglob("*"):  # a link to its own log; a run's folder holds no links
            if file.is_symlink():
                file.unlink()

    def write(self, generation: int, figures: dict[str, float]) -> None:
        self._run.log(figures, step=generation)  # generations from before a resume are dropped there

    def close(self) -> None:
        self._run.finish()


class _Lasting:
    """A sink whose failures are logged, and which is left out after three in a row."""

    def __init__(self, name: str, sink: Sink) -> None:
        self._name, self._sink, self._failures = name, sink, 0

    def write(self, generation: int, figures: dict[str, float]) -> None:
        if self._failures < _MAX_FAILURES:
            self._try(lambda: self._sink.write(generation, figures))

    def close(self) -> None:
        self._try(self._sink.close)

    def _try(self, call: Callable[[], None]) -> None:
        try:
            call()
            self._failures = 0
        except Exception as error:  # these libraries' exceptions have no common base
            self._failures += 1
            left_out = "; it gets no more figures" if self._failures == _MAX_FAILURES else ""
            _log.warning("logging.%s failed: %s%s", self._name, reason(error), left_out)


def _read_ids(folder: Path) -> dict[str, str]:
    try:
        found = json.loads(read_regular(folder / _IDS, _MAX_ID_BYTES))
    except (OSError, ValueError):
        return {}
    return {key: value for key, value in found.items() if isinstance(value, str)} if isinstance(found, dict) else {}


def _write_id(folder: Path, sink: str, value: str) -> None:
    write_atomically(folder / _IDS, json.dumps({**_read_ids(folder), sink: value}))
