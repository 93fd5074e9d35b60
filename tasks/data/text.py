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
    name: str, text: str, context: int, alphabet: str | None = None
) -> tuple[dict[str, dict[str, np.ndarray]], int]:
    """The four splits as windows, and the number of distinct characters.

    A split is a block of the text, and its windows tile it: a window's first `context` characters are the input, its
    last `context` the targets, and the next window begins with its last character. So no character is a target in two
    splits, or an input in one and a target in another.

    Args:
      name: of the text, for messages.
      text: the whole text.
      context: the number of characters that the model reads at once.
      alphabet: all characters that are numbered, in code-point order; those of the text by default.

    Returns:
      {split: {"text": uint8 [n, context + 1]}}, characters by their numbers; and how many are numbered.

    Raises:
      TaskError: the text is too short, or too many characters are numbered.
    """
    key = {"text": _VERSION, "sha256": digest(text), "context": context}
    if alphabet is not None:
        key["alphabet"] = alphabet

    def build() -> dict[str, np.ndarray]:
        known = alphabet_of(text) if alphabet is None else alphabet
        if len(known) > _MOST:
            which = f"{name} has" if alphabet is None else f"{name} and the text of task.init together have"
            raise TaskError(f"{which} {len(known)} distinct characters; at most {_MOST} are allowed")
        arrays = {split: tile(block, context, known) for split, block in blocks(text).items()}
        if short := [split for split, windows in arrays.items() if not len(windows)]:
            raise TaskError(
                f"{name} has {len(text)} characters, too few for a window of {context + 1} in {short[0]}; "
                "use a longer text or a smaller task.context"
            )
        return {**arrays, "vocabulary": np.asarray(len(known))}

    arrays = cached(key, build)
    return {split: {"text": arrays[split]} for split in SPLITS}, int(arrays["vocabulary"])


def blocks(text: str) -> dict[str, str]:
    """The part of a text that is each split."""
    ends = np.rint(np.cumsum([FRACTIONS[split] for split in SPLITS]) * len(text)).astype(int).tolist()
    return {split: text[first:end] for split, first, end in zip(SPLITS, [0, *ends[:-1]], ends, strict=True)}


def alphabet_of(*texts: str) -> str:
    """The distinct characters of texts, in code-point order."""
    return "".join(sorted(set().union(*texts)))


def digest(text: str) -> str:
    """The SHA-256 of a text's UTF-8."""
    return hashlib.sha256(text.encode()).hexdigest()


def tile(text: str, context: int, alphabet: str) -> np.ndarray:
    """A text as windows that overlap by one character; characters left over at the end are dropped.

    Args:
      text: characters of `alphabet`.
      context: a window has one more.
      alphabet: at most 256 characters, in code-point order.

    Returns:
      uint8 [n, context + 1], characters by their numbers; n is 0 where the text is too short.
    """
    block = np.searchsorted(_codes(alphabet), _codes(text)).astype(np.uint8)
    count = max(len(block) - 1, 0) // context
    rows = [block[i * context : (i + 1) * context + 1] for i in range(count)]
    return np.stack(rows) if rows else np.empty((0, context + 1), np.uint8)


def _codes(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le"), np.uint32)
