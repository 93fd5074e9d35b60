"""A generation's candidate-steps per second, against the same loop with bare Adam in place of L3RS.

MLP 64-32-10, batch 64, population 32, horizon 50, all cores: one device a core, half of the
population each. What bounds it: the inner network's own forward and backward pass.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import l3rs
from metatrain.inner.devices import use_cores
from metatrain.inner.rollout import MakeOptimizer, fused_rollout
from tasks import Aux, Task, sample, uniform_batches
from tests.benchmarks.timing import in_turn, ratio

POPULATION, HORIZON, BATCH = 32, 50, 64
GENERATIONS = 10  # a timing


def mlp() -> Task:
    """The benchmark's network and made-up data."""
    rng = np.random.default_rng(0)

    def split(n: int) -> dict[str, np.ndarray]:
        return {"x": rng.normal(size=(n, 64)).astype(np.float32), "y": rng.integers(0, 10, n).astype(np.int32)}

    def init(data: Any, i: jax.Array) -> tuple[dict, dict]:
        del data
        one, two = jax.random.split(jax.random.key(i))
        first = {"kernel": jax.random.normal(one, (64, 32)) / 8, "bias": jnp.zeros(32)}
        return {"a": first, "b": {"kernel": jax.random.normal(two, (32, 10)) / 6, "bias": jnp.zeros(10)}}, {}

    def loss(params: dict, stats: dict, batch: dict, train: bool) -> tuple[jax.Array, Aux]:
        del train
        hidden = jax.nn.relu(batch["x"] @ params["a"]["kernel"] + params["a"]["bias"])
        logits = hidden @ params["b"]["kernel"] + params["b"]["bias"]
        value = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()
        return value, Aux(stats, jnp.mean(jnp.argmax(logits, -1) == batch["y"]))

    data = {"inner_train": split(2000), "inner_valid": split(64), "outer_valid": split(64), "test": split(64)}
    return Task("mlp", data, init, uniform_batches(BATCH), loss, {"meta_train": range(8), "held_out": range(8, 16)})


def main() -> None:
    use_cores()
    task = mlp()
    spec = l3rs.Spec.create(task.params_shape())
    devices = jax.local_devices()
    share = POPULATION // len(devices)
    thetas = jax.vmap(lambda key: l3rs.init_meta_params(key, spec))(jax.random.split(jax.random.key(0), share))
    makers: dict[str, tuple[MakeOptimizer, Any]] = {
        "adam": (lambda rate, _: optax.with_extra_args_support(optax.adam(rate)), jnp.full(share, 1e-3)),
        "l3rs": (lambda theta, horizon: l3rs.learned_optimizer(theta, spec, horizon), thetas),
    }
    chosen = sample(task, jax.random.key(1))
    calls = {}
    with ThreadPoolExecutor(len(devices)) as pool:
        for name, (make, hyper) in makers.items():
            rollout = jax.jit(jax.vmap(fused_rollout(task, make, ("outer_valid",)), (0, None, None, None)))
            places = [jax.device_put((hyper, task.data, chosen, np.int32(HORIZON)), device) for device in devices]

            def generation(rollout: Any = rollout, places: Any = places) -> None:
                for _ in range(GENERATIONS):
                    list(pool.map(lambda arguments: jax.block_until_ready(rollout(*arguments)), places))

            calls[name] = generation
        seconds = in_turn(calls, rounds=21)
    rates = {name: share * len(devices) * HORIZON * GENERATIONS / np.median(s) for name, s in seconds.items()}
    print(f"candidate-steps/s on {len(devices)} devices: " + ", ".join(f"{n} {r:,.0f}" for n, r in rates.items()))
    print(f"rate of l3rs / rate of adam: {ratio(seconds, 'adam', 'l3rs')}  (wanted: ≥ 0.8)")
