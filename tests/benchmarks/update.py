"""The deployed update, `apply_updates` included, against optax.adam on trees shaped like real networks.

What bounds it: memory traffic. XLA's CPU backend makes a pass for every output, so that Adam reads and writes ten
arrays of the parameters' size: m, v and the parameters, one after another. L3RS has to know norms and inner products
before it can update: nine more. With donated buffers Adam runs at that bound; without, both pay for fresh memory.

Tried, measured and not kept: directions that are stored until they are mixed. Where the new parameters are fresh memory
they lie there and cost nothing (1.4 … 1.7 × Adam instead of 1.6 … 2.1), but with donated buffers, as in training steps,
they are scratch memory as large as the network, which the system takes back after every call (2.1 … 3.4 × instead of
1.9 … 2.3). Loops over blocks that fit a cache, and several sums in one reduction, are slower: neither is vectorized.
XLA's own multi-output fusion (its CPU backend's extra option) makes Adam quicker and L3RS slower: 2.1 and 2.6 ×.
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
from tests.benchmarks.timing import in_turn, medians, ratio

STEPS = 5  # a timing


def main() -> None:
    for network, shapes in NETWORKS.items():
        measure(network, shapes())
    measure_training()


def measure(network: str, shapes: Shapes) -> None:
    rng = np.random.default_rng(0)
    params = {f"{i:03d}": jnp.asarray(0.05 * rng.normal(size=s), jnp.float32) for i, s in enumerate(shapes)}
    grads = jax.tree.map(lambda p: 0.01 * p + 0.001, params)
    spec = l3rs.Spec.create(params)
    optimizers = {
        "adam": optax.with_extra_args_support(optax.adam(1e-3)),
        "lion": optax.with_extra_args_support(optax.lion(1e-4)),
        "l3rs": l3rs.learned_optimizer(l3rs.init_meta_params(jax.random.key(0), spec), spec, 1000),
    }
    n_floats = sum(p.size for p in params.values())
    print(f"{network}: {n_floats:,} parameters in {len(params)} leaves; state, floats a parameter: ", end="")
    print(", ".join(f"{name} {floats(tx.init(params)) / n_floats:.4f}" for name, tx in optimizers.items()))
    for donate in (False, True):
        calls = {name: updating(tx, params, grads, donate) for name, tx in optimizers.items()}
        seconds = in_turn(calls, rounds=15)
        times = medians(seconds, STEPS)
        how = "donated buffers" if donate else "plain jit"
        print(f"  {how}: {times}; l3rs / adam: {ratio(seconds, 'l3rs', 'adam')}  (wanted: ≤ 1.3)")


def measure_training() -> None:
    """A whole training step, where the update has the smallest of gradients beside it: those of 16 examples."""
    rng = np.random.default_rng(0)
    params = {f"{i:03d}": jnp.asarray(rng.normal(size=(1024, 1024)) / 32, jnp.float32) for i in range(11)}
    x = jnp.asarray(rng.normal(size=(16, 1024)), jnp.float32)

    def loss(params: dict[str, jax.Array]) -> jax.Array:
        return jnp.mean(functools.reduce(lambda h, kernel: jnp.tanh(h @ kernel), params.values(), x) ** 2)

    spec = l3rs.Spec.create(params)
    optimizers = {
        "adam": optax.with_extra_args_support(optax.adam(1e-3)),
        "l3rs": l3rs.learned_optimizer(l3rs.init_meta_params(jax.random.key(0), spec), spec, 10**6),
    }
    calls = {name: training(tx, params, loss) for name, tx in optimizers.items()}
    seconds = in_turn(calls, rounds=15)
    times = medians(seconds, STEPS)
    print(f"a whole training step, MLP of 11.5 M parameters, 16 examples: {times}; l3rs / adam: ", end="")
    print(ratio(seconds, "l3rs", "adam"))


def training(
    tx: optax.GradientTransformationExtraArgs, params: Any, loss: Callable[[Any], jax.Array]
) -> Callable[[], object]:
    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any) -> Any:
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params, value=value)
        return optax.apply_updates(params, updates), state

    return repeated(step, params, tx)


def floats(state: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.floating))


def updating(tx: optax.GradientTransformationExtraArgs, params: Any, grads: Any, donate: bool) -> Callable[[], object]:
    @functools.partial(jax.jit, donate_argnums=(0, 1) if donate else ())
    def step(params: Any, state: Any, grads: Any) -> Any:
        updates, state = tx.update(grads, state, params, value=jnp.float32(1.0))
        return optax.apply_updates(params, updates), state

    return repeated(lambda params, state: step(params, state, grads), params, tx)


def repeated(step: Callable[[Any, Any], Any], params: Any, tx: optax.GradientTransformation) -> Callable[[], object]:
    """`STEPS` steps a call, from where the last call ended."""
    held = [jax.tree.map(jnp.copy, params), jax.jit(tx.init)(params)]

    def call() -> None:
        for _ in range(STEPS):
            held[:] = step(*held)
        jax.block_until_ready(held)

    return call
