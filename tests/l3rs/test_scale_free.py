"""Form 2: no scale, no step without a signal, and the same steps however a network is passed."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import l3rs
from l3rs.descriptors import n_matrices, natural_rms, scale_free_descriptors
from l3rs.spec import L3RSError, Layer
from tests.l3rs.form_2 import DIRECTIONS, SHAPES, norms, run, tree


def optimizer(directions=DIRECTIONS, seed=0, total_steps=50, **fields):
    fields = {"adaptation": 0.2, "embedding": "descriptor", "step": "initial", "step_scale": 0.05, **fields}
    spec = l3rs.Spec.create(tree(0), directions, form=2, **fields)
    theta = l3rs.init_meta_params(jax.random.key(seed), spec)
    noise = np.random.default_rng(seed)
    theta = jax.tree.map(lambda x: x + jnp.asarray(0.2 * noise.normal(size=x.shape), jnp.float32), theta)
    return l3rs.learned_optimizer(theta, spec, total_steps)


def assert_trees_close(a, b, rtol):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol * float(np.abs(y).max()))


LOSSES = [2.0 / (1 + t) for t in range(12)]


@pytest.mark.parametrize(
    ("modules", "fields"),
    [
        (("stem", "norm", "head"), {}),
        (("stem", "norm", "head"), {"step": "relative"}),
        (("head",), {"decay_share": 0.1, "leverage_floor": 30.0}),
    ],
    ids=str,
)
def test_rescaling_a_tensor_rescales_its_steps(modules, fields):
    """θ = c φ with a c for each tensor: φ has c times the gradient, so its steps must be those of θ over c."""
    tx = optimizer(**fields)
    params, *grads = ({name: tree(seed)[name] for name in modules} for seed in (1, *range(10, 22)))
    powers = (3, -4, 1, -2, 5, -6)[: len(jax.tree.leaves(params))]
    scales = jax.tree.unflatten(jax.tree.structure(params), [2.0**k for k in powers])
    updates, _, _ = run(tx, params, grads, LOSSES)
    other, _, _ = run(
        tx,
        jax.tree.map(lambda p, c: p / c, params, scales),
        [jax.tree.map(lambda g, c: g * c, gradient, scales) for gradient in grads],
        LOSSES,
    )
    for a, b in zip(updates, other, strict=True):
        assert_trees_close(jax.tree.map(lambda u, c: u * c, b, scales), a, rtol=1e-4)  # Adam's ε has a scale


def test_scale_of_the_loss_does_not_matter():
    params, grads = tree(1), [tree(10 + t) for t in range(12)]
    updates, _, _ = run(optimizer(), params, grads, LOSSES)
    scaled, _, _ = run(
        optimizer(), params, [jax.tree.map(lambda g: 64 * g, gradient) for gradient in grads], [64 * x for x in LOSSES]
    )
    for a, b in zip(updates, scaled, strict=True):
        assert_trees_close(a, b, rtol=1e-4)


@pytest.mark.parametrize("direction", ["adam", "sgd", "momentum", "lion", "rmsprop"])
def test_no_step_without_a_gradient_from_the_start(direction):
    """Weight decay does not fill the gap: not at the first step, not later."""
    tx = optimizer((direction, "weight_decay"))
    grads = [tree(10 + t) for t in range(5)]
    for gradient in grads:
        gradient["stem"]["kernel"] = jnp.zeros((6, 8))
    updates, _, _ = run(tx, tree(1), grads, LOSSES[:5])
    assert all(float(jnp.abs(update["stem"]["kernel"]).max()) == 0 for update in updates)
    assert all(norms(update["head"]).min() > 0 for update in updates)


BASES = {
    "adam": optax.scale_by_adam(),
    "sgd": optax.identity(),
    "momentum": optax.trace(0.9),
    "lion": optax.scale_by_lion(),
    "rmsprop": optax.scale_by_rms(),
}


@pytest.mark.parametrize("direction", BASES)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_vanished_gradient_moves_no_further_than_the_base_optimizer(direction, seed):
    """After 15 steps every gradient is zero. From then on a layer moves at most as far as under the base optimizer with
    the same moments, at the learning rate that the last step with a gradient had here."""
    tx = optimizer((direction, "weight_decay"), seed)
    alive = [tree(10 + t) for t in range(15)]
    dead = [jax.tree.map(jnp.zeros_like, alive[0])] * 200
    updates, _, _ = run(tx, tree(1), alive + dead, [1.0] * 215)
    base, state, lengths = BASES[direction], BASES[direction].init(tree(1)), []
    for gradient in alive + dead:
        moved, state = base.update(gradient, state, tree(1))
        lengths.append(norms(moved))
    ours = np.array([norms(update) for update in updates])  # [steps, L]
    rate = ours[14] / lengths[14]
    allowed = rate * np.sum(lengths[15:], axis=0)
    assert (np.sum(ours[15:], axis=0) <= 1.001 * allowed + 1e-12).all()


def test_a_fitted_network_stays_over_a_thousand_zero_gradients():
    alive = [tree(10 + t) for t in range(30)]
    dead = [jax.tree.map(jnp.zeros_like, alive[0])] * 1000
    tx = optimizer(total_steps=1030)
    _, before, _ = run(tx, tree(1), alive, [1.0] * 30)
    updates, after, _ = run(tx, tree(1), alive + dead, [1.0] * 1030)
    steps = np.array([norms(update) for update in updates])
    assert (
        norms(jax.tree.map(lambda a, b: a - b, after, before)) <= 11 * steps[29]
    ).all()  # Adam's own: 1 / (1 - b1), and its second moment fades
    assert (steps[-1] == 0).all() or steps[-1].max() < 1e-12


def test_averages_wait_while_there_is_no_gradient():
    """Once a layer has a gradient, it decides as if the steps before had not happened; only the time continues."""
    grads = [tree(10 + t) for t in range(6)]
    for gradient in grads[:3]:
        gradient["stem"] = jax.tree.map(jnp.zeros_like, gradient["stem"])
    _, _, state = run(optimizer(), tree(1), grads, LOSSES[:6])
    stem = [i for i, leaf in enumerate(jax.tree.leaves_with_path(SHAPES, is_leaf=lambda s: isinstance(s, tuple)))
            if "stem" in str(leaf[0])]  # fmt: skip
    np.testing.assert_array_equal(np.asarray(state.layers.observed)[stem], 3)
    np.testing.assert_array_equal(np.delete(np.asarray(state.layers.observed), stem), 6)
    assert np.abs(np.asarray(state.log_norms)[:, stem]).max() < 5  # no log of zero in them


def test_layers_that_start_at_zero_have_their_natural_size():
    params = tree(1)
    params["head"] = jax.tree.map(jnp.zeros_like, params["head"])
    _, _, state = run(optimizer(natural_size=0.5), params, [tree(2)], [1.0])
    by_path = dict(zip(sorted(("head/bias", "head/kernel", "norm/bias", "norm/scale", "stem/bias", "stem/kernel")),
                       np.asarray(state.layers.size), strict=True))  # fmt: skip
    assert by_path["head/kernel"] == by_path["head/bias"] == np.float32(0.5 / np.sqrt(8))
    assert by_path["stem/kernel"] == pytest.approx(float(jnp.sqrt(jnp.mean(params["stem"]["kernel"] ** 2))), rel=1e-6)
    np.testing.assert_array_equal(np.asarray(state.layers.from_zero), [1, 1, 0, 0, 0, 0])


@pytest.mark.parametrize(
    ("total_steps", "power", "factor"),
    [(100, 0.5, 1.0), (400, 0.5, 0.5), (1600, 0.25, 0.5), (25, 0.25, np.sqrt(2)), (400, 0.0, 1.0)],
)
def test_untrained_steps_shrink_with_depth_and_horizon(total_steps, power, factor):
    """λ of a step: step_scale · √n · RMS · (100 / T)^power / √(number of matrices), along Adam, signal 1 at first."""
    spec = l3rs.Spec.create(
        tree(0), ("adam",), form=2, step="initial", embedding="descriptor", step_scale=0.05, horizon_power=power
    )
    theta = jax.tree.map(jnp.zeros_like, l3rs.init_meta_params(jax.random.key(0), spec))
    updates, _, _ = run(l3rs.learned_optimizer(theta, spec, total_steps), tree(1), [tree(2)], [1.0])
    expected = factor * 0.05 / np.sqrt(2) * norms(tree(1))
    np.testing.assert_allclose(norms(updates[0]), expected, rtol=1e-5)


def test_adaptation_accumulates():
    """With only the bias of its output set, A after t steps is t · adaptation · tanh(bias), up to its limit."""
    spec = l3rs.Spec.create(tree(0), ("adam",), form=2, step="initial", embedding="descriptor", adaptation=0.5)
    theta = jax.tree.map(jnp.zeros_like, l3rs.init_meta_params(jax.random.key(0), spec))
    theta["dense_2"]["bias"] = jnp.array([0.0, 0.0, -1.0])
    for steps, expected in ((4, -4 * 0.5 * np.tanh(1.0)), (30, -5.0)):
        _, _, state = run(l3rs.learned_optimizer(theta, spec, 30), tree(1), [tree(2)] * steps, [1.0] * steps)
        np.testing.assert_allclose(np.asarray(state.layers.adaptation), expected, rtol=1e-5)


def test_a_layers_own_factor_multiplies_its_steps():
    """exp(layer_gain · c) times the step, with c of the layer's row; the other layers and the MLP see nothing of it."""
    plain = l3rs.Spec.create(tree(0), DIRECTIONS, form=2, step="initial", embedding="table")
    spec = dataclasses.replace(plain, layer_gain=5.0)
    theta = l3rs.init_meta_params(jax.random.key(0), plain)
    column = np.linspace(-0.3, 0.3, len(spec.layers), dtype=np.float32)
    own = {**theta, "embedding": np.column_stack([theta["embedding"], column])}
    before, after = (
        norms(run(l3rs.learned_optimizer(values, form, 50), tree(1), [tree(2)], [1.0])[0][0])
        for values, form in ((theta, plain), (own, spec))
    )
    np.testing.assert_allclose(after / before, np.exp(5.0 * column), rtol=1e-5)
    assert np.ptp(after / before) > 4
    own["embedding"] = np.column_stack([theta["embedding"], np.full(len(spec.layers), 1e9, np.float32)])
    bounded = norms(run(l3rs.learned_optimizer(own, spec, 50), tree(1), [tree(2)], [1.0])[0][0])
    np.testing.assert_allclose(bounded / before, np.exp(10.0), rtol=1e-4)


