"""The optimizer: against a hand-written normalised Adam, against its own formula in NumPy, and as an
optax transformation among others."""

import dataclasses
import doctest
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import l3rs
from l3rs import optimizer
from l3rs.transforms import make_direction

# The same float32 sums, compiled or ordered in another way.
ROUNDING = 1e-5

SHAPES = {"a": {"bias": (3,), "kernel": (4, 3)}, "b": (5,)}
SMALL = {"a": (4, 3), "b": (5,)}  # quicker to compile


def normal(shapes, seed, scale=1.0):
    """A tree of float32 arrays of the given shapes."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(scale * rng.normal(size=shape), jnp.float32),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def random_theta(spec, seed=0, scale=0.4):
    """Meta-parameters far from their start: every layer decides something else."""
    shapes = jax.tree.map(
        lambda leaf: leaf.shape, jax.eval_shape(lambda: l3rs.init_meta_params(jax.random.key(0), spec))
    )
    return normal(shapes, seed, scale)


def fixed_theta(spec, output_bias=None):
    """Meta-parameters that ignore every feature: the output layer has only its bias, [P + 1]."""
    theta = random_theta(spec)
    last = theta[f"dense_{len(spec.hidden)}"]
    last["kernel"] = jnp.zeros_like(last["kernel"])
    last["bias"] = jnp.zeros_like(last["bias"]) if output_bias is None else jnp.asarray(output_bias, jnp.float32)
    return theta


def make(params, directions=("adam", "sgd"), total_steps=10, **fields):
    spec = l3rs.Spec.create(params, directions, **{"hidden": (4,), **fields})
    return l3rs.learned_optimizer(random_theta(spec), spec, total_steps)


def norms(tree):
    return np.array([np.linalg.norm(np.asarray(leaf, np.float64)) for leaf in jax.tree.leaves(tree)])


def assert_close(a, b, rtol=ROUNDING, atol=1e-9):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b)


def state_size(state):
    return sum(leaf.size for leaf in jax.tree.leaves(state))


def all_finite(tree):
    return all(bool(np.all(np.isfinite(leaf))) for leaf in jax.tree.leaves(tree))


@pytest.fixture(scope="module")
def adam_sgd():
    """(params, tx, jitted update) of the default directions, compiled once for this module."""
    params = normal(SHAPES, 0)
    tx = make(params)
    return params, tx, jax.jit(tx.update)


# What it computes


def test_adam_alone_with_fixed_step_is_normalised_adam():
    """50 steps on a quadratic, beside optax's Adam with each layer's step scaled to 0.01 √n."""
    params, target = normal(SHAPES, 0), normal(SHAPES, 1)
    spec = l3rs.Spec.create(params, ("adam",), step_scale=0.01)
    ours, adam = l3rs.learned_optimizer(fixed_theta(spec), spec, 50), optax.scale_by_adam()

    def loss(p):
        return sum(jnp.sum((x - y) ** 2) for x, y in zip(jax.tree.leaves(p), jax.tree.leaves(target), strict=True))

    @jax.jit
    def step(p, state, q, adam_state):
        value, grads = jax.value_and_grad(loss)(p)
        updates, state = ours.update(grads, state, p, value=value)
        p = optax.apply_updates(p, updates)
        d, adam_state = adam.update(jax.grad(loss)(q), adam_state, q)
        q = jax.tree.map(lambda x, y: x - 0.01 * np.sqrt(x.size) * y / jnp.linalg.norm(y), q, d)
        return p, state, q, adam_state

    p, state, q, adam_state = params, ours.init(params), params, adam.init(params)
    for _ in range(50):
        p, state, q, adam_state = step(p, state, q, adam_state)
    assert_close(p, q, rtol=1e-5, atol=1e-6)  # 50 roundings of numbers of order one
    assert loss(p) < 0.7 * loss(params)
    assert int(state.count) == 50


def test_untrained_is_nearly_normalised_adam():
    """The bound: 1.8 % of plain gradient turns the step by less than 0.02 rad, the output layer's 1e-2
    changes its length by less than exp(2·0.05)."""
    params = normal(SHAPES, 0)
    spec = l3rs.Spec.create(params)
    init = jax.jit(l3rs.init_meta_params, static_argnums=1)
    adam = make_direction(l3rs.Direction("adam")).transform

    @jax.jit
    def both(theta, grads):
        tx = l3rs.learned_optimizer(theta, spec, 100)
        updates, _ = tx.update(grads, tx.init(params), params, value=1.0)
        return updates, adam.update(grads, adam.init(params))[0]

    for seed in range(3):
        ours, reference = both(init(jax.random.key(seed), spec), normal(SHAPES, 10 + seed))
        for u, d in zip(jax.tree.leaves(ours), jax.tree.leaves(reference), strict=True):
            cosine = -np.vdot(u, d) / np.linalg.norm(u) / np.linalg.norm(d)
            assert np.cos(0.03) < cosine <= 1 + 1e-6
            np.testing.assert_allclose(np.linalg.norm(u), 3e-3 * np.sqrt(u.size), rtol=0.1)


@pytest.mark.parametrize(
    "directions",
    [
        ("lion",),
        ("adam", "sgd"),
        ("rmsprop", {"name": "adam", "b1": 0.5}, "momentum"),
        ("adam", "sgd", "momentum", "lion", "weight_decay"),
    ],
    ids=len,
)
def test_update_is_the_formula(directions):
    """-λ unit(Σ μ unit(d)) with the directions taken from the base optimizers by themselves, in float64;
    so ‖Δθ_l‖ = λ_l, though the optimizer only ever sees the Gram matrix."""
    params = normal(SHAPES, 0)
    tx = make(params, directions)
    update, state = jax.jit(tx.update), tx.init(params)
    bases = [make_direction(l3rs.Direction.parse(d)) for d in directions]
    moments = [base.transform.init(params) for base in bases]
    seen = []
    for i in range(3):
        grads = normal(SHAPES, 10 + i, scale=10.0 ** (2 * i - 2))
        updates, state = update(grads, state, params, value=1.0)
        d = []
        for p, base in enumerate(bases):
            moved, moments[p] = base.transform.update(grads, moments[p], params)
            d.append([lazy.compute(*lazy.operands) for lazy in base.read(moved, moments[p], grads)])

        mix, step_norm = np.asarray(state.mix, np.float64), np.asarray(state.step_norm, np.float64)
        assert mix.shape == (3, len(directions))
        assert np.all(mix >= 0)
        np.testing.assert_allclose(mix.sum(axis=1), 1, atol=1e-6)
        np.testing.assert_allclose(norms(updates), step_norm, rtol=ROUNDING)
        for j, update_j in enumerate(jax.tree.leaves(updates)):
            units = [np.asarray(d_p[j], np.float64) / np.linalg.norm(np.asarray(d_p[j], np.float64)) for d_p in d]
            mixed = sum(m * unit for m, unit in zip(mix[j], units, strict=True))
            expected = -step_norm[j] * mixed / np.linalg.norm(mixed)
            np.testing.assert_allclose(update_j, expected, rtol=1e-4, atol=1e-5 * step_norm[j])
        params = optax.apply_updates(params, updates)
        seen.append(step_norm)
    assert np.std(seen) > 0  # λ is the network's, not a constant


def test_decision_is_the_network_of_the_documented_features():
    """μ and λ after three steps, from the definition of every feature, in float64."""
    params, horizon, losses = normal(SHAPES, 0), 7, [3.0, np.nan, 2.0]
    spec = l3rs.Spec.create(params, hidden=(6,), embedding_dim=2, absolute_time=True)
    theta = random_theta(spec)
    tx = l3rs.learned_optimizer(theta, spec, horizon)
    update, state = jax.jit(tx.update), tx.init(params)

    w = jax.tree.map(lambda x: np.asarray(x, np.float64), theta)
    n = np.array([3, 12, 5])
    first, finite_losses, m, v = 3.0, [], [0, 0, 0], [0, 0, 0]
    log_ema = np.zeros((2, 3, 4))
    for i, value in enumerate(losses):
        t = i + 1
        grads = normal(SHAPES, 20 + i)
        _, state = update(grads, state, params, value=value)

        g = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(grads)]
        m = [0.9 * a + 0.1 * b for a, b in zip(m, g, strict=True)]
        v = [0.999 * a + 0.001 * b**2 for a, b in zip(v, g, strict=True)]
        adam = [a / (1 - 0.9**t) / (np.sqrt(b / (1 - 0.999**t)) + 1e-8) for a, b in zip(m, v, strict=True)]

        tau = np.array([0.03, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 1, 1.1])
        scales = np.array([1, 3, 10, 30, 100, 300, 1e3, 3e3, 1e4, 3e4, 1e5])
        finite_losses += [value] if np.isfinite(value) else []
        fast, slow = (
            sum((1 - b) * b ** (len(finite_losses) - 1 - k) * x for k, x in enumerate(finite_losses))
            / (1 - b ** len(finite_losses))
            for b in (0.8, 0.97)
        )
        shared = [
            *np.tanh(10 * (t / horizon - tau)),
            *np.tanh(t / scales - 1),
            np.log(fast) / 5,
            np.log(fast / slow),
            np.log(fast / first),
            np.log(slow / first),
        ]
        log_norms = np.log(np.stack([norms(g), norms(params), norms(adam), norms(g)], axis=1) / np.sqrt(n)[:, None])
        for k, b in enumerate((0.8, 0.97)):
            log_ema[k] = b * log_ema[k] + (1 - b) * log_norms
        ratio = log_ema[0] / (1 - 0.8**t) - log_ema[1] / (1 - 0.97**t)
        x = np.concatenate([np.tile(shared, (3, 1)), log_norms / 5, ratio, w["embedding"]], axis=1)
        out = np.tanh(x @ w["dense_0"]["kernel"] + w["dense_0"]["bias"]) @ w["dense_1"]["kernel"] + w["dense_1"]["bias"]

        odds = np.exp(out[:, 0] - out[:, 1] + 4)  # mix_bias 2 and -2
        np.testing.assert_allclose(state.mix[:, 0], odds / (1 + odds), rtol=1e-4)  # float32 MLP
        np.testing.assert_allclose(state.step_norm, 3e-3 * np.sqrt(n) * np.exp(2 * out[:, 2]), rtol=1e-4)


def test_relative_step():
    """λ = step_scale ‖θ‖ exp(step_gain out); a layer of zeros counts as one of RMS 1e-3."""
    params = normal(SHAPES, 0)
    params["b"] = jnp.zeros(5)
    spec = l3rs.Spec.create(params, step="relative", step_scale=0.02, step_gain=1.5)
    tx = l3rs.learned_optimizer(fixed_theta(spec, [0, 0, 0.4]), spec, 10)
    updates, state = jax.jit(tx.update)(normal(SHAPES, 1), tx.init(params), params, value=1.0)
    expected = 0.02 * np.exp(0.6) * np.array([*norms(params)[:2], 1e-3 * np.sqrt(5)])
    np.testing.assert_allclose(state.step_norm, expected, rtol=ROUNDING)
    np.testing.assert_allclose(norms(updates), expected, rtol=ROUNDING)


@pytest.mark.parametrize(("tilt", "expected"), [(0.0, 0.0), (1e-4, 0.05), (0.5, 1.0)], ids=str)
def test_directions_that_cancel_are_not_blown_up(tilt, expected):
    """Half gradient, half parameters, opposite but for an angle: the mixture has norm tilt/2; below 1e-3 of
    the directions' length the update shrinks with it, above it has norm λ."""
    params = {"w": jnp.array([1.0, 0.0])}
    grads = {"w": jnp.array([-1.0, tilt])}
    spec = l3rs.Spec.create(params, ("sgd", "weight_decay"), mix_bias=0.0, step_scale=1.0)
    tx = l3rs.learned_optimizer(fixed_theta(spec), spec, 10)
    updates, state = jax.jit(tx.update)(grads, tx.init(params), params, value=1.0)
    share = norms(updates) / np.asarray(state.step_norm)
    # the mixture itself is a difference of units, good to 6e-8, taken 1e3 times: 6e-5
    np.testing.assert_allclose(share, expected, atol=2e-4)


