"""Runs in an object store: gs://…, s3://…, or any URL that fsspec has a driver for.

The run works in a local folder, which is copied to the store after every checkpoint. An object is written
once and never changed. `manifest-N.json`, written last, lists the objects of the run; the newest readable
one counts. A process that dies while it copies thus leaves the previous copy intact.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from l3rs.io.locations import DRIVERS
from metatrain.config import UserError
from metatrain.outer.lock import LOCK_FILE

_log = logging.getLogger("metatrain")

_KEPT_MANIFESTS = 2


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
def run_folder(location: str | Path) -> Iterator[RunFolder]:
    """Open a run's folder: `location` itself, or a local copy of a URL's content.

    Raises:
      UserError: there is no driver for the URL, or the store does not answer.
    """
    if "://" not in str(location):
        yield RunFolder(Path(location), str(location))
        return
    store = Store(str(location))
    scratch = Path(tempfile.mkdtemp(prefix="l3rs-run-"))
    copied = True

    def saved(last: bool) -> None:
        nonlocal copied
        try:
            store.push(scratch / "run")
            copied = True
        except Exception as error:  # the drivers' own exceptions have no common base
            copied = False
            if last:
                raise UserError(f"{location} cannot be written: {error}; the run is in {scratch / 'run'}") from None
            _log.warning("%s cannot be written (%s); trying again at the next checkpoint", location, error)

    try:
        store.pull(scratch / "run")
        yield RunFolder(scratch / "run", str(location), saved)
    finally:
        if copied:
            shutil.rmtree(scratch, ignore_errors=True)


class Store:
    """A folder's copy in an object store."""

    def __init__(self, url: str) -> None:
        import fsspec

        self._verified: set[str] = set()  # objects that this process has read or written
        scheme = url.partition("://")[0]
        try:
            self._fs, self._root = fsspec.core.url_to_fs(url)
            self._manifests()
        except ImportError:
            raise UserError(f"{url} needs the package {DRIVERS.get(scheme, f'of fsspec for {scheme}://')}") from None
        except ValueError as error:
            raise UserError(f"{url} is not a URL for a run: {error}") from None
        except Exception as error:  # the drivers' own exceptions have no common base
            raise UserError(f"{url} does not answer: {type(error).__name__}: {error}") from None

    def pull(self, folder: Path) -> None:
        """Copy the newest complete state to `folder`, which is not created if the store is empty.

        Raises:
          UserError: there are manifests, but each lacks objects or has damaged ones.
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
        """Copy a state to `folder`. Returns whether every object has a harmless name, exists and has its digest."""
        for name, stored in objects.items():
            if not _is_inside(name):
                return False
            try:
                content = self._fs.cat_file(f"{self._root}/{stored}")
            except FileNotFoundError:
                return False
            if _object(content) != stored:
                return False
            self._verified.add(stored)
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
        return True

    def push(self, folder: Path) -> None:
        """Copy changed files, then write a manifest that lists them, then remove objects that no manifest lists."""
        objects = {}
        for file in sorted(folder.rglob("*")):
            # Orbax writes into folders with "tmp" in their names and renames them.
            name = file.relative_to(folder).as_posix()
            if file.is_file() and "tmp" not in name and name != LOCK_FILE:
                content = file.read_bytes()
                objects[name] = _object(content)
                if objects[name] not in self._verified:
                    self._fs.makedirs(f"{self._root}/objects", exist_ok=True)
                    self._fs.pipe_file(f"{self._root}/{objects[name]}", content)
                    self._verified.add(objects[name])
        manifests = self._manifests()
        number = int(_last(manifests[0])[9:-5]) + 1 if manifests else 1
        manifest = f"{self._root}/manifest-{number:08d}.json"
        self._fs.pipe_file(manifest, json.dumps({"objects": objects}).encode())
        self._clean()

    def _clean(self) -> None:
        manifests = self._manifests()
        kept = {stored for m in manifests[:_KEPT_MANIFESTS] for stored in (self._read(m) or {}).values()}
        self._verified &= kept
        gone = manifests[_KEPT_MANIFESTS:]
        gone += [path for path in self._listed(f"{self._root}/objects") if f"objects/{_last(path)}" not in kept]
        for path in gone:
            self._fs.rm_file(path)

    def _manifests(self) -> list[str]:
        """Paths of the manifests, the newest first."""
        return sorted((p for p in self._listed(self._root) if _last(p).startswith("manifest-")), reverse=True)

    def _listed(self, folder: str) -> list[str]:
        self._fs.invalidate_cache()
        try:
            return [str(path) for path in self._fs.ls(folder, detail=False)]
        except FileNotFoundError:
            return []

    def _read(self, manifest: str) -> dict[str, str] | None:
        try:
            found: Any = json.loads(self._fs.cat_file(manifest))["objects"]
        except (ValueError, KeyError, TypeError, FileNotFoundError):
            return None
        return {str(name): str(stored) for name, stored in found.items()}


def _is_inside(name: str) -> bool:
    """Whether a file's name in a manifest leads into the run's folder: others may have written the manifest."""
    return not (
        PurePosixPath(name).is_absolute() or PureWindowsPath(name).anchor or ".." in name.replace("\\", "/").split("/")
    )


def _object(content: bytes) -> str:
    """An object's name: the digest of its content."""
    return f"objects/{hashlib.sha256(content).hexdigest()[:32]}"


def _last(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2]
