"""What bounds the steps of form 2: their limits, the floor of the leverage, the share of weight decay."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import l3rs
from l3rs.descriptors import natural_rms
from l3rs.spec import L3RSError
from tests.l3rs.form_2 import DIRECTIONS, norms, run, tree


@pytest.mark.parametrize("limit", [0.5, 2.0])
def test_no_step_is_longer_than_its_limit(limit):
    """Whatever the network's output, λ is at most e^limit times its base."""
    spec = l3rs.Spec.create(tree(0), ("adam",), form=2, step="initial", embedding="descriptor", step_limit=limit)
    theta = jax.tree.map(jnp.zeros_like, l3rs.init_meta_params(jax.random.key(0), spec))
    base, *_ = run(l3rs.learned_optimizer(theta, spec, 30), tree(1), [tree(2)], [1.0])
    theta["dense_2"]["bias"] = jnp.array([0.0, 30.0])
    most, *_ = run(l3rs.learned_optimizer(theta, spec, 30), tree(1), [tree(2)], [1.0])
    np.testing.assert_allclose(norms(most[0]), np.exp(limit) * np.asarray(norms(base[0])), rtol=1e-5)


def test_no_step_promises_more_than_its_share_of_the_loss():
    """All layers are shortened alike, until Σ ⟨g, -Δθ⟩ is the allowed share; a step that promises less is untouched.

    With two matrices the share is half the limit, of the first loss or of the present average, if that is higher.
    """
    fields = {"form": 2, "step": "initial", "embedding": "descriptor"}
    free = l3rs.Spec.create(tree(0), ("adam", "sgd", "weight_decay"), **fields)
    theta = l3rs.init_meta_params(jax.random.key(0), free)

    def last_update(limit, *losses):
        spec = dataclasses.replace(free, decrease_limit=limit)
        return run(l3rs.learned_optimizer(theta, spec, 30), tree(1), [tree(2)] * len(losses), losses)[0][-1]

    def promise(update):
        return -sum(np.vdot(g, u) for g, u in zip(jax.tree.leaves(tree(2)), jax.tree.leaves(update), strict=True))

    loss, limit = 2 * promise(last_update(0.0, 1.0)), 0.1 * 2
    long, short = last_update(0.0, loss), last_update(limit, loss)
    np.testing.assert_allclose(promise(short), 0.1 * loss, rtol=1e-4)
    share = 0.1 * loss / promise(long)
    assert 0.1 < share < 0.3
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, share * np.asarray(b), rtol=1e-4), short, long)
    jax.tree.map(np.testing.assert_array_equal, last_update(1.1, loss), long)
    np.testing.assert_allclose(promise(last_update(limit, loss, loss / 2)), 0.1 * loss, rtol=1e-4)
    average = (0.8 * 0.2 * loss + 0.2 * 2 * loss) / (1 - 0.8**2)
    np.testing.assert_allclose(promise(last_update(limit, loss, 2 * loss)), 0.1 * average, rtol=1e-4)


def test_a_limit_of_the_decrease_needs_the_gradient_and_form_2():
    fields = {"step": "initial", "embedding": "descriptor", "decrease_limit": 0.1}
    with pytest.raises(L3RSError, match="needs sgd"):
        l3rs.Spec.create(tree(0), ("adam",), form=2, **fields)
    with pytest.raises(L3RSError, match="form 1 has none"):
        l3rs.Spec.create(tree(0), decrease_limit=0.1)


def first_update(floor, params, gradient, loss):
    """Of an optimizer whose network says 0: every λ is its base."""
    fields = {"form": 2, "step": "initial", "embedding": "descriptor", "leverage_floor": floor}
    spec = l3rs.Spec.create(params, DIRECTIONS, **fields)
    theta = jax.tree.map(jnp.zeros_like, l3rs.init_meta_params(jax.random.key(0), spec))
    return norms(run(l3rs.learned_optimizer(theta, spec, 30), params, [gradient], [loss])[0][0])


def test_what_can_hardly_change_the_loss_takes_longer_steps():
    """All b are longer by floor · loss / Σ ‖θ‖ ‖g‖, at most 10 times; a layer of zeros counts as what it usually is."""
    params, gradient = {"head": tree(1)["head"]}, {"head": tree(2)["head"]}
    params["head"]["bias"] = jnp.zeros(4)
    sizes = norms(params)
    (bias,) = np.flatnonzero(sizes == 0)
    sizes[bias] = 2.0 * natural_rms(l3rs.Spec.create(params).layers)[bias]  # √4 parameters
    own = float((sizes * norms(gradient)).sum())
    plain = first_update(0.0, params, gradient, 1.0)
    assert (plain > 0).all()
    for floor, loss, growth in [(1.0, 0.9 * own, 1.0), (3.0, own, 3.0), (1.5, -2 * own, 3.0), (9.0, 9 * own, 10.0)]:
        found = first_update(floor, params, gradient, loss)
        np.testing.assert_allclose(found, growth * plain, rtol=1e-5, err_msg=f"{floor}, {loss / own:.2g} × its own")


