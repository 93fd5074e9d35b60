"""A meta-trained optimizer on disk: one folder that explains itself.

    NAME/l3rs.json   format, spec (features, directions, layers), digest, and what is known of its making
    NAME/theta/      the meta-parameters (Orbax)

Nothing in it is code, and nothing is unpickled. What is read is checked against the spec: names,
shapes, dtypes and a digest of the values.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from l3rs import network
from l3rs.directions import make_direction
from l3rs.guard import Guard
from l3rs.layers import Match, MatchBy, Matching, OnUnknown, match_params
from l3rs.optimizer import learned_optimizer
from l3rs.places import MANIFEST, THETA, local_folder
from l3rs.spec import FEATURE_VERSION, L3RSError, Spec, Theta, layer_path

FORMAT_VERSION = 1
_OVERHEAD = 1 << 17  # bytes of metadata in a small checkpoint, amply


def save(
    path: str | os.PathLike[str],
    theta: Theta,
    spec: Spec,
    info: Mapping[str, Any] | None = None,
    *,
    overwrite: bool = False,
) -> Path:
    """Write a deployable optimizer; it is there whole, or not at all.

    Args:
      path: the folder to make.
      theta: meta-parameters.
      spec: what they belong to.
      info: anything JSON can hold that a user should know: task, horizon, config, results.
      overwrite: replace a folder that exists.

    Raises:
      L3RSError: the folder exists, or `theta` does not fit `spec`.
    """
    import orbax.checkpoint as ocp  # here, not above: `import l3rs` stays as light as `import optax`

    target = Path(path).absolute()
    if target.exists() and not overwrite:
        raise L3RSError(f"{target} exists; choose another folder or pass overwrite=True")
    theta = jax.tree.map(np.asarray, theta)
    network.check(theta, spec, "theta")
    manifest = {
        "format": FORMAT_VERSION,
        "features": FEATURE_VERSION,
        "spec": spec.to_json(),
        "sha256": digest(theta),
        "info": dict(info or {}),
    }
    text = json.dumps(manifest, indent=1, allow_nan=False) + "\n"
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        with (
            ocp.PyTreeCheckpointer() as checkpointer,
            saving(target, sum(leaf.nbytes for leaf in jax.tree.leaves(theta))),
        ):
            checkpointer.save(scratch / "new" / THETA, theta)
        # Orbax's mark for stores without renaming; it names the folder that was written to.
        (scratch / "new" / THETA / "commit_success.txt").unlink(missing_ok=True)
        (scratch / "new" / MANIFEST).write_text(text)
        # Whatever interrupts this, the old checkpoint is there: under its own name or under this one.
        old = target.with_name(f"{target.name}.replaced")
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)  # of a save that was killed when it had the new one in place
            target.rename(old)
        try:
            (scratch / "new").rename(target)
        except OSError:
            if old.exists():
                old.rename(target)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


@contextlib.contextmanager
def saving(path: Path, n_bytes: int) -> Iterator[None]:
    """A save by Orbax of `n_bytes` into `path`, whose errors of the disk are OSErrors.

    Room is asked for before: a disk that fills up during a save makes Orbax print what its threads met.
    """
    folder = next(folder for folder in (path, *path.parents) if folder.exists())
    if shutil.disk_usage(folder).free < 2 * n_bytes + _OVERHEAD:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    with os_errors(path):
        yield


@contextlib.contextmanager
def os_errors(path: Path) -> Iterator[None]:
    """Give a full disk or a lost permission, which TensorStore raises as a ValueError, its own kind back."""
    try:
        yield
    except ValueError as error:
        code = re.search(r"os_error_code='(\d+)'", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from None


def info(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The checkpoint's manifest: format, features, spec, sha256, info.

    Args:
      path: as of `load`.

    Raises:
      L3RSError: not a checkpoint, a damaged one, or one of a newer version.
    """
    with local_folder(path) as folder:
        return _manifest(folder)


