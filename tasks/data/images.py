"""Image classification: where labelled images come from, and the four splits of them at one size.

A source says where: `Tfds` (a data set of TensorFlow Datasets) or `ImageFolder` (a folder per class).
`load_images` brings its images to one size and keeps them in the resident cache. Reading needs no
TensorFlow; preparing a TFDS data set, once, does.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import hashlib
import importlib.util
import io
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
from PIL import Image

from tasks.base import SPLITS, TaskError
from tasks.data.cache import cached
from tasks.data.splits import FRACTIONS, TRAIN_FRACTIONS, stratified

_VERSION = 1  # a change of which images are taken, or of their pixels, is a new version
_TEST_NAMES = ("test", "validation", "valid", "val")  # the official split that becomes test: the first there is
_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
_CHUNK = 1024  # images in flight

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

Classes = Sequence[str | int] | Mapping[str, int] | None


@dataclasses.dataclass(frozen=True)
class Catalog:
    """What a source holds, opened.

    Attributes:
      where: for messages.
      identity: what the images depend on, as JSON.
      classes: names; the position is the class id.
      splits: the official splits that have images.
      labelled: split -> whether its labels are published.
      labels: split -> class ids, int32 [n].
      read: (split, row) -> the record's name, and the encoded image.
    """

    where: str
    identity: Mapping[str, Any]
    classes: Sequence[str]
    splits: Sequence[str]
    labelled: Callable[[str], bool]
    labels: Callable[[str], np.ndarray]
    read: Callable[[str, int], tuple[str, bytes]]


class Source(Protocol):
    """Where labelled images come from."""

    def open(self) -> Catalog:
        """Look at what is there; reads no image. Raises TaskError when nothing is."""
        ...


@dataclasses.dataclass(frozen=True)
class Tfds:
    """A prepared image-classification data set of TensorFlow Datasets, in the array_record format.

    Attributes:
      name: a builder, `name[/config][:version]`, e.g. "imagenet_resized/64x64"; else give `directory`.
      data_dir: where builders are prepared; `$TFDS_DATA_DIR`, else ~/tensorflow_datasets, when not given.
      directory: of one prepared version, which holds its dataset_info.json.
    """

    name: str | None = None
    data_dir: str | Path | None = None
    directory: str | Path | None = None

    def __post_init__(self) -> None:
        if (self.name is None) == (self.directory is None):
            raise TaskError("a TFDS source needs either a name or a directory")
        if self.data_dir is not None and self.name is None:
            raise TaskError("a TFDS source with a directory has no data_dir")
        if self.name is not None and not re.fullmatch(r"\w+(/[\w.+-]+)?(:\d+\.\d+\.\d+)?", self.name):
            raise TaskError(f"{self.name!r} is no name of a TFDS builder; write name, name/config or name:1.2.3")

    def folder(self) -> Path:
        """Where the prepared data set is: of a name without a version, the newest prepared one."""
        if self.directory is not None:
            folder = Path(self.directory).expanduser()
            if (folder / "dataset_info.json").is_file():
                return folder
            versions = _versions(folder)
            hint = f"; did you mean {versions[-1]}?" if versions else ""
            raise TaskError(f"{folder} is not a prepared TFDS data set: it has no dataset_info.json{hint}")
        base, _, version = str(self.name).partition(":")
        root = self.root() / base
        versions = _versions(root)
        if not versions and "/" not in base:
            with contextlib.suppress(OSError, ValueError, KeyError):  # TFDS notes the default config here
                config = json.loads((root / ".config" / "metadata.json").read_text())["default_config_name"]
                versions = _versions(root / config)
        found = [folder for folder in versions if version in ("", folder.name)]
        if not found:
            raise TaskError(
                f"the TFDS data set {self.name!r} is not prepared in {self.root()}; "
                "run `metatrain prepare CONFIG`, or give the data_dir where it is"
            )
        return found[-1]

    def root(self) -> Path:
        """The folder that all data sets of `data_dir` share."""
        return Path(self.data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()

    def open(self) -> Catalog:
        """Look at what is there, without importing TFDS: that alone takes a second."""
        folder = self.folder()
        try:
            text = (folder / "dataset_info.json").read_bytes()
            info = json.loads(text)
            features = json.loads((folder / "features.json").read_text())["featuresDict"]["features"]
            splits = [s["name"] for s in info["splits"] if sum(map(int, s["shardLengths"]))]
        except (OSError, ValueError, KeyError) as error:
            raise TaskError(f"the TFDS data set in {folder} is damaged or too old ({error})") from error
        if "array_record" not in (info.get("fileFormat"), *info.get("alternativeFileFormats", ())):
            raise TaskError(
                f"the TFDS data set in {folder} is stored as {info.get('fileFormat', 'tfrecord')}, which needs "
                "TensorFlow to read; run `metatrain prepare CONFIG` with another data_dir to have it as array_record"
            )
        keys = info.get("supervisedKeys", {}).get("tuple", {}).get("items", [])
        preferred = [key.get("featureKey") for key in keys]
        image = _feature(features, ".Image", preferred, folder)
        label = _feature(features, ".ClassLabel", preferred, folder)
        names = folder / f"{label}.labels.txt"
        if names.is_file():
            classes = [line.strip() for line in names.read_text().splitlines() if line.strip()]
        else:
            classes = [str(i) for i in range(int(features[label]["classLabel"]["numClasses"]))]
        identity = {"tfds": str(folder.resolve()), "dataset_info": hashlib.sha256(text).hexdigest()}
        records = functools.cache(functools.partial(_tfds_records, folder, image))

        def labels(split: str) -> np.ndarray:
            def build() -> dict[str, np.ndarray]:
                count, record = records(split)
                found = _parallel(lambda row: record(row)[label], count, f"reading the labels of {folder} ({split})")
                return {"labels": np.fromiter(found, np.int32, count)}

            # An entry of its own: other classes and sizes need the same labels, and a big set is long to read.
            return cached({"labels": _VERSION, "source": identity, "split": split}, build)["labels"]

        def read(split: str, row: int) -> tuple[str, bytes]:
            record = records(split)[1](row)
            names = (record[key] for key in ("id", "file_name", "image/filename", "filename") if key in record)
            known = next((f" ({name.decode(errors='replace')})" for name in names if isinstance(name, bytes)), "")
            return f"{split}[{row}]{known}", record[image]

        return Catalog(
            str(folder), identity, classes, splits, lambda split: records(split)[1](0)[label] >= 0, labels, read
        )


@dataclasses.dataclass(frozen=True)
class ImageFolder:
    """Image files in one folder per class: png, jpg, jpeg, bmp, webp.

    The folder holds the class folders, or `train/` and `test/` (or `validation/`, `valid/`, `val/`)
    that do. Names that begin with a dot are passed over.
    """

    directory: str | Path

    def open(self) -> Catalog:
        """List the files."""
        root = Path(self.directory).expanduser()
        if not root.is_dir():
            raise TaskError(f"the image folder {root} does not exist")
        splits = {"all": root}
        if (root / "train").is_dir() and _folders(root / "train"):
            test = [root / name for name in _TEST_NAMES if (root / name).is_dir()]
            splits = {folder.name: folder for folder in (root / "train", *test[:1])}
        classes = [folder.name for folder in _folders(next(iter(splits.values())))]
        files = {split: list(_labelled_files(folder, classes)) for split, folder in splits.items()}
        if not files[next(iter(splits))]:
            raise TaskError(f"the image folder {root} has no class folders with {', '.join(_SUFFIXES)} files")
        listing = [
            (str(file.relative_to(root)), stat.st_size, stat.st_mtime_ns)
            for found in files.values()
            for file, stat, _ in found
        ]

        def read(split: str, row: int) -> tuple[str, bytes]:
            file = files[split][row][0]
            try:
                return str(file.relative_to(root)), file.read_bytes()
            except OSError as error:
                raise TaskError(f"the image {file} cannot be read ({error.strerror})") from error

        return Catalog(
            where=str(root),
            identity={"image_folder": str(root.resolve()), "files": hashlib.sha256(repr(listing).encode()).hexdigest()},
            classes=classes,
            splits=[split for split in splits if files[split]],
            labelled=lambda split: bool(files[split]),
            labels=lambda split: np.array([label for _, _, label in files[split]], np.int32),
            read=read,
        )


def prepare(source: Source) -> str:
    """Download and prepare what is named and not there yet; says where it is.

    Raises:
      TaskError: no TensorFlow, no such builder, a download to be made by hand, or a directory
        that holds no data set.
    """
    if isinstance(source, Tfds) and source.name is not None:
        try:
            source.folder()
        except TaskError:
            _download_and_prepare(source.name, source.root())
    return source.open().where


def choose_classes(names: Sequence[str], classes: Classes = None) -> list[int]:
    """Class ids, in the order of the labels that they get.

    Args:
      names: of all classes.
      classes: names or ids, in that order; or {"count", "seed"}: that many drawn, in the order of
        `names`; or None: all. A number that is also a name is taken as the name.
    """
    if classes is None:
        return list(range(len(names)))
    if isinstance(classes, Mapping):
        if set(classes) != {"count", "seed"}:
            raise TaskError(f"classes has the keys {', '.join(map(str, classes))}; allowed are count and seed, both")
        count, seed = classes["count"], classes["seed"]
        if not 1 <= count <= len(names):
            raise TaskError(f"classes.count is {count}; it must be from 1 to {len(names)}, which there are")
        return sorted(np.random.default_rng(seed).choice(len(names), count, replace=False).tolist())
    ids = {name: i for i, name in enumerate(names)}
    chosen = []
    for name in classes:
        if str(name) in ids:
            chosen.append(ids[str(name)])
        elif isinstance(name, int) and 0 <= name < len(names):
            chosen.append(name)
        else:
            raise TaskError(f"there is no class {name!r}{_similar(str(name), names)}")
    if not chosen or len(set(chosen)) < len(chosen):
        raise TaskError("classes names " + ("a class twice" if chosen else "no class"))
    return chosen


def class_names(source: Source, classes: Classes = None) -> list[str]:
    """The names of the chosen classes (see `choose_classes`), in the order of their labels."""
    names = source.open().classes
    return [names[i] for i in choose_classes(names, classes)]


def load_images(
    source: Source, classes: Classes = None, size: int = 32, *, on_corrupt: Literal["error", "skip"] = "error"
) -> dict[str, dict[str, np.ndarray]]:
    """The four splits at one size, from the resident cache; the first call decodes all images.

    Official train images become inner_train, inner_valid and outer_valid, and official test images
    test (validation, where test is missing or has no labels). A set without both is cut into all
    four. Each split has the classes in the set's proportions, shuffled with a fixed seed. A file
    that occurs in two splits stays in the later one of `SPLITS` only.

    Args:
      source: where the images come from.
      classes: see `choose_classes`.
      size: height and width in pixels.
      on_corrupt: what to do about an image that cannot be decoded: refuse the data set, or do
        without the image, with a warning that names it at every call.

    Returns:
      {split: {"image": uint8 [n, size, size, 3], "label": int32 [n]}}, read-only memory maps.

    Raises:
      TaskError: no data, no such class, a corrupt image, or too few images for four splits.
    """
    if size < 1:
        raise TaskError(f"size is {size}; it must be ≥ 1")
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

    Grey, palette and CMYK images become RGB, 16-bit ones 8-bit, and transparent ones lie on white.

    Returns:
      uint8 [size, size, 3].

    Raises:
      Exception: whatever Pillow's format plugins raise for a corrupt image.
    """
    image: Image.Image
    with Image.open(io.BytesIO(data)) as image:
        image.draft(None, (2 * size, 2 * size))  # a large JPEG is decoded at a half, quarter or eighth
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
      "SPLIT/image" and "SPLIT/label" of each split, and "notes": sentences to be repeated whenever
      the entry is used.
    """
    parts = _assign(catalog, ids)
    images = {split: np.empty((len(part.rows), size, size, 3), np.uint8) for split, part in parts.items()}
    jobs = [(split, i) for split, part in parts.items() for i in range(len(part.rows))]

    def work(job: int) -> tuple[str, bytes, str]:
        """Decode one image: its name, the digest of its file, and what is wrong with it."""
        split, i = jobs[job]
        name, data = catalog.read(parts[split].official, int(parts[split].rows[i]))
        error = ""
        try:
            images[split][i] = decode(data, size)
        except Exception as problem:  # of many types
            error = f"{name} ({problem})"
            if not skip:
                raise TaskError(
                    f"{catalog.where} has a corrupt image, {error}; mend or remove it, or set on_corrupt to skip"
                ) from problem
        return name, hashlib.blake2b(data, digest_size=16).digest(), error

    results = dict(zip(jobs, _parallel(work, len(jobs), f"decoding {catalog.where}"), strict=True))
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
            (f"{len(repeated)} images that occur in a later split too are left out", repeated),
        )
        if names
    ]
    return {**arrays, "notes": np.array(notes, np.str_)}


def _assign(catalog: Catalog, ids: Sequence[int]) -> dict[str, _Part]:
    """Which images go where."""
    position = np.full(len(catalog.classes), -1, np.int32)
    position[list(ids)] = np.arange(len(ids))
    test = next((name for name in _TEST_NAMES if name in catalog.splits and catalog.labelled(name)), None)
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


def _parallel(work: Callable[[int], _T], count: int, description: str) -> Iterator[_T]:
    """The results of work(0 … count - 1) in that order, from a thread per core; a bar on a terminal."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    executor = ThreadPoolExecutor(os.cpu_count())

    def results() -> Iterator[_T]:
        for start in range(0, count, _CHUNK):
            yield from executor.map(work, range(start, min(start + _CHUNK, count)))

    try:
        yield from track(
            results(), description, count, console=console, disable=not console.is_terminal, transient=True
        )
    finally:
        executor.shutdown(cancel_futures=True)


