"""The meta-parameters θ of an L3RS optimizer as data: names, shapes, limits and digest. It needs numpy alone.

θ is a nested dict of float32 arrays::

    {"embedding": [R, E], "dense_0": {"kernel": [in, out], "bias": [out]}, "dense_1": …}

Here its arrays go by flat names, "embedding" and "dense_0/kernel".
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from l3rs.core import n_outputs
from l3rs.decide import feature_sizes
from l3rs.descriptors import n_descriptors, roles
from l3rs.spec import L3RSError, Spec, Theta, require_spec

MAX_VALUES = 1 << 24  # float32 values in theta, 64 MiB; a shipped optimizer has about 2,300


def theta_shapes(spec: Spec) -> dict[str, tuple[int, ...]]:
    """The shape of every array of theta, by its flat name, in the order of the layers.

    `embedding` has a row for each layer of the spec's table, or for each descriptor of a layer; with a `layer_gain` its
    last column is not seen by the MLP, but multiplies λ.

    Raises:
      L3RSError: they hold more than `MAX_VALUES` values.
    """
    widths = [sum(feature_sizes(spec)), *spec.hidden, n_outputs(spec)]
    n_rows = len(spec.layers) if spec.embedding == "table" else n_descriptors(spec)
    shapes: dict[str, tuple[int, ...]] = {"embedding": (n_rows, spec.embedding_dim + (spec.layer_gain > 0))}
    for i, (fan_in, fan_out) in enumerate(itertools.pairwise(widths)):
        shapes[f"dense_{i}/kernel"] = (fan_in, fan_out)
        shapes[f"dense_{i}/bias"] = (fan_out,)
    n_values = sum(math.prod(shape) for shape in shapes.values())
    if n_values > MAX_VALUES:
        raise L3RSError(f"the spec's theta has {n_values} values; at most {MAX_VALUES} are allowed")
    return shapes


def flatten(theta: Theta) -> dict[str, Any]:
    """The arrays of theta by flat name, sorted."""
    return {"/".join(path): leaf for path, leaf in sorted(_leaves(theta).items())}


def unflatten(arrays: Mapping[str, Any]) -> Theta:
    """Theta from its arrays by flat name; the reverse of `flatten`."""
    theta: Theta = {}
    for name, array in sorted(arrays.items()):
        *parents, leaf = name.split("/")
        node = theta
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = array
    return theta


def check_theta(theta: Theta, spec: Spec, where: str) -> None:
    """Check that `theta` has the names, shapes and dtypes that `spec` needs. Only `shape` and `dtype` are read.

    Args:
      theta: meta-parameters; arrays of numpy or JAX, traced ones too.
      spec: what they belong to.
      where: what the error calls them, such as a file or "theta".

    Raises:
      L3RSError: something differs.
    """
    require_spec(spec)
    needed, found = theta_shapes(spec), _leaves(theta)
    if set(found) != {tuple(name.split("/")) for name in needed}:
        names = sorted("/".join(path) for path in found)
        raise L3RSError(f"{where} holds {names}; its spec needs {sorted(needed)}, nested as `init_meta_params` does")
    for path, array in sorted(found.items()):
        name = "/".join(path)
        shape, dtype = tuple(getattr(array, "shape", ())), getattr(array, "dtype", type(array).__name__)
        if shape != needed[name] or dtype != np.float32:
            raise L3RSError(f"{where}: {name} is {dtype}{list(shape)}; its spec needs float32{list(needed[name])}")


def multiply_steps(theta: Theta, spec: Spec, factor: float, by_role: Mapping[str, float] | None = None) -> Theta:
    """Theta whose every λ is `factor` times that of `theta`; the limits of λ and of all steps stay where they are.

    Args:
      theta: meta-parameters.
      spec: what they belong to; with a table and a `layer_gain` if there are factors by role.
      factor: of all layers.
      by_role: {`Role.name`: further factor} of the table's layers.
    """
    last = f"dense_{len(spec.hidden)}"
    if factor != 1:
        bias = np.array(theta[last]["bias"], np.float32)
        bias[len(spec.directions)] += math.log(factor) / spec.step_gain
        theta = {**theta, last: {**theta[last], "bias": bias}}
    if by_role:
        rows = np.array(theta["embedding"], np.float32)
        logs = [math.log(by_role.get(role.name, 1.0)) for role in roles(spec.layers)]
        rows[:, -1] += np.array(logs, np.float32) / np.float32(spec.layer_gain)
        theta = {**theta, "embedding": rows}
    return theta


def digest(theta: Theta) -> str:
    """SHA-256 of the names and values of theta, in hexadecimal."""
    sha256 = hashlib.sha256()
    for name, array in flatten(theta).items():
        sha256.update(name.encode())
        sha256.update(np.ascontiguousarray(array, "<f4").tobytes())
    return sha256.hexdigest()


def _leaves(theta: Any, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    if isinstance(theta, dict) and (theta or not path):
        return {k: leaf for key, value in theta.items() for k, leaf in _leaves(value, (*path, str(key))).items()}
    return {path: theta} if path else {}
