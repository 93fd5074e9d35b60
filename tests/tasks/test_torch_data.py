"""Image folders, TFDS sets and text files as the splits of a `TorchTask`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from tasks.base import TaskError  # noqa: E402
from tasks.torch import TorchTask  # noqa: E402
from tasks.torch_data import image_splits, text_splits  # noqa: E402
from tests.tasks.pictures import COLOURS, write_folder, write_tfds  # noqa: E402

_SPLITS = ["train", "inner_valid", "outer_valid", "test"]


@pytest.mark.parametrize("kind", ["folder", "tfds"])
def test_images_of_a_folder_and_of_tfds(kind: str, tmp_path: Path) -> None:
    where = tmp_path / "colours" / "1.0.0"
    if kind == "folder":
        write_folder(where, dict.fromkeys(COLOURS, 10))
    else:
        write_tfds(where, {"train": 30, "test": 6})
    splits, classes = image_splits(str(where), size=8)
    assert (classes, list(splits)) == (3, _SPLITS)
    for data in splits.values():
        for i in range(len(data)):
            image, label = data[i]
            assert (image.shape, image.dtype) == ((3, 8, 8), torch.float32)
            # The brightest channel is the class's: blue, green, red.
            mean = image.mean((1, 2)) * torch.tensor([0.229, 0.224, 0.225]) + torch.tensor([0.485, 0.456, 0.406])
            assert int(mean.argmax()) == 2 - int(label)
    torch.manual_seed(0)
    first = splits["train"][0][0]
    assert not torch.equal(first, splits["train"][0][0])  # augmented by PyTorch's generator
    torch.manual_seed(0)
    assert torch.equal(first, splits["train"][0][0])
    assert torch.equal(splits["test"][0][0], splits["test"][0][0])
    TorchTask("colours", lambda _: torch.nn.Linear(1, 1), **splits, batch_size=4)


def words(*texts: list[str]) -> dict[str, Any]:
    return {"input_ids": np.array([[len(word) for word in row] for row in zip(*texts, strict=True)])}


@pytest.mark.parametrize(("name", "separator"), [("pairs.tsv", "\t"), ("pairs.csv", ",")])
def test_a_text_file_with_two_columns(name: str, separator: str, tmp_path: Path) -> None:
    rows = [f"{'yes' if i % 2 else 'no'}{separator}{'a' * (i + 1)}{separator}{'b' * (i + 2)}" for i in range(20)]
    (tmp_path / name).write_text("\n".join([separator.join(["same", "one", "two"]), *rows]))
    splits, classes = text_splits(str(tmp_path / name), words, ("one", "two"), "same")
    assert (classes, list(splits)) == (2, _SPLITS)
    every = [example for data in splits.values() for example in data]
    assert sorted(int(example["input_ids"][0]) for example in every) == list(range(1, 21))
    for example in every:
        one, two = example["input_ids"].tolist()
        assert two == one + 1
        assert int(example["labels"]) == (one - 1) % 2  # classes in alphabetical order


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, "cannot be read: No such file"),
        ("kind\ttext\n1\ta", "no column 'label'; its header has 'kind', 'text'"),
        ("label\ttext\n1\ta\n2", "line 3 has too few columns"),
        ("label\ttext\n", "no column"),
    ],
)
def test_refused_text_files(text: str | None, sentence: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "a.tsv").write_text(text)
    with pytest.raises(TaskError, match=sentence):
        text_splits(str(tmp_path / "a.tsv"), words)


def test_images_that_do_not_exist_are_named() -> None:
    with pytest.raises(TaskError, match="no_such_images"):
        image_splits("no_such_images")
