"""Dtypes and shapes of parameters, and the size of the state."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import l3rs
from tests.l3rs import precision
from tests.l3rs.optimizer.common import ROUNDING, SHAPES, all_finite, assert_close, make, normal, norms, state_size


def test_low_precision_params():
    """bfloat16 and float16 in; statistics float32; the update is the float32 one, rounded once."""
    dtypes = {"a": {"bias": jnp.float16, "kernel": jnp.bfloat16}, "b": jnp.float32}
    params, grads = (jax.tree.map(lambda x, dtype: x.astype(dtype), normal(SHAPES, i), dtypes) for i in range(2))
    exact = jax.tree.map(lambda x: x.astype(jnp.float32), (params, grads))
    tx = make(params)
    update, state = jax.jit(tx.update), tx.init(params)
    updates, state = update(grads, state, params, value=jnp.bfloat16(1.0))
    expected, expected_state = update(exact[1], tx.init(exact[0]), exact[0], value=1.0)

    assert jax.tree.map(lambda x: x.dtype, updates) == jax.tree.map(jnp.dtype, dtypes)
    assert {x.dtype for x in jax.tree.leaves(state)} == {jnp.dtype("float32"), jnp.dtype("int32")}
    assert_close(state, expected_state)
    np.testing.assert_allclose(updates["b"], expected["b"], rtol=ROUNDING)
    np.testing.assert_allclose(updates["a"]["bias"].astype(jnp.float32), expected["a"]["bias"], rtol=2**-10)
    np.testing.assert_allclose(updates["a"]["kernel"].astype(jnp.float32), expected["a"]["kernel"], rtol=2**-7)


def test_float64_params():
    params = normal(SHAPES, 0)
    tx = make(params)
    with precision.x64():
        wide = jax.tree.map(lambda x: x.astype(jnp.float64), params)
        state = tx.init(wide)
        updates, after = jax.eval_shape(lambda: tx.update(wide, state, wide, value=jnp.float64(1.0)))
    assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype("float64")}
    assert jax.tree.map(lambda x: x.dtype, after) == jax.tree.map(lambda x: x.dtype, state)
    assert {x.dtype for x in jax.tree.leaves(after)} == {jnp.dtype("float32"), jnp.dtype("int32")}


def test_empty_none_and_scalar_leaves():
    params = {"empty": jnp.zeros((0, 3)), "none": None, "scalar": jnp.float32(2.0), "w": jnp.ones((2, 2))}
    grads = {"empty": jnp.zeros((0, 3)), "none": None, "scalar": jnp.float32(-3.0), "w": jnp.ones((2, 2))}
    tx = make(params)
    updates, state = jax.jit(tx.update)(grads, tx.init(params), params, value=1.0)
    assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, params)
    assert updates["none"] is None
    assert all_finite((updates, state))
    np.testing.assert_allclose(updates["scalar"], state.step_norm[1], rtol=ROUNDING)  # uphill is down
    np.testing.assert_allclose(norms(updates["w"]), state.step_norm[2], rtol=ROUNDING)
    assert all_finite(optax.apply_updates(params, updates))


def test_state_size():
    """Adam's two moments and little else: 2.01 numbers a parameter."""
    shapes = {f"layer_{i}": {"kernel": (100, 99), "bias": (100,)} for i in range(10)}
    params = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16), shapes, is_leaf=lambda x: isinstance(x, tuple)
    )
    n = sum(x.size for x in jax.tree.leaves(params))
    assert n == 100_000
    tx = make(params)
    state = jax.eval_shape(tx.init, params)
    _, after = jax.eval_shape(lambda p, s: tx.update(p, s, p, value=1.0), params, state)
    for each in (state, after):
        assert 2 * n <= state_size(each) <= 2.01 * n
        assert sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(each)) <= 2.01 * n * 4
    assert jax.tree.structure(state) == jax.tree.structure(after)


def test_init_state():
    """Nothing seen, nothing decided, float32 whatever the parameters."""
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), normal(SHAPES, 0))
    state = make(params, ("adam", "momentum", "weight_decay")).init(params)
    assert isinstance(state, l3rs.L3RSState)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(state))
    assert state.log_norms.shape == (2, 3, 5)
    assert state.mix.shape == (3, 3)
    assert state.step_norm.shape == (3,)
    assert len(state.directions) == 3
