"""One process per run: a lock on the run's folder, and a watch that notices when the folder is gone."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import filelock

from metatrain.config import UserError

_log = logging.getLogger("metatrain")

LOCK_FILE = ".lock"
_LOOK_SECONDS = 0.5  # longer than `is_locked` holds a lock that nobody else holds


class BusyError(UserError):
    """Another process holds the run's lock."""


class FolderGoneError(UserError):
    """The run's folder was deleted, moved or replaced while a process used it."""


class FolderWatch:
    """Notices that a run's folder is gone: writing on would leave half a folder.

    Args:
      folder: the run's local folder.
      name: what to call the run in messages.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self._folder, self._name = folder, name
        self._identity = self._look()

    def check(self) -> None:
        """Raise FolderGoneError unless the folder is the one from the start and holds its configuration."""
        if self.gone:
            raise FolderGoneError(
                f"the folder {self._name} was deleted, moved or replaced while the run was using it; "
                "the run stops and writes nothing more"
            )

    @property
    def gone(self) -> bool:
        return self._look() != self._identity

    def _look(self) -> tuple[int, int] | None:
        try:
            found = self._folder.stat()
            (self._folder / "config.yaml").stat()
        except OSError:
            return None
        return found.st_dev, found.st_ino


@contextlib.contextmanager
def run_lock(folder: Path, name: str) -> Iterator[None]:
    """Hold a run's lock. The system releases it when the process ends, also when it is killed.

    A folder on a file system without locks is used without one.

    Args:
      folder: the run's local folder.
      name: what to call the run in messages.

    Raises:
      BusyError: another process holds the lock.
    """
    lock = filelock.FileLock(folder / LOCK_FILE)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # filelock's own notice that it replaces a missing `flock`
            lock.acquire(timeout=_LOOK_SECONDS)
    except filelock.Timeout:
        raise BusyError(f"another process is using the run {name}; wait until it ends, or stop it") from None
    except OSError as error:
        _log.debug("%s cannot be locked: %s", name, error)
    try:
        yield
    finally:
        lock.release()


def is_locked(folder: Path) -> bool:
    """Whether a process holds the lock of a run in this folder, in which nothing is written."""
    if not (folder / LOCK_FILE).exists():
        return False
    lock = filelock.FileLock(folder / LOCK_FILE)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            lock.acquire(timeout=0)
    except filelock.Timeout:
        return True
    except OSError:
        return False
    lock.release()
    return False
