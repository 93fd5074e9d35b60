"""Sources of labelled images: TensorFlow Datasets (`Tfds`) and folders (`ImageFolder`).

Preparing a TFDS data set needs TensorFlow; reading a prepared one does not.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import hashlib
import importlib.util
import json
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from tasks.base import TaskError, pip_install
from tasks.data.cache import cached
from tasks.data.tfds_folder import read_metadata

_LABELS_VERSION = 1  # increase it when the way labels are read changes
TEST_NAMES = ("test", "validation", "valid", "val")  # the first of these that exists becomes test
_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff")
_MOST_IMAGE_BYTES = 256 << 20  # of an image file
_CHUNK = 1024  # records in flight
_MOST_CLASSES = 10_000_000

_T = TypeVar("_T")


class UnreadableImageError(Exception):
    """An image file that cannot be read: its name, and why."""


@dataclasses.dataclass(frozen=True)
class Catalog:
    """The contents of a source.

    Attributes:
      where: the location, for messages.
      identity: everything the images depend on, as JSON.
      classes: names, in the order of the class ids.
      splits: the official splits that have images.
      labelled: split -> whether it has labels.
      labels: split -> class ids, int32 [n].
      read: (split, row) -> the record's name, and the encoded image; raises UnreadableImageError.
    """

    where: str
    identity: Mapping[str, Any]
    classes: Sequence[str]
    splits: Sequence[str]
    labelled: Callable[[str], bool]
    labels: Callable[[str], np.ndarray]
    read: Callable[[str, int], tuple[str, bytes]]


class Source(Protocol):
    """A source of labelled images."""

    def open(self) -> Catalog:
        """List the contents without reading images. Raises TaskError when there are none."""
        ...


@dataclasses.dataclass(frozen=True)
class Tfds:
    """A prepared image-classification data set of TensorFlow Datasets, in the array_record format.

    Attributes:
      name: a builder, `name[/config][:version]`, e.g. "imagenet_resized/64x64"; or give `directory`.
      data_dir: where builders are prepared; by default `$TFDS_DATA_DIR`, else ~/tensorflow_datasets.
      directory: the folder of one prepared version, which contains its dataset_info.json.
    """

    name: str | None = None
    data_dir: str | Path | None = None
    directory: str | Path | None = None

    def __post_init__(self) -> None:
        if (self.name is None) == (self.directory is None):
            raise TaskError("a TFDS source needs either a name or a directory")
        if self.data_dir is not None and self.name is None:
            raise TaskError("a TFDS source with a directory has no data_dir")
        if self.name is not None and not re.fullmatch(r"\w+(/[\w+-][\w.+-]*)?(:\d+\.\d+\.\d+)?", self.name):
            raise TaskError(f"{self.name!r} is not the name of a TFDS builder; write name, name/config or name:1.2.3")

    def folder(self) -> Path:
        """The folder of the prepared data set; for a name without a version, of the newest prepared version."""
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
            with contextlib.suppress(OSError, ValueError, KeyError):  # TFDS writes the default config here
                config = str(json.loads((root / ".config" / "metadata.json").read_text())["default_config_name"])
                versions = _versions(root / config) if re.fullmatch(r"[\w+-][\w.+-]*", config) else []
        found = [folder for folder in versions if version in ("", folder.name)]
        if not found:
            raise TaskError(
                f"the TFDS data set {self.name!r} is not prepared in {self.root()}; "
                "run `metatrain prepare CONFIG`, or set data_dir to the folder that has it"
            )
        return found[-1]

    def root(self) -> Path:
        """The folder with all data sets of `data_dir`."""
        return Path(self.data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()

    def open(self) -> Catalog:
        """List the contents without importing TFDS, which would take a second."""
        folder = self.folder()
        text, info, features, splits = read_metadata(folder)
        if "array_record" not in (info.get("fileFormat"), *info.get("alternativeFileFormats", ())):
            raise TaskError(
                f"the TFDS data set in {folder} is stored as {info.get('fileFormat', 'tfrecord')}, which needs "
                "TensorFlow to read; run `metatrain prepare CONFIG` with another data_dir to have it as array_record"
            )
        keys = info.get("supervisedKeys", {}).get("tuple", {}).get("items", [])
        preferred = [key.get("featureKey") for key in keys]
        image = _feature(features, ".Image", preferred, folder)
        label = _feature(features, ".ClassLabel", preferred, folder)
        classes = _class_names(folder, label, features[label])
        identity = {"tfds": str(folder.resolve()), "dataset_info": hashlib.sha256(text).hexdigest()}
        records = functools.cache(functools.partial(_tfds_records, folder, image))

        def labels(split: str) -> np.ndarray:
            def build() -> dict[str, np.ndarray]:
                count, record = records(split)
                found = in_parallel(lambda row: record(row)[label], count, f"reading the labels of {folder} ({split})")
                return {"labels": np.fromiter(found, np.int32, count)}

            # A cache entry of its own: all choices of classes and sizes share the labels, which take long to read.
            return cached({"labels": _LABELS_VERSION, "source": identity, "split": split}, build)["labels"]

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
    """Image files in one folder per class: png, jpg, jpeg, bmp, webp, gif (the first frame), tif, tiff.

    The folder holds the class folders, or `train/` and `test/` (or `validation/`, `valid/`, `val/`) that hold them.
    Names that begin with a dot are ignored.
    """

    directory: str | Path

    def open(self) -> Catalog:
        """List the files."""
        root = Path(self.directory).expanduser()
        try:
            if not root.is_dir():
                raise TaskError(f"the image folder {root} does not exist")
            splits = {"all": root}
            if (root / "train").is_dir() and _folders(root / "train"):
                test = [root / name for name in TEST_NAMES if (root / name).is_dir()]
                splits = {folder.name: folder for folder in (root / "train", *test[:1])}
            classes = [folder.name for folder in _folders(next(iter(splits.values())))]
            files = {split: list(_labelled_files(folder, classes)) for split, folder in splits.items()}
        except (OSError, ValueError) as error:  # a ValueError: a null character in the path
            raise TaskError(f"the image folder {root} cannot be read ({error})") from error
        if not files[next(iter(splits))]:
            raise TaskError(f"the image folder {root} has no class folders with {', '.join(_SUFFIXES)} files")
        listing = [(str(file.relative_to(root)), *stamp) for found in files.values() for file, stamp, _ in found]

        def read(split: str, row: int) -> tuple[str, bytes]:
            file, (n_bytes, _), _ = files[split][row]
            if n_bytes > _MOST_IMAGE_BYTES:
                reason = f"it has {n_bytes} bytes; {_MOST_IMAGE_BYTES} is the most allowed"
                raise UnreadableImageError(str(file.relative_to(root)), reason)
            try:
                return str(file.relative_to(root)), file.read_bytes()
            except OSError as error:
                raise UnreadableImageError(str(file.relative_to(root)), error.strerror or str(error)) from error

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
    """Download and prepare a source if it is missing; returns its location.

    Raises:
      TaskError: TensorFlow is missing, there is no such builder, the data must be downloaded by hand, or the
        directory has no data set.
    """
    if isinstance(source, Tfds):
        prepared(source)
    return source.open().where


def prepared(source: Tfds) -> Path:
    """The folder of a TFDS data set, which is downloaded and prepared if it is missing and has a name.

    Raises:
      TaskError: as `prepare`.
    """
    if source.name is not None:
        try:
            return source.folder()
        except TaskError:
            _download_and_prepare(source.name, source.root())
    return source.folder()


@contextlib.contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Turn what TFDS raises for a folder that it cannot read into a `TaskError`."""
    try:
        yield
    except (OSError, ValueError, NotImplementedError, RuntimeError) as error:
        raise TaskError(f"the TFDS data set in {folder} cannot be read ({error})") from error


