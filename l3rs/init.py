"""New meta-parameters."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from l3rs.core import n_outputs
from l3rs.decide import feature_sizes
from l3rs.descriptors import n_descriptors
from l3rs.spec import Spec, Theta, require_spec

_OUTPUT_SCALE = 1e-2  # an output layer near zero: an untrained network follows the biases


def init_meta_params(key: jax.Array, spec: Spec) -> Theta:
    """Meta-parameters whose optimizer already works: normalised steps of size `spec.step_scale`,
    mostly along the first direction.

    Args:
      key: a PRNG key.
      spec: the optimizer's spec.

    Returns:
      {"embedding": float32 [R, E], "dense_i": {"kernel": [in, out], "bias": [out]}}, where R is the number of
      layers in the table, or of descriptors. With a `layer_gain` the embedding has a further column, of zeros.
    """
    require_spec(spec)
    embedding_key, *keys = jax.random.split(key, len(spec.hidden) + 2)
    widths = [sum(feature_sizes(spec)), *spec.hidden, n_outputs(spec)]
    n_rows = len(spec.layers) if spec.embedding == "table" else n_descriptors(spec)
    rows = jax.random.normal(embedding_key, (n_rows, spec.embedding_dim), jnp.float32)
    theta: Theta = {"embedding": 0.5 * rows}
    if spec.layer_gain:
        theta["embedding"] = jnp.concatenate([theta["embedding"], jnp.zeros((n_rows, 1), jnp.float32)], axis=1)
    for i, (fan_in, fan_out) in enumerate(itertools.pairwise(widths)):
        scale = _OUTPUT_SCALE if i == len(spec.hidden) else 1.0
        kernel = jax.random.normal(keys[i], (fan_in, fan_out), jnp.float32) * np.float32(scale / np.sqrt(fan_in))
        theta[f"dense_{i}"] = {"kernel": kernel, "bias": jnp.zeros(fan_out, jnp.float32)}
    return theta
