"""A meta-trained optimizer on disk: one folder that explains itself.

    NAME/l3rs.json           format, spec (features, directions, layers), digest, and how it was meta-trained
    NAME/theta.safetensors   the meta-parameters
    NAME/theta/              the same values as Orbax stores them

Reading needs neither JAX nor Orbax. (Format 1 had no `theta.safetensors`: there Orbax reads the values.) Nothing in a
checkpoint is code, and nothing is unpickled. A checkpoint is checked against its spec before the values are read
(names, shapes, dtypes, sizes), and afterwards with a digest of the values.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors
import safetensors.numpy

from l3rs.extras import optax_face
from l3rs.io.files import first_line, read_regular, remove_leftovers
from l3rs.io.locations import local_folder
from l3rs.io.manifest import MANIFEST, Manifest, make_manifest, read_manifest
from l3rs.io.orbax_store import read_orbax, write_orbax
from l3rs.layers import Match, MatchBy, Matching, OnUnknown
from l3rs.spec import L3RSError, Spec, Theta
from l3rs.theta import check_theta, digest, flatten, theta_shapes, unflatten

if TYPE_CHECKING:
    import jax
    import optax

    from l3rs.guard import Guard

ORBAX = "theta"
SAFETENSORS = "theta.safetensors"
_HEADER_BYTES = 1 << 16  # of a safetensors file, at most: 100 bytes an array

DEFAULT = "universal"  # the shipped optimizer that fits any network


def save(
    path: str | os.PathLike[str],
    theta: Theta,
    spec: Spec,
    info: Mapping[str, Any] | None = None,
    *,
    overwrite: bool = False,
) -> Path:
    """Write an optimizer as a checkpoint folder, completely or not at all. Needs the extra `jax`.

    Args:
      path: the folder to create.
      theta: meta-parameters, arrays of numpy or JAX.
      spec: what they belong to.
      info: anything JSON can hold that a user should know: task, horizon, config, results.
      overwrite: replace a folder that exists.

    Returns:
      The absolute path of the folder.

    Raises:
      L3RSError: the folder exists, or `theta` does not fit `spec`, or Orbax is not installed.
      TypeError, ValueError: JSON cannot hold `info`.
      OSError: it cannot be written. A checkpoint that was there still is.
    """
    target = Path(path).absolute()
    if target.exists() and not overwrite:
        raise L3RSError(f"{target} exists; choose another folder or pass overwrite=True")
    theta = _to_numpy(theta)
    check_theta(theta, spec, "theta")
    text = make_manifest(spec, digest(theta), info or {})
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(target.parent, target.name)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        new = scratch / "new"
        write_orbax(new / ORBAX, theta, target)
        (new / SAFETENSORS).write_bytes(safetensors.numpy.save(flatten(theta)))
        (new / MANIFEST).write_text(text, encoding="utf-8")
        _replace(target, new)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def info(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The checkpoint's manifest: format, features, spec, sha256, info.

    The spec is `Spec.to_json` of the checkpoint's spec, also where an earlier version wrote other fields.

    Args:
      path: as of `load`.

    Raises:
      L3RSError: not a checkpoint, or damaged, or written by a newer version.
    """
    with local_folder(path) as folder:
        return read_manifest(folder).content


def read_spec(path: str | os.PathLike[str]) -> Spec:
    """The spec of a checkpoint, without its values; arguments and errors as of `info`."""
    with local_folder(path) as folder:
        return read_manifest(folder).spec


def restore(path: str | os.PathLike[str]) -> tuple[Theta, Spec, dict[str, Any]]:
    """Meta-parameters (a nested dict of numpy arrays), spec and info of a checkpoint. Does not import JAX.

    Args:
      path: as of `load`.

    Raises:
      L3RSError: not a checkpoint, or damaged; or of format 1, and Orbax is not installed.
    """
    with local_folder(path) as folder:
        manifest = read_manifest(folder)
        file = folder / (ORBAX if manifest.content["format"] == 1 else SAFETENSORS)
        theta = _read_values(file, manifest)
    return theta, manifest.spec, manifest.content["info"]


