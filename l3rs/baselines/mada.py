"""MADA: interpolates between Adam, AVGrad, Yogi, Adan and Lion, and learns the interpolation while it trains.

The coefficients q follow the gradient of the loss: the next step's gradient times the derivative of
the last update by q is the derivative of the loss by q. Only that update is differentiated.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from l3rs.baselines import common
from l3rs.baselines.mada_step import Coefficients, Moments, mada_step
from l3rs.spec import L3RSError

COEFFICIENTS = ("b1", "b2", "b3", "c", "rho", "gamma")

# D: the range to which a learned coefficient is clipped.
DOMAIN = {
    "b1": (0.01, 0.99),
    "b2": (0.501, 0.99),
    "b3": (0.0, 0.99),
    "c": (0.0, 1.0),
    "rho": (0.0, 1.0),
    "gamma": (0.0, 1.0),
    "learning_rate": (0.0, math.inf),
}

# As published; the paper does not learn the learning rate.
HYPER_LEARNING_RATES = {"b1": 5e-4, "b2": 5e-4, "b3": 1e-1, "c": 1e-1, "rho": 1e-1, "gamma": 1e-1}

SYMBOLS = {  # labels in figures
    "b1": "β1, first moment",
    "b2": "β2, second moment",
    "b3": "β3, Adan's differences",
    "c": "c: 1 Adam, 0 Yogi",
    "rho": "ρ: 1 Adam, 0 AVGrad",
    "gamma": "γ: 1 Adam, 0 Lion",
    "learning_rate": "learning rate",
}


class MADAState(NamedTuple):
    """State of `mada`. The moments are those before the last update: the next call repeats that update
    to differentiate it. If nothing is learned, they are those after it."""

    count: jax.Array  # type: ignore[assignment]  # int32 [], steps taken
    coefficients: Coefficients  # of the last step
    moments: Moments
    grads: optax.Updates | None  # g of the last step, like the params; None if nothing is learned
    params: optax.Params | None  # θ before the last step; None if no derivative needs it
    history: jax.Array  # float [history, 7], a ring buffer: row (t-1) % history has the `Coefficients` of step t


def mada(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.95,
    b3: jax.typing.ArrayLike = 0.0,
    c: jax.typing.ArrayLike = 1.0,
    rho: jax.typing.ArrayLike = 1.0,
    gamma: jax.typing.ArrayLike = 1.0,
    *,
    learned: Sequence[str] = COEFFICIENTS,
    hyper_learning_rates: Mapping[str, jax.typing.ArrayLike] | None = None,
    hyper_clip: jax.typing.ArrayLike = 10.0,
    start_step: int | jax.Array = 50,
    eps: jax.typing.ArrayLike = 1e-6,
    weight_decay: jax.typing.ArrayLike = 0.0,
    history: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Meta-adaptive optimizer: learns its coefficients by hyper-gradient descent. Step t::

        q ← Π_D[ q - η clip(⟨g, ∂θ/∂q⟩) ]                   # g here, ∂θ of the update before
        m = β1 m + (1-β1) g         n = β3 n + (1-β3)(g - g')     # g' the gradient before; no change at t = 1
        ĝ = g + β3 (g - g')         v = β2 v + (1-β2)(c ĝ² + (1-c)(v + ĝ² sign(ĝ² - v)))
        v̄ = (v + (t-1) v̄) / t       w = (ρ v + (1-ρ) v̄) / (1-β2ᵗ)
        u = .95 l + .05 g           l = .98 l + .02 g             # l before its own update, as Lion has it
        θ ← θ - α ( γ (m/(1-β1ᵗ) + β3 n)/(√w + ε) + (1-γ) sign(u) + weight_decay θ )

    Adam is β3=0, c=ρ=γ=1 (the default start), AVGrad ρ=0, Yogi c=0, Lion γ=0, Adan β3>0. HyperAdam
    learns only β1 and β2: `hyper_adam`. MADA-FS is `learned=()` with the final coefficients of
    another run: `mada(**mada_coefficients(state), learned=())`.

    Memory: 7 numbers a parameter (m, v, n, v̄, l, g', g), one more (θ) if the learning rate is
    learned and there is weight decay, one less (g) if nothing is learned. A frozen β3=0 saves two
    (n, g'), a frozen ρ=1 or γ=1 saves one (v̄, l): HyperAdam needs 3. The history is 7 numbers a row.
    A step repeats the last update to differentiate it. On a CPU (6.5 M parameters) it takes 12 times
    as long as Adam's and 15 more numbers a parameter while it runs; HyperAdam 3.4 times and 5; with
    nothing learned, neither.

    Args:
      learning_rate: α, a number, traced or not, or a schedule; a number if it is learned.
      b1, b2, b3, c, rho, gamma: initial values. Learned ones lie in D, `DOMAIN`; frozen b1, b2 and b3
        in [0, 1), frozen c, rho and gamma in [0, 1]. Traced or not.
      learned: which of `COEFFICIENTS` and "learning_rate" move; the others are frozen.
      hyper_learning_rates: η by name, in place of those in `HYPER_LEARNING_RATES`. A learned
        learning rate needs one.
      hyper_clip: each hyper-gradient is clipped to ± this value. If it is not finite, it counts as 0.
      start_step: the first step, counted from 1, that moves coefficients; no earlier than the second.
      eps: ε > 0.
      weight_decay: decoupled, and multiplied by α; its update needs the params.
      history: for how many last steps the coefficients are kept, see `mada_history`. Not traced.

    Returns:
      A transformation whose update needs the params only for weight decay. Moments are float32 or
      wider, updates have the params' dtypes. As with Adam, a gradient that is not finite makes the
      moments non-finite (`optax.apply_if_finite` prevents it), but not the coefficients.

    Raises:
      L3RSError: a number or a name is not allowed, or the params are missing.

    Example:
      >>> import jax, optax
      >>> from l3rs.baselines import mada, mada_coefficients
      >>> params = {"w": jax.numpy.ones(3)}
      >>> tx = mada(1e-2, b1=0.5, start_step=2)
      >>> state = tx.init(params)
      >>> for _ in range(3):
      ...     grads = jax.grad(lambda p: (p["w"] ** 2).sum())(params)
      ...     updates, state = tx.update(grads, state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> sorted(mada_coefficients(state))
      ['b1', 'b2', 'b3', 'c', 'gamma', 'learning_rate', 'rho']
      >>> frozen = mada(**mada_coefficients(state), learned=())

    Reference: Ozkara et al., MADA: Meta-Adaptive Optimizers through hyper-gradient Descent,
    arXiv 2401.08893, with the published hyper-parameters and D. As in its authors' code, q is updated
    before the step with the new gradient, so that a hyper-gradient belongs to the q that it changes.
    """
    rates = _rates(learned, hyper_learning_rates or {})
    start = _start({"b1": b1, "b2": b2, "b3": b3, "c": c, "rho": rho, "gamma": gamma}, rates)
    if "learning_rate" in rates and callable(learning_rate):
        raise L3RSError("learning_rate is a schedule; a learned learning rate must be a number")
    learning_rate = common.rate(learning_rate)
    hyper_clip = common.number("hyper_clip", hyper_clip, lambda x: x > 0, "> 0")
    start_step = _whole("start_step", start_step)
    rows = _rows(history)
    weight_decay = common.not_negative("weight_decay", weight_decay)
    decays = not isinstance(weight_decay, float) or weight_decay > 0
    keeps_params = decays and "learning_rate" in rates
    update = functools.partial(mada_step, eps=common.positive("eps", eps), weight_decay=weight_decay)

    def init_fn(params: optax.Params) -> MADAState:
        dtype = common.scalar_dtype(params)
        count = jnp.zeros([], jnp.int32)
        rate = common.rate_at(learning_rate, count, dtype)
        return MADAState(
            count=count,
            coefficients=Coefficients(**{name: jnp.asarray(x, dtype) for name, x in start.items()}, learning_rate=rate),
            moments=_no_moments(params, start, rates),
            grads=common.zeros(params) if rates else None,
            params=common.zeros(params) if keeps_params else None,
            history=jnp.zeros((rows, len(Coefficients._fields)), dtype),
        )

    def update_fn(
        updates: optax.Updates, state: MADAState, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, MADAState]:
        del extra_args
        if decays and params is None:
            raise L3RSError("weight decay reads the params: call update(grads, state, params)")
        step = optax.safe_increment(state.count)
        grads = jax.tree.map(lambda g, m: g.astype(m.dtype), updates, state.moments.first)
        q, moments = state.coefficients, state.moments
        if "learning_rate" not in rates:
            q = q._replace(learning_rate=common.rate_at(learning_rate, state.count, q.b1.dtype))
        if rates:
            slope, moments = _hyper_gradient(update, rates, state, grads)
            active = (step >= start_step) & (step > 1)
            q = q._replace(**{name: _descend(q, name, slope[name], rates[name], hyper_clip, active) for name in rates})
        moved, after = update(q, step, grads, moments, params if decays else None)
        new_state = MADAState(
            count=step,
            coefficients=q,
            moments=moments if rates else after,
            grads=grads if rates else None,
            params=jax.tree.map(lambda p, g: p.astype(g.dtype), params, grads) if keeps_params else None,
            history=state.history.at[state.count % rows].set(jnp.stack(q)) if rows else state.history,
        )
        return common.narrow(moved, updates, params), new_state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def hyper_adam(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.95,
    *,
    hyper_learning_rates: Mapping[str, jax.typing.ArrayLike] | None = None,
    hyper_clip: jax.typing.ArrayLike = 10.0,
    start_step: int | jax.Array = 50,
    eps: jax.typing.ArrayLike = 1e-6,
    weight_decay: jax.typing.ArrayLike = 0.0,
    history: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Adam that learns its β1 and β2: MADA with the other coefficients frozen, 3 numbers a parameter.

    Args:
      learning_rate, b1, b2, hyper_learning_rates, hyper_clip, start_step, eps, weight_decay, history:
        see `mada`.

    Returns:
      A transformation, with the state of `mada`.

    Example:
      >>> from l3rs.baselines import hyper_adam
      >>> tx = hyper_adam(1e-3, b1=0.5)

    Reference: Chandra et al., Gradient Descent: The Ultimate Optimizer, arXiv 1909.13371, in the
    form that MADA's paper compares with.
    """
    return mada(
        learning_rate,
        b1,
        b2,
        learned=("b1", "b2"),
        hyper_learning_rates=hyper_learning_rates,
        hyper_clip=hyper_clip,
        start_step=start_step,
        eps=eps,
        weight_decay=weight_decay,
        history=history,
    )


def mada_coefficients(state: optax.OptState) -> dict[str, jax.Array]:
    """The coefficients of the last step; the keys are the names of `mada`'s arguments.

    Args:
      state: of `mada`, or of a transformation that contains it, such as a chain.

    Raises:
      L3RSError: there is no state of MADA in it, or several.
    """
    return _find(state).coefficients._asdict()


def mada_history(state: optax.OptState) -> dict[str, np.ndarray]:
    """The coefficients of the last steps, for a figure.

    Args:
      state: of `mada(…, history=n)`, or of a transformation that contains it; of one run, not of a batch.

    Returns:
      Arrays [min(steps taken, n)], oldest first: "step", counted from 1, and each coefficient.

    Raises:
      L3RSError: there is no state of MADA in it, or several, or a batch of runs.
    """
    found = _find(state)
    if found.count.ndim:
        raise L3RSError(f"these are {found.count.shape} runs; take one: jax.tree.map(lambda x: x[0], state)")
    count, rows = int(found.count), len(found.history)
    steps = np.arange(max(count - rows, 0), count)
    kept = np.asarray(found.history)[steps % max(rows, 1)]
    return {"step": steps + 1, **dict(zip(Coefficients._fields, kept.T, strict=True))}


def _find(state: optax.OptState) -> MADAState:
    leaves = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, MADAState))
    found = [leaf for leaf in leaves if isinstance(leaf, MADAState)]
    if len(found) != 1:
        raise L3RSError(f"expected the state of one mada transformation, found {len(found)}")
    return found[0]


def _hyper_gradient(
    update: Callable[..., tuple[optax.Updates, Any]], rates: Mapping[str, Any], state: MADAState, grads: optax.Updates
) -> tuple[dict[str, jax.Array], Any]:
    """(⟨g, ∂(last update)/∂q⟩ by name, moments after the last update).

    Before the first update, that is an update with a gradient of zero, which leaves the moments at zero.
    """

    def last(q: dict[str, jax.Array]) -> tuple[optax.Updates, Any]:
        step = jnp.maximum(state.count, 1)
        return update(state.coefficients._replace(**q), step, state.grads, state.moments, state.params)

    q = {name: getattr(state.coefficients, name) for name in rates}
    _, pull_back, moments = jax.vjp(last, q, has_aux=True)
    return pull_back(grads)[0], moments


def _descend(
    q: Coefficients, name: str, slope: jax.Array, rate: common.Number, clip: common.Number, active: jax.Array
) -> jax.Array:
    """One coefficient after its hyper-step; unchanged where not `active`."""
    old = getattr(q, name)
    usable = jnp.where(jnp.isfinite(slope), jnp.clip(slope, -clip, clip), 0.0)
    return jnp.where(active, jnp.clip(old - rate * usable, *DOMAIN[name]), old).astype(old.dtype)


def _no_moments(params: optax.Params, start: Mapping[str, Any], rates: Mapping[str, Any]) -> Moments:
    """Zeros for the moments that these coefficients can use."""

    def useless(name: str, value: float) -> bool:
        return name not in rates and isinstance(start[name], float) and start[name] == value

    difference = useless("b3", 0.0)
    off = (False, False, difference, difference, useless("rho", 1.0), useless("gamma", 1.0))
    return Moments(*(None if is_off else common.zeros(params) for is_off in off))


def _rates(learned: Sequence[str], given: Mapping[str, Any]) -> dict[str, common.Number]:
    """The hyper learning rate of each learned coefficient."""
    known = (*COEFFICIENTS, "learning_rate")
    for argument, names in (("learned", tuple(learned)), ("hyper_learning_rates", tuple(given))):
        if isinstance(learned, str) or not set(names) <= set(known):
            raise L3RSError(f"{argument} names {names}; allowed are {', '.join(known)}")
    if "learning_rate" in learned and "learning_rate" not in given:
        raise L3RSError("a learned learning rate needs its own rate: hyper_learning_rates={'learning_rate': …}")
    rates = HYPER_LEARNING_RATES | dict(given)
    return {
        name: common.not_negative(f"the hyper learning rate of {name}", rates[name])
        for name in known
        if name in learned
    }


def _start(given: Mapping[str, Any], rates: Mapping[str, Any]) -> dict[str, common.Number]:
    """The initial coefficients; traced ones that are learned are clipped to D."""
    start = {}
    for name, value in given.items():
        low, high = DOMAIN[name]
        if name in rates:
            found = common.number(
                name, value, functools.partial(_within, low, high), f"in [{low}, {high}] when learned"
            )
            start[name] = found if isinstance(found, float) else jnp.clip(found, low, high)
        elif name in ("b1", "b2", "b3"):
            start[name] = common.decay(name, value)
        else:
            start[name] = common.number(name, value, functools.partial(_within, low, high), f"in [{low}, {high}]")
    return start


def _within(low: float, high: float, x: float) -> bool:
    # A coefficient learned in float32 may lie outside by a rounding error.
    return bool(np.float32(low) <= np.float32(x) <= np.float32(high))


def _rows(history: int | None) -> int:
    if isinstance(history, jax.core.Tracer):  # it is a shape
        raise L3RSError("history is traced; it must be a plain number: inject_hyperparams(…, static_args=('history',))")
    return int(_whole("history", history or 0))


def _whole(name: str, value: Any) -> common.Number:
    found = common.number(name, value, lambda x: 0 <= x < 2**31 and x == int(x), "that is whole and ≥ 0")
    return int(found) if isinstance(found, float) else found