def _tfds_records(folder: Path, image: str, split: str) -> tuple[int, Callable[[int], dict[str, Any]]]:
    """(the number of records of a TFDS split, row -> record with its image still encoded)."""
    import tensorflow_datasets as tfds

    with reading(folder):
        builder = tfds.builder_from_directory(folder)
        source = builder.as_data_source(split, decoders={image: tfds.decode.SkipDecoding()})

    def record(row: int) -> dict[str, Any]:
        try:
            return source[row]
        except Exception as error:  # of array_record and protobuf, when a file is missing, truncated or changed
            raise TaskError(f"the TFDS data set in {folder} is damaged at {split}[{row}] ({error})") from error

    return len(source), record


def _download_and_prepare(name: str, root: Path) -> None:
    if importlib.util.find_spec("tensorflow") is None:
        raise TaskError(f"preparing {name!r} needs TensorFlow: {pip_install('prepare')}")
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(name, data_dir=root, file_format="array_record")
    except tfds.core.registered.DatasetNotFoundError:
        names = tfds.list_builders(with_community_datasets=False)
        raise TaskError(f"TFDS has no builder {name!r}{similar(name, names)}") from None
    try:
        builder.download_and_prepare()
    except AssertionError as error:  # how TFDS asks for files that must be downloaded by hand
        raise TaskError(f"TFDS cannot download {name!r} automatically: {error}") from error


