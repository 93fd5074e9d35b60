"""What differs between operating systems and machines."""

from __future__ import annotations

import os
import sys


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
