"""Whole fine-tuning steps in JAX, forward, backward and update, against those with `optax.adamw`.

ResNet-18 and ViT-S on 64 × 64 images, batch 16. Times are the CPU time of all threads.
"""

from __future__ import annotations

import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import l3rs
from tasks.classification import classification_loss
from tasks.models import make_model
from tests.benchmarks.timing import in_turn, medians, ratio

BATCH, CLASSES, ROUNDS = 16, 100, 7
NETWORKS: dict[str, dict[str, Any]] = {"resnet18": {}, "vit_small": {"patch_size": 8}}


def main() -> None:
    for name, options in NETWORKS.items():
        measure(name, options)


def measure(name: str, options: dict[str, Any]) -> None:
    """Time a step of a network with both optimizers."""
    model = make_model(name, (64, 64, 3), CLASSES, **options)
    params, stats = jax.jit(model.init)(jax.random.key(0))
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.integers(0, 256, (BATCH, 64, 64, 3), dtype=np.uint8))
    batch = {"image": images, "label": jnp.asarray(rng.integers(0, CLASSES, BATCH))}
    spec = l3rs.Spec.create(params, ("adam", "sgd", "weight_decay"))
    optimizers = {
        "l3rs": l3rs.learned_optimizer(l3rs.init_meta_params(jax.random.key(0), spec), spec, 10**6),
        "adamw": optax.with_extra_args_support(optax.adamw(1e-4)),
    }
    loss_of = classification_loss(model)
    calls = {}
    for optimizer, tx in optimizers.items():

        @functools.partial(jax.jit, donate_argnums=(0, 1))
        def step(params: Any, state: Any, tx: optax.GradientTransformationExtraArgs = tx) -> Any:
            loss, grads = jax.value_and_grad(lambda p: loss_of(p, stats, batch, True)[0])(params)
            updates, state = tx.update(grads, state, params, value=loss)
            return optax.apply_updates(params, updates), state

        held = [jax.tree.map(jnp.copy, params), jax.jit(tx.init)(params)]

        def call(step: Any = step, held: list[Any] = held) -> None:
            held[:] = jax.block_until_ready(step(*held))

        calls[optimizer] = call
    seconds = in_turn(calls, ROUNDS, time.process_time)
    times = medians(seconds, decimals=0)
    found = ratio(seconds, "l3rs", "adamw")
    print(
        f"a fine-tuning step in JAX, {name}, 64 × 64, batch {BATCH}: {times}; l3rs / adamw: {found}  (wanted: ≤ 1.05)"
    )
