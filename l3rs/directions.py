"""Base directions by name: what each base optimizer would step along, without its learning rate.

A direction `d` points uphill: descent is `-d`. Each is an optax transformation of the gradients;
all of them run in float32.

Storing a direction costs a pass over memory, and as much memory as the parameters. So a direction
is handed on as `Lazy`: how to compute a layer's part of it from arrays that exist anyway.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from l3rs.spec import Direction, L3RSError


class Lazy(NamedTuple):
    """One layer's part of a direction: `compute(*operands)`."""

    compute: Callable[..., jax.Array]
    operands: tuple[jax.Array, ...]


class BaseOptimizer(NamedTuple):
    """An optax transformation, and how to read its direction afterwards.

    `read(updates, state, grads)` gives one `Lazy` a layer, from what the transformation returned
    and from the raw gradients.
    """

    transform: optax.GradientTransformation
    read: Callable[[optax.Updates, Any, optax.Updates], Sequence[Lazy]]


def _stored(updates: optax.Updates, state: Any, grads: optax.Updates) -> list[Lazy]:
    del state, grads
    return [Lazy(lambda d: d, (leaf,)) for leaf in jax.tree.leaves(updates)]


def adam(b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, eps_root: float = 0.0) -> BaseOptimizer:
    """Adam's m̂ / (√v̂ + ε), read off the new moments."""

    def read(updates: optax.Updates, state: Any, grads: optax.Updates) -> list[Lazy]:
        del updates, grads

        def compute(mu: jax.Array, nu: jax.Array) -> jax.Array:
            mu_hat = optax.tree.bias_correction(mu, b1, state.count)
            nu_hat = optax.tree.bias_correction(nu, b2, state.count)
            return mu_hat / (jnp.sqrt(nu_hat + eps_root) + eps)

        return [Lazy(compute, m) for m in zip(jax.tree.leaves(state.mu), jax.tree.leaves(state.nu), strict=True)]

    return BaseOptimizer(optax.scale_by_adam(b1, b2, eps, eps_root), read)


def sgd() -> BaseOptimizer:
    """The raw gradient."""
    return BaseOptimizer(optax.identity(), lambda updates, state, grads: _stored(grads, state, updates))


def momentum(decay: float = 0.9, nesterov: bool = False) -> BaseOptimizer:
    """The heavy-ball trace of the gradients."""
    return BaseOptimizer(optax.trace(decay, nesterov), _stored)


def lion(b1: float = 0.9, b2: float = 0.99) -> BaseOptimizer:
    """The sign of Lion's interpolated momentum."""
    return BaseOptimizer(optax.scale_by_lion(b1, b2), _stored)


def rmsprop(decay: float = 0.9, eps: float = 1e-8) -> BaseOptimizer:
    """The gradient over the root of its running mean square."""
    return BaseOptimizer(optax.scale_by_rms(decay, eps), _stored)


def weight_decay() -> BaseOptimizer:
    """The parameters themselves: a step along it shrinks the layer."""
    return BaseOptimizer(optax.chain(optax.set_to_zero(), optax.add_decayed_weights(1.0)), _stored)


DIRECTIONS: dict[str, Callable[..., BaseOptimizer]] = {
    factory.__name__: factory for factory in (adam, sgd, momentum, lion, rmsprop, weight_decay)
}


def make_direction(direction: Direction) -> BaseOptimizer:
    """The base optimizer of a direction.

    Raises:
      L3RSError: no such direction, or it has no such option.
    """
    factory = DIRECTIONS.get(direction.name)
    if factory is None:
        raise L3RSError(f"unknown direction {direction.name!r}; allowed are {', '.join(DIRECTIONS)}")
    allowed = list(inspect.signature(factory).parameters)
    for option, value in direction.options:
        if type(value) not in (int, float, bool):
            raise L3RSError(f"direction {direction.name!r}: {option} is {value!r}; it must be a number")
        if option not in allowed:
            raise L3RSError(
                f"direction {direction.name!r} has no option {option!r}; allowed are {', '.join(allowed) or 'none'}"
            )
    return factory(**dict(direction.options))
