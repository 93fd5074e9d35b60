"""One step of a `TorchTask` before a run, so that what is wrong with it is one sentence."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tasks.base import TaskError
from tasks.torch import TorchTask, default_loss, describe_batch
from tasks.torch_training import Training, deterministic
from tasks.user_code import first_line

_BATCHES = 4  # L3RS skips a step whose loss is NaN, so that a run would not stop


class Checked(NamedTuple):
    """What a step of a task showed."""

    parameters: int  # values that train
    loss: float  # of the first step
    meta_loss: float  # on outer_valid, before training
    metric: float


def check_training(task: TorchTask) -> Checked:
    """Load the model, take the losses of some batches and the gradients of one, score, and load another init.

    Raises:
      TaskError: the model cannot be trained, the loss is no finite number with a gradient, or `score` fails.
    """
    with deterministic(task.device):
        training = Training(task)
        init = int(task.pools["meta_train"][0])
        params = training.start(init)
        loss = _loss(training, task, 0)
        if not loss.requires_grad:
            raise TaskError(
                f"task {task.name!r}: the loss does not depend on a parameter that trains; is it detached, or computed "
                "under torch.no_grad()?"
            )
        loss.backward()
        if all(param.grad is None for _, param in params):
            raise TaskError(f"task {task.name!r}: no parameter that trains gets a gradient")
        meta_loss, metric = training.score("outer_valid")
        if not math.isfinite(meta_loss):
            raise TaskError(f"task {task.name!r}: the loss on outer_valid is {meta_loss} before any training")
        with torch.no_grad():
            for step in range(1, _BATCHES):
                _loss(training, task, step)
        checked = Checked(sum(param.numel() for _, param in params), loss.item(), meta_loss, metric)
        del params, loss  # frees the network
        training.start(int(task.pools["held_out"][0]))
        return checked


def _loss(training: Training, task: TorchTask, step: int) -> Tensor:
    key = (0, 0)
    outputs: list[Any] = []
    hook = training.model.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    shown = ""
    try:
        shown = describe_batch(training.batch(key, step))
        loss = training.loss(key, step)
    except TaskError:
        raise
    except Exception as error:
        if shown:
            hint = _output_hint(outputs) or _input_hint(task, shown)
            error.args = (f"{first_line(error)}{hint}; a batch is {shown}",)
        raise
    finally:
        hook.remove()
    if not torch.isfinite(loss):
        raise TaskError(
            f"task {task.name!r}: the loss of batch {step + 1} is {loss.item()} before any training, and the batch is "
            f"{shown}; check {'' if task.loss is default_loss else 'loss=, '}the inputs' scale and the labels"
        )
    return loss


def _output_hint(outputs: list[Any]) -> str:
    """What the model returned, if that is not a tensor."""
    if not outputs or isinstance(outputs[-1], Tensor):
        return ""
    output = outputs[-1]
    if isinstance(output, Mapping):
        return f"; the model returns a mapping with {', '.join(map(repr, output))}: the loss must take one of them"
    return f"; the model returns {describe_batch(output)}: the loss must take a tensor of it"


def _input_hint(task: TorchTask, batch: str) -> str:
    """How the default loss calls a model."""
    if task.loss is not default_loss or not batch.startswith("a mapping"):
        return ""
    return "; without loss=… the model takes the entries of a batch as keyword arguments"
