"""Layers that are processed in pieces, so that nothing of the parameters' size is allocated."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from l3rs.torch.directions import BaseDirection, add_directions, make_inputs
from l3rs.torch.passes import (
    LARGE_PIECE,
    PIECE,
    ActiveLayer,
    buckets,
    gram_matrices,
    host,
    norms,
    per_layer,
    products,
)


class Pieces:
    """Layers of one step in buckets of pieces.

    Args:
      layers: at least one.
      directions: the base optimizers.
      keys: names of the moments in a state, in the order of the directions.
    """

    def __init__(self, layers: Sequence[ActiveLayer], directions: Sequence[BaseDirection], keys: Sequence[str]) -> None:
        self._directions = directions
        arrays = [(layer.param, layer.grad, *(layer.state[key] for key in keys)) for layer in layers]
        self._passes = list(buckets(arrays, PIECE.get(layers[0].param.device.type, LARGE_PIECE)))
        self._index = np.array([i for bucket in self._passes for i in bucket.layers])

    def squared_norms(self) -> np.ndarray:
        """Squared norms of gradients and parameters, float32 [L, 2]."""
        return per_layer(np.square(host(norms(self._passes))).reshape(2, -1).T, self._index)

    def gram(self, finite: np.ndarray, steps: np.ndarray) -> np.ndarray:
        """Update the moments; inner products of the directions, float32 [L, P, P].

        Args:
          finite: bool [L], whether each layer's gradient is finite.
          steps: float32 [L], gradients that each layer has seen, including this one.
        """
        self._finite, self._steps = finite, steps
        pairs = []
        for bucket in self._passes:
            inputs = make_inputs(bucket, self._directions, finite, steps)
            both = zip(self._directions, inputs.moments, strict=True)
            pairs += products([direction.advance(moments, inputs) for direction, moments in both])
        sums = per_layer(host(torch.stack(pairs)).reshape(len(self._index), -1), self._index)
        return gram_matrices(sums, len(self._directions))

    def add(self, factors: np.ndarray, decay: np.ndarray, moves: np.ndarray) -> None:
        """Add decay · θ + Σ_p factor_p d_p to the parameters θ of layers that move: float32 [L, P], [L], bool [L]."""
        for bucket in self._passes:
            inputs = make_inputs(bucket, self._directions, self._finite, self._steps)
            add_directions(bucket, self._directions, inputs, factors[bucket.layers], decay[bucket.layers], moves)