def test_a_form_2_spec_saved_without_a_limit_keeps_its_steps():
    spec = l3rs.Spec.create(tree(0), ("adam",), form=2, step="initial", embedding="descriptor")
    stored = spec.to_json()
    assert l3rs.Spec.from_json(stored) == spec
    del stored["step_limit"]
    assert l3rs.Spec.from_json(stored).step_limit == 10


def test_form_1_stores_what_it_always_did():
    stored = l3rs.Spec.create(tree(0)).to_json()
    assert list(stored) == [
        *("layers", "directions", "hidden", "embedding_dim", "step", "step_scale", "step_gain", "mix_bias"),
        *("loss_decays", "norm_decays", "absolute_time"),
    ]


@pytest.mark.parametrize(("scaling", "power"), [(True, 0.5), (False, 0.0)])
def test_a_spec_saved_with_a_root_of_the_horizon_or_without_keeps_its_steps(scaling, power):
    spec = l3rs.Spec.create(tree(0), form=2, step="initial", embedding="descriptor", horizon_power=power)
    stored = spec.to_json()
    del stored["horizon_power"]
    assert l3rs.Spec.from_json({**stored, "horizon_scaling": scaling}) == spec
    for wrong in (
        {"horizon_scaling": "no"},
        {"horizon_scaling": None},
        {"horizon_scaling": scaling, "horizon_power": power},
    ):
        with pytest.raises(
            l3rs.L3RSError, match=r"horizon_scaling is .*; it must be true or false, without a horizon_p"
        ):
            l3rs.Spec.from_json({**stored, **wrong})


