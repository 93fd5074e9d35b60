"""The warning of first steps that are too long."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import l3rs
from l3rs.first_steps import too_long
from tests.l3rs.optimizer.common import fixed_theta


def test_most_matrices_count():
    norms, matrices = np.ones(4), np.array([True, True, True, False])
    assert too_long(np.array([0.1, 0.2, 0.9, 9.0]), norms, matrices) is None
    assert "median 0.8" in too_long(np.array([0.1, 0.8, 0.9, 0.1]), norms, matrices)
    assert too_long(np.array([9.0, 9.0, 0.1, 9.0]), np.array([0.0, 0.0, 1.0, 1.0]), matrices) is None  # they are zero
    assert too_long(np.ones(4), norms, np.zeros(4, bool)) is None


def test_eager_updates_warn():
    params = {"w": jnp.ones((2, 2))}
    for scale, warned in ((3e-3, False), (3.0, True)):
        spec = l3rs.Spec.create(params, step_scale=scale, hidden=(4,))
        tx = l3rs.learned_optimizer(fixed_theta(spec), spec, 10)
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            tx.update(params, tx.init(params), params, value=1.0)
        assert any("more than half their norm" in str(each.message) for each in found) is warned
    with warnings.catch_warnings(action="error"):
        jax.jit(tx.update)(params, tx.init(params), params, value=1.0)  # its values are not known when it is traced


@pytest.mark.parametrize(("scale", "warned"), [(0.1, False), (0.4, True)])
def test_a_step_of_a_head_is_held_against_what_the_floor_expects_of_it(scale, warned):
    kernel = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)), jnp.float32)
    params = {"head": {"kernel": kernel}}
    fields = {"form": 2, "step": "initial", "embedding": "descriptor", "leverage_floor": 90.0, "step_scale": scale}
    spec = l3rs.Spec.create(params, ("adam", "sgd"), **fields)
    tx = l3rs.learned_optimizer(l3rs.init_meta_params(jax.random.key(0), spec), spec, 10)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        update, _ = tx.update(params, tx.init(params), params, value=1.0)
    assert jnp.linalg.norm(update["head"]["kernel"]) > jnp.linalg.norm(kernel)
    assert any("more than half their norm" in str(each.message) for each in found) is warned
