"""Made-up image sets for tests. Classes are colours, so that a label can be checked against the pixels."""

import json
from io import BytesIO

import numpy as np
from PIL import Image

from tasks.base import SPLITS
from tasks.data.sources import ImageFolder, Tfds

COLOURS = {"blue": (0, 0, 200), "green": (0, 200, 0), "red": (200, 0, 0)}  # in alphabetical order


def picture(colour, number):
    """Pixels [8, 12, 3] of one colour with a little of the number in them; every number differs."""
    noise = np.random.default_rng(number).integers(0, 40, (8, 12, 3))
    return Image.fromarray((np.array(COLOURS[colour]) + noise).astype(np.uint8))


def write_folder(root, counts, first=0):
    for colour, count in counts.items():
        (root / colour).mkdir(parents=True)
        for i in range(first, first + count):
            suffix = (".png", ".jpg", ".bmp", ".webp", ".JPEG")[i % 5]
            picture(colour, i + 1000 * list(COLOURS).index(colour)).save(root / colour / f"{i:03d}{suffix}")
    return ImageFolder(root)


def write_tfds(folder, splits, labels=None, corrupt=()):
    """A TFDS data set without TensorFlow: {split: number of images}, classes in turn.

    Args:
      labels: split -> label of all its images, where it is not the class.
      corrupt: (split, row) of images whose bytes are cut.
    """
    import tensorflow_datasets as tfds
    from array_record.python.array_record_module import ArrayRecordWriter

    folder.mkdir(parents=True)
    features = tfds.features.FeaturesDict(
        {
            "id": tfds.features.Text(),
            "image": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
            "label": tfds.features.ClassLabel(names=list(COLOURS)),
            "coarse": tfds.features.ClassLabel(num_classes=2),
        }
    )
    name = folder.parent.name
    infos = []
    for number, (split, count) in enumerate(splits.items()):
        writer = ArrayRecordWriter(str(folder / f"{name}-{split}.array_record-00000-of-00001"), "group_size:1")
        for row in range(count):
            buffer = BytesIO()
            picture(list(COLOURS)[row % 3], 10_000 * number + row).save(buffer, "PNG")
            data = buffer.getvalue()[: 150 if (split, row) in corrupt else None]
            label = (labels or {}).get(split, row % 3)
            example = {"id": f"{split}-{row}.png", "image": BytesIO(data), "label": label, "coarse": 0}
            writer.write(features.serialize_example(example))
        writer.close()
        template = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
        infos.append({"name": split, "filepathTemplate": template, "shardLengths": [str(count)], "numBytes": "1"})
    features.save_config(folder)
    keys = [{"featureKey": "image"}, {"featureKey": "label"}]
    info = {"name": name, "version": folder.name, "fileFormat": "array_record", "splits": infos}
    (folder / "dataset_info.json").write_text(json.dumps({**info, "supervisedKeys": {"tuple": {"items": keys}}}))
    return Tfds(directory=folder)


def check(splits, labels=COLOURS):
    """Shapes, dtypes, labels that fit the pixels, and no image in two splits."""
    assert tuple(splits) == SPLITS
    names = list(COLOURS)
    seen = set()
    for split in splits.values():
        assert split["image"].dtype == np.uint8
        assert split["label"].dtype == np.int32
        assert len(split["image"]) == len(split["label"])
        channels = [2, 1, 0]  # blue, green, red
        want = [channels[names.index(list(labels)[label])] for label in split["label"]]
        assert split["image"].astype(int).sum((1, 2)).argmax(-1).tolist() == want
        digests = {image.tobytes() for image in split["image"]}
        assert not digests & seen
        seen |= digests
    return {name: len(split["label"]) for name, split in splits.items()}
