"""The resident cache: arrays that took work to make, memory-mapped, shared by all processes of a machine.

An entry is a folder of .npy files and a `key.json`: what they depend on, the size of each and its digest. Its
builder holds the lock file `.lock-ENTRY`, writes into `.building-ENTRY`, flushes that to the disk
and renames it, so an entry is there whole or not at all. The system drops the lock of a builder
that dies; what it leaves behind is removed by the next one.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tasks.base import TaskError

_VERSION = 2  # of an entry's layout
_KEY = "key.json"

_log = logging.getLogger(__name__)


def cache_dir() -> Path:
    """`$L3RS_CACHE`, else `l3rs` in the user's cache folder."""
    root = os.environ.get("L3RS_CACHE")
    if root:
        return Path(root)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "l3rs"


def cached(key: Mapping[str, Any], build: Callable[[], Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The arrays that `build` makes, made once.

    Args:
      key: everything the arrays depend on, as JSON; the version of the code that makes them too.
      build: makes named arrays. It may use the cache itself, under other keys.

    Returns:
      Read-only memory maps, ordered by name. Of two processes that want the same entry, one builds
      and the other waits. A file whose size is not what was written means building again.

    Raises:
      TaskError: the cache folder cannot be written, or the disk is full.
    """
    text = json.dumps({"layout": _VERSION, "key": dict(key)}, sort_keys=True)
    entry = cache_dir() / hashlib.sha256(text.encode()).hexdigest()[:24]
    arrays = _read(entry)
    if arrays is not None:
        return arrays
    with _lock(entry):
        arrays = _read(entry)  # while this process waited, another may have built it
        if arrays is None:
            _build(entry, text, build)
            arrays = _read(entry)
    if arrays is None:
        raise TaskError(f"the cache folder {entry.parent} does not keep what is written; set $L3RS_CACHE to another")
    return arrays


def _read(entry: Path) -> dict[str, np.ndarray] | None:
    """The arrays of an entry; None when it is missing, or not what was written."""
    try:
        sizes = json.loads((entry / _KEY).read_text())["sizes"]
        if any((entry / file).stat().st_size != size for file, size in sizes.items()):
            return None
        return {Path(file).stem.replace("@", "/"): np.load(entry / file, mmap_mode="r") for file in sorted(sizes)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _build(entry: Path, key: str, build: Callable[[], Mapping[str, np.ndarray]]) -> None:
    """Write an entry; the caller holds its lock."""
    scratch = entry.with_name(f".building-{entry.name}")
    with _writing(entry.parent):
        _remove_abandoned(entry.parent)
        shutil.rmtree(scratch, ignore_errors=True)
        if entry.exists():
            _log.warning("the cache entry %s is damaged; it is built again", entry)
            entry.rename(scratch)  # whoever has its files mapped keeps them
            shutil.rmtree(scratch)
    arrays = build()  # its own errors are not the cache's
    with _writing(entry.parent):
        try:
            scratch.mkdir()
            sizes, digests = {}, {}
            for name, array in arrays.items():
                file = scratch / f"{name.replace('/', '@')}.npy"
                with file.open("wb") as stream:
                    np.save(stream, array, allow_pickle=False)
                    stream.flush()
                    os.fsync(stream.fileno())
                sizes[file.name] = file.stat().st_size
                with file.open("rb") as stream:
                    digests[file.name] = hashlib.file_digest(stream, "sha256").hexdigest()
            with (scratch / _KEY).open("w") as stream:
                json.dump({**json.loads(key), "sizes": sizes, "sha256": digests}, stream)
                stream.flush()
                os.fsync(stream.fileno())
            _sync(scratch)
            scratch.rename(entry)
            _sync(entry.parent)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def _remove_abandoned(folder: Path) -> None:
    """Remove what dead builders left: a living one holds its lock."""
    for scratch in folder.glob(".building-*"):
        lock = _lock_file(folder, scratch.name.removeprefix(".building-"))
        with lock.open("w") as file, contextlib.suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(scratch, ignore_errors=True)


@contextlib.contextmanager
def _lock(entry: Path) -> Iterator[None]:
    """Hold the entry's lock, which processes and threads respect; wait for it if need be."""
    with contextlib.ExitStack() as stack:
        with _writing(entry.parent):
            entry.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(_lock_file(entry.parent, entry.name).open("w"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                _log.info("another process builds the cache entry %s; waiting for it", entry)
                fcntl.flock(file, fcntl.LOCK_EX)
        yield  # closing the file gives the lock back; the file stays, else two could hold "the" lock


def _lock_file(folder: Path, entry: str) -> Path:
    return folder / f".lock-{entry}"


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Turn what the file system refuses into one sentence."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or "no space left"  # numpy reports a short write without a reason
        raise TaskError(
            f"the cache folder {folder} cannot be written ({reason}); set $L3RS_CACHE to a folder with room"
        ) from error


def _sync(folder: Path) -> None:
    """Flush a folder's list of files to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Resident(NamedTuple):
    """Where a cached array is, on any machine that has the same entry with the same content."""

    entry: str
    file: str
    key: str  # the text of key.json, digests and all


def resident(array: np.ndarray) -> Resident | None:
    """Where `array` is in the cache; None when it is no whole cached array."""
    name = getattr(array, "filename", None)
    if name is None or (path := Path(name)).parent.parent != cache_dir():
        return None
    try:
        whole = np.load(path, mmap_mode="r")
        key = (path.parent / _KEY).read_text()
    except (OSError, ValueError):
        return None
    if (whole.shape, whole.dtype) != (array.shape, array.dtype) or '"sha256"' not in key:
        return None  # a part; or an entry of before there were digests
    return Resident(path.parent.name, path.name, key)


def find_resident(where: Resident) -> np.ndarray | None:
    """The array in this machine's cache, memory-mapped; None when it does not have the same entry.

    Inits that were pretrained here and elsewhere have one key, but not the same last bits: digests tell.
    """
    entry = cache_dir() / where.entry
    try:
        if (entry / _KEY).read_text() != where.key:
            return None
    except OSError:
        return None
    arrays = _read(entry)
    return None if arrays is None else arrays.get(Path(where.file).stem.replace("@", "/"))
