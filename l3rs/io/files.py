"""Reading and writing files that others may have made or may read at the same time."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ORBAX_UNFINISHED = ".orbax-checkpoint-tmp"  # in the name of a folder that Orbax has not finished
_LEFT_SECONDS = 3600.0  # a scratch folder that nobody has changed for so long was left by a process that was killed
_OLD_SECONDS = 86400.0  # the same of a temporary folder
_RANDOM = r"[a-z0-9_]{8}"  # at the end of the names that `tempfile` makes


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


def remove_leftovers(folder: str | os.PathLike[str], name: str | None = None) -> None:
    """Remove scratch folders that killed processes left: those of `write_atomically` and `l3rs.save`.

    A folder that has changed within the last hour stays: its process may be alive.

    Args:
      folder: where they are. It need not exist.
      name: of the file or folder that was being written; any if not given.
    """
    pattern = re.compile(rf"\.{'.+' if name is None else re.escape(name)}\.{_RANDOM}", re.DOTALL)
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if pattern.fullmatch(entry.name) and is_left(entry, _LEFT_SECONDS) and set(os.listdir(entry)) <= {"new"}:
                shutil.rmtree(entry, ignore_errors=True)


@contextlib.contextmanager
def temporary_folder(prefix: str) -> Iterator[Path]:
    """A folder in the system's place for temporary files, which is removed in the end.

    Those with this prefix that killed processes of this user left there more than a day ago are removed, too.
    """
    with contextlib.suppress(OSError), os.scandir(tempfile.gettempdir()) as entries:
        for entry in entries:
            if re.fullmatch(re.escape(prefix) + _RANDOM, entry.name) and is_left(entry, _OLD_SECONDS):
                shutil.rmtree(entry, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=prefix) as folder:
        yield Path(folder)


def is_left(entry: os.DirEntry[str] | Path, seconds: float) -> bool:
    """Whether an entry is a folder of this user's that has not changed for so long.

    Raises:
      OSError: it cannot be looked at.
    """
    found = entry.stat(follow_symlinks=False)
    own = not hasattr(os, "getuid") or found.st_uid == os.getuid()  # Windows has none
    return stat.S_ISDIR(found.st_mode) and own and time.time() - found.st_mtime > seconds


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
