"""The same steps in every mode of JAX, and gradients through them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import l3rs
from tests.l3rs import precision
from tests.l3rs.optimizer.common import ROUNDING, assert_close, random_theta

MODES = {
    "jax_enable_x64": True,
    "jax_numpy_rank_promotion": "raise",
    "jax_numpy_dtype_promotion": "strict",
    "jax_debug_infs": True,
    "jax_debug_nans": True,
    "jax_check_tracer_leaks": True,
}
PARAMS = {"dense": {"bias": np.zeros(3, np.float32), "kernel": np.ones((4, 3), np.float32)}}
# Some gradients are exactly zero, as of dead units; the bias has norm 0 and no gradient.
GRADS = {"dense": {"bias": np.zeros(3, np.float32), "kernel": np.float32([[1, 1, 1], [0, 0, 0], [2, 1, 0], [1, 3, 1]])}}


@pytest.fixture(params=MODES)
def mode(request):
    before = getattr(jax.config, request.param)
    jax.config.update(request.param, MODES[request.param])
    yield
    jax.config.update(request.param, before)


def loss_after_two_steps(form):
    """A function of params and gradients that trains two steps, and returns a loss and all results."""
    fields = {"form": form, "step": "initial" if form == 2 else "rms", "embedding": "descriptor", "hidden": (4,)}
    spec = l3rs.Spec.create(PARAMS, ("adam", "momentum", "weight_decay"), **fields)
    tx = l3rs.learned_optimizer(random_theta(spec), spec, 10, guard=True, weight_decay=0.1)

    def loss(params, grads):
        state = tx.init(params)
        for value in (2.0, 1.0):
            updates, state = tx.update(grads, state, params, value=value)
            params = optax.apply_updates(params, updates)
        return sum(jnp.vdot(x, x) for x in jax.tree.leaves(params)), (updates, state)

    return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))


@pytest.fixture(scope="module", params=[1, 2], ids=["form 1", "form 2"])
def expected(request):
    return request.param, jax.tree.map(np.asarray, loss_after_two_steps(request.param)(PARAMS, GRADS))


def test_gradients_through_an_update_are_finite(expected):
    _, (_, derivatives) = expected
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(derivatives))
    assert np.any(derivatives[1]["dense"]["kernel"])


@pytest.mark.usefixtures("mode")
def test_a_mode_changes_nothing(expected):
    form, values = expected
    found = jax.tree.map(np.asarray, loss_after_two_steps(form)(PARAMS, GRADS))
    assert {x.dtype for x in jax.tree.leaves(found[0][1])} <= {np.dtype("float32"), np.dtype("int32")}
    assert_close(found, values, rtol=10 * ROUNDING, atol=1e-6)


def test_init_meta_params_are_float32_with_x64():
    spec = l3rs.Spec.create(PARAMS)
    with precision.x64():
        theta = l3rs.init_meta_params(jax.random.key(0), spec)
    assert {x.dtype for x in jax.tree.leaves(theta)} == {jnp.dtype("float32")}
