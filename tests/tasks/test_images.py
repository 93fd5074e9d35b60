"""Sources of images, and their four splits. Classes are colours, so that labels can be checked by eye."""

import logging
import os
import sys
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tasks.base import SPLITS, TaskError
from tasks.data import images, sources
from tasks.data.images import choose_classes, decode, load_images
from tasks.data.sources import ImageFolder, Tfds, prepare
from tasks.data.splits import stratified
from tests.tasks.pictures import COLOURS, check, picture, write_folder, write_tfds

SHARED = Path(os.environ.get("L3RS_SHARED") or Path(__file__).resolve().parents[3] / "shared") / "data" / "tfds"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="no real data sets: $L3RS_SHARED/data/tfds is not there")


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("L3RS_CACHE", str(tmp_path / "cache"))


# Folders


def test_a_pool_is_split_into_four(tmp_path):
    source = write_folder(tmp_path / "set", dict.fromkeys(COLOURS, 20))
    (tmp_path / "set" / ".hidden").mkdir()
    (tmp_path / "set" / "red" / "readme.txt").touch()
    splits = load_images(source, size=6)
    assert check(splits) == {"inner_train": 24, "inner_valid": 6, "outer_valid": 12, "test": 18}
    assert splits["test"]["image"].shape == (18, 6, 6, 3)
    for split in splits.values():
        assert len(set(np.bincount(split["label"]))) == 1  # balanced
    assert source.open().classes == ["blue", "green", "red"]


@pytest.mark.parametrize("name", ["test", "val"])
def test_an_official_test_set_stays_the_test_set(tmp_path, name):
    write_folder(tmp_path / "train", dict.fromkeys(COLOURS, 10))
    write_folder(tmp_path / name, dict.fromkeys(COLOURS, 4), first=100)
    splits = load_images(ImageFolder(tmp_path), size=8)
    assert check(splits) == {"inner_train": 21, "inner_valid": 3, "outer_valid": 6, "test": 12}
    files = [*(tmp_path / name).rglob("*.*")]
    test = {decode(file.read_bytes(), 8).tobytes() for file in files}
    assert {image.tobytes() for image in splits["test"]["image"]} == test


def test_splits_are_deterministic_and_follow_the_files(tmp_path, monkeypatch):
    source = write_folder(tmp_path / "set", dict.fromkeys(COLOURS, 10))
    first = load_images(source, size=4)
    monkeypatch.setenv("L3RS_CACHE", str(tmp_path / "other"))
    again = load_images(source, size=4)
    for split in SPLITS:
        np.testing.assert_array_equal(first[split]["image"], again[split]["image"])
    picture("red", 5).save(tmp_path / "set" / "red" / "new.png")
    assert sum(len(split["label"]) for split in load_images(source, size=4).values()) == 31


def test_a_ready_entry_decodes_nothing(tmp_path, monkeypatch):
    source = write_folder(tmp_path / "set", dict.fromkeys(COLOURS, 10))
    load_images(source, ["red", "blue"], 4)
    monkeypatch.setattr(images, "decode", None)
    load_images(source, ["red", "blue"], 4)
    for other in (["blue", "red"], {"count": 2, "seed": 0}):
        with pytest.raises(TaskError, match="corrupt"):  # None cannot be called, so it was built again
            load_images(source, other, 4)
    with pytest.raises(TaskError, match="corrupt"):
        load_images(source, ["red", "blue"], 5)


def test_a_corrupt_image_is_named(tmp_path, caplog):
    source = write_folder(tmp_path / "set", dict.fromkeys(COLOURS, 10))
    for file, data in (("red/000.png", b""), ("green/000.png", b"no image"), ("blue/001.jpg", None)):
        path = tmp_path / "set" / file
        path.write_bytes(path.read_bytes()[:200] if data is None else data)
    with pytest.raises(
        TaskError, match=r"corrupt image, (red/000\.png|green/000\.png|blue/001\.jpg) .*on_corrupt to skip"
    ):
        load_images(source, size=4)
    for _ in range(2):  # also when the entry already exists
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            counts = check(load_images(source, size=4, on_corrupt="skip"))
        assert sum(counts.values()) == 27
        assert "3 corrupt images" in caplog.text
        for name in ("red/000.png", "green/000.png", "blue/001.jpg"):
            assert name in caplog.text
    with pytest.raises(TaskError, match="corrupt image"):
        load_images(source, size=4)


