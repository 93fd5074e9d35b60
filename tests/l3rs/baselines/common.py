"""One small noisy problem for all baselines, solved by an optax transformation or by a recurrence in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tests.l3rs import precision

STEPS = 50
SHAPES = {"a": (4, 3), "b": (5,)}
N = 17  # parameters, in leaf order
# Both sides compute the same formula in float64, rounding 1e-16; 50 steps feed that back through a
# contracting problem, which leaves about 1e-14.
EXACT = 1e-12

_rng = np.random.default_rng(0)
START = _rng.normal(size=N)
_CURVATURE = 10.0 ** _rng.uniform(-3, 1, N)
_NOISE = _rng.normal(size=(4 * STEPS, N)) * _CURVATURE * 0.3
# Two parameters without any gradient, one in each tensor: 0/0 and √0 are near.
DEAD = (2, N - 1)
TRAINED = [i for i in range(N) if i not in DEAD]
_CURVATURE[list(DEAD)] = 0.0
_NOISE[:, list(DEAD)] = 0.0


def gradient(t, x):
    """At step t, from 1, of a quadratic with curvatures from 1e-3 to 10 and as much noise; [N]."""
    return _CURVATURE * x + _NOISE[t - 1]


def loss(t, x):
    """The function whose gradient is `gradient`."""
    return np.sum(0.5 * _CURVATURE * x**2 + _NOISE[t - 1] * x)


def decaying(count):
    """A schedule, in the widest float available: the rate after `count` steps, so at step count + 1."""
    return 0.1 * 0.9 ** jnp.asarray(count, jnp.result_type(float))


def decaying_at(t):
    return 0.1 * 0.9 ** (t - 1)


def ones(t, x):
    """A gradient that is always 1."""
    del t
    return np.ones_like(x)


def fading(t, x):
    """A large gradient, then small ones."""
    return np.full_like(x, 10.0 if t == 1 else 0.1)


def unravel(x, dtype=np.float64):
    """[N] as a tree of two tensors."""
    return {"a": jnp.asarray(x[:12].reshape(4, 3), dtype), "b": jnp.asarray(x[12:], dtype)}


def ravel(tree):
    return np.concatenate([np.ravel(np.asarray(leaf, np.float64)) for leaf in jax.tree.leaves(tree)])


def follow(tx, steps=STEPS, dtype=np.float64, gradient=gradient):
    """(updates [steps, N], states) of a transformation that trains on the problem."""
    with precision.x64(dtype == np.float64):
        params = unravel(START, dtype)
        state, update = tx.init(params), jax.jit(tx.update)
        updates, states = [], []
        for t in range(1, steps + 1):
            u, state = update(unravel(gradient(t, ravel(params)), dtype), state, params)
            params = optax.apply_updates(params, u)
            updates.append(ravel(u))
            states.append(jax.tree.map(np.asarray, state))
    return np.stack(updates), states


def follow_numpy(step, steps=STEPS, gradient=gradient):
    """Updates [steps, N] of a recurrence in NumPy, (t, g, x) -> update, that keeps its own moments."""
    x, updates = START.copy(), []
    for t in range(1, steps + 1):
        updates.append(step(t, gradient(t, x), x))
        x = x + updates[-1]
    return np.stack(updates)


def error(found, expected):
    """The largest difference at a step, relative to the largest update of that step."""
    return np.max(np.abs(found - expected).max(1) / np.abs(expected).max(1))


class Recurrence:
    """Moments in NumPy: `first(g, β1)` and `second(g, β2)` average and return them."""

    def __init__(self):
        self.m, self.v = np.zeros(N), np.zeros(N)

    def first(self, g, b1):
        self.m = b1 * self.m + (1 - b1) * g
        return self.m

    def second(self, g, b2):
        self.v = b2 * self.v + (1 - b2) * g**2
        return self.v
