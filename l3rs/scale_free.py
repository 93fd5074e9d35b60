"""Form 2 of L3RS: the network sees nothing that has a scale, λ has the network's own, and no signal means no step.

Per layer l with n_l parameters, directions d_p, and outputs (μ, out, a) of the MLP::

    b_l  = RMS of the layer when training began, or its natural size if it began at zero
    s_p  = how much signal a direction carries, in [0, 1]; 0 for weight decay
    λ_l  = step_scale · √n_l · b_l · (100 / T)^h / √M · exp(min(step_gain · out, step_limit) + A_l + C_l) · s_l
    s_l  = Σ_p μ_p s_p / Σ_p μ_p, without weight decay
    A_l  = the sum of adaptation · tanh(a) over all steps so far, in ±5
    C_l  = layer_gain · c, with c learned for the layer's row of the embedding, in ±10
    Δθ_l = -λ_l · unit( Σ_p μ_p unit(d_p) )

with T the horizon, h the horizon_power and M the number of matrices that train. Multiplying a layer's parameters by
c > 0 and its gradients by 1/c multiplies its update by c; multiplying the loss and all gradients by c changes nothing.
With a decrease_limit q all Δθ_l are multiplied by min(1, q / M · loss / Σ_l ⟨g_l, -Δθ_l⟩), with the first loss or its
fastest average, whichever is larger in magnitude: the deeper a network, the less of the decrease that its gradients
promise does a long step achieve.

With a leverage_floor f, where a matrix trains alone or with its bias, their b_l are longer by max(1, f · loss /
Σ_l √n_l b'_l ‖g_l‖), at most 10, with b'_l the layers' RMS, or the whole natural size of those that began at zero. If
such a head promises little of its loss by moves of its own size, as on few or on small inputs, it will have to grow,
and its steps are relative to what it has to become. This is decided with the loss and the gradients of a layer's first
step, for good: without a finite loss or any gradient then, b_l stays as it is.

With a decay_share r, for such a head, μ of weight decay is smaller in both layers alike where Σ_l λ_l μ_l ⟨g_l,
unit(θ_l)⟩ < 0 and undoes more than r times what the other directions promise together, Σ_l λ_l Σ_p μ_p ⟨g_l,
unit(d_p)⟩; the lost weight shortens λ. The terms are those of the mixtures before they become unit vectors, which
multiplies all terms of a layer alike: for a kernel without a bias the share holds exactly. Where old weights are of no
use any more decay agrees with the gradient, or hardly matters to it; where they are what the head knows it does not.

step_limit holds where the network sees what it was not meta-trained on: a single step of e⁵ times its base undoes a
training.

The signal of a direction is its norm over a reference that only a gradient moves: for Adam, RMSprop and Lion an RMS of
1, which they have for a steady gradient; for SGD and momentum the root mean square of their norms so far. So a step
shrinks with a vanishing gradient at least as fast as the base optimizers', and the weight of a direction without signal
is lost, not given to another. A layer whose gradient is exactly zero keeps its last decision, and its averages wait.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import numpy as np

from l3rs import core
from l3rs.core import Decision, Memory, Statistics
from l3rs.layers import NetworkFacts
from l3rs.spec import Spec, Theta

NORMALISED = ("adam", "rmsprop", "lion")  # their RMS is a signal by itself
AVERAGED = ("momentum", "first_moment")  # averages of gradients: their norm over the gradient's tells the noise

POWER_DECAY = 0.999  # of the mean squared norm of a direction
_LOG_POWER_DECAY = np.float32(math.log(POWER_DECAY))
BEGAN_AT_ZERO = 0.03  # a layer whose RMS is less than this share of its natural size began at zero
ADAPTATION_LIMIT = 5.0  # |A|: a factor of 150
MOST_GROWTH = np.float32(10.0)  # of b by a leverage_floor

SIGNAL_LOG_LIMIT = -5.0  # natural logs of signals are no lower, then divided by 2
USUAL_HORIZON = np.float32(100.0)  # the horizon at which step_scale is what it says
LEVERAGE_LOG_LIMIT = 6.0
TIME_LOG_RANGE = (-2.0, 1.5)  # log10(steps / 100): 1 … 3,000 steps


class LayerMemory(NamedTuple):
    """What form 2 carries of every layer from one step to the next. L layers, P directions."""

    observed: Any  # float32 [L], steps with a gradient other than zero
    size: Any  # float32 [L], b; 0 before the first step
    from_zero: Any  # float32 [L], 1 where b is the natural size
    power: Any  # float32 [L, P], EMA of the squared norms of the directions, not bias-corrected
    reference: Any  # float32 [L, P], the norm at which a direction's signal is 1
    mix: Any  # float32 [L, P], μ of the last step with a gradient
    log_step: Any  # float32 [L], step_gain · out of that step
    adaptation: Any  # float32 [L], A


def init_layers(n_layers: int, n_directions: int, xp: Any) -> LayerMemory:
    """Before the first step."""
    single, each = xp.zeros(n_layers, xp.float32), xp.zeros((n_layers, n_directions), xp.float32)
    return LayerMemory(single, single, single, each, each, each, single, single)


def unpack(rows: np.ndarray, n_directions: int) -> LayerMemory:
    """Views of the layers' memory in float32 [L, 5 + 3P]: a layer's is one row."""
    forms = init_layers(len(rows), n_directions, np)
    ends = np.cumsum([x[0].size for x in forms])
    columns = np.split(rows, ends[:-1], axis=1)
    return LayerMemory(*(column.reshape(x.shape) for column, x in zip(columns, forms, strict=True)))


class _Kinds(NamedTuple):
    """Which directions are of a kind, as indices of columns or of [P, P]. P directions."""

    driven: slice | np.ndarray  # a gradient drives them: all but weight decay
    averaged: slice | np.ndarray  # see AVERAGED
    is_driven: np.ndarray  # float32 [P], 0 or 1
    is_normalised: np.ndarray  # bool [P], see NORMALISED
    pairs: tuple[np.ndarray, np.ndarray]  # (p, q) with p < q
    gradient: int | None  # the direction that is the gradient itself


def _kinds(spec: Spec) -> _Kinds:
    return _kinds_of(tuple(direction.name for direction in spec.directions))


@functools.cache
def _kinds_of(names: tuple[str, ...]) -> _Kinds:
    driven = np.array([name != "weight_decay" for name in names])
    averaged = np.array([name in AVERAGED for name in names])
    normalised = np.array([name in NORMALISED for name in names])
    pairs = np.triu_indices(len(names), 1)
    gradient = names.index("sgd") if "sgd" in names else None
    return _Kinds(_columns(driven), _columns(averaged), driven.astype(np.float32), normalised, pairs, gradient)


def _columns(chosen: np.ndarray) -> slice | np.ndarray:
    """An index of the chosen columns: a slice, which is cheaper, if they are next to each other."""
    indices = np.flatnonzero(chosen)
    first, end = (indices[0], indices[-1] + 1) if len(indices) else (0, 0)
    return slice(int(first), int(end)) if end - first == len(indices) else indices


def n_driven(spec: Spec) -> int:
    """How many directions a gradient drives."""
    return int(_kinds(spec).is_driven.sum())


def n_layer_features(spec: Spec) -> int:
    """How many features each layer has, besides its embedding."""
    n_averaged = sum(direction.name in AVERAGED for direction in spec.directions)
    n_pairs = len(_kinds(spec).pairs[0])
    return (2 + n_driven(spec)) + n_driven(spec) + n_averaged + n_pairs + 3 + (spec.adaptation > 0)


def n_shared_features(spec: Spec) -> int:
    """How many features all layers share: time, horizon, loss, depth, and the layers' features on average."""
    return len(core.FRACTION_CENTERS) + 2 + (2 * len(spec.loss_decays) - 1) + 1 + n_layer_features(spec)


