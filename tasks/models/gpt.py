"""A small GPT (Radford et al., 2019) on characters; it uses only matrix products, which compiled loops run fast."""

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
from tasks.models.functional import Model, functional


def gpt(vocabulary: int, context: int, *, n_layer: int = 2, n_head: int = 4, width: int = 64) -> Model:
    """Token and position embeddings, pre-norm blocks, layer norm, linear head.

    Args:
      vocabulary: the number of tokens.
      context: the longest input.
      n_layer: blocks.
      n_head: heads of attention; divides width.
      width: features of a token.

    Returns:
      A model whose `apply` takes tokens, integers [B, N] with N ≤ context, and gives logits
      [B, N, vocabulary]; the logits at position i depend only on the tokens up to i.

    Raises:
      TaskError: a size that is not a positive integer, or n_head does not divide width.
    """
    sizes = {"vocabulary": vocabulary, "context": context, "n_layer": n_layer, "n_head": n_head, "width": width}
    for name, value in sizes.items():
        if type(value) is not int or value < 1:
            raise TaskError(f"{name} is {value!r}; it must be an integer ≥ 1")
    if width % n_head:
        raise TaskError(f"n_head is {n_head}; it must divide width, which is {width}")
    return functional(lambda rngs: GPT(vocabulary, context, n_layer, n_head, width, rngs=rngs))


class GPT(nnx.Module):
    """[B, N] -> [B, N, vocabulary]."""

    def __init__(self, vocabulary: int, context: int, n_layer: int, n_head: int, width: int, *, rngs: nnx.Rngs) -> None:
        self.tokens = nnx.Param(_normal(rngs.params(), (vocabulary, width)))
        self.positions = nnx.Param(_normal(rngs.params(), (context, width)))
        # As in GPT-2: with more blocks adding to the residual stream, each adds less.
        residual = functools.partial(_normal, std=0.02 / math.sqrt(2 * n_layer))
        block = functools.partial(Block, width, n_head, causal=True, exact_gelu=False)
        self.blocks = nnx.List([block(kernel_init=_normal, residual_init=residual, rngs=rngs) for _ in range(n_layer)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, vocabulary, use_bias=False, kernel_init=_normal, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        table = self.tokens[...]
        # A product with a one-hot matrix: the gradient of a look-up is a scatter, which is slow on a CPU.
        x = jax.nn.one_hot(tokens, len(table), dtype=table.dtype) @ table + self.positions[...][: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def _normal(key: jax.Array, shape: Sequence[int], dtype: Any = jnp.float32, std: float = 0.02) -> jax.Array:
    # Drawn flat: XLA takes several times as long to compile a draw of more dimensions.
    return std * jax.random.normal(key, (math.prod(shape),), dtype).reshape(shape)
