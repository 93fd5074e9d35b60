"""Folders whose files are not what they seem: links, pipes, names that are paths, metadata that names code."""

import logging
import os
import struct
import zlib

import pytest

from tasks.base import TaskError
from tasks.data.images import load_images
from tasks.data.sources import ImageFolder, Tfds
from tests.tasks.pictures import COLOURS, check, picture, write_folder, write_tfds


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("L3RS_CACHE", str(tmp_path / "cache"))


def test_gif_folders_are_read(tmp_path):
    for label, colour in enumerate(COLOURS):
        (tmp_path / "set" / colour).mkdir(parents=True)
        for i in range(10):
            picture(colour, 1000 * label + i).quantize(64).save(tmp_path / "set" / colour / f"{i}.gif")
        (tmp_path / "set" / colour / "folder.gif").mkdir()
    assert sum(check(load_images(ImageFolder(tmp_path / "set"), size=4)).values()) == 30


def test_a_dangling_link_is_named_or_skipped(tmp_path, caplog):
    source = write_folder(tmp_path / "set", dict.fromkeys(COLOURS, 10))
    (tmp_path / "set" / "red" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "set" / "red" / "loop.png").symlink_to(tmp_path / "set" / "red" / "loop.png")
    with pytest.raises(TaskError, match=r"red/(gone|loop)\.png .*on_corrupt"):
        load_images(source, size=4)
    with caplog.at_level(logging.WARNING):
        assert sum(check(load_images(source, size=4, on_corrupt="skip")).values()) == 30
    assert "red/gone.png" in caplog.text
    assert "red/loop.png" in caplog.text


def test_a_pipe_among_the_images_is_refused(tmp_path):
    source = write_folder(tmp_path / "set", dict.fromkeys(COLOURS, 10))
    os.mkfifo(tmp_path / "set" / "red" / "pipe.png")
    with pytest.raises(TaskError, match=r"red/pipe\.png is not a regular file"):
        load_images(source, size=4)


@pytest.mark.parametrize("folder", ["a\0b", "x" * 5000])
def test_paths_that_no_file_can_have(folder):
    with pytest.raises(TaskError, match="image folder"):
        load_images(ImageFolder(folder))


def change(file, old, new):
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


@pytest.mark.parametrize(
    ("file", "old", "new", "fact"),
    [
        ("features.json", "tensorflow_datasets.core.features.text_feature.T", "evil_module.T", "evil_module.T"),
        ("features.json", "tensorflow_datasets.core.features.features_dict.F", "evil_module.X", "_module.X"),
        ("dataset_info.json", '"name": "train"', '"name": "../../train"', "'../../train'"),
        ("dataset_info.json", "{DATASET}-{SPLIT}", "/etc/{DATASET}-{SPLIT}", "/etc/"),
        ("dataset_info.json", '"name": "set"', '"name": ".."', "'..'"),
        ("dataset_info.json", '["30"]', '["3000000000000"]', "3000000000000"),
        ("features.json", '"numClasses": "2"', '"numClasses": "2", "type": "evil_module.Y"', "evil_module.Y"),
    ],
)  # fmt: skip
def test_tfds_metadata_is_data(tmp_path, monkeypatch, file, old, new, fact):
    (tmp_path / "evil_module.py").write_text(f"open({str(tmp_path / 'marker')!r}, 'w')")
    monkeypatch.syspath_prepend(str(tmp_path))
    source = write_tfds(tmp_path / "set" / "1.0.0", {"train": 30})
    change(tmp_path / "set" / "1.0.0" / file, old, new)
    with pytest.raises(TaskError) as error:
        load_images(source, size=4)
    assert fact in str(error.value)
    assert not (tmp_path / "marker").exists()


def test_tfds_folders_have_no_links_devices_or_pipes(tmp_path):
    source = write_tfds(tmp_path / "set" / "1.0.0", {"train": 30})
    (tmp_path / "elsewhere.txt").write_text("a\nb\nc\n")
    info = tmp_path / "set" / "1.0.0" / "dataset_info.json"
    for make, fact in (
        (lambda file: file.symlink_to(tmp_path / "elsewhere.txt"), "link"),
        (lambda file: file.symlink_to("/dev/zero"), "link"),
        (os.mkfifo, "regular file"),
    ):
        extra = info.parent / "label.labels.txt"
        extra.unlink(missing_ok=True)
        make(extra)
        with pytest.raises(TaskError, match=f"label.labels.txt is .*{fact}"):
            load_images(source, size=4)


@pytest.mark.parametrize("name", ["set/..", "set/.", "../set", "/etc"])
def test_tfds_names_are_not_paths(name):
    with pytest.raises(TaskError, match="not the name of a TFDS builder"):
        Tfds(name)


def test_a_tfds_default_config_is_not_a_path(tmp_path):
    write_tfds(tmp_path / "outside" / "1.0.0", {"train": 30})
    (tmp_path / "data" / "set" / ".config").mkdir(parents=True)
    (tmp_path / "data" / "set" / ".config" / "metadata.json").write_text('{"default_config_name": "../../outside"}')
    with pytest.raises(TaskError, match="not prepared"):
        load_images(Tfds("set", data_dir=tmp_path / "data"), size=4)


def png(width: int, height: int) -> bytes:
    """A picture that states its size and is black."""
    rows = zlib.compress(bytes(height * (3 * width + 1)) if width * height < 1 << 28 else b"", 9)
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", rows), (b"IEND", b"")]
    parts = [struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d)) for t, d in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize(
    ("kind", "fact"), [("large", "8589934592 bytes"), ("packed", "81000000 pixels"), ("enormous", "bad.png")]
)
def test_an_image_states_its_size_before_it_is_read(kind: str, fact: str, tmp_path) -> None:
    source = write_folder(tmp_path / "set", dict.fromkeys(COLOURS, 10))
    file = tmp_path / "set" / "red" / "bad.png"
    file.write_bytes({"large": b"", "packed": png(9000, 9000), "enormous": png(60_000, 60_000)}[kind])
    if kind == "large":
        os.truncate(file, 8 << 30)
    with pytest.raises(TaskError, match=r"red/bad\.png \(.*") as error:
        load_images(source, size=4)
    assert fact in str(error.value)