def test_a_file_in_two_splits_stays_in_one(tmp_path, caplog):
    write_folder(tmp_path / "train", dict.fromkeys(COLOURS, 20))
    write_folder(tmp_path / "test", dict.fromkeys(COLOURS, 4), first=100)
    copy = (tmp_path / "test" / "red" / "100.png").read_bytes()
    (tmp_path / "train" / "red" / "copy.png").write_bytes(copy)
    with caplog.at_level(logging.WARNING):
        counts = check(load_images(ImageFolder(tmp_path), size=8))
    assert counts["test"] == 12
    assert sum(counts.values()) == 72
    assert "red/copy.png" in caplog.text


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({"red": 2, "blue": 1}, "too few images for four splits"),
        ({"red": 10, "blue": 0}, "no images of 'blue'"),
        ({"red": 0}, "no class folders"),
        ({}, "no class folders"),
    ],
)
def test_too_few_images(tmp_path, counts, message):
    (tmp_path / "set").mkdir()
    with pytest.raises(TaskError, match=message):
        load_images(write_folder(tmp_path / "set", counts), size=4)


def test_unusable_folders(tmp_path):
    with pytest.raises(TaskError, match="does not exist"):
        load_images(ImageFolder(tmp_path / "nowhere"))
    write_folder(tmp_path / "train", {"red": 10})
    write_folder(tmp_path / "test", {"rde": 0, "red": 3})
    with pytest.raises(TaskError, match="class 'rde'"):
        load_images(ImageFolder(tmp_path))
    for options in ({"size": 0}, {"on_corrupt": "ignore"}):
        with pytest.raises(TaskError, match=next(iter(options))):
            load_images(ImageFolder(tmp_path), **options)


# Classes


def test_classes_are_chosen_by_name_number_or_draw(tmp_path):
    source = write_folder(tmp_path / "set", dict.fromkeys(COLOURS, 10))
    splits = load_images(source, ["red", 0], 4)
    assert check(splits, ["red", "blue"])["test"] == 6
    names = [f"{i:03d}" for i in range(100)]
    drawn = choose_classes(names, {"count": 10, "seed": 0})
    assert drawn == choose_classes(names, {"count": 10, "seed": 0}) == sorted(set(drawn))
    assert drawn != choose_classes(names, {"count": 10, "seed": 1})
    assert choose_classes(["3", "1", "2"], [1, 2, 0]) == [1, 2, 0]  # as names where they are names


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (["grene"], "no class 'grene'; did you mean 'green'"),
        (["Red"], "no class 'Red'; did you mean 'red'"),
        ([3], "no class 3; there are 3 others"),
        (["red", 2], "a class twice"),
        ([], "no class"),
        ({"count": 4, "seed": 0}, "classes.count is 4"),
        ({"count": 2}, "allowed are count and seed"),
    ],
)
def test_classes_that_do_not_exist(classes, message):
    with pytest.raises(TaskError, match=message):
        choose_classes(list(COLOURS), classes)