def _versions(folder: Path) -> list[Path]:
    """The prepared versions of a TFDS data set, oldest first."""
    found = [file.parent for file in folder.glob("*/dataset_info.json") if re.fullmatch(r"[\d.]+", file.parent.name)]
    return sorted(found, key=lambda version: [int(number) for number in version.name.split(".") if number])


def _feature(features: Mapping[str, Any], kind: str, preferred: Sequence[str], folder: Path) -> str:
    """The name of the feature of a kind: a supervised key if there is one, else the only feature of that kind."""
    found = [key for key, feature in features.items() if feature.get("pythonClassName", "").endswith(kind)]
    named = [key for key in found if key in preferred]
    if len(named or found) != 1:
        raise TaskError(f"the TFDS data set in {folder} is not image classification: it has {len(found)} {kind[1:]}s")
    return (named or found)[0]


def _class_names(folder: Path, label: str, feature: Mapping[str, Any]) -> list[str]:
    """The names of a label's classes: from the file that TFDS wrote, else their numbers."""
    names = folder / f"{label.replace('/', '.')}.labels.txt"
    try:
        if names.is_file():
            return [line.strip() for line in names.read_text().splitlines() if line.strip()]
        count = int(feature["classLabel"]["numClasses"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TaskError(f"the classes of the TFDS data set in {folder} cannot be read ({error})") from error
    if count > _MOST_CLASSES:
        raise TaskError(f"the TFDS data set in {folder} has {count} classes; {_MOST_CLASSES} is the most allowed")
    return [str(i) for i in range(count)]


def _folders(parent: Path) -> list[Path]:
    return sorted(folder for folder in parent.iterdir() if folder.is_dir() and not folder.name.startswith("."))


def _labelled_files(parent: Path, classes: Sequence[str]) -> Iterator[tuple[Path, tuple[int, int], int]]:
    """Each class folder's image files: path, (size, time of change), and the position of the class."""
    for folder in _folders(parent):
        if folder.name not in classes:
            raise TaskError(f"the class {folder.name!r} of {parent} has no training images; rename or remove it")
        label = classes.index(folder.name)
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            if not entry.name.lower().endswith(_SUFFIXES) or entry.name.startswith("."):
                continue
            try:
                found = entry.stat()
            except OSError:  # a dangling link: listed, so that reading it names it
                found = entry.stat(follow_symlinks=False)
            else:
                if stat.S_ISDIR(found.st_mode):
                    continue
                if not stat.S_ISREG(found.st_mode):
                    raise TaskError(f"{entry.path} is not a regular file; remove it from the image folder")
            yield Path(entry.path), (found.st_size, found.st_mtime_ns), label


def in_parallel(work: Callable[[int], _T], count: int, description: str) -> Iterator[_T]:
    """The results of work(0), …, work(count - 1) in order, from a thread per core; a progress bar on a terminal."""
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


def similar(name: str, names: Iterable[str]) -> str:
    """Suggestions for a misspelled name, as the end of a sentence."""
    by_lower = {other.lower(): other for other in names}
    close = [by_lower[other] for other in difflib.get_close_matches(name.lower(), by_lower)]
    return f"; did you mean {' or '.join(map(repr, close))}?" if close else f"; there are {len(by_lower)} others"
