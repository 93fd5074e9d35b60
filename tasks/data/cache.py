"""The resident cache: arrays that took work to make, memory-mapped, shared by all processes of a machine."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

_VERSION = 1  # a change of what any entry holds is a new version


def cache_dir() -> Path:
    """`$L3RS_CACHE`, else `l3rs` in the user's cache folder."""
    root = os.environ.get("L3RS_CACHE")
    if root:
        return Path(root)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "l3rs"


def cached(key: Mapping[str, Any], build: Callable[[], Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The arrays that `build` makes, made once.

    Args:
      key: everything the arrays depend on, as JSON.
      build: makes named arrays.

    Returns:
      Read-only memory maps. An entry appears whole or not at all: it is written elsewhere and
      renamed. Of two processes that build the same entry, the first to finish wins.
    """
    text = json.dumps({"version": _VERSION, **key}, sort_keys=True)
    entry = cache_dir() / hashlib.sha256(text.encode()).hexdigest()[:24]
    if not entry.is_dir():
        entry.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=".building-", dir=entry.parent))
        try:
            for name, array in build().items():
                np.save(scratch / f"{name.replace('/', '@')}.npy", array)
            (scratch / "key.json").write_text(text)
            try:
                scratch.rename(entry)
            except OSError:
                if not entry.is_dir():  # else another process was first, with the same content
                    raise
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return {file.stem.replace("@", "/"): np.load(file, mmap_mode="r") for file in sorted(entry.glob("*.npy"))}
