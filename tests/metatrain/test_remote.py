"""Runs in an object store, on fsspec's own stand-ins: in memory, and a folder behind a URL."""

from __future__ import annotations

import json
import logging
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import pytest

import l3rs
from metatrain.config import UserError, dump_config
from metatrain.outer import loop as trainer
from metatrain.outer.export import export
from metatrain.outer.store import Store, object_name
from metatrain.waiting import WaitError
from tests.metatrain.common import assert_same_theta, metrics, small_config
from tests.metatrain.test_trainer import stopped_at

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quiet") / "run"
    trainer.run(small_config(), folder)
    return folder


@pytest.fixture
def url() -> str:
    store = fsspec.filesystem("memory")
    if store.exists("/bucket"):
        store.rm("/bucket", recursive=True)
    return "memory://bucket/runs/small"


def test_a_run_in_a_store_is_the_run_in_a_folder(url: str, quiet: Path, tmp_path: Path) -> None:
    done = trainer.run(small_config(), url)
    assert (done.folder, done.optimizer, done.finished) == (url, f"{url}/optimizer", True)
    Store(url).pull(tmp_path / "copy")
    assert metrics(tmp_path / "copy") == metrics(quiet)
    assert_same_theta(tmp_path / "copy" / "optimizer", quiet / "optimizer")
    with pytest.raises(UserError, match=r"memory://bucket/runs/small exists; resume it with"):
        trainer.run(small_config(), url)
    export(url, tmp_path / "exported")
    assert_same_theta(tmp_path / "exported", quiet / "optimizer")
    with pytest.raises(UserError, match="memory://bucket/nothing is not a run"):
        trainer.resume("memory://bucket/nothing")


def test_an_interrupted_run_continues_on_another_machine(url: str, quiet: Path, tmp_path: Path) -> None:
    stopped_at(3, url)
    assert trainer.run(small_config(), url, resume_run=True).finished
    Store(url).pull(tmp_path / "copy")
    assert metrics(tmp_path / "copy") == metrics(quiet)
    assert_same_theta(tmp_path / "copy" / "optimizer", quiet / "optimizer")


