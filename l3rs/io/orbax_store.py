"""Theta as Orbax stores it: the `theta/` folder of a checkpoint. Orbax is imported when it is needed.

A folder that is read may come from anyone, and Orbax believes the sizes that it states. So they are compared with
the spec before Orbax opens it.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from l3rs.io.files import first_line, read_regular
from l3rs.spec import L3RSError, Theta

_OVERHEAD = 1 << 17  # bytes of metadata in a small checkpoint, at most
_MAX_FILES = 256
_MAX_DECODED = 64 << 20  # bytes that the compressed parts of one file may become, beside the values
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_ZSTD_BLOCK = 1 << 17  # the largest block of the format


def write_orbax(folder: Path, theta: Theta, target: Path) -> None:
    """Write theta into the new `folder`, which becomes a part of `target`.

    Raises:
      L3RSError: Orbax is not installed.
      OSError: the disk is full or refuses.
    """
    ocp = _import_orbax(f"saving {target}")
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
    ocp = _import_orbax(f"{folder} (a checkpoint of format 1)")
    folder = folder.absolute()
    try:
        check_files(folder, 4 * sum(int(np.prod(shape, dtype=object)) for shape in shapes.values()))
        _check_arrays(folder, shapes)
        with ocp.PyTreeCheckpointer() as checkpointer:
            theta = checkpointer.restore(folder)
        return _to_numpy(theta)
    except L3RSError:
        raise
    except Exception as error:  # Orbax and TensorStore raise many kinds for a damaged folder
        raise L3RSError(f"{folder} cannot be read: {first_line(error, 200)}") from None


def check_files(folder: Path, n_bytes: int) -> None:
    """Check that `folder` has regular files only, not many, and no larger than `n_bytes` of values need.

    Raises:
      L3RSError: it has others.
      OSError: it cannot be read.
    """
    allowed, n_files = 4 * n_bytes + (1 << 20), 0
    pending = [folder]
    while pending:
        for entry in os.scandir(pending.pop()):
            n_files += 1
            if n_files > _MAX_FILES:
                raise L3RSError(f"{folder} holds more than {_MAX_FILES} files")
            if entry.is_dir(follow_symlinks=False):
                pending.append(Path(entry.path))
                continue
            try:
                content = read_regular(entry.path, allowed)
            except OSError as error:
                raise L3RSError(f"{folder} cannot be read: {error.strerror or error}") from None
            allowed -= len(content)
            if decoded_size(content, limit := _MAX_DECODED + 4 * n_bytes) > limit:
                raise L3RSError(f"{entry.path} would take more than {limit} bytes to read; the spec needs {n_bytes}")


def decoded_size(content: bytes, limit: int) -> int:
    """An upper bound of what the zstd frames anywhere in `content` decompress to; counting ends above `limit`."""
    total, start = 0, content.find(_ZSTD_MAGIC)
    while start >= 0 and total <= limit:
        position = start + 4
        descriptor = content[position] if position < len(content) else 0
        single_segment = descriptor >> 5 & 1
        content_size = (single_segment, 2, 4, 8)[descriptor >> 6]
        position += 1 + (not single_segment) + (0, 1, 2, 4)[descriptor & 3] + content_size
        last = False
        while not last and position + 3 <= len(content) and total <= limit:
            header = int.from_bytes(content[position : position + 3], "little")
            last, kind, size = bool(header & 1), header >> 1 & 3, header >> 3
            total += _ZSTD_BLOCK if kind == 2 else size
            position += 3 + (1 if kind == 1 else size)
        start = content.find(_ZSTD_MAGIC, start + 4)
    return total


def _check_arrays(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Compare the arrays that the folder states to hold with `shapes`, without reading one."""
    import tensorstore

    store = tensorstore.KvStore.open({"driver": "ocdbt", "base": f"file://{folder}/"}).result()
    keys = store.list().result()
    found = {}
    for key in keys:
        array, _, part = key.decode().rpartition("/")
        if part == ".zarray":
            found[array.replace(".", "/")] = json.loads(store.read(key).result().value)
        elif part in (".zattrs", ".zgroup") or not re.fullmatch(r"[\d.]+", part):
            raise L3RSError(f"{folder} holds an unexpected entry {key.decode()[:100]!r}")
    if not set(found) <= set(shapes):
        raise L3RSError(f"{folder} holds {sorted(found)[:20]}; its spec needs {sorted(shapes)}")
    for name, metadata in found.items():
        shape, chunks = tuple(metadata["shape"]), tuple(metadata["chunks"])
        compressor = metadata["compressor"]
        if shape != shapes[name] or metadata["dtype"] != "<f4":
            raise L3RSError(
                f"{folder}: {name} is {metadata['dtype']}{list(shape)}; its spec needs float32{list(shapes[name])}"
            )
        if any(chunk > max(size, 1) for chunk, size in zip(chunks, shape, strict=True)):
            raise L3RSError(f"{folder}: {name} is stored in pieces of {list(chunks)}, larger than itself {list(shape)}")
        if compressor is not None and compressor.get("id") != "zstd":
            raise L3RSError(f"{folder}: {name} is compressed with {compressor.get('id')!r}; only zstd is read")


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


def _import_orbax(what: str) -> Any:
    try:
        import orbax.checkpoint
    except ImportError:
        raise L3RSError(f"{what} needs orbax-checkpoint: pip install l3rs[jax]") from None
    return orbax.checkpoint


def _values(part: Any) -> list[Any]:
    return list(part.values()) if isinstance(part, dict) else [part]


def _to_numpy(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _to_numpy(value) for key, value in tree.items()}
    return np.asarray(tree)