def _tfds_records(folder: Path, image: str, split: str) -> tuple[int, Callable[[int], dict[str, Any]]]:
    """How many records a TFDS split has, and the record of a row; its image is left encoded, for `decode`."""
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder_from_directory(folder)
        source = builder.as_data_source(split, decoders={image: tfds.decode.SkipDecoding()})
    except (OSError, ValueError, NotImplementedError, RuntimeError) as error:
        raise TaskError(f"the TFDS data set in {folder} cannot be read ({error})") from error

    def record(row: int) -> dict[str, Any]:
        try:
            return source[row]
        except Exception as error:  # array_record's and protobuf's, when a file is missing, cut short or changed
            raise TaskError(f"the TFDS data set in {folder} is damaged at {split}[{row}] ({error})") from error

    return len(source), record


def _download_and_prepare(name: str, root: Path) -> None:
    if importlib.util.find_spec("tensorflow") is None:
        raise TaskError(f"preparing {name!r} needs TensorFlow: pip install 'l3rs[prepare]'")
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(name, data_dir=root, file_format="array_record")
    except tfds.core.registered.DatasetNotFoundError:
        names = tfds.list_builders(with_community_datasets=False)
        raise TaskError(f"TFDS has no builder {name!r}{_similar(name, names)}") from None
    try:
        builder.download_and_prepare()
    except AssertionError as error:  # how TFDS asks for files that only a person may download
        raise TaskError(f"TFDS cannot download {name!r} by itself: {error}") from error


