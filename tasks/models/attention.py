"""The pre-norm transformer block that the ViT and the GPT share."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx


class Block(nnx.Module):
    """Self-attention and an MLP four times as wide, each added to its input; [B, N, dim] -> the same shape.

    Args:
      dim: features of a token.
      heads: attention heads; divides dim.
      epsilon: of the layer norms.
      causal: whether a token attends only to itself and the tokens before it.
      exact_gelu: whether the activation is the exact GELU or its tanh approximation.
      kernel_init: draws the kernels that read the residual stream.
      residual_init: draws the kernels that write to it.
      rngs: random streams.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        epsilon: float = 1e-6,
        causal: bool,
        exact_gelu: bool,
        kernel_init: nnx.Initializer,
        residual_init: nnx.Initializer,
        rngs: nnx.Rngs,
    ) -> None:
        self.norm1 = nnx.LayerNorm(dim, epsilon=epsilon, rngs=rngs)
        self.qkv = nnx.Linear(dim, 3 * dim, kernel_init=kernel_init, rngs=rngs)
        self.proj = nnx.Linear(dim, dim, kernel_init=residual_init, rngs=rngs)
        self.norm2 = nnx.LayerNorm(dim, epsilon=epsilon, rngs=rngs)
        self.fc1 = nnx.Linear(dim, 4 * dim, kernel_init=kernel_init, rngs=rngs)
        self.fc2 = nnx.Linear(4 * dim, dim, kernel_init=residual_init, rngs=rngs)
        self.heads = heads
        self.causal = causal
        self.exact_gelu = exact_gelu

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self._attention(self.norm1(x))
        return x + self.fc2(nnx.gelu(self.fc1(self.norm2(x)), approximate=not self.exact_gelu))

    def _attention(self, x: jax.Array) -> jax.Array:
        batch, tokens, dim = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, dim // self.heads)
        q, k, v = jnp.moveaxis(qkv, 2, 0)
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
        if self.causal:
            scores = jnp.where(jnp.tri(tokens, dtype=bool), scores, -jnp.inf)
        x = jnp.einsum("bhqk,bkhd->bqhd", nnx.softmax(scores), v)
        return self.proj(x.reshape(batch, tokens, dim))