def test_parts_of_unequal_classes_keep_their_proportions():
    labels = np.repeat([0, 1, 2], [700, 200, 55])
    parts = stratified(labels, {"a": 0.7, "b": 0.1, "c": 0.2})
    assert sorted(np.concatenate(list(parts.values()))) == list(range(955))
    for part, share in (("a", 0.7), ("b", 0.1), ("c", 0.2)):
        assert np.all(np.abs(np.bincount(labels[parts[part]]) - share * np.array([700, 200, 55])) <= 2)
    single = np.concatenate([np.arange(100), np.full(900, 100)])  # a hundred classes of one example
    counts = [np.sum(single[rows] < 100) for rows in stratified(single, {"a": 0.5, "b": 0.5}).values()]
    assert min(counts) > 30  # 50 ± 5: rounding favours no part
    half = labels[parts["a"][: len(parts["a"]) // 2]]
    assert np.all(np.abs(np.bincount(half) - 0.35 * np.array([700, 200, 55])) <= 2)


# Decoding


def encoded(image, kind, **options):
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("image", "kind", "colour"),
    [
        (Image.new("L", (9, 6), 90), "PNG", (90, 90, 90)),
        (Image.new("L", (9, 6), 90), "JPEG", (90, 90, 90)),
        (Image.new("RGBA", (9, 6), (10, 20, 30, 255)), "PNG", (10, 20, 30)),
        (Image.new("RGBA", (9, 6), (10, 20, 30, 0)), "PNG", (255, 255, 255)),
        (Image.new("LA", (9, 6), (0, 51)), "PNG", (204, 204, 204)),
        (Image.new("RGB", (9, 6), (0, 0, 255)).quantize(4), "PNG", (0, 0, 255)),
        (Image.new("1", (9, 6), 1), "PNG", (255, 255, 255)),
        (Image.fromarray(np.full((6, 9), 90 * 256 + 7, np.uint16)), "PNG", (90, 90, 90)),
        (Image.new("CMYK", (9, 6), (0, 255, 255, 0)), "JPEG", (254, 0, 0)),
    ],
)
def test_every_kind_of_image_becomes_rgb(image, kind, colour):
    pixels = decode(encoded(image, kind), 4)
    assert pixels.shape == (4, 4, 3)
    assert pixels.dtype == np.uint8
    np.testing.assert_allclose(pixels, np.broadcast_to(colour, (4, 4, 3)), atol=1)


def test_resizing_takes_the_centre_and_averages():
    pixels = np.zeros((8, 16, 3), np.uint8)
    pixels[:, :4] = pixels[:, 12:] = 255  # outside the central square
    pixels[:, 4:12:2] = 100  # finer than the result
    small = decode(encoded(Image.fromarray(pixels), "PNG"), 2)
    np.testing.assert_allclose(small, 50, atol=4)  # not exactly, because the windows end inside stripes
    same = np.random.default_rng(0).integers(0, 255, (5, 5, 3)).astype(np.uint8)
    np.testing.assert_array_equal(decode(encoded(Image.fromarray(same), "PNG"), 5), same)


# TFDS


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """train and test, in a data_dir with an older and an incomplete version."""
    data_dir = tmp_path_factory.mktemp("tfds")
    write_tfds(data_dir / "colours" / "1.9.0", {"train": 6, "test": 6})
    write_tfds(data_dir / "colours" / "1.10.0", {"train": 60, "test": 12})
    (data_dir / "colours" / "2.0.0.incomplete").mkdir()
    return data_dir


def test_tfds_by_name_and_by_directory(tiny, monkeypatch):
    named = Tfds("colours", data_dir=tiny)
    assert named.folder().name == "1.10.0"
    assert Tfds("colours:1.9.0", data_dir=tiny).folder().name == "1.9.0"
    splits = load_images(named, size=8)
    assert check(splits) == {"inner_train": 42, "inner_valid": 6, "outer_valid": 12, "test": 12}
    assert named.open().classes == list(COLOURS)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tiny))
    monkeypatch.setattr(
        sources, "_tfds_records", lambda *_: pytest.fail("read again")
    )  # a ready entry reads no record, and imports no TFDS
    for same in (Tfds("colours"), Tfds(directory=tiny / "colours" / "1.10.0")):
        np.testing.assert_array_equal(load_images(same, size=8)["test"]["image"], splits["test"]["image"])


def test_tfds_default_config(tmp_path):
    write_tfds(tmp_path / "set" / "small" / "1.0.0", {"train": 30})
    (tmp_path / "set" / ".config").mkdir()
    (tmp_path / "set" / ".config" / "metadata.json").write_text('{"default_config_name": "small"}')
    for name in ("set", "set/small", "set/small:1.0.0"):
        assert Tfds(name, data_dir=tmp_path).folder() == tmp_path / "set" / "small" / "1.0.0"
    assert sum(check(load_images(Tfds("set", data_dir=tmp_path), size=4)).values()) == 30


def test_tfds_test_labels_may_be_unpublished(tmp_path):
    source = write_tfds(tmp_path / "set" / "1.0.0", {"train": 30, "validation": 9, "test": 6}, {"test": -1})
    assert check(load_images(source, size=8))["test"] == 9


def test_tfds_corrupt_images_are_named(tmp_path, caplog):
    source = write_tfds(tmp_path / "set" / "1.0.0", {"test": 30}, corrupt=[("test", 7)])
    with pytest.raises(TaskError, match=r"corrupt image, test\[7\] \(test-7\.png\)"):
        load_images(source, size=4)
    with caplog.at_level(logging.WARNING):
        assert sum(check(load_images(source, size=4, on_corrupt="skip")).values()) == 29
    assert "test[7] (test-7.png)" in caplog.text


