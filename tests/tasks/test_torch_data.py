"""Image folders, TFDS sets and text files as the splits of a `TorchTask`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from tasks import make_task  # noqa: E402
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
        ("label\tlabel\ttext\n1\t2\ta", "two columns 'label'"),
        ("label\ttext\n" + "1\ta\n" * 50, "'label' has 1 different values; it must have 2"),
        ("label\ttext\n" + "".join(f"{i}\ta\n" for i in range(10_001)), "has 10001 different values"),
        ("label\ttext\n1\ta\n2\tb\n", "2 examples, too few"),
        ("label\ttext\n1\t" + "a" * 200_000, "cannot be read: field larger"),
        (b"label\ttext\n1\t\xe4\n", "cannot be read: 'utf-8'"),
    ],
)
def test_refused_text_files(text: str | bytes | None, sentence: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "a.tsv").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(TaskError, match=sentence):
        text_splits(str(tmp_path / "a.tsv"), words)


def test_images_that_do_not_exist_are_named() -> None:
    with pytest.raises(TaskError, match="no_such_images"):
        image_splits("no_such_images")


ROWS = "label\ttext\n" + "".join(f"{i % 2}\tab{i}\n" for i in range(60))


def test_a_byte_order_mark_is_no_part_of_a_column(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text(ROWS, encoding="utf-8-sig")
    assert text_splits(str(tmp_path / "a.tsv"), words)[1] == 2


def test_a_quote_that_is_not_closed_swallows_no_lines(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(ROWS.replace("\t", ",").replace("ab7", '"ab7'))
    with pytest.raises(TaskError, match=r"a\.csv cannot be read: unexpected end"):
        text_splits(str(tmp_path / "a.csv"), words)


def test_a_tokenizer_that_returns_too_little_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text(ROWS)
    with pytest.raises(TaskError, match="no 'ids' of length 60"):
        text_splits(str(tmp_path / "a.tsv"), lambda _: {"ids": [1, 2]})


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "large"])
def test_text_files_that_are_not_files_of_text(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "a.tsv"
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "device":
        file.symlink_to("/dev/zero")
    elif kind == "folder":
        file.mkdir()
    else:
        file.touch()
        os.truncate(file, 8 << 30)
    with pytest.raises(TaskError, match="8589934592 bytes" if kind == "large" else "not a regular file"):
        text_splits(str(file), words)
    with pytest.raises(TaskError, match="8589934592 bytes" if kind == "large" else "not a regular file"):
        make_task("text", {"source": {"file": str(file)}})


@pytest.mark.parametrize("size", [0, -1, 1.5, "8", True, 1 << 20])
def test_sizes_of_images(size: object, tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"size is .*an integer from 1 to 4096"):
        image_splits(str(tmp_path), size)
