"""The mathematics of L3RS: from what a step measures to a coefficient for every direction.

Per layer l with directions d_p, and (μ, λ) from one MLP over the layer's features::

    unit(x) = x / ‖x‖
    Δθ_l    = -λ_l · unit( Σ_p μ_p unit(d_p) )
    λ_l     = step_scale · √n_l · exp(step_gain · out)

The norm of the mixture needs no pass of its own: with the Gram matrix G_pq = ⟨d_p, d_q⟩ it is √(aᵀGa). So an
optimizer makes one pass of reductions over the parameters (`measure`), calls `decide.decide`, and makes one pass that
updates the parameters.

All functions are pure. They take the array library as `xp`, `jax.numpy` or `numpy`: the optax and the PyTorch
optimizer share them. Every feature is finite for zero, huge and non-finite inputs, and clipped to the stated range.

References: Kristiansen et al., Narrowing the Focus: Learned Optimizers for Pretrained Models, arXiv 2408.09310; the
fraction and absolute-time features follow VeLO (arXiv 2211.09760, appendix B). The form of μ, λ and the other
features is this project's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from l3rs.guard import GuardState
from l3rs.spec import STEP_LOG_LIMIT, L3RSError, Spec, Theta

if TYPE_CHECKING:
    from l3rs.scale_free import LayerMemory

FRACTION_CENTERS = np.array([0.03, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 1.0, 1.1], np.float32)
ABSOLUTE_SCALES = np.array([1, 3, 10, 30, 100, 300, 1_000, 3_000, 10_000, 30_000, 100_000], np.float32)

LOG_LIMIT = 20.0  # natural logs are clipped to ±20 (2e-9 … 5e8), the range that float32 statistics resolve
_LEAST, _MOST = (np.exp(limit).astype(np.float32) for limit in (-LOG_LIMIT, LOG_LIMIT))
LOG_SCALE = 5.0  # and divided by 5, so a log feature lies in [-4, 4]
RATIO_LIMIT = 3.0  # log ratios are clipped to ±3 (a factor of 20)

MIN_MIX_NORM = 1e-3  # directions that cancel to less than this share of their length are not scaled up to λ
MIN_RELATIVE_RMS = 1e-3  # with step="relative", a layer of zeros counts as one of this RMS


class LossState(NamedTuple):
    """Running averages of the loss. Non-finite losses do not enter them."""

    observed: Any  # int32 [], number of finite losses so far
    first: Any  # float32 [], the first finite loss
    ema: Any  # float32 [K], not bias-corrected


class Memory(NamedTuple):
    """What `decide` carries from one step to the next. L layers, S = 2 + P norms."""

    step: Any  # int32 [], steps taken
    loss: LossState
    log_norms: Any  # float32 [2, L, S], fast and slow EMAs of the log norms, not bias-corrected
    guard: GuardState | None = None  # None: no guard
    layers: LayerMemory | None = None  # of form 2; None: form 1


class Statistics(NamedTuple):
    """What a step measures of a network. L layers, P directions."""

    loss: Any  # float32 [], the loss of this step
    steps: Any  # int32 or float32, [] or [L]: gradients that each layer has seen, including this one
    root_n: np.ndarray  # float32 [L], √ of each layer's number of parameters
    gradient_norm: Any  # float32 [L]; 0 where it is not finite
    parameter_norm: Any  # float32 [L]
    direction_norm: Any  # float32 [L, P]; 0 in a layer that does not move
    gram: Any  # float32 [L, P, P], ⟨d_p, d_q⟩; 0 in a layer that does not move
    moves: Any  # bool [L]; False where a gradient or a direction has no finite norm


class Decision(NamedTuple):
    """The step that is to be taken. L layers, P directions."""

    coefficients: Any  # float32 [L, P], c_p of the update -Σ_p c_p d_p
    mix: Any  # float32 [L, P], μ: weights of the directions, on the simplex
    step_norm: Any  # float32 [L], λ: norm of the update


def check_total_steps(total_steps: Any) -> int:
    """`total_steps` as an int.

    Raises:
      L3RSError: it is not a whole number from 1 to 2³¹ - 1.
    """
    whole = np.ndim(total_steps) == 0 and np.issubdtype(np.asarray(total_steps).dtype, np.integer)
    if not whole or not 1 <= int(total_steps) < 2**31:
        raise L3RSError(f"total_steps is {total_steps}; it must be a whole number ≥ 1")
    return int(total_steps)


def root_sizes(sizes: Sequence[int]) -> np.ndarray:
    """√n of layers with n parameters, float32 [L]; 1 for an empty layer."""
    return np.sqrt([max(size, 1) for size in sizes]).astype(np.float32)


def measure(
    loss: Any, steps: Any, root_n: np.ndarray, gradient_squared: Any, parameter_squared: Any, gram: Any, xp: Any
) -> Statistics:
    """Statistics of a step, from reductions over the parameters.

    A layer whose gradient is not finite, or so large that its squared norm is not, does not move; nor does one with
    a direction of that kind.

    Args:
      loss, steps, root_n: see `Statistics`.
      gradient_squared: float32 [L], squared norms of the gradients.
      parameter_squared: float32 [L], squared norms of the parameters.
      gram: float32 [L, P, P], inner products of the directions; anything where the gradient is not finite.
      xp: `jax.numpy` or `numpy`.
    """
    finite = xp.isfinite(gradient_squared)
    gradient_norm = root(xp.where(finite, gradient_squared, 0.0), xp)
    parameter_norm = root(parameter_squared, xp)
    moves = finite & xp.isfinite(gram).all((1, 2))  # a direction's norm can overflow, too
    gram = xp.where(moves[:, None, None], gram, 0.0)
    direction_norm = root(xp.diagonal(gram, axis1=1, axis2=2), xp)
    return Statistics(loss, steps, root_n, gradient_norm, parameter_norm, direction_norm, gram, moves)


# Features, version 1: what the network reads of a layer at a step


def feature_sizes(spec: Spec) -> tuple[int, int]:
    """How many features all layers share, F (time, loss), and how many each layer has, G (norms, embedding)."""
    time = len(FRACTION_CENTERS) + spec.absolute_time * len(ABSOLUTE_SCALES)
    return time + 2 * len(spec.loss_decays), 2 * (2 + len(spec.directions)) + spec.embedding_dim


def features(
    spec: Spec, memory: Memory, measured: Statistics, log_norms: Any, embedding: Any, total_steps: Any, xp: Any
) -> tuple[Any, Any]:
    """The inputs of the network; `feature_sizes` states their number.

    Args:
      spec, measured, embedding, total_steps, xp: see `decide`.
      memory: including this step.
      log_norms: float32 [L, S], of this step.

    Returns:
      float32 [F], shared by all layers, and float32 [L, G].
    """
    time = time_features(memory.step, total_steps, spec.absolute_time, xp)
    shared = xp.concatenate([time, loss_features(memory.loss, spec.loss_decays, xp)])
    norms = norm_features(log_norms, memory.log_norms, measured.steps, spec.norm_decays, xp)
    return shared, xp.concatenate([norms, embedding], axis=1)


def safe_log(x: Any, xp: Any) -> Any:
    """Natural log in [-20, 20]; 0, negative numbers and NaN give -20, infinity gives 20."""
    return xp.log(xp.minimum(xp.fmax(x, _LEAST), _MOST))  # fmax ignores NaN


def clip(x: Any, low: Any, high: Any, xp: Any) -> Any:
    """x in [low, high]. NumPy's own `clip` takes four times as long for the few numbers here."""
    return xp.minimum(xp.maximum(x, low), high)


