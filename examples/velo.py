"""VeLO (arXiv 2211.09760) as a baseline of `metatrain evaluate`, with its published meta-parameters.

    evaluation:
      baselines:
        - {name: "examples.velo:velo", weights: data/velo/params, learning_rate: 1, schedules: [constant], label: VeLO}

It needs Google's package learned_optimization, from its source (github.com/google/learned_optimization): the release of
that name has no VeLO. WEIGHTS is the file `params` of its pretrained optimizer
aug12_continue_on_bigger_2xbs_200kstep_bigproblem_v2_5620, from gs://gresearch/learned_optimization/pretrained_lopts,
with the file `config.gin` beside it. VeLO has no learning rate to tune: 1 is its own step. The package is not thread
safe: evaluate on one device.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import optax
from learned_optimization.learned_optimizers.opt_from_checkpoint import opt_from_checkpoint
from learned_optimization.research.general_lopt import hyper_v2  # noqa: F401  which the configuration names

_loaded = functools.cache(opt_from_checkpoint)


def velo(
    learning_rate: optax.ScalarOrSchedule = 1.0, *, total_steps: int | jax.Array, weights: str
) -> optax.GradientTransformationExtraArgs:
    """VeLO for a training of `total_steps`; its update needs the loss of the batch, `value`."""
    own, unused = _loaded(weights), jax.random.PRNGKey(0)

    def init(params: optax.Params) -> Any:
        return own.set_params(own.init(params, num_steps=total_steps, key=unused), ())

    def update(
        gradients: optax.Updates, state: Any, params: optax.Params, *, value: jax.Array, **_: Any
    ) -> tuple[optax.Updates, Any]:
        after = own.update(own.set_params(state, params), gradients, loss=value, key=unused)
        step = optax.tree.sub(own.get_params(after), params)
        return step, own.set_params(after, ())

    transformation = optax.GradientTransformationExtraArgs(init, update)
    return optax.chain(transformation, optax.scale_by_learning_rate(learning_rate, flip_sign=False))


velo.learning_rate = 1.0  # where the search for a multiplier of its steps begins
