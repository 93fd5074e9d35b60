"""Which plan runs a task's inner loops faster on this machine: measured, because it depends on the model."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

import l3rs
from metatrain.rollout import Plan, fused_rollout, learned, stepwise_rollout
from tasks import Task, sample

_log = logging.getLogger("metatrain")

_MEMBERS = 2  # enough for `vmap` to show what it makes of convolutions
_STEPS = 4


def choose_plan(task: Task, spec: l3rs.Spec) -> Plan:
    """The plan with the fewest seconds a candidate-step, measured on one device.

    A model without convolutions is fused without a measurement: a loop of matrix products costs what
    its operations cost, and saves a dispatch a step.
    """
    if not _has_convolutions(task):
        return "fused"
    theta = l3rs.init(jax.random.key(0), spec)
    chosen = sample(task, jax.random.key(0))
    device = jax.local_devices()[0]
    theta, data, chosen = jax.device_put((theta, task.data, chosen), device)

    stepwise = stepwise_rollout(task, learned(spec), ("inner_valid",))
    members = jax.tree.map(lambda x: np.stack([x] * _MEMBERS), theta)
    fused = jax.jit(jax.vmap(fused_rollout(task, learned(spec), ("inner_valid",)), (0, None, None, None)))
    seconds = {
        "stepwise": _seconds_a_step(lambda steps: stepwise(theta, data, chosen, jnp.int32(steps))),
        "fused": _seconds_a_step(lambda steps: fused(members, data, chosen, jnp.int32(steps))) / _MEMBERS,
    }
    _log.info("ms a candidate-step: %s", {plan: round(1e3 * s, 2) for plan, s in seconds.items()})
    return "stepwise" if seconds["stepwise"] < seconds["fused"] else "fused"


def _seconds_a_step(run: Callable[[int], object]) -> float:
    def seconds(steps: int) -> float:
        began = time.perf_counter()
        jax.block_until_ready(run(steps))
        return time.perf_counter() - began

    seconds(1)  # compiles
    return (min(seconds(_STEPS + 1) for _ in range(2)) - min(seconds(1) for _ in range(2))) / _STEPS


def _has_convolutions(task: Task) -> bool:
    def loss(data: object, i: jax.Array) -> jax.Array:
        return task.loss(*task.init(data, i), task.batch(data, jax.random.key(0)), True)[0]  # type: ignore[arg-type]

    return "conv_general_dilated" in str(jax.make_jaxpr(loss)(task.data, np.int32(0)))
