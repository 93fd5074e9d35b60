"""The types of a training problem.

A task is a set of pure functions over arrays. Its data has four splits that are never mixed: gradients are computed
on inner_train, baselines tuned on inner_valid, the meta-loss computed on outer_valid, and reports made on test.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

SPLITS = ("inner_train", "inner_valid", "outer_valid", "test")
POOLS = ("meta_train", "held_out")

Params = Any  # a pytree of float arrays
Stats = Any  # a pytree of model state that has no gradient (batch-norm statistics), maybe empty
Batch = Any  # a pytree of arrays with a leading batch axis
Data = Mapping[str, Any]  # {split: Batch of all its examples}, and whatever else `init` reads


def pip_install(extra: str) -> str:
    """The command that installs an extra of this project, for error messages; tasks do not import l3rs."""
    return f"pip install 'l3rs[{extra}]' ('.[{extra}]' in a checkout)"


class TaskError(ValueError):
    """The caller's input is wrong; the message is one sentence: what, where, what is allowed."""


def check_keys(options: Iterable[str], allowed: Iterable[str], where: str, role: str) -> None:
    """Refuse keys that a mapping of a configuration does not have.

    Args:
      options: the keys found.
      allowed: the keys that are allowed.
      where: path of the mapping, such as "task.source".
      role: what a key stands for, such as "a key of an image set".

    Raises:
      TaskError: a key is not among the allowed ones.
    """
    known = list(allowed)
    for key in options:
        if key not in known:
            raise TaskError(f"{where}.{key} is not {role}; allowed are {', '.join(known)}")


class TaskSample(NamedTuple):
    """The start and the batches of one inner training run; all members of a generation share them."""

    init: jax.Array  # int32 [], an index into the init distribution
    key: jax.Array  # uint32 [2], decides the batches


class Aux(NamedTuple):
    """What a loss function returns in addition to the loss."""

    stats: Stats  # the model's state after this batch
    accuracy: jax.Array  # float32 [], the mean over the batch


class AnyTask:
    """The attributes that tasks of JAX (`Task`) and of PyTorch (`tasks.torch.TorchTask`) share.

    Attributes:
      name: for display.
      data: what functions over arrays read; empty for a task of PyTorch.
      pools: init indices, "meta_train" for meta-training and "held_out" for evaluation.
    """

    name: str
    data: Data
    pools: Mapping[str, Sequence[int]]

    def _check_pools(self) -> None:
        for pool in POOLS:
            if not len(self.pools.get(pool, ())):
                raise TaskError(f"task {self.name!r} has no inits in pool {pool!r}")


@dataclasses.dataclass(frozen=True, eq=False)
class Task(AnyTask):
    """A training problem: data, a model's loss, and a distribution of inits.

    Attributes:
      name: for display.
      data: the four splits and whatever else the functions below read, as numpy arrays.
      init: (data, init index) -> (params, stats).
      batch: (data, key) -> one training batch, drawn from inner_train.
      loss: (params, stats, batch, train) -> (mean loss over the batch, Aux).
      pools: init indices, "meta_train" for meta-training and "held_out" for evaluation.
    """

    name: str
    data: Data
    init: Callable[[Data, jax.Array], tuple[Params, Stats]]
    batch: Callable[[Data, jax.Array], Batch]
    loss: Callable[[Params, Stats, Batch, bool], tuple[jax.Array, Aux]]
    pools: Mapping[str, Sequence[int]]

    def __post_init__(self) -> None:
        for split in SPLITS:
            if split not in self.data:
                raise TaskError(f"task {self.name!r} has no split {split!r}; a task needs {', '.join(SPLITS)}")
            if size(self.data[split]) == 0:
                raise TaskError(f"task {self.name!r}: split {split!r} is empty")
        self._check_pools()

    def params_shape(self) -> Params:
        """The parameters as a pytree of `jax.ShapeDtypeStruct`."""
        return jax.eval_shape(self.init, self.data, jnp.zeros([], jnp.int32))[0]


def size(batch: Batch) -> int:
    """The number of examples in a batch or split."""
    return int(jax.tree.leaves(batch)[0].shape[0])


def sample(task: AnyTask, key: jax.Array, pool: str = "meta_train") -> TaskSample:
    """A task sample: an init of the pool, and a key for the batches.

    Args:
      key: a typed PRNG key.
      pool: "meta_train" or "held_out".
    """
    init_key, batch_key = jax.random.split(key)
    inits = task.pools[pool]
    row = int(jax.random.randint(init_key, (), 0, len(inits)))
    return TaskSample(jnp.asarray(inits[row], jnp.int32), jax.random.key_data(batch_key))


def uniform_batches(batch_size: int) -> Callable[[Data, jax.Array], Batch]:
    """A `Task.batch` that draws examples of inner_train uniformly, with replacement."""

    def batch(data: Data, key: jax.Array) -> Batch:
        train = data["inner_train"]
        rows = jax.random.randint(key, (batch_size,), 0, size(train))
        return jax.tree.map(lambda x: x[rows], train)

    return batch