def decide(
    theta: Theta, spec: Spec, memory: Memory, measured: Statistics, facts: NetworkFacts, total_steps: Any, xp: Any
) -> tuple[Decision, Memory]:
    """Choose a step for every layer; see `decide.decide` for arguments and result."""
    assert memory.layers is not None
    before = memory.layers
    kinds = _kinds(spec)
    has_gradient = measured.gradient_norm > 0
    layers = _observe(before, measured, has_gradient, facts, spec, kinds, xp)
    signals = measured.direction_norm * core.inverse(layers.reference, xp)
    cosines, scale = core.cosines_of(measured, xp)

    log_norms = _log_norms(measured, kinds, xp)
    averages = core.update_log_norms(memory.log_norms, log_norms, spec.norm_decays, xp)
    memory = memory._replace(
        step=memory.step + 1,
        log_norms=xp.where(has_gradient[None, :, None], averages, memory.log_norms),
        loss=core.update_loss(memory.loss, measured.loss, spec.loss_decays, xp),
        layers=layers,
    )
    own = _layer_features(spec, kinds, memory, measured, signals, cosines, xp)
    shared = _shared_features(spec, memory, own, facts, total_steps, xp)
    per_layer = xp.concatenate([own, facts.embedding], axis=1)
    mix, log_step, change = core.network(theta, spec, shared, per_layer, xp)

    waits = ~has_gradient & (layers.observed > 0)
    mix = xp.where(waits[:, None], before.mix, mix)
    log_step = xp.where(waits, before.log_step, log_step)
    adaptation = before.adaptation
    if change is not None:
        adapted = adaptation + np.float32(spec.adaptation) * xp.tanh(change)
        adapted = core.clip(adapted, -ADAPTATION_LIMIT, ADAPTATION_LIMIT, xp)
        adaptation = xp.where(has_gradient, adapted, adaptation)
    spread = math.sqrt(facts.n_matrices) if spec.depth_scaling else 1.0
    base = np.float32(spec.step_scale / spread) * measured.root_n * layers.size
    ratio = USUAL_HORIZON / total_steps.astype(xp.float32)
    base = base * (xp.sqrt(ratio) if spec.horizon_power == 0.5 else ratio**spec.horizon_power)  # √ to the last bit
    log_factor = log_step + adaptation if facts.log_factor is None else log_step + adaptation + facts.log_factor
    step_norm = base * xp.exp(log_factor) * _signal(mix, signals, spec, kinds, xp)
    used = mix
    if spec.decay_share and facts.is_head:
        used = _with_less_decay(mix, step_norm, cosines[:, :, kinds.gradient], measured, spec, kinds, xp)
        step_norm = step_norm * used.sum(1)
    coefficients = core.mixture_coefficients(used, step_norm, cosines, scale, xp)
    if spec.decrease_limit:
        promised = (coefficients * measured.gram[:, :, kinds.gradient]).sum()
        share = _allowed_share(promised, memory, spec, facts, xp)
        coefficients, step_norm = share * coefficients, share * step_norm
    decision = Decision(coefficients, mix, step_norm)
    layers = layers._replace(mix=mix, log_step=log_step, adaptation=adaptation)
    return decision, memory._replace(layers=layers)


