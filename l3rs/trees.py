"""Pytrees of parameters, seen as layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax

from l3rs.layers import JAX, Match, Matching, match_network
from l3rs.spec import Layer, Spec


def layer_path(path: Sequence[Any]) -> str:
    """A pytree key path as `a/b/0`. A trailing `value` (Flax NNX variables) is dropped."""
    parts = [jax.tree_util.keystr((key,), simple=True) for key in path]
    if len(parts) > 1 and parts[-1] == "value":
        parts.pop()
    return "/".join(parts)


def layers_of(params: Any) -> tuple[Layer, ...]:
    """The layers of a pytree of arrays or shapes, in leaf order."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return tuple(Layer(layer_path(path), tuple(leaf.shape)) for path, leaf in leaves)


def match_params(spec: Spec, params: Any, how: Matching) -> tuple[Match, ...]:
    """Which layer of the checkpoint each leaf of `params`, a pytree of arrays or shapes, is; in leaf order.

    `params` may lack layers of the checkpoint, except if they are matched by order: `optax.masked` leaves frozen
    parameters out.

    Raises:
      L3RSError: see `match_network`.
    """
    layers = layers_of(params)
    return match_network(spec, [(layer.path, layer.shape) for layer in layers], how, JAX)
