"""A checkpoint's origin and layers as lines of text: `metatrain inspect`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax

import l3rs

_MAX_TEXT = 2000  # characters of a value that are shown


def describe(optimizer: str) -> Iterator[str]:
    """Lines about a checkpoint: its size, directions, origin, measured results and layers.

    Args:
      optimizer: a checkpoint, as of `l3rs.load`.

    Raises:
      L3RSError: not a checkpoint, or a damaged one.
    """
    theta, spec, info = l3rs.restore(optimizer)
    size = sum(leaf.size for leaf in jax.tree.leaves(theta))
    directions = ", ".join(direction.name for direction in spec.directions)
    yield f"{optimizer}: L3RS with {size:,} meta-parameters, directions {directions}"
    for key, value in info.items():
        if key not in ("config", "results"):
            yield f"  {key}: {str(value)[:_MAX_TEXT]}"
    with contextlib.suppress(AttributeError, TypeError, ValueError):  # a user may store anything under this name
        yield from _measured(info.get("results", {}))
    if spec.embedding == "descriptor":
        yield "  fits any network: it reads the kind, depth and fans of a layer"
        return
    yield "  layers:"
    for layer in spec.layers:
        yield f"    {layer.path}  {list(layer.shape)}"


def _measured(results: Mapping[str, Any]) -> Iterator[str]:
    """Lines about measured results, as `Results.summary` gives them."""
    for setting, optimizers in results.items():
        yield f"  measured, {setting}: test loss after N steps"
        for name, horizons in optimizers.items():
            yield f"    {name}: " + ", ".join(f"{steps}: {loss}" for steps, (loss, *_) in horizons.items())
