"""Celo2 (arXiv 2602.19142) as a baseline of `metatrain evaluate`, with its published meta-parameters.

    evaluation:
      baselines:
        - {name: "examples.celo2:celo2", weights: data/celo2/theta.state, label: Celo2}

It needs the package of its authors (github.com/amoudgl/celo2) and the file `theta.state` of their repository celo2 on
Hugging Face. Celo2 has a learning rate, which is tuned here like that of every other baseline.
"""

from __future__ import annotations

import functools

import jax
import optax
from celo2_optax import load_checkpoint, scale_by_celo2

_loaded = functools.cache(load_checkpoint)


def celo2(
    learning_rate: optax.ScalarOrSchedule, *, weights: str, vector_multiplier: float = 1.0
) -> optax.GradientTransformation:
    """Celo2 for tensors of two or more axes, and Adam for the others. Its authors give embeddings to Adam, too.

    Args:
      learning_rate: of both.
      weights: file of its meta-parameters.
      vector_multiplier: Adam's learning rate over Celo2's.
    """

    def kinds(params: optax.Params) -> optax.Params:
        return jax.tree.map(lambda leaf: "celo2" if leaf.ndim >= 2 else "adam", params)

    adam = optax.chain(optax.adam(learning_rate, b1=0.9, b2=0.95), optax.scale(vector_multiplier))
    own = optax.chain(scale_by_celo2(_loaded(weights)), optax.scale_by_learning_rate(learning_rate))
    return optax.partition({"celo2": own, "adam": adam}, kinds)


celo2.learning_rate = 2.0**-9  # where the search for it begins
