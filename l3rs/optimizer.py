"""L3RS as an optax transformation.

Per layer l with directions d_p, and (μ, λ) from one MLP over the layer's features::

    unit(x) = x / ‖x‖
    Δθ_l    = -λ_l · unit( Σ_p μ_p unit(d_p) )
    λ_l     = step_scale · √n_l · exp(step_gain · out)

The norm of the mixture needs no pass of its own: with the Gram matrix G_pq = ⟨d_p, d_q⟩ it is
√(aᵀGa). So a step is one pass of reductions over the parameters and one that updates them.

Reference: Kristiansen et al., Narrowing the Focus: Learned Optimizers for Pretrained Models,
arXiv 2408.09310. The form of μ, λ and the features is this project's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from l3rs import features, network
from l3rs.directions import Lazy, make_direction
from l3rs.guard import Guard, GuardState, adam_share, advance, init_guard, make_guard
from l3rs.layers import Match, MatchBy, Matching, OnUnknown, embedding_weights, match_params
from l3rs.spec import L3RSError, Layer, Spec, Theta, layers_of
from l3rs.theta import check_theta

_CACHED = 1 << 16  # layers of fewer parameters stay in a processor's cache: to store their directions is cheap
_MIN_MIX_NORM = 1e-3  # directions that cancel to less than this share of their length are not blown up
_MIN_RELATIVE_RMS = 1e-3  # with step="relative", a layer of zeros still moves


class L3RSState(NamedTuple):
    """State of `learned_optimizer`. L layers, P directions, S = 2 + P norms (gradient, parameters, directions)."""

    count: jax.Array  # type: ignore[assignment]  # int32 [], steps taken
    loss: features.LossState
    log_norms: jax.Array  # float32 [2, L, S], fast and slow EMAs of the log norms
    mix: jax.Array  # float32 [L, P], μ of the last step
    step_norm: jax.Array  # float32 [L], λ of the last step
    directions: tuple[optax.OptState, ...]  # the base optimizers' moments, float32
    guard: GuardState | None = None  # None: off


def learned_optimizer(
    theta: Theta,
    spec: Spec,
    total_steps: int | jax.Array,
    *,
    rename: Mapping[str, str] | None = None,
    match: MatchBy = "path",
    on_unknown: OnUnknown = "error",
    guard: bool | Guard = False,
) -> optax.GradientTransformationExtraArgs:
    """The learned optimizer with meta-parameters `theta`.

    Statistics are kept in float32, updates have the parameters' dtype. A layer whose gradient is not
    finite (or so large that its squared norm is not) stays where it is for that step, and its
    gradient counts as zero in the moments; a non-finite loss is left out of the loss features.

    Args:
      theta: meta-parameters, from `init_meta_params`, a meta-training run or a checkpoint.
      spec: what `theta` belongs to.
      total_steps: the horizon T ≥ 1, a number or a traced int32 scalar. Training may go past it, with the
        features of a training that is over; compiled code cannot say so, `state.count` tells.
      rename: {path in the params: path in the checkpoint}, for layers that are called otherwise here. With
        descriptor embeddings, the names that layers are described by.
      match: how layers find theirs in an embedding table. "path": by name; layers may be absent (frozen). "order":
        the i-th of a shape is the table's i-th of that shape, see `layers.match_layers`. "auto": by path, or by
        order if no path is known. `l3rs.match_layers` says what it comes to.
      on_unknown: "error", or "mean": a layer that is not in the table, or has another shape there, gets the
        mean of all embeddings. "descriptor" is for checkpoints with descriptor embeddings, which know any layer.
      guard: True, or a `Guard`: plain Adam steps for a while when the loss runs away, see `guard_report`.

    Returns:
      A transformation whose update needs the params and the loss:
      `tx.update(grads, state, params, value=loss)`.

    Raises:
      L3RSError: params that do not match `spec.layers` in that way; missing params or `value`; total_steps < 1.

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
        whole = np.ndim(total_steps) == 0 and np.issubdtype(np.asarray(total_steps).dtype, np.integer)
        if not whole or not 1 <= int(total_steps) < 2**31:
            raise L3RSError(f"total_steps is {total_steps}; it must be a whole number ≥ 1")
    check_theta(theta, spec, "theta")
    directions = [make_direction(direction) for direction in spec.directions]
    how = Matching.of(spec, rename, match, on_unknown)
    net = make_guard(guard, spec)
    n_norms = 2 + len(directions)

    def init_fn(params: optax.Params) -> L3RSState:
        n_layers = len(match_params(spec, params, how))
        zeros = jax.tree.map(lambda p: jnp.zeros_like(p, jnp.float32), params)
        return L3RSState(
            count=jnp.zeros([], jnp.int32),
            loss=features.init_loss(spec.loss_decays),
            log_norms=jnp.zeros((2, n_layers, n_norms), jnp.float32),
            mix=jnp.zeros((n_layers, len(directions)), jnp.float32),
            step_norm=jnp.zeros(n_layers, jnp.float32),
            directions=tuple(direction.transform.init(zeros) for direction in directions),
            guard=None if net is None else init_guard(),
        )

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
            raise L3RSError("L3RS reads the params and the loss: call update(grads, state, params, value=loss)")
        matches = match_params(spec, params, how)
        _check_call(updates, params, value)
        if not matches:  # every layer is frozen
            return updates, state
        step = state.count + 1

        leaves = [leaf.astype(jnp.float32) for leaf in jax.tree.leaves(params)]
        raw = [leaf.astype(jnp.float32) for leaf in jax.tree.leaves(updates)]
        squared = [_squared_norm(gradient) for gradient in raw]
        finite = [jnp.isfinite(x) for x in squared]
        treedef = jax.tree.structure(updates)
        # A NaN must not enter moments that would keep it for ever.
        grads = jax.tree.unflatten(treedef, [jnp.where(ok, g, 0.0) for ok, g in zip(finite, raw, strict=True)])

        lazy, moments = [], []
        for direction, moment in zip(directions, state.directions, strict=True):
            moved, moment = direction.transform.update(grads, moment, jax.tree.unflatten(treedef, leaves))
            lazy.append(direction.read(moved, moment, jax.tree.unflatten(treedef, raw)))
            moments.append(moment)
        layers = [list(layer) for layer in zip(*lazy, strict=True)]  # L lists of P

        gram = jnp.stack([_gram(*layer) for layer in zip(raw, squared, layers, strict=True)])  # [L, P, P]
        gradient_norm = jnp.sqrt(jnp.where(jnp.stack(finite), jnp.stack(squared), 0.0))
        parameter_norm = jnp.sqrt(jnp.stack([_squared_norm(leaf) for leaf in leaves]))
        moves = jnp.stack(finite) & jnp.isfinite(gram).all((1, 2))  # [L]; a direction's norm can overflow, too
        gram = jnp.where(moves[:, None, None], gram, 0.0)
        direction_norm = jnp.sqrt(jnp.diagonal(gram, axis1=1, axis2=2))  # [L, P]

        root_n = np.sqrt([max(p.size, 1) for p in jax.tree.leaves(params)]).astype(np.float32)
        norms = jnp.concatenate([gradient_norm[:, None], parameter_norm[:, None], direction_norm], axis=1)
        log_norms = features.safe_log(norms / root_n[:, None])
        log_norms_ema = features.update_log_norms(state.log_norms, log_norms, spec.norm_decays)
        loss = features.update_loss(state.loss, value, spec.loss_decays)

        time = features.time_features(step, jnp.asarray(total_steps), spec.absolute_time)
        shared = jnp.concatenate([time, features.loss_features(loss, spec.loss_decays)])
        seen = features.norm_features(log_norms, log_norms_ema, step, spec.norm_decays)
        embedding = _embeddings(theta, spec, matches, how, params)
        decision = network.apply(theta, spec, shared, jnp.concatenate([seen, embedding], axis=1))

        relative = jnp.maximum(parameter_norm, _MIN_RELATIVE_RMS * root_n)
        base = jnp.asarray(root_n) if spec.step == "rms" else relative
        step_norm = spec.step_scale * base * jnp.exp(decision.log_step)
        coefficients = _coefficients(decision.mix, step_norm, gram, direction_norm)  # [L, P]
        mix, watched = decision.mix, state.guard
        if net is not None:
            if watched is None:
                raise L3RSError("the state is one of an optimizer without a guard: make it with this one's init")
            watched = advance(net, watched, jnp.asarray(value, jnp.float32), *_fast_loss(loss, spec))
            adam = jnp.broadcast_to(adam_share(spec), mix.shape)
            taken_over = watched.left > 0
            coefficients = jnp.where(taken_over, net.learning_rate * adam, coefficients)
            mix = jnp.where(taken_over, adam, mix)
            step_norm = jnp.where(taken_over, net.learning_rate * (adam * direction_norm).sum(1), step_norm)
        new_updates = [
            _mixture(moves[i], layer, coefficients[i]).astype(param.dtype)
            for i, (layer, param) in enumerate(zip(layers, jax.tree.leaves(params), strict=True))
        ]
        new_state = L3RSState(step, loss, log_norms_ema, mix, step_norm, tuple(moments), watched)
        return jax.tree.unflatten(treedef, new_updates), new_state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _embeddings(theta: Theta, spec: Spec, matches: Sequence[Match], how: Matching, params: optax.Params) -> jax.Array:
    """Embeddings of the layers of `params`, [L, E]."""
    rows = [match.row for match in matches]
    if rows == list(range(len(spec.layers))):
        return theta["embedding"]
    if None not in rows:
        return theta["embedding"][np.array(rows)]
    described = [Layer(how.rename.get(layer.path, layer.path), layer.shape) for layer in layers_of(params)]
    return embedding_weights(spec, matches, described) @ theta["embedding"]


