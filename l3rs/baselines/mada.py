"""MADA: one optimizer between Adam, AVGrad, Yogi, Adan and Lion, that learns in training where to be.

The coefficients q descend on the loss: the gradient at the next step, times the derivative of the
last update by q, is the derivative of the loss by q. Nothing but that update is differentiated.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import optax

from l3rs.baselines import common
from l3rs.spec import L3RSError

COEFFICIENTS = ("b1", "b2", "b3", "c", "rho", "gamma")

# D: where a learned coefficient is kept.
DOMAIN = {
    "b1": (0.01, 0.99),
    "b2": (0.501, 0.99),
    "b3": (0.0, 0.99),
    "c": (0.0, 1.0),
    "rho": (0.0, 1.0),
    "gamma": (0.0, 1.0),
    "learning_rate": (0.0, math.inf),
}

# The published ones; there is none for the learning rate, which was not learned.
HYPER_LEARNING_RATES = {"b1": 5e-4, "b2": 5e-4, "b3": 1e-1, "c": 1e-1, "rho": 1e-1, "gamma": 1e-1}

SYMBOLS = {  # in pictures
    "b1": "β1, first moment",
    "b2": "β2, second moment",
    "b3": "β3, Adan's differences",
    "c": "c: 1 Adam, 0 Yogi",
    "rho": "ρ: 1 Adam, 0 AVGrad",
    "gamma": "γ: 1 Adam, 0 Lion",
    "learning_rate": "learning rate",
}

_LION = (0.95, 0.98)  # decays: of the interpolation whose sign is taken, of the momentum


class Coefficients(NamedTuple):
    """q, and the learning rate: scalars, no narrower than float32."""

    b1: jax.Array  # β1, decay of the first moment
    b2: jax.Array  # β2, decay of the second moment
    b3: jax.Array  # β3, decay and weight of Adan's gradient differences
    c: jax.Array  # 1 Adam's second moment, 0 Yogi's
    rho: jax.Array  # ρ, 1 the second moment itself, 0 AVGrad's mean of it
    gamma: jax.Array  # γ, 1 the adaptive step, 0 Lion's
    learning_rate: jax.Array  # α


class Moments(NamedTuple):
    """Each like the params, or of one tensor of them. None: coefficients that cannot move make no use of it."""

    first: Any  # m
    second: Any  # v
    difference: Any | None  # n
    grad: Any | None  # g of the step before
    mean: Any | None  # v̄
    lion: Any | None  # Lion's momentum


class MADAState(NamedTuple):
    """State of `mada`. The moments are those before the last update: the next call makes it again,
    to differentiate it. Where nothing is learned they are those after it."""

    count: jax.Array  # type: ignore[assignment]  # int32 [], steps taken
    coefficients: Coefficients  # of the last step
    moments: Moments
    grads: optax.Updates | None  # g of the last step, like the params; None: nothing is learned
    params: optax.Params | None  # θ before the last step; None: no derivative needs it
    history: jax.Array  # float [history, 7], a ring: row (t-1) % history has the `Coefficients` of step t


def _update(
    q: Coefficients,
    step: jax.Array,
    grads: optax.Updates,
    moments: Moments,
    params: optax.Params | None,
    eps: common.Number,
    weight_decay: common.Number,
) -> tuple[optax.Updates, Moments]:
    """(updates, moments after) of step ≥ 1; params None: without weight decay."""

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
        change = jnp.where(step > 1, g - old.grad, 0.0)  # the first gradient has none to differ from
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
    """√x with derivative 0 at 0: a parameter without a gradient does not make q's derivative NaN."""
    return jnp.where(x > 0, jnp.sqrt(jnp.where(x > 0, x, 1.0)), 0.0)


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

    Adam is β3=0, c=ρ=γ=1 (where it starts by default), AVGrad has ρ=0, Yogi c=0, Lion γ=0, Adan
    β3>0. HyperAdam learns β1 and β2 only: `hyper_adam`. MADA-FS is `learned=()` with the
    coefficients another run ended with: `mada(**mada_coefficients(state), learned=())`.

    Memory: 7 numbers a parameter (m, v, n, v̄, l, g', g), one more (θ) where the learning rate is
    learned and there is weight decay, one less (g) where nothing is learned. A frozen β3=0 saves
    two (n, g'), ρ=1 and γ=1 one each (v̄, l): HyperAdam needs 3. The history is 7 numbers a row.
    A step makes the last update again, to differentiate it. On a CPU (6.5 M parameters) it takes 12
    times as long as Adam's and 15 numbers a parameter while it runs; HyperAdam 3.4 times and 5;
    where nothing is learned, no longer and none.

    Args:
      learning_rate: α, a number, traced or not, or a schedule; a learned one begins as a number.
      b1, b2, b3, c, rho, gamma: where the coefficients begin; the learned ones in D, which is
        `DOMAIN`, frozen ones anywhere in [0, 1), c, rho and gamma in [0, 1]. Traced or not.
      learned: which of `COEFFICIENTS` and "learning_rate" move; the others are frozen.
      hyper_learning_rates: η by name, where not as in `HYPER_LEARNING_RATES`. A learned learning
        rate needs one.
      hyper_clip: each hyper-gradient is clipped to ± this. One that is not finite counts as 0.
      start_step: the first step, counted from 1, that moves coefficients; no earlier than the second.
      eps: ε > 0.
      weight_decay: decoupled, and times α; its update needs the params.
      history: of how many last steps the coefficients are kept, see `mada_history`. Not traced.

    Returns:
      A transformation whose update needs the params only where there is weight decay. Moments are
      no narrower than float32, updates have the params' dtypes. As with Adam, a gradient that is
      not finite spoils the moments (`optax.apply_if_finite` helps), but not the coefficients.

    Raises:
      L3RSError: a number or a name that is not allowed; missing params.

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
    arXiv 2401.08893; hyper-parameters and D are the published ones. As in its authors' code q moves
    before the step that the new gradient makes, so a hyper-gradient is one of the q it moves.
    """
    rates = _rates(learned, hyper_learning_rates or {})
    start = _start({"b1": b1, "b2": b2, "b3": b3, "c": c, "rho": rho, "gamma": gamma}, rates)
    if "learning_rate" in rates and callable(learning_rate):
        raise L3RSError("learning_rate is a schedule; a learned learning rate begins as a number")
    learning_rate = common.rate(learning_rate)
    hyper_clip = common.number("hyper_clip", hyper_clip, lambda x: x > 0, "> 0")
    start_step = _whole("start_step", start_step)
    rows = _rows(history)
    weight_decay = common.not_negative("weight_decay", weight_decay)
    decays = not isinstance(weight_decay, float) or weight_decay > 0
    keeps_params = decays and "learning_rate" in rates
    update = functools.partial(_update, eps=common.positive("eps", eps), weight_decay=weight_decay)

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
    """Adam that learns its β1 and β2: MADA with the other coefficients frozen. 3 numbers a parameter.

    Args:
      learning_rate, b1, b2, hyper_learning_rates, hyper_clip, start_step, eps, weight_decay, history:
        as those of `mada`.

    Returns:
      A transformation, with the state of `mada`.

    Example:
      >>> from l3rs.baselines import hyper_adam
      >>> tx = hyper_adam(1e-3, b1=0.5)

    Reference: Chandra et al., Gradient Descent: The Ultimate Optimizer, arXiv 1909.13371, in the
    form in which MADA is compared with it.
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
    """The coefficients of the last step, by the names of `mada`'s arguments.

    Args:
      state: of `mada`, or one that holds it: of a chain, say.

    Raises:
      L3RSError: no state of MADA in it, or several.
    """
    return _find(state).coefficients._asdict()


def mada_history(state: optax.OptState) -> dict[str, np.ndarray]:
    """The coefficients of the last steps, to plot.

    Args:
      state: of `mada(…, history=n)`, or one that holds it; of one run, not of a batch.

    Returns:
      Arrays [min(steps taken, n)], oldest first: "step", counted from 1, and each coefficient.

    Raises:
      L3RSError: no state of MADA in it, or several, or a batch of them.
    """
    found = _find(state)
    if found.count.ndim:
        raise L3RSError(f"these are {found.count.shape} runs; take one: jax.tree.map(lambda x: x[0], state)")
    count, rows = int(found.count), len(found.history)
    steps = np.arange(max(count - rows, 0), count)
    kept = np.asarray(found.history)[steps % max(rows, 1)]
    return {"step": steps + 1, **dict(zip(Coefficients._fields, kept.T, strict=True))}


def plot_coefficients(
    history: Mapping[str, npt.ArrayLike], file: str | Path, *, title: str = "", start_step: int = 0
) -> Path:
    """The coefficients over the steps, each in a panel of its own with D's edges as dotted lines.

    Args:
      history: of `mada_history`.
      file: what to write, e.g. coefficients.png; its directory is made.
      title: above the panels.
      start_step: the first step that moves coefficients, a vertical line; none where 0.

    Returns:
      The file.

    Raises:
      L3RSError: no steps, or matplotlib is missing.

    Example:
      >>> from l3rs.baselines import plot_coefficients
      >>> history = {"step": [1, 2], "b1": [0.9, 0.8]}  # as mada_history gives it
      >>> plot_coefficients(history, "/tmp/coefficients.png").name
      'coefficients.png'
    """
    steps = np.asarray(history.get("step", ()))
    shown = [name for name in (*COEFFICIENTS, "learning_rate") if name in history]
    if not len(steps) or not shown:
        raise L3RSError("there are no steps to plot; keep some with mada(…, history=n)")
    if importlib.util.find_spec("matplotlib") is None:
        raise L3RSError("plot_coefficients needs matplotlib: pip install matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if np.ptp(np.asarray(history.get("learning_rate", 0.0))) == 0:  # a constant one is no news
        shown = [name for name in shown if name != "learning_rate"]
    figure = Figure(figsize=(9, 1.1 + 1.7 * -(-len(shown) // 3)), layout="constrained")
    FigureCanvasAgg(figure)
    rows = figure.subplots(-(-len(shown) // 3), 3, sharex=True, squeeze=False)
    for axes, name in zip(rows.flat, shown, strict=False):
        axes.plot(steps, np.asarray(history[name]), color="#0072B2", linewidth=1.4)
        axes.set_title(SYMBOLS[name], fontsize=10)
        axes.grid(alpha=0.25)
        for edge in filter(math.isfinite, DOMAIN[name] if name != "learning_rate" else ()):
            axes.axhline(edge, color="0.4", linestyle=":", linewidth=1)
        if start_step:
            axes.axvline(start_step, color="0.4", linestyle="--", linewidth=1)
    for axes in rows.flat[len(shown) :]:
        axes.set_visible(False)
    for column in range(3):  # the lowest panel of each column names the steps
        below = [axes for axes in rows[:, column] if axes.get_visible()]
        if below:
            below[-1].set_xlabel("step")
            below[-1].tick_params(labelbottom=True)
    figure.suptitle(title, fontsize=11)
    path = Path(file)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path


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

    Before there was an update it is one of no gradient, which leaves the moments at zero.
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
    """One coefficient after its hyper-step; itself where none is due."""
    old = getattr(q, name)
    usable = jnp.where(jnp.isfinite(slope), jnp.clip(slope, -clip, clip), 0.0)
    return jnp.where(active, jnp.clip(old - rate * usable, *DOMAIN[name]), old).astype(old.dtype)


def _no_moments(params: optax.Params, start: Mapping[str, Any], rates: Mapping[str, Any]) -> Moments:
    """Zeros for what is of use to coefficients that begin here."""

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
    """Where the coefficients begin; traced ones that are learned are put into D."""
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
    # A coefficient that was learned in float32 may be the float32 that rounds the edge outwards.
    return bool(np.float32(low) <= np.float32(x) <= np.float32(high))


def _rows(history: int | None) -> int:
    if isinstance(history, jax.core.Tracer):  # it is a shape
        raise L3RSError("history is traced; it must be a plain number: inject_hyperparams(…, static_args=('history',))")
    return int(_whole("history", history or 0))


def _whole(name: str, value: Any) -> common.Number:
    found = common.number(name, value, lambda x: 0 <= x < 2**31 and x == int(x), "that is whole and ≥ 0")
    return int(found) if isinstance(found, float) else found
