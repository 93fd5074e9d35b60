"""A small GPT (Radford et al., 2019) on characters: matrix products alone, so that it runs fast in compiled loops."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from tasks.base import TaskError
from tasks.models.functional import Model, functional


def gpt(vocabulary: int, context: int, *, n_layer: int = 2, n_head: int = 4, width: int = 64) -> Model:
    """Token and position embeddings, pre-norm blocks, layer norm, linear head.

    Args:
      vocabulary: the number of tokens.
      context: the longest text that it reads.
      n_layer: blocks.
      n_head: heads of attention; divides width.
      width: features of a token.

    Returns:
      A model whose `apply` takes tokens, integers [B, N] with N ≤ context, and gives logits
      [B, N, vocabulary]; those at place i depend on the tokens up to i alone.

    Raises:
      TaskError: numbers that are not whole and positive, or do not divide each other.
    """
    sizes = {"vocabulary": vocabulary, "context": context, "n_layer": n_layer, "n_head": n_head, "width": width}
    for name, value in sizes.items():
        if type(value) is not int or value < 1:
            raise TaskError(f"{name} is {value!r}; it must be a whole number ≥ 1")
    if width % n_head:
        raise TaskError(f"n_head is {n_head}; it must divide width, which is {width}")
    return functional(lambda rngs: GPT(vocabulary, context, n_layer, n_head, width, rngs=rngs))


class GPT(nnx.Module):
    """[B, N] -> [B, N, vocabulary]."""

    def __init__(self, vocabulary: int, context: int, n_layer: int, n_head: int, width: int, *, rngs: nnx.Rngs) -> None:
        self.tokens = nnx.Param(_normal(rngs.params(), (vocabulary, width)))
        self.positions = nnx.Param(_normal(rngs.params(), (context, width)))
        self.blocks = nnx.List([Block(width, n_head, n_layer, rngs=rngs) for _ in range(n_layer)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, vocabulary, use_bias=False, kernel_init=_normal, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        table = self.tokens[...]
        # A product with a one-hot matrix: the gradient of a look-up is a scatter, which is slow on a CPU.
        x = jax.nn.one_hot(tokens, len(table), dtype=table.dtype) @ table + self.positions[...][: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Block(nnx.Module):
    """Pre-norm causal self-attention and MLP, each added to its input; [B, N, width] -> the same shape."""

    def __init__(self, width: int, n_head: int, n_layer: int, *, rngs: nnx.Rngs) -> None:
        def linear(inputs: int, outputs: int, std: float = 0.02) -> nnx.Linear:
            return nnx.Linear(inputs, outputs, kernel_init=functools.partial(_normal, std=std), rngs=rngs)

        into_the_sum = 0.02 / math.sqrt(2 * n_layer)  # as in GPT-2: so many blocks add to the residual stream
        self.norm1 = nnx.LayerNorm(width, rngs=rngs)
        self.qkv = linear(width, 3 * width)
        self.proj = linear(width, width, into_the_sum)
        self.norm2 = nnx.LayerNorm(width, rngs=rngs)
        self.fc1 = linear(width, 4 * width)
        self.fc2 = linear(4 * width, width, into_the_sum)
        self.heads = n_head

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self._attention(self.norm1(x))
        return x + self.fc2(nnx.gelu(self.fc1(self.norm2(x))))

    def _attention(self, x: jax.Array) -> jax.Array:
        batch, length, width = x.shape
        qkv = self.qkv(x).reshape(batch, length, 3, self.heads, width // self.heads)
        q, k, v = jnp.moveaxis(qkv, 2, 0)
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
        past = jnp.tri(length, dtype=bool)
        weights = nnx.softmax(jnp.where(past, scores, -jnp.inf))
        return self.proj(jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(batch, length, width))


def _normal(key: jax.Array, shape: Sequence[int], dtype: Any = jnp.float32, std: float = 0.02) -> jax.Array:
    # Drawn flat: XLA takes several times as long to compile a draw of more dimensions.
    return std * jax.random.normal(key, (math.prod(shape),), dtype).reshape(shape)
