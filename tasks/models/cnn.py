"""A small convolutional network for small images, fast inside compiled loops."""

from __future__ import annotations

from collections.abc import Sequence

import jax
from flax import nnx

from tasks.models.convolution import SlicedConv


class CNN(nnx.Module):
    """Convolutions of stride 2 with ReLU, then a linear head on all pixels; [B, H, W, C] -> [B, classes]."""

    def __init__(self, image_shape: Sequence[int], widths: Sequence[int], classes: int, *, rngs: nnx.Rngs) -> None:
        height, width, channels = image_shape
        convs = []
        for features in widths:
            convs.append(SlicedConv(channels, features, strides=2, rngs=rngs))
            height, width, channels = (height + 1) // 2, (width + 1) // 2, features
        self.convs = nnx.List(convs)
        self.head = nnx.Linear(height * width * channels, classes, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        x = images
        for conv in self.convs:
            x = nnx.relu(conv(x))
        return self.head(x.reshape(x.shape[0], -1))