def test_renaming_layers_permutes_the_updates():
    """The order of leaves means nothing: a layer is its embedding row."""
    old_names, new_names = ("a", "b", "c"), ("z", "m", "c")  # old order a b c; new order c(c) m(b) z(a)
    shapes = {"a": (4, 3), "b": (5,), "c": (2, 2)}

    def rename(tree):
        return {new: tree[old] for old, new in zip(old_names, new_names, strict=True)}

    params = normal(shapes, 0)
    spec, renamed_spec = l3rs.Spec.create(params, hidden=(4,)), l3rs.Spec.create(rename(params), hidden=(4,))
    theta = random_theta(spec)
    renamed_theta = {**theta, "embedding": theta["embedding"][::-1]}

    @functools.partial(jax.jit, static_argnums=1)
    def update(theta, spec, grads, state, params):
        return l3rs.learned_optimizer(theta, spec, 10).update(grads, state, params, value=1.0)

    state = start = l3rs.learned_optimizer(theta, spec, 10).init(params)
    renamed_state = renamed_start = l3rs.learned_optimizer(theta, renamed_spec, 10).init(rename(params))
    for i in range(2):
        grads = normal(shapes, 1 + i)
        updates, state = update(theta, spec, grads, state, params)
        renamed, renamed_state = update(renamed_theta, renamed_spec, rename(grads), renamed_state, rename(params))
        assert_close(renamed, rename(updates))
    np.testing.assert_allclose(renamed_state.step_norm, state.step_norm[::-1], rtol=ROUNDING)
    # without the permutation of rows it is another optimizer
    _, state = update(theta, spec, grads, start, params)
    _, other = update(theta, renamed_spec, rename(grads), renamed_start, rename(params))
    assert not np.allclose(other.step_norm, state.step_norm[::-1], rtol=1e-3)


