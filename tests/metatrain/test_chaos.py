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
from pathlib import Path

import pytest

from metatrain.config import dump_config
from metatrain.outer.loop import run
from tests.metatrain.common import assert_same_theta, metrics, small_config
from tests.metatrain.nodes import Nodes, ray_nodes, worker_processes
from tests.metatrain.test_trainer import being_saved, count_lines

ROOT = Path(__file__).parents[2]
GENERATIONS = 24
_MINUTES = 8


def _driver(nodes: Nodes, config: Path, folder: Path, log: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "metatrain.cli", "run", str(config), "--out", str(folder), "--resume"]
    environment = {**nodes.env, "PYTHONPATH": str(ROOT)}
    with log.open("ab") as out:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=out)


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
        driver = _driver(nodes, tmp_path / "config.yaml", folder, log)
        over = threading.Event()

        def murder() -> None:
            while not over.wait(4.0):
                if victims := worker_processes():
                    os.kill(rng.choice(victims).pid, signal.SIGKILL)
                    deaths["workers"] += 1

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
            driver = _driver(nodes, tmp_path / "config.yaml", folder, log)
            reach(16)
            while not being_saved(folder) and driver.poll() is None:
                time.sleep(0.0005)
            os.kill(driver.pid, signal.SIGKILL)
            driver.wait()
            deaths["half-written saves"] += being_saved(folder)
            driver = _driver(nodes, tmp_path / "config.yaml", folder, log)
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
