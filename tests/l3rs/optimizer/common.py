"""Networks and meta-parameters that the tests of the optax transformation share."""

import jax
import jax.numpy as jnp
import numpy as np

import l3rs

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
