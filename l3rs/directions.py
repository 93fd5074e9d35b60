"""Base directions by name: what each base optimizer would step along, without its learning rate.

A direction `d` points uphill: descent is `-d`. Each is an optax transformation that turns gradients into
it; all of them run in float32.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import optax

from l3rs.spec import Direction, L3RSError


def adam(b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, eps_root: float = 0.0) -> optax.GradientTransformation:
    """Adam's m̂ / (√v̂ + ε)."""
    return optax.scale_by_adam(b1, b2, eps, eps_root)


def sgd() -> optax.GradientTransformation:
    """The gradient."""
    return optax.identity()


def momentum(decay: float = 0.9, nesterov: bool = False) -> optax.GradientTransformation:
    """The heavy-ball trace of the gradients."""
    return optax.trace(decay, nesterov)


def lion(b1: float = 0.9, b2: float = 0.99) -> optax.GradientTransformation:
    """The sign of Lion's interpolated momentum."""
    return optax.scale_by_lion(b1, b2)


def rmsprop(decay: float = 0.9, eps: float = 1e-8) -> optax.GradientTransformation:
    """The gradient over the root of its running mean square."""
    return optax.scale_by_rms(decay, eps)


def weight_decay() -> optax.GradientTransformation:
    """The parameters themselves: a step along it shrinks the layer."""
    return optax.stateless(lambda _, params: params)


DIRECTIONS: dict[str, Callable[..., optax.GradientTransformation]] = {
    factory.__name__: factory for factory in (adam, sgd, momentum, lion, rmsprop, weight_decay)
}


def make_direction(direction: Direction) -> optax.GradientTransformation:
    """The transformation of a direction.

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
