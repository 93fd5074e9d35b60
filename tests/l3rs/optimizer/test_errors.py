"""Errors for wrong arguments."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import l3rs
from tests.l3rs.optimizer.common import (
    SHAPES,
    normal,
    random_theta,
)


@pytest.mark.parametrize("total_steps", [0, -3, np.int64(0), 0.5, float("nan"), None, "100", 10**10, np.ones(3)])
def test_total_steps_below_one(total_steps):
    spec = l3rs.Spec.create(normal(SHAPES, 0))
    with pytest.raises(l3rs.L3RSError) as error:
        l3rs.learned_optimizer(random_theta(spec), spec, total_steps)
    assert str(error.value) == f"total_steps is {total_steps}; it must be a whole number ≥ 1"


@pytest.mark.parametrize("missing", ["params", "value"])
def test_missing_arguments(adam_sgd, missing):
    params, tx, _ = adam_sgd
    arguments = {"params": params, "value": 1.0, missing: None}
    with pytest.raises(l3rs.L3RSError) as error:
        tx.update(params, tx.init(params), arguments["params"], value=arguments["value"])
    sentence = "L3RS needs the params and the loss: call update(grads, state, params, value=loss)"
    assert str(error.value) == sentence
    with pytest.raises(l3rs.L3RSError, match="value=loss"):
        tx.update(params, tx.init(params), params)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"new": np.zeros(2)}, r"layer 'new' \(2,\) is not a layer that this optimizer was meta-trained on"),
        ({"b": np.zeros(6)}, r"layer 'b' has shape \(6,\); this optimizer was meta-trained on \(5,\)"),
    ],
    ids=["unknown layer", "other shape"],
)
def test_params_of_another_network(adam_sgd, change, words):
    params, tx, _ = adam_sgd
    other = {**params, **change}
    with pytest.raises(l3rs.L3RSError, match=words):
        tx.init(other)
    with pytest.raises(l3rs.L3RSError, match=words):
        tx.update(other, tx.init(params), other, value=1.0)


def test_unknown_direction_is_refused_before_training():
    spec = l3rs.Spec.create(normal(SHAPES, 0), ("adam", "adan"))
    with pytest.raises(l3rs.L3RSError, match="unknown direction 'adan'; allowed are adam, first_moment, sgd"):
        l3rs.learned_optimizer(random_theta(spec), spec, 10)


@pytest.mark.parametrize(
    ("grads", "value", "words"),
    [
        ({"w": jnp.ones((1, 3))}, 1.0, r"gradients .*\(1, 3\) at 'w'; the params have \(4, 3\)"),
        ({}, 1.0, r"gradients lack 'w' \(4, 3\)"),
        ({"w": jnp.ones((4, 3))}, jnp.ones(1), r"value has shape \(1,\)"),
    ],
)
def test_calls_that_do_not_fit(grads, value, words):
    params = {"w": jnp.ones((4, 3))}
    spec = l3rs.Spec.create(params)
    tx = l3rs.learned_optimizer(l3rs.init_meta_params(jax.random.key(0), spec), spec, 10)
    with pytest.raises(l3rs.L3RSError, match=words):
        tx.update(grads, tx.init(params), params, value=value)


def test_theta_of_another_spec():
    spec, other = (l3rs.Spec.create({"w": jnp.ones(3)}, hidden=hidden) for hidden in ((4,), (5,)))
    with pytest.raises(l3rs.L3RSError, match="its spec needs float32"):
        l3rs.learned_optimizer(l3rs.init_meta_params(jax.random.key(0), spec), other, 10)