def _versions(folder: Path) -> list[Path]:
    """The prepared versions of a TFDS data set, oldest first."""
    found = [file.parent for file in folder.glob("*/dataset_info.json") if re.fullmatch(r"[\d.]+", file.parent.name)]
    return sorted(found, key=lambda version: [int(number) for number in version.name.split(".") if number])


def _feature(features: Mapping[str, Any], kind: str, preferred: Sequence[str], folder: Path) -> str:
    """The feature of a kind that is meant: one of the supervised keys, else the only one."""
    found = [key for key, feature in features.items() if feature.get("pythonClassName", "").endswith(kind)]
    named = [key for key in found if key in preferred]
    if len(named or found) != 1:
        raise TaskError(f"the TFDS data set in {folder} is not image classification: it has {len(found)} {kind[1:]}s")
    return (named or found)[0]


def _folders(parent: Path) -> list[Path]:
    return sorted(folder for folder in parent.iterdir() if folder.is_dir() and not folder.name.startswith("."))


def _labelled_files(parent: Path, classes: Sequence[str]) -> Iterator[tuple[Path, os.stat_result, int]]:
    """The image files of each class folder, their sizes and times, and the position of the class."""
    for folder in _folders(parent):
        if folder.name not in classes:
            raise TaskError(f"the class {folder.name!r} of {parent} has no training images; rename or remove it")
        label = classes.index(folder.name)
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            if entry.name.lower().endswith(_SUFFIXES) and not entry.name.startswith("."):
                yield Path(entry.path), entry.stat(), label


def _similar(name: str, names: Iterable[str]) -> str:
    """The end of a sentence about a name that does not exist."""
    by_lower = {other.lower(): other for other in names}
    close = [by_lower[other] for other in difflib.get_close_matches(name.lower(), by_lower)]
    return f"; did you mean {' or '.join(map(repr, close))}?" if close else f"; there are {len(by_lower)} others"
