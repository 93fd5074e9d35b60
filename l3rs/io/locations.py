"""Where a checkpoint is: in a folder, in this package, in an object store, on the Hugging Face Hub."""

from __future__ import annotations

import contextlib
import importlib.resources
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from l3rs.io.files import first_line, is_inner_name, temporary_folder
from l3rs.io.manifest import MANIFEST, MAX_MANIFEST_BYTES, read_manifest
from l3rs.spec import L3RSError
from l3rs.theta import MAX_VALUES

DRIVERS = {"gs": "gcsfs", "gcs": "gcsfs", "s3": "s3fs", "az": "adlfs", "abfs": "adlfs"}
_MAX_FILES = 256
_MAX_BYTES = 16 * MAX_VALUES  # of all files of a checkpoint together
_VALUES = ("theta.safetensors", "theta")  # in a checkpoint of format 2, and of format 1


def available() -> list[str]:
    """The names of the optimizers that come with the package: `l3rs.load` takes them in place of a path."""
    return sorted(file.parent.name for file in _shipped_folder().glob(f"*/{MANIFEST}"))


def _shipped_folder() -> Path:
    return Path(str(importlib.resources.files("l3rs"))) / "checkpoints"


@contextlib.contextmanager
def local_folder(location: str | os.PathLike[str]) -> Iterator[Path]:
    """A local folder with the checkpoint at `location`, for as long as the context lasts.

    Args:
      location: a folder; the name of a shipped optimizer, unless there is a folder of that name; `hf://owner/name` or
        `hf://owner/name@revision` (kept in the Hub's own cache); or another URL that fsspec has a driver for.

    Raises:
      L3RSError: no such name, a package that is missing, a server that does not answer. Errors about the folder that
        the caller raises are changed to name `location` instead.
    """
    if not isinstance(location, str | os.PathLike):
        raise L3RSError(
            f"the checkpoint is {location!r}; it must be a folder, a name of l3rs.available() or a URL (the number of "
            "steps is total_steps)"
        )
    name = os.fspath(location)
    if isinstance(name, bytes) or "\0" in name:
        raise L3RSError(f"{name!r} is not the location of a checkpoint")
    if "://" in name:
        with temporary_folder("l3rs-checkpoint-") as scratch, _naming(name, scratch):
            (_from_hub if name.startswith("hf://") else _from_store)(name, scratch)
            yield scratch
    elif _exists(Path(name)) or len(Path(name).parts) != 1:
        yield Path(name)
    elif name in available():
        yield _shipped_folder() / name
    else:
        names = ", ".join(available())
        raise L3RSError(f"{name} is not an L3RS checkpoint: there is no such folder, and the shipped ones are {names}")


@contextlib.contextmanager
def _naming(location: str, folder: Path) -> Iterator[None]:
    try:
        yield
    except L3RSError as error:
        raise L3RSError(str(error).replace(str(folder), location)) from None


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name that is too long, for one
        return False


def _from_store(url: str, folder: Path) -> None:
    """Copy a checkpoint from an object store into `folder`, and nothing else that is there."""
    scheme = url.partition("://")[0]
    try:
        import fsspec

        store, root = fsspec.core.url_to_fs(url)
        root = root.rstrip("/")

        def read(name: str, max_bytes: int) -> bytes:
            entry = store.info(f"{root}/{name}")
            if entry.get("islink") or entry.get("type") != "file":
                raise L3RSError(f"{url} is not an L3RS checkpoint: {name} is not a regular file")
            with store.open(f"{root}/{name}", "rb") as file:
                return bytes(file.read(max_bytes + 1))

        if not store.isfile(f"{root}/{MANIFEST}"):
            raise L3RSError(f"{url} is not an L3RS checkpoint: it has no {MANIFEST}")
        _copy([MANIFEST], read, folder, MAX_MANIFEST_BYTES)
        wanted = _values_of(folder)
        entries = store.find(f"{root}/{wanted}")  # of a file it is the file
        _copy([_relative(entry, root, url) for entry in entries], read, folder, _MAX_BYTES)
    except L3RSError:
        raise
    except ImportError as error:
        driver = "fsspec" if error.name == "fsspec" else DRIVERS.get(scheme, f"fsspec's driver for {scheme}://")
        raise L3RSError(f"{url} needs a package that is not installed: {driver}") from None
    except ValueError as error:
        raise L3RSError(f"{url} is not a checkpoint URL: {first_line(error)}") from None
    except Exception as error:  # the drivers' own exceptions have no common base
        raise L3RSError(f"{url} cannot be read: {first_line(error)}") from None


