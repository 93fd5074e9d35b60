"""Base directions against optax, from which they come, and against numbers worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from l3rs.directions import OPTIONS
from l3rs.spec import Direction, L3RSError
from l3rs.transforms import make_directions

STEPS = 10
ROUNDING = 1e-6  # the same formula compiled apart: XLA may fuse a multiply and an add

# Every direction, with its defaults and with each of its options changed.
CASES = [
    ("adam", optax.scale_by_adam()),
    (
        {"name": "adam", "b1": 0.8, "b2": 0.95, "eps": 1e-3, "eps_root": 1e-4},
        optax.scale_by_adam(0.8, 0.95, 1e-3, 1e-4),
    ),
    ("sgd", optax.identity()),
    ("momentum", optax.trace(0.9)),
    ({"name": "momentum", "decay": 0.5, "nesterov": True}, optax.trace(0.5, nesterov=True)),
    ("lion", optax.scale_by_lion()),
    ({"name": "lion", "b1": 0.3, "b2": 0.6}, optax.scale_by_lion(0.3, 0.6)),
    ("rmsprop", optax.scale_by_rms()),
    ({"name": "rmsprop", "decay": 0.5, "eps": 1e-2}, optax.scale_by_rms(0.5, 1e-2)),
    ("weight_decay", None),
]


def some_params():
    rng = np.random.default_rng(0)
    return {"a": jnp.asarray(rng.normal(size=(3, 2)), jnp.float32), "b": [jnp.asarray(rng.normal(size=4), jnp.float32)]}


def some_grads(params, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), params)


def take(base, grads, state, params):
    """One step: the direction of every layer, in leaf order, and the new state."""
    updates, state = base.transform.update(grads, state, params)
    return [lazy.compute(*lazy.operands) for lazy in base.read(updates, state, grads)], state


def test_every_direction_is_covered():
    covered = {Direction.parse(value).name for value, _ in CASES}
    assert covered | {"first_moment"} == set(OPTIONS)  # which needs Adam: tests/l3rs/test_scale_free.py


@pytest.mark.parametrize(
    ("value", "reference"), CASES, ids=lambda case: str(case) if isinstance(case, str | dict) else ""
)
def test_equals_optax(value, reference):
    params = some_params()
    base = make_directions([Direction.parse(value)])[0]
    state = base.transform.init(params)
    reference_state = reference.init(params) if reference else None
    for i in range(STEPS):
        grads = some_grads(params, i)
        found, state = take(base, grads, state, params)
        if reference:
            expected, reference_state = reference.update(grads, reference_state, params)
        else:  # weight decay: the parameters
            expected = params
        for a, b in zip(found, jax.tree.leaves(expected), strict=True):
            assert a.shape == b.shape
            np.testing.assert_allclose(a, b, rtol=ROUNDING, atol=ROUNDING)
        params = optax.apply_updates(params, jax.tree.map(lambda g: -0.1 * g, grads))


@pytest.mark.parametrize(
    ("value", "expected"),
    [  # gradients 2, then -1
        ("sgd", (2, -1)),
        ("momentum", (2, 0.8)),  # 0.9·2 - 1
        ({"name": "momentum", "nesterov": True}, (3.8, -0.28)),  # 2 + 0.9·2; -1 + 0.9·0.8
        ("lion", (1, -1)),  # then 0.9·(0.01·2) - 0.1·1 < 0
        ({"name": "lion", "b2": 0.9}, (1, 1)),  # then 0.9·(0.1·2) - 0.1·1 > 0
        ("adam", (1, 0.08 / 0.19 / np.sqrt((0.999 * 0.004 + 0.001) / 0.001999))),
        ("rmsprop", (2 / np.sqrt(0.4), -1 / np.sqrt(0.46))),  # v = 0.1·4, then 0.9·0.4 + 0.1·1
        ("weight_decay", (7, 7)),
    ],
    ids=str,
)
def test_by_hand(value, expected):
    base = make_directions([Direction.parse(value)])[0]
    params = {"w": jnp.array([7.0])}
    state = base.transform.init(params)
    for gradient, direction in zip((2.0, -1.0), expected, strict=True):
        (found,), state = take(base, {"w": jnp.array([gradient])}, state, params)
        np.testing.assert_allclose(found, [direction], rtol=5e-5)  # 1 - 0.999² keeps 13 bits in float32


@pytest.mark.parametrize("value", ["adam", "sgd", "weight_decay"])
def test_these_directions_store_nothing(value):
    """They are computed from the moments, the gradients, the parameters: no further copy of the network."""
    params, grads = some_params(), some_grads(some_params(), 0)
    base = make_directions([Direction(value)])[0]
    updates, state = base.transform.update(grads, base.transform.init(params), params)
    there = {id(leaf) for leaf in jax.tree.leaves((state, grads))}
    for lazy in base.read(updates, state, grads):
        for operand in lazy.operands:
            assert id(operand) in there or value == "weight_decay"
    floats = sum(leaf.size for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.floating))
    assert floats == {"adam": 2, "sgd": 0, "weight_decay": 0}[value] * 10  # 10 parameters


def test_adam_moments_are_the_only_state_of_adam():
    state = make_directions([Direction("adam")])[0].transform.init(some_params())
    assert isinstance(state, optax.ScaleByAdamState)


def test_unknown_name():
    with pytest.raises(L3RSError) as error:
        make_directions([Direction("adamw")])[0]
    assert str(error.value) == (
        "unknown direction 'adamw'; allowed are adam, first_moment, sgd, momentum, lion, rmsprop, weight_decay"
    )


@pytest.mark.parametrize(
    ("value", "allowed"),
    [("adam", "b1, b2, eps, eps_root"), ("sgd", "none"), ("momentum", "decay, nesterov")],
)
def test_unknown_option(value, allowed):
    with pytest.raises(L3RSError) as error:
        make_directions([Direction(value, (("beta", 0.9),))])[0]
    assert str(error.value) == f"direction {value!r} has no option 'beta'; allowed are {allowed}"