def layers(*described):
    return [Layer(path, shape) for path, shape in described]


NETWORK = layers(
    ("stem/kernel", (3, 3, 3, 16)),
    ("stem/bias", (16,)),
    ("blocks/2/norm/scale", (16,)),
    ("blocks/2/norm/bias", (16,)),
    ("blocks/10/kernel", (16, 64)),
    ("embed/embedding", (100, 16)),
    ("head/kernel", (64, 10)),
    ("head/bias", (10,)),
)


def test_descriptors_do_not_depend_on_the_order_given():
    found = dict(zip([layer.path for layer in NETWORK], scale_free_descriptors(NETWORK).tolist(), strict=True))
    for seed in range(5):
        order = np.random.default_rng(seed).permutation(len(NETWORK))
        shuffled = [NETWORK[i] for i in order]
        for layer, row in zip(shuffled, scale_free_descriptors(shuffled).tolist(), strict=True):
            assert row == found[layer.path]
    depth = {path: row[5] for path, row in found.items()}
    assert depth["blocks/2/norm/scale"] < depth["blocks/10/kernel"] < depth["head/kernel"] == 1
    assert found["stem/kernel"][:5] == found["head/kernel"][:5] == [1, 0, 0, 0, 0]


def test_a_batch_norm_comes_behind_its_convolution():
    names = ("bn1.weight", "conv1.weight", "layer1.0.bn1.weight", "layer1.0.bn2.weight", "layer1.0.conv1.weight")
    names += ("layer1.0.conv2.weight", "fc.weight")
    network = [Layer(name, (4,) if "bn" in name else (3, 3, 4, 4) if "conv" in name else (4, 10)) for name in names]
    rows = dict(zip(names, scale_free_descriptors(network), strict=True))
    expected = ["conv1", "bn1", "layer1.0.conv1", "layer1.0.bn1", "layer1.0.conv2", "layer1.0.bn2", "fc"]
    assert [name.removesuffix(".weight") for name in sorted(names, key=lambda name: rows[name][5])] == expected
    assert [name for name in names if rows[name][7]] == ["conv1.weight"]
    vit = layers(
        ("patch/kernel", (49, 8)), ("blocks/0/out/kernel", (8, 8)), ("norm/scale", (8,)), ("head/kernel", (8, 2))
    )
    assert [row[5] for row in scale_free_descriptors(vit)] == pytest.approx([0, 1 / 3, 2 / 3, 1])