@pytest.mark.parametrize(
    ("shapes", "grows"),
    [
        ({"head": {"kernel": (6, 4), "bias": (4,)}}, True),
        ({"head": {"kernel": (6, 4)}}, True),
        ({"conv": {"kernel": (3, 3, 2, 4)}}, True),
        ({"first": {"kernel": (6, 4)}, "head": {"kernel": (6, 4), "bias": (4,)}}, False),
        ({"head": {"kernel": (6, 4), "bias": (4,)}, "norm": {"scale": (4,)}}, False),
        ({"kernel": (6, 4), "bias": (4,)}, True),
        ({"weight": (4, 6), "bias": (4,)}, True),  # as in Equinox
        ({"query": {"kernel": (6, 2, 3), "bias": (2, 3)}}, True),  # of Flax's attention
        ({"head": {"kernel": (6, 4)}, "body": {"bias": (4,)}}, False),
        ({"head": {"kernel": (6, 4), "bias": (4,)}, "body": {"bias": (4,)}}, False),
        ({"embed": {"embedding": (6, 4)}, "head": {"kernel": (6, 4), "bias": (4,)}}, False),
        ({"embed": {"embedding": (6, 4)}}, False),
        ({"norm": {"scale": (4,), "bias": (4,)}}, False),
        ({"head": {"bias": (4,)}}, False),
    ],
)
def test_a_floor_of_the_leverage_is_for_a_matrix_with_or_without_its_bias(shapes, grows):
    rng = np.random.default_rng(1)

    def normal(shape):
        return rng.normal(size=shape).astype(np.float32)

    params, gradient = (jax.tree.map(normal, shapes, is_leaf=lambda x: isinstance(x, tuple)) for _ in range(2))
    equal = first_update(90.0, params, gradient, 100.0) == first_update(0.0, params, gradient, 100.0)
    assert not equal.any() if grows else equal.all()


def test_a_floor_of_the_leverage_needs_a_loss_and_a_gradient():
    params, gradient = {"head": tree(1)["head"]}, {"head": tree(2)["head"]}
    plain = first_update(0.0, params, gradient, 1.0)
    for loss in (0.0, np.nan, np.inf):
        np.testing.assert_array_equal(first_update(9.0, params, gradient, loss), plain, err_msg=str(loss))
    nothing = jax.tree.map(jnp.zeros_like, gradient)
    np.testing.assert_array_equal(first_update(9.0, params, nothing, 1.0), 0 * plain)


def test_a_floor_of_the_leverage_is_of_form_2_and_of_the_initial_size():
    with pytest.raises(L3RSError, match="form 1 has none"):
        l3rs.Spec.create(tree(0), leverage_floor=6.0)
    with pytest.raises(L3RSError, match=r"leverage_floor is 6.0; it needs spec.step 'initial', not 'relative'"):
        l3rs.Spec.create(tree(0), form=2, step="relative", leverage_floor=6.0)


@pytest.mark.parametrize("mix_bias", [2.0, -2.0])
def test_weight_decay_undoes_no_more_than_its_share(mix_bias):
    """With g = -θ, λ m goes along -g and λ (1 - m) along g, with m of the gradient: of a share r all but r m of the
    second is lost. Where decay agrees with the gradient, or undoes less, nothing changes; nor in a whole network."""
    params = {"head": tree(1)["head"]}
    fields = {"form": 2, "step": "initial", "embedding": "descriptor", "mix_bias": mix_bias}
    spec = l3rs.Spec.create(params, ("sgd", "weight_decay"), **fields)
    theta = jax.tree.map(jnp.zeros_like, l3rs.init_meta_params(jax.random.key(0), spec))
    m = float(1 / (1 + np.exp(-2 * mix_bias)))

    def step(share, sign, params=params):
        tx = l3rs.learned_optimizer(theta, dataclasses.replace(spec, decay_share=share), 30)
        return run(tx, params, [jax.tree.map(lambda x: sign * x, params)], [1.0])[0][0]

    share = 0.5 * min(1.0, (1 - m) / m)
    length = norms(step(0.0, 1.0))  # λ
    limited = jax.tree.map(lambda own, x: float(jnp.vdot(own, x) / jnp.linalg.norm(x)), step(share, -1.0), params)
    np.testing.assert_allclose(jax.tree.leaves(limited), length * m * (1 + share), rtol=1e-4)
    jax.tree.map(np.testing.assert_array_equal, step(share, 1.0), step(0.0, 1.0))
    if mix_bias > 0:
        jax.tree.map(np.testing.assert_array_equal, step(4 * share, -1.0), step(0.0, -1.0))
    jax.tree.map(np.testing.assert_array_equal, step(share, -1.0, tree(1)), step(0.0, -1.0, tree(1)))


def test_a_share_of_weight_decay_needs_the_gradient_and_weight_decay():
    fields = {"form": 2, "step": "initial", "decay_share": 0.5}
    for directions in (("adam", "sgd"), ("adam", "weight_decay")):
        with pytest.raises(L3RSError, match=r"decay_share is 0.5; it needs sgd and weight_decay among spec.directions"):
            l3rs.Spec.create(tree(0), directions, **fields)
