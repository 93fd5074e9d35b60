"""Trees and losses that an update cannot use are refused with a sentence that names the leaf."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import l3rs
from tests.l3rs.optimizer.common import make, random_theta

MANY = {f"layer_{i}": jnp.ones((2, i + 1)) for i in range(9)}


def refused(params, grads, value=1.0):
    tx = make(MANY)
    with pytest.raises(l3rs.L3RSError) as error:
        tx.update(grads, make(MANY).init(MANY), params, value=value)
    return str(error.value)


@pytest.mark.parametrize(
    "leaf",
    [jnp.tanh, jnp.ones(3, jnp.int32), np.ones(3, bool), jnp.ones(3, jnp.complex64), 1, True, "text", 1j, object()],
    ids=lambda leaf: str(getattr(leaf, "dtype", type(leaf).__name__)),
)
def test_leaves_that_are_not_real_arrays(leaf):
    """Functions in a module, counters, complex weights."""
    spec = l3rs.Spec.create({"w": jnp.ones(3)}, embedding="descriptor", hidden=(4,))
    tx = l3rs.learned_optimizer(random_theta(spec), spec, 10)
    with pytest.raises(l3rs.L3RSError, match=r"params have .* at 'deep/1'; .*real floating-point"):
        tx.init({"deep": [jnp.ones(3), leaf]})
    with pytest.raises(l3rs.L3RSError, match="at 'deep/1'"):
        l3rs.Spec.create({"deep": [jnp.ones(3), leaf]})


@pytest.mark.parametrize(
    "leaf",
    [np.zeros((2, 9), jax.dtypes.float0), jnp.ones((2, 9), jnp.int32), jnp.ones((2, 9), jnp.complex64), "x"],
    ids=["float0", "int", "complex", "text"],
)
def test_gradients_that_are_not_real_arrays(leaf):
    message = refused(MANY, {**MANY, "layer_8": leaf})
    assert message.startswith("gradients have ")
    assert "at 'layer_8'" in message


def test_mismatches_are_named_wherever_they_are():
    assert "gradients have the shape (2, 8) at 'layer_8'; the params have (2, 9)" in refused(
        MANY, {**MANY, "layer_8": jnp.ones((2, 8))}
    )
    assert "gradients lack 'layer_8' (2, 9)" in refused(MANY, {**MANY, "layer_8": None})
    assert "gradients have 'layer_8', which the params lack" in refused({**MANY, "layer_8": None}, MANY)
    both = refused({**MANY, "layer_7": None}, {**MANY, "layer_8": None})  # as many leaves
    assert "'layer_8'" in both


def test_python_numbers_are_scalars():
    """As in optax."""
    params = {"scale": 2.0, "w": jnp.ones((2, 3))}
    tx = make(params)
    updates, _ = jax.jit(tx.update)({"scale": 1.0, "w": jnp.ones((2, 3))}, tx.init(params), params, value=1)
    assert updates["scale"].shape == ()
    assert float(updates["scale"]) < 0
    optax.apply_updates(params, updates)


@pytest.mark.parametrize("value", [1j, True, "1.0", jnp.complex64(1), jnp.array(True), None, [1.0], np.array("a")])
def test_losses_that_are_not_real_numbers(value):
    message = refused(MANY, MANY, value)
    assert "value" in message
    assert "loss" in message


@pytest.mark.parametrize(
    "restored", [lambda s: s._asdict(), lambda s: list(s), lambda s: s._replace(loss=s.loss._asdict()), lambda _: None]
)
def test_states_that_are_plain_containers(restored):
    tx = make(MANY)
    with pytest.raises(l3rs.L3RSError, match=r"restore a saved state into the structure of tx.init\(params\)"):
        tx.update(MANY, restored(tx.init(MANY)), MANY, value=1.0)


def test_a_state_of_another_network():
    tx = make(MANY)
    few = {"layer_0": MANY["layer_0"]}
    with pytest.raises(l3rs.L3RSError, match=r"log_norms \[2, 9, 4\].* has \[2, 1, 4\]"):
        tx.update(few, tx.init(MANY), few, value=1.0)
