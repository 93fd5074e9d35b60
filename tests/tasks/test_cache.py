"""The cache on disk: an entry is complete or absent, and is built once, whatever happens to its builders."""

import hashlib
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from tasks.base import TaskError
from tasks.data.cache import cache_dir, cached
from tests.metatrain.common import PATIENCE

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("L3RS_CACHE", str(folder))
    return folder


def start(script, *arguments):
    """Run a script in a new process."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(file, process):
    deadline = time.monotonic() + PATIENCE
    while not file.exists():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def entries(folder):
    return [path for path in folder.iterdir() if not path.name.startswith(".")]


def scratch(folder):
    return list(folder.glob(".building-*"))


def test_is_built_once_and_read_only(cache):
    calls = []

    def build():
        calls.append(1)
        return {
            "b/x": np.arange(6).reshape(2, 3),
            "a": np.float32(2.5),
            "empty": np.empty((0, 4)),
            "text": np.array(["ü"]),
        }

    for _ in range(2):
        arrays = cached({"n": 1}, build)
    assert len(calls) == 1
    assert list(arrays) == ["a", "b/x", "empty", "text"]
    assert arrays["b/x"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert arrays["a"].shape == ()
    assert arrays["empty"].shape == (0, 4)
    assert arrays["text"][0] == "ü"
    assert isinstance(arrays["b/x"], np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        arrays["b/x"][0, 0] = 1
    assert not scratch(cache)


def test_every_part_of_the_key_counts():
    keys = [{"n": 1}, {"n": 2}, {"n": 1, "version": 2}, {"n": "1"}]
    values = [cached(key, lambda i=i: {"x": np.array(i)})["x"].item() for i, key in enumerate(keys)]
    assert values == [0, 1, 2, 3]
    assert cached({"version": 2, "n": 1}, dict)["x"] == 2


def test_entries_may_be_built_inside_entries():
    def outer():
        return {"x": cached({"n": "inner"}, lambda: {"x": np.arange(3)})["x"] * 2}

    assert cached({"n": "outer"}, outer)["x"].tolist() == [0, 2, 4]


TWO = """
import hashlib, sys, time
from pathlib import Path
import numpy as np
from tasks.data.cache import cached

folder, me = Path(sys.argv[1]), sys.argv[2]
(folder / f"ready-{me}").touch()
while not (folder / "go").exists():
    time.sleep(0.001)

def build():
    with (folder / "builds").open("a") as log:
        log.write("x")
    time.sleep(0.5)
    return {"x": np.random.default_rng().random(100_000)}

print(hashlib.sha256(cached({"n": 1}, build)["x"].tobytes()).hexdigest())
"""


def test_two_processes_build_one_entry(tmp_path, cache):
    processes = [start(TWO, tmp_path, i) for i in range(2)]
    for i, process in enumerate(processes):
        wait_for(tmp_path / f"ready-{i}", process)
    (tmp_path / "go").touch()
    outputs = [process.communicate(timeout=PATIENCE) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert outputs[0][0] == outputs[1][0]
    assert (tmp_path / "builds").read_text() == "x"
    assert len(entries(cache)) == 1
    here = cached({"n": 1}, dict)["x"]
    assert hashlib.sha256(here.tobytes()).hexdigest() == outputs[0][0].strip()


def test_two_threads_build_one_entry():
    calls = []

    def build():
        calls.append(1)
        time.sleep(0.1)
        return {"x": np.arange(3)}

    threads = [threading.Thread(target=cached, args=({"n": 1}, build)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1


KILLED = """
import sys, time
from pathlib import Path
import numpy as np
from tasks.data.cache import cached

marker, when = Path(sys.argv[1]), sys.argv[2]

class Slow(dict):
    def items(self):
        yield "a", np.zeros(1000)
        marker.touch()  # one array is written, the other is not
        time.sleep(600)

def build():
    if when == "writing":
        return Slow()
    marker.touch()
    time.sleep(600)

