from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metatrain.config import OuterConfig
from metatrain.outer.strategy import Strategy, make_strategy

THETA = {"a": jnp.arange(3.0), "b": jnp.ones((2, 2))}


def strategy(**fields: object) -> Strategy:
    return make_strategy(OuterConfig.model_validate({"population": 6, "steps": 50, **fields}), THETA)


def test_open_es_members_are_mirrored_with_spread_sigma() -> None:
    es = strategy(population=400, sigma=0.2)
    population = es.ask(jax.random.key(1), es.init(jax.random.key(0), THETA))
    plus, minus = np.split(np.asarray(population["b"]), 2)
    np.testing.assert_allclose(plus - 1, 1 - minus, atol=1e-6)  # 1 + z and 1 - z, rounded
    assert np.std(plus) == pytest.approx(0.2, rel=0.1)  # 800 normal draws: standard error 2.5 %


def test_open_es_gradient_is_the_estimator_of_its_definition() -> None:
    es = strategy(learning_rate=1.0, sigma=0.1)
    key, state = jax.random.key(3), es.init(jax.random.key(0), THETA)
    population = es.ask(key, state)["a"]
    fitness = jnp.array([3.0, 1.0, 2.0, 6.0, 5.0, 4.0])
    ranks = np.array([2, 0, 1, 5, 4, 3]) / 5 - 0.5  # centred ranks, lowest loss first
    gradient = ranks @ (np.asarray(population) - np.arange(3.0))
    mean = es.mean(es.tell(key, state, fitness))["a"]
    # Adam's first step is the learning rate times the gradient's sign; it descends.
    np.testing.assert_allclose(np.asarray(mean) - np.arange(3.0), -np.sign(gradient), rtol=1e-3)


@pytest.mark.parametrize("name", ["open_es", "snes", "pgpe"])
def test_every_strategy_minimises(name: str) -> None:
    es = strategy(strategy=name, population=20, steps=100, learning_rate=0.1, sigma=0.1)
    state = es.init(jax.random.key(0), THETA)

    def loss(theta: dict) -> jax.Array:
        return jnp.sum((theta["a"] - 1) ** 2) + jnp.sum(theta["b"] ** 2)

    start = loss(es.mean(state))
    for i in range(100):
        key = jax.random.key(i)
        state = es.tell(key, state, jax.vmap(loss)(es.ask(key, state)))
    assert loss(es.mean(state)) < 0.1 * start


@pytest.mark.parametrize("name", ["open_es", "snes", "pgpe"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_fitness_ranks_worst(name: str, bad: float) -> None:
    es = strategy(strategy=name)
    key, state = jax.random.key(3), es.init(jax.random.key(0), THETA)
    fitness = jnp.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    expected = es.mean(es.tell(key, state, fitness.at[2].set(1e6)))
    found = es.mean(es.tell(key, state, fitness.at[2].set(bad)))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("name", ["open_es", "snes", "pgpe"])
def test_state_keeps_its_types_so_nothing_compiles_twice(name: str) -> None:
    es = strategy(strategy=name)
    state = es.init(jax.random.key(0), THETA)
    for i in range(3):
        before = jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), state)
        state = es.tell(jax.random.key(i), state, jnp.arange(6.0))
        assert before == jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), state)
    assert es.tell.__wrapped__._cache_size() == 1


@pytest.mark.parametrize("name", ["open_es", "snes", "pgpe"])
def test_strategies_work_where_jax_refuses_to_broadcast_ranks(name: str) -> None:
    with jax.numpy_rank_promotion("raise"):
        es = strategy(strategy=name)
        state = es.init(jax.random.key(0), THETA)
        population = es.ask(jax.random.key(1), state)
        assert population["b"].shape == (6, 2, 2)
        assert es.mean(es.tell(jax.random.key(1), state, jnp.arange(6.0)))["a"].shape == (3,)
