"""Local copies of runs that are in stores. They are removed in the end, also if the process was killed."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import filelock

from l3rs.io.files import is_left

_PREFIX = "l3rs-run-"
_OWNER = ".owner"  # locked as long as the process lives that made the copy
_UNSAVED = "unsaved"  # is there if the copy holds what the store lacks
_NEW_SECONDS = 60.0  # a copy may be so old before it is locked


class LocalCopy:
    """A folder of its own for a run.

    Attributes:
      folder: of the run; not made yet.
    """

    def __init__(self, scratch: Path) -> None:
        self._mark = scratch / _UNSAVED
        self.folder = scratch / "run"

    def mark(self, *, unsaved: bool) -> None:
        """Note whether the store lacks what is in the folder: then the folder stays."""
        if unsaved:
            self._mark.touch()
        else:
            self._mark.unlink(missing_ok=True)

    @property
    def is_unsaved(self) -> bool:
        return self._mark.exists()


@contextlib.contextmanager
def local_copy() -> Iterator[LocalCopy]:
    """A new local copy; those of this user's processes that were killed are removed."""
    place = Path(tempfile.gettempdir())
    for left in place.glob(f"{_PREFIX}*"):
        _remove_if_left(left)
    scratch = Path(tempfile.mkdtemp(prefix=_PREFIX))
    copy = LocalCopy(scratch)
    lock = filelock.FileLock(scratch / _OWNER)
    with contextlib.suppress(OSError, NotImplementedError):  # a file system without locks: nothing is removed later
        lock.acquire(timeout=0)
    try:
        yield copy
    finally:
        lock.release()
        if not copy.is_unsaved:
            shutil.rmtree(scratch, ignore_errors=True)


def _remove_if_left(scratch: Path) -> None:
    """Remove a copy whose process is dead, unless it holds what its store lacks."""
    with contextlib.suppress(OSError, NotImplementedError):
        if not is_left(scratch, _NEW_SECONDS):
            return
        if (scratch / _UNSAVED).exists() or not (scratch / _OWNER).exists():
            return
        lock = filelock.FileLock(scratch / _OWNER)
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            return
        lock.release()
        shutil.rmtree(scratch, ignore_errors=True)