cached({"n": 1}, build)
"""


@pytest.mark.parametrize("when", ["building", "writing"])
def test_a_killed_builder_leaves_no_entry(tmp_path, cache, when):
    marker = tmp_path / "marker"
    process = start(KILLED, marker, when)
    wait_for(marker, process)
    assert len(scratch(cache)) == (when == "writing")
    cached({"n": "another"}, lambda: {"x": np.zeros(1)})
    assert len(scratch(cache)) == (when == "writing"), "what a living builder writes must stay"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert len(entries(cache)) == 1
    cached({"n": "a third"}, lambda: {"x": np.zeros(1)})
    assert not scratch(cache), "what a dead builder left must go"
    assert cached({"n": 1}, lambda: {"a": np.ones(2)})["a"].tolist() == [1, 1]


@pytest.mark.parametrize("damage", ["cut array", "lost array", "cut key", "lost key", "no object"])
def test_a_damaged_entry_is_built_again(cache, caplog, damage):
    old = cached({"n": 1}, lambda: {"x": np.arange(5000)})["x"]
    (entry,) = entries(cache)
    if "array" in damage:
        file, length = entry / "x.npy", 1000
    else:
        file, length = entry / "key.json", 20
    if damage == "no object":
        file.write_text("[]")
    elif "lost" in damage:
        file.unlink()
    else:
        os.replace(file, entry / "whole")  # `old` maps the whole file; shrinking that in place would kill this process
        file.write_bytes((entry / "whole").read_bytes()[:length])
    with caplog.at_level(logging.WARNING):
        assert cached({"n": 1}, lambda: {"x": np.arange(5000)})["x"].sum() == old.sum()
    assert "damaged" in caplog.text
    assert entry.name in caplog.text
    assert cached({"n": 1}, dict)["x"].sum() == old.sum()
    assert not scratch(cache)


def test_errors_of_the_builder_are_passed_on(cache):
    def build():
        raise FileNotFoundError(2, "No such file", "source.png")

    with pytest.raises(FileNotFoundError, match=r"source\.png"):
        cached({"n": 1}, build)
    assert not entries(cache)
    assert cached({"n": 1}, lambda: {"x": np.ones(1)})["x"] == 1


NO_LOCKS = """
import errno, os, sys, time
from pathlib import Path
import numpy as np

folder, me, how = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
if how == "no fcntl":
    sys.modules["fcntl"] = None
else:
    import fcntl
    def flock(descriptor, operation):
        raise OSError(errno.ENOLCK, "No locks available")
    fcntl.flock = flock
from tasks.data.cache import cached

(folder / f"ready-{me}").touch()
while not (folder / "go").exists():
    time.sleep(0.001)

def build():
    time.sleep(0.3)
    return {"x": np.arange(1000)}

print(cached({"n": 1}, build)["x"].sum())
"""


def test_a_builder_that_is_stopped_is_not_waited_for(tmp_path, cache, monkeypatch, caplog):
    monkeypatch.setattr("tasks.data.lock.NOTICE_SECONDS", 0.5)
    monkeypatch.setattr("tasks.data.lock.SILENCE_SECONDS", 1.5)
    process = start(KILLED, tmp_path / "marker", "building")
    wait_for(tmp_path / "marker", process)
    process.send_signal(signal.SIGSTOP)
    with pytest.raises(TaskError, match=rf"process {process.pid} on .* no sign of life for \d+ s; .*L3RS_CACHE"):
        cached({"n": 1}, dict)
    assert re.search(rf"waiting for the process {process.pid} .* for \d+ s; .*L3RS_CACHE", caplog.text)
    process.kill()
    process.communicate()
    assert cached({"n": 1}, lambda: {"x": np.ones(1)})["x"] == 1
    assert not list(cache.glob(".builder-*"))


def test_a_slow_builder_is_waited_for(monkeypatch):
    monkeypatch.setattr("tasks.data.lock.BEAT_SECONDS", 0.1)
    monkeypatch.setattr("tasks.data.lock.SILENCE_SECONDS", 1.5)
    building = threading.Event()

    def build():
        building.set()
        time.sleep(3)
        return {"x": np.arange(3)}

    builder = threading.Thread(target=cached, args=({"n": 1}, build))
    builder.start()
    building.wait()
    assert cached({"n": 1}, dict)["x"].tolist() == [0, 1, 2]
    builder.join()


@pytest.mark.parametrize("how", ["no fcntl", "no locks"])
def test_two_processes_without_locks(tmp_path, cache, how):
    processes = [start(NO_LOCKS, tmp_path, i, how) for i in range(2)]
    for i, process in enumerate(processes):
        wait_for(tmp_path / f"ready-{i}", process)
    (tmp_path / "go").touch()
    outputs = [process.communicate(timeout=PATIENCE) for process in processes]
    assert [output.strip() for output, _ in outputs] == ["499500"] * 2, outputs
    assert len(entries(cache)) == 1
    assert not scratch(cache)


FULL = """
import resource, sys
import numpy as np
from tasks.base import TaskError
from tasks.data.cache import cached

resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # the system refuses longer files as a full disk does
try:
    cached({"n": 1}, lambda: {"a": np.zeros(10), "b": np.zeros(1_000_000)})
except TaskError as error:
    print(error)
"""


def test_a_full_disk_is_one_sentence(cache):
    output, errors = start(FULL).communicate(timeout=PATIENCE)
    assert str(cache) in output, errors
    assert "$L3RS_CACHE" in output
    assert output.count("\n") == 1
    assert not entries(cache)
    assert not scratch(cache)


def test_a_folder_that_cannot_be_created_is_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("L3RS_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(TaskError, match=r"cache folder .*file.cache cannot be written \(Not a directory\).*L3RS_CACHE"):
        cached({"n": 1}, dict)


def test_the_folder_of_the_cache(monkeypatch, cache):
    assert cache_dir() == cache
    monkeypatch.delenv("L3RS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "here")
    assert cache_dir() == Path("here/l3rs")
