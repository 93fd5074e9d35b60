"""Labelled images at one size, in four splits, from the resident cache."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from PIL import Image

from tasks.base import SPLITS, TaskError
from tasks.data.cache import cached
from tasks.data.sources import TEST_NAMES, Catalog, Source, UnreadableImageError, in_parallel, similar
from tasks.data.splits import FRACTIONS, TRAIN_FRACTIONS, stratified

_VERSION = 1  # increase it when the choice of images or their pixels change

# Of ImageNet's training images, of colours in [0, 1]; published weights expect inputs normalized with them.
IMAGENET_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
IMAGENET_STD = np.array([0.229, 0.224, 0.225], np.float32)
_MOST_PIXELS = 1 << 26  # of an image; a JPEG is decoded at a fraction of its size
_MOST_SIZE = 4096  # pixels that images may be resized to

_log = logging.getLogger(__name__)

Classes = Sequence[str | int] | Mapping[str, int] | None


def choose_classes(names: Sequence[str], classes: Classes = None) -> list[int]:
    """Class ids, in the order of their new labels.

    Args:
      names: the names of all classes.
      classes: names or ids, whose order is kept; {"count", "seed"} for a random choice, in the order of `names`; or
        None for all. A number that is also a name is read as the name.
    """
    if classes is None:
        return list(range(len(names)))
    if isinstance(classes, Mapping):
        if set(classes) != {"count", "seed"}:
            raise TaskError(f"classes has the keys {', '.join(map(str, classes))}; allowed are count and seed, both")
        count, seed = classes["count"], classes["seed"]
        if not 1 <= count <= len(names):
            raise TaskError(f"classes.count is {count}; it must be from 1 to {len(names)}, the number of classes")
        return sorted(np.random.default_rng(seed).choice(len(names), count, replace=False).tolist())
    ids = {name: i for i, name in enumerate(names)}
    chosen = []
    for name in classes:
        if str(name) in ids:
            chosen.append(ids[str(name)])
        elif isinstance(name, int) and 0 <= name < len(names):
            chosen.append(name)
        else:
            raise TaskError(f"there is no class {name!r}{similar(str(name), names)}")
    if not chosen or len(set(chosen)) < len(chosen):
        raise TaskError(
            "classes names " + ("a class twice" if chosen else "no class; allowed are names, ids or {count, seed}")
        )
    return chosen


def load_images(
    source: Source, classes: Classes = None, size: int = 32, *, on_corrupt: Literal["error", "skip"] = "error"
) -> dict[str, dict[str, np.ndarray]]:
    """The four splits at one size, from the resident cache; the first call decodes all images.

    Official train images become inner_train, inner_valid and outer_valid, and official test images become test
    (validation images, if test is missing or has no labels). A set that lacks either is divided into all four. Each
    split has the classes in the set's proportions, shuffled with a fixed seed. A file that occurs in two splits is
    kept only in the later one, in the order of `SPLITS`.

    Args:
      source: where the images come from.
      classes: see `choose_classes`.
      size: height and width in pixels.
      on_corrupt: what to do with an image that cannot be decoded: "error" rejects the data set; "skip" leaves the
        image out, with a warning that names it at every call.

    Returns:
      {split: {"image": uint8 [n, size, size, 3], "label": int32 [n]}}, read-only memory maps.

    Raises:
      TaskError: no data, an unknown class, a corrupt image, or too few images for four splits.
    """
    if type(size) is not int or not 1 <= size <= _MOST_SIZE:
        raise TaskError(f"size is {size!r}; it must be an integer from 1 to {_MOST_SIZE}")
    if on_corrupt not in ("error", "skip"):
        raise TaskError(f"on_corrupt is {on_corrupt!r}; allowed are error and skip")
    catalog = source.open()
    key = {
        "images": _VERSION,
        "source": catalog.identity,
        "classes": dict(classes) if isinstance(classes, Mapping) else classes and list(classes),
        "size": size,
        "on_corrupt": on_corrupt,
        "fractions": [FRACTIONS, TRAIN_FRACTIONS],
    }
    arrays = cached(key, lambda: _build(catalog, choose_classes(catalog.classes, classes), size, on_corrupt == "skip"))
    for note in arrays["notes"]:
        _log.warning("%s: %s", catalog.where, note)
    return {split: {field: arrays[f"{split}/{field}"] for field in ("image", "label")} for split in SPLITS}


def decode(data: bytes, size: int) -> np.ndarray:
    """The central square of an encoded image, antialiased to size × size.

    Grey, palette and CMYK images become RGB, 16-bit images 8-bit, and transparent images get a white background.

    Returns:
      uint8 [size, size, 3].

    Raises:
      Exception: whatever Pillow's format plugins raise for a corrupt image.
    """
    image: Image.Image
    with Image.open(io.BytesIO(data)) as image:
        image.draft(None, (2 * size, 2 * size))  # decodes a large JPEG at 1/2, 1/4 or 1/8 of its size
        if (pixels := math.prod(image.size)) > _MOST_PIXELS:
            raise ValueError(f"it has {pixels} pixels; {_MOST_PIXELS} is the most allowed")
        image.load()
        side = min(image.size)
        left, top = ((length - side) // 2 for length in image.size)
        image = image.crop((left, top, left + side, top + side))
        if image.mode.startswith("I"):
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR))


@dataclasses.dataclass(frozen=True)
class _Part:
    """The images of one of the four splits: rows of an official split, and their labels."""

    official: str
    rows: np.ndarray  # integers [n]
    labels: np.ndarray  # int32 [n]


def _build(catalog: Catalog, ids: Sequence[int], size: int, skip: bool) -> dict[str, np.ndarray]:
    """Decode the four splits.

    Returns:
      "SPLIT/image" and "SPLIT/label" of each split, and "notes", sentences to log whenever the entry is used.
    """
    parts = _assign(catalog, ids)
    images = {split: np.empty((len(part.rows), size, size, 3), np.uint8) for split, part in parts.items()}
    jobs = [(split, i) for split, part in parts.items() for i in range(len(part.rows))]

    def work(job: int) -> tuple[str, bytes, str]:
        """Decode one image; returns its name, the digest of its file, and an error message or \"\"."""
        split, i = jobs[job]
        name, data, error = "", b"", ""
        try:
            name, data = catalog.read(parts[split].official, int(parts[split].rows[i]))
            images[split][i] = decode(data, size)
        except TaskError:
            raise
        except Exception as problem:  # Pillow's format plugins raise many types
            name, reason = problem.args if isinstance(problem, UnreadableImageError) else (name, problem)
            error = f"{name} ({reason})"
            if not skip:
                raise TaskError(
                    f"{catalog.where} has a corrupt image, {error}; repair or remove it, or set on_corrupt to skip"
                ) from problem
        return name, hashlib.blake2b(data, digest_size=16).digest(), error

    results = dict(zip(jobs, in_parallel(work, len(jobs), f"decoding {catalog.where}"), strict=True))
    corrupt = [error for _, _, error in results.values() if error]
    repeated = []
    seen: set[bytes] = set()
    arrays = {}
    for split in reversed(SPLITS):
        found = [results[split, i] for i in range(len(parts[split].rows))]
        keep = [not error and digest not in seen for _, digest, error in found]
        repeated += [name for name, digest, error in found if not error and digest in seen]
        seen |= {digest for _, digest, _ in found}
        if not any(keep):
            raise TaskError(
                f"{catalog.where} has too few images for four splits: {split} is empty ({len(jobs)} in all)"
            )
        whole = all(keep)
        arrays[f"{split}/image"] = images[split] if whole else images[split][keep]
        arrays[f"{split}/label"] = parts[split].labels if whole else parts[split].labels[keep]
    notes = [
        f"{what}: {', '.join(names)}"
        for what, names in (
            (f"{len(corrupt)} corrupt images are left out", corrupt),
            (f"{len(repeated)} images are left out because a later split has them too", repeated),
        )
        if names
    ]
    return {**arrays, "notes": np.array(notes, np.str_)}


