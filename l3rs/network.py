"""The MLP that maps a layer's features to direction weights μ and a step size λ."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from l3rs.layers import N_DESCRIPTORS
from l3rs.spec import Spec, Theta
from l3rs.theta import feature_sizes

_OUTPUT_SCALE = 1e-2  # an output layer near zero: an untrained network follows the biases
_STEP_LOG_LIMIT = 10.0  # λ stays within a factor e^±10 of its base


class Decision(NamedTuple):
    """What the network says for each of L layers."""

    mix: jax.Array  # float32 [L, P], weights of the directions, on the simplex
    log_step: jax.Array  # float32 [L], log of λ over its base


def init_meta_params(key: jax.Array, spec: Spec) -> Theta:
    """Meta-parameters whose optimizer already works: normalised steps of size `spec.step_scale`,
    mostly along the first direction.

    Args:
      key: a PRNG key.
      spec: the optimizer's spec.

    Returns:
      {"embedding": float32 [R, E], "dense_i": {"kernel": [in, out], "bias": [out]}}, where R is the number of
      layers in the table, or of descriptors.
    """
    embedding_key, *keys = jax.random.split(key, len(spec.hidden) + 2)
    widths = [sum(feature_sizes(spec)), *spec.hidden, len(spec.directions) + 1]
    n_rows = len(spec.layers) if spec.embedding == "table" else N_DESCRIPTORS
    rows = jax.random.normal(embedding_key, (n_rows, spec.embedding_dim), jnp.float32)
    theta: Theta = {"embedding": 0.5 * rows}
    for i, (fan_in, fan_out) in enumerate(itertools.pairwise(widths)):
        scale = _OUTPUT_SCALE if i == len(spec.hidden) else 1.0
        kernel = jax.random.normal(keys[i], (fan_in, fan_out), jnp.float32) * np.float32(scale / np.sqrt(fan_in))
        theta[f"dense_{i}"] = {"kernel": kernel, "bias": jnp.zeros(fan_out, jnp.float32)}
    return theta


def apply(theta: Theta, spec: Spec, shared: jax.Array, per_layer: jax.Array) -> Decision:
    """One forward pass for all layers.

    Args:
      theta: as `init_meta_params` makes them.
      spec: the optimizer's spec.
      shared: float32 [F], features common to all layers.
      per_layer: float32 [L, G], features and embedding of each layer.
    """
    x = jnp.concatenate([jnp.broadcast_to(shared, (per_layer.shape[0], shared.shape[0])), per_layer], axis=1)
    for i in range(len(spec.hidden) + 1):
        dense = theta[f"dense_{i}"]
        x = x @ dense["kernel"] + dense["bias"]
        if i < len(spec.hidden):
            x = jnp.tanh(x)
    bias = spec.mix_bias * np.where(np.arange(len(spec.directions)) == 0, 1.0, -1.0).astype(np.float32)
    log_step = jnp.clip(spec.step_gain * x[:, -1], -_STEP_LOG_LIMIT, _STEP_LOG_LIMIT)
    return Decision(jax.nn.softmax(x[:, :-1] + bias), log_step)
