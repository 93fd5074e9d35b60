"""L3RS as an optax transformation.

What belongs to JAX is here: the directions of the parameters' size, their inner products, the update and the state.
`core` holds the mathematics in between.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from l3rs import core, first_steps, scale_free
from l3rs.decide import decide, n_norms
from l3rs.guard import Guard, GuardState, init_guard, make_guard, report
from l3rs.layers import Match, MatchBy, Matching, NetworkFacts, OnUnknown, network_facts
from l3rs.modes import usual_promotion
from l3rs.spec import L3RSError, Layer, Spec, Theta
from l3rs.theta import check_theta
from l3rs.transforms import BaseOptimizer, Lazy, make_directions
from l3rs.trees import check_grads, check_loss, layers_of, match_params

Mask = Any | Callable[[optax.Params], Any]

_CACHED = 1 << 16  # layers of fewer parameters stay in a processor's cache: storing their directions is cheap


class L3RSState(NamedTuple):
    """State of `learned_optimizer`. L layers, P directions, S norms: gradient, parameters, directions."""

    count: jax.Array  # type: ignore[assignment]  # int32 [], steps taken
    loss: core.LossState
    log_norms: jax.Array  # float32 [2, L, S], fast and slow EMAs of the log norms
    mix: jax.Array  # float32 [L, P], μ of the last step
    step_norm: jax.Array  # float32 [L], λ of the last step
    directions: tuple[optax.OptState, ...]  # the base optimizers' moments, float32
    guard: GuardState | None = None  # None: no guard
    layers: scale_free.LayerMemory | None = None  # of form 2; None: form 1


def learned_optimizer(
    theta: Theta,
    spec: Spec,
    total_steps: int | jax.Array,
    *,
    rename: Mapping[str, str] | None = None,
    match: MatchBy = "path",
    on_unknown: OnUnknown = "error",
    guard: bool | Guard = False,
    weight_decay: float | jax.Array = 0.0,
    mask: Mask | None = None,
) -> optax.GradientTransformationExtraArgs:
    """The learned optimizer with meta-parameters `theta`.

    Statistics are kept in float32, updates have the parameters' dtype. A layer whose gradient is not
    finite (or so large that its squared norm is not) stays where it is for that step, and its
    gradient counts as zero in the moments; a non-finite loss does not enter the loss features.

    An update that is called outside of `jax.jit` warns if one of the first steps changes most layers by more than half
    their norm, or the norm that a `leverage_floor` expects of a head. Compiled code cannot warn: compare
    `state.step_norm` with the norms of the params.

    Args:
      theta: meta-parameters, from `init_meta_params`, a meta-training run or a checkpoint.
      spec: the spec of `theta`.
      total_steps: the horizon T ≥ 1, a number or a traced int32 scalar. Training may go past it; the features
        of t / T then stay those of a training that is over. Compiled code cannot warn of this: compare `state.count`.
      rename: {path in the params: path in the checkpoint}, for layers with another name here. With descriptor
        embeddings, the name from which a layer's descriptors are computed.
      match: how layers map to the embedding table. "path": by name; layers may be absent (frozen). "order": the
        i-th of a shape is the table's i-th of that shape, see `layers.match_network`. "auto": by path, or by
        order if no path is in the table. `l3rs.match_layers` returns the result.
      on_unknown: "error", or "mean": a layer that is not in the table, or has another shape there, gets the
        mean of all embeddings. "descriptor" is for checkpoints with descriptor embeddings, which take any layer.
      guard: True, or a `Guard`: take plain Adam steps for a while when the loss diverges, see `guard_report`.
      weight_decay: decoupled, as in AdamW: the update of a layer with n parameters p also has -weight_decay · r · p,
        where r = λ/√n is the RMS of the learned step. It takes the place of AdamW's learning rate, which is about the
        RMS of Adam's step: values for AdamW can be kept. 0 or more, or a traced scalar.
      mask: as in `optax.adamw`: a tree of bools like the params, or a prefix of it, or a function of the params that
        returns one; True where weights decay. None means everywhere.

    Returns:
      A transformation whose update needs the params and the loss:
      `tx.update(grads, state, params, value=loss)`.

    Raises:
      L3RSError: params do not match `spec.layers`; params or `value` are missing; total_steps < 1; the gradients are
        not a tree like the params; a leaf is not an array of real floating-point numbers; the state is of another form.

    Example:
      >>> import jax, optax, l3rs
      >>> params = {"w": jax.numpy.ones(3)}
      >>> spec = l3rs.Spec.create(params)
      >>> tx = l3rs.learned_optimizer(l3rs.init_meta_params(jax.random.key(0), spec), spec, total_steps=100)
      >>> state = tx.init(params)
      >>> loss, grads = jax.value_and_grad(lambda p: (p["w"] ** 2).sum())(params)
      >>> updates, state = tx.update(grads, state, params, value=loss)
      >>> params = optax.apply_updates(params, updates)
    """
    if not isinstance(total_steps, jax.core.Tracer):
        core.check_total_steps(total_steps)
    check_theta(theta, spec, "theta")
    bases = make_directions(spec.directions)
    how = Matching.of(spec, rename, match, on_unknown)
    rules = make_guard(guard, spec)
    if not isinstance(weight_decay, jax.core.Tracer) and not _is_decay(weight_decay):
        raise L3RSError(f"weight_decay is {weight_decay!r}; it must be a number ≥ 0")

    @usual_promotion()
    def init_fn(params: optax.Params) -> L3RSState:
        n_layers = len(match_params(spec, params, how))
        zeros = jax.tree.map(lambda p: jnp.zeros_like(p, jnp.float32), params)
        return L3RSState(
            count=jnp.zeros([], jnp.int32),
            loss=core.init_loss(spec.loss_decays, jnp),
            log_norms=jnp.zeros((2, n_layers, n_norms(spec)), jnp.float32),
            mix=jnp.zeros((n_layers, len(bases)), jnp.float32),
            step_norm=jnp.zeros(n_layers, jnp.float32),
            directions=tuple(base.transform.init(zeros) for base in bases),
            guard=None if rules is None else init_guard(jnp),
            layers=scale_free.init_layers(n_layers, len(bases), jnp) if spec.form == 2 else None,
        )

    @usual_promotion()
    def update_fn(
        updates: optax.Updates,
        state: L3RSState,
        params: optax.Params | None = None,
        *,
        value: jax.Array | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, L3RSState]:
        del extra_args
        if params is None or value is None:
            raise L3RSError("L3RS needs the params and the loss: call update(grads, state, params, value=loss)")
        matches = match_params(spec, params, how)
        check_grads(updates, params)
        check_loss(value)
        _check_state(state, spec, len(matches), len(bases), rules is not None)
        if not matches:  # every layer is frozen
            return updates, state
        params = jax.tree.map(jnp.asarray, params)
        memory = core.Memory(state.count, state.loss, state.log_norms, state.guard, state.layers)
        measured, layers, moments = _measure(spec, bases, updates, state, params, value)
        facts = _facts(theta, spec, matches, how, params)
        decision, memory = decide(theta, spec, memory, measured, facts, jnp.asarray(total_steps), rules, jnp)
        decays = _decays(weight_decay, mask, params)
        new_updates = []
        for i, (layer, param) in enumerate(zip(layers, jax.tree.leaves(params), strict=True)):
            update = _mixture(measured.moves[i], layer, decision.coefficients[i])
            if decays[i] is not None:
                shrinking = decays[i] * decision.step_norm[i] / measured.root_n[i] * param.astype(jnp.float32)
                update = update - jnp.where(measured.moves[i], shrinking, 0.0)
            new_updates.append(update.astype(param.dtype))
        _warn_of_first_steps(spec, facts, memory, measured, decision, params)
        new_state = L3RSState(
            count=memory.step,
            loss=memory.loss,
            log_norms=memory.log_norms,
            mix=decision.mix,
            step_norm=decision.step_norm,
            directions=moments,
            guard=memory.guard,
            layers=memory.layers,
        )
        return jax.tree.unflatten(jax.tree.structure(updates), new_updates), new_state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def guard_report(state: Any) -> dict[str, Any]:
    """What the guard did.

    Args:
      state: an optimizer state that contains one of `learned_optimizer(…, guard=…)`, chained or wrapped.

    Returns:
      `count`, how often Adam took over; `adam_steps`, how many steps it took in total; `active`, whether it is
      certain to take the next step; `best_loss`, the lowest EMA of the loss.

    Raises:
      L3RSError: the state has no guard, or more than one.
    """
    leaves = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, GuardState))
    found = [leaf for leaf in leaves if isinstance(leaf, GuardState)]
    if len(found) != 1:
        raise L3RSError(f"the state has {len(found)} guards; it must have one: l3rs.load(…, guard=True)")
    return report(found[0])


def _measure(
    spec: Spec,
    bases: Sequence[BaseOptimizer],
    grads: optax.Updates,
    state: L3RSState,
    params: optax.Params,
    value: jax.Array,
) -> tuple[core.Statistics, list[list[Lazy]], tuple[optax.OptState, ...]]:
    """The statistics of a step, its directions (L lists of P) and the base optimizers' new moments."""
    treedef = jax.tree.structure(params)
    leaves = [leaf.astype(jnp.float32) for leaf in jax.tree.leaves(params)]
    raw = [jnp.asarray(leaf).astype(jnp.float32) for leaf in jax.tree.leaves(grads)]
    squared = [_squared_norm(gradient) for gradient in raw]
    finite = [jnp.isfinite(x) for x in squared]
    # A NaN must not enter moments, which would keep it.
    clean = jax.tree.unflatten(treedef, [jnp.where(ok, g, 0.0) for ok, g in zip(finite, raw, strict=True)])

    adam = next((p for p, direction in enumerate(spec.directions) if direction.name == "adam"), -1)
    lazy, moments = [], []
    for base, moment in zip(bases, state.directions, strict=True):
        moved, moment = base.transform.update(clean, moment, jax.tree.unflatten(treedef, leaves))
        moments.append(moment)
        source = moments[adam] if base.reads_adam else moment
        lazy.append(base.read(moved, source, jax.tree.unflatten(treedef, raw)))
    layers = [list(layer) for layer in zip(*lazy, strict=True)]

    gram = jnp.stack([_gram(*layer) for layer in zip(raw, squared, layers, strict=True)])
    parameter_squared = jnp.stack([_squared_norm(leaf) for leaf in leaves])
    root_n = core.root_sizes([leaf.size for leaf in leaves])
    measured = core.measure(value, state.count + 1, root_n, jnp.stack(squared), parameter_squared, gram, jnp)
    return measured, layers, tuple(moments)


