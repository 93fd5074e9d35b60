"""The optimizer combined with optax's transformations and wrappers, in a real training loop."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import l3rs
from tests.integrations.common import assert_same, random_theta

PARAMS = {
    "hidden": {"kernel": np.random.default_rng(0).normal(size=(8, 16)).astype(np.float32) / 3, "bias": np.zeros(16)},
    "head": {"kernel": np.random.default_rng(1).normal(size=(16, 3)).astype(np.float32) / 4, "bias": np.zeros(3)},
}
PARAMS = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), PARAMS)
SPEC = l3rs.Spec.create(PARAMS)
THETA = random_theta(SPEC, scale=0.1)


def loss_fn(params, x, y):
    logits = jnp.tanh(x @ params["hidden"]["kernel"] + params["hidden"]["bias"]) @ params["head"]["kernel"]
    return optax.softmax_cross_entropy_with_integer_labels(logits + params["head"]["bias"], y).mean()


def batch(i, size=32):
    x = np.random.default_rng(i).normal(size=(size, 8)).astype(np.float32)
    return x, (x[:, 0] > 0).astype(int) + (x[:, 1] > 0)


def train(tx, steps=30, batches=batch):
    """(losses, params, state) of a loop whose only special argument is `value`."""

    @jax.jit
    def step(params, state, x, y):
        loss, grads = jax.value_and_grad(loss_fn)(params, x, y)
        updates, state = tx.update(grads, state, params, value=loss)
        return optax.apply_updates(params, updates), state, loss

    params, state, losses = PARAMS, tx.init(PARAMS), []
    for i in range(steps):
        params, state, loss = step(params, state, *batches(i))
        losses.append(float(loss))
    assert step._cache_size() == 1
    return losses, params, state


def test_chain():
    tx = optax.chain(
        optax.clip_by_global_norm(1.0),
        l3rs.learned_optimizer(THETA, SPEC, 30),
        optax.scale(0.9),
        optax.add_decayed_weights(-1e-4),
    )
    losses, _, _ = train(tx)
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])


def test_multi_steps():
    """Two halves of a batch give its gradient; the optimizer sees the loss of the second half."""
    whole, params, state = train(l3rs.learned_optimizer(THETA, SPEC, 30), steps=5)
    multi = optax.MultiSteps(l3rs.learned_optimizer(THETA, SPEC, 30), every_k_schedule=2).gradient_transformation()

    def halves(i):
        x, y = batch(i // 2)
        return x[i % 2 :: 2], y[i % 2 :: 2]

    losses, multi_params, multi_state = train(multi, steps=10, batches=halves)
    assert int(multi_state.inner_opt_state.count) == int(state.count) == 5
    assert float(multi_state.inner_opt_state.loss.first) == pytest.approx(losses[1])
    assert whole[0] == pytest.approx((losses[0] + losses[1]) / 2, rel=1e-5)
    # the same gradients with other losses
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=0.05), multi_params, params)


def test_inject_hyperparams():
    """The horizon as a hyperparameter in the state can change between steps without a new compilation."""

    def make(total_steps):
        return l3rs.learned_optimizer(THETA, SPEC, jnp.asarray(total_steps, jnp.int32))

    injected = optax.inject_hyperparams(make)(total_steps=30)
    losses, params, state = train(injected)
    plain_losses, plain_params, _ = train(l3rs.learned_optimizer(THETA, SPEC, 30))
    np.testing.assert_allclose(losses, plain_losses, rtol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), params, plain_params)

    update = jax.jit(injected.update)
    updates, _ = update(PARAMS, state, PARAMS, value=1.0)
    longer = state._replace(hyperparams={"total_steps": jnp.full_like(state.hyperparams["total_steps"], 3000)})
    others, _ = update(PARAMS, longer, PARAMS, value=1.0)
    assert update._cache_size() == 1
    assert not np.allclose(updates["head"]["kernel"], others["head"]["kernel"], rtol=1e-3)


def test_apply_if_finite():
    """A rejected step leaves the state unchanged."""
    tx = optax.apply_if_finite(l3rs.learned_optimizer(THETA, SPEC, 30), max_consecutive_errors=3)
    state = tx.init(PARAMS)
    bad = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), PARAMS)
    updates, after = tx.update(bad, state, PARAMS, value=1.0)
    assert_same(jax.tree.leaves(updates), [jnp.zeros_like(x) for x in jax.tree.leaves(PARAMS)])
    assert_same(after.inner_state, state.inner_state)
