"""The update against a hand-written normalised Adam and against its own formula in NumPy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import l3rs
from l3rs.transforms import make_directions
from tests.l3rs.optimizer.common import (
    ROUNDING,
    SHAPES,
    SMALL,
    assert_close,
    fixed_theta,
    make,
    normal,
    norms,
    random_theta,
)


def test_adam_alone_with_fixed_step_is_normalised_adam():
    """50 steps on a quadratic, against optax's Adam with each layer's step scaled to 0.01 √n."""
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
    adam = make_directions([l3rs.Direction("adam")])[0].transform

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
    bases = make_directions([l3rs.Direction.parse(d) for d in directions])
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
    """The order of leaves does not matter: a layer is identified by its embedding row."""
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
    # without the permutation of rows the optimizer differs
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
    """As if the table had such a row; the size feature is that of the layer."""
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


def test_layers_with_other_names():
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
