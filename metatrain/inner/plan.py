"""How candidates run on a device: the faster plan, and how many candidates fit into its memory."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

import l3rs
from metatrain.config import Plan, UserError
from metatrain.inner.devices import device_kind
from metatrain.inner.network import is_torch
from metatrain.inner.population import candidate_losses
from metatrain.inner.rollout import fused_rollout, learned, stepwise_rollout
from metatrain.outer.strategy import Strategy
from tasks import Task, sample
from tasks.base import AnyTask
from tasks.user_code import callbacks

_log = logging.getLogger("metatrain")

_MEMORY_SHARE = 0.8  # of a device; the rest is for fragmentation and other processes

# A population is computed in about so many fused calls, for as many workers to share, unless a call would then hold too
# few candidates to be efficient, or more than it takes.
_CALLS = 8
_AT_ONCE, _AT_ONCE_ON_ACCELERATORS = (4, 16), (64, 1024)  # candidates in a call: fewest, most

# Members in the measurement: enough to see how `vmap` changes convolutions, and what many at once save on accelerators.
_MEMBERS, _MEMBERS_ON_ACCELERATORS = 2, 8
_STEPS = 4
_ROUNDS = 2


def device_memory(device: jax.Device) -> int | None:
    """Bytes that this process may use on a device; None for a CPU, which shares the host's memory."""
    return (device.memory_stats() or {}).get("bytes_limit")


def choose_plan(tasks: Sequence[AnyTask], spec: l3rs.Spec) -> Plan:
    """The plan with the fewest seconds per candidate-step, averaged over the tasks; measured on one device.

    Models without convolutions are fused without a measurement: matrix products are as fast inside a
    loop as outside, and the loop saves one dispatch per step. Tasks of PyTorch have one plan.
    """
    if (known := known_plan(tasks)) is not None:
        return known
    return fastest([plan_seconds([task for task in tasks if isinstance(task, Task)], spec)])


def known_plan(tasks: Sequence[AnyTask]) -> Plan | None:
    """The plan that needs no measurement; None if it depends on the device."""
    if all(map(is_torch, tasks)):
        return "torch"
    return None if any(_has_convolutions(task) for task in tasks if isinstance(task, Task)) else "fused"


def plan_seconds(
    tasks: Sequence[Task], spec: l3rs.Spec, log: Callable[[str], None] = lambda _: None
) -> dict[Plan, float]:
    """Seconds per candidate-step of both plans of JAX, the mean over the tasks; measured on one device.

    `log` is called before each task.
    """
    seconds: dict[Plan, float] = {"fused": 0.0, "stepwise": 0.0}
    for number, task in enumerate(tasks, 1):
        log(f"measuring both plans on task {number} of {len(tasks)}, {task.name}: compiling takes a while")
        for plan, measured in _seconds_per_step(task, spec).items():
            seconds[plan] += measured / len(tasks)
    _log.info(
        "ms per candidate-step on %s: %s", device_kind(), {plan: round(1e3 * s, 2) for plan, s in seconds.items()}
    )
    return seconds


def fastest(measured: Sequence[Mapping[Plan, float]]) -> Plan:
    """The plan with the fewest seconds, the sum over devices."""
    return min(measured[0], key=lambda plan: sum(seconds[plan] for seconds in measured))


def _seconds_per_step(task: Task, spec: l3rs.Spec) -> dict[Plan, float]:
    theta = l3rs.init_meta_params(jax.random.key(0), spec)
    chosen = sample(task, jax.random.key(0))
    device = jax.local_devices()[0]
    theta, data, chosen = jax.device_put((theta, task.data, chosen), device)

    stepwise = stepwise_rollout(task, learned(spec), ("inner_valid",))
    count = _MEMBERS if device.platform == "cpu" else _MEMBERS_ON_ACCELERATORS
    members = jax.tree.map(lambda x: np.stack([x] * count), theta)
    fused = jax.jit(jax.vmap(fused_rollout(task, learned(spec), ("inner_valid",)), (0, None, None, None)))
    with callbacks(task.name):
        return {
            "stepwise": time_steps(lambda n: stepwise(theta, data, chosen, jnp.int32(n)), _STEPS, _ROUNDS)[0],
            "fused": time_steps(lambda n: fused(members, data, chosen, jnp.int32(n)), _STEPS, _ROUNDS)[0] / count,
        }


