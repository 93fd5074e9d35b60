"""Rollouts of IOMT, whose controller runs on the host. They have the arguments and results of other rollouts."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from l3rs.baselines import iomt
from metatrain.config import Plan
from metatrain.evaluation.baselines import SPACES, Interleaved, Tuned
from metatrain.inner.rollout import Rollout, Score, evaluate_split, host_scorer
from tasks import Task, TaskSample
from tasks.base import Data, Params, Stats

_PROBE = 256  # examples on which the accuracy of an init is measured

# (stage steps, moments, name in `SPACES`) -> training of the task in such stages
Trainers = Callable[[int, iomt.space.Moments, str], Callable[..., iomt.Result]]


def trainers(task: Task, plan: Plan) -> Trainers:
    """Compiled training for each τ and space, shared by the variants of IOMT that have them.

    The batches are those of other rollouts.
    """

    def loss(params: Params, stats: Stats, batch: Any) -> tuple[jax.Array, Stats]:
        value, aux = task.loss(params, stats, batch, True)
        return value, aux.stats

    def batch(inputs: dict[str, Any], step: jax.Array) -> Any:
        key = jax.random.wrap_key_data(inputs["key"])
        return task.batch(inputs["data"], jax.random.fold_in(key, step))

    # The surrogates silence this warning too, but warning filters are not safe between threads.
    warnings.filterwarnings("ignore", "The optimal value found", module=r"sklearn\.gaussian_process")

    @functools.cache
    def trainer(stage_steps: int, moments: iomt.space.Moments, space: str) -> Callable[..., iomt.Result]:
        assert plan != "torch", "IOMT trains tasks of JAX"
        options = iomt.Options(stage_steps=stage_steps, moments=moments)
        return iomt.make_train(loss, batch, space=SPACES[space], options=options, plan=plan)

    return trainer


def interleaved_rollout(
    task: Task,
    entry: Interleaved,
    plan: Plan,
    trainer: Trainers,
    watch: Callable[[list[iomt.Stage], np.ndarray], None] | None = None,
) -> Rollout:
    """The inner loop of IOMT, driven from the host, stage by stage.

    ω_t is the option `transferability`, or else the accuracy of the init on the first 256 examples of inner_train:
    equation 6 with β = 1, because a task gives neither features nor source classes. The controller's random choices
    follow from the sample's key. A run whose loss is not finite before the first step has scores of NaN.

    Args:
      task: what is trained.
      entry: which variant.
      plan: how a stage runs.
      trainer: of `trainers(task, plan)`.
      watch: called with the stages and training losses [steps + 1] of each run that had a finite loss to begin with.

    Returns:
      (hyper: Tuned, data, task sample, horizon, splits, points) -> {split: Score}, as
      `stepwise_rollout`; points are ends of stages, or 0.
    """
    start = jax.jit(task.init)
    score = _scorer(task, plan)

    def rollout(
        hyper: Tuned,
        data: Data,
        sample: TaskSample,
        horizon: jax.Array,
        splits: Sequence[str] = ("inner_valid",),
        points: Collection[int] | None = None,
    ) -> dict[str, Score]:
        steps = int(horizon)
        wanted = [steps] if points is None else [int(point) for point in points]
        params, stats = start(data, sample.init)
        found: dict[int, dict[str, np.ndarray]] = {}

        def judge(params: Params, stats: Stats, step: int) -> None:
            if step in wanted:
                found[step] = {split: score(data[split], params, stats) for split in splits}

        options = entry.at(steps)
        if "transferability" not in entry.options:
            few = jax.tree.map(lambda x: x[:_PROBE], data["inner_train"])
            accuracy = float(score(few, params, stats)[1])
            options = dataclasses.replace(options, transferability=accuracy if 0 <= accuracy <= 1 else 0.0)
        seed = int(np.asarray(sample.key)[-1])
        controller = iomt.Controller(entry.space(float(hyper.learning_rate)), options, seed)
        judge(params, stats, 0)
        try:
            train = trainer(options.stage_steps, options.moments, entry.optimizers)
            inputs = {"data": data, "key": sample.key}
            result = train(params, stats, inputs, steps, controller=controller, after_stage=judge)
            if watch is not None:
                watch(result.history, result.losses)
        except iomt.NoFiniteStartError:
            found = {step: {split: np.full(2, np.nan) for split in splits} for step in wanted}
        if points is None:
            return {split: Score(*found[steps][split]) for split in splits}
        return {split: Score(*np.stack([found[step][split] for step in wanted]).T) for split in splits}

    return rollout


def _scorer(task: Task, plan: Plan) -> Callable[[Any, Params, Stats], np.ndarray]:
    """(examples, params, stats) -> their mean loss and accuracy, [2]."""
    if plan == "stepwise":
        return host_scorer(task)

    @jax.jit
    def score(examples: Any, params: Params, stats: Stats) -> jax.Array:
        return jnp.stack(evaluate_split(task, {"": examples}, "", params, stats))

    return lambda *arguments: np.asarray(score(*arguments))