def test_a_damaged_manifest_is_replaced_by_the_one_before(
    url: str, quiet: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stopped_at(4, url)
    store = fsspec.filesystem("memory")
    newest = max(path for path in store.ls("/bucket/runs/small", detail=False) if "manifest" in path)
    store.pipe_file(newest, store.cat_file(newest)[:50])
    with caplog.at_level(logging.WARNING):
        assert trainer.resume(url, trust_task=True).finished
    assert "is damaged; the one before it is used" in caplog.text
    Store(url).pull(tmp_path / "copy")
    assert_same_theta(tmp_path / "copy" / "optimizer", quiet / "optimizer")


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_damaged_object_leads_to_the_manifest_before(
    damage: str, url: str, quiet: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stopped_at(4, url)
    store = fsspec.filesystem("memory")
    newest, before, *_ = Store(url)._manifests()
    objects = (set((Store(url)._read(m) or {}).values()) for m in (newest, before))
    only_new = sorted(next(objects) - next(objects))[0]
    content = store.cat_file(f"/bucket/runs/small/{only_new}")
    store.rm_file(f"/bucket/runs/small/{only_new}")
    if damage == "truncated":
        store.pipe_file(f"/bucket/runs/small/{only_new}", content[:-1])
    with caplog.at_level(logging.WARNING):
        assert trainer.resume(url, trust_task=True).finished
    assert "is damaged; the one before it is used" in caplog.text
    Store(url).pull(tmp_path / "copy")
    assert_same_theta(tmp_path / "copy" / "optimizer", quiet / "optimizer")
    for path in store.ls("/bucket/runs/small/objects", detail=False):
        store.pipe_file(path, b"")
    with pytest.raises(UserError, match=r"none of the \d manifests is complete"):
        trainer.resume(url, trust_task=True)


@pytest.mark.parametrize("name", ["ABSOLUTE/x", "../x", "a/../../x", "C:/x", "..\\x"])
def test_a_manifest_that_names_files_outside_the_run_is_refused(url: str, tmp_path: Path, name: str) -> None:
    store = fsspec.filesystem("memory")
    store.pipe_file("/bucket/runs/small/" + object_name(b"harm"), b"harm")
    manifest = {"objects": {name.replace("ABSOLUTE", str(tmp_path)): object_name(b"harm")}}
    store.pipe_file("/bucket/runs/small/manifest-00000001.json", json.dumps(manifest).encode())
    with pytest.raises(UserError, match="none of the 1 manifests"):
        Store(url).pull(tmp_path / "deep" / "run")
    assert not list(tmp_path.rglob("*x*"))


def test_a_damaged_object_is_written_again(url: str, tmp_path: Path) -> None:
    """The run that continues produces the same content, whose object exists but is damaged."""
    folder = tmp_path / "run"
    folder.mkdir()
    store = Store(url)
    for name in ("a", "b"):
        (folder / name).write_text(name)
        store.push(folder)
    fsspec.filesystem("memory").pipe_file(f"/bucket/runs/small/{object_name(b'b')}", b"")
    store = Store(url)
    store.pull(tmp_path / "resumed")
    assert not (tmp_path / "resumed" / "b").exists()
    (tmp_path / "resumed" / "b").write_text("b")
    store.push(tmp_path / "resumed")
    Store(url).pull(tmp_path / "copy")
    assert (tmp_path / "copy" / "b").read_text() == "b"


def test_what_no_manifest_names_is_removed(url: str) -> None:
    trainer.run(small_config(checkpoint={"keep": 1}), url)
    store = fsspec.filesystem("memory")
    named = {stored for m in Store(url)._manifests() for stored in (Store(url)._read(m) or {}).values()}
    kept = {"objects/" + path.rpartition("/")[2] for path in store.ls("/bucket/runs/small/objects", detail=False)}
    assert kept == named
    assert len(Store(url)._manifests()) == 2


def test_a_store_that_fails_for_a_while_does_not_stop_the_run(
    url: str, quiet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    push, failures = Store.push, iter([False, True, True])

    def sometimes(self: Store, folder: Path) -> None:
        if next(failures, False):
            raise ConnectionResetError("the network is away")
        push(self, folder)

    monkeypatch.setattr(Store, "push", sometimes)
    assert trainer.run(small_config(), url).finished
    assert caplog.text.count("cannot be written (the network is away); trying again") == 2
    Store(url).pull(tmp_path / "copy")
    assert_same_theta(tmp_path / "copy" / "optimizer", quiet / "optimizer")
    monkeypatch.setattr(Store, "push", lambda *_: (_ for _ in ()).throw(ConnectionResetError("for good")))
    with pytest.raises(UserError, match=r"cannot be written: for good; the run is in (.*)") as refused:
        trainer.run(small_config(), "memory://bucket/runs/other")
    left = Path(str(refused.value).rpartition(" ")[2])
    assert (left / "state").is_dir()


def test_a_store_that_cannot_be_reached_is_not_a_damaged_one(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a run would go on from an older state, or be given up."""
    trainer.run(small_config(), url)

    def refused(*_: object) -> None:
        raise TimeoutError("slow down")

    monkeypatch.setattr(Store, "_copy", refused)
    with pytest.raises(WaitError, match=f"{url} cannot be read: slow down"):
        trainer.resume(url)


def test_unusable_urls_are_one_sentence() -> None:
    with pytest.raises(UserError, match=r"nowhere://a is not a URL for a run: Protocol not known"):
        trainer.run(small_config(), "nowhere://a")
    if not any((Path(path) / "gcsfs").is_dir() for path in sys.path):
        with pytest.raises(UserError, match=r"gs://a/b needs the package gcsfs"):
            trainer.run(small_config(), "gs://a/b")


def test_what_a_killed_process_left_half_written_stops_nothing_and_is_removed(tmp_path: Path) -> None:
    store, folder = tmp_path / "store", tmp_path / "run"
    (folder / ".report.html.x7/").mkdir(parents=True)
    (folder / ".report.html.x7/new").write_text("half")
    (folder / "config.yaml").write_text("name: a\n")
    Store(store.as_uri()).push(folder)
    leftovers = [store / "objects" / ".2fd2.s73a", store / ".manifest-00000002.json.b2"]
    for leftover in leftovers:
        leftover.mkdir()
        (leftover / "new").write_text("half")
    Store(store.as_uri()).push(folder)
    assert not any(leftover.exists() for leftover in leftovers)
    Store(store.as_uri()).pull(tmp_path / "copy")
    assert [path.name for path in (tmp_path / "copy").rglob("*")] == ["config.yaml"]


def test_a_heartbeat_that_ends_during_the_clean_up_does_not_fail_the_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("name: a\n")
    store = Store((tmp_path / "store").as_uri())
    listed = store._listed
    monkeypatch.setattr(store, "_listed", lambda folder: [*listed(folder), f"{folder}/.lease.json.gone1234"])
    store.push(tmp_path / "run")
    monkeypatch.undo()
    store.pull(tmp_path / "copy")
    assert (tmp_path / "copy" / "config.yaml").read_text() == "name: a\n"


def _newest_manifest(store: Path) -> int:
    return max((int(file.stem[9:]) for file in store.glob("manifest-*")), default=0)


@pytest.mark.slow
def test_kill_minus_nine_while_it_copies(tmp_path: Path) -> None:
    config = small_config(outer={"steps": 30}, task={"seconds": 0.02})
    trainer.run(config, tmp_path / "quiet")
    url, rng = (tmp_path / "store" / "run").as_uri(), random.Random(0)
    (tmp_path / "config.yaml").write_text(dump_config(config))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "metatrain.cli", "run", str(tmp_path / "config.yaml"), "--out", url, "--resume"]
    kills = 0
    for _ in range(20):
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
        begun = _newest_manifest(tmp_path / "store" / "run")
        while process.poll() is None:
            if kills < 4 and _newest_manifest(tmp_path / "store" / "run") >= begun + 3:
                time.sleep(0.2 * rng.random())
                process.send_signal(signal.SIGKILL)
                kills += 1
                break
            time.sleep(0.005)
        if process.wait() == 0:
            break
    assert (kills, process.returncode) == (4, 0)
    Store(url).pull(tmp_path / "copy")
    assert metrics(tmp_path / "copy") == metrics(tmp_path / "quiet")
    assert_same_theta(tmp_path / "copy" / "optimizer", tmp_path / "quiet" / "optimizer")
    assert l3rs.info(tmp_path / "copy" / "optimizer")["info"]["generations"] == 30
