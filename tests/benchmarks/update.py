"""The deployed update, `apply_updates` included, against optax.adam on a ResNet-18-shaped tree.

What bounds it: memory traffic. Adam reads m, v, g, p and writes m, v, p. L3RS has to know norms and
inner products before it can update: it reads the four of them once more, and multiplies twice.
With donated buffers Adam runs at that bound; without, both pay for fresh memory.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import l3rs
from tests.benchmarks.timing import in_turn, ratio

STEPS = 5  # a timing


def resnet18_params() -> dict[str, jax.Array]:
    """11.7 M parameters in 62 leaves."""
    shapes: list[tuple[int, ...]] = [(7, 7, 3, 64), (64,), (64,)]
    width = 64
    for channels in (64, 128, 256, 512):
        for _ in range(2):
            shapes += [(3, 3, width, channels), (channels,), (channels,)]
            shapes += [(3, 3, channels, channels), (channels,), (channels,)]
            if width != channels:
                shapes += [(1, 1, width, channels), (channels,), (channels,)]
            width = channels
    shapes += [(512, 1000), (1000,)]
    rng = np.random.default_rng(0)
    return {f"{i:02d}": jnp.asarray(0.05 * rng.normal(size=s), jnp.float32) for i, s in enumerate(shapes)}


def main() -> None:
    params = resnet18_params()
    n_floats = sum(p.size for p in params.values())
    grads = jax.tree.map(lambda p: 0.01 * p + 0.001, params)
    spec = l3rs.Spec.create(params)
    optimizers = {
        "adam": optax.with_extra_args_support(optax.adam(1e-3)),
        "l3rs": l3rs.l3rs(l3rs.init(jax.random.key(0), spec), spec, 1000),
    }
    state = optimizers["l3rs"].init(params)
    held = sum(leaf.size for leaf in jax.tree.leaves(state))
    print(f"{n_floats:,} parameters in {len(params)} leaves")
    print(f"state: {held / n_floats:.4f} floats a parameter  (wanted: ≤ 2.01)")
    for donate in (False, True):
        calls = {}
        for name, tx in optimizers.items():

            def step(params: Any, state: Any, grads: Any, tx: Any = tx) -> Any:
                updates, state = tx.update(grads, state, params, value=jnp.float32(1.0))
                return optax.apply_updates(params, updates), state

            compiled = jax.jit(step, donate_argnums=(0, 1) if donate else ())
            held_by = [jax.tree.map(jnp.copy, params), jax.jit(tx.init)(params)]

            def call(compiled: Any = compiled, held_by: list = held_by) -> None:
                for _ in range(STEPS):
                    held_by[:] = compiled(*held_by, grads)
                jax.block_until_ready(held_by)

            calls[name] = call
        seconds = in_turn(calls, rounds=15)
        times = ", ".join(f"{name} {1e3 * np.median(s) / STEPS:.1f} ms" for name, s in seconds.items())
        how = "donated buffers" if donate else "plain jit"
        print(f"update, {how}: {times}; l3rs / adam: {ratio(seconds, 'l3rs', 'adam')}  (wanted: ≤ 1.5)")