def time_features(step: Any, total_steps: Any, absolute: bool, xp: Any) -> Any:
    """How far training has come.

    Args:
      step: int32 [], the step to be taken, 1 for the first.
      total_steps: int32 [], the horizon T.
      absolute: append the absolute-step features.
      xp: `jax.numpy` or `numpy`.

    Returns:
      float32 [9] or [20], in [-1, 1]: tanh(10 (t/T - τ)) and tanh(t/τ - 1).
    """
    t = step.astype(xp.float32)
    fraction = t / xp.maximum(total_steps, 1).astype(xp.float32)
    time = xp.tanh(10.0 * (fraction - FRACTION_CENTERS))
    if absolute:
        time = xp.concatenate([time, xp.tanh(t / ABSOLUTE_SCALES - 1.0)])
    return time


def init_loss(decays: Sequence[float], xp: Any) -> LossState:
    """Before the first loss."""
    return LossState(xp.zeros([], xp.int32), xp.zeros([], xp.float32), xp.zeros([len(decays)], xp.float32))


def update_loss(state: LossState, value: Any, decays: Sequence[float], xp: Any) -> LossState:
    """Add a loss, a scalar of any float dtype, to the averages."""
    value = xp.asarray(value, xp.float32)
    decay = xp.asarray(decays, xp.float32)
    added = LossState(
        state.observed + 1,
        xp.where(state.observed == 0, value, state.first),
        decay * state.ema + (1 - decay) * value,
    )
    finite = xp.isfinite(value)
    return LossState(*(xp.where(finite, new, old) for new, old in zip(added, state, strict=True)))


