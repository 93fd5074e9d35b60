"""Pytrees of parameters, seen as layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from l3rs.layers import JAX, Match, Matching, match_network
from l3rs.spec import L3RSError, Layer, Spec


def layer_path(path: Sequence[Any]) -> str:
    """A pytree key path as `a/b/0`. A trailing `value` (Flax NNX variables) is dropped."""
    parts = [jax.tree_util.keystr((key,), simple=True) for key in path]
    if len(parts) > 1 and parts[-1] == "value":
        parts.pop()
    return "/".join(parts)


def layers_of(params: Any) -> tuple[Layer, ...]:
    """The layers of a pytree of arrays, shapes or Python numbers, in leaf order.

    Raises:
      L3RSError: a leaf is not an array of real floating-point numbers.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return tuple(Layer(layer_path(path), _shape("params", layer_path(path), leaf)) for path, leaf in leaves)


def check_grads(grads: Any, params: Any) -> None:
    """Check that `grads` has the leaves of `params`, which `layers_of` has checked.

    Raises:
      L3RSError: a leaf is missing, is one too many, has another shape, or is not an array of real floating-point
        numbers.
    """
    expected = {layer_path(path): np.shape(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    leaves = {layer_path(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(grads)}
    for path, shape in expected.items():
        if path not in leaves:
            raise L3RSError(f"gradients lack {path!r} {shape}, which the params have; both must be the same tree")
    if set(leaves) == set(expected) and list(leaves) != list(expected):
        raise L3RSError("gradients have the leaves of the params in another order; both must be the same kind of tree")
    for path, leaf in leaves.items():
        if path not in expected:
            raise L3RSError(f"gradients have {path!r}, which the params lack; both must be the same tree")
        shape = _shape("gradients", path, leaf)
        if shape != expected[path]:
            raise L3RSError(f"gradients have the shape {shape} at {path!r}; the params have {expected[path]}")


def check_loss(value: Any) -> None:
    """Check that `value` is one real number.

    Raises:
      L3RSError: it is not.
    """
    dtype = getattr(value, "dtype", None)
    if dtype is None and isinstance(value, int | float) and not isinstance(value, bool):
        return
    if dtype is None or not (jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)):
        found = repr(value) if dtype is None else f"{dtype}{list(value.shape)}"
        raise L3RSError(f"value is {found[:80]}; it must be one real number, the loss")
    if value.shape != ():
        raise L3RSError(f"value has shape {value.shape}; it must be one number, the loss")


def _is_real(dtype: Any) -> bool:
    try:
        return bool(jnp.issubdtype(dtype, jnp.floating))
    except TypeError:  # of another library: a spec can be created from its shapes
        return "float" in str(dtype)


def _shape(where: str, path: str, leaf: Any) -> tuple[int, ...]:
    if isinstance(leaf, float):
        return ()
    dtype, shape = getattr(leaf, "dtype", None), getattr(leaf, "shape", None)
    if dtype is not None and shape is not None and _is_real(dtype):
        return tuple(shape)
    found = type(leaf).__name__ if dtype is None else f"{getattr(dtype, 'name', dtype)}{list(shape or ())}"
    raise L3RSError(
        f"{where} have {found} at {path!r}; L3RS trains arrays of real floating-point numbers: leave other leaves out, "
        f"e.g. with optax.masked, or as None in both params and gradients"
    )


def match_params(spec: Spec, params: Any, how: Matching) -> tuple[Match, ...]:
    """Which layer of the checkpoint each leaf of `params`, a pytree of arrays or shapes, is; in leaf order.

    `params` may lack layers of the checkpoint, except if they are matched by order: `optax.masked` leaves frozen
    parameters out.

    Raises:
      L3RSError: see `layers_of` and `match_network`.
    """
    layers = layers_of(params)
    return match_network(spec, [(layer.path, layer.shape) for layer in layers], how, JAX)
