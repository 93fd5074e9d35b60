"""Orbax: a training that is saved and continued equals an uninterrupted one."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import l3rs
from tests.integrations.common import assert_same
from tests.integrations.test_optax import PARAMS, SPEC, THETA, batch, loss_fn


@pytest.mark.parametrize("guard", [False, True])
@pytest.mark.parametrize("chained", [False, True])
def test_state_continues_bit_for_bit(tmp_path, guard, chained):
    """The whole state: moments, loss averages, the clock, the guard."""
    tx = l3rs.learned_optimizer(THETA, SPEC, 12, guard=guard)
    tx = optax.chain(optax.clip(1.0), tx) if chained else tx

    @jax.jit
    def step(params, state, x, y):
        loss, grads = jax.value_and_grad(loss_fn)(params, x, y)
        updates, state = tx.update(grads, state, params, value=loss)
        return optax.apply_updates(params, updates), state

    carry = PARAMS, tx.init(PARAMS)
    for i in range(12):
        if i == 5:
            with ocp.StandardCheckpointer() as checkpointer:
                checkpointer.save(tmp_path / "middle", {"params": carry[0], "state": carry[1]})
        carry = step(*carry, *batch(i))

    fresh = jax.eval_shape(lambda: {"params": PARAMS, "state": tx.init(PARAMS)})
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "middle", fresh)
    resumed = restored["params"], restored["state"]
    assert jax.tree.structure(resumed[1]) == jax.tree.structure(tx.init(PARAMS))
    for i in range(5, 12):
        resumed = step(*resumed, *batch(i))
    assert_same(resumed, carry)
    assert int(optax.tree.get(resumed[1], "count", filtering=_is_ours)) == 12


def _is_ours(path, value):
    del value
    return not any("directions" in str(key) or "guard" in str(key) for key in path)


def test_the_state_is_arrays_only():
    leaves = jax.tree.leaves(l3rs.learned_optimizer(THETA, SPEC, 12, guard=True).init(PARAMS))
    assert all(isinstance(leaf, jnp.ndarray) and leaf.dtype in (np.float32, np.int32) for leaf in leaves)
