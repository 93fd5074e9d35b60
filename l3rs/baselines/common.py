"""What the baselines share: checks of arguments, learning rates, dtypes, moving averages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from l3rs.spec import L3RSError

Number = Any  # a Python float, or a traced scalar


def number(name: str, value: Any, allowed: Callable[[float], bool], condition: str) -> Number:
    """An argument that must be one number: a Python float, or unchanged if it is traced.

    A Python float does not change the dtype of the arrays that it is combined with. For a traced
    value only the shape can be checked.

    Args:
      name: of the argument, for the message.
      value: the argument.
      allowed: whether the number is in range.
      condition: the range, for the message: "> 0".

    Raises:
      L3RSError: the value is not one number, or it is out of range.
    """
    if isinstance(value, jax.core.Tracer):
        if value.shape == ():
            return value
    else:
        array = np.asarray(value)
        real = jnp.issubdtype(array.dtype, jnp.floating) or jnp.issubdtype(array.dtype, jnp.integer)
        if array.shape == () and real and allowed(float(array)):
            return float(array)
    raise L3RSError(f"{name} is {value}; it must be one number {condition}")


def decay(name: str, value: Any) -> Number:
    return number(name, value, lambda x: 0 <= x < 1, "in [0, 1)")


def positive(name: str, value: Any) -> Number:
    return number(name, value, lambda x: 0 < x < float("inf"), "> 0")


def not_negative(name: str, value: Any) -> Number:
    return number(name, value, lambda x: 0 <= x < float("inf"), "≥ 0")


def rate(value: optax.ScalarOrSchedule) -> optax.ScalarOrSchedule:
    """A learning rate: a number ≥ 0, or a schedule, which is returned unchanged."""
    return value if callable(value) else not_negative("learning_rate", value)


def rate_at(learning_rate: optax.ScalarOrSchedule, count: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """The learning rate after `count` steps."""
    return jnp.asarray(learning_rate(count) if callable(learning_rate) else learning_rate, dtype)


def scalar_dtype(tree: Any) -> jnp.dtype:
    """The dtype of scalars that belong to a whole tree: float32, or float64 if the tree has float64."""
    return jnp.result_type(jnp.float32, *jax.tree.leaves(tree))


def zeros(params: optax.Params) -> Any:
    """Zeros for moments: like the params, but float32 or wider."""
    return jax.tree.map(lambda p: jnp.zeros(jnp.shape(p), jnp.result_type(p, jnp.float32)), params)


def widen(grads: optax.Updates, moments: Any) -> Any:
    """The gradients in the dtypes of the moments."""
    return jax.tree.map(lambda g, m: g.astype(m.dtype), grads, moments)


def narrow(updates: Any, grads: optax.Updates, params: optax.Params | None) -> Any:
    """The updates in the dtypes of the params, or of the gradients if there are no params."""
    like = grads if params is None else params
    return jax.tree.map(lambda u, p: u.astype(jnp.result_type(p)), updates, like)


def average(values: Any, averages: Any, beta: Number) -> Any:
    """β · average + (1-β) · value, in the averages' dtypes."""

    def one(value: jax.Array, old: jax.Array) -> jax.Array:
        return old + jnp.asarray(1 - beta, old.dtype) * (value - old)

    return jax.tree.map(one, values, averages)


def moments(updates: optax.Updates, state: Any, b1: Number, b2: Number) -> tuple[jax.Array, Any, Any, Any]:
    """The step, counted from 1, its gradients in the moments' dtypes, and Adam's moments after them.

    Args:
      updates: gradients.
      state: has `count`, `mu` and `nu`.
      b1, b2: decays.

    Returns:
      step, grads, mu, nu.
    """
    grads = widen(updates, state.mu)
    squares = jax.tree.map(jnp.square, grads)
    return optax.safe_increment(state.count), grads, average(grads, state.mu, b1), average(squares, state.nu, b2)


def bias_correction(beta: Number, step: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """1 - β^step, step ≥ 1: the sum of the weights in an average that began at zero.

    It is computed from 1-β, as in `average`. Computed from a β rounded to float32, such as 0.999, it
    would have an error of 1e-5 in the first steps, and another one from cancellation.
    """
    return -jnp.expm1(step.astype(dtype) * jnp.log1p(-jnp.asarray(1 - beta, dtype)))