def load(
    path: str | os.PathLike[str] = DEFAULT,
    total_steps: int | jax.Array | None = None,
    *,
    rename: Mapping[str, str] | None = None,
    match: MatchBy = "path",
    on_unknown: OnUnknown = "error",
    guard: bool | Guard = False,
    weight_decay: float | jax.Array = 0.0,
    mask: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """A meta-trained optimizer, ready to use with optax: see `learned_optimizer` for its arguments and errors.

    Args:
      path: a checkpoint: its folder, a name of `l3rs.available()`, `hf://owner/name[@revision]`, or `gs://…` or another
        URL that fsspec has a driver for. A folder that exists goes before a name. The optimizer for any network when
        not given.
      total_steps: the number of steps you are going to train. None means the longest horizon that the checkpoint was
        meta-trained on.
      rename, match, on_unknown: how the layers of the params are matched with those of the checkpoint.
      guard: a safety net.
      weight_decay, mask: decoupled weight decay, and where.

    Raises:
      ImportError: JAX or optax is not installed.
    """
    learned_optimizer = optax_face("optimizer", "learned_optimizer")
    theta, spec, info = restore(path)
    steps = chosen_horizon(info, total_steps)
    options = {"rename": rename, "match": match, "on_unknown": on_unknown, "guard": guard}
    decay = {"weight_decay": weight_decay, "mask": mask}
    tx: optax.GradientTransformationExtraArgs = learned_optimizer(theta, spec, steps, **options, **decay)
    return tx


def chosen_horizon(info: Mapping[str, Any], total_steps: Any) -> Any:
    """`total_steps`, or the longest horizon that a checkpoint was meta-trained on, in steps.

    Warns if it is longer than that.

    Args:
      info: as `restore` returns it.
      total_steps: None, a number of steps, or anything else, which is returned as it is.

    Raises:
      L3RSError: there is none, and the checkpoint does not state it.
    """
    horizon = info.get("horizon")
    longest = horizon.get("max") if isinstance(horizon, Mapping) else None
    if type(longest) is not int or not 1 <= longest < 2**31:
        longest = None
    if total_steps is None and longest is None:
        raise L3RSError("total_steps is missing, and the checkpoint does not state the horizon of its meta-training")
    if longest is not None and isinstance(total_steps, int) and total_steps > longest:
        warnings.warn(
            f"total_steps is {total_steps}; this optimizer was meta-trained for at most {longest} steps: compare it "
            "with your usual optimizer before you rely on it",
            stacklevel=3,
        )
    return longest if total_steps is None else total_steps


def match_layers(
    optimizer: str | os.PathLike[str] | Spec,
    params: optax.Params,
    *,
    rename: Mapping[str, str] | None = None,
    by: MatchBy = "path",
    on_unknown: OnUnknown = "error",
) -> tuple[Match, ...]:
    """How each layer of `params` maps to the checkpoint's layers, in leaf order; `load` maps them in the same way.

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
    match_params = optax_face("trees", "match_params")
    spec = optimizer if isinstance(optimizer, Spec) else read_spec(optimizer)
    matches: tuple[Match, ...] = match_params(spec, params, Matching.of(spec, rename, by, on_unknown))
    return matches


def _replace(target: Path, new: Path) -> None:
    """Move the folder `new` to `target`. Whatever interrupts it, the old one is there: at `target` or `….replaced`."""
    old = target.with_name(f"{target.name}.replaced")
    if target.exists():
        shutil.rmtree(old, ignore_errors=True)  # left by a save that was killed after the new one was in place
        target.rename(old)
    try:
        new.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _read_values(file: Path, manifest: Manifest) -> Theta:
    shapes = theta_shapes(manifest.spec)
    theta = read_orbax(file, shapes) if file.name == ORBAX else _read_safetensors(file, shapes)
    check_theta(theta, manifest.spec, str(file))
    if digest(theta) != manifest.content["sha256"]:
        raise L3RSError(f"{file} is damaged: its values do not have the digest that {MANIFEST} states")
    return theta


def _read_safetensors(file: Path, shapes: Mapping[str, tuple[int, ...]]) -> Theta:
    n_bytes = sum(4 * int(np.prod(shape, dtype=np.int64)) for shape in shapes.values())
    try:
        arrays = safetensors.deserialize(read_regular(file, n_bytes + _HEADER_BYTES))
    except OSError as error:
        raise L3RSError(f"{file} cannot be read: {error.strerror or error}") from None
    except Exception as error:  # SafetensorError is an Exception of its own
        raise L3RSError(f"{file} is damaged: {first_line(error, 200)}") from None
    found = {name: (array["dtype"], tuple(array["shape"])) for name, array in arrays}
    if set(found) != set(shapes):
        raise L3RSError(f"{file} holds {sorted(found)[:20]}; its spec needs {sorted(shapes)}")
    for name, shape in sorted(shapes.items()):
        if found[name] != ("F32", shape):
            dtype = found[name][0].replace("F", "float")
            raise L3RSError(f"{file}: {name} is {dtype}{list(found[name][1])}; its spec needs float32{list(shape)}")
    return unflatten(
        {name: np.frombuffer(array["data"], "<f4").reshape(shapes[name]).astype(np.float32) for name, array in arrays}
    )


def _to_numpy(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _to_numpy(value) for key, value in tree.items()}
    return np.asarray(tree)
