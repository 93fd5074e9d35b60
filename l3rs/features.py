"""Features, version 1: what the network sees of a layer at a step.

Every feature is finite for zero, huge and non-finite inputs and clipped to the stated range.
The fraction and absolute-time features follow VeLO (arXiv 2211.09760, appendix B).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

FRACTION_CENTERS = (0.03, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 1.0, 1.1)
ABSOLUTE_SCALES = (1, 3, 10, 30, 100, 300, 1_000, 3_000, 10_000, 30_000, 100_000)

LOG_LIMIT = 20.0  # natural logs are cut to ±20 (2e-9 … 5e8): what float32 statistics can tell apart
LOG_SCALE = 5.0  # and divided by 5, so a log feature lies in [-4, 4]
RATIO_LIMIT = 3.0  # log ratios are cut to ±3 (a factor of 20)


def safe_log(x: jax.Array) -> jax.Array:
    """Natural log in [-20, 20]; 0, negative and NaN give -20, infinity gives 20."""
    tiny, huge = np.exp(-LOG_LIMIT).astype(np.float32), np.exp(LOG_LIMIT).astype(np.float32)
    return jnp.log(jnp.clip(jnp.where(jnp.isnan(x), 0.0, x), tiny, huge))


def time_features(step: jax.Array, total_steps: jax.Array, absolute: bool) -> jax.Array:
    """How far training has come.

    Args:
      step: int32 [], the step about to be taken, 1 for the first.
      total_steps: int32 [], the horizon T.
      absolute: append the absolute-step features.

    Returns:
      float32 [9] or [20], in [-1, 1]: tanh(10 (t/T - τ)) and tanh(t/τ - 1).
    """
    t = step.astype(jnp.float32)
    fraction = t / jnp.maximum(total_steps, 1).astype(jnp.float32)
    features = jnp.tanh(10.0 * (fraction - np.asarray(FRACTION_CENTERS, np.float32)))
    if absolute:
        features = jnp.concatenate([features, jnp.tanh(t / np.asarray(ABSOLUTE_SCALES, np.float32) - 1.0)])
    return features


class LossState(NamedTuple):
    """Running averages of the loss. Non-finite losses are left out of them."""

    observed: jax.Array  # int32 [], finite losses seen
    first: jax.Array  # float32 [], the first of them
    ema: jax.Array  # float32 [K], not yet bias-corrected


def init_loss(decays: Sequence[float]) -> LossState:
    return LossState(jnp.zeros([], jnp.int32), jnp.zeros([], jnp.float32), jnp.zeros([len(decays)], jnp.float32))


def update_loss(state: LossState, value: jax.Array, decays: Sequence[float]) -> LossState:
    """Take one loss (a scalar of any float dtype) into the averages."""
    value = jnp.asarray(value, jnp.float32)
    decay = jnp.asarray(decays, jnp.float32)
    seen = LossState(
        state.observed + 1,
        jnp.where(state.observed == 0, value, state.first),
        decay * state.ema + (1 - decay) * value,
    )
    finite = jnp.isfinite(value)
    return LossState(*(jnp.where(finite, new, old) for new, old in zip(seen, state, strict=True)))


def loss_features(state: LossState, decays: Sequence[float]) -> jax.Array:
    """float32 [2K]: log of the fastest EMA (in ±4); log ratios of neighbouring EMAs, fast to slow,
    and of each EMA to the first loss (in ±3). All 0 before the first finite loss."""
    decay = np.asarray(decays, np.float32)
    corrected = state.ema / jnp.maximum(1 - decay ** state.observed.astype(jnp.float32), 1e-8)
    log_ema, log_first = safe_log(corrected), safe_log(state.first)
    ratios = jnp.concatenate([log_ema[:-1] - log_ema[1:], log_ema - log_first])
    features = jnp.concatenate([log_ema[:1] / LOG_SCALE, jnp.clip(ratios, -RATIO_LIMIT, RATIO_LIMIT)])
    return jnp.where(state.observed > 0, features, 0.0)


def update_log_norms(ema: jax.Array, log_norms: jax.Array, decays: Sequence[float]) -> jax.Array:
    """EMAs of the log norms, not bias-corrected. [2, L, S] and [L, S] to [2, L, S]."""
    decay = jnp.asarray(decays, jnp.float32)[:, None, None]
    return decay * ema + (1 - decay) * log_norms


def norm_features(log_norms: jax.Array, ema: jax.Array, step: jax.Array, decays: Sequence[float]) -> jax.Array:
    """What a layer's norms are, and whether they grow.

    Args:
      log_norms: float32 [L, S], `safe_log` of each norm over √n.
      ema: float32 [2, L, S], their fast and slow EMAs including this step.
      step: int32 [], the number of values in the EMAs.
      decays: of the EMAs.

    Returns:
      float32 [L, 2S]: the log norms (in ±4), then fast minus slow EMA (in ±3).
    """
    decay = np.asarray(decays, np.float32)
    weight = jnp.maximum(1 - decay ** step.astype(jnp.float32), 1e-8)[:, None, None]
    fast, slow = ema / weight
    return jnp.concatenate([log_norms / LOG_SCALE, jnp.clip(fast - slow, -RATIO_LIMIT, RATIO_LIMIT)], axis=1)
