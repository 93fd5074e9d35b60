"""What an evaluation does differently for a task of PyTorch: the optimizers that it runs, and what it reads of them."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from torch import Tensor, nn

import l3rs.torch
from metatrain.evaluation.baselines import Baseline, Interleaved, Tuned
from metatrain.evaluation.learned import LearnedOptimizer
from metatrain.evaluation.records import L3RS, Cost, DecisionPath
from metatrain.evaluation.runner import Conditions, four_digits
from metatrain.evaluation.torch_baselines import Scheduled, make_torch_baseline
from metatrain.inner.rollout import Score
from metatrain.inner.torch_rollout import LearnedTorch, MakeStepper, torch_rollout, torch_steps
from tasks.torch import TorchTask
from tasks.torch_training import Training

_TIMED_STEPS = 10


def torch_learned(ours: LearnedOptimizer) -> MakeStepper:
    """The learned optimizer, as a function of its meta-parameters."""
    return LearnedTorch(ours.spec, ours.guard)


def torch_multiplied(ours: LearnedOptimizer) -> MakeStepper:
    """The learned optimizer with its steps multiplied, as a function of (meta-parameters, multiplier)."""
    return functools.partial(_multiplied, ours.spec, ours.guard)


def _multiplied(
    spec: l3rs.Spec, guard: Any, hyper: Any, params: list[tuple[str, nn.Parameter]], horizon: int
) -> l3rs.torch.L3RS:
    theta, multiplier = hyper
    return l3rs.torch.L3RS(params, (jax.tree.map(np.asarray, theta), spec), horizon, lr=float(multiplier), guard=guard)


def torch_maker(baseline: Baseline) -> MakeStepper:
    """A baseline, as a function of its hyper-parameters."""
    return functools.partial(make_torch_baseline, baseline)


Rollouts = Callable[[Any], tuple[dict[str, Score], float]]


def rollouts(task: TorchTask) -> Rollouts:
    """The training runs of a task: (optimizer, hyper-parameters, sample, horizon, splits, points) -> (scores, seconds).

    See `torch_rollout`. A process of `metatrain.inner.processes` calls it.
    """
    training = Training(task)

    def run(message: Any) -> tuple[dict[str, Score], float]:
        make, hyper, sample, horizon, splits, points = message
        began = time.perf_counter()
        scores = torch_rollout(training, make, splits)(hyper, {}, sample, horizon, splits, points)
        return scores, time.perf_counter() - began

    return run


def torch_decisions(ours: LearnedOptimizer, conditions: Conditions, horizon: int) -> DecisionPath:
    """μ and λ of the parameters that get gradients, at every step of the first seed's run."""
    task = conditions.task
    assert isinstance(task, TorchTask)
    sample = jax.tree.map(lambda x: x[0], conditions.samples)
    decisions: list[dict[str, tuple[np.ndarray, float]]] = []  # of each step
    for params, optimizer in torch_steps(task, torch_learned(ours), ours.theta, sample, horizon):
        assert isinstance(optimizer, l3rs.torch.L3RS)
        decisions.append(
            {
                name: (state["mix"].numpy().copy(), float(state["step_norm"]) / math.sqrt(max(param.numel(), 1)))
                for name, param in params
                if (state := optimizer.state.get(param))  # from its first gradient on
            }
        )
    shapes = {name: list(param.shape) for name, param in params if name in decisions[-1]}
    complete = [[step[name] for name in shapes] for step in decisions if len(step) == len(shapes)]
    return DecisionPath(
        setting=conditions.setting,
        horizon=horizon,
        layers=list(shapes),
        shapes=list(shapes.values()),
        directions=[direction.name for direction in ours.spec.directions],
        mix=np.array([[mix for mix, _ in step] for step in complete]).round(4).tolist(),
        step_rms=four_digits(np.array([[rms for _, rms in step] for step in complete])).tolist(),
    )


def torch_costs(
    ours: LearnedOptimizer | None, rivals: Mapping[str, Baseline | Interleaved], conditions: Conditions
) -> list[Cost]:
    """The cost of a training step with each optimizer and schedule."""
    costs = [] if ours is None else [_cost(L3RS, torch_learned(ours), ours.theta, conditions)]
    for name, baseline in rivals.items():
        assert isinstance(baseline, Baseline)
        for schedule in baseline.schedules:
            hyper = jax.tree.map(lambda x: x[0], Tuned.grid([baseline.learning_rate], schedule))
            costs.append(_cost(f"{name}/{schedule}", torch_maker(baseline), hyper, conditions))
    return costs


def _cost(label: str, make: MakeStepper, hyper: Any, conditions: Conditions) -> Cost:
    task = conditions.task
    assert isinstance(task, TorchTask)
    sample = jax.tree.map(lambda x: x[0], conditions.samples)
    seconds, began = [], time.perf_counter()
    steps = torch_steps(task, make, hyper, sample, _TIMED_STEPS)
    for _ in range(_TIMED_STEPS):
        params, optimizer = next(steps)
        seconds.append(time.perf_counter() - began)
        began = time.perf_counter()
    steps.close()
    inner: Any = optimizer.optimizer if isinstance(optimizer, Scheduled) else optimizer
    held = sum(_floats(list(inner.state[param].values())) for _, param in params if param in inner.state)
    size = sum(param.numel() for _, param in params)
    return Cost(conditions.setting, label, float(np.median(seconds[1:])), held / size)


def _floats(values: Sequence[Any]) -> int:
    return sum(value.numel() if isinstance(value, Tensor) else 1 for value in values)
