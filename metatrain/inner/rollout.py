"""The inner loop: an optimizer trains a task's network, and the result is evaluated."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import l3rs
from metatrain.inner.params import deployed_params
from tasks import Task, TaskSample
from tasks.base import Batch, Data, Params, Stats, size

# (hyper-parameters, horizon) -> optimizer. Hyper-parameters are any pytree: the meta-parameters of
# L3RS, or the learning rate of a baseline.
MakeOptimizer = Callable[[Any, jax.Array], optax.GradientTransformationExtraArgs]

_EVALUATION_CHUNK = 256  # examples a forward pass; bounds memory


class Score(NamedTuple):
    """Mean loss and accuracy over a split."""

    loss: jax.Array  # float32 []
    accuracy: jax.Array  # float32 []


def learned(spec: l3rs.Spec, guard: bool | l3rs.Guard = False) -> MakeOptimizer:
    """L3RS of the form `spec`, as a function of its meta-parameters."""
    return lambda theta, horizon: l3rs.learned_optimizer(theta, spec, horizon, guard=guard)


Rollout = Callable[..., dict[str, Score]]


def fused_rollout(task: Task, make_optimizer: MakeOptimizer, splits: Sequence[str]) -> Rollout:
    """The inner loop as one pure function with a dynamic horizon: one compilation serves all.

    Args:
      task: what is trained.
      make_optimizer: what trains it.
      splits: on which the result is evaluated, unless a call gives others.

    Returns:
      (hyper-parameters, data, task sample, horizon int32 [], splits, points) -> {split: Score}. With
      `points`, increasing numbers of steps int32 [K], the parameters are evaluated after each of them
      and scores are [K]; without, at the horizon. It can be jitted, and vmapped over hyper-parameters
      or samples.
    """

    def rollout(
        hyper: Any,
        data: Data,
        sample: TaskSample,
        horizon: jax.Array,
        splits: Sequence[str] = splits,
        points: jax.Array | None = None,
    ) -> dict[str, Score]:
        optimizer = make_optimizer(hyper, horizon)
        step = functools.partial(_step, task, optimizer, data, sample)

        def advance(carry: Carry, until: jax.Array) -> tuple[Carry, dict[str, Score]]:
            carry = jax.lax.while_loop(lambda c: c.step < until, step, carry)
            params = deployed_params(carry.state, carry.params)
            return carry, {split: evaluate_split(task, data, split, params, carry.stats) for split in splits}

        start = _start(task, optimizer, data, sample)
        return (advance(start, horizon) if points is None else jax.lax.scan(advance, start, points))[1]

    return rollout


def stepwise_rollout(task: Task, make_optimizer: MakeOptimizer, splits: Sequence[str]) -> Rollout:
    """The inner loop as a Python loop over a compiled step.

    For convolutional networks on a CPU: XLA runs a convolution 10 times slower inside a loop than
    outside, and a step dispatched from Python costs 0.1 ms. It runs on the device of its arguments.
    Arguments, result and, up to rounding, values are those of `fused_rollout`; it cannot be jitted or
    vmapped.
    """
    start, step = _compiled(task, make_optimizer)
    score = host_scorer(task)

    def rollout(
        hyper: Any,
        data: Data,
        sample: TaskSample,
        horizon: jax.Array,
        splits: Sequence[str] = splits,
        points: Sequence[int] | np.ndarray | None = None,
    ) -> dict[str, Score]:
        carry = start(hyper, data, sample, horizon)
        done, scores = 0, []
        for until in [int(horizon)] if points is None else [int(point) for point in points]:
            for _ in range(done, until):
                carry = step(hyper, data, sample, horizon, carry)
            done = max(done, until)
            params = deployed_params(carry.state, carry.params)
            scores.append({split: score(data[split], params, carry.stats) for split in splits})
        if points is None:
            return {split: Score(*found) for split, found in scores[0].items()}
        return {split: Score(*np.stack([row[split] for row in scores]).T) for split in splits}

    return rollout


def inner_steps(
    task: Task, make_optimizer: MakeOptimizer, hyper: Any, data: Data, sample: TaskSample, horizon: int
) -> Iterator[Carry]:
    """One inner loop, step by step: yields the `Carry` after each of `horizon` steps.

    Read a `Carry` before asking for the next one, which reuses its memory.
    """
    start, step = _compiled(task, make_optimizer)
    total = jnp.int32(horizon)
    carry = start(hyper, data, sample, total)
    for _ in range(horizon):
        carry = step(hyper, data, sample, total, carry)
        yield carry


class Carry(NamedTuple):
    """The state of an inner loop between two steps."""

    step: jax.Array  # int32 [], steps done
    params: Params
    stats: Stats
    state: optax.OptState


def _compiled(task: Task, make_optimizer: MakeOptimizer) -> tuple[Callable[..., Carry], Callable[..., Carry]]:
    """The compiled start of a loop, (hyper, data, sample, horizon) -> carry, and its step, (…, carry) -> carry."""

    @jax.jit
    def start(hyper: Any, data: Data, sample: TaskSample, horizon: jax.Array) -> Carry:
        return _start(task, make_optimizer(hyper, horizon), data, sample)

    @functools.partial(jax.jit, donate_argnums=4)
    def step(hyper: Any, data: Data, sample: TaskSample, horizon: jax.Array, carry: Carry) -> Carry:
        return _step(task, make_optimizer(hyper, horizon), data, sample, carry)

    return start, step


def _start(task: Task, optimizer: optax.GradientTransformationExtraArgs, data: Data, sample: TaskSample) -> Carry:
    params, stats = task.init(data, sample.init)
    return Carry(jnp.zeros([], jnp.int32), params, stats, optimizer.init(params))


def _step(
    task: Task, optimizer: optax.GradientTransformationExtraArgs, data: Data, sample: TaskSample, carry: Carry
) -> Carry:
    key = jax.random.fold_in(jax.random.wrap_key_data(sample.key), carry.step)
    batch = task.batch(data, key)
    (value, aux), grads = jax.value_and_grad(task.loss, has_aux=True)(carry.params, carry.stats, batch, True)
    updates, state = optimizer.update(grads, carry.state, carry.params, value=value)
    return Carry(carry.step + 1, optax.apply_updates(carry.params, updates), aux.stats, state)


def _score(task: Task, params: Params, stats: Stats, batch: Batch) -> jax.Array:
    loss, aux = task.loss(params, stats, batch, False)
    return jnp.stack([loss, aux.accuracy])


def host_scorer(task: Task) -> Callable[[Batch, Params, Stats], np.ndarray]:
    """A function (examples, params, stats) -> mean loss and accuracy, float32 [2].

    As `evaluate_split`, but with a Python loop over chunks, for convolutional networks on a CPU.
    """

    @functools.partial(jax.jit, static_argnums=2)
    def total(examples: Batch, first: jax.Array, count: int, params: Params, stats: Stats) -> jax.Array:
        batch = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, first, count), examples)
        return _score(task, params, stats, batch) * count

    def score(examples: Batch, params: Params, stats: Stats) -> np.ndarray:
        n = size(examples)
        parts = [
            total(examples, np.int32(first), min(_EVALUATION_CHUNK, n - first), params, stats)
            for first in range(0, n, _EVALUATION_CHUNK)
        ]
        return np.sum([np.asarray(part) for part in parts], axis=0) / n

    return score


def evaluate_split(task: Task, data: Data, split: str, params: Params, stats: Stats) -> Score:
    """Mean loss and accuracy over all examples of a split, computed in chunks to bound memory."""
    examples = data[split]
    n = size(examples)
    chunk = min(n, _EVALUATION_CHUNK)
    whole = n // chunk * chunk
    score = functools.partial(_score, task, params, stats)
    chunks = jax.tree.map(lambda x: x[:whole].reshape(-1, chunk, *x.shape[1:]), examples)
    total = jax.lax.map(score, chunks).sum(0) * chunk
    if whole < n:
        total += score(jax.tree.map(lambda x: x[whole:], examples)) * (n - whole)
    loss, accuracy = total / n
    return Score(loss, accuracy)