def _facts(theta: Theta, spec: Spec, matches: Sequence[Match], how: Matching, params: optax.Params) -> NetworkFacts:
    described = [Layer(how.rename.get(layer.path, layer.path), layer.shape) for layer in layers_of(params)]
    return network_facts(theta, spec, matches, described)


def _check_state(state: Any, spec: Spec, n_layers: int, n_bases: int, guarded: bool) -> None:
    """Refuse a state that was restored as plain dicts, or that is another optimizer's."""
    whole = isinstance(state, L3RSState) and isinstance(state.loss, core.LossState)
    if not whole or not isinstance(state.layers, scale_free.LayerMemory if spec.form == 2 else type(None)):
        raise L3RSError(
            f"the state is a {type(state).__name__} that `init` of this optimizer did not make; restore a saved state "
            f"into the structure of tx.init(params), e.g. with orbax.checkpoint.args.StandardRestore(tx.init(params))"
        )
    if guarded and state.guard is None:
        raise L3RSError("the state is from an optimizer without a guard; create it with this optimizer's init")
    expected = (2, n_layers, n_norms(spec))
    if jnp.shape(state.log_norms) != expected or len(state.directions) != n_bases:
        raise L3RSError(
            f"the state has log_norms {list(jnp.shape(state.log_norms))} and {len(state.directions)} directions; this "
            f"optimizer with these params has {list(expected)} and {n_bases}: create it with tx.init(params)"
        )


