"""The sinks of a run's figures: each with its real library, where that is installed, and offline."""

from __future__ import annotations

import builtins
import importlib.util
import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest

from metatrain.config import Config, UserError
from metatrain.outer.metrics import Metrics, read_metrics
from metatrain.outer.sinks import make_sinks
from metatrain.trust import refuse_links
from tests.metatrain.common import small_config

needs_mlflow = pytest.mark.skipif(importlib.util.find_spec("mlflow") is None, reason="mlflow is not installed")
needs_wandb = pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
_VARIABLES = ("MLFLOW_TRACKING_URI", "WANDB_API_KEY", "WANDB_MODE", "WANDB_PROJECT", "WANDB_DIR")


@pytest.fixture(autouse=True)
def _no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in _VARIABLES:
        monkeypatch.delenv(name, raising=False)


def _config(sink: str, **sections: Any) -> Config:
    return small_config(logging={"tensorboard": False, sink: True}, **sections)


def _line(generation: int) -> dict[str, Any]:
    loss = 1 / (generation + 1)
    return {
        "generation": generation, "horizon": generation + 2, "meta_loss_mean": loss if generation != 1 else None,
        "theta_norm": 3.5, "compiled": not generation, "samples": [{"horizon": 2}],
    }  # fmt: skip


def _stopped_and_resumed(config: Config, folder: Path) -> list[dict[str, Any]]:
    """The figures of a run that is stopped after five generations and resumed from the state after four."""
    folder.mkdir()
    for generations in (range(5), range(4, 7)):
        metrics = Metrics(folder, generations[0], make_sinks(config, folder, generations[0]))
        for generation in generations:
            metrics.write(_line(generation))
        metrics.close()
        refuse_links(folder, "the folder")  # a resume would refuse it
    lines = read_metrics(folder / "metrics.jsonl")
    assert [line["generation"] for line in lines] == list(range(7))
    return lines


@needs_mlflow
def test_mlflow_without_a_server_keeps_one_run_in_the_runs_folder(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    lines = _stopped_and_resumed(_config("mlflow"), folder)
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    [experiment] = [e for e in client.search_experiments() if e.name == "l3rs"]
    [found] = client.search_runs([experiment.experiment_id])
    assert (found.info.run_name, found.info.status) == ("small", "FINISHED")
    assert found.data.params["outer.population"] == "4"
    for key in ("meta_loss_mean", "horizon", "theta_norm"):
        history = client.get_metric_history(found.info.run_id, key)
        known = [(line["generation"], line[key]) for line in lines if line[key] is not None]
        assert [(each.step, each.value) for each in history] == known


@needs_wandb
def test_wandb_offline_keeps_one_run_in_the_runs_folder(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    lines = _stopped_and_resumed(_config("wandb"), folder)
    found = {}
    for file in sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime):
        assert file.name == f"run-{json.loads((folder / 'logging.json').read_text())['wandb']}.wandb"
        found |= {step: values for step, values in _wandb_history(file) if step not in found}
    assert sorted(found) == [line["generation"] for line in lines]
    assert [found[i].get("meta_loss_mean") for i in sorted(found)] == [line["meta_loss_mean"] for line in lines]


def _wandb_history(file: Path) -> list[tuple[int, dict[str, float]]]:
    """(generation, figures) of each line of history in a file of an offline run."""
    from wandb.proto import wandb_internal_pb2

    data, at, message, found = file.read_bytes(), 7, b"", []
    while at + 7 <= len(data) < 1 << 15:  # LevelDB's log in a single block: check sum, length, kind, data
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        message += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # a whole record, or its last part
            record = wandb_internal_pb2.Record.FromString(message)
            message = b""
            if record.WhichOneof("record_type") == "history":
                values = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
                found.append((record.history.step.num, values))
    return found


def test_tensorboard_gets_every_generation_once(tmp_path: Path) -> None:
    from tensorboardX.proto.event_pb2 import Event

    folder = tmp_path / "run"
    lines = _stopped_and_resumed(_config("tensorboard"), folder)
    steps: list[int] = []
    for file in sorted((folder / "tensorboard").iterdir()):
        data, at = file.read_bytes(), 0
        while at < len(data):
            size = int.from_bytes(data[at : at + 8], "little")
            # A record: its length, a check sum, the data, a check sum.
            event = Event.FromString(data[at + 12 : at + 12 + size])
            at += 16 + size
            if event.session_log.status == 1:  # START: TensorBoard purges this and later steps
                steps = [step for step in steps if step < event.step]
            steps += [event.step for value in event.summary.value if value.tag == "horizon"]
    assert steps == [line["generation"] for line in lines]


@pytest.mark.parametrize("sink", ["mlflow", "wandb"])
def test_a_sink_that_is_not_installed_is_one_sentence(
    sink: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.split(".")[0] == sink:
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=rf"logging\.{sink} is true.*l3rs\[{sink}\]"):
        make_sinks(_config(sink), tmp_path, 0)


def test_a_sink_that_fails_stops_no_run_and_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken:
        writes = 0

        def __init__(self, *_: Any) -> None:
            pass

        def write(self, *_: Any) -> None:
            Broken.writes += 1
            raise OSError("the server is gone")

        def close(self) -> None:
            raise OSError("the server is gone")

    monkeypatch.setattr("metatrain.outer.sinks.TensorBoardSink", Broken)
    with caplog.at_level(logging.WARNING, "metatrain"):
        _stopped_and_resumed(_config("tensorboard"), tmp_path / "run")
    assert Broken.writes == 2 * 3
    assert caplog.text.count("logging.tensorboard failed: the server is gone") == 2 * 4  # closing, too
    assert caplog.text.count("it gets no more figures") == 2


def test_a_server_that_cannot_be_used_refuses_a_new_run_and_not_one_that_is_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(*_: Any) -> None:
        raise ConnectionError("refused")

    monkeypatch.setattr("metatrain.outer.sinks.MlflowSink", refused)
    with pytest.raises(UserError, match=r"logging\.mlflow cannot be used: refused"):
        make_sinks(_config("mlflow"), tmp_path, 0)
    assert make_sinks(_config("mlflow"), tmp_path, 4) == []
    assert "logging.mlflow cannot be used: refused; the run goes on without it" in caplog.text


def test_sinks_get_no_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sinks get the configuration as written, with interpolations."""
    from metatrain.config import as_written, flat, load_config

    monkeypatch.setenv("SECRET", "4711")
    file = tmp_path / "config.yaml"
    file.write_text("name: small\ntask: {name: digits, target: {folder: '${oc.env:SECRET}'}}\n")
    values = flat(as_written(load_config(file)))
    assert values["task.target.folder"] == "${oc.env:SECRET}"
    assert os.environ["SECRET"] not in values.values()
