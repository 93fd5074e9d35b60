"""The base directions as optax transformations of the gradients.

Storing a direction costs a pass over memory, and as much memory as the parameters. So a direction is passed on as
`Lazy`: a function that computes a layer's part of it from arrays that exist anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from l3rs.directions import resolved_options
from l3rs.spec import Direction


class Lazy(NamedTuple):
    """One layer's part of a direction: `compute(*operands)`."""

    compute: Callable[..., jax.Array]
    operands: tuple[jax.Array, ...]


class BaseOptimizer(NamedTuple):
    """An optax transformation, and how to read its direction afterwards.

    `read(updates, state, grads)` returns one `Lazy` per layer, from what the transformation returned
    and from the raw gradients. With `reads_adam`, the state is that of the first Adam among the directions.
    """

    transform: optax.GradientTransformation
    read: Callable[[optax.Updates, Any, optax.Updates], Sequence[Lazy]]
    reads_adam: bool = False


@jax.custom_jvp
def _root(x: jax.Array) -> jax.Array:
    """√x, with a derivative of 0 at 0, for gradients through an update."""
    return jnp.sqrt(x)


@_root.defjvp
def _root_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    root = jnp.sqrt(primals[0])
    return root, jnp.where(root > 0, tangents[0] / jnp.where(root > 0, 2 * root, 1.0), 0.0)


def _stored(updates: optax.Updates, state: Any, grads: optax.Updates) -> list[Lazy]:
    del state, grads
    return [Lazy(lambda d: d, (leaf,)) for leaf in jax.tree.leaves(updates)]


def _adam(b1: float, b2: float, eps: float, eps_root: float) -> BaseOptimizer:
    def read(updates: optax.Updates, state: Any, grads: optax.Updates) -> list[Lazy]:
        del updates, grads

        def compute(mu: jax.Array, nu: jax.Array) -> jax.Array:
            mu_hat = optax.tree.bias_correction(mu, b1, state.count)
            nu_hat = optax.tree.bias_correction(nu, b2, state.count)
            return mu_hat / (_root(nu_hat + eps_root) + eps)

        return [Lazy(compute, m) for m in zip(jax.tree.leaves(state.mu), jax.tree.leaves(state.nu), strict=True)]

    return BaseOptimizer(optax.scale_by_adam(b1, b2, eps, eps_root), read)


def _first_moment(b1: float) -> BaseOptimizer:
    def read(updates: optax.Updates, state: Any, grads: optax.Updates) -> list[Lazy]:
        del updates, grads
        return [
            Lazy(lambda mu: optax.tree.bias_correction(mu, b1, state.count), (mu,)) for mu in jax.tree.leaves(state.mu)
        ]

    return BaseOptimizer(optax.identity(), read, reads_adam=True)


def _sgd() -> BaseOptimizer:
    return BaseOptimizer(optax.identity(), lambda updates, state, grads: _stored(grads, state, updates))


def _momentum(decay: float, nesterov: bool) -> BaseOptimizer:
    return BaseOptimizer(optax.trace(decay, nesterov), _stored)


def _lion(b1: float, b2: float) -> BaseOptimizer:
    return BaseOptimizer(optax.scale_by_lion(b1, b2), _stored)


def _rmsprop(decay: float, eps: float) -> BaseOptimizer:
    return BaseOptimizer(optax.scale_by_rms(decay, eps), _stored)


def _weight_decay() -> BaseOptimizer:
    return BaseOptimizer(optax.chain(optax.set_to_zero(), optax.add_decayed_weights(1.0)), _stored)


TRANSFORMS: dict[str, Callable[..., BaseOptimizer]] = {
    "adam": _adam,
    "first_moment": _first_moment,
    "sgd": _sgd,
    "momentum": _momentum,
    "lion": _lion,
    "rmsprop": _rmsprop,
    "weight_decay": _weight_decay,
}


def make_directions(directions: Sequence[Direction]) -> list[BaseOptimizer]:
    """The base optimizers of a spec's directions.

    Raises:
      L3RSError: there is no such direction, or it has no such option.
    """
    return [TRANSFORMS[name](**options) for name, options in resolved_options(directions)]