def _is_decay(value: Any) -> bool:
    number = isinstance(value, int | float | np.number | np.ndarray | jax.Array) and not isinstance(value, bool)
    return number and np.ndim(value) == 0 and bool(0 <= value < np.inf)


def _decays(weight_decay: float | jax.Array, mask: Mask | None, params: optax.Params) -> list[Any]:
    """The weight decay of each layer; None where there is none."""
    n_layers = len(jax.tree.leaves(params))
    if not isinstance(weight_decay, jax.Array) and weight_decay == 0:
        return [None] * n_layers
    if mask is None:
        return [weight_decay] * n_layers
    chosen = mask(params) if callable(mask) else mask
    if any(
        not isinstance(leaf, bool) and getattr(leaf, "dtype", None) != np.dtype(bool)
        for leaf in jax.tree.leaves(chosen)
    ):
        raise L3RSError("mask has leaves that are not bools")
    try:
        whole = jax.tree.map(lambda each, below: jax.tree.map(lambda _: each, below), chosen, params)
    except ValueError:
        raise L3RSError("mask is not a tree of bools like the params, nor a prefix of one") from None
    return [weight_decay if each else None for each in jax.tree.leaves(whole)]


def _warn_of_first_steps(
    spec: Spec,
    facts: NetworkFacts,
    memory: core.Memory,
    measured: core.Statistics,
    decision: core.Decision,
    params: optax.Params,
) -> None:
    """Warn of steps that are too long. Outside of compiled code only: its values are not known here."""
    values = (memory.step, decision.step_norm, measured.parameter_norm)
    if any(isinstance(x, jax.core.Tracer) for x in values) or int(memory.step) > first_steps.N_STEPS:
        return
    usual_norm = scale_free.expected_norm(spec, facts, memory, measured, jnp)
    is_matrix = np.array([leaf.ndim > 1 for leaf in jax.tree.leaves(params)])
    found = first_steps.too_long(np.asarray(decision.step_norm), np.asarray(usual_norm), is_matrix)
    if found is not None:
        warnings.warn(found, stacklevel=4)


