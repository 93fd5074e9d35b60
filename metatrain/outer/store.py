"""Runs in an object store: gs://…, s3://…, or any other place that fsspec has a driver for.

The run itself works in a local folder, which is copied after every checkpoint. Objects are written
once and never changed; the newest readable `manifest-N.json`, written last, says which of them belong
to the run. So a driver that dies while it copies leaves the copy before.
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
from pathlib import Path
from typing import Any

from metatrain.config import UserError

_log = logging.getLogger("metatrain")

_DRIVERS = {"gs": "gcsfs", "gcs": "gcsfs", "s3": "s3fs", "az": "adlfs", "abfs": "adlfs"}
_KEPT_MANIFESTS = 2


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """Where a run is.

    Attributes:
      path: its local folder.
      name: what to call it: the folder, or the URL.
      saved: to be called after something was saved; `last` when nothing will follow.
    """

    path: Path
    name: str
    saved: Callable[[bool], None] = lambda _: None


@contextlib.contextmanager
def run_folder(place: str | Path) -> Iterator[RunFolder]:
    """A run's folder: `place` itself, or for a URL a local copy of what is there.

    Raises:
      UserError: no driver for such a URL, or the store does not answer.
    """
    if "://" not in str(place):
        yield RunFolder(Path(place), str(place))
        return
    store = Store(str(place))
    scratch = Path(tempfile.mkdtemp(prefix="l3rs-run-"))
    all_there = True

    def saved(last: bool) -> None:
        nonlocal all_there
        try:
            store.push(scratch / "run")
            all_there = True
        except Exception as error:  # the drivers' own exceptions have no common base
            all_there = False
            if last:
                raise UserError(f"{place} cannot be written: {error}; the run is in {scratch / 'run'}") from None
            _log.warning("%s cannot be written (%s); trying again at the next checkpoint", place, error)

    try:
        store.pull(scratch / "run")
        yield RunFolder(scratch / "run", str(place), saved)
    finally:
        if all_there:
            shutil.rmtree(scratch, ignore_errors=True)


class Store:
    """A folder's copy in an object store."""

    def __init__(self, url: str) -> None:
        import fsspec

        self._whole: set[str] = set()  # objects that were read or written here
        scheme = url.partition("://")[0]
        try:
            self._fs, self._root = fsspec.core.url_to_fs(url)
            self._manifests()
        except ImportError:
            raise UserError(f"{url} needs the package {_DRIVERS.get(scheme, f'of fsspec for {scheme}://')}") from None
        except ValueError as error:
            raise UserError(f"{url} is no place for a run: {error}") from None
        except Exception as error:  # the drivers' own exceptions have no common base
            raise UserError(f"{url} does not answer: {type(error).__name__}: {error}") from None

    def pull(self, folder: Path) -> None:
        """Copy the newest whole state to `folder`; nothing is made when there is none.

        Raises:
          UserError: there are manifests, and the objects of none are whole.
        """
        manifests = self._manifests()
        for manifest in manifests:
            objects = self._read(manifest)
            if objects is not None and self._fetch(objects, folder):
                return
            shutil.rmtree(folder, ignore_errors=True)
            _log.warning("%s is damaged; the one before is used", manifest)
        if manifests:
            raise UserError(f"{self._root}: none of the {len(manifests)} manifests is whole")

    def _fetch(self, objects: dict[str, str], folder: Path) -> bool:
        """Copy a state to `folder`; whether all of it is there, as it was written."""
        for name, stored in objects.items():
            try:
                content = self._fs.cat_file(f"{self._root}/{stored}")
            except FileNotFoundError:
                return False
            if _object(content) != stored:
                return False
            self._whole.add(stored)
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
        return True

    def push(self, folder: Path) -> None:
        """Copy what has changed, then say that it belongs to the run, then remove what does not."""
        objects = {}
        for file in sorted(folder.rglob("*")):
            # Orbax writes into folders with tmp in their name and renames them.
            if file.is_file() and "tmp" not in str(file.relative_to(folder)):
                content = file.read_bytes()
                name = file.relative_to(folder).as_posix()
                objects[name] = _object(content)
                if objects[name] not in self._whole:
                    self._fs.makedirs(f"{self._root}/objects", exist_ok=True)
                    self._fs.pipe_file(f"{self._root}/{objects[name]}", content)
                    self._whole.add(objects[name])
        manifests = self._manifests()
        number = int(_last(manifests[0])[9:-5]) + 1 if manifests else 1
        manifest = f"{self._root}/manifest-{number:08d}.json"
        self._fs.pipe_file(manifest, json.dumps({"objects": objects}).encode())
        self._clean()

    def _clean(self) -> None:
        manifests = self._manifests()
        kept = {stored for m in manifests[:_KEPT_MANIFESTS] for stored in (self._read(m) or {}).values()}
        self._whole &= kept
        gone = manifests[_KEPT_MANIFESTS:]
        gone += [path for path in self._listed(f"{self._root}/objects") if f"objects/{_last(path)}" not in kept]
        for path in gone:
            self._fs.rm_file(path)

    def _manifests(self) -> list[str]:
        """The newest first."""
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


def _object(content: bytes) -> str:
    """An object's place: its content's digest."""
    return f"objects/{hashlib.sha256(content).hexdigest()[:32]}"


def _last(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2]