def test_tfds_sets_that_cannot_be_read(tmp_path, tiny):
    with pytest.raises(TaskError, match=r"not prepared in .*metatrain prepare CONFIG"):
        load_images(Tfds("cifar100", data_dir=tmp_path))
    with pytest.raises(TaskError, match=r"no dataset_info\.json; did you mean .*1\.10\.0\?"):
        load_images(Tfds(directory=tiny / "colours"))
    for wrong in ({}, {"name": "a", "directory": "b"}, {"name": "../x"}, {"directory": "b", "data_dir": "c"}):
        with pytest.raises(TaskError, match="TFDS"):
            Tfds(**wrong)
    source = write_tfds(tmp_path / "set" / "1.0.0", {"train": 30})
    info = tmp_path / "set" / "1.0.0" / "dataset_info.json"
    whole = info.read_text()
    info.write_text(whole.replace('"array_record"', '"tfrecord"'))
    with pytest.raises(TaskError, match="stored as tfrecord"):
        load_images(source)
    info.write_text(whole[:-5])
    with pytest.raises(TaskError, match="damaged"):
        load_images(source)
    info.write_text(whole)
    record_file = next(info.parent.glob("*array_record-*"))
    record_file.write_bytes(record_file.read_bytes()[:200])
    with pytest.raises(TaskError, match="damaged"):
        load_images(source)
    features = info.parent / "features.json"
    features.write_text(features.read_text().replace("image_feature.Image", "audio_feature.Audio"))
    with pytest.raises(TaskError, match="not image classification"):
        load_images(source)


# Preparing


def test_prepare_needs_tensorflow_only_where_something_is_missing(tmp_path, tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    assert prepare(Tfds("colours", data_dir=tiny)) == str(tiny / "colours" / "1.10.0")
    assert prepare(Tfds(directory=tiny / "colours" / "1.9.0")).endswith("1.9.0")
    with pytest.raises(TaskError, match=r"needs TensorFlow: pip install 'l3rs\[prepare\]'"):
        prepare(Tfds("cifar100", data_dir=tmp_path))
    with pytest.raises(TaskError, match="not a prepared TFDS data set"):
        prepare(Tfds(directory=tmp_path))
    with pytest.raises(TaskError, match="does not exist"):
        prepare(ImageFolder(tmp_path / "nowhere"))


def test_prepare_asks_tfds_for_array_record(tmp_path, monkeypatch):
    import tensorflow_datasets as tfds

    class Builder:
        def __init__(self, name, data_dir, file_format):
            assert file_format == "array_record"
            self.folder = data_dir / name / "1.0.0"

        def download_and_prepare(self):
            if "manual" in str(self.folder):
                raise AssertionError("put the archive here")
            write_tfds(self.folder, {"train": 30})

    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: name)
    with pytest.raises(TaskError, match=r"no builder 'cifar1000'; did you mean .*'cifar100'"):
        prepare(Tfds("cifar1000", data_dir=tmp_path))
    monkeypatch.setattr(tfds, "builder", Builder)
    source = Tfds("fresh", data_dir=tmp_path)
    assert prepare(source) == str(tmp_path / "fresh" / "1.0.0")
    check(load_images(source, size=4))
    with pytest.raises(TaskError, match="put the archive here"):
        prepare(Tfds("manual", data_dir=tmp_path))


# Real data sets


@needs_shared
def test_real_images_with_an_official_test_set():
    source = Tfds("tiny_imagenet_25", data_dir=SHARED)
    splits = load_images(source, {"count": 4, "seed": 0}, 64)
    assert [len(splits[split]["label"]) for split in SPLITS] == [700, 100, 200, 200]
    digests = [image.tobytes() for split in SPLITS for image in splits[split]["image"]]
    assert len(set(digests)) == 1200
    for split in SPLITS:
        assert len(set(np.bincount(splits[split]["label"]).tolist())) == 1


@needs_shared
def test_real_images_without_a_train_set_agree_with_tfds():
    import tensorflow_datasets as tfds

    source = Tfds("cifar10_test_1k", data_dir=SHARED)
    splits = load_images(source, ["ship", "cat"], 32)
    assert [len(splits[split]["label"]) for split in SPLITS] == [80, 20, 40, 60]
    builder = tfds.builder_from_directory(source.folder())
    names = builder.info.features["label"].names
    want = {record["image"].tobytes(): names[record["label"]] for record in builder.as_data_source("test")}
    for split in SPLITS:
        for image, label in zip(splits[split]["image"], splits[split]["label"], strict=True):
            assert want[image.tobytes()] == ("ship", "cat")[label]
