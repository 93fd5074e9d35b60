"""Workers that stop for good or for a while, and a cluster without room: real Ray, nobody waits in silence."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from metatrain.config import Config
from metatrain.outer.loop import resume, run
from metatrain.ray.worker import Answer, Worker
from metatrain.waiting import Wait, WaitError
from tests.metatrain.common import assert_same_theta, metrics, small_config
from tests.metatrain.nodes import local_ray
from tests.metatrain.test_trainer import stopped_at

pytestmark = pytest.mark.slow

_OUTER = {"steps": 8, "population": 8}
_CALLS = {"members_per_call": 2, "plan": "fused"}


@pytest.fixture(scope="module")
def _cluster() -> Iterator[None]:
    with local_ray(num_cpus=1):
        yield


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quiet") / "run"
    run(small_config(outer=_OUTER, execution=_CALLS), folder)
    return folder


def on_ray(**execution: Any) -> Config:
    return small_config(outer=_OUTER, execution={**_CALLS, "backend": "ray", "workers": 1, **execution})


def stopping_worker(folder: Path) -> type[Worker]:
    """Workers of which the first stops in its set-up, and the second hangs for two seconds and then for good."""

    def first_time(event: str) -> bool:
        try:
            (folder / event).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def stop(seconds: float | None) -> None:
        if seconds is not None:
            subprocess.Popen(["sh", "-c", f"sleep {seconds}; kill -CONT {os.getpid()}"])
        os.kill(os.getpid(), signal.SIGSTOP)

    class StoppingWorker(Worker):
        calls, hung = 0, False

        def setup(self, *arguments: Any) -> list[int] | str:
            if first_time("setup"):
                stop(None)
            return Worker.setup(self, *arguments)

        def evaluate(self, *arguments: Any) -> Answer:
            self.calls += 1
            if self.hung and first_time("hung for good"):
                stop(None)
            if self.calls > 6 and first_time("hung"):
                self.hung = True
                stop(2.0)
            return Worker.evaluate(self, *arguments)

    return StoppingWorker


@pytest.mark.usefixtures("_cluster")
def test_a_worker_that_stops_in_its_set_up_or_hangs_twice_is_replaced(
    quiet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("metatrain.ray.evaluator.Worker", stopping_worker(tmp_path))
    monkeypatch.setattr("metatrain.ray.health.START_SECONDS", 15.0)
    monkeypatch.setattr("metatrain.ray.health.HANG_SECONDS", 8.0)
    monkeypatch.setattr(Wait.is_notice_due, "__defaults__", (5.0,))
    folder = tmp_path / "run"
    run(on_ray(), folder)
    shown = capsys.readouterr().out
    assert_same_theta(folder / "optimizer", quiet / "optimizer")
    assert metrics(folder)[-1]["lost"] >= 1
    assert re.search(r"waiting for .*worker.* for \d+ s; .*execution\.wait_minutes", shown)
    assert re.search(r"did not start within 15 s \(CPU: .* a worker needs 1\)", shown)
    assert (tmp_path / "hung for good").exists()
    # 20 times the 2 seconds of its late answer would be 40.
    [silence] = re.findall(r"no answer for (\d+) s", shown)
    assert int(silence) < 35


@pytest.mark.usefixtures("_cluster")
def test_a_run_on_a_full_cluster_says_so_and_gives_up_and_a_damaged_log_stops_none(
    quiet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Wait.is_notice_due, "__defaults__", (2.0,))
    folder = tmp_path / "run"
    stopped_at(3, folder, outer=_OUTER, execution=on_ray().execution.model_dump())
    log = folder / "metrics.jsonl"
    first, second, third = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(first + b'{"generation": "\xff\xfe\n[1]\n' + second[:40] + b"\n\x00\x00\n" + third + third[:20])

    @ray.remote(num_cpus=1)
    class Another:
        def ready(self) -> None:
            """Hold the only CPU."""

    another = Another.remote()
    ray.get(another.ready.remote())
    with pytest.raises(WaitError, match=r"0\.1 min .*CPU: 0 of 1 free, a worker needs 1.*execution\.wait_minutes"):
        resume(folder, ["execution.wait_minutes=0.1"])
    assert re.search(r"waiting for .*CPU: 0 of 1 free.*at most 0\.1 min", capsys.readouterr().out)
    with pytest.raises(WaitError):
        run(on_ray(wait_minutes=0.1), tmp_path / "second")
    assert not (tmp_path / "second").exists(), "a run that computed nothing is in the way of the next try"
    ray.kill(another)
    assert resume(folder).finished
    assert_same_theta(folder / "optimizer", quiet / "optimizer")
    kept = {line["generation"]: line["meta_loss_mean"] for line in map(json.loads, log.read_text().splitlines())}
    assert {n: kept.get(n, loss) for n, loss in enumerate(_losses(quiet))} == dict(enumerate(_losses(quiet)))
    assert set(kept) >= {0, 2, 3, 4, 5, 6, 7}


def _losses(folder: Path) -> list[float]:
    return [line["meta_loss_mean"] for line in metrics(folder)]
