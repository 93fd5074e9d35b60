"""A convolution that is fast inside compiled loops."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


class SlicedConv(nnx.Module):
    """A convolution with zero padding, as shifted slices and one matrix product.

    XLA runs a convolution on a CPU ten times slower inside a loop than outside, and several times
    slower again when every candidate has its own weights. A matrix product is as fast inside a loop as outside.
    The kernel has the layout of `nnx.Conv`: [H, W, channels, features], here with H = W.
    """

    def __init__(
        self,
        channels: int,
        features: int,
        kernel_size: Sequence[int] = (3, 3),
        strides: int = 1,
        *,
        padding: int = 1,
        use_bias: bool = True,
        kernel_init: Callable[..., Any] | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        draw = kernel_init or nnx.initializers.he_normal()
        self.kernel = nnx.Param(draw(rngs.params(), (*kernel_size, channels, features)))
        self.bias = nnx.Param(jnp.zeros(features)) if use_bias else None
        self.side, self.stride, self.padding = kernel_size[0], strides, padding

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, channels] to [B, rows, columns, features]; ⌈H / stride⌉ rows for 3 × 3 with padding 1."""
        side, stride, before = self.side, self.stride, self.padding
        rows, columns = ((n + 2 * before - side) // stride + 1 for n in x.shape[1:3])
        around = (before, before + stride - 1)
        padded = jnp.pad(x, ((0, 0), around, around, (0, 0)))
        slices = [
            padded[:, i : i + stride * rows : stride, j : j + stride * columns : stride]
            for i in range(side)
            for j in range(side)
        ]
        kernel = self.kernel[...]
        y = jnp.concatenate(slices, axis=-1) @ kernel.reshape(-1, kernel.shape[-1])
        return y if self.bias is None else y + self.bias[...]
