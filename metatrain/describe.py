"""A checkpoint's origin and layers as lines of text: `metatrain inspect`."""

from __future__ import annotations

from collections.abc import Iterator

import jax

import l3rs


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
            yield f"  {key}: {value}"
    for setting, optimizers in info.get("results", {}).items():
        yield f"  measured, {setting}: test loss after N steps"
        for name, horizons in optimizers.items():
            yield f"    {name}: " + ", ".join(f"{steps}: {loss}" for steps, (loss, *_) in horizons.items())
    if spec.embedding == "descriptor":
        yield "  fits any network: it reads the kind, depth and fans of a layer"
        return
    yield "  layers:"
    for layer in spec.layers:
        yield f"    {layer.path}  {list(layer.shape)}"
