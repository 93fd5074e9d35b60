"""Training runs of an evaluation, and their scores on a split."""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from l3rs.baselines import iomt
from metatrain.config import ExecutionConfig, Plan
from metatrain.evaluation.baselines import Baseline, Interleaved, make_baseline
from metatrain.evaluation.interleaved import Trainers, interleaved_rollout
from metatrain.evaluation.learned import LearnedOptimizer
from metatrain.evaluation.records import Curve, Record
from metatrain.evaluation.statistics import area_under_curve
from metatrain.inner.processes import Processes, local_processes
from metatrain.inner.rollout import Score, fused_rollout, stepwise_rollout
from metatrain.system import usable_cpus
from tasks import Task, TaskSample
from tasks.base import AnyTask
from tasks.user_code import callbacks

# [(optimizer, hyper-parameters, sample, horizon, splits, points)] -> [(scores, seconds)]; see `torch_runs.rollouts`
TorchRuns = Callable[[Sequence[Any]], Sequence[tuple[dict[str, Score], float]]]


class Conditions(NamedTuple):
    """What all optimizers of one setting share."""

    setting: str
    task: AnyTask
    samples: TaskSample  # one a seed, leading axis [S]
    horizons: Sequence[int]  # increasing
    tuning_seeds: int  # the first of the samples are those that tune
    points: int  # how often a run is judged on test
    plan: Plan
    trainers: Trainers | None  # of IOMT; None for a task of PyTorch
    log: Callable[[str], None]
    torch_runs: TorchRuns | None = None  # where a task of PyTorch trains, this process or others


@contextlib.contextmanager
def torch_runs_of(task: AnyTask, execution: ExecutionConfig, log: Callable[[str], None]) -> Iterator[TorchRuns | None]:
    """Where the training runs of a task of PyTorch take place: in processes of this machine; None for a task of JAX."""
    if isinstance(task, Task):
        yield None
        return
    from metatrain.evaluation.torch_runs import rollouts
    from tasks.torch import TorchTask

    assert isinstance(task, TorchTask)
    count = local_processes([task], execution.workers if execution.backend == "local" else "auto", usable_cpus())
    if count == 1 or task.recipe is None:
        one = rollouts(task)
        yield lambda messages: [one(message) for message in messages]
        return
    processes = Processes(rollouts, (task,), count, log)
    try:
        yield processes.map
    finally:
        processes.close()


def held_out_samples(task: AnyTask, seed: int, count: int) -> TaskSample:
    """`count` task samples with inits that meta-training never used; leading axis [count]."""
    inits = task.pools["held_out"]
    rows = np.array([inits[i % len(inits)] for i in range(count)], np.int32)
    # 2**31 + i is never a generation's number, so these are never batches of meta-training.
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(
        jnp.arange(count, dtype=jnp.uint32) + jnp.uint32(2**31)
    )
    return TaskSample(jnp.asarray(rows), jax.random.key_data(keys))


def maker(baseline: Baseline | Interleaved, conditions: Conditions) -> Any:
    """A baseline as `Runner` takes it."""
    if conditions.plan == "torch":
        from metatrain.evaluation.torch_runs import torch_maker

        assert isinstance(baseline, Baseline)
        return torch_maker(baseline)
    return baseline if isinstance(baseline, Interleaved) else functools.partial(make_baseline, baseline)


def learned_maker(ours: LearnedOptimizer, conditions: Conditions) -> Any:
    """The learned optimizer as `Runner` takes it."""
    if conditions.plan == "torch":
        from metatrain.evaluation.torch_runs import torch_learned

        return torch_learned(ours)
    return ours.make


# (hyper-parameters [H], samples [S], horizon, split, points) -> (scores [H, S] or [H, S, K], seconds per run)
_Execute = Callable[[Any, TaskSample, int, str, np.ndarray | None], tuple[Score, float]]


class Runner:
    """Runs hyper-parameters on task samples: in one compiled call, step by step on one device, or in PyTorch.

    Args:
      conditions: of the setting.
      make: the optimizer as a function of its hyper-parameters, see `maker` and `learned_maker`, or a variant of IOMT.
      device: where the runs take place; not used by a task of PyTorch.

    Attributes:
      stages: (stages, training losses [steps + 1]) of each run of the last call; only IOMT has any.
    """

    def __init__(self, conditions: Conditions, make: Any, device: jax.Device) -> None:
        self.stages: list[tuple[list[iomt.Stage], np.ndarray]] = []
        self._conditions = conditions
        self._interleaved = make if isinstance(make, Interleaved) else None
        self._execute: _Execute
        if conditions.plan == "torch":
            self._execute = functools.partial(_in_torch, conditions, make)
        elif conditions.plan == "stepwise" or self._interleaved:
            self._execute = _one_by_one(conditions, make, device, self.stages)
        else:
            self._execute = _in_one_call(conditions, make, device)

    def __call__(
        self, hyper: Any, horizon: int, split: str, seeds: int | None = None, points: Sequence[int] | None = None
    ) -> tuple[Score, float]:
        """Train, and judge on a split.

        Args:
          hyper: hyper-parameters, leading axis [H].
          horizon: steps of each run.
          split: where runs are judged.
          seeds: run on the first S samples; on all when not given.
          points: numbers of steps after which each run is judged, [K]; only at its end when not given.

        Returns:
          Scores [H, S], with `points` [H, S, K]; and wall-clock seconds per run.
        """
        self.stages.clear()
        samples = jax.tree.map(lambda x: x[:seeds], self._conditions.samples)
        at = None if points is None else np.asarray(points, np.int32)
        with callbacks(self._conditions.task.name):
            return self._execute(hyper, samples, horizon, split, at)

    def judge(self, hyper: Any, label: str, horizon: int, hparams: dict[str, float]) -> tuple[list[Record], Curve]:
        """Run one hyper-parameter, leading axis [1], on all samples, and judge it on test along the way."""
        setting = self._conditions.setting
        stage = self._interleaved.at(horizon).stage_steps if self._interleaved else 1
        points = _points(horizon, self._conditions.points, stage)
        scores, seconds = self(hyper, horizon, "test", points=points)
        steps, kept = np.unique(points, return_index=True)
        loss, accuracy = (np.asarray(score[0], float)[:, kept] for score in scores)  # [S, K]
        records = [
            Record(setting, label, horizon, seed, losses[-1], accuracies[-1], seconds, dict(hparams),
                   area_under_curve(steps.tolist(), losses))
            for seed, (losses, accuracies) in enumerate(zip(loss.tolist(), accuracy.tolist(), strict=True))
        ]  # fmt: skip
        means = [four_digits(values.mean(0)).tolist() for values in (loss, accuracy)]
        return records, Curve(setting, label, horizon, steps.tolist(), *means)


