"""What differs between operating systems and machines."""

from __future__ import annotations

import os
import re
import sys
import tempfile
from pathlib import Path

from l3rs.io.files import remove_leftovers
from metatrain.config import UserError


def usable_cpus() -> int:
    """The CPUs that this process may use; all of the machine's where the system cannot say which."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    count = os.process_cpu_count() if hasattr(os, "process_cpu_count") else os.cpu_count()  # Python 3.13 has the first
    return count or 1


def search_current_folder() -> None:
    """Let Python import modules of the current folder, after everything that is installed.

    Called only when the user names code of their own (`package.module:function`). Otherwise a file such
    as `fsspec.py` beside a configuration could be imported in place of an optional package.
    """
    folder = os.getcwd()
    if folder not in sys.path:
        sys.path.append(folder)


def check_destination(folder: Path, *files: str) -> None:
    """Check that a folder can be created or written, before hours of computing for it.

    Args:
      folder: which need not exist.
      files: that will be written into it; none of them may be a folder.

    Raises:
      UserError: it cannot.
    """
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(folder)):
        raise UserError(f"{folder} is a URL; this must be a folder of this machine")
    if "\0" in str(folder):
        raise UserError(f"{str(folder)!r} is not a path: it contains a NUL character")
    for parent in (folder, *folder.absolute().parents):
        if os.path.lexists(parent):
            break
    if not parent.is_dir():
        raise UserError(f"{folder} cannot be written: {parent} is not a folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"{folder} cannot be written: there is no permission to write in {parent}")
    try:  # some file systems have no files, /proc for one
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=parent):
            pass
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}") from None
    remove_leftovers(parent, folder.name)
    remove_leftovers(folder)
    for file in files:
        if (folder / file).is_dir():
            raise UserError(f"{folder / file} cannot be written: it is a folder")