def loss_features(state: LossState, decays: Sequence[float], xp: Any) -> Any:
    """float32 [2K]: log of the fastest EMA (in ±4); log ratios of neighbouring EMAs, fast to slow,
    and of each EMA to the first loss (in ±3). All 0 before the first finite loss."""
    decay = np.asarray(decays, np.float32)
    corrected = state.ema / xp.maximum(1 - decay ** state.observed.astype(xp.float32), 1e-8)
    log_ema, log_first = safe_log(corrected, xp), safe_log(state.first, xp)
    ratios = xp.concatenate([log_ema[:-1] - log_ema[1:], log_ema - log_first])
    found = xp.concatenate([log_ema[:1] / LOG_SCALE, clip(ratios, -RATIO_LIMIT, RATIO_LIMIT, xp)])
    return xp.where(state.observed > 0, found, 0.0)


def fast_loss(state: LossState, decays: Sequence[float], xp: Any) -> Any:
    """The fastest EMA of the loss, bias-corrected, float32 []; NaN before the first finite loss."""
    return state.ema[0] / (1 - np.float32(decays[0]) ** state.observed.astype(xp.float32))


def layer_log_norms(measured: Statistics, xp: Any) -> Any:
    """Log of each norm over √n, float32 [L, S]: gradient, parameters, directions."""
    single = [measured.gradient_norm[:, None], measured.parameter_norm[:, None]]
    norms = xp.concatenate([*single, measured.direction_norm], axis=1)
    return safe_log(norms / measured.root_n[:, None], xp)


def update_log_norms(ema: Any, log_norms: Any, decays: Sequence[float], xp: Any) -> Any:
    """EMAs of the log norms, not bias-corrected: [2, L, S] and [L, S] to [2, L, S]."""
    decay = xp.asarray(decays, xp.float32)[:, None, None]
    return decay * ema + (1 - decay) * log_norms


def norm_features(log_norms: Any, ema: Any, steps: Any, decays: Sequence[float], xp: Any) -> Any:
    """How large a layer's norms are, and whether they grow.

    Args:
      log_norms: float32 [L, S], `safe_log` of each norm over √n.
      ema: float32 [2, L, S], their fast and slow EMAs including this step.
      steps: [] or [L], number of values in each layer's EMAs.
      decays: of the EMAs.
      xp: `jax.numpy` or `numpy`.

    Returns:
      float32 [L, 2S]: the log norms (in ±4), then fast minus slow EMA (in ±3).
    """
    return xp.concatenate([log_norms / LOG_SCALE, norm_changes(ema, steps, decays, xp)], axis=1)


def norm_changes(ema: Any, steps: Any, decays: Sequence[float], xp: Any) -> Any:
    """Fast minus slow EMA of the log norms, bias-corrected, in ±3: [2, L, S] to float32 [L, S]; see `norm_features`."""
    decay = np.asarray(decays, np.float32).reshape(2, *[1] * steps.ndim)
    weight = xp.maximum(1 - decay ** steps.astype(xp.float32), 1e-8).reshape(2, -1, 1)
    fast, slow = ema / weight
    return clip(fast - slow, -RATIO_LIMIT, RATIO_LIMIT, xp)


