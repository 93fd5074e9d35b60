"""What all baselines have in common: they are ordinary optax transformations, under jit, under vmap and in loops."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import l3rs
from l3rs import baselines
from l3rs.baselines import BASELINES
from tests.l3rs import precision
from tests.l3rs.baselines.common import ravel

EARLY = {"mada": {"start_step": 2, "history": 3}, "hyper_adam": {"start_step": 2}}  # their learning is under way
SHAPES = {"a": {"kernel": (4, 3)}, "scalar": ()}

every = pytest.mark.parametrize("name", BASELINES)


def make(name, learning_rate=0.02, **options):
    return BASELINES[name](learning_rate, **EARLY.get(name, {}), **options)


def normal(seed, dtype=np.float32):
    rng = np.random.default_rng(seed)
    is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
    return jax.tree.map(lambda shape: jnp.asarray(rng.normal(size=shape), dtype), SHAPES, is_leaf=is_shape)


def types(tree):
    """Shape, dtype and weak type: what a loop's carry must keep."""
    return jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), jax.eval_shape(lambda: tree))


def test_names():
    assert list(BASELINES) == ["mada", "hyper_adam", "avgrad", "swats", "padam", "adabound", "amsbound"]
    assert make("amsbound").init(jnp.ones(2)).nu_max is not None
    assert make("adabound").init(jnp.ones(2)).nu_max is None


@every
def test_in_a_while_loop(name):
    """As in a rollout: a traced learning rate and horizon, the loss as `value`; the result equals single steps."""

    def loss(params):
        return sum(jnp.sum((leaf - 1) ** 2) for leaf in jax.tree.leaves(params))

    def step(tx, params, state):
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params, value=value)
        return optax.apply_updates(params, updates), state

    @jax.jit
    def train(learning_rate, horizon):
        tx = make(name, learning_rate)
        start = normal(0), tx.init(normal(0))
        return jax.lax.while_loop(lambda carry: carry[1].count < horizon, lambda carry: step(tx, *carry), start)

    @jax.jit
    def one(learning_rate, params, state):
        return step(make(name, learning_rate), params, state)

    params, state = normal(0), make(name).init(normal(0))
    for _ in range(6):
        params, state = one(jnp.float32(0.02), params, state)
    for horizon in (2, 6):
        found, _ = train(jnp.float32(0.02), jnp.int32(horizon))
    np.testing.assert_allclose(ravel(found), ravel(params), rtol=1e-5, atol=1e-6)  # compiled apart
    assert train._cache_size() == one._cache_size() == 1
    assert float(loss(params)) < float(loss(normal(0)))


@every
def test_a_grid_of_learning_rates_in_one_call(name):
    """vmap over a schedule with a traced peak: each result equals that of a run alone."""

    def train(peak):
        tx = make(name, lambda count: peak * 0.9**count)
        params = normal(0)

        def step(carry, seed):
            params, state = carry
            grads = jax.tree.map(lambda p: p + jnp.sin(seed + 3 * p), params)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), jnp.arange(6.0))[0][0]

    peaks = jnp.asarray([0.001, 0.1])
    together, alone = jax.jit(jax.vmap(train))(peaks), jax.jit(train)
    for i, peak in enumerate(peaks):
        found = ravel(jax.tree.map(lambda x, i=i: x[i], together))
        np.testing.assert_allclose(found, ravel(alone(peak)), rtol=1e-5, atol=1e-6)  # compiled apart


@every
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64], ids=lambda d: d.__name__)
@pytest.mark.parametrize("x64", [False, True])
def test_dtypes(name, dtype, x64):
    """State float32, or float64 for float64 parameters, and the same after a step, weak types too;
    updates have the parameters' dtypes whatever the gradients have. The arguments are NumPy scalars."""
    if dtype == jnp.float64 and not x64:
        pytest.skip("there is no float64")
    with precision.x64(x64):
        params = normal(0, dtype)
        tx = make(name, np.float64(0.02), b1=np.float64(0.8), b2=np.float32(0.9), eps=jnp.float32(1e-6))
        state = tx.init(params)
        floats = {leaf.dtype for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.floating)}
        assert floats == {jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)}
        for grads in (params, normal(1, jnp.float32), normal(1, jnp.bfloat16)):
            updates, after = jax.eval_shape(tx.update, grads, state, params)
            assert types(after) == types(state)
            assert types(updates) == types(params)
            without, _ = jax.eval_shape(tx.update, grads, state)
            assert types(without) == types(grads)
        traced = jax.eval_shape(lambda rate, p: make(name, rate).init(p), jnp.zeros([], jnp.result_type(float)), params)
        assert types(traced) == types(make(name, 0.02).init(params))