def four_digits(x: np.ndarray) -> np.ndarray:
    """Values rounded to four significant digits, which keeps the file of results short."""
    return np.array([float(f"{value:.4g}") for value in x.ravel()]).reshape(x.shape)


def _in_one_call(conditions: Conditions, make: Any, device: jax.Device) -> _Execute:
    """All runs are one compiled program."""
    task = conditions.task
    assert isinstance(task, Task)
    rollout, task_data = fused_rollout(task, make, ()), jax.device_put(task.data, device)

    @functools.partial(jax.jit, static_argnames="split")
    def grid(hyper: Any, data: Any, samples: TaskSample, steps: jax.Array, points: Any, split: str) -> Score:
        one = functools.partial(rollout, splits=(split,), points=points)
        runs = jax.vmap(jax.vmap(one, (None, None, 0, None)), (0, None, None, None))(hyper, data, samples, steps)
        return runs[split]

    def train(hyper: Any, samples: TaskSample, steps: jax.Array, points: Any, split: str) -> Score:
        return grid(hyper, task_data, samples, steps, points, split=split)

    return _timed(train, device)


def _one_by_one(conditions: Conditions, make: Any, device: jax.Device, stages: list[Any]) -> _Execute:
    """A loop in Python for each run; those of IOMT leave their stages."""
    task = conditions.task
    assert isinstance(task, Task)
    if isinstance(make, Interleaved):
        assert conditions.trainers is not None
        call = interleaved_rollout(task, make, conditions.plan, conditions.trainers, lambda *run: stages.append(run))
    else:
        call = stepwise_rollout(task, make, ())
    data = jax.device_put(task.data, device)

    def train(hyper: Any, samples: TaskSample, steps: jax.Array, points: Any, split: str) -> Score:
        runs = [[call(h, data, s, steps, (split,), points)[split] for s in _rows(samples)] for h in _rows(hyper)]
        return _stack([_stack(row) for row in runs])

    return _timed(train, device)


def _timed(train: Callable[[Any, TaskSample, jax.Array, Any, str], Score], device: jax.Device) -> _Execute:
    """Training runs on a device, and what one of them takes."""

    def execute(
        hyper: Any, samples: TaskSample, horizon: int, split: str, points: np.ndarray | None
    ) -> tuple[Score, float]:
        began = time.perf_counter()
        hyper, samples, steps, at = jax.device_put((hyper, samples, np.int32(horizon), points), device)
        scores = jax.tree.map(np.asarray, train(hyper, samples, steps, at, split))
        return scores, (time.perf_counter() - began) / math.prod(scores.loss.shape[:2])

    return execute


def _in_torch(
    conditions: Conditions,
    make: Any,
    hyper: Any,
    samples: TaskSample,
    horizon: int,
    split: str,
    points: np.ndarray | None,
) -> tuple[Score, float]:
    """Each run in a process that is free."""
    assert conditions.torch_runs is not None
    hyper_rows, sample_rows = (_rows(jax.tree.map(np.asarray, tree)) for tree in (hyper, samples))
    found = conditions.torch_runs([(make, h, s, horizon, (split,), points) for h in hyper_rows for s in sample_rows])
    scores = _stack([run[split] for run, _ in found])
    shape = (len(hyper_rows), len(sample_rows))
    return jax.tree.map(lambda x: x.reshape(*shape, *x.shape[1:]), scores), sum(s for _, s in found) / len(found)


def _points(horizon: int, count: int, stage: int) -> list[int]:
    """Where a run is judged: at the start, and after `count` numbers of steps, denser at the beginning, each the end
    of a stage. Short horizons repeat some, so that one compiled program serves all horizons."""
    steps = [math.ceil(horizon * (k / count) ** 2) for k in range(count + 1)]
    return [min(-(-step // stage) * stage, horizon) for step in steps]


def _rows(tree: Any) -> list[Any]:
    return [jax.tree.map(lambda x, i=i: x[i], tree) for i in range(jax.tree.leaves(tree)[0].shape[0])]


def _stack(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *leaves: np.stack([np.asarray(leaf) for leaf in leaves]), *trees)