# The network and the step


def network(theta: Theta, spec: Spec, shared: Any, per_layer: Any, xp: Any) -> tuple[Any, Any, Any]:
    """The MLP, one forward pass for all layers.

    Args:
      theta: as `init_meta_params` makes it.
      spec: the spec of `theta`.
      shared: float32 [F], features common to all layers.
      per_layer: float32 [L, G], features and embedding of each layer.
      xp: `jax.numpy` or `numpy`.

    Returns:
      μ, weights of the directions on the simplex, float32 [L, P]; log of λ over its base, float32 [L]; and where the
      spec has an adaptation, the output that drives it, float32 [L], else None.
    """
    x = xp.concatenate([xp.broadcast_to(shared, (per_layer.shape[0], shared.shape[0])), per_layer], axis=1)
    for i in range(len(spec.hidden) + 1):
        dense = theta[f"dense_{i}"]
        x = x @ dense["kernel"] + dense["bias"]
        if i < len(spec.hidden):
            x = xp.tanh(x)
    n = len(spec.directions)
    bias = spec.mix_bias * np.where(np.arange(n) == 0, 1.0, -1.0).astype(np.float32)
    most = spec.step_limit if spec.form == 2 else STEP_LOG_LIMIT
    log_step = clip(spec.step_gain * x[:, n], -STEP_LOG_LIMIT, most, xp)
    logits = x[:, :n] + bias
    odds = xp.exp(logits - logits.max(axis=1, keepdims=True))
    return odds / odds.sum(axis=1, keepdims=True), log_step, x[:, n + 1] if n_outputs(spec) > n + 1 else None


def n_outputs(spec: Spec) -> int:
    """Outputs of the MLP: logits of μ, log of λ, and in form 2 the change of a layer's adaptation."""
    return len(spec.directions) + 1 + (spec.form == 2 and spec.adaptation > 0)


def base_norm(spec: Spec, measured: Statistics, xp: Any) -> Any:
    """What λ is relative to, float32 [L]: √n, or the norm of the parameters."""
    if spec.step == "rms":
        return xp.asarray(measured.root_n)
    return xp.maximum(measured.parameter_norm, MIN_RELATIVE_RMS * measured.root_n)


def mixture_coefficients(mix: Any, step_norm: Any, cosines: Any, scale: Any, xp: Any) -> Any:
    """λ μ_p / (‖d_p‖ ‖Σ_q μ_q unit(d_q)‖), float32 [L, P].

    A direction of norm 0 has no unit vector: its coefficient is 0.

    Args:
      mix, step_norm: see `Decision`.
      cosines, scale: see `cosines_of`.
      xp: `jax.numpy` or `numpy`.
    """
    mixed_norm = root(xp.maximum(xp.einsum("lp,lpq,lq->l", mix, cosines, mix), 0.0), xp)
    return mix * scale * (step_norm / xp.maximum(mixed_norm, MIN_MIX_NORM))[:, None]


def cosines_of(measured: Statistics, xp: Any) -> tuple[Any, Any]:
    """Between all directions, float32 [L, P, P], and 1/‖d_p‖, float32 [L, P]; 0 for a direction of norm 0."""
    scale = inverse(measured.direction_norm, xp)
    return measured.gram * scale[:, :, None] * scale[:, None, :], scale


def root(x: Any, xp: Any) -> Any:
    """√x, with a derivative of 0 at 0: gradients through an update would be NaN where a layer has norm 0."""
    if xp is np:
        return np.sqrt(x)
    return xp.where(x == 0, 0.0, xp.sqrt(xp.where(x == 0, 1.0, x)))


def inverse(x: Any, xp: Any) -> Any:
    """1/x where x > 0, else 0."""
    positive = x > 0
    return xp.where(positive, 1.0 / xp.where(positive, x, 1.0), 0.0)
