"""Text as characters, cut into windows: a file, or a text data set of TensorFlow Datasets."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tasks.base import SPLITS, TaskError
from tasks.data.cache import cached
from tasks.data.sources import Tfds, prepared, reading
from tasks.data.tfds_folder import read_metadata

_VERSION = 1  # a change of how text becomes windows is a new version
# The last tenth is test, as is usual for Shakespeare; each split is one block of the text.
FRACTIONS = {"inner_train": 0.8, "inner_valid": 0.05, "outer_valid": 0.05, "test": 0.1}
_MOST = 256  # distinct characters: they are kept as bytes


@dataclasses.dataclass(frozen=True)
class TextSource:
    """A text, by configuration.

    Attributes:
      file: UTF-8; or
      tfds: a TFDS builder with one feature "text", such as tiny_shakespeare.
      data_dir: where `tfds` is prepared, when not in TFDS's own place.
    """

    file: str | None = None
    tfds: str | None = None
    data_dir: str | None = None

    @classmethod
    def parse(cls, options: Mapping[str, Any], where: str) -> TextSource:
        """Check the keys of a configuration."""
        known = [field.name for field in dataclasses.fields(cls)]
        if not isinstance(options, Mapping):
            raise TaskError(f"{where} is {options!r}; it must be {{file: PATH}} or {{tfds: NAME}}")
        for key in options:
            if key not in known:
                raise TaskError(f"{where}.{key} is not a key of a text; allowed are {', '.join(known)}")
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
          TaskError: it is not there, or not text.
        """
        if self.file is not None:
            try:
                return Path(self.file).expanduser().read_bytes().decode()
            except OSError as error:
                raise TaskError(f"the text {self.file} cannot be read ({error.strerror})") from None
            except UnicodeDecodeError as error:
                raise TaskError(f"the text {self.file} is not UTF-8 ({error.reason} at byte {error.start})") from None
        return _tfds_text(Tfds(self.tfds, self.data_dir).folder())

    def prepare(self) -> str:
        """Download and prepare what is named and not there yet; says where it is."""
        return str(self.file if self.tfds is None else prepared(Tfds(self.tfds, self.data_dir)))


def _tfds_text(folder: Path) -> str:
    """All records of all splits, in the order train, validation, test: a text that TFDS cut is whole again."""
    import tensorflow_datasets as tfds

    read_metadata(folder)
    try:
        with reading(folder):
            builder = tfds.builder_from_directory(folder)
            found = builder.info.splits
            names = [name for name in ("train", "validation", "test") if name in found]
            parts = [record["text"] for name in names for record in builder.as_data_source(name)]
    except KeyError:
        raise TaskError(f"the TFDS data set in {folder} is no text: its records have no feature 'text'") from None
    return b"".join(part if isinstance(part, bytes) else str(part).encode() for part in parts).decode()


def load_text(source: TextSource, context: int) -> tuple[dict[str, dict[str, np.ndarray]], int]:
    """The four splits as windows, and the number of distinct characters.

    A split is a block of the text, and its windows tile it: a window's first `context` characters are
    read, its last `context` predicted, and the next one begins with the character that ends it. So no
    character is predicted in two splits, and none is read in one and predicted in another.

    Args:
      source: of the text.
      context: characters that are read at once.

    Returns:
      {split: {"text": uint8 [n, context + 1]}}, characters numbered in their order; and how many
      there are.

    Raises:
      TaskError: the text is missing, too short, or has too many characters.
    """
    text = source.read()
    key = {"text": _VERSION, "sha256": hashlib.sha256(text.encode()).hexdigest(), "context": context}

    def build() -> dict[str, np.ndarray]:
        codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        characters, numbers = np.unique(codes, return_inverse=True)
        if len(characters) > _MOST:
            raise TaskError(f"{source.name} has {len(characters)} distinct characters; {_MOST} is the most")
        ends = np.rint(np.cumsum([FRACTIONS[split] for split in SPLITS]) * len(numbers)).astype(int)
        blocks = zip(SPLITS, np.split(numbers.astype(np.uint8), ends[:-1]), strict=True)
        arrays = {split: _windows(block, context) for split, block in blocks}
        if short := [split for split, windows in arrays.items() if not len(windows)]:
            raise TaskError(
                f"{source.name} has {len(numbers)} characters: none of {context + 1} are left for {short[0]}; "
                "use a longer text or a smaller task.context"
            )
        return {**arrays, "vocabulary": np.asarray(len(characters))}

    arrays = cached(key, build)
    return {split: {"text": arrays[split]} for split in SPLITS}, int(arrays["vocabulary"])


def _windows(block: np.ndarray, context: int) -> np.ndarray:
    """[n, context + 1], one character of overlap; what is left at the end is dropped."""
    count = max(len(block) - 1, 0) // context
    return np.stack([block[i * context : (i + 1) * context + 1] for i in range(count)]) if count else block[:0]
