"""A layer whose gradient is exactly zero stops, in both forms and both frameworks."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import l3rs

PARAMS = {"a": {"kernel": (5, 4), "bias": (4,)}, "head": {"kernel": (4, 3), "bias": (3,)}}
FORMS = [
    {},
    {"step": "relative", "step_scale": 0.02},
    {"form": 2, "step": "initial", "step_scale": 0.05},
]
DIRECTIONS = [
    ("adam", "sgd", "weight_decay"),
    ("adam", "momentum", "weight_decay"),
    ("rmsprop", "weight_decay"),
    ("sgd", "weight_decay"),
]


def tree(seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda s: jnp.asarray(rng.normal(size=s), jnp.float32), PARAMS, is_leaf=lambda s: isinstance(s, tuple)
    )


def made(directions, fields):
    spec = l3rs.Spec.create(tree(0), directions, **fields)
    rng = np.random.default_rng(3)
    theta = l3rs.init_meta_params(jax.random.key(0), spec)
    return jax.tree.map(lambda x: x + jnp.asarray(0.2 * rng.normal(size=x.shape), jnp.float32), theta), spec


@pytest.mark.parametrize("fields", FORMS, ids=["rms", "relative", "form 2"])
@pytest.mark.parametrize("directions", DIRECTIONS, ids="+".join)
def test_weight_decay_does_not_fill_the_gap(fields, directions):
    """One layer never has a gradient: it stays unchanged, bit for bit, while the others move."""
    theta, spec = made(directions, fields)
    tx = l3rs.learned_optimizer(theta, spec, 20)
    params, state = tree(1), tx.init(tree(1))
    for step in range(4):
        grads = {**tree(10 + step), "a": jax.tree.map(jnp.zeros_like, params["a"])}
        updates, state = tx.update(grads, state, params, value=1.0)
        assert all(not np.asarray(leaf).any() for leaf in jax.tree.leaves(updates["a"]))
        assert all(np.asarray(leaf).any() for leaf in jax.tree.leaves(updates["head"]))
        params = optax.apply_updates(params, updates)


@pytest.mark.parametrize("fields", FORMS, ids=["rms", "relative", "form 2"])
@pytest.mark.parametrize("directions", DIRECTIONS, ids="+".join)
def test_a_vanished_gradient_ends_the_training(fields, directions):
    """After 20 steps all gradients are zero for 300 more: what is left of the moments moves a layer by less than 12 of
    its last steps (Adam's own first moment adds up to 10)."""
    theta, spec = made(directions, fields)
    tx = l3rs.learned_optimizer(theta, spec, 320)
    update = jax.jit(lambda g, s, p: tx.update(g, s, p, value=1.0))
    params, state, steps = tree(1), tx.init(tree(1)), []
    zero = jax.tree.map(jnp.zeros_like, params)
    for step in range(320):
        updates, state = update(tree(10 + step) if step < 20 else zero, state, params)
        params = optax.apply_updates(params, updates)
        steps.append([float(jnp.linalg.norm(leaf)) for leaf in jax.tree.leaves(updates)])
    usual, after = np.array(steps[:20]).max(0), np.array(steps[20:])
    assert (after.sum(0) <= 12 * usual).all()
    assert (after[-1] <= 1e-6 * usual).all()


@pytest.mark.parametrize("fields", FORMS, ids=["rms", "relative", "form 2"])
def test_in_pytorch(fields):
    torch = pytest.importorskip("torch")
    from l3rs.torch import L3RS

    theta, spec = made(("adam", "sgd", "weight_decay"), fields)
    arrays = {"a.weight": tree(1)["a"]["kernel"].T, "a.bias": tree(1)["a"]["bias"]}
    arrays |= {"head.weight": tree(1)["head"]["kernel"].T, "head.bias": tree(1)["head"]["bias"]}
    params = {name: torch.nn.Parameter(torch.from_numpy(np.array(x))) for name, x in arrays.items()}
    opt = L3RS(params.items(), (theta, spec), total_steps=320)
    before = {name: param.detach().clone() for name, param in params.items()}
    for step in range(320):
        for i, (name, param) in enumerate(params.items()):
            alive = step < 20 and not name.startswith("a.")
            rng = np.random.default_rng(100 * step + i)
            param.grad = torch.from_numpy(rng.normal(size=param.shape) * alive).float()
        if step == 20:
            at_20 = {name: param.detach().clone() for name, param in params.items()}
            moved = {name: (before[name] - at_20[name]).norm() for name in params}
        opt.step(loss=1.0)
    for name, param in params.items():
        if name.startswith("a."):
            assert torch.equal(param, before[name])
        else:
            assert (param.detach() - at_20[name]).norm() <= 12 * moved[name]
