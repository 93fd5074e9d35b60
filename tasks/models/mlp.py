"""A multi-layer perceptron over flattened images."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import jax
from flax import nnx


class MLP(nnx.Module):
    """Dense layers with ReLU between them."""

    def __init__(self, image_shape: Sequence[int], hidden: Sequence[int], classes: int, *, rngs: nnx.Rngs) -> None:
        widths = [math.prod(image_shape), *hidden, classes]
        self.layers = nnx.List([nnx.Linear(a, b, rngs=rngs) for a, b in itertools.pairwise(widths)])

    def __call__(self, images: jax.Array) -> jax.Array:
        x = images.reshape(images.shape[0], -1)
        for layer in self.layers[:-1]:
            x = nnx.relu(layer(x))
        return self.layers[-1](x)
