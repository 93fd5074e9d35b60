"""Gradients and losses that are zero, huge or not finite."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.l3rs.optimizer.common import (
    ROUNDING,
    SHAPES,
    all_finite,
    assert_close,
    make,
    normal,
    norms,
)


def test_zero_gradients(adam_sgd):
    params, tx, update = adam_sgd
    zeros = jax.tree.map(jnp.zeros_like, params)
    state = tx.init(params)
    for _ in range(2):
        updates, state = update(zeros, state, params, value=1.0)
        np.testing.assert_array_equal(norms(updates), 0)
        assert all_finite(state)
    updates, state = update(normal(SHAPES, 1), state, params, value=1.0)
    np.testing.assert_allclose(norms(updates), state.step_norm, rtol=ROUNDING)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e30])  # the square of 1e30 is not finite
def test_bad_gradient_in_one_layer(adam_sgd, bad):
    """That layer does not move in the step, and its gradient counts as zero; the others are not affected."""
    params, tx, update = adam_sgd
    _, state = update(normal(SHAPES, 1), tx.init(params), params, value=1.0)
    grads = normal(SHAPES, 2)
    zeroed = {**grads, "b": jnp.zeros(5)}
    updates, after = update({**grads, "b": grads["b"].at[1].set(bad)}, state, params, value=1.0)
    expected, expected_state = update(zeroed, state, params, value=1.0)

    np.testing.assert_array_equal(updates["b"], np.zeros(5))
    assert all_finite(after)
    assert_close(updates["a"], expected["a"], rtol=0, atol=0)
    assert np.all(norms(updates["a"]) > 0)
    assert_close(after.directions, expected_state.directions, rtol=0, atol=0)

    updates, after = update(normal(SHAPES, 3), after, params, value=1.0)  # and training continues
    np.testing.assert_allclose(norms(updates), after.step_norm, rtol=ROUNDING)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_bad_loss_is_left_out(adam_sgd, bad):
    params, tx, update = adam_sgd
    _, state = update(normal(SHAPES, 1), tx.init(params), params, value=2.0)
    updates, after = update(normal(SHAPES, 2), state, params, value=bad)
    assert all_finite((updates, after))
    assert_close(after.loss, state.loss, rtol=0, atol=0)
    np.testing.assert_allclose(norms(updates), after.step_norm, rtol=ROUNDING)


@settings(max_examples=60, deadline=None, database=None, derandomize=True)
@given(numbers=st.lists(st.floats(width=32), min_size=6, max_size=6), value=st.floats(width=32))
def test_no_gradient_or_loss_makes_a_nan(adam_sgd, numbers, value):
    """Two steps with any float32 in the smallest layer."""
    params, tx, update = adam_sgd
    state = tx.init(params)
    for i in range(2):
        grads = normal(SHAPES, 1)
        grads["a"]["bias"] = jnp.asarray(numbers[3 * i : 3 * i + 3], jnp.float32)
        updates, state = update(grads, state, params, value=jnp.float32(value))
        assert all_finite((updates, state))
        # λ; or less, or 8 % more, where squares lose their bits to underflow
        assert np.all(norms(updates) <= np.asarray(state.step_norm) * 1.1)


def test_direction_too_large_to_square():
    """The gradient's square is finite, that of the momentum that it accumulates to is not."""
    params = {"w": jnp.ones(4)}
    tx = make(params, ("adam", "momentum"))
    update, state = jax.jit(tx.update), tx.init(params)
    for _ in range(3):
        updates, state = update({"w": jnp.full(4, 6e18)}, state, params, value=1.0)
        assert all_finite(updates)
