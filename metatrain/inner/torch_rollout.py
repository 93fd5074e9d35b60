"""The inner loop of a PyTorch task: an optimizer of `torch.optim`'s kind trains its model in place."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from torch import Tensor, nn

import l3rs
from l3rs.torch import L3RS
from metatrain.inner.rollout import Rollout, Score
from tasks import TaskSample
from tasks.torch import TorchTask
from tasks.torch_training import Training, deterministic
from tasks.user_code import user_code


class Stepper(Protocol):
    """An optimizer whose step may read the loss."""

    def step(self, *, loss: Tensor) -> Any: ...


# (hyper-parameters, parameters by name, horizon) -> optimizer
MakeStepper = Callable[[Any, list[tuple[str, nn.Parameter]], int], Stepper]


@dataclasses.dataclass(frozen=True)
class LearnedTorch:
    """L3RS of the form `spec`, as a function of its meta-parameters. It can be sent to other processes."""

    spec: l3rs.Spec
    guard: bool | l3rs.Guard = False

    def __call__(self, theta: Any, params: list[tuple[str, nn.Parameter]], horizon: int) -> L3RS:
        return L3RS(params, (jax.tree.map(np.asarray, theta), self.spec), horizon, guard=self.guard)


def torch_rollout(training: Training, make: MakeStepper, splits: Sequence[str]) -> Rollout:
    """The inner loop over a PyTorch model. Arguments and results are those of `stepwise_rollout`.

    The model of an init is loaded once and put back in place for every run. PyTorch's generators and settings belong to
    the process: one rollout at a time.
    """
    task = training.task

    def rollout(
        hyper: Any,
        data: Any,
        sample: TaskSample,
        horizon: Any,
        splits: Sequence[str] = splits,
        points: Sequence[int] | np.ndarray | None = None,
    ) -> dict[str, Score]:
        del data  # the task's own objects hold it
        done, scores, optimizer = 0, [], None
        with deterministic(task.device), _any_step_allowed():
            steps = _steps(training, make, hyper, sample, int(horizon))
            for until in [int(horizon)] if points is None else [int(point) for point in points]:
                for _ in range(done, until):
                    _, optimizer = next(steps)
                done = max(done, until)
                with _handed_over(optimizer), user_code(task.label):
                    if done == 0:
                        training.start(int(sample.init))
                    scores.append({split: np.array(training.score(split), np.float32) for split in splits})
        if points is None:
            return {split: Score(*found) for split, found in scores[0].items()}
        return {split: Score(*np.stack([row[split] for row in scores]).T) for split in splits}

    return rollout


@contextlib.contextmanager
def _any_step_allowed() -> Iterator[None]:
    """Without the optimizer's warning of long first steps: candidates try many, and what comes of them decides."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "a first step of L3RS")
        yield


@contextlib.contextmanager
def _handed_over(optimizer: Any) -> Iterator[None]:
    """Put the parameters that an optimizer hands over into the model: its average if it keeps one (schedule-free)."""
    own: Any = getattr(optimizer, "optimizer", None)
    if not (hasattr(own, "eval") and hasattr(own, "train")):
        yield
        return
    own.eval()
    try:
        yield
    finally:
        own.train()


def torch_steps(
    task: TorchTask, make: MakeStepper, hyper: Any, sample: TaskSample, horizon: int
) -> Generator[tuple[list[tuple[str, nn.Parameter]], Stepper], None, None]:
    """One inner loop, step by step: yields (parameters by name, optimizer) after each of `horizon` steps."""
    with deterministic(task.device), _any_step_allowed():
        yield from _steps(Training(task), make, hyper, sample, horizon)


def _steps(
    training: Training, make: MakeStepper, hyper: Any, sample: TaskSample, horizon: int
) -> Generator[tuple[list[tuple[str, nn.Parameter]], Stepper], None, None]:
    key, name = np.asarray(sample.key).tolist(), training.task.label
    with user_code(name):
        params = training.start(int(sample.init))
    optimizer = make(hyper, params, horizon)
    for step in range(horizon):
        for _, param in params:
            param.grad = None
        with user_code(name):
            loss = training.loss(key, step)
            loss.backward()
        optimizer.step(loss=loss.detach())
        yield params, optimizer