def _observe(
    before: LayerMemory,
    measured: Statistics,
    has_gradient: Any,
    facts: NetworkFacts,
    spec: Spec,
    kinds: _Kinds,
    xp: Any,
) -> LayerMemory:
    """The memory with this step's norms in it. Without a gradient no average of it changes."""
    observed = before.observed + has_gradient
    power = POWER_DECAY * before.power + (1 - POWER_DECAY) * measured.direction_norm**2
    # 1 - POWER_DECAYⁿ without the cancellation, which would cost three digits at first.
    weight = -xp.expm1(xp.maximum(observed, 1) * _LOG_POWER_DECAY)
    usual = xp.where(kinds.is_normalised, measured.root_n[:, None], core.root(power / weight[:, None], xp))
    reference = xp.maximum(usual, measured.direction_norm)  # so that a signal is at most 1
    size, from_zero = _size(before, measured, facts, spec, xp)
    return before._replace(
        observed=observed,
        size=size,
        from_zero=from_zero,
        power=xp.where(has_gradient[:, None], power, before.power),
        reference=xp.where(has_gradient[:, None], reference, before.reference),
    )


def _size(before: LayerMemory, measured: Statistics, facts: NetworkFacts, spec: Spec, xp: Any) -> tuple[Any, Any]:
    """b, what λ is relative to, and where it is the natural size; by default as it was at a layer's first step."""
    rms = measured.parameter_norm / measured.root_n
    natural = np.float32(spec.natural_size) * facts.natural_rms
    at_zero = ~(rms >= BEGAN_AT_ZERO * natural)
    now, first = xp.where(at_zero, natural, rms), before.size == 0
    match spec.step:
        case "rms":
            size = xp.ones_like(now)
        case "relative":
            size = now
        case "initial":
            if has_floor(spec, facts):
                now = now * _growth(xp.where(at_zero, facts.natural_rms, rms), measured, spec, xp)
            size = xp.where(first, now, before.size)
    return size, xp.where(first, at_zero.astype(xp.float32), before.from_zero)


