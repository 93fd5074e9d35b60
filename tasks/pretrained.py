"""Init distributions: networks that were trained on another data set before."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tasks.base import Aux, Batch, Data, Params, Stats, uniform_batches
from tasks.data.cache import cached
from tasks.models.functional import Model

Loss = Callable[[Params, Stats, Batch, bool], tuple[jax.Array, Aux]]


def pretrain(
    model: Model, loss: Loss, data: Data, seeds: Sequence[int], steps: Sequence[int], batch_size: int
) -> tuple[Params, Stats]:
    """Train one network per seed with Adam (learning rate 1e-3) on inner_train of `data`.

    Args:
      model, loss: the network, and its loss.
      data: the source data; only its inner_train is read.
      seeds: one network each [N]; decides initialization and batches.
      steps: how long each of them trains [N].
      batch_size: examples a step.

    Returns:
      (params, stats), every array with a leading axis [N].
    """
    batch = uniform_batches(batch_size)
    tx = optax.adam(1e-3)

    def train(source: Data, seed: jax.Array, n_steps: jax.Array) -> tuple[Params, Stats]:
        init_key, batch_key = jax.random.split(jax.random.key(seed))
        params, stats = model.init(init_key)

        def step(i: jax.Array, carry: tuple[Params, Stats, Any]) -> tuple[Params, Stats, Any]:
            params, stats, state = carry
            examples = batch(source, jax.random.fold_in(batch_key, i))
            grads, aux = jax.grad(loss, has_aux=True)(params, stats, examples, True)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), aux.stats, state

        params, stats, _ = jax.lax.fori_loop(0, n_steps, step, (params, stats, tx.init(params)))
        return params, stats

    source = {"inner_train": data["inner_train"]}
    return jax.jit(jax.vmap(train, (None, 0, 0)))(source, jnp.asarray(seeds), jnp.asarray(steps))


def cached_inits(
    key: Mapping[str, Any], shape: tuple[Params, Stats], build: Callable[[], tuple[Params, Stats]]
) -> tuple[Params, Stats]:
    """Stacked inits through the resident cache; `shape` gives the pytree's structure."""
    treedef = jax.tree.structure(shape)

    def arrays() -> dict[str, np.ndarray]:
        return {f"{i:04d}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(build()))}

    return treedef.unflatten(list(cached({"inits": dict(key)}, arrays).values()))