def test_a_module_that_is_named_like_a_batch_norm_but_has_a_kernel_stays_where_it_is():
    alone = layers(("bn1/kernel", (8, 8)), ("fc/kernel", (8, 8)))
    assert [row[5] for row in scale_free_descriptors(alone)] == [0, 1]
    followed = layers(("batch_norm1/scale", (8,)), ("bn1/kernel", (8, 8)), ("fc/kernel", (8, 8)))
    assert [row[5] for row in scale_free_descriptors(followed)] == [0.5, 0, 1]


def test_natural_sizes():
    adapters = layers(("q/a", (32, 4)), ("q/b", (4, 32)))
    np.testing.assert_allclose(natural_rms(adapters), [1 / np.sqrt(32), 1 / 2], rtol=1e-6)
    found = dict(zip([layer.path for layer in NETWORK], natural_rms(NETWORK).tolist(), strict=True))
    assert found["stem/kernel"] == found["stem/bias"] == pytest.approx(1 / np.sqrt(27))
    assert found["head/kernel"] == found["head/bias"] == pytest.approx(1 / 8)
    assert found["blocks/2/norm/bias"] == pytest.approx(0.2)
    assert n_matrices(NETWORK) == 3
    assert n_matrices(adapters) == 2
    assert n_matrices(layers(("norm/scale", (8,)))) == 1


@pytest.mark.parametrize(
    ("fields", "facts"),
    [
        ({"directions": ("sgd", "first_moment")}, ("first_moment", "adam")),
        ({"directions": ("first_moment", "adam")}, ("first_moment", "adam")),
        ({"form": 3}, ("form", "3", "1", "2")),
        ({"form": 1, "step": "initial"}, ("step", "'initial'", "'rms'", "'relative'")),
        ({"form": 2, "absolute_time": True}, ("absolute_time",)),
        ({"form": 2, "natural_size": 0.0}, ("natural_size", "> 0")),
        ({"form": 2, "adaptation": 1.5}, ("adaptation", "1.5", "[0, 1]")),
    ],
)
def test_invalid_specs(fields, facts):
    with pytest.raises(L3RSError) as error:
        l3rs.Spec.create(tree(0), **fields)
    assert all(fact in str(error.value) for fact in facts)


def test_first_moment_is_adams_average():
    """One step along it alone: m̂ = g, so the update is the normalised gradient, and no moments are added."""
    spec = l3rs.Spec.create(tree(0), ("adam", "first_moment"), form=2, step="initial", embedding="descriptor")
    theta = jax.tree.map(jnp.zeros_like, l3rs.init_meta_params(jax.random.key(0), spec))
    theta["dense_2"]["bias"] = jnp.zeros(3).at[1].set(60.0)  # μ of the first moment is 1
    grads = tree(2)
    updates, _, state = run(l3rs.learned_optimizer(theta, spec, 10), tree(1), [grads], [1.0])
    for update, gradient in zip(jax.tree.leaves(updates[0]), jax.tree.leaves(grads), strict=True):
        cosine = -float(jnp.vdot(update, gradient) / jnp.linalg.norm(update) / jnp.linalg.norm(gradient))
        assert cosine == pytest.approx(1, abs=1e-5)
    assert not jax.tree.leaves(state.directions[1])
