"""Text as windows of characters, from a file or a text data set of TensorFlow Datasets."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tasks.base import SPLITS, TaskError, check_keys
from tasks.data.cache import cached
from tasks.data.files import check_file
from tasks.data.sources import Tfds, prepared, reading
from tasks.data.tfds_folder import read_metadata

_VERSION = 1  # a change of how text becomes windows is a new version
# Each split is one block of the text; the last tenth is test, as is usual for Shakespeare.
FRACTIONS = {"inner_train": 0.8, "inner_valid": 0.05, "outer_valid": 0.05, "test": 0.1}
_MOST = 256  # distinct characters, because they are stored as bytes


@dataclasses.dataclass(frozen=True)
class TextSource:
    """The configuration of a text; exactly one of file and tfds is given.

    Attributes:
      file: a UTF-8 file.
      tfds: a TFDS builder with one feature "text", such as tiny_shakespeare.
      data_dir: where `tfds` is prepared, if not in TFDS's default folder.
    """

    file: str | None = None
    tfds: str | None = None
    data_dir: str | None = None

    @classmethod
    def parse(cls, options: Mapping[str, Any], where: str) -> TextSource:
        """Check the keys of a configuration."""
        if not isinstance(options, Mapping):
            raise TaskError(f"{where} is {options!r}; it must be {{file: PATH}} or {{tfds: NAME}}")
        check_keys(options, [field.name for field in dataclasses.fields(cls)], where, "a key of a text")
        given = [key for key in ("file", "tfds") if options.get(key)]
        if len(given) != 1:
            raise TaskError(f"{where} needs exactly one of file and tfds, found {given or 'none'}")
        return cls(**options)

    @property
    def name(self) -> str:
        return self.tfds or Path(str(self.file)).stem

    def read(self) -> str:
        """The whole text.

        Raises:
          TaskError: the text is missing, is not UTF-8, or is not a regular file.
        """
        if self.file is not None:
            path = Path(self.file).expanduser()
            try:
                check_file(path, f"the text {self.file}")
                return path.read_bytes().decode()
            except OSError as error:
                raise TaskError(f"the text {self.file} cannot be read ({error.strerror})") from None
            except UnicodeDecodeError as error:
                raise TaskError(f"the text {self.file} is not UTF-8 ({error.reason} at byte {error.start})") from None
        return _tfds_text(Tfds(self.tfds, self.data_dir).folder())

    def digest(self) -> str:
        """The SHA-256 of the text's UTF-8."""
        return hashlib.sha256(self.read().encode()).hexdigest()

    def prepare(self) -> str:
        """Download and prepare the text if it is missing; returns its location."""
        if self.tfds is not None:
            return str(prepared(Tfds(self.tfds, self.data_dir)))
        self.read()
        return str(self.file)


def _tfds_text(folder: Path) -> str:
    """All records of all splits, in the order train, validation, test, which joins a text that TFDS has divided."""
    import tensorflow_datasets as tfds

    read_metadata(folder)
    try:
        with reading(folder):
            builder = tfds.builder_from_directory(folder)
            found = builder.info.splits
            names = [name for name in ("train", "validation", "test") if name in found]
            parts = [record["text"] for name in names for record in builder.as_data_source(name)]
    except KeyError:
        raise TaskError(f"the TFDS data set in {folder} is not a text: its records have no feature 'text'") from None
    return b"".join(part if isinstance(part, bytes) else str(part).encode() for part in parts).decode()


def load_text(
    source: TextSource, context: int, other: TextSource | None = None
) -> tuple[dict[str, dict[str, np.ndarray]], int]:
    """The four splits as windows, and the number of distinct characters.

    A split is a block of the text, and its windows tile it: a window's first `context` characters are the input, its
    last `context` the targets, and the next window begins with its last character. So no character is a target in two
    splits, or an input in one and a target in another.

    Args:
      source: where the text is.
      context: the number of characters that the model reads at once.
      other: a text whose characters are numbered, too, so that a model of one text can go on with the other.

    Returns:
      {split: {"text": uint8 [n, context + 1]}}, characters numbered in code-point order; and the number of distinct
      characters of both texts.

    Raises:
      TaskError: a text is missing or too short, or they have too many characters.
    """
    text, further = source.read(), other.read() if other else ""
    key = {"text": _VERSION, "sha256": source.digest(), "context": context}
    if other:
        key["characters_of"] = other.digest()
    name = f"{source.name} and {other.name} have" if other else f"{source.name} has"

    def build() -> dict[str, np.ndarray]:
        characters = np.unique(_codes(text + further))
        numbers = np.searchsorted(characters, _codes(text))
        if len(characters) > _MOST:
            raise TaskError(f"{name} {len(characters)} distinct characters; at most {_MOST} are allowed")
        ends = np.rint(np.cumsum([FRACTIONS[split] for split in SPLITS]) * len(numbers)).astype(int)
        blocks = zip(SPLITS, np.split(numbers.astype(np.uint8), ends[:-1]), strict=True)
        arrays = {split: _windows(block, context) for split, block in blocks}
        if short := [split for split, windows in arrays.items() if not len(windows)]:
            raise TaskError(
                f"{source.name} has {len(numbers)} characters, too few for a window of {context + 1} in {short[0]}; "
                "use a longer text or a smaller task.context"
            )
        return {**arrays, "vocabulary": np.asarray(len(characters))}

    arrays = cached(key, build)
    return {split: {"text": arrays[split]} for split in SPLITS}, int(arrays["vocabulary"])


def _codes(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le"), np.uint32)


def _windows(block: np.ndarray, context: int) -> np.ndarray:
    """[n, context + 1], overlapping by one character; characters left over at the end are dropped."""
    count = max(len(block) - 1, 0) // context
    return np.stack([block[i * context : (i + 1) * context + 1] for i in range(count)]) if count else block[:0]
