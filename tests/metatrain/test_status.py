from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from rich.console import Console

from metatrain.config import dump_config
from metatrain.log_lines import generation_line, log_line
from metatrain.outer.lock import is_locked, run_lock
from metatrain.outer.status import Snapshot, folder_snapshot, local_snapshot
from metatrain.ray.jobs import Job, snapshot
from metatrain.waiting import noticed
from metatrain.watch import screen, sparkline, watch
from tests.metatrain.common import small_config


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run of 6 generations after 4: 60 s for the first, which compiles, then 2 s each."""
    (tmp_path / "config.yaml").write_text(dump_config(small_config()))
    common = {"meta_loss_mean": 0.5, "candidate_steps_per_s": 100.0, "workers": 2}
    lines = [{"generation": i, "seconds": 2.0 if i else 60.0, "compiled": not i, **common} for i in range(4)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def _job(folder: Path, state: str) -> Job:
    return Job("a-1", "a", str(folder), state, "", 1.0, 1.0)


def test_time_left_leaves_out_compilation_and_is_shown_only_for_a_run_in_progress(folder: Path) -> None:
    assert folder_snapshot(folder, "a", "running", going=True).line() == (
        "a: running, generation 4/6, meta-loss 0.5000, 100 candidate-steps/s, 2 workers, about 4 s left"
    )
    assert "left" not in folder_snapshot(folder, "a", "failed", going=False).line()
    for state in ("FAILED", "STOPPED", "SUCCEEDED", "PENDING"):
        assert "left" not in snapshot(None, _job(folder, state)).line()
    assert "left" in snapshot(None, _job(folder, "RUNNING")).line()


def test_a_folder_is_running_while_its_lock_is_held(folder: Path) -> None:
    assert local_snapshot(folder, "a").line().startswith("a: stopped, generation 4/6")
    with run_lock(folder, "a"):
        assert "a: running, generation 4/6" in local_snapshot(folder, "a").line()
    (folder / "metrics.jsonl").unlink()
    assert local_snapshot(folder, "a").line() == "a: stopped, nothing computed yet"


def test_looking_at_a_run_stops_no_driver_from_starting(folder: Path) -> None:
    """Looking takes the lock for a moment; a driver that starts at that time waits for it."""
    looks = 0
    stop = threading.Event()

    def look() -> None:
        nonlocal looks
        while not stop.is_set():
            is_locked(folder)
            looks += 1

    thread = threading.Thread(target=look)
    thread.start()
    try:
        for _ in range(20):
            with run_lock(folder, "a"):
                pass
    finally:
        stop.set()
        thread.join()
    assert looks


def test_a_run_whose_folder_is_elsewhere_is_read_from_its_drivers_log(folder: Path, tmp_path: Path) -> None:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]

    class Jobs:
        def get_job_logs(self, _: str) -> str:
            return "\n".join(["generation 0/6: starting", *(log_line(generation_line(line, 6)) for line in lines)])

    here, elsewhere = snapshot(None, _job(folder, "RUNNING")), snapshot(Jobs(), _job(tmp_path / "none", "RUNNING"))
    assert elsewhere.line() == here.line()
    assert [line["seconds"] for line in elsewhere.metrics] == [line["seconds"] for line in here.metrics]


def test_an_earlier_run_at_the_path_of_a_job_is_not_the_job_s(folder: Path) -> None:
    class Jobs:
        def get_job_logs(self, _: str) -> str:
            return "generation 0/6: starting"

    after = (folder / "metrics.jsonl").stat().st_mtime + 1
    later = dataclasses.replace(_job(folder, "RUNNING"), started=after, begun=after)
    waiting = dataclasses.replace(_job(folder, "PENDING"), started=0.0, begun=0.0)
    assert snapshot(Jobs(), later).metrics == snapshot(Jobs(), waiting).metrics == []
    resumed = dataclasses.replace(_job(folder, "PENDING"), started=after)  # of a run that an earlier job began
    assert len(snapshot(Jobs(), resumed).metrics) == 4


def test_a_prolonged_run_that_was_stopped_is_not_finished(folder: Path) -> None:
    (folder / "optimizer").mkdir()  # of its first four generations
    assert local_snapshot(folder, "a").line().startswith("a: stopped, generation 4/6")
    (folder / "config.yaml").write_text(dump_config(small_config(outer={"steps": 4})))
    assert local_snapshot(folder, "a").line().startswith("a: finished, generation 4/4")


def _shown(run: Snapshot, now: float) -> str:
    console = Console(width=100, file=io.StringIO(), force_terminal=False)
    console.print(screen(run, now))
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_the_screen_shows_progress_loss_speed_workers_and_what_was_lost(folder: Path) -> None:
    more = {"lost": 1, "duplicated": 7, "requeued": 3, "waited": 61.0, "meta_loss_best": 0.25, "horizon": 9}
    run = folder_snapshot(folder, "a", "running", going=True)
    run = dataclasses.replace(run, metrics=[{**line, **more} for line in run.metrics], updated=1000.0)
    text = _shown(run, 1002.0)
    for part in ("a, running", "4/6", "67%", "about 4 s left", "0.5000", "lowest", "0.2500", "100 candidate-steps/s",
                 "horizon 9", "2; 1 lost", "7 shards started twice", "3 candidates requeued",
                 "waited 61 s for workers", "2 s ago", "Ctrl-C"):  # fmt: skip
        assert part in text, part
    assert "longer than usual" not in text
    assert "longer than usual" in _shown(run, 2000.0)
    for hardly in (dataclasses.replace(run, metrics=[]), dataclasses.replace(run, total=None),
                   dataclasses.replace(run, metrics=[{**run.metrics[0], "meta_loss_mean": None}])):  # fmt: skip
        assert "a, running" in _shown(hardly, 1002.0)


def test_a_sparkline_keeps_the_ends_and_their_order() -> None:
    assert sparkline([3.0, 1.0], 10) == "█▁"
    assert sparkline([1.0] * 5, 3) == "▁▁▁"
    long = sparkline([float(i) for i in range(1000)], 40)
    assert (len(long), long[0], long[-1]) == (40, "▁", "█")
    assert list(long) == sorted(long)


def test_watch_ends_with_the_run_and_prints_only_what_is_new(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    going = folder_snapshot(folder, "a", "running", going=True)
    ended = folder_snapshot(folder, "a", "finished", going=False)
    looks = iter([going, going, ended])
    console = Console(file=io.StringIO(), width=100)
    monkeypatch.setattr("metatrain.watch.LOOK_SECONDS", 0.0)
    watch(lambda: next(looks), console)
    printed = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert printed == [going.line(), ended.line()]


def test_watch_in_a_terminal_ends_with_ctrl_c_and_exit_code_0(folder: Path) -> None:
    """The command runs in a pseudo-terminal."""
    pty = pytest.importorskip("pty", reason="this system has no pseudo-terminals")
    command = [sys.executable, "-m", "metatrain.cli", "status", "--watch", str(folder)]
    with run_lock(folder, "a"):
        ours, theirs = pty.openpty()
        env = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
        process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=env, start_new_session=True)
        os.close(theirs)
        limit = threading.Timer(120, process.kill)  # ends the reading, too
        limit.start()
        shown = b""
        while b"Ctrl-C" not in shown:
            shown += os.read(ours, 4096)
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(OSError):  # the error when the other side is closed
            while os.read(ours, 4096):  # a terminal that nobody reads blocks its writer
                pass
        assert process.wait(60) == 0
        limit.cancel()
        os.close(ours)
    assert b"4/6" in shown


def test_a_wait_is_named_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("metatrain.waiting.NOTICE_SECONDS", 0.05)
    said: list[str] = []
    with noticed("an answer", "stop it with Ctrl-C", said.append):
        time.sleep(0.3)
    assert re.fullmatch(r"waiting for an answer for \d+ s; stop it with Ctrl-C", said[0])
    with noticed("nothing", "", said.append):
        pass
    time.sleep(0.2)
    assert len(said) == 1


def test_a_look_at_a_run_writes_nothing(folder: Path) -> None:
    (folder / ".lock").unlink(missing_ok=True)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert not is_locked(folder)
    local_snapshot(folder, "a")
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
