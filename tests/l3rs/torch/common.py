"""Helpers that the tests of `l3rs.torch` share: networks in both frameworks, training, comparisons."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

torch = pytest.importorskip("torch", reason="the extra `torch` is not installed")

import l3rs  # noqa: E402
import l3rs.torch  # noqa: E402
from l3rs.torch import L3RS  # noqa: E402

ROOT = Path(__file__).parents[3]

# Two float32 implementations after 50 steps, per tensor and relative to its norm.
PARITY = 1e-5

# All kinds of tensors, in flax's layout and the names of both.
SHAPES = {
    "conv/kernel": (3, 3, 2, 4),
    "conv/bias": (4,),
    "dense/kernel": (8, 5),
    "embed/embedding": (7, 3),
    "norm/scale": (6,),
}
NAMES = {
    "conv/kernel": "conv.weight",
    "conv/bias": "conv.bias",
    "dense/kernel": "dense.weight",
    "embed/embedding": "embed.weight",
    "norm/scale": "norm.weight",
}
ALL = (
    {"name": "adam", "b1": 0.5, "b2": 0.9},
    "sgd",
    "lion",
    "rmsprop",
    {"name": "momentum", "nesterov": True},
    "weight_decay",
)


def normal(shapes, seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return {path: (scale * rng.normal(size=shape)).astype(np.float32) for path, shape in shapes.items()}


def nested(arrays):
    """{"conv/kernel": x} as the pytree {"conv": {"kernel": x}}."""
    tree = {}
    for path, array in arrays.items():
        module, leaf = path.split("/")
        tree.setdefault(module, {})[leaf] = jnp.asarray(array)
    return tree


def torch_layout(path, array):
    """Flax's [in, out] and [H, W, in, out] as torch's [out, in] and [out, in, H, W]."""
    array = np.asarray(array)
    if path.endswith("kernel"):
        array = array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T
    return torch.tensor(np.ascontiguousarray(array))


def random_theta(spec, seed=0, scale=0.4):
    """Meta-parameters far from their start: every layer decides something else."""
    shapes = jax.eval_shape(lambda: l3rs.init_meta_params(jax.random.key(0), spec))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: (scale * rng.normal(size=leaf.shape)).astype(np.float32), shapes)


def checkpoint(shapes=None, directions=("adam", "sgd"), **fields):
    """(theta, spec), small."""
    tree = nested({path: np.zeros(shape, np.float32) for path, shape in (shapes or SHAPES).items()})
    spec = l3rs.Spec.create(tree, directions, **{"hidden": (6,), **fields})
    return random_theta(spec), spec


def parameters(seed=0, shapes=None, dtype=torch.float32):
    """{torch name: Parameter}"""
    arrays = normal(shapes or SHAPES, seed, 0.3)
    return {
        NAMES.get(path, path.replace("/", ".")): torch.nn.Parameter(torch_layout(path, array).to(dtype))
        for path, array in arrays.items()
    }


def give_gradients(params, seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    for param in params.values():
        param.grad = (scale * torch.randn(param.shape, generator=generator)).to(param.dtype)


def train(opt, params, steps, first=0):
    """Some steps with gradients and losses that depend on the step's number only."""
    for i in range(first, first + steps):
        give_gradients(params, i)
        opt.step(loss=2.0 / (1 + i))


def values(params):
    return {name: param.detach().clone() for name, param in params.items()}


def assert_same(a, b):
    """Bit for bit."""
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def assert_near(a, b, tolerance=1e-6):
    """Per tensor, relative to its norm."""
    assert a.keys() == b.keys()
    for name in a:
        assert torch.linalg.vector_norm(a[name] - b[name]) <= tolerance * torch.linalg.vector_norm(b[name]), name


def assert_parity_of(made_of, steps=10, **rules):
    """Ten steps of both optimizers with the network of `SHAPES`; the torch one."""
    params, reference = parameters(), nested(normal(SHAPES, 0, 0.3))
    ours, tx = L3RS(params.items(), made_of, 40, **rules), l3rs.learned_optimizer(*made_of, 40, **rules)
    state, update = tx.init(reference), jax.jit(tx.update)
    for step in range(steps):
        grads = normal(SHAPES, 100 + step)
        updates, state = update(nested(grads), state, reference, value=np.float32(2 / (1 + step)))
        reference = optax.apply_updates(reference, updates)
        for path, grad in grads.items():
            params[NAMES[path]].grad = torch_layout(path, grad)
        ours.step(loss=2 / (1 + step))
    expected = {
        name: torch_layout(path, reference[path.split("/")[0]][path.split("/")[1]]) for path, name in NAMES.items()
    }
    assert_near(values(params), expected, PARITY)
    return ours
