"""The MLP against an implementation in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l3rs import core
from l3rs.init import init_meta_params
from l3rs.spec import Spec
from tests.l3rs import precision

init = jax.jit(init_meta_params, static_argnums=1)  # compiled as one: quicker than op by op
apply = jax.jit(functools.partial(core.network, xp=jnp), static_argnums=1)

PARAMS = {"a": np.zeros((4, 3)), "b": np.zeros(3), "c": np.zeros(5)}


def some_theta(spec, seed=0):
    """Random meta-parameters whose decisions differ: no bias is 0, the output layer is not small."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: init_meta_params(jax.random.key(0), spec))
    return jax.tree.map(lambda leaf: (0.4 * rng.normal(size=leaf.shape)).astype(np.float32), shapes)


def some_features(spec, seed=0):
    rng = np.random.default_rng(seed)
    shared, per_layer = core.feature_sizes(spec)
    return (
        jnp.asarray(rng.normal(size=shared), jnp.float32),
        jnp.asarray(rng.normal(size=(len(spec.layers), per_layer)), jnp.float32),
    )


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, (9 + 4, 2 * 4 + 8)),  # two loss EMAs; gradient, parameters, adam, sgd; embedding
        ({"absolute_time": True}, (20 + 4, 2 * 4 + 8)),
        ({"loss_decays": (0.5, 0.8, 0.9)}, (9 + 6, 2 * 4 + 8)),
        ({"directions": ("adam",), "embedding_dim": 3}, (9 + 4, 2 * 3 + 3)),
        ({"directions": ("adam", "sgd", "lion", "momentum", "rmsprop")}, (9 + 4, 2 * 7 + 8)),
    ],
    ids=str,
)
def test_feature_sizes(fields, expected):
    assert core.feature_sizes(Spec.create(PARAMS, **fields)) == expected


@pytest.mark.parametrize("hidden", [(), (7,), (7, 5, 6)])
def test_init_shapes(hidden):
    spec = Spec.create(PARAMS, hidden=hidden, embedding_dim=2)
    theta = jax.eval_shape(lambda: init_meta_params(jax.random.key(0), spec))
    widths = [13 + 8 + 2, *hidden, 3]
    expected = {"embedding": (3, 2)}
    for i in range(len(hidden) + 1):
        expected[f"dense_{i}"] = {"kernel": (widths[i], widths[i + 1]), "bias": (widths[i + 1],)}
    assert jax.tree.map(lambda leaf: leaf.shape, theta) == expected
    assert {leaf.dtype for leaf in jax.tree.leaves(theta)} == {jnp.dtype("float32")}


def test_init_is_a_function_of_the_key():
    spec = Spec.create(PARAMS)
    a, b, other = (jax.tree.map(np.asarray, init(jax.random.key(seed), spec)) for seed in (1, 1, 2))
    for x, y, z in zip(*map(jax.tree.leaves, (a, b, other)), strict=True):
        np.testing.assert_array_equal(x, y)
        assert not np.any(x) or not np.any(x == z)  # biases are 0, all else differs
    # no two layers of the MLP share their numbers
    assert not np.any(np.isin(a["dense_0"]["kernel"], a["dense_1"]["kernel"]))


def test_embedding_rows_differ():
    rows = np.asarray(init(jax.random.key(0), Spec.create(PARAMS))["embedding"])
    assert len(np.unique(rows, axis=0)) == 3


def test_init_is_float32_under_x64():
    with precision.x64():
        theta = jax.eval_shape(lambda: init_meta_params(jax.random.key(0), Spec.create(PARAMS)))
    assert {leaf.dtype for leaf in jax.tree.leaves(theta)} == {jnp.dtype("float32")}


def test_untrained_network_follows_the_biases():
    """μ = softmax(2, -2, …), λ at its base. The output layer is 1e-2 of a unit layer, and |tanh| < 1: a
    logit moves by N(0, 1e-2²) at most, here by less than 5 of these."""
    spec = Spec.create(PARAMS, ("sgd", "adam", "lion"))
    expected = [0.9646635, 0.0176683, 0.0176683]
    for seed in range(5):
        mix, log_step, _ = apply(init(jax.random.key(seed), spec), spec, *some_features(spec, seed))
        np.testing.assert_allclose(mix, np.tile(expected, (3, 1)), atol=0.05 * 2 * 0.02)
        np.testing.assert_allclose(log_step, 0, atol=0.05 * spec.step_gain)


@pytest.mark.parametrize("hidden", [(), (7,), (7, 5, 6)])
def test_apply_equals_numpy(hidden):
    spec = Spec.create(PARAMS, ("adam", "sgd", "lion"), hidden=hidden, mix_bias=0.7, step_gain=1.5)
    theta = some_theta(spec)
    shared, per_layer = some_features(spec)
    mix, log_step, _ = apply(theta, spec, shared, per_layer)

    for i in range(3):  # one layer at a time, in float64
        x = np.concatenate([np.asarray(shared, float), np.asarray(per_layer[i], float)])
        for j in range(len(hidden) + 1):
            x = x @ np.asarray(theta[f"dense_{j}"]["kernel"], float) + np.asarray(theta[f"dense_{j}"]["bias"], float)
            x = np.tanh(x) if j < len(hidden) else x
        logits = np.exp(x[:3] + np.array([0.7, -0.7, -0.7]))
        np.testing.assert_allclose(mix[i], logits / logits.sum(), atol=1e-5)  # float32 sums of 25 terms
        np.testing.assert_allclose(log_step[i], 1.5 * x[3], atol=1e-5)
    assert mix.std(axis=0).min() > 1e-3  # the layers get different decisions
    np.testing.assert_allclose(mix.sum(axis=1), 1, atol=1e-6)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_step_size_is_bounded(sign):
    """Whatever the weights: λ within e^±10 of its base, μ on the simplex."""
    spec = Spec.create(PARAMS)
    theta = init(jax.random.key(0), spec)
    theta["dense_2"]["bias"] = jnp.array([-1e30, 1e30, sign * 1e30])
    mix, log_step, _ = apply(theta, spec, *some_features(spec))
    np.testing.assert_array_equal(log_step, np.full(3, sign * 10))
    np.testing.assert_array_equal(mix, np.tile([0.0, 1.0], (3, 1)))
