"""Where a checkpoint is: in a folder, in this package, in an object store, on the Hugging Face Hub."""

from __future__ import annotations

import contextlib
import importlib.resources
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from l3rs.spec import L3RSError

_DRIVERS = {"gs": "gcsfs", "gcs": "gcsfs", "s3": "s3fs", "az": "adlfs", "abfs": "adlfs"}
MANIFEST, THETA = "l3rs.json", "theta"  # what a checkpoint consists of


def available() -> list[str]:
    """The names of the optimizers that come with the package: `l3rs.load` takes them in place of a path."""
    return sorted(file.parent.name for file in _shipped_folder().glob(f"*/{MANIFEST}"))


def _shipped_folder() -> Path:
    inside = Path(str(importlib.resources.files("l3rs"))) / "checkpoints"  # as a wheel has it
    return inside if inside.is_dir() else inside.parents[1] / "checkpoints"  # as the repository has it


@contextlib.contextmanager
def local_folder(place: str | os.PathLike[str]) -> Iterator[Path]:
    """A local folder with what is at `place`, for as long as the context lasts.

    Args:
      place: a folder; the name of a shipped optimizer, unless there is a folder of that name; `hf://owner/name` or
        `hf://owner/name@revision` (kept in the Hub's own cache); or another URL that fsspec has a driver for.

    Raises:
      L3RSError: no such name, a package that is missing, a place that does not answer. What the caller finds wrong
        with the folder is said of `place`.
    """
    name = os.fspath(place)
    if name.startswith("hf://"):
        with _said_of(name, folder := _from_hub(name)):
            yield folder
    elif "://" in name:
        with tempfile.TemporaryDirectory(prefix="l3rs-") as scratch, _said_of(name, Path(scratch)):
            _copy(name, Path(scratch))
            yield Path(scratch)
    elif Path(name).exists() or len(Path(name).parts) != 1:
        yield Path(name)
    elif name in available():
        yield _shipped_folder() / name
    else:
        names = ", ".join(available())
        raise L3RSError(f"{name} is not an L3RS checkpoint: there is no such folder, and the shipped ones are {names}")


@contextlib.contextmanager
def _said_of(place: str, folder: Path) -> Iterator[None]:
    try:
        yield
    except L3RSError as error:
        raise L3RSError(str(error).replace(str(folder), place)) from None


def _copy(url: str, folder: Path) -> None:
    """A checkpoint in an object store, and nothing else that is there."""
    scheme = url.partition("://")[0]
    try:
        import fsspec

        store, root = fsspec.core.url_to_fs(url)
        if not store.isfile(f"{root}/{MANIFEST}"):
            raise L3RSError(f"{url} is not an L3RS checkpoint: it has no {MANIFEST}")
        for file in [f"{root}/{MANIFEST}", *store.find(f"{root}/{THETA}")]:
            name = PurePosixPath(file).relative_to(PurePosixPath(root))
            if ".." in name.parts:
                raise L3RSError(f"{url} is not an L3RS checkpoint: it has a file {str(name)!r}")
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(store.cat_file(file))
    except L3RSError:
        raise
    except ImportError as error:
        driver = "fsspec" if error.name == "fsspec" else _DRIVERS.get(scheme, f"fsspec's driver for {scheme}://")
        raise L3RSError(f"{url} needs a package that is not installed: {driver}") from None
    except ValueError as error:
        raise L3RSError(f"{url} is no place of a checkpoint: {_first_line(error)}") from None
    except Exception as error:  # the drivers' own exceptions have no common base
        raise L3RSError(f"{url} cannot be read: {_first_line(error)}") from None


def _from_hub(url: str) -> Path:
    parts = re.fullmatch(r"hf://([^/@]+/[^/@]+)(?:@(.+))?", url)
    if parts is None:
        raise L3RSError(f"{url} is not a name on the Hub; allowed are hf://owner/name and hf://owner/name@revision")
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(parts[1], revision=parts[2], allow_patterns=[MANIFEST, f"{THETA}/**"]))
    except ImportError:
        raise L3RSError(f"{url} needs a package that is not installed: huggingface_hub") from None
    except Exception as error:  # the client lets many libraries' errors through
        raise L3RSError(f"{url} cannot be downloaded: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
