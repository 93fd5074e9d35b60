from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import l3rs
from metatrain.inner.rollout import evaluate_split, fused_rollout
from tasks import Task, make_task, sample
from tests.metatrain.quadratic import regression


def optimizer(task: Task) -> tuple[l3rs.Spec, dict]:
    spec = l3rs.Spec.create(task.params_shape())
    return spec, l3rs.init_meta_params(jax.random.key(5), spec)


@pytest.mark.parametrize("name", ["digits", "tests.metatrain.quadratic:regression"])
def test_fused_equals_a_plain_python_loop(name: str) -> None:
    task = make_task(name)
    spec, theta = optimizer(task)
    chosen, horizon = sample(task, jax.random.key(1)), 7
    rollout = jax.jit(
        fused_rollout(task, lambda t, steps: l3rs.learned_optimizer(t, spec, steps), ("outer_valid", "test"))
    )
    found = rollout(theta, task.data, chosen, jnp.int32(horizon))

    data = jax.tree.map(jnp.asarray, task.data)
    params, stats = task.init(data, chosen.init)
    tx = l3rs.learned_optimizer(theta, spec, horizon)
    state = tx.init(params)
    gradient = jax.jit(jax.value_and_grad(task.loss, has_aux=True), static_argnums=3)
    update = jax.jit(tx.update)
    for i in range(horizon):
        batch = task.batch(data, jax.random.fold_in(jax.random.wrap_key_data(chosen.key), i))
        (value, aux), grads = gradient(params, stats, batch, True)
        updates, state = update(grads, state, params, value=value)
        params, stats = optax.apply_updates(params, updates), aux.stats
    for split in ("outer_valid", "test"):
        loss, aux = task.loss(params, stats, data[split], False)
        # float32, fused differently: rounding grows over seven steps
        np.testing.assert_allclose(found[split].loss, loss, rtol=1e-4)
        np.testing.assert_allclose(found[split].accuracy, aux.accuracy, atol=2e-3)


def test_one_compilation_serves_all_horizons_candidates_and_samples() -> None:
    task = regression()
    spec, theta = optimizer(task)
    rollout = jax.jit(fused_rollout(task, lambda t, steps: l3rs.learned_optimizer(t, spec, steps), ("test",)))
    losses = []
    for horizon in (1, 5, 40):
        theta = jax.tree.map(lambda x: x * 1.01, theta)
        losses.append(
            float(rollout(theta, task.data, sample(task, jax.random.key(horizon)), jnp.int32(horizon))["test"].loss)
        )
    assert rollout._cache_size() == 1
    assert len(set(losses)) == 3


@pytest.mark.parametrize("examples", [5, 1024, 1025, 2500])
def test_a_split_is_averaged_over_all_of_its_examples(examples: int) -> None:
    task = regression(examples=examples)
    params, stats = task.init(task.data, jnp.int32(0))
    loss, aux = task.loss(params, stats, jax.tree.map(jnp.asarray, task.data["test"]), False)
    found = jax.jit(lambda data: evaluate_split(task, data, "test", params, stats))(task.data)
    np.testing.assert_allclose(found.loss, loss, rtol=1e-5)
    np.testing.assert_allclose(found.accuracy, aux.accuracy, rtol=1e-5)


def test_the_meta_loss_reads_outer_valid_alone() -> None:
    """Poison in the test or inner_valid split changes nothing; in outer_valid it does."""
    spec, theta = optimizer(regression())

    def meta_loss(task: Task) -> float:
        rollout = fused_rollout(task, lambda t, steps: l3rs.learned_optimizer(t, spec, steps), ("outer_valid",))
        data = jax.tree.map(jnp.asarray, task.data)
        return float(rollout(theta, data, sample(task, jax.random.key(1)), jnp.int32(3))["outer_valid"].loss)

    clean = meta_loss(regression())
    assert meta_loss(regression(poison="test")) == clean
    assert meta_loss(regression(poison="inner_valid")) == clean
    assert np.isnan(meta_loss(regression(poison="outer_valid")))
