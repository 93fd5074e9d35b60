"""SWATS: begins as Adam and switches once to SGD, with a learning rate that it estimates from Adam's steps."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from l3rs.baselines import common


class SWATSState(NamedTuple):
    """State of `swats`: two numbers a parameter, float32 or wider."""

    count: jax.Array  # type: ignore[assignment]  # int32 [], steps taken
    sgd: jax.Array  # bool [], the phase: False Adam, True SGD
    switch_step: jax.Array  # int32 [], Adam's last step; 0 before the switch
    learning_rate: jax.Array  # float [], Λ: SGD's rate if the switch came now; fixed from the switch on
    average: jax.Array  # float [], λ: EMA of γ, not bias-corrected; Λ is λ/(1-β2ᵏ)
    adam_rate: jax.Array  # float [], Adam's α at the last step of its phase
    mu: optax.Updates  # m, like the params; in the SGD phase (1-β1) times its momentum
    nu: optax.Updates  # a, like the params; it does not change in the SGD phase


def swats(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    *,
    eps: jax.typing.ArrayLike = 1e-9,
    tolerance: jax.typing.ArrayLike = 1e-9,
    relative_tolerance: jax.typing.ArrayLike = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """Switching from Adam to SGD. In the Adam phase, at step k::

        m = β1 m + (1-β1) g           a = β2 a + (1-β2) g²
        p = -α_k √(1-β2ᵏ)/(1-β1ᵏ) · m / (√a + ε)
        θ ← θ + p
        γ = pᵀp / (-pᵀg)              # the rate at which SGD's step, projected on p, would be p
        λ = β2 λ + (1-β2) γ           Λ = λ / (1-β2ᵏ)
        switch if k > 1, Λ > 0 and |Λ - γ| < tolerance + relative_tolerance·|γ|

    and from the next step on, with v = 0 at first::

        v = β1 v + g                  θ ← θ - (1-β1) Λ v

    The products run over all parameters: there is one γ, one Λ and one switch for the model. Where
    pᵀg = 0, or γ is not finite, λ does not change. Two rules are not in the paper: Λ > 0, because a
    negative rate would increase the loss; and a schedule continues after the switch, as Λ α_k/α_switch.

    The paper's tolerance of 1e-9 is the rounding error of a rate of 0.01 in float32: with noisy
    gradients the switch comes when γ happens to equal its average, possibly never. Common
    implementations use a relative tolerance; relative_tolerance=1e-6 is close to theirs.

    Args:
      learning_rate: α, Adam's: a number, traced or not, or a schedule.
      b1, b2: decays of the moments, in [0, 1); b2 also averages γ.
      eps: ε > 0.
      tolerance, relative_tolerance: how well γ and Λ must agree, ≥ 0.

    Returns:
      A transformation whose update needs only the gradients. `state.sgd` is the phase,
      `state.learning_rate` is Λ, `state.switch_step` the step of the switch. Moments are float32 or
      wider, updates have the params' dtypes.

    Raises:
      L3RSError: a number is out of range.

    Example:
      >>> import jax, optax
      >>> from l3rs.baselines import swats
      >>> params = {"w": jax.numpy.ones(3)}
      >>> tx = swats(1e-3)
      >>> state = tx.init(params)
      >>> grads = jax.grad(lambda p: (p["w"] ** 2).sum())(params)
      >>> updates, state = tx.update(grads, state, params)
      >>> params = optax.apply_updates(params, updates)
      >>> bool(state.sgd)
      False

    Reference: Keskar and Socher, Improving Generalization Performance by Switching from Adam to
    SGD, arXiv 1712.07628, Algorithm 1, with its defaults: ε is both Adam's and the tolerance there.
    """
    learning_rate = common.rate(learning_rate)
    b1, b2, eps = common.decay("b1", b1), common.decay("b2", b2), common.positive("eps", eps)
    tolerance = common.not_negative("tolerance", tolerance)
    relative_tolerance = common.not_negative("relative_tolerance", relative_tolerance)

    def init_fn(params: optax.Params) -> SWATSState:
        dtype = common.scalar_dtype(params)
        return SWATSState(
            count=jnp.zeros([], jnp.int32),
            sgd=jnp.zeros([], jnp.bool),
            switch_step=jnp.zeros([], jnp.int32),
            learning_rate=jnp.zeros([], dtype),
            average=jnp.zeros([], dtype),
            adam_rate=jnp.zeros([], dtype),
            mu=common.zeros(params),
            nu=common.zeros(params),
        )

    def update_fn(
        updates: optax.Updates, state: SWATSState, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, SWATSState]:
        del extra_args
        step, grads, mu, nu = common.moments(updates, state, b1, b2)  # the paper's (1-β1) v obeys m's recurrence
        dtype = state.average.dtype
        rate = common.rate_at(learning_rate, state.count, dtype)
        scale = rate * jnp.sqrt(common.bias_correction(b2, step, dtype)) / common.bias_correction(b1, step, dtype)
        adam = jax.tree.map(lambda m, v: -scale * m / (jnp.sqrt(v) + eps), mu, nu)
        gamma, usable = _projected_rate(adam, grads)
        average = jnp.where(usable, common.average(gamma, state.average, b2), state.average)
        sgd_rate = average / common.bias_correction(b2, step, dtype)
        agree = jnp.abs(sgd_rate - gamma) < tolerance + relative_tolerance * jnp.abs(gamma)
        switch = ~state.sgd & usable & (step > 1) & (sgd_rate > 0) & agree

        decayed = state.learning_rate * rate / jnp.where(state.adam_rate == 0, 1, state.adam_rate)
        moved = jax.tree.map(lambda u, m: jnp.where(state.sgd, -decayed * m, u), adam, mu)

        def held(old: jax.Array, new: jax.Array) -> jax.Array:
            return jnp.where(state.sgd, old, new.astype(old.dtype))

        new_state = SWATSState(
            count=step,
            sgd=state.sgd | switch,
            switch_step=jnp.where(switch, step, state.switch_step),
            learning_rate=held(state.learning_rate, sgd_rate),
            average=held(state.average, average),
            adam_rate=held(state.adam_rate, rate),
            mu=jax.tree.map(lambda m: jnp.where(switch, jnp.zeros_like(m), m), mu),
            nu=jax.tree.map(held, state.nu, nu),
        )
        return common.narrow(moved, updates, params), new_state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _projected_rate(adam: optax.Updates, grads: optax.Updates) -> tuple[jax.Array, jax.Array]:
    """γ = pᵀp / (-pᵀg) over all parameters, and whether it can be used."""
    along = optax.tree.vdot(adam, grads)
    gamma = optax.tree.vdot(adam, adam) / jnp.where(along == 0, 1, -along)
    return gamma, (along != 0) & jnp.isfinite(gamma)
