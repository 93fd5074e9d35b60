"""Evolution strategies of evosax, as pure functions."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import l3rs
from l3rs.modes import usual_promotion
from l3rs.spec import Theta
from metatrain.config import OuterConfig

State = Any  # the strategy's own state, a pytree of arrays


class Strategy(NamedTuple):
    """A strategy over pytrees of meta-parameters. It minimises."""

    init: Callable[[jax.Array, Theta], State]  # (key, mean) -> state
    ask: Callable[[jax.Array, State], Theta]  # (key, state) -> population, leading axis [population]
    tell: Callable[[jax.Array, State, jax.Array], State]  # (key of ask, state, fitness [population]) -> state
    mean: Callable[[State], Theta]  # the distribution's mean, which is deployed


def state_like(strategy: Strategy, spec: l3rs.Spec) -> State:
    """Shapes and types of a strategy's state, for meta-parameters of a form: what restores a saved one."""
    key = jax.random.key(0)
    return jax.eval_shape(strategy.init, key, l3rs.init_meta_params(key, spec))


def make_strategy(config: OuterConfig, theta: Theta) -> Strategy:
    """Build a strategy. Its functions are pure and jitted.

    A non-finite fitness ranks worst. The state consists of arrays whose types never change, so nothing
    is compiled twice and all of it can be saved.

    Args:
      config: the section `outer`.
      theta: meta-parameters of the right structure.
    """
    # Imported here because evosax computes with JAX when imported, which fixes the number of devices.
    import evosax.algorithms as es

    schedule = optax.cosine_decay_schedule(config.learning_rate, config.steps)
    optimizer = optax.adam(schedule)
    algorithm: Any
    if config.strategy == "open_es":
        spread = optax.constant_schedule(config.sigma)
        algorithm = es.Open_ES(config.population, theta, optimizer=optimizer, std_schedule=spread)
        params = algorithm.default_params
    else:
        algorithm = {"snes": es.SNES, "pgpe": es.PGPE}[config.strategy](config.population, theta, optimizer=optimizer)
        params = algorithm.default_params.replace(std_init=config.sigma)

    # evosax broadcasts and mixes types, which a user's JAX_NUMPY_RANK_PROMOTION=raise and …DTYPE_PROMOTION=strict would
    # refuse.
    @usual_promotion()
    def init(key: jax.Array, mean: Theta) -> State:
        return _strong(algorithm.init(key, mean, params))

    @usual_promotion()
    def ask(key: jax.Array, state: State) -> Theta:
        return _float32(algorithm.ask(key, state, params)[0])

    @usual_promotion()
    def tell(key: jax.Array, state: State, fitness: jax.Array) -> State:
        population = ask(key, state)
        fitness = jnp.where(jnp.isfinite(fitness), fitness, jnp.nan)
        return _strong(algorithm.tell(key, population, fitness, state, params)[0])

    return Strategy(
        init=_with_infinities(jax.jit(init)),
        ask=_with_infinities(jax.jit(ask)),
        tell=_with_infinities(jax.jit(tell)),
        mean=jax.jit(lambda state: _float32(algorithm.get_mean(state))),
    )


def _with_infinities(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of evosax, whose best fitness is infinite at first, under JAX_DEBUG_INFS and JAX_DEBUG_NANS, too."""

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        with jax.debug_infs(False), jax.debug_nans(False):
            return function(*args)

    return call


def mean_ranks(losses: np.ndarray) -> np.ndarray:
    """One fitness per member from its losses in several draws, whose scales may differ.

    Args:
      losses: [draws, population]; non-finite ones rank worst.

    Returns:
      The mean of a member's ranks within each draw, 0 for the lowest loss; equal losses share the mean of their ranks.
      float32 [population].
    """
    ranks = []
    for row in np.where(np.isfinite(losses), losses, np.inf):
        ordered = np.sort(row)
        ranks.append((np.searchsorted(ordered, row) + np.searchsorted(ordered, row, "right") - 1) / 2)
    return np.mean(ranks, axis=0).astype(np.float32)


def _float32(theta: Theta) -> Theta:
    """With jax_enable_x64, evosax computes in float64."""
    return jax.tree.map(lambda x: x.astype(jnp.float32), theta)


def _strong(state: State) -> State:
    """Remove weak types: a weakly typed scalar would cause a second compilation."""
    return jax.tree.map(lambda x: jax.lax.convert_element_type(x, jnp.asarray(x).dtype), state)
