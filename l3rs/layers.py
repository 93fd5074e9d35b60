"""Matching a network's parameters to the layers that an optimizer was meta-trained on."""

from __future__ import annotations

from typing import Any

from l3rs.spec import L3RSError, Layer, layers_of


def match_layers(table: tuple[Layer, ...], params: Any) -> tuple[int, ...]:
    """For each leaf of `params`, its row in the layer table, by path.

    Layers of the table that `params` lacks are allowed: that is what `optax.masked` makes of
    frozen parameters.

    Raises:
      L3RSError: a leaf's path is not in the table, or its shape is another one.
    """
    rows = {layer.path: i for i, layer in enumerate(table)}
    found = []
    for layer in layers_of(params):
        row = rows.get(layer.path)
        if row is None:
            raise L3RSError(
                f"params have a layer {layer.path!r} that this optimizer was not meta-trained on; "
                f"it knows {_abridged([known.path for known in table])}"
            )
        if table[row].shape != layer.shape:
            raise L3RSError(
                f"layer {layer.path!r} has shape {layer.shape}; this optimizer was meta-trained on {table[row].shape}"
            )
        found.append(row)
    return tuple(found)


def _abridged(names: list[str], most: int = 6) -> str:
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
