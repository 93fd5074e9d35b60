"""One step of L3RS: from what it measures of a network to a coefficient for every direction."""

from __future__ import annotations

from typing import Any

import numpy as np

from l3rs import core, scale_free
from l3rs.core import Decision, LossState, Memory, Statistics
from l3rs.guard import Guard, GuardState, adam_share, advance
from l3rs.layers import NetworkFacts
from l3rs.spec import Spec, Theta


def feature_sizes(spec: Spec) -> tuple[int, int]:
    """How many features all layers share, F, and how many each layer has with its embedding, G."""
    if spec.form == 2:
        return scale_free.n_shared_features(spec), scale_free.n_layer_features(spec) + spec.embedding_dim
    return core.feature_sizes(spec)


def n_norms(spec: Spec) -> int:
    """How many norms of a layer are averaged, S: gradient, parameters, directions (in form 2 without weight decay)."""
    return 2 + (scale_free.n_driven(spec) if spec.form == 2 else len(spec.directions))


def decide(
    theta: Theta,
    spec: Spec,
    memory: Memory,
    measured: Statistics,
    facts: NetworkFacts,
    total_steps: Any,
    guard: Guard | None,
    xp: Any,
) -> tuple[Decision, Memory]:
    """Choose a step for every layer.

    Args:
      theta: the meta-parameters.
      spec: the spec of `theta`.
      memory: before this step; with a guard's state if there is a `guard`.
      measured: the statistics of this step.
      facts: what is known of the layers besides the statistics.
      total_steps: int32 [], the horizon T.
      guard: the rules by which Adam takes over, or None.
      xp: `jax.numpy` or `numpy`.

    Returns:
      The decision, and the memory after this step.
    """
    form = scale_free.decide if spec.form == 2 else _decide_form_1
    decision, memory = form(theta, spec, memory, measured, facts, total_steps, xp)
    if guard is not None and memory.guard is not None:
        watched = _watch(guard, memory.guard, memory.loss, measured.loss, spec, xp)
        memory = memory._replace(guard=watched)
        decision = _take_over(guard, watched.left > 0, decision, measured.direction_norm, spec, xp)
    return decision, memory


def _decide_form_1(
    theta: Theta, spec: Spec, memory: Memory, measured: Statistics, facts: NetworkFacts, total_steps: Any, xp: Any
) -> tuple[Decision, Memory]:
    log_norms = core.layer_log_norms(measured, xp)
    memory = memory._replace(
        step=memory.step + 1,
        log_norms=core.update_log_norms(memory.log_norms, log_norms, spec.norm_decays, xp),
        loss=core.update_loss(memory.loss, measured.loss, spec.loss_decays, xp),
    )
    shared, per_layer = core.features(spec, memory, measured, log_norms, facts.embedding, total_steps, xp)
    mix, log_step, _ = core.network(theta, spec, shared, per_layer, xp)
    step_norm = spec.step_scale * core.base_norm(spec, measured, xp) * xp.exp(log_step)
    gone = measured.gradient_norm == 0
    step_norm = xp.where(gone, step_norm * _remaining_signal(mix, measured, spec, xp), step_norm)
    coefficients = core.mixture_coefficients(mix, step_norm, *core.cosines_of(measured, xp), xp)
    return Decision(coefficients, mix, step_norm), memory


def _remaining_signal(mix: Any, measured: Statistics, spec: Spec, xp: Any) -> Any:
    """Form 1, for a layer without a gradient: what share of a step its moments still carry, float32 [L].

    Without it weight decay, or momentum that has all but vanished, would be given the whole λ. The RMS of Adam, RMSprop
    and Lion is a signal by itself; other directions have none here, as form 1 does not remember their norms.
    """
    normalised = np.array([direction.name in scale_free.NORMALISED for direction in spec.directions], np.float32)
    signal = xp.minimum(measured.direction_norm / measured.root_n[:, None], 1.0) * normalised
    return (mix * signal).sum(1)


def _watch(guard: Guard, state: GuardState, loss: LossState, value: Any, spec: Spec, xp: Any) -> GuardState:
    """Advance the guard by the fastest EMA of the loss, bias-corrected: NaN before the first finite loss."""
    ema = core.fast_loss(loss, spec.loss_decays, xp)
    return advance(guard, state, xp.asarray(value, xp.float32), ema, loss.first, xp)


def _take_over(guard: Guard, active: Any, decision: Decision, direction_norm: Any, spec: Spec, xp: Any) -> Decision:
    """Where `active`, a bool [], plain Adam's step in place of the decision."""
    adam = xp.broadcast_to(adam_share(spec), decision.mix.shape)
    return Decision(
        coefficients=xp.where(active, guard.learning_rate * adam, decision.coefficients),
        mix=xp.where(active, adam, decision.mix),
        step_norm=xp.where(active, guard.learning_rate * (adam * direction_norm).sum(1), decision.step_norm),
    )