def test_update_depends_on_the_table_by_path_only():
    """A spec with more layers, in another order, and the rows to match."""
    params = normal(SMALL, 0)
    spec = l3rs.Spec.create(params, ("adam",), hidden=(4,))
    theta = random_theta(spec)
    wider = dataclasses.replace(spec, layers=(l3rs.Layer("other", (9,)), *spec.layers[::-1]))
    rows = jnp.concatenate([jnp.ones((1, 8)), theta["embedding"][::-1]])
    a, b = l3rs.learned_optimizer(theta, spec, 10), l3rs.learned_optimizer({**theta, "embedding": rows}, wider, 10)
    grads = normal(SMALL, 1)
    found = [jax.jit(tx.update)(grads, tx.init(params), params, value=1.0) for tx in (a, b)]
    assert_close(found[0][0], found[1][0])
    assert_close(found[0][1], found[1][1])


def one_update(tx, params, grads):
    return jax.jit(tx.update)(grads, tx.init(params), params, value=1.0)


def test_unknown_layers_have_the_mean_embedding():
    """As if the table had a row for them; their size is their own."""
    params = normal({**SMALL, "new": (7,)}, 0)
    spec = l3rs.Spec.create(normal(SMALL, 0), hidden=(4,))
    theta = random_theta(spec)
    wider = l3rs.Spec.create(params, hidden=(4,))
    rows = jnp.concatenate([theta["embedding"], theta["embedding"].mean(0, keepdims=True)])
    grads = normal({**SMALL, "new": (7,)}, 1)
    found = one_update(l3rs.learned_optimizer(theta, spec, 10, on_unknown="mean"), params, grads)
    assert_close(found, one_update(l3rs.learned_optimizer({**theta, "embedding": rows}, wider, 10), params, grads))
    np.testing.assert_allclose(norms(found[0]), found[1].step_norm, rtol=ROUNDING)

    grown = {"a": params["a"], "b": jnp.ones(6)}  # a known path of another shape
    found = one_update(l3rs.learned_optimizer(theta, spec, 10, on_unknown="mean"), grown, grown)
    changed = {**theta, "embedding": theta["embedding"].at[1].set(rows[-1])}
    assert_close(
        found, one_update(l3rs.learned_optimizer(changed, l3rs.Spec.create(grown, hidden=(4,)), 10), grown, grown)
    )