def has_floor(spec: Spec, facts: NetworkFacts) -> bool:
    """Whether the `leverage_floor` may lengthen the steps of a network."""
    return spec.leverage_floor > 0 and facts.is_head


def expected_norm(spec: Spec, facts: NetworkFacts, memory: Memory, measured: Statistics, xp: Any) -> Any:
    """The norm of each layer, float32 [L], or what a head with a `leverage_floor` is expected to have, if it is more.

    Args:
      memory: after the step.
      spec, facts, measured, xp: as for `decide`.
    """
    if not has_floor(spec, facts) or memory.layers is None:
        return measured.parameter_norm
    return xp.maximum(measured.parameter_norm, measured.root_n * memory.layers.size)


def _growth(usual: Any, measured: Statistics, spec: Spec, xp: Any) -> Any:
    """By how much every b is longer for the `leverage_floor`, float32 [] in [1, MOST_GROWTH].

    Args:
      usual: RMS of the layers, float32 [L].
      measured, spec, xp: as for `decide`.
    """
    promised = _own_promises(usual, measured).sum()
    least = np.float32(spec.leverage_floor) * xp.abs(measured.loss)
    ratio = xp.minimum(least * core.inverse(promised, xp), MOST_GROWTH)
    return xp.where((ratio > 1) & xp.isfinite(measured.loss), ratio, np.float32(1))


def _own_promises(size: Any, measured: Statistics) -> Any:
    """By how much a move by its own size, an RMS, lowers the loss by each layer's gradient at most, float32 [L]."""
    return measured.root_n * size * measured.gradient_norm


def _signal(mix: Any, signals: Any, spec: Spec, kinds: _Kinds, xp: Any) -> Any:
    """What share of its full length a step has, float32 [L]: the mean signal of what the gradient drives."""
    share = mix * kinds.is_driven
    carried = (share * signals).sum(1)
    if not spec.signal:  # for comparison: all or nothing
        return (carried > 0).astype(xp.float32)
    return carried * core.inverse(share.sum(1), xp)


def _with_less_decay(
    mix: Any, step_norm: Any, along: Any, measured: Statistics, spec: Spec, kinds: _Kinds, xp: Any
) -> Any:
    """μ with a smaller weight of weight decay where `decay_share` asks for it, float32 [L, P]; see `decide`.

    Args:
      mix, step_norm: μ and λ.
      along: cosines of the directions and the gradient, float32 [L, P].
      measured, spec, kinds, xp: as elsewhere.
    """
    decrease = (step_norm * measured.gradient_norm)[:, None] * mix * along
    achieved, undone = (decrease * kinds.is_driven).sum(), -(decrease * (1 - kinds.is_driven)).sum()
    most = np.float32(spec.decay_share) * xp.maximum(achieved, 0)
    share = xp.where(undone > most, most * core.inverse(undone, xp), np.float32(1))
    return mix * (kinds.is_driven + share * (1 - kinds.is_driven))


