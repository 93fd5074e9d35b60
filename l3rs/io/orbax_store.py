"""Theta as Orbax stores it: the `theta/` folder of a checkpoint. Orbax is imported when it is needed.

A folder that is read may come from anyone, and Orbax believes the sizes that it states: see `orbax_limits`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from l3rs.extras import pip_install
from l3rs.io.files import first_line
from l3rs.io.orbax_limits import check_arrays, check_files
from l3rs.spec import L3RSError, Theta

_OVERHEAD = 1 << 17  # bytes of metadata in a small checkpoint, at most


def write_orbax(folder: Path, theta: Theta, target: Path) -> None:
    """Write theta into the new `folder`, which becomes a part of `target`.

    Raises:
      L3RSError: Orbax is not installed.
      OSError: the disk is full or refuses.
    """
    try:
        import orbax.checkpoint as ocp
    except ImportError as error:
        raise L3RSError(f"{target} cannot be saved without {error.name}: {pip_install('jax')}") from None
    n_bytes = sum(np.asarray(leaf).nbytes for part in theta.values() for leaf in _values(part))
    with ocp.PyTreeCheckpointer() as checkpointer, saving(target, n_bytes):
        checkpointer.save(folder, theta)
    # Orbax's mark for stores without renaming; it names the folder that was written to.
    (folder / "commit_success.txt").unlink(missing_ok=True)


def read_orbax(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> Theta:
    """Theta as a nested dict of numpy arrays. The caller checks names, shapes and dtypes of what it gets.

    Args:
      folder: as `write_orbax` made it, perhaps.
      shapes: the arrays that the spec needs, by flat name.

    Raises:
      L3RSError: Orbax is not installed, or the folder is damaged or holds something else.
    """
    folder = folder.absolute()
    try:
        check_files(folder, shapes)
        check_arrays(folder, shapes)
        import orbax.checkpoint as ocp

        with ocp.PyTreeCheckpointer() as checkpointer:
            theta = checkpointer.restore(folder)
        return _to_numpy(theta)
    except L3RSError:
        raise
    except ImportError as error:
        raise L3RSError(f"{folder} (a checkpoint of format 1) needs {error.name}: {pip_install('jax')}") from None
    except Exception as error:  # Orbax and TensorStore raise many kinds for a damaged folder
        raise L3RSError(f"{folder} cannot be read: {first_line(error, 200)}") from None


@contextlib.contextmanager
def saving(path: Path, n_bytes: int) -> Iterator[None]:
    """Around a save by Orbax of `n_bytes` into `path`: errors of the disk are OSErrors.

    The free space is checked first: when a disk fills up during a save, Orbax prints what its threads met.
    """
    folder = next(folder for folder in (path, *path.parents) if folder.exists())
    if shutil.disk_usage(folder).free < 2 * n_bytes + _OVERHEAD:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    with os_errors(path):
        yield


@contextlib.contextmanager
def os_errors(path: Path) -> Iterator[None]:
    """Turn TensorStore's ValueError about a full disk or a missing permission into the OSError that it stands for."""
    try:
        yield
    except ValueError as error:
        code = re.search(r"os_error_code='(\d+)'", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from None


def _values(part: Any) -> list[Any]:
    return list(part.values()) if isinstance(part, dict) else [part]


def _to_numpy(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _to_numpy(value) for key, value in tree.items()}
    return np.asarray(tree)