def test_layers_called_otherwise():
    """By rename and by order: the numbers of the checkpoint's own names."""
    params, grads = normal(SMALL, 0), normal(SMALL, 1)
    spec = l3rs.Spec.create(params, hidden=(4,))
    theta = random_theta(spec)
    updates, _ = one_update(l3rs.learned_optimizer(theta, spec, 10), params, grads)
    for rules in ({"rename": {"z": "a", "y": "b"}}, {"match": "order"}, {"match": "auto"}):
        tx = l3rs.learned_optimizer(theta, spec, 10, **rules)
        other, _ = one_update(tx, {"z": params["a"], "y": params["b"]}, {"z": grads["a"], "y": grads["b"]})
        assert_close(other, {"z": updates["a"], "y": updates["b"]})


def test_descriptor_embedding():
    """An embedding is a linear map of the layer's descriptors: the table that it makes does the same."""
    params, grads = normal(SHAPES, 0), normal(SHAPES, 1)
    spec = l3rs.Spec.create(params, embedding="descriptor", hidden=(4,), embedding_dim=3)
    theta = random_theta(spec)
    assert theta["embedding"].shape == (9, 3)
    rows = l3rs.layers.descriptors(spec.layers) @ theta["embedding"]
    assert np.unique(np.round(rows, 6), axis=0).shape == (3, 3)
    table = l3rs.Spec.create(params, hidden=(4,), embedding_dim=3)
    expected = one_update(l3rs.learned_optimizer({**theta, "embedding": rows}, table, 10), params, grads)
    assert_close(one_update(l3rs.learned_optimizer(theta, spec, 10, on_unknown="descriptor"), params, grads), expected)


