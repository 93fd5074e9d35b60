"""Checks of a prepared TFDS folder, which may come from elsewhere: its files are data, and only that.

TFDS imports the Python classes that a `features.json` names and builds paths from the names in a `dataset_info.json`.
So both are checked before TFDS reads the folder.
"""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tasks.base import TaskError

_MOST_BYTES = 64 << 20  # of a metadata file
_CLASSES = "tensorflow_datasets.core.features."  # the only classes that a feature may be


class Metadata(NamedTuple):
    """What a prepared TFDS folder says about itself."""

    text: bytes  # of dataset_info.json
    info: dict[str, Any]  # the same, parsed
    features: dict[str, Any]  # the top-level features of features.json, by name
    splits: list[str]  # the names of the splits that have records


def read_metadata(folder: Path) -> Metadata:
    """Read and check a folder's metadata, without importing TFDS.

    Raises:
      TaskError: a missing or damaged file; a link out of the folder, a device or a pipe; a name that is a path; a
        feature of a class that is not TFDS's own; or sizes that the files cannot have.
    """
    try:
        size = _check_files(folder)
        text = (folder / "dataset_info.json").read_bytes()
        info = json.loads(text)
        tree = json.loads((folder / "features.json").read_text())
        features = tree["featuresDict"]["features"]
        lengths = {split["name"]: sum(map(int, split["shardLengths"])) for split in info["splits"]}
        templates = [split.get("filepathTemplate", "") for split in info["splits"]]
        names = [str(info.get(key, "")) for key in ("name", "fileFormat", "version")]
        classes = list(_class_names(tree))
        dict(features)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise TaskError(f"the TFDS data set in {folder} is damaged or too old ({error})") from error
    for name in (*lengths, *templates, *names):
        if "/" in name or "\\" in name or "\0" in name or name in (".", ".."):
            raise TaskError(f"the TFDS data set in {folder} has the name {name!r}; a path is not allowed there")
    for name in classes:
        if not name.startswith(_CLASSES):
            raise TaskError(f"the TFDS data set in {folder} needs the code of {name!r}; allowed are {_CLASSES}*")
    for split, length in lengths.items():
        if length > size or length < 0:
            raise TaskError(f"the TFDS data set in {folder} cannot hold {length} records of {split!r} in {size} bytes")
    return Metadata(text, info, features, [split for split, length in lengths.items() if length])


def _check_files(folder: Path) -> int:
    """The total size of a folder's files in bytes; refuses any that is not a regular file of this folder."""
    root, total = folder.resolve(), 0
    for file in folder.iterdir():
        target = file.resolve()
        if target.parent != root:
            raise TaskError(f"{file} is a link out of its TFDS data set; copy the file there instead")
        found = target.stat()
        if stat.S_ISDIR(found.st_mode):
            continue
        if not stat.S_ISREG(found.st_mode):
            raise TaskError(f"{file} is not a regular file; a TFDS data set must hold nothing else")
        if file.suffix in (".json", ".txt") and found.st_size > _MOST_BYTES:
            raise TaskError(f"{file} has {found.st_size} bytes; {_MOST_BYTES} is the most allowed")
        total += found.st_size
    return total


def _class_names(tree: Any) -> Iterator[str]:
    """The Python classes that TFDS would import for a features.json, in its current and its former format."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            if key in ("pythonClassName", "type", "proto_cls") and isinstance(value, str):
                yield value
            else:
                yield from _class_names(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from _class_names(value)
