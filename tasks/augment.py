"""Augmentation of any task for meta-training, so that a learned optimizer meets more kinds of problems.

`task.augment` wraps a task. Each meta-training init becomes many copies, whose random draws depend on the init's
index alone. Held-out inits and all data splits stay those of the plain task.

    task:
      name: digits
      augment: {reparametrise: 1.5, label_noise: 0.1, input_scale: 1.0, batch_size: [16, 128]}
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tasks.base import Aux, Batch, Data, Params, Stats, Task, TaskError, check_keys
from tasks.classification import normalized

_MOST_COPIES = 1024
_SEED = 17  # of the draws of an init
_NOISE = 29  # folded into a batch's key
_INPUTS = ("image", "x")  # the field of a batch that input_scale multiplies
_LABEL = "label"
_NOISY = "noisy_label"


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """What is drawn at random.

    Attributes:
      reparametrise: the optimizer sees phi with theta = c · phi, where theta are the network's parameters and c > 0
        is log-normal: the standard deviation of log c for all tensors together, and half of it for each tensor.
      tensor_scale: the standard deviation of log c for each tensor, when not half of reparametrise.
      label_noise: the share of the labels of a training batch that is replaced by a uniformly drawn class, in [0, 1).
      input_scale: the standard deviation of the log of a factor on the inputs, drawn per init.
      batch_size: the smallest and the largest batch size, one of which is drawn log-uniformly for each variant of a
        task. It is the only draw that also concerns held-out inits.
      held_out: whether held-out inits are augmented too.
    """

    reparametrise: float = 0.0
    tensor_scale: float | None = None
    label_noise: float = 0.0
    input_scale: float = 0.0
    batch_size: tuple[int, int] | None = None
    held_out: bool = False

    @classmethod
    def parse(cls, options: Mapping[str, Any], where: str) -> Augmentation:
        """Check the keys and values of a configuration."""
        known = [field.name for field in dataclasses.fields(cls)]
        if not isinstance(options, Mapping):
            raise TaskError(f"{where} is {options!r}; it must be a mapping of {', '.join(known)}")
        check_keys(options, known, where, "a key of an augmentation")
        bounds = {"reparametrise": 10.0, "tensor_scale": 10.0, "label_noise": 0.99, "input_scale": 10.0}
        for key, most in bounds.items():
            value = options.get(key)
            if key in options and (value is not None or key != "tensor_scale") and not _is_number(value, most):
                raise TaskError(f"{where}.{key} is {value!r}; it must be a number from 0 to {most:g}")
        if not isinstance(options.get("held_out", False), bool):
            raise TaskError(f"{where}.held_out is {options['held_out']!r}; it must be true or false")
        sizes = options.get("batch_size")
        if sizes is None:
            return cls(**{**options, "batch_size": None})
        whole = isinstance(sizes, Sequence) and len(sizes) == 2 and all(type(size) is int for size in sizes)
        if not whole or not 1 <= sizes[0] <= sizes[1] <= 1 << 20:
            raise TaskError(f"{where}.batch_size is {sizes!r}; it must be two integers, 1 ≤ smallest ≤ largest ≤ 2^20")
        return cls(**{**options, "batch_size": tuple(sizes)})

    def with_batch_size(self, name: str, options: Mapping[str, Any]) -> dict[str, Any]:
        """The options of a task with the batch size drawn for it: a function of its name and other options."""
        kept = dict(options)
        if self.batch_size is None:
            return kept
        kept.pop("batch_size", None)
        text = json.dumps([name, kept], sort_keys=True, default=str)
        draw = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
        low, high = self.batch_size
        return {**kept, "batch_size": min(round(low * ((high + 1) / low) ** draw), high)}

    def needs_wrapper(self) -> bool:
        """Whether the task's functions change, rather than its batch size alone."""
        return bool(self.reparametrise or self.tensor_scale or self.label_noise or self.input_scale)


