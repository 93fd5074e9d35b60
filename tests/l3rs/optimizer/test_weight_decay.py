"""Decoupled weight decay."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import l3rs
from tests.l3rs.optimizer.common import ROUNDING, SHAPES, normal, random_theta

PARAMS, GRADS = normal(SHAPES, 0), normal(SHAPES, 1)
SPEC = l3rs.Spec.create(PARAMS, hidden=(4,))


def update(**arguments):
    tx = l3rs.learned_optimizer(random_theta(SPEC), SPEC, 10, **arguments)
    updates, state = jax.jit(tx.update)(GRADS, tx.init(PARAMS), PARAMS, value=1.0)
    return jax.tree.map(np.asarray, updates), state


@pytest.mark.parametrize(
    ("mask", "decays"),
    [
        (None, [True, True, True]),
        ({"a": {"bias": False, "kernel": True}, "b": False}, [False, True, False]),
        ({"a": True, "b": False}, [True, True, False]),
        (lambda params: jax.tree.map(lambda p: p.ndim > 1, params), [False, True, False]),
    ],
    ids=["everywhere", "tree", "prefix", "function"],
)
def test_decay_is_relative_to_the_learned_step(mask, decays):
    """Δθ = the learned step - weight_decay · λ/√n · θ."""
    plain, state = update()
    found, _ = update(weight_decay=0.3, mask=mask)
    step_norm = np.asarray(state.step_norm)
    for i, (a, b, p) in enumerate(zip(*map(jax.tree.leaves, (found, plain, PARAMS)), strict=True)):
        expected = b - decays[i] * 0.3 * step_norm[i] / np.sqrt(p.size) * np.asarray(p)
        np.testing.assert_allclose(a, expected, rtol=ROUNDING, atol=1e-7)
        assert np.array_equal(a, b) != decays[i]


def test_decay_can_change_between_steps():
    def make(weight_decay):
        return l3rs.learned_optimizer(random_theta(SPEC), SPEC, 10, weight_decay=weight_decay)

    tx = optax.inject_hyperparams(make)(weight_decay=0.3)
    updates, _ = jax.jit(tx.update)(GRADS, tx.init(PARAMS), PARAMS, value=1.0)
    np.testing.assert_allclose(updates["b"], update(weight_decay=0.3)[0]["b"], rtol=ROUNDING, atol=1e-7)


@pytest.mark.parametrize("value", [-1, float("nan"), float("inf"), "0.1", True, None, np.ones(2)])
def test_values_that_are_not_allowed(value):
    with pytest.raises(l3rs.L3RSError, match="weight_decay"):
        l3rs.learned_optimizer(random_theta(SPEC), SPEC, 10, weight_decay=value)


def test_a_mask_of_another_tree():
    with pytest.raises(l3rs.L3RSError, match="mask is not a tree of bools like the params"):
        update(weight_decay=0.1, mask={"a": True})


def test_a_layer_that_does_not_move_does_not_decay():
    tx = l3rs.learned_optimizer(random_theta(SPEC), SPEC, 10, weight_decay=0.3)
    grads = {**GRADS, "b": jnp.full(5, jnp.nan)}
    updates, _ = jax.jit(tx.update)(grads, tx.init(PARAMS), PARAMS, value=1.0)
    assert not np.any(updates["b"])