def test_descriptor_embedding_takes_any_network():
    """Its meta-parameters do not depend on the layers of the network that they were meta-trained on."""
    specs = [l3rs.Spec.create(normal(shapes, 0), embedding="descriptor") for shapes in (SHAPES, SMALL)]
    thetas = [jax.jit(l3rs.init_meta_params, static_argnums=1)(jax.random.key(0), spec) for spec in specs]
    assert_close(*thetas, rtol=0, atol=0)
    params, grads = normal(SMALL, 0), normal(SMALL, 1)
    assert_close(
        *(one_update(l3rs.learned_optimizer(thetas[0], spec, 10), params, grads) for spec in specs), rtol=0, atol=0
    )
    assert [layer.source for layer in l3rs.match_layers(specs[0], params)] == ["descriptor"] * 2
    renamed, plain = (
        one_update(l3rs.learned_optimizer(thetas[0], specs[0], 10, rename=rename), params, grads)[1]
        for rename in ({"b": "b/scale"}, None)
    )
    assert renamed.step_norm[1] != plain.step_norm[1]  # "b" is a bias by its name


# Gradients and losses that are zero, huge or not numbers


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
    """That layer stays for the step, its gradient counts as zero; the others do as they would."""
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

    updates, after = update(normal(SHAPES, 3), after, params, value=1.0)  # and it goes on
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
    """The gradient's square is finite, that of the momentum it adds up to is not."""
    params = {"w": jnp.ones(4)}
    tx = make(params, ("adam", "momentum"))
    update, state = jax.jit(tx.update), tx.init(params)
    for _ in range(3):
        updates, state = update({"w": jnp.full(4, 6e18)}, state, params, value=1.0)
        assert all_finite(updates)


# Among optax's own


def test_chain_and_schedule(adam_sgd):
    params, tx, update = adam_sgd
    grads = normal(SHAPES, 1)
    chained = optax.chain(optax.clip_by_global_norm(1e9), tx, optax.scale(0.5))
    updates, _ = jax.jit(chained.update)(grads, chained.init(params), params, value=1.0)
    expected, _ = update(grads, tx.init(params), params, value=1.0)
    assert_close(updates, jax.tree.map(lambda u: 0.5 * u, expected))


def test_frozen_layers():
    """`masked` and `partition`: frozen layers stay and cost no state; the rest move as if they were all."""
    params, grads = normal(SMALL, 0), normal(SMALL, 1)
    tx = make(params, ("adam",))
    subset = {"a": params["a"]}
    expected, _ = jax.jit(tx.update)({"a": grads["a"]}, tx.init(subset), subset, value=1.0)

    partitioned = optax.partition({"learned": tx, "frozen": optax.set_to_zero()}, {"a": "learned", "b": "frozen"})
    masked = optax.masked(tx, {"a": True, "b": False})
    for wrapped, left in ((partitioned, jnp.zeros(5)), (masked, grads["b"])):  # masked hands the rest on
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
    """A population at once is its members one by one."""
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
    """The loop of meta-training: the state keeps its types, the horizon compiles nothing; and past it."""
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


# Types and shapes of parameters


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
    with jax.enable_x64(True):
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
    """Adam's two moments and next to nothing: 2.01 numbers a parameter."""
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


# The user's errors


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
    with pytest.raises(l3rs.L3RSError, match="unknown direction 'adan'; allowed are adam, sgd"):
        l3rs.learned_optimizer(random_theta(spec), spec, 10)


@pytest.mark.slow  # op by op: each is compiled
def test_docstring_example_runs():
    found = doctest.testmod(optimizer)
    assert found.attempted > 0
    assert found.failed == 0


@pytest.mark.parametrize(
    ("grads", "value", "words"),
    [
        ({"w": jnp.ones((1, 3))}, 1.0, r"gradients have the shapes \[\(1, 3\)\]; the params have \[\(4, 3\)\]"),
        ({}, 1.0, r"gradients have the shapes \[\]"),
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