def _manifest(folder: Path) -> dict[str, Any]:
    file = folder / MANIFEST
    try:
        manifest = json.loads(file.read_text())
    except FileNotFoundError:
        raise L3RSError(f"{folder} is not an L3RS checkpoint: it has no {MANIFEST}") from None
    except OSError as error:
        raise L3RSError(f"{folder} is not an L3RS checkpoint: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise L3RSError(f"{file} is damaged: {error}") from None
    missing = {"format", "features", "spec", "sha256", "info"} - set(manifest if isinstance(manifest, dict) else ())
    if missing:
        raise L3RSError(f"{file} is damaged: it lacks {', '.join(sorted(missing))}")
    for key, known in (("format", FORMAT_VERSION), ("features", FEATURE_VERSION)):
        if manifest[key] not in range(1, known + 1):
            raise L3RSError(f"{file} has {key} version {manifest[key]}; this release reads 1 to {known}: update l3rs")
    return manifest


def restore(path: str | os.PathLike[str]) -> tuple[Theta, Spec, dict[str, Any]]:
    """Meta-parameters (numpy arrays), spec and info of a checkpoint.

    Args:
      path: as of `load`.

    Raises:
      L3RSError: not a checkpoint, or a damaged one.
    """
    with local_folder(path) as folder:
        return _restore(folder.absolute())


def _restore(path: Path) -> tuple[Theta, Spec, dict[str, Any]]:
    import orbax.checkpoint as ocp

    manifest = _manifest(path)
    spec = _spec(path, manifest)
    folder = path / THETA
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            theta = checkpointer.restore(folder)
    except Exception as error:  # Orbax and TensorStore raise many kinds for a damaged folder
        first_line = (str(error).strip().splitlines() or [repr(error)])[0]
        raise L3RSError(f"{folder} cannot be read: {first_line[:200]}") from None
    theta = jax.tree.map(np.asarray, theta)
    network.check(theta, spec, str(folder))
    if digest(theta) != manifest["sha256"]:
        raise L3RSError(f"{folder} is damaged: its values do not have the digest that {MANIFEST} states")
    return theta, spec, manifest["info"]


def read_spec(path: str | os.PathLike[str]) -> Spec:
    """The spec of a checkpoint, without its values; errors as of `info`."""
    with local_folder(path) as folder:
        return _spec(folder, _manifest(folder))


def _spec(path: Path, manifest: Mapping[str, Any]) -> Spec:
    try:
        spec = Spec.from_json(manifest["spec"])
        for direction in spec.directions:
            make_direction(direction)
    except L3RSError as error:
        raise L3RSError(f"{path / MANIFEST} is damaged: {error}") from None
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise L3RSError(f"{path / MANIFEST} is damaged: its spec cannot be read ({error!r})") from None
    return spec


def load(
    path: str | os.PathLike[str],
    total_steps: int | jax.Array | None = None,
    *,
    rename: Mapping[str, str] | None = None,
    match: MatchBy = "path",
    on_unknown: OnUnknown = "error",
    guard: bool | Guard = False,
) -> optax.GradientTransformationExtraArgs:
    """A meta-trained optimizer, ready to use: see `learned_optimizer` for its arguments and errors.

    Args:
      path: a checkpoint: its folder, a name of `l3rs.available()`, `hf://owner/name[@revision]`, or `gs://…` or another
        URL that fsspec has a driver for. A folder that exists goes before a name.
      total_steps: the number of steps you are going to train. None means the longest that the checkpoint was
        meta-trained on.
      rename, match, on_unknown: how the params' layers find theirs in the checkpoint.
      guard: a safety net.
    """
    theta, spec, info = restore(path)
    steps = trained_horizon(info) if total_steps is None else total_steps
    return learned_optimizer(theta, spec, steps, rename=rename, match=match, on_unknown=on_unknown, guard=guard)


def trained_horizon(info: Mapping[str, Any]) -> int:
    """The longest horizon of a checkpoint's meta-training.

    Raises:
      L3RSError: it does not say.
    """
    horizon = info.get("horizon")
    longest = horizon.get("max") if isinstance(horizon, Mapping) else None
    if longest is None:
        raise L3RSError("total_steps is missing, and the checkpoint does not say up to which it was meta-trained")
    return int(longest)


def match_layers(
    optimizer: str | os.PathLike[str] | Spec,
    params: optax.Params,
    *,
    rename: Mapping[str, str] | None = None,
    by: MatchBy = "path",
    on_unknown: OnUnknown = "error",
) -> tuple[Match, ...]:
    """What each layer of `params` is to an optimizer, in leaf order; `load` does the same with these arguments.

    Args:
      optimizer: a checkpoint, or a spec.
      params: a pytree of arrays or shapes.
      rename, by, on_unknown: see `learned_optimizer`.

    Raises:
      L3RSError: as `load`.

    Example:
      >>> import jax, l3rs
      >>> spec = l3rs.Spec.create({"dense": {"kernel": jax.numpy.ones((3, 2)), "bias": jax.numpy.ones(2)}})
      >>> params = {"fc": {"w": jax.numpy.ones((3, 2)), "b": jax.numpy.ones(2)}, "scale": jax.numpy.ones(5)}
      >>> for layer in l3rs.match_layers(spec, params, rename={"fc/w": "dense/kernel"}, on_unknown="mean"):
      ...     print(layer.name, layer.source)
      fc/b mean
      fc/w dense/kernel
      scale mean
    """
    spec = optimizer if isinstance(optimizer, Spec) else read_spec(optimizer)
    return match_params(spec, params, Matching.of(spec, rename, by, on_unknown))


def digest(theta: Theta) -> str:
    """SHA-256 of names and values, in hexadecimal."""
    found = hashlib.sha256()
    for name, array in sorted((layer_path(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(theta)):
        found.update(name.encode())
        found.update(np.ascontiguousarray(array, "<f4").tobytes())
    return found.hexdigest()
