"""Padam: partially adaptive, between SGD with momentum and AMSGrad."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from l3rs.baselines import common


class PadamState(NamedTuple):
    """State of `padam`: three numbers a parameter, float32 or wider."""

    count: jax.Array  # type: ignore[assignment]  # int32 [], steps taken
    mu: optax.Updates  # m, like the params
    nu: optax.Updates  # v, like the params
    nu_max: optax.Updates  # v̂, like the params: the largest v so far


def padam(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    p: jax.typing.ArrayLike = 0.125,
    *,
    eps: jax.typing.ArrayLike = 1e-8,
) -> optax.GradientTransformationExtraArgs:
    """Partially adaptive momentum estimation::

        m = β1 m + (1-β1) g           v = β2 v + (1-β2) g²
        v̂ = max(v̂, v)
        θ ← θ - α · m / (√v̂ + ε)^2p

    p = ½ is AMSGrad, p = 0 is SGD with a momentum of weight 1-β1. The smaller p is, the larger α may
    be: the paper uses 0.1, as for SGD. This is the paper's algorithm, which has no bias correction;
    to add the one in its authors' code, pass the schedule α √(1-β2ᵗ) / (1-β1ᵗ) as the learning rate.
    ε, which the paper does not mention, avoids 0/0 for parameters that never had a gradient.

    Args:
      learning_rate: a number, traced or not, or a schedule.
      b1, b2: decays of the moments, in [0, 1).
      p: how adaptive the step is, in [0, ½].
      eps: ε > 0.

    Returns:
      A transformation whose update needs only the gradients. Moments are float32 or wider, updates
      have the params' dtypes.

    Raises:
      L3RSError: a number is out of range.

    Example:
      >>> import jax, optax
      >>> from l3rs.baselines import padam
      >>> params = {"w": jax.numpy.ones(3)}
      >>> tx = padam(0.1)
      >>> state = tx.init(params)
      >>> grads = jax.grad(lambda p: (p["w"] ** 2).sum())(params)
      >>> updates, state = tx.update(grads, state, params)
      >>> params = optax.apply_updates(params, updates)

    Reference: Chen et al., Closing the Generalization Gap of Adaptive Gradient Methods in Training
    Deep Neural Networks, arXiv 1806.06763. The authors' runs use p = 1/8; the
    default of their code is 1/4.
    """
    learning_rate = common.rate(learning_rate)
    b1, b2, eps = common.decay("b1", b1), common.decay("b2", b2), common.positive("eps", eps)
    p = common.number("p", p, lambda x: 0 <= x <= 0.5, "in [0, 0.5]")

    def init_fn(params: optax.Params) -> PadamState:
        return PadamState(jnp.zeros([], jnp.int32), *(common.zeros(params) for _ in range(3)))

    def update_fn(
        updates: optax.Updates, state: PadamState, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, PadamState]:
        del extra_args
        step, _, mu, nu = common.moments(updates, state, b1, b2)
        nu_max = jax.tree.map(jnp.maximum, state.nu_max, nu)

        rate = common.rate_at(learning_rate, state.count, common.scalar_dtype(mu))
        moved = jax.tree.map(lambda m, v: -rate * m / (jnp.sqrt(v) + eps) ** (2 * p), mu, nu_max)
        return common.narrow(moved, updates, params), PadamState(step, mu, nu, nu_max)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
