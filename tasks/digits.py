"""Fine-tuning a small MLP on handwritten digits: a task that needs no download."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import jax
import numpy as np

from tasks.base import Data, Params, Stats, Task, TaskError, uniform_batches
from tasks.classification import RANDOM_POOLS, classification_loss
from tasks.data import digits as digits_data
from tasks.data.cache import cached
from tasks.data.splits import cut
from tasks.models import make_model
from tasks.pretrained import cached_inits, pretrain


def digits(
    target: Literal["mnist", "uci"] = "mnist",
    init: Literal["mnist", "uci", "random"] = "uci",
    hidden: Sequence[int] = (64, 64),
    batch_size: int = 64,
    inits: int = 10,
    held_out_inits: int = 6,
    pretrain_steps: tuple[int, int] = (150, 600),
) -> Task:
    """Fine-tune an MLP on 14 × 14 handwritten digits.

    Args:
      target: the digits to fine-tune on.
      init: the digits that the MLPs were pretrained on, or random initialization.
      hidden: widths of the hidden layers.
      batch_size: examples a step.
      inits: pretrained networks for meta-training; they differ in seed and in training length.
      held_out_inits: further ones, never used in meta-training.
      pretrain_steps: the shortest and the longest pretraining.
    """
    for name, value, allowed in (("target", target, ("mnist", "uci")), ("init", init, ("mnist", "uci", "random"))):
        if value not in allowed:
            raise TaskError(f"task.{name} is {value!r}; allowed are {', '.join(allowed)}")
    for name, number in (("batch_size", batch_size), ("inits", inits), ("held_out_inits", held_out_inits)):
        if number < 1:
            raise TaskError(f"task.{name} is {number}; it must be ≥ 1")
    splits = _digits_splits(target)
    if batch_size > len(splits["inner_train"]["label"]):
        raise TaskError(f"task.batch_size is {batch_size}; {target} has {len(splits['inner_train']['label'])} examples")

    model = make_model("mlp", splits["test"]["image"].shape[1:], 10, hidden=hidden)
    loss = classification_loss(model)
    name = f"digits({init} → {target})"
    batch = uniform_batches(batch_size)

    if init == "random":
        return Task(name, splits, lambda _, i: model.init(jax.random.key(i)), batch, loss, RANDOM_POOLS)

    count = inits + held_out_inits
    # Interleaved, so that both pools hold short and long pretrainings.
    low, high = pretrain_steps
    steps = [low + (high - low) * (i * 7 % count) // max(count - 1, 1) for i in range(count)]
    key = {"digits": init, "hidden": list(hidden), "steps": steps, "batch_size": 64}
    stacked = cached_inits(
        key,
        jax.eval_shape(model.init, jax.random.key(0)),
        lambda: pretrain(model, loss, _digits_splits(init), range(count), steps, 64),
    )

    def pretrained(data: Data, i: jax.Array) -> tuple[Params, Stats]:
        return jax.tree.map(lambda x: x[i], data["inits"])

    pools = {"meta_train": range(inits), "held_out": range(inits, count)}
    return Task(name, {**splits, "inits": stacked}, pretrained, batch, loss, pools)


def _digits_splits(name: str) -> dict[str, dict[str, np.ndarray]]:
    def build() -> dict[str, np.ndarray]:
        splits = cut(*digits_data.SOURCES[name]())
        return {f"{split}/{field}": array for split, arrays in splits.items() for field, array in arrays.items()}

    splits: dict[str, dict[str, np.ndarray]] = {}
    for path, array in cached({"digits": name}, build).items():
        split, field = path.split("/")
        splits.setdefault(split, {})[field] = array
    return splits