def check_plan(tasks: Sequence[AnyTask], plan: Plan | Literal["auto"]) -> None:
    """Raise UserError unless the plan can run the tasks."""
    kinds = {is_torch(task) for task in tasks}
    if len(kinds) > 1:
        raise UserError("task.variants mix tasks of JAX and of PyTorch; they must be of one kind")
    if kinds == {True} and plan not in ("auto", "torch"):
        raise UserError(f"execution.plan is {plan}; {tasks[0].name} is a task of PyTorch: allowed are auto and torch")
    if kinds == {False} and plan == "torch":
        raise UserError(
            f"execution.plan is torch; {tasks[0].name} is a task of JAX: allowed are auto, fused and stepwise"
        )


def members_per_call(population: int, plan: Plan, accelerator: bool, fits: Sequence[int | None] = ()) -> int:
    """How many candidates one compiled call computes: one unless fused.

    Args:
      population: candidates of a generation.
      plan: of the run.
      accelerator: whether they run on accelerators rather than CPU cores.
      fits: how many fit into the memory of each kind of device, see `members_that_fit`; None without a limit.
    """
    if plan != "fused":
        return 1
    return min(candidates_at_once(population, accelerator), *(limit for limit in fits if limit is not None), population)


def members_that_fit(task: Task, spec: l3rs.Spec, strategy: Strategy, memory: int) -> int:
    """How many candidates of a fused call fit into so many bytes. XLA states what it would allocate; nothing runs.

    Raises:
      UserError: not even one.
    """
    one, two = (scratch_bytes(task, spec, strategy, members) for members in (1, 2))
    each, shared = max(two - one, 1), max(2 * one - two, 0) + sum(x.nbytes for x in jax.tree.leaves(task.data))
    fits = int(_MEMORY_SHARE * memory - shared) // each
    if fits < 1:
        raise UserError(
            f"one candidate of {task.name} needs {(shared + each) / 2**20:,.0f} MiB, but a device has "
            f"{memory / 2**20:,.0f} MiB; use a smaller task.batch_size or model"
        )
    return fits


def candidates_at_once(population: int, accelerator: bool) -> int:
    """How many candidates of a fused plan run in one call, if memory does not limit it.

    The number decides the last bits of a result. So it depends on the kind of device and on the population, and never
    on how many devices or workers there are: a run gives the same bits on any number of them.
    """
    fewest, most = _AT_ONCE_ON_ACCELERATORS if accelerator else _AT_ONCE
    return min(max(math.ceil(population / _CALLS), fewest), most, population)


def scratch_bytes(task: Task, spec: l3rs.Spec, strategy: Strategy, members: int) -> int:
    """Bytes of temporary memory that XLA allocates for a fused call of `members` candidates."""
    state = jax.eval_shape(strategy.init, jax.random.key(0), l3rs.init_meta_params(jax.random.key(0), spec))
    key = jax.random.key_data(jax.random.key(0))
    call = candidate_losses(task, spec, strategy, "fused")
    chosen = sample(task, jax.random.key(0))
    compiled = call.lower(state, key, chosen, np.int32(1), task.data, np.arange(members)).compile()
    return int(compiled.memory_analysis().temp_size_in_bytes)


def time_steps(run: Callable[[int], object], steps: int, rounds: int) -> tuple[float, float]:
    """Measure (seconds per step, seconds per call apart from its steps).

    It compares the fastest of `rounds` calls of 1 step with the fastest of `rounds` calls of `steps`
    more, and uses more steps as long as noise hides the difference.

    Args:
      run: computes the given number of steps.
    """

    def seconds(count: int) -> float:
        began = time.perf_counter()
        jax.block_until_ready(run(count))
        return time.perf_counter() - began

    seconds(1)  # compiles
    while True:
        many, one = (min(seconds(count) for _ in range(rounds)) for count in (steps + 1, 1))
        if many > one:
            per_step = (many - one) / steps
            return per_step, one - per_step
        steps *= 4


def _has_convolutions(task: Task) -> bool:
    def loss(data: object, i: jax.Array) -> jax.Array:
        return task.loss(*task.init(data, i), task.batch(data, jax.random.key(0)), True)[0]  # type: ignore[arg-type]

    return "conv_general_dilated" in str(jax.make_jaxpr(loss)(task.data, np.int32(0)))
