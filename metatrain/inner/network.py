"""A task's network as the optimizer sees it, whether the task is JAX's or PyTorch's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import l3rs
from l3rs.layers import JAX, Convention, Match, Matching, embedding_rows, match_network
from l3rs.spec import Layer, Spec, Theta
from l3rs.trees import layers_of
from tasks import Task
from tasks.base import AnyTask


def is_torch(task: AnyTask) -> bool:
    """Whether the task's network is PyTorch's."""
    return not isinstance(task, Task)


def task_layers(task: AnyTask) -> tuple[Layer, ...]:
    """The parameter tensors of a task's network, in Flax's layout. A PyTorch model is built for it."""
    if isinstance(task, Task):
        return layers_of(task.params_shape())
    from l3rs.torch.names import network_layers
    from tasks.torch import TorchTask
    from tasks.torch_training import Training, deterministic

    assert isinstance(task, TorchTask)
    with deterministic(task.device):
        return network_layers(Training(task).start(int(task.pools["meta_train"][0])))


def make_spec(layers: tuple[Layer, ...], fields: Mapping[str, Any]) -> Spec:
    """The spec for a network with these layers; `fields` as of `Spec.create`."""
    given = dict(fields)
    directions = tuple(l3rs.Direction.parse(each) for each in given.pop("directions", Spec.directions))
    return Spec(layers, directions, **given)


def task_matches(spec: Spec, task: AnyTask, how: Matching | None = None) -> tuple[Match, ...]:
    """How a task's layers map to those of a spec, in the task's order.

    Raises:
      L3RSError: the optimizer does not fit the network.
    """
    network = [(layer.path, layer.shape) for layer in task_layers(task)]
    return match_network(spec, network, how or Matching(), convention(task))


def convention(task: AnyTask) -> Convention:
    """The order of the layers of a task's network."""
    if isinstance(task, Task):
        return JAX
    from l3rs.torch.names import TORCH

    return TORCH


def embeddings(theta: Theta, spec: Spec, task: AnyTask, how: Matching) -> Any:
    """The row of theta["embedding"] of each of a task's layers, float32 [L, ·]; errors as of `task_matches`."""
    return embedding_rows(theta, spec, task_matches(spec, task, how), task_layers(task), convention(task))
