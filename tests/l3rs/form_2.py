"""A small network of form 2: shapes, gradients, and an optimizer's steps on it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

SHAPES = {
    "stem": {"kernel": (6, 8), "bias": (8,)},
    "norm": {"scale": (8,), "bias": (8,)},
    "head": {"kernel": (8, 4), "bias": (4,)},
}
DIRECTIONS = ("adam", "first_moment", "sgd", "weight_decay")


def tree(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda s: jnp.asarray(scale * rng.normal(size=s), jnp.float32), SHAPES, is_leaf=lambda s: isinstance(s, tuple)
    )


def run(tx, params, grads, losses):
    """All updates, the parameters in the end and the last state."""
    state, updates = tx.init(params), []
    step = jax.jit(lambda g, s, p, v: tx.update(g, s, p, value=v))
    for gradient, loss in zip(grads, losses, strict=True):
        update, state = step(gradient, state, params, jnp.float32(loss))
        params = optax.apply_updates(params, update)
        updates.append(update)
    return updates, params, state


def norms(update):
    return np.array([float(jnp.linalg.norm(leaf)) for leaf in jax.tree.leaves(update)])
