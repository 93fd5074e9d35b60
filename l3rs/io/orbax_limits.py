"""Checks of a `theta/` folder from elsewhere, before Orbax opens it.

Orbax and TensorStore allocate what the metadata and the compressed data ask for. A few hundred kilobytes can ask for
gigabytes, so both are compared with what the spec needs.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path

from l3rs.io.files import read_regular
from l3rs.spec import L3RSError

Shapes = Mapping[str, tuple[int, ...]]  # of the arrays that the spec needs, by flat name

_MAX_FILES = 256
_MAX_DECODED = 64 << 20  # bytes that compressed metadata and rounded-up blocks may take, beside the values
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_ZSTD_BLOCK = 1 << 17  # bytes, the largest block that the format allows


def check_files(folder: Path, shapes: Shapes) -> None:
    """Check that `folder` has regular files only, and not more or larger ones than the values need.

    Raises:
      L3RSError: it has others.
      OSError: it cannot be read.
    """
    if folder.is_symlink():
        raise L3RSError(f"{folder} is a link, not a folder")
    n_bytes = _n_bytes(shapes)
    left, n_files = 4 * n_bytes + (1 << 20), 0
    pending = [folder]
    while pending:
        for entry in os.scandir(pending.pop()):
            n_files += 1
            if n_files > _MAX_FILES:
                raise L3RSError(f"{folder} holds more than {_MAX_FILES} files")
            if entry.is_dir(follow_symlinks=False):
                pending.append(Path(entry.path))
                continue
            content = read_regular(entry.path, left)
            left -= len(content)
            _check_decoded(content, n_bytes, entry.path)


def check_arrays(folder: Path, shapes: Shapes, dtypes: Mapping[str, str] | None = None) -> None:
    """Compare the arrays that `folder` states to hold with `shapes`, without decoding one.

    Args:
      folder: as Orbax writes it.
      shapes: of the arrays.
      dtypes: of the arrays, as numpy writes them; "<f4" unless given.

    Raises:
      L3RSError: they differ, or are stored in another way than Orbax does.
      Exception: TensorStore cannot read the folder.
    """
    import tensorstore

    store = tensorstore.KvStore.open({"driver": "ocdbt", "base": f"file://{folder}/"}).result()
    found, left = {}, _n_bytes(shapes)
    for key in store.list().result():
        name, _, part = key.decode().rpartition("/")
        value = store.read(key).result().value
        if part == ".zarray":
            found[name.replace(".", "/")] = json.loads(value)
        elif re.fullmatch(r"\d+(\.\d+)*", part):
            _check_decoded(value, left, f"{folder}: {name[:100]}")
        else:
            raise L3RSError(f"{folder} holds an entry that is not Orbax's: {key.decode()[:100]!r}")
    if not set(found) <= set(shapes):
        raise L3RSError(f"{folder} holds {sorted(found)[:20]}; its spec needs {sorted(shapes)}")
    for name, array in sorted(found.items()):
        shape, chunks, compressor = tuple(array["shape"]), tuple(array["chunks"]), array["compressor"]
        needed = shapes[name]
        dtype, needed_dtype = str(array["dtype"])[:20], dtypes[name] if dtypes else "<f4"
        if shape != needed or dtype != needed_dtype:
            raise L3RSError(f"{folder}: {name} is '{dtype}' {list(shape)}; it must be '{needed_dtype}' {list(needed)}")
        if len(chunks) != len(shape) or any(c > max(n, 1) for c, n in zip(chunks, shape, strict=True)):
            raise L3RSError(f"{folder}: {name} {list(shape)} is stored in larger chunks, {list(chunks)}")
        if compressor is not None and compressor["id"] != "zstd":
            raise L3RSError(f"{folder}: {name} is not compressed with zstd")


def decoded_size(content: bytes, limit: int) -> int:
    """An upper bound of what all zstd frames in `content` decompress to; counting stops above `limit`."""
    total, start = 0, content.find(_ZSTD_MAGIC)
    while start >= 0 and total <= limit:
        position = start + 4
        descriptor = content[position] if position < len(content) else 0
        single_segment = descriptor >> 5 & 1
        content_size = (single_segment, 2, 4, 8)[descriptor >> 6]
        position += 1 + (1 - single_segment) + (0, 1, 2, 4)[descriptor & 3] + content_size
        last = False
        while not last and position + 3 <= len(content) and total <= limit:
            header = int.from_bytes(content[position : position + 3], "little")
            last, kind, size = bool(header & 1), header >> 1 & 3, header >> 3  # kind: 0 raw, 1 repeated byte, 2 coded
            total += _ZSTD_BLOCK if kind == 2 else size
            position += 3 + (1 if kind == 1 else size)
        start = content.find(_ZSTD_MAGIC, start + 4)
    return total


def _check_decoded(content: bytes, n_bytes: int, what: str) -> None:
    limit = 2 * n_bytes + _MAX_DECODED
    if decoded_size(content, limit) > limit:
        raise L3RSError(f"{what} decompresses to more than {limit} bytes; the spec needs {n_bytes}")


def _n_bytes(shapes: Shapes) -> int:
    return sum(4 * math.prod(shape) for shape in shapes.values())
