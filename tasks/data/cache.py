"""The resident cache: arrays that are costly to make, memory-mapped and shared by all processes of a machine.

An entry is a folder of .npy files and a `key.json` with everything the arrays depend on, and each file's size and
digest. A builder locks `.lock-ENTRY`, writes into a new folder `.building-ENTRY-…`, flushes it to the disk and renames
it, so an entry is either complete or absent. The system releases the lock of a builder that dies, and the next
builder removes the folder it left.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tasks.base import TaskError
from tasks.data.lock import builder_lock, unless_locked

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
    """The arrays that `build` makes, from the cache when it has them.

    Args:
      key: everything the arrays depend on, as JSON, including the version of the code that makes them.
      build: makes named arrays. It may use the cache itself, under other keys.

    Returns:
      Read-only memory maps, ordered by name. When two processes want the same entry, one builds it and the other
      waits. An entry is built again when the size of one of its files has changed.

    Raises:
      TaskError: the cache folder cannot be written, the disk is full, or another process has the entry's lock and
        gives no sign of life.
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
        raise TaskError(f"the cache folder {entry.parent} lost an entry just written to it; set $L3RS_CACHE to another")
    return arrays


def _read(entry: Path) -> dict[str, np.ndarray] | None:
    """The arrays of an entry; None when it is missing or damaged."""
    try:
        sizes = json.loads((entry / _KEY).read_text())["sizes"]
        if any((entry / file).stat().st_size != size for file, size in sizes.items()):
            return None
        return {Path(file).stem.replace("@", "/"): np.load(entry / file, mmap_mode="r") for file in sorted(sizes)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _build(entry: Path, key: str, build: Callable[[], Mapping[str, np.ndarray]]) -> None:
    """Write an entry; the caller holds its lock, if the file system has locks."""
    with _writing(entry.parent):
        _remove_abandoned(entry.parent)
    arrays = build()  # an error of the builder is not an error of the cache
    with _writing(entry.parent):
        scratch = _scratch(entry)
        scratch.mkdir()
        try:
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
            _publish(scratch, entry)
            _sync(entry.parent)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def _publish(scratch: Path, entry: Path) -> None:
    """Rename a complete folder to the entry; a damaged entry makes way, a good one (built without locks) stays."""
    if entry.exists() and _read(entry) is None:
        _log.warning("the cache entry %s is damaged; it is built again", entry)
        old = _scratch(entry)
        entry.rename(old)  # a process that has its files mapped keeps them
        shutil.rmtree(old)
    try:
        scratch.rename(entry)
    except OSError:
        if _read(entry) is None:
            raise


def _scratch(entry: Path) -> Path:
    return entry.with_name(f".building-{entry.name}-{uuid.uuid4().hex}")


def _remove_abandoned(folder: Path) -> None:
    """Remove the folders of dead builders: a living builder holds its lock."""
    for scratch in folder.glob(".building-*"):
        with unless_locked(folder, scratch.name.split("-")[1]) as free:
            if free:
                shutil.rmtree(scratch, ignore_errors=True)


@contextlib.contextmanager
def _lock(entry: Path) -> Iterator[None]:
    """Hold the entry's lock; see `tasks.data.lock.builder_lock`."""
    with contextlib.ExitStack() as held:
        with _writing(entry.parent):
            entry.parent.mkdir(parents=True, exist_ok=True)
            held.enter_context(builder_lock(entry))
        yield


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Turn an error of the file system into one sentence."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or "no space left"  # numpy reports a short write without a reason
        raise TaskError(
            f"the cache folder {folder} cannot be written ({reason}); set $L3RS_CACHE to a folder with room"
        ) from error


def _sync(folder: Path) -> None:
    """Flush a folder's list of files to the disk, on systems where a folder can be opened."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Resident(NamedTuple):
    """The location of a cached array, valid on any machine that has the same entry with the same content."""

    entry: str
    file: str
    key: str  # the text of key.json, including the digests


def resident(array: np.ndarray) -> Resident | None:
    """The location of `array` in the cache; None when it is not a complete cached array."""
    name = getattr(array, "filename", None)
    if name is None or (path := Path(name)).parent.parent != cache_dir():
        return None
    try:
        whole = np.load(path, mmap_mode="r")
        key = (path.parent / _KEY).read_text()
    except (OSError, ValueError):
        return None
    if (whole.shape, whole.dtype) != (array.shape, array.dtype) or '"sha256"' not in key:
        return None  # a part of an array, or an entry of an older version without digests
    return Resident(path.parent.name, path.name, key)


def find_resident(location: Resident) -> np.ndarray | None:
    """The array in this machine's cache, memory-mapped; None when the cache lacks the same entry.

    Inits that were pretrained on two machines have the same key but may differ in the last bits, so digests count.
    """
    entry = cache_dir() / location.entry
    try:
        if (entry / _KEY).read_text() != location.key:
            return None
    except OSError:
        return None
    arrays = _read(entry)
    return None if arrays is None else arrays.get(Path(location.file).stem.replace("@", "/"))
