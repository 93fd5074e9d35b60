"""Costs: seconds of a training step and size of the state, one optimizer at a time."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from l3rs.baselines import iomt
from metatrain.evaluation.baselines import Baseline, Interleaved, Tuned
from metatrain.evaluation.learned import LearnedOptimizer
from metatrain.evaluation.records import L3RS, Cost
from metatrain.evaluation.runner import Conditions, Runner, maker
from metatrain.inner.plan import time_steps
from metatrain.inner.rollout import MakeOptimizer
from tasks import Task

_TIMED_STEPS = {"fused": 60, "stepwise": 8}  # long enough for the clock, short enough to wait for
_ROUNDS = 3


def measure_costs(
    ours: LearnedOptimizer | None, rivals: Mapping[str, Baseline | Interleaved], conditions: Conditions
) -> list[Cost]:
    """The cost of a training step with each optimizer and schedule, on the first device."""
    conditions.log(
        f"{conditions.setting}: what a step costs with each of the {len(rivals) + (ours is not None)} optimizers"
    )
    if conditions.plan == "torch":
        from metatrain.evaluation.torch_runs import torch_costs

        return torch_costs(ours, rivals, conditions)
    costs = [] if ours is None else _measure([L3RS], ours.make, [ours.rows], conditions)
    for name, baseline in rivals.items():
        labels = [f"{name}/{schedule}" for schedule in baseline.schedules]
        hypers = [Tuned.grid([baseline.learning_rate], schedule) for schedule in baseline.schedules]
        costs += _measure(labels, maker(baseline, conditions), hypers, conditions)
    return costs


def _measure(
    labels: Sequence[str], make: MakeOptimizer | Interleaved, hypers: Sequence[Any], conditions: Conditions
) -> list[Cost]:
    """Of one optimizer with several hyper-parameters, each with a leading axis [1]."""
    run = Runner(conditions, make, jax.local_devices()[0])
    assert isinstance(conditions.task, Task)
    shape = conditions.task.params_shape()
    size = max(sum(leaf.size for leaf in jax.tree.leaves(shape)), 1)
    costs = []
    for label, hyper in zip(labels, hypers, strict=True):
        if isinstance(make, Interleaved):  # a whole run, because its controller takes longer with every stage
            steps = max(conditions.horizons)
            state = jax.eval_shape(iomt.interleave(make.space(0.1)).init, shape)
        else:
            steps = _TIMED_STEPS[conditions.plan]
            one = jax.tree.map(lambda x: x[0], hyper)
            state = jax.eval_shape(lambda h, params: make(h, jnp.int32(1)).init(params), one, shape)
        alone = functools.partial(run, hyper, split="inner_valid", seeds=1)
        seconds, _ = time_steps(alone, steps, _ROUNDS)
        floats = sum(leaf.size for leaf in jax.tree.leaves(state)) / size
        costs.append(Cost(conditions.setting, label, seconds, floats))
    return costs
