"""What killed processes leave behind stops nothing, is copied nowhere, and goes away."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

import l3rs
from l3rs.io.files import remove_leftovers, temporary_folder, write_atomically
from metatrain.outer import loop
from metatrain.outer.copies import local_copy
from metatrain.outer.store import Store, run_folder
from metatrain.system import check_destination
from tests.metatrain.common import assert_same_theta, metrics
from tests.metatrain.test_trainer import stopped_at

ROOT = Path(__file__).parents[2]
LONG_AGO = time.time() - 2 * 86400


def left(folder: Path, hours: float = 48) -> Path:
    """A folder with a file that a process killed so many hours ago was writing."""
    (folder / "new").mkdir(parents=True)
    (folder / "new" / "part").write_text("x" * 100)
    os.utime(folder, (time.time() - 3600 * hours,) * 2)
    return folder


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stopped") / "run"
    stopped_at(2, folder, outer={"steps": 4})
    return folder


@pytest.fixture
def run(stopped: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(stopped, tmp_path / "run"))


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The system's folder for temporary files."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


IN_A_RUN = (
    ".config.yaml.abcdefgh", ".optimizer.json.abcdefgh", ".report.html.a_cdefg0", ".optimizer.abcdefgh",
    "state/3.orbax-checkpoint-tmp", "state/1.orbax-checkpoint-tmp-17",
)  # fmt: skip


def test_a_run_with_leftovers_resumes_without_them(stopped: Path, run: Path, tmp_path: Path) -> None:
    for name in IN_A_RUN:
        left(run / name)
    left(run / "optimizer.replaced")
    loop.resume(run)
    loop.resume(shutil.copytree(stopped, tmp_path / "quiet"))
    assert metrics(run) == metrics(tmp_path / "quiet")
    assert_same_theta(run / "optimizer", tmp_path / "quiet" / "optimizer")
    assert {p.relative_to(run) for p in run.rglob("*") if p.is_dir()} == {
        p.relative_to(tmp_path / "quiet") for p in (tmp_path / "quiet").rglob("*") if p.is_dir()
    }


def test_leftovers_of_a_run_are_not_copied_to_a_store(run: Path, tmp_path: Path) -> None:
    for name in (*IN_A_RUN, "optimizer.replaced"):
        left(run / name)
    (run / "tensorboard").mkdir()
    (run / "tensorboard" / "events.out.tfevents.1.tmp-host").write_text("a host may have any name")
    store = Store(f"file://{tmp_path / 'store'}")
    store.push(run)
    store.pull(tmp_path / "copy")
    assert not list((tmp_path / "copy").rglob("part"))
    assert (tmp_path / "copy" / "tensorboard" / "events.out.tfevents.1.tmp-host").is_file()
    files = {p.relative_to(run) for p in run.rglob("*") if p.is_file() and p.name not in ("part", ".lock")}
    assert {p.relative_to(tmp_path / "copy") for p in (tmp_path / "copy").rglob("*") if p.is_file()} == files


def test_leftovers_in_a_store_go_with_the_next_copy(run: Path, tmp_path: Path) -> None:
    root = tmp_path / "store"
    for name in (".lease.json.abcdefgh", ".manifest-00000001.json.abcdefgh", "objects/.0123456789abcdef.abcdefgh"):
        left(root / name)
    Store(f"file://{root}").push(run)
    assert not [path for path in root.rglob("*") if path.name.startswith(".") or path.name == "part"]


@pytest.mark.parametrize("save", ["l3rs.save", "check_destination"])
def test_leftovers_beside_a_new_folder_go(save: str, tmp_path: Path) -> None:
    old, other, young = (left(tmp_path / f".{name}.abcdefgh") for name in ("new", "other", "newer"))
    own = left(tmp_path / ".new.abcdefg1", hours=0.1)
    if save == "l3rs.save":
        spec = l3rs.Spec.create({"w": np.ones((3, 2))}, hidden=(4,))
        l3rs.save(tmp_path / "new", l3rs.init_meta_params(jax.random.key(0), spec), spec)
    else:
        check_destination(tmp_path / "new")
    assert not old.exists()
    assert other.exists(), "of something else"
    assert young.exists(), "of another name"
    assert own.exists(), "its process may be alive"


def test_leftovers_of_an_evaluation_go(tmp_path: Path) -> None:
    folder = tmp_path / "results"
    left(folder / ".results.json.abcdefgh")
    check_destination(folder, "results.json")
    assert not list(folder.iterdir())


def test_nothing_else_is_removed(tmp_path: Path) -> None:
    kept = [tmp_path / ".cache.abcdefgh", tmp_path / ".name.abcdefg", tmp_path / "name.abcdefgh"]
    for folder in kept:
        left(folder)
    (kept[0] / "mine").write_text("not of ours")
    os.utime(kept[0], (LONG_AGO, LONG_AGO))
    (tmp_path / ".link.abcdefgh").symlink_to(tmp_path / "name.abcdefgh")
    remove_leftovers(tmp_path)
    assert all((folder / "new" / "part").is_file() for folder in kept)
    assert (tmp_path / ".link.abcdefgh").is_symlink()
    remove_leftovers(tmp_path / "missing")


KILLED = """
import os, signal, sys
from pathlib import Path
from l3rs.io import files
os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
files.write_atomically(Path(sys.argv[1]), "content")
"""


def test_what_a_killed_writer_really_leaves_is_recognised(tmp_path: Path) -> None:
    process = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "report.html")], cwd=ROOT, check=False)
    assert process.returncode == -signal.SIGKILL
    [scratch] = tmp_path.iterdir()
    os.utime(scratch, (LONG_AGO, LONG_AGO))
    write_atomically(tmp_path / "report.html", "content")
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


@pytest.mark.parametrize("prefix", ["l3rs-checkpoint-", "l3rs-job-"])
def test_old_temporary_folders_go(prefix: str, temporary: Path) -> None:
    old, other = left(temporary / f"{prefix}abcdefgh"), left(temporary / "l3rs-run-abcdefgh")
    young = left(temporary / f"{prefix}abcdefg1", hours=1)
    with temporary_folder(prefix) as folder:
        assert folder.parent == temporary
        assert not old.exists()
    assert sorted(temporary.iterdir()) == sorted([other, young])


COPY = """
import sys, time
from pathlib import Path
from metatrain.outer.copies import local_copy
with local_copy() as copy:
    (copy.folder).mkdir()
    copy.mark(unsaved=sys.argv[1] == "unsaved")
    print(copy.folder, flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("kind", ["saved", "unsaved"])
def test_the_copy_of_a_killed_driver_goes_unless_it_holds_what_the_store_lacks(kind: str, temporary: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(temporary)}
    process = subprocess.Popen(
        [sys.executable, "-c", COPY, kind], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    folder = Path(process.stdout.readline().strip())

    def next_copy() -> None:
        os.utime(folder.parent, (LONG_AGO, LONG_AGO))
        with local_copy():
            pass

    next_copy()
    assert folder.is_dir(), "its process is alive"
    process.kill()
    process.communicate()
    next_copy()
    assert folder.is_dir() == (kind == "unsaved")


def test_a_copy_that_cannot_be_saved_stays(tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("the store is gone")

    push: Callable[..., None] = Store.push
    with run_folder(f"file://{tmp_path / 'store'}") as opened:
        opened.path.mkdir()
        (opened.path / "config.yaml").write_text("name: x")
        monkeypatch.setattr(Store, "push", refuse)
        opened.saved(False)
    assert (opened.path / "config.yaml").is_file()
    monkeypatch.setattr(Store, "push", push)
    with run_folder(f"file://{tmp_path / 'store'}") as another:
        another.path.mkdir()
        another.saved(True)
    assert [path.name for path in temporary.iterdir()] == [opened.path.parent.name]
