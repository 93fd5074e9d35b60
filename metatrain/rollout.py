"""One inner loop: a candidate trains the task's network, and is judged by where it ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from tasks import Task, TaskSample
from tasks.base import Data, Params, Stats, size

# (hyper-parameters, horizon) -> optimizer. Hyper-parameters are any pytree: the meta-parameters of
# L3RS, or the learning rate of a baseline.
MakeOptimizer = Callable[[Any, jax.Array], optax.GradientTransformationExtraArgs]

_EVALUATION_CHUNK = 1024  # examples a forward pass; bounds memory


class Score(NamedTuple):
    """Mean loss and accuracy over a split."""

    loss: jax.Array  # float32 []
    accuracy: jax.Array  # float32 []


Rollout = Callable[[Any, Data, TaskSample, jax.Array], dict[str, Score]]


def fused_rollout(task: Task, make_optimizer: MakeOptimizer, splits: Sequence[str]) -> Rollout:
    """The inner loop as one pure function with a dynamic horizon: one compilation serves all.

    Args:
      task: what is trained.
      make_optimizer: what trains it.
      splits: where the end result is judged.

    Returns:
      (hyper-parameters, data, task sample, horizon int32 []) -> {split: Score}. It can be jitted,
      and vmapped over hyper-parameters or samples.
    """

    def rollout(hyper: Any, data: Data, sample: TaskSample, horizon: jax.Array) -> dict[str, Score]:
        params, stats = task.init(data, sample.init)
        optimizer = make_optimizer(hyper, horizon)

        def step(carry: tuple[jax.Array, Params, Stats, optax.OptState]) -> Any:
            i, params, stats, state = carry
            params, stats, state = train_step(task, optimizer, data, sample, i, params, stats, state)
            return i + 1, params, stats, state

        start = (jnp.zeros([], jnp.int32), params, stats, optimizer.init(params))
        _, params, stats, _ = jax.lax.while_loop(lambda carry: carry[0] < horizon, step, start)
        return {split: evaluate_split(task, data, split, params, stats) for split in splits}

    return rollout


def train_step(
    task: Task,
    optimizer: optax.GradientTransformationExtraArgs,
    data: Data,
    sample: TaskSample,
    i: jax.Array,
    params: Params,
    stats: Stats,
    state: optax.OptState,
) -> tuple[Params, Stats, optax.OptState]:
    """Step `i` (from 0) of an inner loop."""
    key = jax.random.fold_in(jax.random.wrap_key_data(sample.key), i)
    batch = task.batch(data, key)
    (value, aux), grads = jax.value_and_grad(task.loss, has_aux=True)(params, stats, batch, True)
    updates, state = optimizer.update(grads, state, params, value=value)
    return optax.apply_updates(params, updates), aux.stats, state


def evaluate_split(task: Task, data: Data, split: str, params: Params, stats: Stats) -> Score:
    """Mean loss and accuracy over all examples of a split, in chunks of equal weight per example."""
    examples = data[split]
    n = size(examples)
    chunk = min(n, _EVALUATION_CHUNK)
    whole = n // chunk * chunk

    def score(batch: Any) -> jax.Array:
        loss, aux = task.loss(params, stats, batch, False)
        return jnp.stack([loss, aux.accuracy])

    chunks = jax.tree.map(lambda x: x[:whole].reshape(-1, chunk, *x.shape[1:]), examples)
    total = (
        jax.lax.map(score, chunks).sum(0) * chunk
        if whole > chunk
        else score(jax.tree.map(lambda x: x[0], chunks)) * chunk
    )
    if whole < n:
        total += score(jax.tree.map(lambda x: x[whole:], examples)) * (n - whole)
    loss, accuracy = total / n
    return Score(loss, accuracy)
