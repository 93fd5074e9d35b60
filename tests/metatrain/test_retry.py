"""A driver that dies is started again and resumes the run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from metatrain.config import dump_config
from metatrain.outer.loop import run
from metatrain.ray import retry
from tests.metatrain.common import PATIENCE, assert_same_theta, small_config
from tests.metatrain.nodes import cluster_command, listening, ray_nodes

ROOT = Path(__file__).parents[2]
_COUNT = """
import os, sys
log, ends = sys.argv[1], sys.argv[2].split(",")
with open(log, "a") as file:
    print(*sys.argv[3:], file=file)
end = int(ends[len(open(log).read().splitlines()) - 1])
os.kill(os.getpid(), -end) if end < 0 else sys.exit(end)
"""


@pytest.fixture
def attempt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int, str], tuple[int, list[str]]]:
    """Run a command that ends in the given ways, one a start; returns the code and each start's extra arguments."""
    monkeypatch.setattr(retry, "_LONGEST_WAIT", 0.0)
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # pytest's own handlers stay

    def call(retries: int, ends: str) -> tuple[int, list[str]]:
        log = tmp_path / "starts"
        log.unlink(missing_ok=True)
        code = retry.main([str(retries), sys.executable, "-c", _COUNT, str(log), ends])
        return code, log.read_text().splitlines()

    return call


@pytest.mark.parametrize(
    ("retries", "ends", "code", "starts"),
    [
        (5, "0", 0, [""]),
        (5, "2", 2, [""]),
        (5, "3", 3, [""]),
        (5, "-9,1,0", 0, ["", "--resume", "--resume"]),
        (5, "1,2", 2, ["", "--resume"]),
        (2, "1,-9,-9,0", 137, ["", "--resume", "--resume"]),
    ],
)
def test_only_what_another_start_may_change_is_started_again(
    attempt: Callable[[int, str], tuple[int, list[str]]], retries: int, ends: str, code: int, starts: list[str]
) -> None:
    assert attempt(retries, ends) == (code, starts)


def test_a_request_to_stop_is_no_reason_to_start_again(tmp_path: Path) -> None:
    """As when Ray stops a job: the driver and this process both get SIGTERM."""
    log = tmp_path / "starts"
    script = f"print('start', file=open({str(log)!r}, 'a'), flush=True); import time; time.sleep(60)"
    command = [sys.executable, "-m", "metatrain.ray.retry", "5", sys.executable, "-c", script]
    process = subprocess.Popen(command, cwd=ROOT)
    try:
        deadline = time.monotonic() + PATIENCE
        while not (log.exists() and log.read_text()) and time.monotonic() < deadline:
            time.sleep(0.05)
        for each in [process, *psutil.Process(process.pid).children()]:
            os.kill(each.pid, signal.SIGTERM)
        assert process.wait(10) == 128 + signal.SIGTERM
    finally:
        process.kill()
    assert log.read_text() == "start\n"


def _driver(folder: Path) -> psutil.Process:
    """The process of the run's driver; not the shell or the process that restarts it."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        for process in psutil.process_iter():
            try:
                words = process.cmdline()
            except psutil.Error:
                continue
            if words[1:3] == ["-m", "metatrain.cli"] and str(folder) in words and "run" in words:
                return process
        time.sleep(0.1)
    raise AssertionError("there is no driver")


@pytest.mark.slow
def test_a_driver_that_is_killed_on_a_cluster_resumes_by_itself(tmp_path: Path) -> None:
    config, folder = tmp_path / "config.yaml", tmp_path / "run"
    outer = {"steps": 24, "population": 4}
    task = {"name": small_config().task.name, "seconds": 0.2}
    config.write_text(dump_config(small_config(task=task, outer=outer, execution={"workers": 1})))
    with ray_nodes(cpus=2, token=False, dashboard=True, loopback=True) as nodes:
        assert listening(nodes) == {"127.0.0.1"}
        command = cluster_command(nodes, tmp_path, PYTHONPATH=str(ROOT))

        def metatrain(*words: object) -> str:
            code, out, err = command(*words)
            assert code == 0, err
            return out

        metatrain("submit", config, "--out", folder, "--retries", 3)
        killed = _driver(folder)
        killed.kill()
        printed = metatrain("logs", "small", "-f")
        assert "WARNING the driver was ended by signal 9; it resumes in 1 s, start 1 of 3 after the first" in printed
        assert metatrain("status", "small").startswith("small: succeeded, generation 24/24")
    assert (folder / "optimizer").is_dir()
    quick = {"name": task["name"], "seconds": 1e-6}  # the same numbers, sooner
    run(small_config(task=quick, outer=outer), tmp_path / "local")
    assert_same_theta(folder / "optimizer", tmp_path / "local" / "optimizer")
