"""Workers with several devices on Ray: GPUs that exist only for Ray, replaced by four CPU devices in each process."""

from __future__ import annotations

import contextlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import pytest

from metatrain.config import Config, load_config
from metatrain.inner.devices import device_kind
from metatrain.outer.loop import run
from metatrain.ray.worker import Answer, Worker
from tests.metatrain.common import REGRESSION, assert_same_theta, small_config
from tests.metatrain.nodes import local_ray

pytestmark = pytest.mark.slow  # real Ray

_OUTER = {"steps": 4, "population": 32}


class ReportingWorker(Worker):
    """Writes into a folder what its process sees and how many members each of its devices has computed."""

    def setup(self, blob: bytes, sent: Mapping[int, Any]) -> list[int] | str:
        found = super().setup(blob, sent)
        if not found:
            self._work: Counter[int] = Counter()
            self._runner._calls = [self._counted(call) for call in self._runner._calls]
        return found

    def evaluate(self, *arguments: Any) -> Answer:
        answer = super().evaluate(*arguments)
        names = ("CUDA_VISIBLE_DEVICES", "XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_PREALLOCATE")
        report = {"env": {name: os.environ.get(name) for name in names}, "work": self._work}
        report |= {"platforms": jax.config.values["jax_platforms"], "devices": len(jax.local_devices())}
        Path(os.environ["REPORTS"], f"{os.getpid()}.json").write_text(json.dumps(report))
        return answer

    def _counted(self, call: Any) -> Any:
        def counted(*arguments: Any) -> Any:
            [device] = arguments[-1].devices()
            self._work[device.id] += len(arguments[-1])
            return call(*arguments)

        return counted


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A Ray with four GPUs that do not exist, and the folder of `ReportingWorker`."""
    folder = tmp_path_factory.mktemp("reports")
    environment = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "REPORTS": str(folder)}
    with contextlib.ExitStack() as stack:
        with mock.patch.dict(os.environ, environment):  # only of the workers
            stack.enter_context(local_ray(num_cpus=4, num_gpus=4))
        yield folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run in this process."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    run(config(backend="local"), folder)
    return folder


def config(**execution: object) -> Config:
    how = {"backend": "ray", "members_per_call": 2, "plan": "fused", **execution}
    return small_config(task={"name": REGRESSION}, outer=_OUTER, execution=how)


def read_reports(folder: Path) -> list[dict[str, Any]]:
    found = [json.loads(file.read_text()) for file in folder.glob("*.json")]
    for file in folder.glob("*.json"):
        file.unlink()
    return found


def never(*_: object) -> None:
    raise AssertionError("measured by the driver")


def test_a_worker_with_four_devices_uses_them_all_and_measures_the_plan(
    reports: Path, alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("metatrain.ray.evaluator.Worker", ReportingWorker)
    monkeypatch.setattr("metatrain.outer.setup.known_plan", lambda _: None)  # as if there were convolutions
    monkeypatch.setattr("metatrain.inner.plan._seconds_per_step", never)  # in this process
    folder = tmp_path / "run"
    run(config(workers=1, plan="auto", resources_per_worker={"CPU": 1.0, "GPU": 4.0}), folder)
    [report] = read_reports(reports)
    assert report["env"]["CUDA_VISIBLE_DEVICES"] == "0,1,2,3"
    assert float(report["env"]["XLA_PYTHON_CLIENT_MEM_FRACTION"]) == 0.75
    assert (report["platforms"], report["devices"]) == (None, 4)
    assert sum(report["work"].values()) == 4 * 32
    assert sorted(report["work"]) == ["0", "1", "2", "3"]
    saved = load_config(folder / "config.yaml")
    [measured] = saved.measured
    assert measured.device == device_kind()
    assert set(measured.ms_per_step) == {"fused", "stepwise"}
    assert saved.execution.plan == min(measured.ms_per_step, key=measured.ms_per_step.__getitem__)
    if saved.execution.plan == "fused":
        assert_same_theta(folder / "optimizer", alone / "optimizer")


def test_workers_with_a_quarter_of_a_gpu_give_the_same_bits(
    reports: Path, alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("metatrain.ray.evaluator.Worker", ReportingWorker)
    folder = tmp_path / "run"
    run(config(workers=2, resources_per_worker={"CPU": 1.0, "GPU": 0.25}), folder)
    found = read_reports(reports)
    assert 1 <= len(found) <= 2
    for report in found:
        assert report["env"]["CUDA_VISIBLE_DEVICES"] in ("0", "1", "2", "3")
        assert float(report["env"]["XLA_PYTHON_CLIENT_MEM_FRACTION"]) == 0.1875
        assert report["env"]["XLA_PYTHON_CLIENT_PREALLOCATE"] == "true"
    assert_same_theta(folder / "optimizer", alone / "optimizer")
