"""One step of MADA as a pure function of its coefficients, which `mada` differentiates."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from l3rs.baselines import common

_LION = (0.95, 0.98)  # decays: of the interpolation in the sign, and of the momentum


class Coefficients(NamedTuple):
    """q, and the learning rate: scalars, float32 or wider."""

    b1: jax.Array  # β1, decay of the first moment
    b2: jax.Array  # β2, decay of the second moment
    b3: jax.Array  # β3, decay and weight of Adan's gradient differences
    c: jax.Array  # 1 Adam's second moment, 0 Yogi's
    rho: jax.Array  # ρ, 1 the second moment itself, 0 AVGrad's mean of it
    gamma: jax.Array  # γ, 1 the adaptive step, 0 Lion's
    learning_rate: jax.Array  # α


class Moments(NamedTuple):
    """Each like the params, or like one tensor of them. None if the frozen coefficients do not use it."""

    first: Any  # m
    second: Any  # v
    difference: Any | None  # n
    grad: Any | None  # g of the step before
    mean: Any | None  # v̄
    lion: Any | None  # Lion's momentum


def mada_step(
    q: Coefficients,
    step: jax.Array,
    grads: optax.Updates,
    moments: Moments,
    params: optax.Params | None,
    eps: common.Number,
    weight_decay: common.Number,
) -> tuple[optax.Updates, Moments]:
    """One step of MADA with the coefficients q.

    Args:
      q: the coefficients.
      step: int32 [], ≥ 1.
      grads: in the dtypes of the moments.
      moments: before the step.
      params: for weight decay; None if there is none.
      eps, weight_decay: see `mada`.

    Returns:
      (updates, moments after the step).
    """

    def one(g: jax.Array, old: Moments, param: jax.Array | None) -> tuple[jax.Array, Moments]:
        new, direction = _direction(q, step, eps, g, old)
        if param is not None:
            direction = direction + weight_decay * param.astype(g.dtype)
        return -q.learning_rate.astype(g.dtype) * direction, new

    leaves, form = jax.tree.flatten(grads)

    def column(tree: Any) -> list[Any]:
        return [None] * len(leaves) if tree is None else jax.tree.leaves(tree)

    olds = [Moments(*row) for row in zip(*map(column, moments), strict=True)]
    pairs = [one(*row) for row in zip(leaves, olds, column(params), strict=True)]
    after = [
        None if tree is None else jax.tree.unflatten(form, [new[i] for _, new in pairs])
        for i, tree in enumerate(moments)
    ]
    return jax.tree.unflatten(form, [moved for moved, _ in pairs]), Moments(*after)


def _direction(
    coefficients: Coefficients, step: jax.Array, eps: common.Number, g: jax.Array, old: Moments
) -> tuple[Moments, jax.Array]:
    """(moments after, γ (m̂ + β3 n)/(√w + ε) + (1-γ) sign u) of one tensor."""
    q = Coefficients(*(x.astype(g.dtype) for x in coefficients))
    t = step.astype(g.dtype)
    first = q.b1 * old.first + (1 - q.b1) * g
    numerator, ahead, difference = first / -jnp.expm1(t * jnp.log(q.b1)), g, None
    if old.difference is not None and old.grad is not None:
        change = jnp.where(step > 1, g - old.grad, 0.0)  # there is no gradient before the first
        difference = q.b3 * old.difference + (1 - q.b3) * change
        numerator, ahead = numerator + q.b3 * difference, g + q.b3 * change

    yogi = old.second + ahead**2 * jnp.sign(ahead**2 - old.second)
    second = q.b2 * old.second + (1 - q.b2) * (q.c * ahead**2 + (1 - q.c) * yogi)
    mean = None if old.mean is None else (second + (t - 1) * old.mean) / t
    mixed = second if mean is None else q.rho * second + (1 - q.rho) * mean
    direction = numerator / (_root(mixed / -jnp.expm1(t * jnp.log(q.b2))) + eps)

    lion = None
    if old.lion is not None:
        sign = jnp.sign(_LION[0] * old.lion + (1 - _LION[0]) * g)
        lion = _LION[1] * old.lion + (1 - _LION[1]) * g
        direction = q.gamma * direction + (1 - q.gamma) * sign
    return Moments(first, second, difference, None if difference is None else g, mean, lion), direction


def _root(x: jax.Array) -> jax.Array:
    """√x with derivative 0 at 0, so that a parameter without a gradient does not make the derivative by q NaN."""
    return jnp.where(x > 0, jnp.sqrt(jnp.where(x > 0, x, 1.0)), 0.0)
