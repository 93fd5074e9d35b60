from __future__ import annotations

import jax
import numpy as np

import l3rs
from metatrain.population import GenerationSpec, LocalEvaluator
from metatrain.rollout import Plan
from metatrain.strategy import make_strategy
from tasks import sample
from tests.metatrain.common import small_config
from tests.metatrain.quadratic import regression


def evaluator(
    devices: list[jax.Device], population: int = 8, members: int = 2, plan: Plan = "fused"
) -> tuple[LocalEvaluator, object]:
    task = regression()
    spec = l3rs.Spec.create(task.params_shape(), hidden=(4,), embedding_dim=2)
    theta = l3rs.init(jax.random.key(0), spec)
    strategy = make_strategy(small_config(outer={"population": population}).outer, theta)
    state = strategy.init(jax.random.key(0), theta)
    return LocalEvaluator(task, spec, strategy, population, members, plan, devices), state


def generation(number: int = 0, horizon: int = 5) -> GenerationSpec:
    key = jax.random.key(number)
    return GenerationSpec(number, jax.random.key_data(key), sample(regression(), key), horizon)


def test_fitness_does_not_depend_on_the_number_of_devices() -> None:
    results = []
    for count in (1, 2):
        local, state = evaluator(jax.devices()[:count])
        results.append(local.evaluate(state, generation()))
        local.close()
    assert len(jax.devices()) >= 2
    np.testing.assert_array_equal(results[0], results[1])
    assert len(set(results[0].tolist())) == 8  # members differ


def test_a_population_that_the_chunk_does_not_divide() -> None:
    whole, state = evaluator(jax.devices()[:1], population=6, members=4)
    fitness = whole.evaluate(state, generation())
    assert fitness.shape == (6,)
    assert np.isfinite(fitness).all()
    # In chunks of another size the last bits may differ, no more.
    other, state = evaluator(jax.devices()[:1], population=6, members=3)
    np.testing.assert_allclose(other.evaluate(state, generation()), fitness, rtol=1e-5)


def test_members_share_start_and_batches() -> None:
    """Common random numbers: members with equal meta-parameters have equal fitness."""
    local, state = evaluator(jax.devices()[:1])
    still = state.replace(std=np.float32(0.0))
    fitness = local.evaluate(still, generation())
    assert len(set(fitness.tolist())) == 1
    assert local.evaluate(still, generation(1))[0] != fitness[0]


def test_one_compilation_a_device_for_all_generations() -> None:
    local, state = evaluator(jax.devices()[:1])
    for number, horizon in enumerate((3, 9, 4)):
        local.evaluate(state, generation(number, horizon))
    assert local._call._cache_size() == 1
