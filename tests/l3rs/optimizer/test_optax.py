"""The optimizer among other optax transformations and under JAX transformations."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import l3rs
from tests.l3rs.optimizer.common import SHAPES, SMALL, assert_close, make, normal, norms, random_theta, state_size


def test_chain_and_schedule(adam_sgd):
    params, tx, update = adam_sgd
    grads = normal(SHAPES, 1)
    chained = optax.chain(optax.clip_by_global_norm(1e9), tx, optax.scale(0.5))
    updates, _ = jax.jit(chained.update)(grads, chained.init(params), params, value=1.0)
    expected, _ = update(grads, tx.init(params), params, value=1.0)
    assert_close(updates, jax.tree.map(lambda u: 0.5 * u, expected))


def test_frozen_layers():
    """`masked` and `partition`: frozen layers stay and have no state; the others move as if there were no more
    layers."""
    params, grads = normal(SMALL, 0), normal(SMALL, 1)
    tx = make(params, ("adam",))
    subset = {"a": params["a"]}
    expected, _ = jax.jit(tx.update)({"a": grads["a"]}, tx.init(subset), subset, value=1.0)

    partitioned = optax.partition({"learned": tx, "frozen": optax.set_to_zero()}, {"a": "learned", "b": "frozen"})
    masked = optax.masked(tx, {"a": True, "b": False})
    for wrapped, left in ((partitioned, jnp.zeros(5)), (masked, grads["b"])):  # masked passes the others through
        state = wrapped.init(params)
        assert state_size(state) == state_size(tx.init(subset))
        updates, _ = jax.jit(wrapped.update)(grads, state, params, value=1.0)
        assert_close(updates, {"a": expected["a"], "b": left})


def test_everything_frozen():
    params = {"w": jnp.ones(3)}
    tx = optax.masked(make(params), {"w": False})
    updates, _ = tx.update(params, tx.init(params), params, value=1.0)
    assert_close(updates, params)


def test_multi_steps(adam_sgd):
    """Gradients of two mini-batches are averaged, then taken as one."""
    params, tx, update = adam_sgd
    multi = optax.MultiSteps(tx, every_k_schedule=2)
    step, state = jax.jit(multi.update), multi.init(params)
    first, second = normal(SHAPES, 1), normal(SHAPES, 2)
    updates, state = step(first, state, params, value=1.0)
    np.testing.assert_array_equal(norms(updates), 0)
    updates, state = step(second, state, params, value=1.0)
    mean = jax.tree.map(lambda x, y: (x + y) / 2, first, second)
    expected, _ = update(mean, tx.init(params), params, value=1.0)
    assert_close(updates, expected)


def test_other_extra_arguments_are_ignored(adam_sgd):
    params, tx, _ = adam_sgd
    jax.eval_shape(lambda g: tx.update(g, tx.init(params), params, value=1.0, grad=g, batch=None), params)


def test_vmap_over_meta_parameters():
    """A population in one call equals its members one by one."""
    params, grads = normal(SMALL, 0), normal(SMALL, 1)
    spec = l3rs.Spec.create(params, hidden=(4,))

    def step(theta):
        tx = l3rs.learned_optimizer(theta, spec, 10)
        return tx.update(grads, tx.init(params), params, value=1.0)

    members = [random_theta(spec, seed) for seed in range(3)]
    population = jax.jit(jax.vmap(step))(jax.tree.map(lambda *x: jnp.stack(x), *members))
    alone = jax.jit(step)
    for i, member in enumerate(members):
        assert_close(jax.tree.map(lambda x, i=i: x[i], population), alone(member), rtol=1e-4)  # batched matmul


def test_while_loop_with_a_traced_horizon():
    """The loop of meta-training: the state keeps its types, another horizon compiles nothing, and steps may go past
    it."""
    params = normal(SMALL, 0)
    spec = l3rs.Spec.create(params, hidden=(4,), absolute_time=True)
    theta = random_theta(spec)

    def loss(p):
        return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(p))

    def step(p, state, total_steps):
        value, grads = jax.value_and_grad(loss)(p)
        updates, state = l3rs.learned_optimizer(theta, spec, total_steps).update(grads, state, p, value=value)
        return optax.apply_updates(p, updates), state

    @jax.jit
    def loop(total_steps, steps):
        start = params, l3rs.learned_optimizer(theta, spec, total_steps).init(params)
        return jax.lax.while_loop(lambda c: c[1].count < steps, lambda c: step(*c, total_steps), start)

    one = jax.jit(step)
    for total_steps, steps in ((3, 3), (8, 8), (3, 5)):
        p, state = params, l3rs.learned_optimizer(theta, spec, total_steps).init(params)
        for _ in range(steps):
            p, state = one(p, state, jnp.int32(total_steps))
        found, found_state = loop(jnp.int32(total_steps), jnp.int32(steps))
        assert_close(found, p, rtol=1e-4, atol=1e-6)  # rounding fed back for a few steps
        assert int(found_state.count) == steps
    assert loop._cache_size() == 1
    assert one._cache_size() == 1


def test_horizon_matters_and_may_be_a_number_or_an_array():
    params, grads = normal({"b": (5,)}, 0), normal({"b": (5,)}, 1)
    spec = l3rs.Spec.create(params, ("adam",), hidden=(4,))
    theta = random_theta(spec)

    @jax.jit
    def traced(total_steps):
        tx = l3rs.learned_optimizer(theta, spec, total_steps)
        return tx.update(grads, tx.init(params), params, value=1.0)[0]

    expected = traced(jnp.int32(4))
    for total_steps in (4, jnp.int32(4)):
        tx = l3rs.learned_optimizer(theta, spec, total_steps)
        assert_close(jax.jit(tx.update)(grads, tx.init(params), params, value=1.0)[0], expected)
    assert not np.allclose(traced(jnp.int32(100))["b"], expected["b"], rtol=1e-3)


def test_nothing_is_compiled_twice():
    """Three steps, another horizon, another candidate, a NaN loss."""
    params = normal(SMALL, 0)
    spec = l3rs.Spec.create(params, hidden=(4,))

    @jax.jit
    def update(theta, total_steps, grads, state, p, value):
        return l3rs.learned_optimizer(theta, spec, total_steps).update(grads, state, p, value=value)

    state = l3rs.learned_optimizer(random_theta(spec), spec, 1).init(params)
    for i, value in enumerate((1.0, 0.5, np.nan)):
        theta, total_steps = random_theta(spec, seed=i), jnp.int32(10 + i)
        updates, state = update(theta, total_steps, normal(SMALL, i), state, params, jnp.float32(value))
        params = optax.apply_updates(params, updates)
    assert update._cache_size() == 1
