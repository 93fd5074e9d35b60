"""The optimizers that L3RS is compared with, as functions of a learning rate."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax


class Baseline(NamedTuple):
    """A family of optimizers with one learning rate to tune."""

    make: Callable[[optax.Schedule], optax.GradientTransformation]
    learning_rate: float  # where the search begins


BASELINES = {
    "adam": Baseline(optax.adam, 2.0**-9),
    "sgdm": Baseline(lambda learning_rate: optax.sgd(learning_rate, momentum=0.9), 2.0**-5),
}

SCHEDULES = ("constant", "cosine")


class Tuned(NamedTuple):
    """Hyper-parameters of a baseline, arrays so that a grid of them runs in one call."""

    learning_rate: jax.Array  # float32 []
    cosine: jax.Array  # float32 [], 1 for a cosine decay to zero over the horizon, 0 for none


def make_baseline(name: str, hyper: Tuned, horizon: int | jax.Array) -> optax.GradientTransformationExtraArgs:
    """The optimizer `name` at one learning rate and schedule; `horizon` may be traced."""

    def schedule(step: jax.Array) -> jax.Array:
        decayed = 0.5 * (1 + jnp.cos(jnp.pi * jnp.minimum(step / horizon, 1.0)))
        return hyper.learning_rate * jnp.where(hyper.cosine > 0, decayed, 1.0)

    return optax.with_extra_args_support(BASELINES[name].make(schedule))
