"""A vision transformer (Dosovitskiy et al., arXiv:2010.11929), numerically timm's and transformers' ViT."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from tasks.base import TaskError
from tasks.models.attention import Block


def vit(
    image_shape: Sequence[int],
    classes: int,
    *,
    patch_size: int = 16,
    depth: int = 12,
    dim: int,
    heads: int,
    epsilon: float = 1e-6,
    rngs: nnx.Rngs,
) -> ViT:
    """A ViT with a class token, learned positions, pre-norm blocks and an MLP four times as wide.

    Args:
      image_shape: [H, W, C].
      classes: the number of logits.
      patch_size: pixels along a patch's side; divides H and W.
      depth: blocks.
      dim: features of a token.
      heads: of attention; divides dim.
      epsilon: of the layer norms; 1e-6 in timm's checkpoints, 1e-12 in those of transformers.
      rngs: random streams.

    Raises:
      TaskError: sizes that do not divide each other.
    """
    height, width, _ = image_shape
    if height % patch_size or width % patch_size:
        raise TaskError(f"patch_size is {patch_size}; it must divide the image's sides, which are {height} and {width}")
    if dim % heads:
        raise TaskError(f"heads is {heads}; it must divide dim, which is {dim}")
    return ViT(image_shape, classes, patch_size, depth, dim, heads, epsilon, rngs=rngs)


class ViT(nnx.Module):
    """Patches, blocks, layer norm, linear head on the class token; [B, H, W, C] -> [B, classes]."""

    def __init__(
        self,
        image_shape: Sequence[int],
        classes: int,
        patch_size: int,
        depth: int,
        dim: int,
        heads: int,
        epsilon: float,
        *,
        rngs: nnx.Rngs,
    ) -> None:
        height, width, channels = image_shape
        tokens = (height // patch_size) * (width // patch_size)
        self.patches = Patches(patch_size, channels, dim, rngs=rngs)
        self.cls_token = nnx.Param(_normal(rngs.params(), (1, 1, dim)))
        self.pos_embed = nnx.Param(_normal(rngs.params(), (1, 1 + tokens, dim)))
        block = functools.partial(Block, dim, heads, epsilon=epsilon, causal=False, exact_gelu=True)
        self.blocks = nnx.List([block(kernel_init=_normal, residual_init=_normal, rngs=rngs) for _ in range(depth)])
        self.norm = nnx.LayerNorm(dim, epsilon=epsilon, rngs=rngs)
        self.head = nnx.Linear(dim, classes, kernel_init=_normal, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        x = self.patches(images)
        cls = jnp.broadcast_to(self.cls_token[...], (len(x), 1, x.shape[-1]))
        x = jnp.concatenate([cls, x], axis=1) + self.pos_embed[...]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[:, 0]))


class Patches(nnx.Module):
    """Image patches as tokens, [B, H, W, C] -> [B, H / size · W / size, dim]."""

    def __init__(self, size: int, channels: int, dim: int, *, rngs: nnx.Rngs) -> None:
        fan_in = size * size * channels
        self.kernel = nnx.Param(_normal(rngs.params(), (size, size, channels, dim), std=fan_in**-0.5))
        self.bias = nnx.Param(jnp.zeros(dim))

    def __call__(self, images: jax.Array) -> jax.Array:
        # A matmul, not a convolution: inside loops and under vmap XLA's CPU convolutions are many times slower.
        kernel = self.kernel[...]
        size, _, channels, dim = kernel.shape
        batch, height, width, _ = images.shape
        x = images.reshape(batch, height // size, size, width // size, size, channels)
        x = x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, -1, size * size * channels)
        return x @ kernel.reshape(-1, dim) + self.bias[...]


def _normal(key: jax.Array, shape: Sequence[int], dtype: Any = jnp.float32, std: float = 0.02) -> jax.Array:
    """A normal distribution truncated at two standard deviations."""
    # Drawn flat: XLA takes several times as long to compile a draw of more dimensions.
    return std * jax.random.truncated_normal(key, -2, 2, (math.prod(shape),), dtype).reshape(shape)