def augmented(task: Task, augmentation: Augmentation) -> Task:
    """The task as an optimizer meets it in meta-training; see `Augmentation`.

    An init's index i stands for init i % stride of the plain task; copy i // stride decides the draws, and copy 0 is
    the plain init. The draws are kept in the model state (stats), where the optimizer does not see them:
    {"augment": {"scale": a factor per tensor, "input": [], "noisy": bool []}, "model": the task's own state}.

    Raises:
      TaskError: label noise for a task without integer labels, or an input scale for one without "image" or "x".
    """
    if not augmentation.needs_wrapper():
        return task
    classes = _count_classes(task) if augmentation.label_noise else 0
    field = _input_field(task) if augmentation.input_scale else ""
    stride = 1 + max(_largest(pool) for pool in task.pools.values())
    copies = min(_MOST_COPIES, np.iinfo(np.int32).max // stride - 1)
    if copies < 1:
        raise TaskError(f"task {task.name!r} has init indices up to {stride - 1}; task.augment needs less than 2^30")

    def init(data: Data, i: jax.Array) -> tuple[Params, Stats]:
        params, stats = task.init(data, i % stride)
        plain = i // stride == 0
        factors = _draw(augmentation, params, i)
        factors = jax.tree.map(lambda c: jnp.where(plain, 1.0, c), factors)
        drawn = {"scale": factors[0], "input": factors[1], "noisy": ~jnp.asarray(plain)}
        return jax.tree.map(lambda x, c: x / c, params, factors[0]), {"augment": drawn, "model": stats}

    def batch(data: Data, key: jax.Array) -> Batch:
        examples = task.batch(data, key)
        if not augmentation.label_noise:
            return examples
        chosen_key, class_key = jax.random.split(jax.random.fold_in(key, _NOISE))
        labels = examples[_LABEL]
        other = jax.random.randint(class_key, labels.shape, 0, classes, labels.dtype)
        chosen = jax.random.bernoulli(chosen_key, augmentation.label_noise, labels.shape)
        return {**examples, _NOISY: jnp.where(chosen, other, labels)}

    def loss(params: Params, stats: Stats, batch: Batch, train: bool) -> tuple[jax.Array, Aux]:
        drawn = jax.lax.stop_gradient(stats["augment"])
        theta = jax.tree.map(lambda phi, c: phi * c, params, drawn["scale"])
        if isinstance(batch, Mapping) and _NOISY in batch:
            rest = {key: value for key, value in batch.items() if key != _NOISY}
            batch = {**rest, _LABEL: jnp.where(drawn["noisy"], batch[_NOISY], batch[_LABEL])}
        if field:
            batch = {**batch, field: normalized(batch[field]) * drawn["input"]}
        value, aux = task.loss(theta, stats["model"], batch, train)
        return value, Aux({"augment": stats["augment"], "model": aux.stats}, aux.accuracy)

    pools: dict[str, Sequence[int]] = dict(task.pools)
    for pool in ("meta_train", "held_out") if augmentation.held_out else ("meta_train",):
        pools[pool] = _Copies(task.pools[pool], stride, copies)
    return Task(f"{task.name}, augmented", task.data, init, batch, loss, pools)


def _draw(augmentation: Augmentation, params: Params, i: jax.Array) -> tuple[Params, jax.Array]:
    """(a factor c for each tensor [], the factor of the inputs [])."""
    leaves, tree = jax.tree.flatten(params)
    tensor = augmentation.tensor_scale
    tensor = augmentation.reparametrise / 2 if tensor is None else tensor
    draws = jax.random.normal(jax.random.fold_in(jax.random.key(_SEED), i), (len(leaves) + 2,))
    logs = augmentation.reparametrise * draws[0] + tensor * draws[2:]
    scale = [jnp.exp(logs[n]).astype(leaf.dtype) for n, leaf in enumerate(leaves)]
    return jax.tree.unflatten(tree, scale), jnp.exp(augmentation.input_scale * draws[1])


class _Copies(Sequence[int]):
    """Copies 1 … `copies` of a pool: index i of copy r is i + r · stride. Not a list: a pool may be a million long."""

    def __init__(self, pool: Sequence[int], stride: int, copies: int) -> None:
        self.pool, self.stride, self.copies = pool, stride, copies

    def __len__(self) -> int:
        return len(self.pool) * self.copies

    def __getitem__(self, row: Any) -> Any:
        if isinstance(row, slice):
            return [self[i] for i in range(*row.indices(len(self)))]
        row = range(len(self))[row]
        copy, place = divmod(row, len(self.pool))
        return int(self.pool[place]) + (copy + 1) * self.stride


def _largest(pool: Sequence[int]) -> int:
    return max(pool[0], pool[-1]) if isinstance(pool, range) else int(max(pool))


def _is_number(value: Any, most: float) -> bool:
    return (
        isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and 0 <= value <= most
    )


def _count_classes(task: Task) -> int:
    train = task.data["inner_train"]
    labels = train.get(_LABEL) if isinstance(train, Mapping) else None
    if labels is None or not np.issubdtype(labels.dtype, np.integer):
        raise TaskError(f"task.augment.label_noise needs a task whose examples have an integer {_LABEL!r}")
    return int(np.max(labels)) + 1


def _input_field(task: Task) -> str:
    train = task.data["inner_train"]
    fields = [field for field in _INPUTS if isinstance(train, Mapping) and field in train]
    if not fields or not (train[fields[0]].dtype == np.uint8 or np.issubdtype(train[fields[0]].dtype, np.floating)):
        raise TaskError(f"task.augment.input_scale needs a task whose examples have {' or '.join(map(repr, _INPUTS))}")
    return fields[0]