def _squared_norm(x: jax.Array) -> jax.Array:
    # The barrier keeps XLA from sharing the squares with Adam's second moment: it would store them.
    return jnp.vdot(x, x if x.size < _CACHED else jax.lax.optimization_barrier(x))


def _gram(gradient: jax.Array, squared_norm: jax.Array, layer: Sequence[Lazy]) -> jax.Array:
    """⟨d_p, d_q⟩ of one layer, float32 [P, P]; not finite, or zero, where its gradient is not finite.

    The branch bounds memory: one large layer's directions are stored at a time, not all of them.
    """
    n = len(layer)

    def products(operands: list[tuple[jax.Array, ...]]) -> jax.Array:
        d = [lazy.compute(*arrays) for lazy, arrays in zip(layer, operands, strict=True)]

        def product(p: int, q: int) -> jax.Array:
            both_gradient = layer[p].operands[0] is gradient and layer[q].operands[0] is gradient
            return squared_norm if both_gradient else jnp.sum(d[p] * d[q])

        upper = {(p, q): product(p, q) for p in range(n) for q in range(p, n)}
        return jnp.stack([upper[min(p, q), max(p, q)] for p in range(n) for q in range(n)]).reshape(n, n)

    operands = [lazy.operands for lazy in layer]
    if gradient.size < _CACHED:
        return products(operands)
    return jax.lax.cond(jnp.isfinite(squared_norm), products, lambda _: jnp.zeros((n, n), jnp.float32), operands)


def _mixture(moves: jax.Array, layer: Sequence[Lazy], coefficients: jax.Array) -> jax.Array:
    """-Σ_p c_p d_p of one layer; zero where it does not move."""
    # Behind the barrier the directions are computed again: cheaper than to keep large ones in memory.
    again = (lambda x: x) if layer[0].operands[0].size < _CACHED else jax.lax.optimization_barrier
    computed = [lazy.compute(*again(lazy.operands)) for lazy in layer]
    return jnp.where(moves, -sum(c * d for c, d in zip(coefficients, computed, strict=True)), 0.0)
