"""AdaBound and AMSBound: Adam whose step sizes are clipped to bounds that converge to SGD's."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from l3rs.baselines import common
from l3rs.spec import L3RSError


class AdaBoundState(NamedTuple):
    """State of `adabound`: two numbers a parameter, three for AMSBound, float32 or wider."""

    count: jax.Array  # type: ignore[assignment]  # int32 [], steps taken
    mu: optax.Updates  # m, like the params
    nu: optax.Updates  # v, like the params
    nu_max: optax.Updates | None  # the largest v so far, like the params; None for AdaBound


def adabound(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    final_learning_rate: jax.typing.ArrayLike = 0.1,
    gamma: jax.typing.ArrayLike = 1e-3,
    *,
    eps: jax.typing.ArrayLike = 1e-8,
    amsbound: bool = False,
    base_learning_rate: jax.typing.ArrayLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """From Adam, smoothly, to SGD with momentum::

        m = β1 m + (1-β1) g           v = β2 v + (1-β2) g²
        η = clip(α_t √(1-β2ᵗ)/(1-β1ᵗ) / (√v + ε),  η_l, η_u)
        η_l = α* (1 - 1/(γt + 1))     η_u = α* (1 + 1/(γt))     α* = final_learning_rate · α_t/α_0
        θ ← θ - η m

    AMSBound uses the largest v so far in place of v. In the limit every η is α*, and the step is
    that of SGD with a momentum of weight 1-β1. The factor α_t/α_0, from the authors' code, applies a
    schedule to the final rate, too; it is 1 for a constant learning rate.

    Args:
      learning_rate: α, Adam's: a number, traced or not, or a schedule.
      b1, b2: decays of the moments, in [0, 1).
      final_learning_rate: SGD's, ≥ 0.
      gamma: how fast the bounds close, in (0, 1): halfway after about 1/γ steps.
      eps: ε > 0.
      amsbound: AMSBound instead of AdaBound.
      base_learning_rate: α_0 > 0; by default the first value of the schedule. A schedule that warms
        up from zero needs it: pass its peak.

    Returns:
      A transformation whose update needs only the gradients. Moments are float32 or wider, updates
      have the params' dtypes.

    Raises:
      L3RSError: a number is out of range, or a schedule begins at 0 and there is no `base_learning_rate`.

    Example:
      >>> import jax, optax
      >>> from l3rs.baselines import adabound
      >>> params = {"w": jax.numpy.ones(3)}
      >>> tx = adabound(1e-3, final_learning_rate=0.1)
      >>> state = tx.init(params)
      >>> grads = jax.grad(lambda p: (p["w"] ** 2).sum())(params)
      >>> updates, state = tx.update(grads, state, params)
      >>> params = optax.apply_updates(params, updates)

    Reference: Luo et al., Adaptive Gradient Methods with Dynamic Bound of Learning Rate,
    arXiv 1902.09843. Defaults, bias correction and the position of ε follow its authors' code.
    """
    learning_rate = common.rate(learning_rate)
    if base_learning_rate is not None:
        base_learning_rate = common.positive("base_learning_rate", base_learning_rate)
    elif callable(learning_rate):
        _check_begins_above_zero(learning_rate)
    b1, b2, eps = common.decay("b1", b1), common.decay("b2", b2), common.positive("eps", eps)
    final_learning_rate = common.not_negative("final_learning_rate", final_learning_rate)
    gamma = common.number("gamma", gamma, lambda x: 0 < x < 1, "in (0, 1)")

    def init_fn(params: optax.Params) -> AdaBoundState:
        mu, nu, nu_max = common.zeros(params), common.zeros(params), common.zeros(params) if amsbound else None
        return AdaBoundState(jnp.zeros([], jnp.int32), mu, nu, nu_max)

    def update_fn(
        updates: optax.Updates, state: AdaBoundState, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, AdaBoundState]:
        del extra_args
        step, _, mu, nu = common.moments(updates, state, b1, b2)
        dtype = common.scalar_dtype(mu)
        nu_max = jax.tree.map(jnp.maximum, state.nu_max, nu) if amsbound else None

        rate = common.rate_at(learning_rate, state.count, dtype)
        final = final_learning_rate * _share(rate, learning_rate, base_learning_rate)
        elapsed = gamma * step.astype(dtype)
        lower, upper = final * (1 - 1 / (elapsed + 1)), final * (1 + 1 / elapsed)
        adam = rate * jnp.sqrt(common.bias_correction(b2, step, dtype)) / common.bias_correction(b1, step, dtype)

        def move(m: jax.Array, v: jax.Array) -> jax.Array:
            return -jnp.clip(adam / (jnp.sqrt(v) + eps), lower, upper) * m

        moved = jax.tree.map(move, mu, nu_max if amsbound else nu)
        return common.narrow(moved, updates, params), AdaBoundState(step, mu, nu, nu_max)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _share(
    rate: jax.Array, learning_rate: optax.ScalarOrSchedule, base: common.Number | None
) -> jax.Array | common.Number:
    """α_t/α_0; 1 for a constant rate, even a rate of zero."""
    if base is None and callable(learning_rate):
        base = common.rate_at(learning_rate, jnp.zeros([], jnp.int32), rate.dtype)
    return 1.0 if base is None else rate / base


def _check_begins_above_zero(schedule: optax.Schedule) -> None:
    with jax.ensure_compile_time_eval():  # a schedule without traced numbers can be evaluated under jit, too
        first = schedule(jnp.zeros([], jnp.int32))
    if not isinstance(first, jax.core.Tracer) and not np.asarray(first) > 0:
        raise L3RSError(
            f"the schedule begins at {first}; adabound needs base_learning_rate, such as the schedule's peak"
        )
