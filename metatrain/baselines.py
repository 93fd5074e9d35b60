"""The optimizers that L3RS is compared with, as functions of a learning rate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from l3rs.baselines import BASELINES as OWN
from metatrain.config import UserError

SCHEDULES = ("constant", "cosine", "warmup_cosine")
DEFAULT_SCHEDULES = ("constant", "cosine")
DEFAULT = ("adam", "sgdm")
_WARMUP = 0.1  # of the horizon


class Baseline(NamedTuple):
    """A family of optimizers with one learning rate to tune."""

    make: Callable[[optax.ScalarOrSchedule], optax.GradientTransformation]
    learning_rate: float  # where the search begins
    schedules: Sequence[str] = SCHEDULES  # that make sense with it


def _schedule_free(learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    """Schedule-free Adam (arXiv 2405.15682). It is judged at its average, see `deployed_params`."""
    return optax.contrib.schedule_free(optax.adam(learning_rate, b1=0.0), learning_rate, b1=0.9)


BASELINES = {
    "sgd": Baseline(optax.sgd, 2.0**-3),
    "sgdm": Baseline(lambda rate: optax.sgd(rate, momentum=0.9), 2.0**-5),
    "adam": Baseline(optax.adam, 2.0**-9),
    "adamw": Baseline(lambda rate: optax.adamw(rate, weight_decay=1e-2), 2.0**-9),
    "amsgrad": Baseline(optax.amsgrad, 2.0**-9),
    "adagrad": Baseline(optax.adagrad, 2.0**-6),
    "rmsprop": Baseline(optax.rmsprop, 2.0**-10),
    "lion": Baseline(optax.lion, 2.0**-12),
    "adan": Baseline(optax.adan, 2.0**-8),
    "yogi": Baseline(optax.yogi, 2.0**-7),
    "schedule_free": Baseline(_schedule_free, 2.0**-8, ("constant",)),
    "prodigy": Baseline(optax.contrib.prodigy, 1.0),
    # The systems of l3rs.baselines. Those that schedule themselves, or rest on a constant rate, get no other schedule.
    "mada": Baseline(OWN["mada"], 2.0**-9),
    "hyper_adam": Baseline(OWN["hyper_adam"], 2.0**-9),
    "avgrad": Baseline(OWN["avgrad"], 2.0**-9),
    "padam": Baseline(OWN["padam"], 2.0**-4),
    "adabound": Baseline(OWN["adabound"], 2.0**-9),
    "amsbound": Baseline(OWN["amsbound"], 2.0**-9),
    "swats": Baseline(OWN["swats"], 2.0**-9, ("constant",)),
}


class Tuned(NamedTuple):
    """Hyper-parameters of a baseline, arrays so that a grid of them runs in one call."""

    learning_rate: jax.Array  # float32 []
    schedule: jax.Array  # int32 [], its place in SCHEDULES

    @classmethod
    def grid(cls, rates: Sequence[float], schedule: str) -> Tuned:
        """Learning rates under one schedule; leading axis [len(rates)]."""
        return cls(jnp.asarray(rates, jnp.float32), jnp.full(len(rates), SCHEDULES.index(schedule), jnp.int32))


def make_baseline(name: str, hyper: Tuned, horizon: int | jax.Array) -> optax.GradientTransformationExtraArgs:
    """The optimizer `name` at one learning rate and schedule; `horizon` may be traced.

    constant: the rate itself. cosine: decays to zero over the horizon. warmup_cosine: rises linearly
    over the first tenth of it, at least one step, then decays to zero along a cosine.
    """
    warmup = jnp.maximum(jnp.round(_WARMUP * horizon), 1.0)

    def schedule(step: jax.Array) -> jax.Array:
        def cosine(fraction: jax.Array) -> jax.Array:
            return 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(fraction, 0.0, 1.0)))

        rising = (step + 1) / (warmup + 1)
        falling = cosine((step - warmup) / jnp.maximum(horizon - warmup, 1.0))
        factors = jnp.stack([jnp.float32(1), cosine(step / horizon), jnp.where(step < warmup, rising, falling)])
        return hyper.learning_rate * factors[hyper.schedule]

    return optax.with_extra_args_support(BASELINES[name].make(schedule))


def deployed_params(state: optax.OptState, params: Any) -> Any:
    """What an optimizer hands over at the end: the parameters, or the average that it keeps."""
    averaging = optax.contrib.ScheduleFreeState
    leaves = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, averaging))
    for leaf in leaves:
        if isinstance(leaf, averaging):
            return optax.contrib.schedule_free_eval_params(leaf, params)
    return params


def chosen_baselines(names: Sequence[str], schedules: Sequence[str]) -> dict[str, list[str]]:
    """{baseline: its schedules} to compare with; "all" stands for every baseline.

    Raises:
      UserError: a name that does not exist.
    """
    wanted = list(BASELINES) if list(names) == ["all"] else list(names)
    for kind, given, known in (("baseline", wanted, list(BASELINES)), ("schedule", schedules, SCHEDULES)):
        if unknown := [name for name in given if name not in known]:
            raise UserError(f"no {kind} {', '.join(unknown)}; allowed are {', '.join(known)}")
    return {name: [schedule for schedule in schedules if schedule in BASELINES[name].schedules] for name in wanted}