def _assign(catalog: Catalog, ids: Sequence[int]) -> dict[str, _Part]:
    """Assign images to the four splits."""
    position = np.full(len(catalog.classes), -1, np.int32)
    position[list(ids)] = np.arange(len(ids))
    test = next((name for name in TEST_NAMES if name in catalog.splits and catalog.labelled(name)), None)
    if "train" in catalog.splits and test is not None:
        plan = {"train": TRAIN_FRACTIONS, test: {"test": 1.0}}
    else:
        pool = next((name for name in ("train", test, *catalog.splits) if name in catalog.splits), None)
        if pool is None or not catalog.labelled(pool):
            raise TaskError(f"{catalog.where} has no labelled images")
        plan = {pool: FRACTIONS}
    parts = {}
    for official, fractions in plan.items():
        given = catalog.labels(official)
        labels = np.where(given >= 0, position[given], -1).astype(np.int32)
        rows = np.flatnonzero(labels >= 0)
        missing = np.flatnonzero(np.bincount(labels[rows], minlength=len(ids)) == 0)
        if len(missing):
            raise TaskError(f"{catalog.where} has no images of {catalog.classes[ids[missing[0]]]!r} in {official}")
        for split, chosen in stratified(labels[rows], fractions).items():
            parts[split] = _Part(official, rows[chosen], labels[rows[chosen]])
    return parts
