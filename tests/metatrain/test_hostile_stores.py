"""Malicious run stores: nothing is written outside, no link is followed, and no stated size is trusted."""

from __future__ import annotations

import hashlib
import json
import os
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from metatrain.config import UserError
from metatrain.outer.store import Store

CONTENT = b"harm"
STORED = f"objects/{hashlib.sha256(CONTENT).hexdigest()[:32]}"

Damage = Callable[[Path], None]
CASES: dict[str, Damage] = {}


def case(damage: Damage) -> Damage:
    CASES[damage.__name__] = damage
    return damage


def manifest(store: Path, objects: object, number: str = "00000001") -> Path:
    file = store / f"manifest-{number}.json"
    file.write_text(json.dumps({"objects": objects}))
    return file


def named(label: str, name: str) -> None:
    """A case: a manifest with a file of this name."""

    def damage(store: Path) -> None:
        manifest(store, {name: STORED})

    CASES[label] = damage


named("an_absolute_name", "/tmp/l3rs-outside")
named("a_name_that_leads_up", "../outside")
named("a_name_that_leads_up_later", "a/../../outside")
named("a_drive_of_windows", "C:/outside")
named("backslashes", "..\\outside")
named("an_empty_part", "a//outside")
named("a_dot", "./outside")
named("nul", "out\0side")
named("half_a_character", "\ud800outside")
named("a_long_name", "x" * 5000)
named("a_deep_name", "x/" * 1000 + "outside")


@case
def a_file_and_a_folder_of_one_name(store: Path) -> None:
    manifest(store, {"a": STORED, "a/b": STORED})


@case
def an_object_in_a_parent_folder(store: Path) -> None:
    (store.parent / "secret").write_bytes(CONTENT)
    manifest(store, {"config.yaml": "objects/../../secret"})


@case
def an_object_that_is_absolute(store: Path) -> None:
    manifest(store, {"config.yaml": "/etc/hostname"})


@case
def an_object_that_is_not_text(store: Path) -> None:
    manifest(store, {"config.yaml": ["objects"]})


@case
def an_object_that_is_a_link(store: Path) -> None:
    (store.parent / "secret").write_bytes(CONTENT)
    (store / STORED).unlink()
    (store / STORED).symlink_to(store.parent / "secret")
    manifest(store, {"config.yaml": STORED})


@case
def an_object_that_is_a_device(store: Path) -> None:
    (store / STORED).unlink()
    (store / STORED).symlink_to("/dev/zero")
    manifest(store, {"config.yaml": STORED})


@case
def an_object_that_is_a_pipe(store: Path) -> None:
    (store / STORED).unlink()
    os.mkfifo(store / STORED)
    manifest(store, {"config.yaml": STORED})


@case
def an_object_that_is_a_folder(store: Path) -> None:
    (store / STORED).unlink()
    (store / STORED).mkdir()
    manifest(store, {"config.yaml": STORED})


@case
def an_object_with_another_digest(store: Path) -> None:
    (store / STORED).write_bytes(b"other")
    manifest(store, {"config.yaml": STORED})


@case
def a_manifest_that_is_a_device(store: Path) -> None:
    (store / "manifest-00000001.json").symlink_to("/dev/zero")


@case
def a_manifest_that_is_a_pipe(store: Path) -> None:
    os.mkfifo(store / "manifest-00000001.json")


@case
def a_manifest_of_ten_gigabytes(store: Path) -> None:
    os.truncate(manifest(store, {}), 10 << 30)


@case
def a_deeply_nested_manifest(store: Path) -> None:
    manifest(store, {}).write_text('{"objects":' + "[" * 100_000)


@case
def a_manifest_of_many_files(store: Path) -> None:
    manifest(store, {str(i): STORED for i in range(30_000)})


@case
def a_manifest_that_is_a_list(store: Path) -> None:
    manifest(store, {}).write_text("[]")


@case
def a_manifest_whose_objects_are_a_list(store: Path) -> None:
    manifest(store, ["config.yaml"])


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "store"
    (folder / "objects").mkdir(parents=True)
    (folder / STORED).write_bytes(CONTENT)
    yield folder
    assert not list(tmp_path.rglob("*outside*"))
    assert not Path("/tmp/l3rs-outside").exists()


@pytest.mark.parametrize("name", CASES)
def test_refused_quickly_and_in_little_memory(store: Path, tmp_path: Path, name: str) -> None:
    CASES[name](store)
    start = time.monotonic()
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match="none of the 1 manifests is complete and undamaged") as error:
            Store(store.as_uri()).pull(tmp_path / "scratch" / "run")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert str(store) in str(error.value)
    assert time.monotonic() - start < 5
    assert peak < 100e6
    assert not (tmp_path / "scratch" / "run").exists()


def test_an_object_larger_than_a_run_is_not_copied_to_its_end(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("metatrain.outer.store._MAX_BYTES", 6)
    manifest(store, {"a": STORED, "b": STORED})
    with pytest.raises(UserError, match="none of the 1 manifests"):
        Store(store.as_uri()).pull(tmp_path / "run")


@pytest.mark.parametrize("number", ["x", "-1", "1e9", "9" * 100])
def test_files_named_almost_like_a_manifest_are_ignored(store: Path, tmp_path: Path, number: str) -> None:
    manifest(store, {"../outside": STORED}, number)
    Store(store.as_uri()).pull(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_links_in_a_store_are_replaced_not_followed(store: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (store / STORED).unlink()
    (store / STORED).symlink_to(victim)
    (store / "manifest-00000001.json").symlink_to(victim)
    (store / "manifest-00000002.json").symlink_to(victim)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "a").write_bytes(CONTENT)
    (tmp_path / "run" / "link").symlink_to(victim)
    Store(store.as_uri()).push(tmp_path / "run")
    assert victim.read_text() == "mine"
    Store(store.as_uri()).pull(tmp_path / "copy")
    assert {file.name: file.read_bytes() for file in (tmp_path / "copy").iterdir()} == {"a": CONTENT}


def test_a_folder_of_objects_that_is_a_link_is_not_cleaned_up(store: Path, tmp_path: Path) -> None:
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "file").touch()
    (store / STORED).unlink()
    (store / "objects").rmdir()
    (store / "objects").symlink_to(tmp_path / "victim")
    with pytest.raises(UserError, match="objects is a link"):
        Store(store.as_uri())
    assert [file.name for file in (tmp_path / "victim").iterdir()] == ["file"]