def _from_hub(url: str, folder: Path) -> None:
    """Download a checkpoint into the Hub's cache and copy it from there: in the cache its files are links."""
    parts = re.fullmatch(r"hf://([^/@]+/[^/@]+)(?:@(.+))?", url)
    if parts is None:
        raise L3RSError(f"{url} is not a name on the Hub; allowed are hf://owner/name and hf://owner/name@revision")
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import DryRunError

        def download(patterns: list[str], max_bytes: int) -> Path:
            where: dict[str, Any] = {"repo_id": parts[1], "revision": parts[2], "allow_patterns": patterns}
            with contextlib.suppress(DryRunError):  # offline: then nothing is downloaded
                planned = snapshot_download(**where, dry_run=True)
                if isinstance(planned, list) and sum(file.file_size or 0 for file in planned) > max_bytes:
                    raise L3RSError(f"{url}: {', '.join(patterns)} has more than {max_bytes} bytes")
            return Path(snapshot_download(**where))

        snapshot = download([MANIFEST], MAX_MANIFEST_BYTES)
        cache = snapshot.parents[1].resolve()  # of this repository: snapshots/COMMIT, blobs/

        def read(name: str, max_bytes: int) -> bytes:
            file = (snapshot / name).resolve()
            if not file.is_relative_to(cache) or not file.is_file():
                raise L3RSError(f"{url} is not an L3RS checkpoint: {name} is not a regular file")
            with file.open("rb") as opened:
                return opened.read(max_bytes + 1)

        if not (snapshot / MANIFEST).is_file():
            raise L3RSError(f"{url} is not an L3RS checkpoint: it has no {MANIFEST}")
        _copy([MANIFEST], read, folder, MAX_MANIFEST_BYTES)
        wanted = _values_of(folder)
        download([wanted, f"{wanted}/**"], _MAX_BYTES)
        files = [snapshot / wanted] if (snapshot / wanted).is_file() else sorted((snapshot / wanted).rglob("*"))
        names = [file.relative_to(snapshot).as_posix() for file in files if not file.is_dir()]
        _copy(names, read, folder, _MAX_BYTES)
    except L3RSError:
        raise
    except ImportError:
        raise L3RSError(f"{url} needs a package that is not installed: huggingface_hub") from None
    except Exception as error:  # the client lets many libraries' errors through
        raise L3RSError(f"{url} cannot be downloaded: {first_line(error)}") from None


def _values_of(folder: Path) -> str:
    """The file or folder beside the manifest that has the values; a damaged manifest is refused here."""
    return _VALUES[read_manifest(folder).content["format"] == 1]


def _relative(entry: str, root: str, url: str) -> str:
    """The name of a store's entry relative to the checkpoint; refused unless it stays inside."""
    name = entry.removeprefix(f"{root}/")
    if name == entry or not is_inner_name(name):
        raise L3RSError(f"{url} is not an L3RS checkpoint: it has a file {name!r}")
    return name


def _copy(names: Iterable[str], read: Callable[[str, int], bytes], folder: Path, max_bytes: int) -> None:
    """Copy files of a checkpoint, whose names stay inside it, into `folder`."""
    for count, name in enumerate(names):
        content = read(name, max_bytes)
        max_bytes -= len(content)
        if max_bytes < 0 or count >= _MAX_FILES:
            raise L3RSError(f"{folder} is not an L3RS checkpoint: at {name} it is too large, or has too many files")
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
