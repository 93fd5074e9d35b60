"""Flax NNX modules as pure functions over nested dictionaries."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
from flax import nnx

from tasks.base import Params, Stats


class Model(NamedTuple):
    """A network as two pure functions."""

    init: Callable[[jax.Array], tuple[Params, Stats]]  # key -> (params, stats)
    apply: Callable[[Params, Stats, jax.Array, bool], tuple[jax.Array, Stats]]  # images -> (logits, stats)


def functional(make: Callable[[nnx.Rngs], nnx.Module]) -> Model:
    """The functional form of a module: parameters and statistics are nested dictionaries.

    Args:
      make: builds the module from random streams.
    """
    graph = nnx.graphdef(nnx.eval_shape(lambda: make(nnx.Rngs(0))))

    def init(key: jax.Array) -> tuple[Params, Stats]:
        module = make(nnx.Rngs(key))
        return nnx.to_pure_dict(nnx.state(module, nnx.Param)), _stats(module)

    def apply(params: Params, stats: Stats, images: jax.Array, train: bool) -> tuple[jax.Array, Stats]:
        module = nnx.merge(graph, params, stats)
        module.set_attributes(deterministic=not train, use_running_average=not train, raise_if_not_found=False)
        logits = module(images)
        return logits, _stats(module)

    return Model(init, apply)


def _stats(module: nnx.Module) -> Stats:
    return nnx.to_pure_dict(nnx.state(module, nnx.Not(nnx.Param)))
