"""Runs in an object store: gs://…, s3://…, or any URL that fsspec has a driver for.

The run works in a local folder, which is copied to the store after every checkpoint. An object is written
once and never changed. `manifest-N.json`, written last, lists the objects of the run; the newest readable
one counts. A process that dies while it copies thus leaves the previous copy intact.

Others may have written the store: names that lead outside, links, pipes, devices and files beyond the limits below are
refused, and nothing is written through a link.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import logging
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from l3rs.io.files import ORBAX_UNFINISHED, is_inner_name, write_atomically
from l3rs.io.locations import DRIVERS
from metatrain.config import UserError
from metatrain.outer.copies import local_copy
from metatrain.outer.lease import LeaseLostError, lease
from metatrain.outer.lock import LOCK_FILE
from metatrain.waiting import WaitError

_log = logging.getLogger("metatrain")

_KEPT_MANIFESTS = 2
# What a store that was tampered with or lost an object raises; other errors are of the disk or of the way to the store.
_DAMAGE = (ValueError, FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError)
_BAD_NAME = (errno.ENAMETOOLONG, errno.EILSEQ, errno.EINVAL, errno.ELOOP)
_MAX_MANIFEST_BYTES = 4 << 20
_MAX_FILES = 20_000
_MAX_BYTES = 64 << 30  # of a run's files together
_MAX_DEPTH = 30  # folders in a file's name
_PIECE = 1 << 20  # bytes that are read at a time
_MANIFEST = re.compile(r"manifest-(\d{8,15})\.json")
_LEASE, _MAX_LEASE_BYTES = "lease.json", 4096
_OBJECT = re.compile(r"objects/[0-9a-f]{32}")


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """A run's folder.

    Attributes:
      path: the local folder.
      name: its name in messages: the folder, or the URL.
      saved: call it after saving; its argument is True if nothing will follow.
    """

    path: Path
    name: str
    saved: Callable[[bool], None] = lambda _: None


@contextlib.contextmanager
def run_folder(location: str | Path, *, to_write: bool = True, must_exist: bool = False) -> Iterator[RunFolder]:
    """Open a run's folder: `location` itself, or a local copy of a URL's content.

    Args:
      location: a folder or a URL.
      to_write: hold the lease of a run in a store, as `run_lock` does for a folder.
      must_exist: refuse a store that holds no run, before anything is written there.

    Raises:
      UserError: there is no driver for the URL, or another driver holds the lease.
      WaitError: the store does not answer.
    """
    if "://" not in str(location):
        yield RunFolder(Path(location), str(location))
        return
    store = Store(str(location))
    if must_exist and store.is_empty():
        raise UserError(f"{location} is not a run: it has no manifest")
    with lease(store, str(location)) if to_write else contextlib.nullcontext(lambda: None) as check_lease:
        yield from _copied_folder(store, str(location), check_lease)


def _copied_folder(store: Store, location: str, check_lease: Callable[[], None]) -> Iterator[RunFolder]:
    """The local copy of a run in a store; a generator of one item, for `run_folder`."""
    with local_copy() as copy:

        def saved(last: bool) -> None:
            try:
                check_lease()
                store.push(copy.folder)
                copy.mark(unsaved=False)
            except LeaseLostError:
                raise
            except Exception as error:  # the drivers' own exceptions have no common base
                copy.mark(unsaved=True)
                if last:
                    raise UserError(f"{location} cannot be written: {error}; the run is in {copy.folder}") from None
                _log.warning("%s cannot be written (%s); trying again at the next checkpoint", location, error)

        try:
            store.pull(copy.folder)
        except UserError:
            raise
        except Exception as error:
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise WaitError(f"{location} cannot be read: {error}") from None
        yield RunFolder(copy.folder, location, saved)


class Store:
    """A folder's copy in an object store."""

    def __init__(self, url: str) -> None:
        import fsspec

        self._verified: set[str] = set()  # objects that this process has read or written
        scheme = url.partition("://")[0]
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*", scheme):
            raise UserError(f"{url} is not a URL for a run: it begins with no protocol such as file:// or gs://")
        try:
            self._fs, self._root = fsspec.core.url_to_fs(url)
            self._refuse_links()
            self._manifests()
        except UserError:
            raise
        except ImportError:
            raise UserError(f"{url} needs the package {DRIVERS.get(scheme, f'of fsspec for {scheme}://')}") from None
        except ValueError as error:
            raise UserError(f"{url} is not a URL for a run: {error}") from None
        except (TimeoutError, ConnectionError) as error:
            raise WaitError(f"{url} does not answer: {error}") from None
        except Exception as error:  # the drivers' own exceptions have no common base
            raise UserError(f"{url} cannot be used: {type(error).__name__}: {error}") from None

    def is_empty(self) -> bool:
        """Whether the store holds no run."""
        return not self._manifests()

    def pull(self, folder: Path) -> None:
        """Copy the newest complete state to `folder`, which is not created if the store is empty.

        Raises:
          UserError: there are manifests, but each lacks objects, has damaged ones, or names files outside the run.
        """
        manifests = self._manifests()
        for manifest in manifests:
            objects = self._read(manifest)
            if objects is not None and self._fetch(objects, folder):
                return
            shutil.rmtree(folder, ignore_errors=True)
            _log.warning("%s is damaged; the one before it is used", manifest)
        if manifests:
            raise UserError(f"{self._root}: none of the {len(manifests)} manifests is complete and undamaged")

    def _fetch(self, objects: dict[str, str], folder: Path) -> bool:
        """Copy a state to `folder`. Returns whether every object exists and has its digest."""
        left = _MAX_BYTES
        for name, stored in objects.items():
            target = folder / name
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                left -= self._copy(stored, target, left)
            except _DAMAGE:
                return False
            except OSError as error:
                if error.errno in _BAD_NAME:
                    return False
                raise  # a full disk, or a store that cannot be reached: its state may be whole
            self._verified.add(stored)
        return True

    def _copy(self, stored: str, target: Path, max_bytes: int) -> int:
        """Copy an object into a new file; returns its size.

        Raises:
          ValueError: it is no regular file, is larger than `max_bytes`, or does not have the digest in its name.
          OSError: it does not exist, or `target` cannot be written.
        """
        digest, size = hashlib.sha256(), 0
        self._require_file(f"{self._root}/{stored}")
        with self._fs.open(f"{self._root}/{stored}", "rb") as source, target.open("xb") as copy:
            while piece := source.read(_PIECE):
                size += len(piece)
                if size > max_bytes:
                    raise ValueError("too large")
                digest.update(piece)
                copy.write(piece)
        if _object_name(digest.hexdigest()) != stored:
            raise ValueError("its content does not have its digest")
        return size

    def push(self, folder: Path) -> None:
        """Copy changed files, then write a manifest that lists them, then remove objects that no manifest lists."""
        self._refuse_links()
        objects = {}
        for file in sorted(folder.rglob("*")):
            name = file.relative_to(folder).as_posix()
            if file.is_file() and not file.is_symlink() and not _is_unfinished(name) and name != LOCK_FILE:
                content = file.read_bytes()
                objects[name] = object_name(content)
                if objects[name] not in self._verified:
                    self._fs.makedirs(f"{self._root}/objects", exist_ok=True)
                    self._write(f"{self._root}/{objects[name]}", content)
                    self._verified.add(objects[name])
        manifests = self._manifests()
        number = _number(manifests[0]) + 1 if manifests else 1
        manifest = f"{self._root}/manifest-{number:08d}.json"
        self._write(manifest, json.dumps({"objects": objects}).encode())
        self._clean()

    def read_lease(self) -> bytes | None:
        """The content of `lease.json`; None if there is none."""
        path = f"{self._root}/{_LEASE}"
        try:
            self._fs.invalidate_cache()
            self._require_file(path)
            with self._fs.open(path, "rb") as file:
                return bytes(file.read(_MAX_LEASE_BYTES))
        except (FileNotFoundError, ValueError):
            return None

    def write_lease(self, content: bytes) -> None:
        self._fs.makedirs(self._root, exist_ok=True)
        self._write(f"{self._root}/{_LEASE}", content)

    def remove_lease(self) -> None:
        self._fs.rm_file(f"{self._root}/{_LEASE}")

    def _clean(self) -> None:
        manifests = self._manifests()
        kept = {stored for m in manifests[:_KEPT_MANIFESTS] for stored in (self._read(m) or {}).values()}
        self._verified &= kept
        gone = manifests[_KEPT_MANIFESTS:]
        gone += [path for path in self._listed(f"{self._root}/objects") if f"objects/{_last(path)}" not in kept]
        gone += [path for path in self._listed(self._root) if _last(path).startswith((".manifest-", f".{_LEASE}."))]
        for path in gone:
            if self._is_local() and Path(path).is_dir() and not Path(path).is_symlink():
                # Of a process that was killed in `write_atomically`, or of the heartbeat, which removes it itself.
                shutil.rmtree(path, ignore_errors=True)
            else:
                with contextlib.suppress(FileNotFoundError):
                    self._fs.rm_file(path)

    def _manifests(self) -> list[str]:
        """Paths of the manifests, the newest first."""
        found = (path for path in self._listed(self._root) if _MANIFEST.fullmatch(_last(path)))
        return sorted(found, key=_number, reverse=True)

    def _listed(self, folder: str) -> list[str]:
        self._fs.invalidate_cache()
        try:
            return [str(path) for path in self._fs.ls(folder, detail=False)]
        except FileNotFoundError:
            return []

    def _read(self, manifest: str) -> dict[str, str] | None:
        """{file of the run: object} of a manifest; None if it is damaged or names files outside the run."""
        try:
            self._require_file(manifest)
            with self._fs.open(manifest, "rb") as file:
                text = file.read(_MAX_MANIFEST_BYTES + 1)
            found: Any = json.loads(text)["objects"] if len(text) <= _MAX_MANIFEST_BYTES else None
        except (ValueError, KeyError, TypeError, FileNotFoundError, RecursionError):
            return None
        if not isinstance(found, dict) or len(found) > _MAX_FILES:
            return None
        return found if all(_is_entry(name, stored) for name, stored in found.items()) else None

    def _require_file(self, path: str) -> None:
        """Raise ValueError unless `path` is a regular file: a pipe would never end, a link may lead anywhere."""
        entry = self._fs.info(path)
        if entry.get("islink") or entry.get("type") != "file":
            raise ValueError("not a regular file")

    def _write(self, path: str, content: bytes) -> None:
        """Write an object or a manifest. A link at `path` is replaced, not followed."""
        if self._is_local():
            write_atomically(path, content)
        else:
            self._fs.pipe_file(path, content)

    def _refuse_links(self) -> None:
        """Raise UserError if a local store's folder of objects is a link: its target would be cleaned up."""
        if self._is_local() and Path(self._root, "objects").is_symlink():
            raise UserError(f"{self._root}/objects is a link; a run's store must hold its objects itself")

    def _is_local(self) -> bool:
        from fsspec.implementations.local import LocalFileSystem

        return isinstance(self._fs, LocalFileSystem)


def _is_entry(name: str, stored: Any) -> bool:
    """Whether a line of a manifest names a file inside the run and an object of the store."""
    return (
        is_inner_name(name)
        and name.count("/") < _MAX_DEPTH
        and isinstance(stored, str)
        and _OBJECT.fullmatch(stored) is not None
    )


def _is_unfinished(name: str) -> bool:
    """Whether a file of the run is in a folder that is being written and will be renamed."""
    # Those of `write_atomically` and `l3rs.save` begin with a dot.
    return any(
        ORBAX_UNFINISHED in part or part.startswith(".") or part.endswith(".replaced") for part in name.split("/")[:-1]
    )


def object_name(content: bytes) -> str:
    """An object's name: the digest of its content."""
    return _object_name(hashlib.sha256(content).hexdigest())


def _object_name(digest: str) -> str:
    return f"objects/{digest[:32]}"


def _number(manifest: str) -> int:
    """The number in a manifest's name."""
    found = _MANIFEST.fullmatch(_last(manifest))
    assert found is not None
    return int(found[1])


def _last(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2]
