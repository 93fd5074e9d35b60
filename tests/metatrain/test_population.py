from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import pytest

import l3rs
from metatrain.config import Plan
from metatrain.inner.device_runner import fitness_by_halves
from metatrain.inner.population import Draw, GenerationSpec, LocalEvaluator
from metatrain.outer.strategy import make_strategy
from tasks import sample
from tests.metatrain.common import small_config
from tests.metatrain.quadratic import regression

ROOT = Path(__file__).parents[2]


def evaluator(
    devices: list[jax.Device], population: int = 8, members: int = 2, plan: Plan = "fused"
) -> tuple[LocalEvaluator, object]:
    task = regression()
    spec = l3rs.Spec.create(task.params_shape(), hidden=(4,), embedding_dim=2)
    theta = l3rs.init_meta_params(jax.random.key(0), spec)
    strategy = make_strategy(small_config(outer={"population": population}).outer, theta)
    state = strategy.init(jax.random.key(0), theta)
    with mock.patch("jax.local_devices", return_value=devices):
        return LocalEvaluator([task], spec, strategy, population, members, plan), state


def generation(number: int = 0, horizon: int = 5) -> GenerationSpec:
    key = jax.random.key(number)
    return GenerationSpec(number, jax.random.key_data(key), (Draw(sample(regression(), key), horizon),))


def test_fitness_does_not_depend_on_the_number_of_devices() -> None:
    results = []
    for count in (1, 2):
        local, state = evaluator(jax.devices()[:count])
        results.append(local.evaluate(state, generation()))
        local.close()
    assert len(jax.devices()) >= 2
    np.testing.assert_array_equal(results[0], results[1])
    assert len(set(results[0][0].tolist())) == 8  # members differ


def test_a_population_that_the_chunk_does_not_divide() -> None:
    whole, state = evaluator(jax.devices()[:1], population=6, members=4)
    fitness = whole.evaluate(state, generation())
    assert fitness.shape == (1, 6)
    assert np.isfinite(fitness).all()
    # In chunks of another size only the last bits may differ.
    other, state = evaluator(jax.devices()[:1], population=6, members=3)
    np.testing.assert_allclose(other.evaluate(state, generation()), fitness, rtol=1e-5)


def test_members_share_start_and_batches() -> None:
    """Common random numbers: members with equal meta-parameters have equal fitness."""
    local, state = evaluator(jax.devices()[:1])
    still = state.replace(std=np.float32(0.0))
    fitness = local.evaluate(still, generation())
    assert len(set(fitness[0].tolist())) == 1
    assert local.evaluate(still, generation(1))[0, 0] != fitness[0, 0]


def test_one_compilation_a_device_for_all_generations() -> None:
    local, state = evaluator(jax.devices()[:1])
    for number, horizon in enumerate((3, 9, 4)):
        local.evaluate(state, generation(number, horizon))
    assert local._calls[0]._cache_size() == 1


def test_chunks_that_do_not_fit_the_memory_are_halved() -> None:
    calls = []

    def call(members: np.ndarray) -> np.ndarray:
        calls.append(len(members))
        if len(members) > 3:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes.")
        return members * 2.0

    fitness, chunk = fitness_by_halves(call, np.arange(5, 15), 10)
    np.testing.assert_array_equal(fitness, np.arange(5, 15) * 2)
    assert fitness.dtype == np.float32
    assert (chunk, calls) == (3, [10, 5, 3, 3, 3, 3])
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        fitness_by_halves(lambda _: _raise("INTERNAL: something else"), np.arange(4), 4)
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        fitness_by_halves(lambda _: _raise("RESOURCE_EXHAUSTED"), np.arange(4), 1)


def _raise(message: str) -> np.ndarray:
    raise jax.errors.JaxRuntimeError(message)


@pytest.mark.slow
def test_xla_out_of_memory_is_recognised() -> None:
    """A real allocation that fails, in a process whose memory is limited."""
    code = """
import resource, jax, jax.numpy as jnp, numpy as np
from metatrain.inner.device_runner import fitness_by_halves
jax.config.update("jax_num_cpu_devices", 1)
call = jax.jit(lambda members: jnp.cumsum(jnp.ones((members.shape[0], 2**27)) * members[:, None], axis=1)[:, 0])
call(np.arange(1.0)).block_until_ready()
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 5 * 2**30, -1))
print(fitness_by_halves(lambda m: np.asarray(call(m)), np.arange(8.0), 8)[1])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) in (1, 2, 4)
