"""How candidates run on this machine: which plan is faster, and how many of them fit a device."""

from __future__ import annotations

import functools
import logging
import math
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

import l3rs
from metatrain.config import UserError
from metatrain.inner.population import candidate_losses
from metatrain.inner.rollout import Plan, fused_rollout, learned, stepwise_rollout
from metatrain.outer.strategy import Strategy
from tasks import Task, sample

_log = logging.getLogger("metatrain")

_SHARE = 0.8  # of a device's memory; the rest is fragmentation and what others hold

_MEMBERS = 2  # enough for `vmap` to show what it makes of convolutions
_STEPS = 4
_ROUNDS = 2


def device_memory(device: jax.Device) -> int | None:
    """Bytes that this process may use on a device; None on a CPU, where the host's memory is shared."""
    return (device.memory_stats() or {}).get("bytes_limit")


def choose_plan(tasks: Sequence[Task], spec: l3rs.Spec) -> Plan:
    """The plan with the fewest seconds a candidate-step on average over the tasks, measured on one device.

    Models without convolutions are fused without a measurement: a loop of matrix products costs what
    its operations cost, and saves a dispatch a step.
    """
    if not any(map(_has_convolutions, tasks)):
        return "fused"
    seconds: dict[Plan, float] = {"stepwise": 0.0, "fused": 0.0}
    for task in tasks:
        for plan, measured in _seconds_a_step(task, spec).items():
            seconds[plan] += measured / len(tasks)
    _log.info("ms a candidate-step: %s", {plan: round(1e3 * s, 2) for plan, s in seconds.items()})
    return "stepwise" if seconds["stepwise"] < seconds["fused"] else "fused"


def _seconds_a_step(task: Task, spec: l3rs.Spec) -> dict[Plan, float]:
    theta = l3rs.init_meta_params(jax.random.key(0), spec)
    chosen = sample(task, jax.random.key(0))
    device = jax.local_devices()[0]
    theta, data, chosen = jax.device_put((theta, task.data, chosen), device)

    stepwise = stepwise_rollout(task, learned(spec), ("inner_valid",))
    members = jax.tree.map(lambda x: np.stack([x] * _MEMBERS), theta)
    fused = jax.jit(jax.vmap(fused_rollout(task, learned(spec), ("inner_valid",)), (0, None, None, None)))
    return {
        "stepwise": time_steps(lambda n: stepwise(theta, data, chosen, jnp.int32(n)), _STEPS, _ROUNDS)[0],
        "fused": time_steps(lambda n: fused(members, data, chosen, jnp.int32(n)), _STEPS, _ROUNDS)[0] / _MEMBERS,
    }


def members_per_call(
    task: Task,
    spec: l3rs.Spec,
    strategy: Strategy,
    population: int,
    plan: Plan,
    calls: int,
    devices: Sequence[jax.Device],
    memory: Callable[[jax.Device], int | None] = device_memory,
) -> int:
    """How many candidates one compiled call holds.

    Stepwise: one. Fused: what the population comes to when it is cut into `calls`, if so many fit the
    smallest device's memory. Their memory is what XLA says it allocates, without running anything.

    Raises:
      UserError: not even one candidate fits.
    """
    if plan == "stepwise":
        return 1
    wanted = math.ceil(population / calls)
    free = [bytes_ for bytes_ in map(memory, devices) if bytes_ is not None]
    if not free:
        return wanted
    lowered = functools.partial(_scratch, task, spec, strategy)
    one, two = lowered(1), lowered(2)
    each, shared = max(two - one, 1), max(2 * one - two, 0) + sum(x.nbytes for x in jax.tree.leaves(task.data))
    fits = int(_SHARE * min(free) - shared) // each
    if fits < 1:
        raise UserError(
            f"one candidate of {task.name} needs {(shared + each) / 2**20:,.0f} MiB, a device has "
            f"{min(free) / 2**20:,.0f} MiB; use a smaller task.batch_size or model"
        )
    return min(wanted, fits)


def _scratch(task: Task, spec: l3rs.Spec, strategy: Strategy, members: int) -> int:
    """Bytes that XLA allocates for a fused call of so many members."""
    state = jax.eval_shape(strategy.init, jax.random.key(0), l3rs.init_meta_params(jax.random.key(0), spec))
    key = jax.random.key_data(jax.random.key(0))
    call = candidate_losses(task, spec, strategy, "fused")
    chosen = sample(task, jax.random.key(0))
    compiled = call.lower(state, key, chosen, np.int32(1), task.data, np.arange(members)).compile()
    return int(compiled.memory_analysis().temp_size_in_bytes)


def time_steps(run: Callable[[int], object], steps: int, rounds: int) -> tuple[float, float]:
    """(seconds of a step, seconds of a call beside its steps): the best of `rounds` calls of 1 step
    against the best of as many with `steps` more; with even more where noise hides what those cost."""

    def seconds(count: int) -> float:
        began = time.perf_counter()
        jax.block_until_ready(run(count))
        return time.perf_counter() - began

    seconds(1)  # compiles
    while True:
        many, one = (min(seconds(count) for _ in range(rounds)) for count in (steps + 1, 1))
        if many > one:
            a_step = (many - one) / steps
            return a_step, one - a_step
        steps *= 4


def _has_convolutions(task: Task) -> bool:
    def loss(data: object, i: jax.Array) -> jax.Array:
        return task.loss(*task.init(data, i), task.batch(data, jax.random.key(0)), True)[0]  # type: ignore[arg-type]

    return "conv_general_dilated" in str(jax.make_jaxpr(loss)(task.data, np.int32(0)))
