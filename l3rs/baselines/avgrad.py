"""AVGrad: Adam that divides by the root of its second moment, averaged over all steps so far."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from l3rs.baselines import common


class AVGradState(NamedTuple):
    """State of `avgrad`: three numbers a parameter, float32 or wider."""

    count: jax.Array  # type: ignore[assignment]  # int32 [], steps taken
    mu: optax.Updates  # m, like the params
    nu: optax.Updates  # v, like the params
    nu_mean: optax.Updates  # v̄, like the params: the mean of all v so far


def avgrad(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.95,
    *,
    eps: jax.typing.ArrayLike = 1e-6,
) -> optax.GradientTransformationExtraArgs:
    """AMSGrad with an average in place of the maximum::

        m = β1 m + (1-β1) g           v = β2 v + (1-β2) g²
        v̄ = (v + (t-1) v̄) / t
        θ ← θ - α · m/(1-β1ᵗ) / (√(v̄/(1-β2ᵗ)) + ε)

    The average v̄ is a smooth function of β2, which a maximum is not. That is why MADA, which
    differentiates by its coefficients, interpolates towards AVGrad. In the first steps the correction
    by 1-β2ᵗ is too weak, because v̄ still contains the small first v: steps are larger than Adam's.

    Args:
      learning_rate: a number, traced or not, or a schedule.
      b1, b2: decays of the moments, in [0, 1).
      eps: ε > 0.

    Returns:
      A transformation whose update needs only the gradients. Moments are float32 or wider, updates
      have the params' dtypes.

    Raises:
      L3RSError: a number is out of range.

    Example:
      >>> import jax, optax
      >>> from l3rs.baselines import avgrad
      >>> params = {"w": jax.numpy.ones(3)}
      >>> tx = avgrad(1e-3)
      >>> state = tx.init(params)
      >>> grads = jax.grad(lambda p: (p["w"] ** 2).sum())(params)
      >>> updates, state = tx.update(grads, state, params)
      >>> params = optax.apply_updates(params, updates)

    Reference: Ozkara et al., MADA: Meta-Adaptive Optimizers through hyper-gradient Descent,
    arXiv 2401.08893. Defaults, and the position of the bias correction, are those of its experiments.
    """
    learning_rate = common.rate(learning_rate)
    b1, b2, eps = common.decay("b1", b1), common.decay("b2", b2), common.positive("eps", eps)

    def init_fn(params: optax.Params) -> AVGradState:
        return AVGradState(jnp.zeros([], jnp.int32), *(common.zeros(params) for _ in range(3)))

    def update_fn(
        updates: optax.Updates, state: AVGradState, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, AVGradState]:
        del extra_args
        step, _, mu, nu = common.moments(updates, state, b1, b2)
        dtype = common.scalar_dtype(mu)
        nu_mean = jax.tree.map(lambda v, mean: mean + (v - mean) / step.astype(v.dtype), nu, state.nu_mean)

        rate = common.rate_at(learning_rate, state.count, dtype) / common.bias_correction(b1, step, dtype)
        correction = common.bias_correction(b2, step, dtype)
        moved = jax.tree.map(lambda m, v: -rate * m / (jnp.sqrt(v / correction) + eps), mu, nu_mean)
        return common.narrow(moved, updates, params), AVGradState(step, mu, nu, nu_mean)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
