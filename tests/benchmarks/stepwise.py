"""A candidate-step of the stepwise plan, against a bare jitted SGD step of the same network.

ResNet-8 with group norm, 32 × 32, batch 32, one core. The candidate-step draws and augments its batch
and asks the learned optimizer; the bare step has its batch in hand. What bounds both: convolutions.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

import l3rs
from metatrain.inner.plan import plan_seconds
from metatrain.inner.rollout import stepwise_rollout
from tasks import Task, sample, uniform_batches
from tasks.base import Batch, Data
from tasks.classification import RANDOM_POOLS, classification_loss
from tasks.data.crop_flip import random_crop_flip
from tasks.models import make_model
from tests.benchmarks.timing import in_turn, medians, ratio, use_one_core

STEPS = 20  # a timing


def resnet(name: str, norm: str) -> Task:
    """Made-up images; their content does not change the running time."""
    rng = np.random.default_rng(0)
    sizes = {"inner_train": 512, "inner_valid": 8, "outer_valid": 8, "test": 8}
    data = {
        split: {
            "image": rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8),
            "label": rng.integers(0, 25, n).astype(np.int32),
        }
        for split, n in sizes.items()
    }
    model = make_model(name, (32, 32, 3), 25, norm=norm)
    draw = uniform_batches(32)

    def batch(data: Data, key: jax.Array) -> Batch:
        examples = draw(data, key)
        return {**examples, "image": random_crop_flip(key, examples["image"])}

    def init(_: Data, i: jax.Array) -> tuple:
        return model.init(jax.random.key(i))

    return Task(name, data, init, batch, classification_loss(model), RANDOM_POOLS)


def resnet8() -> Task:
    return resnet("resnet8", "group")


def main() -> None:
    use_one_core()
    task = resnet8()
    device = jax.devices()[0]
    spec = l3rs.Spec.create(task.params_shape())
    theta, data, chosen = jax.device_put(
        (l3rs.init_meta_params(jax.random.key(0), spec), task.data, sample(task, jax.random.key(0))), device
    )
    rollout = stepwise_rollout(task, lambda theta, horizon: l3rs.learned_optimizer(theta, spec, horizon), ("test",))
    params, stats = task.init(data, jnp.int32(0))
    batch = task.batch(data, jax.random.key(0))

    @jax.jit
    def sgd(params: dict) -> dict:
        grads = jax.grad(lambda p: task.loss(p, stats, batch, True)[0])(params)
        return jax.tree.map(lambda p, g: p - 1e-3 * g, params, grads)

    def bare() -> None:
        held = params
        for _ in range(STEPS):
            held = sgd(held)
        jax.block_until_ready(held)

    calls = {"bare SGD": bare, "candidate": lambda: rollout(theta, data, chosen, np.int32(STEPS))}
    seconds = in_turn(calls, rounds=11)
    times = medians(seconds, STEPS)
    print(
        f"a step, stepwise plan: {times}; candidate / bare: {ratio(seconds, 'candidate', 'bare SGD')}  (wanted: ≤ 1.15)"
    )
    measured = plan_seconds([task], spec)
    print(f"a candidate-step, stepwise / fused plan: {measured['stepwise'] / measured['fused']:.2f}")
