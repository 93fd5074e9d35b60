"""Layers that are processed in pieces, so that nothing of the parameters' size is allocated."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from l3rs.torch.directions import BaseDirection, add_directions, make_inputs, scales_of
from l3rs.torch.passes import (
    LARGE_PIECE,
    PIECE,
    buckets,
    first_of_each,
    gram_matrices,
    host,
    norms,
    per_layer,
    products,
)


class Pieces:
    """Layers of one step in buckets of pieces.

    Args:
      layers: at least one: a parameter, its gradient, and its moments in the order of the directions.
      directions: the base optimizers.
    """

    def __init__(self, layers: Sequence[tuple[Tensor, ...]], directions: Sequence[BaseDirection]) -> None:
        self._directions = directions
        self._passes = list(buckets(layers, PIECE.get(layers[0][0].device.type, LARGE_PIECE)))
        self._starts = first_of_each(np.array([i for bucket in self._passes for i in bucket.layers]))

    def squared_norms(self) -> np.ndarray:
        """Squared norms of gradients and parameters, float32 [L, 2]."""
        return per_layer(np.square(host(norms(self._passes))).reshape(2, -1).T, self._starts)

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
        n = len(self._directions)
        sums = per_layer(host(torch.stack(pairs)).reshape(-1, n * (n + 1) // 2), self._starts)
        return gram_matrices(sums, n, scales_of(self._directions, steps))

    def add(self, factors: np.ndarray, decay: np.ndarray, moves: np.ndarray) -> None:
        """Add decay · θ + Σ_p factor_p d_p to the parameters θ of layers that move: float32 [L, P], [L], bool [L]."""
        for bucket in self._passes:
            inputs = make_inputs(bucket, self._directions, self._finite, self._steps)
            add_directions(bucket, self._directions, inputs, factors[bucket.layers], decay[bucket.layers], moves)
