"""The lease of a run in a store: one driver at a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time

import fsspec
import pytest

from metatrain.config import UserError
from metatrain.outer import lease as module
from metatrain.outer import loop as trainer
from metatrain.outer.lease import LeaseLostError, lease
from metatrain.outer.lock import BusyError
from tests.metatrain.common import small_config
from tests.metatrain.test_trainer import stopped_at


class Memory:
    content: bytes | None = None

    def read_lease(self) -> bytes | None:
        return self.content

    def write_lease(self, content: bytes) -> None:
        self.content = content

    def remove_lease(self) -> None:
        self.content = None


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("HEARTBEAT_SECONDS", 0.05), ("EXPIRE_SECONDS", 0.8), ("_LOOK_SECONDS", 0.05)):
        monkeypatch.setattr(module, name, seconds)


def foreign(seconds_ago: float = 0.0, pid: int = 1, machine: str = "elsewhere") -> bytes:
    sign = {"owner": "them", "machine": machine, "pid": pid, "time": time.time() - seconds_ago}
    return json.dumps(sign).encode()


def test_a_second_driver_is_refused_while_the_first_is_alive() -> None:
    store = Memory()
    with lease(store, "a") as check:
        with pytest.raises(BusyError, match=rf"process {os.getpid()} on .* is using the run a"), lease(store, "a"):
            pass
        check()
    assert store.content is None
    with lease(store, "a"):
        pass


def test_a_lease_without_a_heartbeat_expires() -> None:
    store = Memory()
    store.content = foreign()
    began = time.monotonic()
    with lease(store, "a") as check:
        check()
        assert 0.5 < time.monotonic() - began < 5


@pytest.mark.parametrize(
    "content", [foreign(seconds_ago=5.0), b"nonsense", b"{}", b"[" * 4096], ids=["old", "text", "empty", "deep"]
)
def test_an_old_or_damaged_lease_is_replaced_at_once(content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LOOK_SECONDS", 60.0)
    store = Memory()
    store.content = content
    with lease(store, "a"):
        assert json.loads(store.content)["pid"] == os.getpid()


@pytest.mark.skipif(os.name != "posix", reason="only POSIX can ask whether a process lives")
def test_the_lease_of_a_dead_process_of_this_machine_is_replaced_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LOOK_SECONDS", 60.0)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    store = Memory()
    store.content = foreign(pid=dead.pid, machine=module._machine())
    with lease(store, "a"):
        pass


def test_a_driver_that_was_stopped_notices_that_another_has_taken_over() -> None:
    store = Memory()
    with lease(store, "a") as check:
        store.content = foreign()
        time.sleep(0.3)
        with pytest.raises(LeaseLostError, match="process 1 on elsewhere\\) has taken over the run a"):
            check()
    assert b"them" in (store.content or b"")  # neither the heartbeat nor the end removes the lease of another driver


def test_two_drivers_of_one_run_in_a_store() -> None:
    store = fsspec.filesystem("memory")
    url, path = "memory://lease-test/run", "/lease-test/run/lease.json"
    stopped_at(3, url)
    assert not store.exists(path)
    manifests = sorted(p for p in store.ls("/lease-test/run", detail=False) if "manifest" in p)
    over = threading.Event()

    def beat() -> None:
        while not over.wait(0.05):
            store.pipe_file(path, foreign())

    store.pipe_file(path, foreign())
    heart = threading.Thread(target=beat)
    heart.start()
    try:
        with pytest.raises(UserError, match="is using the run memory://lease-test/run"):
            trainer.resume(url, trust_task=True)
    finally:
        over.set()
        heart.join()
    assert sorted(p for p in store.ls("/lease-test/run", detail=False) if "manifest" in p) == manifests
    assert trainer.resume(url, trust_task=True).finished
    with pytest.raises(UserError, match="exists; resume it with"):
        trainer.run(small_config(), url)
    assert not store.exists(path)


def test_a_driver_that_lost_its_lease_writes_nothing_more(monkeypatch: pytest.MonkeyPatch) -> None:
    # A heartbeat that looked before the other driver wrote, and writes after it, would take the lease back.
    monkeypatch.setattr(module, "HEARTBEAT_SECONDS", 60.0)
    store = fsspec.filesystem("memory")
    generation, pushed = trainer._generation, []

    def taken_over(setup, evaluator, progress, *rest):
        if progress.generation == 3:
            store.pipe_file("/lease-test/lost/lease.json", foreign())
            pushed.extend(store.ls("/lease-test/lost", detail=False))
        return generation(setup, evaluator, progress, *rest)

    monkeypatch.setattr(trainer, "_generation", taken_over)
    with pytest.raises(UserError, match="has taken over the run"):
        trainer.run(small_config(), "memory://lease-test/lost")
    assert sorted(store.ls("/lease-test/lost", detail=False)) == sorted(pushed)
