"""The deployed update, `apply_updates` included, against optax.adam on trees shaped like real networks.

What bounds it: memory traffic. XLA's CPU backend makes one pass an output: of Adam ten arrays of the parameters'
size are read and written (m, v and the parameters, one after another). L3RS has to know norms and inner
products before it can update: it also reads g, p, d twice and g once more, writes its direction d, and
mixes g in. With donated buffers Adam runs at that bound; without, both pay for fresh memory.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import l3rs
from tests.benchmarks.shapes import NETWORKS, Shapes
from tests.benchmarks.timing import in_turn, ratio

STEPS = 5  # a timing


def main() -> None:
    for network, shapes in NETWORKS.items():
        measure(network, shapes())


def measure(network: str, shapes: Shapes) -> None:
    rng = np.random.default_rng(0)
    params = {f"{i:03d}": jnp.asarray(0.05 * rng.normal(size=s), jnp.float32) for i, s in enumerate(shapes)}
    grads = jax.tree.map(lambda p: 0.01 * p + 0.001, params)
    spec = l3rs.Spec.create(params)
    optimizers = {
        "adam": optax.with_extra_args_support(optax.adam(1e-3)),
        "lion": optax.with_extra_args_support(optax.lion(1e-4)),
        "l3rs": l3rs.l3rs(l3rs.init(jax.random.key(0), spec), spec, 1000),
    }
    n_floats = sum(p.size for p in params.values())
    print(f"{network}: {n_floats:,} parameters in {len(params)} leaves; state, floats a parameter: ", end="")
    print(", ".join(f"{name} {floats(tx.init(params)) / n_floats:.4f}" for name, tx in optimizers.items()))
    for donate in (False, True):
        calls = {name: updating(tx, params, grads, donate) for name, tx in optimizers.items()}
        seconds = in_turn(calls, rounds=15)
        times = ", ".join(f"{name} {1e3 * np.median(s) / STEPS:.1f} ms" for name, s in seconds.items())
        how = "donated buffers" if donate else "plain jit"
        print(f"  {how}: {times}; l3rs / adam: {ratio(seconds, 'l3rs', 'adam')}  (wanted: ≤ 1.3)")


def floats(state: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.floating))


def updating(tx: optax.GradientTransformationExtraArgs, params: Any, grads: Any, donate: bool) -> Callable[[], object]:
    """Goes on from where the last call ended, `STEPS` steps a call."""

    @functools.partial(jax.jit, donate_argnums=(0, 1) if donate else ())
    def step(params: Any, state: Any, grads: Any) -> Any:
        updates, state = tx.update(grads, state, params, value=jnp.float32(1.0))
        return optax.apply_updates(params, updates), state

    held = [jax.tree.map(jnp.copy, params), jax.jit(tx.init)(params)]

    def call() -> None:
        for _ in range(STEPS):
            held[:] = step(*held, grads)
        jax.block_until_ready(held)

    return call