@every
def test_low_precision_is_the_float32_update_rounded_once(name):
    tx = make(name)
    exact = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), (normal(0), normal(1)))
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), exact)
    update = jax.jit(tx.update)
    expected, expected_state = update(exact[1], tx.init(exact[0]), exact[0])
    found, state = update(rounded[1], tx.init(rounded[0]), rounded[0])
    np.testing.assert_allclose(ravel(found), ravel(expected), rtol=2**-8)  # bfloat16 keeps 8 bits
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), state, expected_state)


@every
def test_parameters_without_gradients(name):
    """None, empty and zero: no NaN, no step; 5 steps, so that MADA's coefficients move."""
    params = {"none": None, "empty": jnp.zeros((0, 3)), "zero": jnp.ones(3), "w": jnp.ones(())}
    grads = {"none": None, "empty": jnp.zeros((0, 3)), "zero": jnp.zeros(3), "w": jnp.full((), 2.0)}
    tx = make(name)
    update, state = jax.jit(tx.update), tx.init(params)
    for _ in range(5):
        updates, state = update(grads, state, params)
    assert updates["none"] is None
    assert not updates["zero"].any()
    assert float(updates["w"]) < 0
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(state))
    assert jax.tree.structure(optax.apply_updates(params, updates)) == jax.tree.structure(params)


@every
def test_a_fresh_state_can_be_donated(name):
    """No two of its arrays share a buffer: jit refuses to donate one twice."""
    leaves = jax.tree.leaves(make(name).init(normal(0)))
    assert len({leaf.unsafe_buffer_pointer() for leaf in leaves}) == len(leaves) > 4


@every
def test_a_learning_rate_of_zero_moves_nothing(name):
    tx, params = make(name, 0.0), normal(0)
    if name in ("adabound", "amsbound"):  # its lower bound is not relative to the learning rate
        tx = make(name, 0.0, final_learning_rate=0.0)
    updates, state = jax.jit(tx.update)(params, tx.init(params), params)
    assert not ravel(updates).any()
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(state))


@every
def test_bad_arguments_are_named(name):
    for bad in (-0.1, float("inf"), None, "0.1", jnp.ones(2)):
        with pytest.raises(l3rs.L3RSError, match=r"learning_rate is .*; it must be one number ≥ 0"):
            BASELINES[name](bad)
    with pytest.raises(l3rs.L3RSError, match=r"b1 is 1\.0; it must be one number in"):
        make(name, b1=1.0)


@every
def test_optax_finds_the_arrays_with_the_shape_of_params(name):
    """States are sharded or cast with `tree_map_params`: it reaches every moment, and nothing else."""
    tx, params = make(name), normal(0)
    state = tx.init(params)
    marked = optax.tree_map_params(tx, lambda _: "like the params", state, transform_non_params=lambda _: "other")
    arrays, marks = jax.tree.leaves(state), jax.tree.leaves(marked)
    sizes = [x.size for x, mark in zip(arrays, marks, strict=True) if mark == "like the params"]
    n_params = sum(leaf.size for leaf in jax.tree.leaves(params))
    others = [x.size for x, mark in zip(arrays, marks, strict=True) if mark == "other"]
    assert sum(sizes) % n_params == 0
    assert sum(sizes) >= 2 * n_params
    assert all(size in (0, 1, 3 * 7) for size in others)  # a history is three rows, or none


@every
def test_hyper_parameters_can_be_injected(name):
    """optax.inject_hyperparams traces every number among the arguments."""
    factory = {"amsbound": BASELINES["adabound"]}.get(name, BASELINES[name])
    options = {"amsbound": True} if name == "amsbound" else {}
    tx, plain = optax.inject_hyperparams(factory)(0.02, **options), factory(0.02, **options)
    params = normal(0)
    state, expected_state = tx.init(params), plain.init(params)
    update = jax.jit(tx.update)
    for seed in range(3):
        updates, state = update(normal(seed), state, params)
        expected, expected_state = plain.update(normal(seed), expected_state, params)
        np.testing.assert_allclose(ravel(updates), ravel(expected), rtol=1e-4, atol=1e-7)
    assert float(state.hyperparams["learning_rate"]) == pytest.approx(0.02)


def test_a_history_cannot_be_traced():
    tx = optax.inject_hyperparams(baselines.mada)(0.02, history=3)
    with pytest.raises(l3rs.L3RSError, match="history is traced; it must be a plain number: inject_hyperparams"):
        jax.jit(tx.init)(jnp.ones(2))
    kept = optax.inject_hyperparams(baselines.mada, static_args=("history",))(0.02, history=3)
    assert jax.jit(kept.init)(jnp.ones(2)).inner_state.history.shape == (3, 7)


def test_public_face():
    for name in baselines.__all__:
        assert name in dir(baselines)
        assert name == "BASELINES" or getattr(baselines, name).__doc__


def test_l3rs_does_not_load_baselines():
    code = "import sys, l3rs; print('l3rs.baselines' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == ["False"]