def _allowed_share(promised: Any, memory: Memory, spec: Spec, facts: NetworkFacts, xp: Any) -> Any:
    """What share of all steps, which promise such a decrease, `decrease_limit` allows, float32 [] in [0, 1]."""
    loss = xp.maximum(xp.abs(memory.loss.first), xp.abs(core.fast_loss(memory.loss, spec.loss_decays, xp)))
    most = np.float32(spec.decrease_limit / facts.n_matrices) * loss
    return xp.where(promised > most, most * core.inverse(promised, xp), np.float32(1))


def _log_norms(measured: Statistics, kinds: _Kinds, xp: Any) -> Any:
    """Log norms over √n, float32 [L, S]: gradient, parameters, and the directions that a gradient drives."""
    norms = [measured.gradient_norm[:, None], measured.parameter_norm[:, None]]
    norms.append(measured.direction_norm[:, kinds.driven])
    return core.safe_log(xp.concatenate(norms, axis=1) / measured.root_n[:, None], xp)


def _shared_features(spec: Spec, memory: Memory, own: Any, facts: NetworkFacts, total_steps: Any, xp: Any) -> Any:
    """What the network reads for all layers alike, float32 [F]; `own` are the layers' features, float32 [L, G]."""
    time = core.time_features(memory.step, total_steps, False, xp)
    lengths = [_log_time(steps, xp).reshape(1) for steps in (total_steps, memory.step)]
    loss = core.loss_features(memory.loss, spec.loss_decays, xp)[1:]  # without the loss itself, which has a scale
    depth = xp.asarray([min(math.log10(facts.n_matrices), 2.0)], xp.float32)
    return xp.concatenate([time, *lengths, loss, depth, own.mean(0)])


def _layer_features(
    spec: Spec, kinds: _Kinds, memory: Memory, measured: Statistics, signals: Any, cosines: Any, xp: Any
) -> Any:
    """Of every layer, float32 [L, G]:

    - fast over slow averages of its norms (log, in ±3)
    - signals of the directions (log / 2, in -2.5 … 0)
    - norms of averaged gradients over the gradient's (log, in ±3): near 0 the gradient is steady, below -1 noise
    - its RMS over b (log, in ±3), and whether it began at zero
    - its leverage √n b ‖g‖ / loss (log / 3, in ±2): the share of the loss that a step of the layer's own size promises,
      which is large where inputs are, and unlike them known
    - cosines of all pairs of directions: gradient against momentum turns negative as a step overshoots
    - A / 3
    """
    layers = memory.layers
    assert layers is not None
    changes = core.norm_changes(memory.log_norms, xp.maximum(layers.observed, 1), spec.norm_decays, xp)
    seen = xp.maximum(core.safe_log(signals[:, kinds.driven], xp), SIGNAL_LOG_LIMIT) / 2
    steadiness = measured.direction_norm[:, kinds.averaged] * core.inverse(measured.gradient_norm, xp)[:, None]
    growth = measured.parameter_norm / measured.root_n * core.inverse(layers.size, xp)
    logs = xp.concatenate([steadiness, growth[:, None]], axis=1)
    logs = core.clip(core.safe_log(logs, xp), -core.RATIO_LIMIT, core.RATIO_LIMIT, xp)
    rows, columns = kinds.pairs
    loss = xp.abs(core.fast_loss(memory.loss, spec.loss_decays, xp))
    promised = _own_promises(layers.size, measured) * core.inverse(loss, xp)
    leverage = core.clip(core.safe_log(promised, xp), -LEVERAGE_LOG_LIMIT, LEVERAGE_LOG_LIMIT, xp)[:, None] / 3
    found = [changes, seen, logs, cosines[:, rows, columns], layers.from_zero[:, None], leverage]
    if spec.adaptation > 0:
        found.append(layers.adaptation[:, None] / 3)
    return xp.concatenate(found, axis=1)


def _log_time(steps: Any, xp: Any) -> Any:
    return core.clip(xp.log10(steps.astype(xp.float32)) - 2.0, *TIME_LOG_RANGE, xp)