def _fast_loss(loss: features.LossState, spec: Spec) -> tuple[jax.Array, jax.Array]:
    """The fastest EMA of the loss, bias-corrected (NaN before a finite loss), and the first loss."""
    weight = 1 - np.float32(spec.loss_decays[0]) ** loss.observed.astype(jnp.float32)
    return loss.ema[0] / weight, loss.first


def _check_call(grads: optax.Updates, params: optax.Params, value: jax.Array) -> None:
    found = [leaf.shape for leaf in jax.tree.leaves(grads)]
    expected = [leaf.shape for leaf in jax.tree.leaves(params)]
    if found != expected:
        raise L3RSError(f"gradients have the shapes {found[:6]}; the params have {expected[:6]}")
    if jnp.shape(value) != ():
        raise L3RSError(f"value has shape {jnp.shape(value)}; it must be one number, the loss")


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


def _coefficients(mix: jax.Array, step_norm: jax.Array, gram: jax.Array, norm: jax.Array) -> jax.Array:
    """What each direction is multiplied by, [L, P]: λ μ_p / (‖d_p‖ ‖Σ_q μ_q unit(d_q)‖).

    A direction of norm 0 has no unit vector: its coefficient is 0."""
    inverse = jnp.where(norm > 0, 1.0 / jnp.where(norm > 0, norm, 1.0), 0.0)
    cosine = gram * inverse[:, :, None] * inverse[:, None, :]
    mixed_norm = jnp.sqrt(jnp.maximum(jnp.einsum("lp,lpq,lq->l", mix, cosine, mix), 0.0))
    return mix * inverse * (step_norm / jnp.maximum(mixed_norm, _MIN_MIX_NORM))[:, None]
