"""A whole run on a cluster where everything that can die dies, and the result is that of a quiet run."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import fsspec
import pytest

from metatrain.config import dump_config
from metatrain.outer.loop import run
from metatrain.outer.store import Store
from tests.metatrain.common import assert_same_theta, metrics, small_config
from tests.metatrain.nodes import ray_nodes, worker_processes
from tests.metatrain.test_trainer import being_saved, count_lines

ROOT = Path(__file__).parents[2]
GENERATIONS = 24
_MINUTES = 8


def _driver(env: Mapping[str, str], config: Path, folder: Path | str, log: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "metatrain.cli", "run", str(config), "--out", str(folder), "--resume"]
    with log.open("ab") as out:
        return subprocess.Popen(command, cwd=ROOT, env={**env, "PYTHONPATH": str(ROOT)}, stdout=out, stderr=out)


@pytest.mark.slow
def test_a_run_survives_everything(tmp_path: Path) -> None:
    task = {"seconds": 0.15}
    outer = {"steps": GENERATIONS, "population": 16}
    shared = {"members_per_call": 2, "plan": "fused"}
    run(small_config(task={"seconds": 1e-6}, outer=outer, execution=shared), tmp_path / "quiet")  # same numbers, sooner
    folder, log = tmp_path / "run", tmp_path / "driver.log"
    rng, deaths = random.Random(0), {"workers": 0, "nodes": 0, "drivers": 0, "half-written saves": 0}

    with ray_nodes(cpus=1, token=True) as nodes:
        execution = {**shared, "backend": "ray", "address": nodes.address, "workers": 3}
        (tmp_path / "config.yaml").write_text(dump_config(small_config(task=task, outer=outer, execution=execution)))
        node = nodes.add(cpus=2)
        driver = _driver(nodes.env, tmp_path / "config.yaml", folder, log)
        over = threading.Event()

        def murder() -> None:
            done = -1  # generations at the last murder: on a slow machine no worker would live to answer
            while not over.wait(4.0):
                if (now := count_lines(folder)) != done and (victims := worker_processes()):
                    os.kill(rng.choice(victims).pid, signal.SIGKILL)
                    deaths["workers"] += 1
                    done = now

        murderer = threading.Thread(target=murder)
        murderer.start()
        try:
            deadline = time.monotonic() + 60 * _MINUTES

            def reach(generation: int) -> None:
                while count_lines(folder) < generation and driver.poll() is None:
                    assert time.monotonic() < deadline, log.read_text()[-3000:]
                    time.sleep(0.05)

            for generation in (3, 8):
                reach(generation)
                nodes.remove(node)
                deaths["nodes"] += 1
                node = nodes.add(cpus=2)
            reach(12)
            os.kill(driver.pid, signal.SIGKILL)
            driver.wait()
            deaths["drivers"] += 1
            driver = _driver(nodes.env, tmp_path / "config.yaml", folder, log)
            reach(16)
            while not being_saved(folder) and driver.poll() is None:
                time.sleep(0.0005)
            os.kill(driver.pid, signal.SIGKILL)
            driver.wait()
            deaths["half-written saves"] += being_saved(folder)
            driver = _driver(nodes.env, tmp_path / "config.yaml", folder, log)
            while driver.poll() is None:
                assert time.monotonic() < deadline, log.read_text()[-3000:]
                time.sleep(0.2)
        finally:
            over.set()
            murderer.join()
            driver.kill()
            driver.wait()

    said = log.read_text()
    assert driver.returncode == 0, said[-3000:]
    assert deaths["workers"] >= 5, deaths
    assert deaths["half-written saves"] == 1, deaths
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    print(deaths, {name: last[name] for name in ("lost", "duplicated", "requeued", "stale", "rejected")})
    assert "a worker is lost" in said
    assert len(metrics(folder)) == GENERATIONS
    for one, two in zip(metrics(folder), metrics(tmp_path / "quiet"), strict=True):
        assert (one["generation"], one["meta_loss_mean"]) == (two["generation"], two["meta_loss_mean"])
    assert_same_theta(folder / "optimizer", tmp_path / "quiet" / "optimizer")


@pytest.mark.slow
def test_a_second_driver_a_deleted_folder_and_a_driver_that_dies(tmp_path: Path) -> None:
    """One run in a store and one in a folder that disappears, each driver a process of its own."""
    outer = {"steps": 12, "population": 4}
    run(small_config(task={"seconds": 1e-6}, outer=outer, execution={"members_per_call": 2}), tmp_path / "quiet")
    hold = tmp_path / "hold"  # the first driver stands still until the second has been refused
    hold.touch()
    config = {name: tmp_path / f"{name}.yaml" for name in ("store", "folder")}
    shared = {"outer": outer, "execution": {"members_per_call": 2, "plan": "fused"}}
    for name, task, every in (("store", {"seconds": 0.25, "hold": str(hold)}, 4), ("folder", {"seconds": 0.25}, 12)):
        config[name].write_text(dump_config(small_config(task=task, **shared, checkpoint={"every": every})))
    url, folder = f"file://{tmp_path / 'store'}", tmp_path / "run"
    logs = {name: tmp_path / f"{name}.log" for name in ("first", "second", "third", "deleted")}
    store = fsspec.filesystem("file")

    def start(name: str, out: str | Path) -> subprocess.Popen[bytes]:
        return _driver({**os.environ}, config["folder" if out == folder else "store"], out, logs[name])

    drivers = {"first": start("first", url), "deleted": start("deleted", folder)}
    try:
        _wait_until(lambda: store.exists(str(tmp_path / "store" / "lease.json")), logs["first"])
        drivers["second"] = start("second", url)
        _wait_until(lambda: count_lines(folder) >= 2, logs["deleted"])
        folder.rename(tmp_path / "gone")  # before its first checkpoint
        assert drivers["deleted"].wait(60 * _MINUTES) == 2
        assert "was deleted" in logs["deleted"].read_text()
        assert not folder.exists()
        assert drivers["second"].wait(60 * _MINUTES) == 2
        assert "another driver" in logs["second"].read_text()
        hold.unlink()
        _wait_until(lambda: bool(list((tmp_path / "store").glob("manifest-*"))), logs["first"])
        drivers["first"].kill()
        drivers["first"].wait()
        drivers["third"] = start("third", url)
        assert drivers["third"].wait(60 * _MINUTES) == 0, logs["third"].read_text()
    finally:
        for driver in drivers.values():
            driver.kill()
            driver.wait()
    Store(url).pull(tmp_path / "copy")
    assert metrics(tmp_path / "copy") == metrics(tmp_path / "quiet")
    assert_same_theta(tmp_path / "copy" / "optimizer", tmp_path / "quiet" / "optimizer")


def _wait_until(true: Callable[[], bool], log: Path) -> None:
    deadline = time.monotonic() + 60 * _MINUTES
    while not true():
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.05)
