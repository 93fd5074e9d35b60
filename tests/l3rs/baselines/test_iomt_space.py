"""The optimizers from which IOMT chooses, how each passes its state to the next, and which parameters it reads."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import l3rs
from l3rs.baselines import iomt
from tests.l3rs import precision

RATE = {"learning_rate": (0.05,)}


def close(found, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, expected)


def counting(learning_rate):
    """A transformation whose state is the number of its own steps."""

    def update(updates, state, params=None):
        del params
        return jax.tree.map(lambda u: -learning_rate * u, updates), state + 1

    return optax.GradientTransformation(lambda _: jnp.zeros([]), update)


def test_moments():
    """a, b, a, two steps each: if moments are kept, a's state continues; if they are reset, it starts again."""
    space = {name: iomt.Optimizer(counting, RATE) for name in "ab"}
    for moments, expected in (("keep", [4, 2]), ("reset", [2, 2])):
        tx = iomt.interleave(space, moments)
        params = jnp.ones(2)
        state, update = tx.init(params), jax.jit(tx.update)
        for name in "aabbaa":
            choice = iomt.encode(space, iomt.Choice(name, {"learning_rate": 0.05}))
            _, state = update(params, state, params, **choice)
        assert [float(s) for s in state.states] == expected
        assert update._cache_size() == 1


def test_hyperparameters_of_any_name():
    """Two that are not learning rates, for optimizers with different numbers of hyper-parameters."""
    space = {
        "adamw": iomt.Optimizer(optax.adamw, {"learning_rate": (0.1,), "b1": (0.5, 0.9), "weight_decay": (0.0, 0.3)}),
        "sgd": iomt.Optimizer(optax.sgd, {"learning_rate": (0.1, 0.2)}),
    }
    tx, params = iomt.interleave(space), {"w": jnp.arange(3.0)}
    grads, update = {"w": jnp.array([1.0, -2.0, 0.5])}, jax.jit(tx.update)
    for choice in (
        iomt.Choice("adamw", {"learning_rate": 0.1, "b1": 0.5, "weight_decay": 0.3}),
        iomt.Choice("adamw", {"learning_rate": 0.1, "b1": 0.9, "weight_decay": 0.0}),
        iomt.Choice("sgd", {"learning_rate": 0.2}),
    ):
        reference = space[choice.optimizer].make(**choice.hyperparameters)
        found, _ = update(grads, tx.init(params), params, **iomt.encode(space, choice))
        expected, _ = reference.update(grads, reference.init(params), params)
        close(found, expected)
    assert update._cache_size() == 1


@pytest.mark.parametrize("moments", ["keep", "reset"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.float64], ids=lambda d: d.__name__)
def test_dtypes(dtype, moments):
    """Updates have the params' dtypes and states keep theirs, weak types too: a loop can carry them,
    though hyper-parameters are arrays."""
    decayed = iomt.Optimizer(
        lambda learning_rate, decay: optax.chain(optax.add_decayed_weights(decay), optax.sgd(learning_rate, 0.9)),
        {"learning_rate": (0.1,), "decay": (0.1, 0.2)},
    )
    space = {**iomt.SPACE, "decayed": decayed}
    with precision.x64(dtype == jnp.float64):
        params, tx = {"w": jnp.ones(3, dtype)}, iomt.interleave(space, moments)
        choice = iomt.encode(space, iomt.Choice("decayed", {"learning_rate": 0.1, "decay": 0.2}))
        state = tx.init(params)
        updates, after = jax.eval_shape(lambda *a: tx.update(*a, **choice), params, state, params)
        assert updates["w"].dtype == dtype
        types = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), tree)  # noqa: E731
        assert types(after) == types(jax.eval_shape(lambda: state))


