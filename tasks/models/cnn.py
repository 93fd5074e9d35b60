"""A small convolutional network for small images, fast inside compiled loops."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx


class Conv(nnx.Module):
    """A 3 × 3 convolution of stride 2 with zero padding, as nine shifted slices and one matrix product.

    XLA runs a convolution on a CPU ten times slower inside a loop than outside, and several times
    slower again when every candidate has its own weights. A matrix product is as fast inside a loop as outside.
    """

    def __init__(self, channels: int, features: int, *, rngs: nnx.Rngs) -> None:
        init = nnx.initializers.he_normal()
        self.kernel = nnx.Param(init(rngs.params(), (3, 3, channels, features)))
        self.bias = nnx.Param(jnp.zeros(features))

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, C] to [B, ⌈H/2⌉, ⌈W/2⌉, features]."""
        rows, columns = ((side + 1) // 2 for side in x.shape[1:3])
        padded = jnp.pad(x, ((0, 0), (1, 2), (1, 2), (0, 0)))
        slices = [padded[:, i : i + 2 * rows : 2, j : j + 2 * columns : 2] for i in range(3) for j in range(3)]
        kernel = self.kernel[...].reshape(-1, self.bias.shape[0])
        return jnp.concatenate(slices, axis=-1) @ kernel + self.bias[...]


class CNN(nnx.Module):
    """Convolutions of stride 2 with ReLU, then a linear head on all pixels; [B, H, W, C] -> [B, classes]."""

    def __init__(self, image_shape: Sequence[int], widths: Sequence[int], classes: int, *, rngs: nnx.Rngs) -> None:
        height, width, channels = image_shape
        convs = []
        for features in widths:
            convs.append(Conv(channels, features, rngs=rngs))
            height, width, channels = (height + 1) // 2, (width + 1) // 2, features
        self.convs = nnx.List(convs)
        self.head = nnx.Linear(height * width * channels, classes, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        x = images
        for conv in self.convs:
            x = nnx.relu(conv(x))
        return self.head(x.reshape(x.shape[0], -1))
