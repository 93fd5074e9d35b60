"""Files that a user names as data: they are looked at before they are read."""

from __future__ import annotations

import stat
from pathlib import Path

from tasks.base import TaskError

_MOST_BYTES = 1 << 30  # of a file of text


def check_file(path: Path, name: str) -> None:
    """Raise TaskError unless a file is regular and has at most a GiB: a pipe would never end.

    Args:
      path: the file; a link is followed.
      name: what the error calls it, e.g. "the text a.txt".

    Raises:
      OSError: it does not exist, or cannot be looked at.
    """
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise TaskError(f"{name} is not a regular file")
    if found.st_size > _MOST_BYTES:
        raise TaskError(f"{name} has {found.st_size} bytes; {_MOST_BYTES} is the most allowed")
