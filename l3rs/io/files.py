"""Reading and writing files that others may have made or may read at the same time."""

from __future__ import annotations

import os
import re
import shutil
import stat
import tempfile
from pathlib import Path


def write_atomically(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Write a file so that a reader finds the old content or the new one, never a part.

    The new file is made in a private folder beside the target and moved into place. A link at `path` is replaced,
    not followed.

    Args:
      path: the file. Its folder must exist.
      content: bytes, or text that is written as UTF-8.

    Raises:
      OSError: it cannot be written; the old file is as it was.
    """
    target = Path(path)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name[:100]}.", dir=target.parent))
    try:
        with (scratch / "new").open("xb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch / "new", target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def read_regular(path: str | os.PathLike[str], max_bytes: int, *, follow_links: bool = False) -> bytes:
    """Read a regular file that may come from an untrusted source.

    Args:
      path: the file.
      max_bytes: what it may have.
      follow_links: read what a link leads to: for a file that the user has named.

    Raises:
      FileNotFoundError: there is no such file.
      OSError: it is a link (unless they are followed), a folder, a device or a pipe, or it is larger than `max_bytes`;
        or it cannot be read.
    """
    if os.path.islink(path) and not follow_links:
        raise OSError(f"{path} is a link, not a regular file")
    # O_NONBLOCK: opening a pipe must not wait for a writer.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    if not follow_links:
        flags |= getattr(os, "O_NOFOLLOW", 0)
    with os.fdopen(os.open(path, flags), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError(f"{path} is not a regular file")
        if status.st_size > max_bytes:
            raise OSError(f"{path} has {status.st_size} bytes; at most {max_bytes} are allowed")
        return file.read(max_bytes)


def is_inner_name(name: str) -> bool:
    """Whether a file's name from elsewhere, with / between its parts, stays inside the folder that it is relative to.

    On every system: names with a backslash, a colon (a drive, or a stream of Windows) or NUL are refused, too.
    """
    return not {"", ".", ".."} & set(name.split("/")) and not re.search(r"[\\:\0]", name)


def first_line(error: BaseException, max_length: int = 300) -> str:
    """An error as one line: its type and the first line of its message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:max_length]