@pytest.mark.parametrize(
    ("space", "name"), [(space, name) for space in (iomt.SPACE, iomt.LARGER_SPACE) for name in space]
)
def test_the_optimizers_equal_pytorchs(space, name):
    """Gradients from 1 to 1e-6, 20 steps: each is torch.optim's, with its defaults or the first of further values."""
    torch = pytest.importorskip("torch", reason="the extra `torch` is not installed")
    make = {
        "sgd": torch.optim.SGD,
        "sgdm": lambda params, **given: torch.optim.SGD(params, **{"momentum": 0.9, **given}),
        "adagrad": torch.optim.Adagrad,
        "rmsprop": torch.optim.RMSprop,
        "adam": torch.optim.Adam,
    }[name]
    values = {key: choices[0] for key, choices in space[name].hyperparameters.items()} | {"learning_rate": 0.01}
    by_pytorchs_names = {{"learning_rate": "lr", "decay": "alpha"}.get(key, key): x for key, x in values.items()}
    sizes = 10.0 ** -np.arange(7)
    gradients = np.random.default_rng(0).normal(size=(20, 7)) * sizes
    start = np.float32(sizes if space is iomt.LARGER_SPACE else 0 * sizes)  # of a size at which weight decay shows
    tx = space[name].make(**values)
    ours = jnp.asarray(start)
    state = tx.init(ours)
    theirs = torch.nn.Parameter(torch.tensor(start))
    optimizer = make([theirs], **by_pytorchs_names)
    for gradient in gradients.astype(np.float32):
        updates, state = tx.update(jnp.asarray(gradient), state, ours)
        ours = optax.apply_updates(ours, updates)
        theirs.grad = torch.tensor(gradient)
        optimizer.step()
    np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=2e-4)


@pytest.mark.parametrize("name", list(iomt.LARGER_SPACE))
def test_a_choice_of_the_larger_space_is_its_optimizer(name):
    space = iomt.LARGER_SPACE
    values = {key: choices[0] for key, choices in space[name].hyperparameters.items()}
    params, grads = jnp.arange(1.0, 4.0), jnp.array([1.0, -2.0, 0.5])
    tx, alone = iomt.interleave(space), space[name].make(**values)
    found, _ = jax.jit(tx.update)(grads, tx.init(params), params, **iomt.encode(space, iomt.Choice(name, values)))
    expected, _ = alone.update(grads, alone.init(params), params)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_key_parameters():
    def shapes(params):
        return [np.shape(x) for x in iomt.key_parameters(jax.tree.map(jnp.zeros, params, is_leaf=is_shape))]

    is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
    few = {"head": {"kernel": (4, 3), "bias": (3,)}, "lora": {"a": (9, 2), "b": (2, 9)}}
    assert shapes(few) == [(9, 2), (2, 9), (4, 3)]
    assert shapes({"scale": (3,), "bias": (2,)}) == [(2,), (3,)]
    deep = {f"dense_{i}": {"kernel": (i + 1, 2), "bias": (2,)} for i in range(12)}
    assert shapes(deep) == [(10, 2), (11, 2), (12, 2)]
    assert shapes({"classifier": (7, 7), **deep}) == [(11, 2), (12, 2), (7, 7)]
    assert shapes({"fc": {"kernel": (7, 5)}, **deep}) == [(11, 2), (12, 2), (7, 5)]
    assert shapes({"fc1": {"kernel": (7, 5)}, **deep}) == [(11, 2), (12, 2), (7, 5)]  # the last by path
    # An encoder's own output is not the classifier, and a "head" in attention is not the network's head.
    roberta = {f"layer/{i}/output": {"kernel": (i + 1, 2)} for i in range(12)}
    classifier = {"dense": {"kernel": (5, 5)}, "out_proj": {"kernel": (5, 3)}}
    assert shapes({"roberta": roberta, "classifier": classifier}) == [(12, 2), (5, 5), (5, 3)]
    assert shapes({"MultiHeadDotProductAttention": {"q": (2, 2)}, **deep}) == [(10, 2), (11, 2), (12, 2)]
    # Every adapter counts, end to end.
    lora = {f"block_{i}": {"a": (6, 2), "b": (2, 6)} for i in range(5)}
    assert shapes({"head": {"kernel": (6, 3)}, "lora": lora}) == [(5 * 24,), (6, 3)]


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("vit_tiny", ["blocks/11/proj/kernel", "blocks/11/qkv/kernel", "head/kernel"]),
        ("resnet8", ["stages/2/0/layers/0/conv/kernel", "stages/2/0/layers/1/conv/kernel", "head/kernel"]),
    ],
)
def test_key_parameters_of_our_models(model, expected):
    from tasks.models import make_model

    params, _ = make_model(model, (16, 16, 3), 10).init(jax.random.key(0))
    paths = {
        id(leaf): layer.path for layer, leaf in zip(l3rs.trees.layers_of(params), jax.tree.leaves(params), strict=True)
    }
    assert [paths[id(x)] for x in iomt.key_parameters(params)] == expected
