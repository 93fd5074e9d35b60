"""A multi-layer perceptron over flattened images."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Literal

import jax
from flax import nnx


class MLP(nnx.Module):
    """Dense layers with ReLU between them, and with norm "layer" a layer norm before each ReLU."""

    def __init__(
        self,
        image_shape: Sequence[int],
        hidden: Sequence[int],
        classes: int,
        *,
        norm: Literal["none", "layer"] = "none",
        rngs: nnx.Rngs,
    ) -> None:
        widths = [math.prod(image_shape), *hidden, classes]
        self.layers = nnx.List([nnx.Linear(a, b, rngs=rngs) for a, b in itertools.pairwise(widths)])
        self.norms = nnx.List([nnx.LayerNorm(width, rngs=rngs) for width in hidden]) if norm == "layer" else None

    def __call__(self, images: jax.Array) -> jax.Array:
        x = images.reshape(images.shape[0], -1)
        for i, layer in enumerate(self.layers[:-1]):
            x = layer(x)
            x = nnx.relu(x if self.norms is None else self.norms[i](x))
        return self.layers[-1](x)
