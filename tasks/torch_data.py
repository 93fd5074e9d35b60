"""Data of the usual kinds for a `TorchTask`, in its four splits: images in folders or of TFDS, and text files."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from tasks.base import TaskError
from tasks.data.files import check_file
from tasks.data.images import IMAGENET_MEAN, IMAGENET_STD, Classes, load_images
from tasks.data.sources import ImageFolder, Source, Tfds
from tasks.data.splits import FRACTIONS, stratified

_NAMES = {"train": "inner_train", "inner_valid": "inner_valid", "outer_valid": "outer_valid", "test": "test"}
_MOST_CLASSES = 10_000  # of a text file
_MEAN, _STD = torch.from_numpy(IMAGENET_MEAN), torch.from_numpy(IMAGENET_STD)


class Images(Dataset[tuple[Tensor, Tensor]]):
    """Images as torchvision's and timm's classifiers take them: float32 [3, H, W], normalised as ImageNet's.

    Args:
      pixels: uint8 [n, H, W, 3].
      labels: int [n].
      crop_flip: crop at random, with an eighth of the width as padding, and mirror at random, by PyTorch's generator.
    """

    def __init__(self, pixels: np.ndarray, labels: np.ndarray, crop_flip: bool = False) -> None:
        self._pixels, self._labels, self._crop_flip = pixels, labels, crop_flip

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        pixels = torch.from_numpy(np.array(self._pixels[i]))
        image = ((pixels / 255 - _MEAN) / _STD).permute(2, 0, 1)
        if self._crop_flip:
            image = _crop_flip(image)
        return image, torch.tensor(int(self._labels[i]))


def image_splits(
    images: str, size: int = 32, classes: Classes = None, crop_flip: bool = True
) -> tuple[dict[str, Images], int]:
    """The splits of a set of labelled images, of which training images are augmented, and the number of classes.

    Of a set with a test set of its own, that is test, and of each class's other images 70 % are train, 10 % inner_valid
    and 20 % outer_valid; of a folder, or a set without one, 40, 10, 20, and 30 % test.

    Args:
      images: a folder with one sub-folder per class, the folder of a prepared TFDS version, or the name of a TFDS set.
      size: height and width in pixels.
      classes: names, or {count, seed} for a random choice; all by default.
      crop_flip: whether training images are cropped at random and mirrored; not for digits or text.

    Returns:
      Data sets by name, train, inner_valid, outer_valid and test; and the number of classes.

    Raises:
      TaskError: no such folder or set, or an image that cannot be read.
    """
    data = load_images(_source(images), classes, size)
    splits = {
        name: Images(data[own]["image"], data[own]["label"], crop_flip and name == "train")
        for name, own in _NAMES.items()
    }
    return splits, int(data["inner_train"]["label"].max()) + 1


def text_splits(
    file: str, tokenize: Callable[..., Any], text: Sequence[str] = ("text",), label: str = "label"
) -> tuple[dict[str, Any], int]:
    """The splits of a text file with labels, as models of `transformers` take them, and the number of classes.

    Args:
      file: a header and one example a line; separated by commas if it ends with .csv, else by tabs, without quotes.
      tokenize: texts -> {field: int64 [n, length]}, e.g. a tokenizer with `padding` and `truncation`; given a list for
        each of the columns `text`.
      text: names of one or two columns.
      label: name of the column of labels, of which every different value is a class.

    Returns:
      Lists of mappings, "labels" among their fields, by name, train, inner_valid, outer_valid and test; and the number
      of classes.

    Raises:
      TaskError: no such file or column, or too few examples.
    """
    rows = _read(file, [*text, label])
    names = sorted({row[label] for row in rows})
    if not 2 <= len(names) <= _MOST_CLASSES:
        raise TaskError(
            f"text file {file}: column {label!r} has {len(names)} different values; it must have 2 to {_MOST_CLASSES}"
        )
    numbers = {name: i for i, name in enumerate(names)}
    labels = np.array([numbers[row[label]] for row in rows])
    fields = dict(tokenize(*([row[column] for row in rows] for column in text)))
    every = {name: torch.as_tensor(np.asarray(values)) for name, values in fields.items()}
    if short := [name for name, values in every.items() if values.ndim < 1 or len(values) != len(rows)]:
        raise TaskError(f"text file {file}: tokenize returns no {short[0]!r} of length {len(rows)}, one for each text")
    every["labels"] = torch.from_numpy(labels)
    parts = stratified(labels, FRACTIONS)
    splits = {
        name: [{field: values[i] for field, values in every.items()} for i in parts[own]]
        for name, own in _NAMES.items()
    }
    if empty := [name for name, data in splits.items() if not data]:
        raise TaskError(f"text file {file} has {len(rows)} examples, too few: none is left for {empty[0]}")
    return splits, len(names)


def _source(images: str) -> Source:
    path = Path(images).expanduser()
    if (path / "dataset_info.json").is_file():
        return Tfds(None, None, str(path))
    return ImageFolder(str(path)) if path.is_dir() else Tfds(images)


def _read(file: str, columns: Sequence[str]) -> list[dict[str, str]]:
    path = Path(file).expanduser()
    how: dict[str, Any] = {"strict": True} if path.suffix == ".csv" else {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    try:
        check_file(path, f"text file {file}")
        with path.open(encoding="utf-8-sig", newline="") as opened:
            reader = csv.DictReader(opened, **how)
            rows, header = list(reader), list(reader.fieldnames or ())
    except (OSError, ValueError, csv.Error) as error:
        if isinstance(error, TaskError):
            raise
        raise TaskError(f"text file {file} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if double := [column for column in columns if header.count(column) > 1]:
        raise TaskError(f"text file {file} has two columns {double[0]!r}")
    found = list(rows[0]) if rows else []
    if missing := [column for column in columns if column not in found]:
        wanted, has = (", ".join(map(repr, names)) or "nothing" for names in (missing, found))
        raise TaskError(f"text file {file} has no column {wanted}; its header has {has}")
    for number, row in enumerate(rows, 2):
        if any(row[column] is None for column in columns):
            raise TaskError(f"text file {file}: line {number} has too few columns")
    return rows


def _crop_flip(image: Tensor) -> Tensor:
    _, height, width = image.shape
    pad = width // 8
    top, left, flip = (int(torch.randint(high, ())) for high in (2 * pad + 1, 2 * pad + 1, 2))
    padded = torch.nn.functional.pad(image, (pad,) * 4)[:, top : top + height, left : left + width]
    return padded.flip(2) if flip else padded
